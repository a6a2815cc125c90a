"""The options of a recipe: frozen dataclasses, whose values are all checked before anything is loaded.

`TrainConfig` is the whole recipe; each section of the TOML file is a dataclass here. An option that a recipe
leaves out has the default given here. The strings below the fields describe them.
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

_DEFAULT_RESOLUTION = 512  # of data without a size of their own
_MAX_INTEGER = 2**32 - 1  # above it, lengths and random generators overflow
_MOST_SCENES = 1_000_000  # all of which are listed in memory
_MOST_WORKERS = 1024  # processes: more is a slip
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
    """`[base]`: the Stable Diffusion that stays frozen."""

    path: str = EMBEDDED
    """A folder in diffusers' layout, a Hub id or a single .safetensors file; "embedded" is the small one of
    nexus-adapters[embedded]."""
    revision: str = ""
    """Branch, tag or commit on the Hub; empty for the newest."""
    variant: str = ""
    """Which of several saves to read, such as "fp16"; empty for the plain one."""
    config: str = ""
    """For a single file: a folder or Hub id in diffusers' layout, of which no weights are read; empty lets
    diffusers fetch its own."""
    prediction_type: Literal["", PredictionType] = ""
    """For a single file; required for Stable Diffusion 2.x."""

    @property
    def source(self) -> BaseSource:
        """As `load_base` takes it."""
        return BaseSource(self.path, self.revision, self.variant, self.config, self.prediction_type)


@dataclass(frozen=True, config=SECTION)
class DataOptions:
    """`[data]`: where samples come from, and how they are fitted to the base."""

    kind: DataKind = "folder"
    """An image folder, a set that `nexus prepare` made, a Hugging Face data set ("table"), WebDataset shards,
    or the embedded world's scenes."""
    path: str = ""
    """The folder, or the data set's Hub id or folder."""
    shards: tuple[str, ...] = ()
    """Of `tars`: paths, globs, URLs; ranges as in "train-{000..127}.tar"."""
    config_name: str = ""
    """Of a Hugging Face data set that has several, such as "2m_first_1k"; empty for its only one."""
    split: str = "train"
    """Of a Hugging Face data set."""
    revision: str = ""
    """Of a Hugging Face data set on the Hub; empty for the newest."""
    image_column: str = ""
    """Name of the image column or tar member; empty for the kind's usual one."""
    condition_column: str = ""
    """Name of the structure maps' column or tar member; empty to extract the maps by `condition`."""
    caption_column: str = ""
    """Name of the captions' column or tar member; empty for the kind's usual one. "json:caption" is the key
    `caption` of the JSON objects in `json`."""
    allow_outside: bool = False
    """Read what a data set names outside its folder: absolute paths and "..", and captions and metadata that
    are links. Only for data that you trust."""
    condition: str = CONDITION
    """The kind of structure map: the name of an extractor, which also extracts maps that the data lack."""
    extractor: dict[str, bool | float | str] = field(default_factory=dict)
    """Options of the extractor, such as canny's low and high, or depth's model."""
    count: NotNegative = 0
    """Read only the first samples; 0 for all. Required for scenes, whose number is not limited."""
    resolution: Annotated[int, Field(ge=0, le=MAX_SIDE)] = 0
    """Side of the square that images are fitted to, pixels; with `aspect_buckets`, of one of equal area. 0 is
    the size of a prepared set, 128 for scenes, and otherwise 512."""
    aspect_buckets: bool = False
    """Approximately keep the images' aspect ratio: each batch has one of several shapes."""
    max_bad_fraction: Fraction = 0.25
    """Unreadable samples are replaced and reported; above this fraction of the data the run stops."""
    workers: Annotated[int, Field(ge=0, le=_MOST_WORKERS)] = 0
    """Processes that read samples ahead, for each training process; 0 reads them between the steps."""

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
        """A folder with the index of a prepared set is one, also as kind "folder". Data have a resolution."""
        if self.kind == "folder" and self.path and is_prepared(self.path):
            object.__setattr__(self, "kind", "prepared")
        if self.resolution == 0:
            object.__setattr__(self, "resolution", self.own_resolution() or _DEFAULT_RESOLUTION)

    def own_resolution(self) -> int | None:
        """The side that a prepared set's images, or scenes, have; None for data without a common one."""
        if self.kind == "scenes":
            return SIZE
        if self.kind != "prepared":
            return None
        try:
            geometry = geometry_of(self.path)
        except InvalidArgument:  # opening the set raises it again, where the path is named
            return None
        return None if geometry is None else min(geometry.width, geometry.height)


