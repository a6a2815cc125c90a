"""What a recipe says: frozen dataclasses, read from TOML, every value checked before anything is loaded.

`TrainConfig` is the whole; each section of the TOML file is a dataclass here. Whatever a recipe leaves out
keeps the default that stands here. Field descriptions are the strings below the fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from nexus_adapters.adapter.saved import find_saved
from nexus_adapters.bases.loading import BaseSource
from nexus_adapters.data.prepared_set import is_prepared
from nexus_adapters.errors import InvalidArgument, expect, one_line, renamed
from nexus_adapters.methods import AdapterOptions, find_method, known_methods, method_for
from nexus_adapters.training.parsing import validated

SECTION = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)

_MAX_INTEGER = 2**32 - 1  # above it, lengths and random generators overflow
Positive = Annotated[int, Field(gt=0, le=_MAX_INTEGER)]
NotNegative = Annotated[int, Field(ge=0, le=_MAX_INTEGER)]
Above0 = Annotated[float, Field(gt=0)]
AtLeast0 = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
MixedPrecision = Literal["auto", "no", "fp16", "bf16"]


@dataclass(frozen=True, config=SECTION)
class BaseOptions:
    """`[base]`: the Stable Diffusion that stays frozen."""

    path: str = "embedded"
    """A folder in diffusers' layout, a Hub id or a single .safetensors file; "embedded" is the small one that
    ships with the package."""
    revision: str = ""
    """Branch, tag or commit on the Hub; empty for the newest."""
    variant: str = ""
    """Which of several saves to read, such as "fp16"; empty for the plain one."""
    config: str = ""
    """For a single file: a folder or Hub id in diffusers' layout, of which no weights are read; empty lets
    diffusers fetch its own."""
    prediction_type: Literal["", "epsilon", "v_prediction"] = ""
    """For a single file; required for Stable Diffusion 2.x."""

    @property
    def source(self) -> BaseSource:
        """As `load_base` takes it."""
        return BaseSource(self.path, self.revision, self.variant, self.config, self.prediction_type)


@dataclass(frozen=True, config=SECTION)
class DataOptions:
    """`[data]`: where samples come from, and how they are fitted to the base."""

    kind: Literal["folder", "prepared", "table", "tars", "scenes"] = "folder"
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
    """Name of the captions' column or tar member; empty for the kind's usual one."""
    condition: str = "canny"
    """What the maps are: an extractor's name. It draws missing maps, and scores the validation's pictures."""
    extractor: dict[str, bool | float | str] = field(default_factory=dict)
    """Options of the extractor, such as canny's low and high, or depth's model."""
    count: NotNegative = 0
    """Read only so many samples; 0 for all. Scenes, which have no end, need it."""
    resolution: Positive = 512
    """Side in pixels of the square that images are fitted to; with `aspect_buckets`, of one of equal area."""
    aspect_buckets: bool = False
    """Keep the images' aspect, nearly: each batch has one of several shapes."""
    max_bad_fraction: Fraction = 0.25
    """Unreadable samples are replaced and reported; above this fraction of the data the run stops."""
    workers: NotNegative = 0
    """Processes that read samples ahead, for each process that trains; 0 reads between the steps."""

    def __post_init__(self) -> None:
        """A folder with a prepared set's index is one, whatever it is called."""
        if self.kind == "folder" and self.path and is_prepared(self.path):
            object.__setattr__(self, "kind", "prepared")


@dataclass(frozen=True, config=SECTION)
class CacheOptions:
    """`[cache]`: latents, maps and prompt embeddings, computed once."""

    enabled: bool = True
    """False encodes images and prompts in every step."""
    folder: str = ""
    """Where; empty for nexus-adapters/training below the user's cache folder."""


