"""The options of a recipe, as frozen dataclasses. All values are checked before anything is loaded.

`TrainConfig` is the whole recipe; each section of the TOML file is a dataclass here. An option that a recipe
omits has the default given here. The string below a field documents it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from nexus_adapters.bases.loading import BaseSource
from nexus_adapters.bundled import EMBEDDED
from nexus_adapters.choices import CONDITION, GUIDANCE_SCALE, STEPS, DataKind, PredictionType
from nexus_adapters.data.crop import MAX_SIDE
from nexus_adapters.data.prepared_set import geometry_of, is_prepared
from nexus_adapters.embedded.scene import SIZE
from nexus_adapters.errors import MISSING, InvalidArgument, expect
from nexus_adapters.methods import AdapterOptions
from nexus_adapters.training.adapter_section import adapter_options
from nexus_adapters.training.parsing import SECTION

_DEFAULT_RESOLUTION = 512  # for data without a fixed size
_MAX_INTEGER = 2**32 - 1  # above it, lengths and random generators overflow
_MOST_SCENES = 1_000_000  # they are listed in memory
_MOST_WORKERS = 1024  # processes; a larger number is a typo
Positive = Annotated[int, Field(gt=0, le=_MAX_INTEGER)]
NotNegative = Annotated[int, Field(ge=0, le=_MAX_INTEGER)]
_LARGEST = 1e30  # above it, single precision overflows
Above0 = Annotated[float, Field(gt=0, le=_LARGEST)]
AtLeast0 = Annotated[float, Field(ge=0, le=_LARGEST)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
MixedPrecision = Literal["auto", "no", "fp16", "bf16"]


@dataclass(frozen=True, config=SECTION)
class BaseOptions:
    """`[base]`: the base model, which stays frozen."""

    path: str = EMBEDDED
    """A folder in diffusers' layout, a Hub id, or a single .safetensors file; "embedded" is the small model
    in nexus-adapters[embedded]."""
    revision: str = ""
    """Branch, tag or commit on the Hub; empty for the latest."""
    variant: str = ""
    """Variant of the weight files, such as "fp16"; empty for the files without a variant."""
    config: str = ""
    """Only for a single file: a folder or Hub id in diffusers' layout from which the configuration is read,
    but no weights. Empty lets diffusers download its own."""
    prediction_type: Literal["", PredictionType] = ""
    """Only for a single file, and required for Stable Diffusion 2.x: what the model predicts."""

    @property
    def source(self) -> BaseSource:
        """The base as `load_base` accepts it."""
        return BaseSource(self.path, self.revision, self.variant, self.config, self.prediction_type)


@dataclass(frozen=True, config=SECTION)
class DataOptions:
    """`[data]`: where samples come from, and how they are fitted to the base."""

    kind: DataKind = "folder"
    """"folder" is an image folder, "prepared" a set made by `nexus prepare`, "table" a Hugging Face dataset,
    "tars" WebDataset shards, and "scenes" the embedded model's synthetic scenes."""
    path: str = ""
    """The folder, or the dataset's Hub id or folder."""
    shards: tuple[str, ...] = ()
    """For "tars": paths, globs or URLs; a range is written as in "train-{000..127}.tar"."""
    config_name: str = ""
    """Configuration of a Hugging Face dataset that has several, such as "2m_first_1k"; else empty."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    revision: str = ""
    """Branch, tag or commit of a Hugging Face dataset on the Hub; empty for the latest."""
    image_column: str = ""
    """Name of the image column or tar member; empty for the default of the kind."""
    condition_column: str = ""
    """Name of the column or tar member with the structure maps; empty to extract them as `condition` says."""
    caption_column: str = ""
    """Name of the caption column or tar member; empty for the default of the kind. "json:caption" is the key
    `caption` of the JSON objects in the member `json`."""
    allow_outside: bool = False
    """Read files outside the dataset's folder: absolute paths, paths with "..", and captions and metadata
    that are links. Only for data that you trust."""
    condition: str = CONDITION
    """The kind of structure map: the name of an extractor, which extracts the maps if the data have none."""
    extractor: dict[str, bool | float | str] = field(default_factory=dict)
    """Options of the extractor, such as `low` and `high` for canny or `model` for depth."""
    count: NotNegative = 0
    """Use only the first `count` samples; 0 for all. Required for scenes, whose number is unlimited."""
    resolution: Annotated[int, Field(ge=0, le=MAX_SIDE)] = 0
    """Side, in pixels, of the square that images are fitted to; with `aspect_buckets`, the square with the
    same area. 0 means the size of a prepared set, 128 for scenes, and 512 for everything else."""
    aspect_buckets: bool = False
    """Approximately keep the images' aspect ratio: all samples of a batch have the same of several shapes."""
    max_bad_fraction: Fraction = 0.25
    """Unreadable samples are replaced and reported; the run stops if they exceed this fraction of all."""
    workers: Annotated[int, Field(ge=0, le=_MOST_WORKERS)] = 0
    """Processes per training process that read samples in advance; 0 reads them between the steps."""

    @property
    def is_remote(self) -> bool:
        """Whether shards have to be downloaded."""
        return any("://" in shard for shard in self.shards)

    @property
    def is_local(self) -> bool:
        """Whether the samples can be opened and read without a download."""
        is_on_hub = self.kind == "table" and not Path(self.path).exists()
        return not (is_on_hub or self.is_remote)

    def __post_init__(self) -> None:
        """Recognize a prepared set also under kind "folder", and fill in the resolution."""
        if self.kind == "folder" and self.path and is_prepared(self.path):
            object.__setattr__(self, "kind", "prepared")
        if self.resolution == 0:
            object.__setattr__(self, "resolution", self.own_resolution() or _DEFAULT_RESOLUTION)

    def own_resolution(self) -> int | None:
        """Return the side, in pixels, of a prepared set's images or of scenes; None for other data."""
        if self.kind == "scenes":
            return SIZE
        if self.kind != "prepared":
            return None
        try:
            geometry = geometry_of(self.path)
        except InvalidArgument:  # opening the set raises it again and names the path
            return None
        return None if geometry is None else min(geometry.width, geometry.height)


