"""What an evaluation is of: base, data, how pictures are drawn and by what they are scored."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from nexus_adapters.embedded.maps import MAPS
from nexus_adapters.errors import expect
from nexus_adapters.evaluation.generation import Sampling
from nexus_adapters.training.config import (
    SECTION,
    AtLeast0,
    BaseOptions,
    DataOptions,
    NotNegative,
    Positive,
    data_agreements,
)

Prompts = Literal["own", "empty", "contradicting"]


@dataclass(frozen=True, config=SECTION)
class EvaluationConfig:
    """An evaluation with nothing left out. It names no adapters: all are evaluated alike."""

    base: BaseOptions = field(default_factory=BaseOptions)
    """The Stable Diffusion that draws."""
    data: DataOptions = field(default_factory=DataOptions)
    """The samples, as in a recipe; of scenes, `split` is "test" or "novel"."""
    first: NotNegative = 0
    """How many samples to leave out at the beginning; of scenes, the first seed."""
    prompts: Prompts = "own"
    """"empty" draws without words; "contradicting" takes words that do not fit the map: a scene's own
    caption with every shape exchanged for one that it does not have; else the next sample's caption."""
    num_inference_steps: Positive = 20
    """Of the base's own sampler."""
    guidance_scale: AtLeast0 = 7.5
    """1 is no guidance; the embedded base likes 2."""
    seed: NotNegative = 0
    """Of the noise. Sample and seed decide it, so all methods start from the same."""
    batch_size: Positive = 8
    """Pictures at once on each device."""
    policy: Literal["positive", "per_branch", "cond_only"] = "positive"
    """Which guidance branches get a Nexus adapter's features."""
    adapter_reads_prompt: bool = True
    """False hands Nexus adapters the empty prompt, on which `adapter.reads_prompt = false` trained them."""
    scale: AtLeast0 = 1.0
    """Strength of the control."""
    noise_exponent: AtLeast0 | None = None
    """Of Nexus and T2I-Adapters, as in `Control`; None is what an adapter's config says."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """What models compute in: "auto" is float16 on CUDA, float32 elsewhere."""
    features: str = ""
    """A vision model, folder or Hub id (or TorchScript file), over whose features sets are compared;
    "embedded" is the CLIP of the embedded world."""
    clip: str = ""
    """A CLIP, folder or Hub id, for CLIP scores; "embedded" as in `features`."""
    judge: dict[str, bool | float | str] = field(default_factory=dict)
    """Options of the extractor that draws the pictures' maps again, where they are not `data.extractor`'s."""

    def __post_init__(self) -> None:
        """What one field alone does not show."""
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
                not is_scenes or data.resolution == 128,
                "data.resolution",
                "128, the size of scenes",
                data.resolution,
            ),
            # The default names no data at all; that is refused where the data are opened.
            *(data_agreements(data, {"split": ("table", "scenes")}) if data != DataOptions() else ()),
        ]
        for fits, key, expected, received in checks:
            expect(fits, key, expected, received)

    @property
    def sampling(self) -> Sampling:
        """As `draw_batch` takes it."""
        return Sampling(self.num_inference_steps, self.guidance_scale, self.seed, self.batch_size)