@dataclass(frozen=True, config=SECTION)
class LossOptions:
    """`[loss]`: what is minimised."""

    timesteps: Literal["uniform", "cubic"] = "cubic"
    """How timesteps are drawn; "cubic" puts more weight on the noisy ones (T2I-Adapter, section 3.4)."""
    band: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Only timesteps between these fractions of the schedule, of which 1 is pure noise."""
    min_snr_gamma: AtLeast0 = 0.0
    """Min-SNR weighting (arXiv 2303.09556); its authors use 5. 0 weighs all timesteps alike."""
    prompt_dropout: Fraction = 0.1
    """In this fraction of the samples base and adapter read the empty prompt."""
    condition_dropout: Fraction = 0.0
    """In this fraction of the samples the base gets no features."""


@dataclass(frozen=True, config=SECTION)
class TrainingOptions:
    """`[training]`: how long, how fast, on what."""

    max_train_steps: Positive = 10_000
    """Optimizer steps of the whole run."""
    batch_size: Positive = 2
    """Samples at once on each device."""
    gradient_accumulation_steps: Positive = 4
    """So many batches make an optimizer step."""
    learning_rate: Above0 = 1e-5
    """The highest, after the warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up: the rate stays, or falls to zero at the last step."""
    warmup_steps: NotNegative = 0
    """Optimizer steps in which the rate rises from near zero."""
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """"adamw8bit" needs CUDA and bitsandbytes."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """AdamW's averages."""
    epsilon: Above0 = 1e-8
    """Epsilon added to AdamW's denominator."""
    weight_decay: AtLeast0 = 1e-2
    """Decoupled, a step, in learning rates."""
    max_grad_norm: Above0 = 1.0
    """Gradient-clipping norm."""
    ema_decay: BelowOne = 0.0
    """Average of the weights over steps, which is what the run gives in the end; 0 for none. Try 0.9999."""
    mixed_precision: MixedPrecision = "auto"
    """"auto" is bf16 where the device has units for it, else fp16 on CUDA, else none."""
    gradient_checkpointing: bool = False
    """Recompute the base's activations in the backward pass: less memory, more time."""
    compile: bool = False
    """Run base and adapter through torch.compile."""
    cuda_graphs: bool = False
    """On CUDA, record the frozen denoiser's passes and replay them: less time where small models or batches
    leave the GPU waiting. No effect on a CPU and with ControlNet-XS, whose network is trained as a whole."""
    channels_last: bool = True
    """The memory layout in which convolutions take less time on most devices."""
    device: Literal["auto", "cpu"] = "auto"
    """"auto" is CUDA where there is some; "cpu" leaves it alone."""
    max_bad_steps: Positive = 20
    """Steps whose gradient is not finite are skipped; after so many in a row the run stops."""


@dataclass(frozen=True, config=SECTION)
class CheckpointOptions:
    """`[checkpoint]`: what survives a kill."""

    every_steps: Positive = 500
    """Optimizer steps between checkpoints."""
    keep: Positive = 2
    """How many stay."""


@dataclass(frozen=True, config=SECTION)
class ValidationOptions:
    """`[validation]`: what is measured and drawn during the run, on samples that are not trained on."""

    every_steps: NotNegative = 1000
    """Optimizer steps between validations; 0 for none, and nothing is held out."""
    samples: Positive = 32
    """Held out for the loss by timestep; more samples, less noise."""
    images: NotNegative = 4
    """Pictures drawn from the first of them, and scored by their structure; 0 for none."""
    prompts: tuple[str, ...] = ()
    """For these pictures, in place of the samples' own captions."""
    num_inference_steps: Positive = 20
    """Of the sampler."""
    guidance_scale: AtLeast0 = 7.5
    """Of the pictures; the embedded base likes 2."""
    early_stop_patience: NotNegative = 0
    """Stop after so many validations without a better structure score; 0 never."""