@dataclass(frozen=True, config=SECTION)
class CacheOptions:
    """`[cache]`: latents, structure maps and prompt embeddings, which are computed once."""

    enabled: bool = True
    """false encodes images and prompts in every step."""
    folder: str = ""
    """The cache's folder; empty for nexus-adapters/training in the user's cache folder."""


@dataclass(frozen=True, config=SECTION)
class LossOptions:
    """`[loss]`: what is minimized."""

    timesteps: Literal["uniform", "cubic"] = "cubic"
    """How timesteps are sampled; "cubic" prefers noisy ones (T2I-Adapter, section 3.4)."""
    band: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Sample timesteps only between these two fractions of the noise schedule; 1 is pure noise."""
    min_snr_gamma: AtLeast0 = 0.0
    """Gamma of Min-SNR weighting (arXiv 2303.09556), whose authors use 5; 0 weights all timesteps equally."""
    prompt_dropout: Fraction = 0.1
    """Fraction of the samples for which base and adapter read the empty prompt."""
    condition_dropout: BelowOne = 0.0
    """Fraction of the samples for which the features are dropped; below 1, since they train nothing."""


@dataclass(frozen=True, config=SECTION)
class TrainingOptions:
    """`[training]`: steps, optimizer, precision and device."""

    max_train_steps: Positive = 10_000
    """Number of optimizer steps in the whole run."""
    batch_size: Positive = 2
    """Samples per batch and device."""
    gradient_accumulation_steps: Positive = 4
    """Batches per optimizer step."""
    learning_rate: Above0 = 1e-5
    """Learning rate after the warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The learning rate after the warm-up: constant, or falling to zero at the last step."""
    warmup_steps: NotNegative = 0
    """Optimizer steps during which the learning rate rises from near zero."""
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """The optimizer; "adamw8bit" needs CUDA and bitsandbytes."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """AdamW's decay rates for the averages of the gradient and of its square."""
    epsilon: Above0 = 1e-8
    """Epsilon added to AdamW's denominator."""
    weight_decay: AtLeast0 = 1e-2
    """Decoupled weight decay: a step multiplies the weights by 1 - learning_rate * weight_decay."""
    max_grad_norm: Above0 = 1.0
    """Gradient-clipping norm."""
    ema_decay: BelowOne = 0.0
    """Decay of a moving average of the weights, such as 0.9999, which is then the result; 0 for none."""
    mixed_precision: MixedPrecision = "auto"
    """"auto" is bf16 if the device supports it in hardware, else fp16 on CUDA, else no."""
    gradient_checkpointing: bool = False
    """Recompute the base's activations in the backward pass: uses less memory but takes longer."""
    compile: bool = False
    """Compile base and adapter with torch.compile."""
    cuda_graphs: bool = False
    """On CUDA, record the frozen denoiser as CUDA graphs: faster if the GPU waits for the CPU, as with small
    models or batches. No effect on a CPU and with ControlNet-XS, whose whole network is trained."""
    channels_last: bool = True
    """Use the channels-last memory layout, in which convolutions are faster on most devices."""
    device: Literal["auto", "cpu"] = "auto"
    """"auto" uses CUDA if available, else the CPU; "cpu" never uses CUDA."""
    max_bad_steps: Positive = 20
    """Steps without a finite gradient are skipped; the run stops after this many in a row."""