@dataclass(frozen=True, config=SECTION)
class CacheOptions:
    """`[cache]`: latents, structure maps and prompt embeddings, computed once."""

    enabled: bool = True
    """False encodes images and prompts in every step."""
    folder: str = ""
    """Its folder; empty for nexus-adapters/training in the user's cache folder."""


@dataclass(frozen=True, config=SECTION)
class LossOptions:
    """`[loss]`: what is minimized."""

    timesteps: Literal["uniform", "cubic"] = "cubic"
    """How timesteps are sampled; "cubic" prefers the noisy ones (T2I-Adapter, section 3.4)."""
    band: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Only timesteps between these fractions of the noise schedule; 1 is pure noise."""
    min_snr_gamma: AtLeast0 = 0.0
    """Min-SNR weighting (arXiv 2303.09556), whose authors use 5; 0 weights all timesteps equally."""
    prompt_dropout: Fraction = 0.1
    """Fraction of the samples in which base and adapter read the empty prompt."""
    condition_dropout: BelowOne = 0.0
    """Fraction of the samples in which the base gets no features, below 1: those alone train nothing."""


@dataclass(frozen=True, config=SECTION)
class TrainingOptions:
    """`[training]`: steps, optimizer, precision and device."""

    max_train_steps: Positive = 10_000
    """Optimizer steps of the whole run."""
    batch_size: Positive = 2
    """Samples of a batch on each device."""
    gradient_accumulation_steps: Positive = 4
    """Batches of an optimizer step."""
    learning_rate: Above0 = 1e-5
    """The learning rate after the warm-up, from which a schedule falls."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: the rate stays, or falls to zero at the last step."""
    warmup_steps: NotNegative = 0
    """Optimizer steps in which the rate rises from near zero."""
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """"adamw8bit" needs CUDA and bitsandbytes."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """Decay of AdamW's averages of the gradient and its square."""
    epsilon: Above0 = 1e-8
    """Epsilon added to AdamW's denominator."""
    weight_decay: AtLeast0 = 1e-2
    """Decoupled weight decay: a step multiplies the weights by 1 - learning_rate * weight_decay."""
    max_grad_norm: Above0 = 1.0
    """Gradient-clipping norm."""
    ema_decay: BelowOne = 0.0
    """Decay of the weights' exponential average, which is then the result; 0 for none. Try 0.9999."""
    mixed_precision: MixedPrecision = "auto"
    """"auto" is bf16 where the device has hardware for it, else fp16 on CUDA, else no."""
    gradient_checkpointing: bool = False
    """Recompute the base's activations in the backward pass: less memory, more time."""
    compile: bool = False
    """Run base and adapter through torch.compile."""
    cuda_graphs: bool = False
    """On CUDA, record the frozen denoiser as CUDA graphs: faster where small models or batches leave the GPU
    waiting for the CPU. No effect on a CPU and with ControlNet-XS, whose network is trained as a whole."""
    channels_last: bool = True
    """Use the memory layout in which convolutions are faster on most devices."""
    device: Literal["auto", "cpu"] = "auto"
    """"auto" is CUDA if available; "cpu" never uses it."""
    max_bad_steps: Positive = 20
    """Steps whose gradient is not finite are skipped; after this many in a row the run stops."""


@dataclass(frozen=True, config=SECTION)
class CheckpointOptions:
    """`[checkpoint]`: what an interrupted run resumes from."""

    every_steps: Positive = 500
    """Optimizer steps between checkpoints."""
    keep: Positive = 2
    """How many of the newest are kept."""
    keep_every: NotNegative = 0
    """Also keep the checkpoint of every step that is a multiple of this, for good; 0 for none."""

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after so many steps."""
        return step % self.every_steps == 0 or (self.keep_every > 0 and step % self.keep_every == 0)


@dataclass(frozen=True, config=SECTION)
class ValidationOptions:
    """`[validation]`: losses and images during the run, on samples that are not trained on."""

    every_steps: NotNegative = 1000
    """Optimizer steps between validations; 0 for none, and nothing is held out."""
    samples: Positive = 32
    """Samples held out for the loss by timestep; more samples, less noise."""
    images: NotNegative = 4
    """Images generated from the first of them, and scored by their structure; 0 for none."""
    prompts: tuple[str, ...] = ()
    """For these images, in place of the samples' own captions."""
    num_inference_steps: Positive = STEPS
    """Of the images' sampling."""
    guidance_scale: AtLeast0 = GUIDANCE_SCALE
    """Of the images; 2 suits the embedded base."""
    early_stop_patience: NotNegative = 0
    """Stop after this many validations without a better score; 0 for never. The score is the structure score
    or, of maps that have none, the loss."""
    select: Literal["auto", "best", "last"] = "auto"
    """Which weights the run results in: those that validated best, by the same score, or the last. "auto" is
    the best with early stopping, else the last."""

    @property
    def selects_best(self) -> bool:
        """Whether the best weights are kept and exported."""
        return self.select == "best" or (self.select == "auto" and self.early_stop_patience > 0)