@dataclass(frozen=True, config=SECTION)
class LogOptions:
    """`[log]`: log.jsonl is always written."""

    every_steps: Positive = 20
    """Optimizer steps between rows."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "comet_ml", "trackio"], ...] = ()
    """Also to these, where they are installed."""
    project: str = "nexus-adapters"
    """What trackers file the run under."""


@dataclass(frozen=True, config=SECTION)
class HubOptions:
    """`[hub]`: where the finished adapter goes. The token comes from the environment alone."""

    repo_id: str = ""
    """"name/repository"; empty keeps the adapter here."""
    private: bool = False
    """Whether a repository that is created is private."""


@dataclass(frozen=True, config=SECTION)
class TrainConfig:
    """A recipe with nothing left out."""

    output_dir: str = ""
    """The run's folder: checkpoints, log, pictures, and in the end adapter/."""
    seed: NotNegative = 0
    """All that is random follows from it."""
    imports: tuple[str, ...] = ()
    """Modules of yours, or .py files, that register blocks, methods, bases, conditions or metrics."""
    base: BaseOptions = field(default_factory=BaseOptions)
    adapter: Any = field(default_factory=dict)
    """Options of the method that it names (`methods/`); a mapping becomes these."""
    data: DataOptions = field(default_factory=DataOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    log: LogOptions = field(default_factory=LogOptions)
    hub: HubOptions = field(default_factory=HubOptions)

    def __post_init__(self) -> None:
        """What one field alone does not show."""
        if isinstance(self.adapter, Mapping):
            found = adapter_options(self.adapter, self.data.condition, self.base.path)
            object.__setattr__(self, "adapter", found)
        is_table = isinstance(self.adapter, AdapterOptions)
        expect(is_table, "adapter", "a table", repr(self.adapter))
        for fits, key, expected, received in _agreements(self):
            expect(fits, key, expected, received)


def adapter_options(section: Mapping[str, Any], condition: str, base: str) -> AdapterOptions:
    """A recipe's `[adapter]`, as the options of the method that it names, or of the adapter in `start_from`.

    `condition` and `base`: where names of adapters are looked up. `InvalidArgument` for an unknown method or
    key, for a key that has no effect with this method, and for a `start_from` that has to be read but cannot.
    """
    start = section.get("start_from")
    if "method" not in section and isinstance(start, str) and start:
        section = {**section, "method": _method_of_saved(start, condition, base)}
    method = find_method(section.get("method", AdapterOptions.method), "adapter.method")
    known = [f.name for f in dataclasses.fields(method.Options)]
    for key in section:
        if key in known:
            continue
        methods = reversed(known_methods())  # as they were registered
        others = [m.name for m in methods if key in {f.name for f in dataclasses.fields(m.Options)}]
        if others:
            raise InvalidArgument(
                f"adapter.{key}",
                f"no such key with method {method.name!r}, where it has no effect",
                repr(section[key]),
                f"It is an option of {', '.join(others)}",
            )
    kind: Any = method.Options
    found = validated(dataclass(kind, frozen=True, config=SECTION), section, "adapter.")
    return kind(**{name: getattr(found, name) for name in known})  # type: ignore[no-any-return]


def _method_of_saved(source: str, condition: str, base: str) -> str:
    """The name of the method that trains adapters like a saved one."""
    with renamed(lambda name: "data.condition" if name == "condition" else "adapter.start_from"):
        saved = find_saved(source, condition, base)
        try:
            return method_for(saved).configuration(saved)
        except InvalidArgument:
            raise
        except (TypeError, ValueError) as error:  # odd values in its config
            raise InvalidArgument("adapter", "a saved adapter", f"'{source}' ({one_line(error)})") from error


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
    "aspect_buckets": ("folder", "prepared", "table", "tars"),
}


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
        checks.append((data.kind in for_kinds or value == defaults[name], f"data.{name}", what, repr(value)))
    needs_path = data.kind in effective["path"]
    checks += [
        (not needs_path or data.path != "", "data.path", f"a path, for data.kind {data.kind!r}", "''"),
        (
            data.kind != "tars" or data.shards != (),
            "data.shards",
            "at least one, for data.kind 'tars'",
            "no shards",
        ),
        (
            data.kind != "scenes" or data.count > 0,
            "data.count",
            "at least 1, for data.kind 'scenes'",
            data.count,
        ),
    ]
    return checks