@dataclass(frozen=True, config=SECTION)
class CheckpointOptions:
    """`[checkpoint]`: the checkpoints from which an interrupted run resumes."""

    every_steps: Positive = 500
    """Optimizer steps between checkpoints."""
    keep: Positive = 2
    """How many of the latest checkpoints are kept."""
    keep_every: NotNegative = 0
    """Also keep, permanently, the checkpoint of every step that is a multiple of this; 0 for none."""

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is due after this number of steps."""
        return step % self.every_steps == 0 or (self.keep_every > 0 and step % self.keep_every == 0)


@dataclass(frozen=True, config=SECTION)
class ValidationOptions:
    """`[validation]`: losses and images during the run, on samples that are not trained on."""

    every_steps: NotNegative = 1000
    """Optimizer steps between validations; 0 turns validation off and holds out no samples."""
    samples: Positive = 32
    """Samples that are held out to measure the loss by timestep; with more, the loss is less noisy."""
    images: NotNegative = 4
    """Number of held-out samples for which an image is generated and its structure scored; 0 for none."""
    prompts: tuple[str, ...] = ()
    """Prompts for these images; empty to use the samples' own captions."""
    num_inference_steps: Positive = STEPS
    """Sampling steps for these images."""
    guidance_scale: AtLeast0 = GUIDANCE_SCALE
    """Guidance scale for these images; use about 2 with the embedded base."""
    early_stop_patience: NotNegative = 0
    """Stop the run after this many validations without a better score; 0 to never stop early. The score is
    the structure score, or the loss for maps without a structure score."""
    select: Literal["auto", "best", "last"] = "auto"
    """Export the weights with the best score, or the last; "auto": best with early stopping, else last."""

    @property
    def selects_best(self) -> bool:
        """Whether the best weights are kept and exported."""
        return self.select == "best" or (self.select == "auto" and self.early_stop_patience > 0)