@dataclass(frozen=True, config=SECTION)
class LogOptions:
    """`[log]`: log.jsonl is always written."""

    every_steps: Positive = 20
    """Optimizer steps between rows."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "comet_ml", "trackio"], ...] = ()
    """Log also to these, which must be installed."""
    project: str = "nexus-adapters"
    """The trackers' project."""


@dataclass(frozen=True, config=SECTION)
class HubOptions:
    """`[hub]`: where the finished adapter goes. The token comes from the environment alone."""

    repo_id: str = ""
    """"name/repository"; empty keeps the adapter here."""
    private: bool = False
    """Whether a repository that is created is private."""
    license: str = ""
    """License in the model card, by its name on the Hub, such as "apache-2.0"; empty for none."""
    base_model: str = ""
    """Hub id of the base in the model card; empty for `base.path`, if that is a Hub id."""


@dataclass(frozen=True, config=SECTION)
class TrainConfig:
    """A whole recipe."""

    output_dir: str = ""
    """The run's folder: checkpoints, log, validation images, and in the end adapter/."""
    seed: NotNegative = 0
    """Everything random follows from it."""
    imports: tuple[str, ...] = ()
    """Your modules, or .py files, that register blocks, methods, bases, conditions or metrics."""
    base: BaseOptions = field(default_factory=BaseOptions)
    adapter: Any = field(default_factory=dict)
    """Options of the method that it names (`methods/`), to which a mapping is converted."""
    data: DataOptions = field(default_factory=DataOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    log: LogOptions = field(default_factory=LogOptions)
    hub: HubOptions = field(default_factory=HubOptions)

    def __post_init__(self) -> None:
        """Check the values that depend on each other."""
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
            "false together with compile or gradient_checkpointing",
            True,
        ),
        (
            reads_prompt or validation.every_steps == 0 or validation.images == 0,
            "validation.images",
            "0 for an adapter that reads no prompt, since images are generated with one",
            validation.images,
        ),
        *data_agreements(data),
        (
            validation.early_stop_patience == 0 or (validation.every_steps > 0 and validation.images > 0),
            "validation.early_stop_patience",
            "0 without validation images, whose structure it goes by",
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
        (low < high, "loss.band", "a lower and then a higher fraction", config.loss.band),
    ]


# Which kinds of data each option has an effect for.
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
_PLACES = {"path": "shards", "shards": "path"}  # each -> the other that says where data are


def data_agreements(
    data: DataOptions, kinds: Mapping[str, tuple[str, ...]] | None = None
) -> list[tuple[bool, str, str, Any]]:
    """(fits, key, expected, received) of `[data]`: what its kind needs, and what has no effect under it.

    `kinds`: in place of `_EFFECTIVE_FOR` for some options.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(DataOptions)}
    effective = {**_EFFECTIVE_FOR, **(kinds or {})}
    checks: list[tuple[bool, str, str, Any]] = []
    for name, for_kinds in effective.items():
        value = getattr(data, name)
        kinds_text = ", ".join(for_kinds)
        what = f"no value for data.kind {data.kind!r}, where it has no effect (it is read for {kinds_text})"
        if name in _PLACES and data.kind in effective[_PLACES[name]]:
            what = f"data.{_PLACES[name]} in its place, for data.kind {data.kind!r}"
        checks.append((data.kind in for_kinds or value == defaults[name], f"data.{name}", what, repr(value)))
    needs_path, needs_shards = data.kind in effective["path"], "at least one, for data.kind 'tars'"
    checks += [
        (not needs_path or data.path != "", "data.path", f"a path, for data.kind {data.kind!r}", "''"),
        (data.kind != "tars" or data.shards != (), "data.shards", needs_shards, MISSING),
        (
            data.kind != "scenes" or 0 < data.count <= _MOST_SCENES,
            "data.count",
            f"at least 1 and at most {_MOST_SCENES:,}, for data.kind 'scenes'",
            data.count,
        ),
    ]
    return checks
