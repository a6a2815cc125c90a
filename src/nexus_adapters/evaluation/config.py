"""What an evaluation is of: base, data, how images are generated and by what they are scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from pydantic.dataclasses import dataclass

from nexus_adapters.bundled import EMBEDDED, guidance_for
from nexus_adapters.choices import DEFAULT_POLICY, GUIDANCE_SCALE, STEPS, Dtype, Policy, Prompts
from nexus_adapters.data.prepared_set import is_prepared
from nexus_adapters.embedded.maps import MAPS
from nexus_adapters.embedded.scene import SIZE
from nexus_adapters.errors import InvalidArgument, expect, renamed
from nexus_adapters.evaluation.generation import Sampling
from nexus_adapters.prepare.source_kinds import find_kind
from nexus_adapters.training.config import (
    AtLeast0,
    BaseOptions,
    DataOptions,
    NotNegative,
    Positive,
    data_agreements,
)
from nexus_adapters.training.parsing import SECTION

LEAST_FOR_DISTANCES = 40
"""Samples that a distance between sets needs."""
LEAST_FOR_INTERVALS = 20
"""Samples that an interval needs; the bootstrap's is too narrow for fewer, and of one sample has no width."""
_SCENES = {"split": "test", "count": 500}


@dataclass(frozen=True, config=SECTION)
class EvaluationConfig:
    """A whole evaluation, except for the adapters, which are all evaluated alike."""

    base: BaseOptions = field(default_factory=BaseOptions)
    """The Stable Diffusion that generates."""
    data: DataOptions = field(default_factory=DataOptions)
    """The samples, as in a recipe; of scenes, `split` is "test" or "novel"."""
    first: NotNegative = 0
    """How many samples to leave out at the beginning; of scenes, the first seed."""
    prompts: Prompts = "own"
    """"empty" is no words at all; "contradicting" takes words that do not fit the map: a scene's own
    caption with every shape exchanged for one that it does not have; else the caption of the next sample that
    has another one."""
    num_inference_steps: Positive = STEPS
    """Of the base's own sampler."""
    guidance_scale: AtLeast0 = GUIDANCE_SCALE
    """1 is no guidance; 2 suits the embedded base."""
    seed: NotNegative = 0
    """Of the noise. Sample and seed decide it, so all methods start from the same."""
    batch_size: Positive = 8
    """Images at once on each device."""
    policy: Policy = DEFAULT_POLICY
    """Which guidance branches get a Nexus adapter's features."""
    adapter_reads_prompt: bool = True
    """False hands Nexus adapters the empty prompt, on which `adapter.reads_prompt = false` trained them."""
    scale: AtLeast0 = 1.0
    """Strength of the control."""
    noise_exponent: AtLeast0 | None = None
    """Of Nexus and T2I-Adapters, as in `Control`; None is what an adapter's config says."""
    dtype: Dtype = "auto"
    """What models compute in: "auto" is float16 on CUDA, float32 elsewhere."""
    features: str = ""
    """A vision model, folder or Hub id (or TorchScript file), over whose features sets are compared;
    "embedded" is the CLIP of the embedded world."""
    clip: str = ""
    """A CLIP, folder or Hub id, for CLIP scores; "embedded" as in `features`."""
    judge: dict[str, bool | float | str] = field(default_factory=dict)
    """Options of the extractor for the generated images, where they are not `data.extractor`'s."""

    def __post_init__(self) -> None:
        """Check the values that depend on each other."""
        data = self.data
        is_scenes = data.kind == "scenes"
        checks: list[tuple[bool, str, str, Any]] = [
            (not data.aspect_buckets, "data.aspect_buckets", "false: all images are of one size", True),
            (
                not is_scenes or data.split in ("test", "novel"),
                "data.split",
                "test or novel, for data.kind 'scenes'",
                repr(data.split),
            ),
            (
                not is_scenes or data.condition in MAPS,
                "data.condition",
                f"one of {', '.join(MAPS)}, for data.kind 'scenes'",
                repr(data.condition),
            ),
            (
                not is_scenes or data.condition == "canny" or not data.extractor,
                "data.extractor",
                f"no options, since scenes have exact maps for {data.condition}",
                repr(dict(data.extractor)),
            ),
            (
                not is_scenes or data.resolution == SIZE,
                "data.resolution",
                f"{SIZE}, the size of scenes",
                data.resolution,
            ),
            # The default names no data at all; that is refused where the data are opened.
            *(data_agreements(data, {"split": ("table", "scenes")}) if data != DataOptions() else ()),
        ]
        for fits, key, expected, received in checks:
            expect(fits, key, expected, received)

    @property
    def sampling(self) -> Sampling:
        """As `generate_batch` takes it."""
        return Sampling(self.num_inference_steps, self.guidance_scale, self.seed, self.batch_size)


@dataclass(frozen=True, config=SECTION)
class EvaluationRecipe(EvaluationConfig):
    """An evaluation as a TOML file has it: the config, and what is evaluated."""

    adapters: dict[str, str] = field(default_factory=dict)
    """Name in tables -> whatever `load_adapter` takes."""
    held_out_of: str = ""
    """The folder of a run. An error where it was trained on any of the samples."""
    imports: tuple[str, ...] = ()
    """Your modules, or .py files, that register blocks, methods, bases, conditions or metrics."""

    @property
    def config(self) -> EvaluationConfig:
        """The config alone."""
        return EvaluationConfig(
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(EvaluationConfig)}
        )


def with_defaults(content: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables of an evaluation, with the defaults that follow from its data and its base.

    Without a path the data are 500 scenes, which the embedded CLIP scores; with one, of the kind that is
    there. The guidance scale is the base's. What is given stays, whatever it is.

    InvalidArgument, named "data.path", for a path of no kind that is read.
    """
    data, base = content.get("data", {}), content.get("base", {})
    if not isinstance(data, Mapping) or not isinstance(base, Mapping):
        return dict(content)  # which is refused when it is validated
    filled = data_with_defaults(data)
    own: dict[str, Any] = {"guidance_scale": guidance_for(str(base.get("path", EMBEDDED)))}
    if filled["kind"] == "scenes":
        own["clip"] = EMBEDDED
        count = filled["count"]
        own["features"] = EMBEDDED if isinstance(count, int) and count >= LEAST_FOR_DISTANCES else ""
    return {**own, **content, "data": filled}


def data_with_defaults(data: Mapping[str, Any]) -> dict[str, Any]:
    """`[data]` with its kind, and for scenes the split and count of an evaluation. As in `with_defaults`."""
    kind = data.get("kind", "scenes")
    if "kind" not in data and data.get("shards"):
        kind = "tars"
    elif "kind" not in data and data.get("path"):
        kind = data_kind(str(data["path"]))
    return {**(_SCENES if kind == "scenes" else {}), "kind": kind, **data}


def data_kind(path: str) -> str:
    """The kind of data at a path, by the rules of `nexus prepare`, and a prepared set, which it makes."""
    if is_prepared(path):
        return "prepared"
    with renamed({"path": "data.path"}):
        kind = find_kind(path)
    if kind == "coco":
        hint = "Run nexus prepare, whose sets are read"
        raise InvalidArgument(
            "data.path", "data of a kind that is evaluated", f"'{path}', a COCO folder", hint
        )
    return kind