@dataclass(frozen=True, config=SECTION)
class LogOptions:
    """`[log]`: experiment trackers, in addition to log.jsonl, which is always written."""

    every_steps: Positive = 20
    """Optimizer steps between rows of the log."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "comet_ml", "trackio"], ...] = ()
    """Also log to these trackers, which must be installed."""
    project: str = "nexus-adapters"
    """Project name in the trackers."""


@dataclass(frozen=True, config=SECTION)
class HubOptions:
    """`[hub]`: uploads the finished adapter to the Hub. The token is read from the environment only."""

    repo_id: str = ""
    """"name/repository" to upload to; empty to keep the adapter local."""
    private: bool = False
    """Make the repository private if it is created."""
    license: str = ""
    """License in the model card, by its name on the Hub, such as "apache-2.0"; empty for none."""
    base_model: str = ""
    """Hub id of the base in the model card; empty for `base.path`, if that is a Hub id."""


@dataclass(frozen=True, config=SECTION)
class TrainConfig:
    """A whole recipe."""

    output_dir: str = ""
    """The run's folder, with checkpoints, log, validation images, and the finished adapter in adapter/."""
    seed: NotNegative = 0
    """Seed of all randomness in the run."""
    imports: tuple[str, ...] = ()
    """Your modules or .py files to import, which register blocks, methods, bases, conditions or metrics."""
    base: BaseOptions = field(default_factory=BaseOptions)
    adapter: Any = field(default_factory=dict)
    """The options of a method (see `methods/`), converted from a mapping whose `method` names it."""
    data: DataOptions = field(default_factory=DataOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    log: LogOptions = field(default_factory=LogOptions)
    hub: HubOptions = field(default_factory=HubOptions)

    def __post_init__(self) -> None:
        """Check values that depend on each other."""
        if isinstance(self.adapter, Mapping):
            found = adapter_options(self.adapter, self.data.condition, self.base.path, self.output_dir)
            object.__setattr__(self, "adapter", found)
        is_table = isinstance(self.adapter, AdapterOptions)
        expect(is_table, "adapter", "a table", repr(self.adapter))
        for fits, key, expected, received in _agreements(self):
            expect(fits, key, expected, received)


def _agreements(config: TrainConfig) -> list[tuple[bool, str, str, Any]]:
    adapter, data, validation = config.adapter, config.data, config.validation
    training = config.training
    low, high = config.loss.band
    reads_prompt = getattr(adapter, "reads_prompt", True)
    return [
        (config.output_dir != "", "output_dir", "a folder", repr(config.output_dir)),
        (
            not (training.cuda_graphs and (training.compile or training.gradient_checkpointing)),
            "training.cuda_graphs",
            "false with training.compile or training.gradient_checkpointing",
            True,
        ),
        (
            reads_prompt or validation.every_steps == 0 or validation.images == 0,
            "validation.images",
            "0 for an adapter that does not read the prompt, since images are generated with a prompt",
            validation.images,
        ),
        *data_agreements(data),
        (
            validation.early_stop_patience == 0 or (validation.every_steps > 0 and validation.images > 0),
            "validation.early_stop_patience",
            "0 without validation images, whose structure score it depends on",
            validation.early_stop_patience,
        ),
        (
            validation.select != "best" or validation.every_steps > 0,
            "validation.select",
            "auto or last without validation",
            repr(validation.select),
        ),
        (
            adapter.start_from != "" or not adapter.start_from_optimizer,
            "adapter.start_from_optimizer",
            "false without adapter.start_from",
            True,
        ),
        (low < high, "loss.band", "two fractions in ascending order", config.loss.band),
    ]


# Option -> the kinds of data for which it has an effect.
_EFFECTIVE_FOR: dict[str, tuple[str, ...]] = {
    "path": ("folder", "prepared", "table"),
    "shards": ("tars",),
    "config_name": ("table",),
    "revision": ("table",),
    "split": ("table",),
    "image_column": ("folder", "table", "tars"),
    "condition_column": ("folder", "table", "tars"),
    "caption_column": ("folder", "table", "tars"),
    "allow_outside": ("folder", "prepared", "table"),
    "aspect_buckets": ("folder", "prepared", "table", "tars"),
}
_PLACES = {"path": "shards", "shards": "path"}  # each -> the other option that says where the data are


def data_agreements(
    data: DataOptions, kinds: Mapping[str, tuple[str, ...]] | None = None
) -> list[tuple[bool, str, str, Any]]:
    """Return the checks of `[data]` as (fits, key, expected, received): options required or without effect.

    `kinds` overrides `_EFFECTIVE_FOR` for some options.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(DataOptions)}
    effective = {**_EFFECTIVE_FOR, **(kinds or {})}
    checks: list[tuple[bool, str, str, Any]] = []
    for name, for_kinds in effective.items():
        value = getattr(data, name)
        kinds_text = ", ".join(for_kinds)
        what = f"no value, since it has no effect for data.kind {data.kind!r} (only for {kinds_text})"
        if name in _PLACES and data.kind in effective[_PLACES[name]]:
            what = f"data.{_PLACES[name]} instead, for data.kind {data.kind!r}"
        checks.append((data.kind in for_kinds or value == defaults[name], f"data.{name}", what, repr(value)))
    needs_path, needs_shards = data.kind in effective["path"], "at least one, for data.kind 'tars'"
    checks += [
        (not needs_path or data.path != "", "data.path", f"a path, for data.kind {data.kind!r}", "''"),
        (data.kind != "tars" or data.shards != (), "data.shards", needs_shards, MISSING),
        (
            data.kind != "scenes" or 0 < data.count <= _MOST_SCENES,
            "data.count",
            f"1 to {_MOST_SCENES:,}, for data.kind 'scenes'",
            data.count,
        ),
    ]
    return checks
