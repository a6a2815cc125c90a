"""The config of an evaluation: base, data, how images are generated, and which models score them."""

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
"""Minimum number of samples for a distance between sets."""
LEAST_FOR_INTERVALS = 20
"""Minimum number of samples for an interval; with fewer, bootstrap intervals are too narrow."""
_SCENES = {"split": "test", "count": 500}


@dataclass(frozen=True, config=SECTION)
class EvaluationConfig:
    """A whole evaluation except for the adapters, all of which are evaluated in the same way."""

    base: BaseOptions = field(default_factory=BaseOptions)
    """The base model that generates the images."""
    data: DataOptions = field(default_factory=DataOptions)
    """The samples, as in a recipe; for scenes, `split` is "test" or "novel"."""
    first: NotNegative = 0
    """Index of the first sample to use; for scenes, the first seed."""
    prompts: Prompts = "own"
    """"own" uses the samples' captions and "empty" the empty prompt. "contradicting" uses captions that do
    not fit the map: a scene's own caption with all shapes replaced by others, or the next different
    caption."""
    num_inference_steps: Positive = STEPS
    """Sampling steps, with the base's own scheduler."""
    guidance_scale: AtLeast0 = GUIDANCE_SCALE
    """Guidance scale; 1 is no guidance, and about 2 suits the embedded base."""
    seed: NotNegative = 0
    """Seed of the noise, which depends only on the seed and the sample, so it is the same for all methods."""
    batch_size: Positive = 8
    """Images per batch and device."""
    policy: Policy = DEFAULT_POLICY
    """Which guidance branches get a Nexus adapter's features."""
    adapter_reads_prompt: bool = True
    """false passes the empty prompt to Nexus adapters, but not to the base: to measure what an adapter reads,
    or for those trained with `adapter.reads_prompt = false`."""
    scale: AtLeast0 = 1.0
    """Strength of the control."""
    noise_exponent: AtLeast0 | None = None
    """For Nexus and T2I-Adapters, as in `Control`; None uses the value in each adapter's config."""
    dtype: Dtype = "auto"
    """dtype of the models; "auto" is float16 on CUDA, else float32."""
    features: str = ""
    """A vision model (folder, Hub id or TorchScript file) whose features are used for distances between sets;
    "embedded" is the CLIP of the embedded world."""
    clip: str = ""
    """A CLIP model (folder or Hub id) for CLIP scores; "embedded" as in `features`."""
    judge: dict[str, bool | float | str] = field(default_factory=dict)
    """Options of the extractor for generated images that differ from those in `data.extractor`."""

    def __post_init__(self) -> None:
        """Check values that depend on each other."""
        data = self.data
        is_scenes = data.kind == "scenes"
        checks: list[tuple[bool, str, str, Any]] = [
            (not data.aspect_buckets, "data.aspect_buckets", "false, since all images have one size", True),
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
                f"no options, since the {data.condition} maps of scenes are exact",
                repr(dict(data.extractor)),
            ),
            (
                not is_scenes or data.resolution == SIZE,
                "data.resolution",
                f"{SIZE}, the size of scenes",
                data.resolution,
            ),
            # The default has no data, which is an error when the data are opened.
            *(data_agreements(data, {"split": ("table", "scenes")}) if data != DataOptions() else ()),
        ]
        for fits, key, expected, received in checks:
            expect(fits, key, expected, received)

    @property
    def sampling(self) -> Sampling:
        """The settings as `generate_batch` accepts them."""
        return Sampling(self.num_inference_steps, self.guidance_scale, self.seed, self.batch_size)


@dataclass(frozen=True, config=SECTION)
class EvaluationRecipe(EvaluationConfig):
    """An evaluation in a TOML file: the config and the adapters to evaluate."""

    adapters: dict[str, str] = field(default_factory=dict)
    """Name in tables -> anything that `load_adapter` accepts."""
    held_out_of: str = ""
    """The folder of a run; an error is raised if it was trained on any of the samples."""
    imports: tuple[str, ...] = ()
    """Your modules or .py files to import, which register blocks, methods, bases, conditions or metrics."""

    @property
    def config(self) -> EvaluationConfig:
        """The config without the adapters."""
        return EvaluationConfig(
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(EvaluationConfig)}
        )


def with_defaults(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested tables of an evaluation with defaults that depend on its data and base.

    Without a path, the data are 500 scenes, scored by the embedded CLIP; with one, their kind is detected.
    The guidance scale is that of the base. Existing values are never changed.

    Raises:
        InvalidArgument: named "data.path", for a path of no known kind.
    """
    data, base = content.get("data", {}), content.get("base", {})
    if not isinstance(data, Mapping) or not isinstance(base, Mapping):
        return dict(content)  # validation rejects it
    filled = data_with_defaults(data)
    own: dict[str, Any] = {"guidance_scale": guidance_for(str(base.get("path", EMBEDDED)))}
    if filled["kind"] == "scenes":
        own["clip"] = EMBEDDED
        count = filled["count"]
        own["features"] = EMBEDDED if isinstance(count, int) and count >= LEAST_FOR_DISTANCES else ""
    return {**own, **content, "data": filled}


def data_with_defaults(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return `[data]` with its kind and, for scenes, split and count, as `with_defaults` does."""
    kind = data.get("kind", "scenes")
    if "kind" not in data and data.get("shards"):
        kind = "tars"
    elif "kind" not in data and data.get("path"):
        kind = data_kind(str(data["path"]))
    return {**(_SCENES if kind == "scenes" else {}), "kind": kind, **data}


def data_kind(path: str) -> str:
    """Return the kind of data at a path: "prepared", or a kind that `nexus prepare` detects."""
    if is_prepared(path):
        return "prepared"
    with renamed({"path": "data.path"}):
        kind = find_kind(path)
    if kind == "coco":
        hint = "Run nexus prepare on it and evaluate the prepared set"
        raise InvalidArgument("data.path", "data that can be evaluated", f"'{path}', a COCO folder", hint)
    return kind
