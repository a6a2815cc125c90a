"""What a recipe says: frozen dataclasses, read from TOML, every value checked before anything is loaded.

`TrainConfig` is the whole; each section of the TOML file is a dataclass here. Whatever a recipe leaves out
keeps the default that stands here. Field descriptions are the strings below the fields.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

SECTION = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Above0 = Annotated[float, Field(gt=0)]
AtLeast0 = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
MethodName = Literal["prime", "slim", "t2i", "controlnet", "controlnet-xs"]
MixedPrecision = Literal["auto", "no", "fp16", "bf16"]


@dataclass(frozen=True, config=SECTION)
class BaseOptions:
    """`[base]`: the Stable Diffusion that stays frozen."""

    path: str = "embedded"
    """A folder in diffusers' layout or a Hub id; "embedded" is the small one that comes with the package."""
    revision: str = ""
    """Branch, tag or commit on the Hub; empty for the newest."""
    variant: str = ""
    """Which of several saves to read, such as "fp16"; empty for the plain one."""


@dataclass(frozen=True, config=SECTION)
class AdapterOptions:
    """`[adapter]`: what is trained."""

    method: MethodName = "prime"
    """Nexus "prime" or "slim", or diffusers' "t2i" (T2I-Adapter), "controlnet" or "controlnet-xs"."""
    residual: bool = False
    """A skip around the attention of each stage (Nexus only). False is the paper."""
    zero_init: bool = False
    """Start the attention's output at zero; needs `residual`."""
    groups: NotNegative = 0
    """Of Slim's 3x3 convolutions; 0 for the paper's."""
    heads: NotNegative = 0
    """Of the attention (Nexus only); 0 for as many as the base's widths give."""
    head_width: NotNegative = 0
    """Of each head (Nexus only); 0 as `heads`."""
    noise_exponent: AtLeast0 = 0.0
    """Features times (1 - alphas_cumprod) to this power in each step (not ControlNets). 0 is the paper."""
    reads_prompt: bool = True
    """False trains an adapter that always reads the empty prompt, to see what reading does (Nexus only)."""
    size_ratio: Above0 = 0.125
    """Of ControlNet-XS alone: its channels as a fraction of the base's."""
    start_from: str = ""
    """Folder or Hub id of a saved adapter to start from. A T2I-Adapter gives Prime its trunk."""


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
    """Name of the structure maps' column or tar member; empty to draw the maps by `condition`."""
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
    """AdamW's least denominator."""
    weight_decay: AtLeast0 = 1e-2
    """Decoupled, a step, in learning rates."""
    max_grad_norm: Above0 = 1.0
    """Longer gradients are shortened to this."""
    ema_decay: BelowOne = 0.0
    """Average of the weights over steps, which is what the run gives in the end; 0 for none. Try 0.9999."""
    mixed_precision: MixedPrecision = "auto"
    """"auto" is bf16 where the device has units for it, else fp16 on CUDA, else none."""
    gradient_checkpointing: bool = False
    """Recompute the base's activations in the backward pass: less memory, more time."""
    compile: bool = False
    """Run base and adapter through torch.compile."""
    cuda_graphs: bool = False
    """On CUDA, record the frozen UNet's passes and replay them: less time where small models or batches leave
    the GPU waiting. Without effect on a CPU and with ControlNet-XS, whose network is trained as a whole."""
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
    base: BaseOptions = field(default_factory=BaseOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    data: DataOptions = field(default_factory=DataOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    log: LogOptions = field(default_factory=LogOptions)
    hub: HubOptions = field(default_factory=HubOptions)

    def __post_init__(self) -> None:
        """What one field alone cannot tell."""
        for fits, key, expected, received in _agreements(self):
            if not fits:
                raise ValueError(f"{key}: expected {expected}; received {received!r}")


def _agreements(config: TrainConfig) -> list[tuple[bool, str, str, Any]]:
    adapter, data, validation = config.adapter, config.data, config.validation
    training = config.training
    is_nexus = adapter.method in ("prime", "slim")
    low, high = config.loss.band
    needs_path = data.kind in ("folder", "prepared", "table")
    columns = (data.image_column, data.condition_column, data.caption_column)
    return [
        (config.output_dir != "", "output_dir", "a folder", config.output_dir),
        (
            not (training.cuda_graphs and (training.compile or training.gradient_checkpointing)),
            "training.cuda_graphs",
            "false beside compile and gradient_checkpointing",
            True,
        ),
        (is_nexus or not adapter.residual, "adapter.residual", f"false beside method {adapter.method}", True),
        (adapter.residual or not adapter.zero_init, "adapter.zero_init", "false without residual", True),
        (
            adapter.method == "slim" or adapter.groups == 0,
            "adapter.groups",
            f"0 beside method {adapter.method}",
            adapter.groups,
        ),
        *(
            (is_nexus or value == 0, f"adapter.{name}", f"0 beside method {adapter.method}", value)
            for name, value in (("heads", adapter.heads), ("head_width", adapter.head_width))
        ),
        (
            not adapter.method.startswith("controlnet") or adapter.noise_exponent == 0,
            "adapter.noise_exponent",
            f"0 beside method {adapter.method}, which reads the timestep",
            adapter.noise_exponent,
        ),
        (
            is_nexus or adapter.reads_prompt,
            "adapter.reads_prompt",
            f"true beside method {adapter.method}",
            False,
        ),
        (
            adapter.reads_prompt or validation.every_steps == 0 or validation.images == 0,
            "validation.images",
            "0 beside an adapter that reads no prompt, since pictures hand it one",
            validation.images,
        ),
        (not needs_path or data.path != "", "data.path", f"a path, for kind {data.kind}", data.path),
        (
            data.kind != "prepared" or columns == ("", "", ""),
            "data.kind",
            "no columns beside prepared, whose are known",
            columns,
        ),
        (data.kind != "tars" or data.shards != (), "data.shards", "at least one, for kind tars", ()),
        (data.kind != "scenes" or data.count > 0, "data.count", "at least 1, for kind scenes", data.count),
        (
            validation.early_stop_patience == 0 or (validation.every_steps > 0 and validation.images > 0),
            "validation.early_stop_patience",
            "0 without pictures, whose structure it goes by",
            validation.early_stop_patience,
        ),
        (low < high, "loss.band", "a lower and then a higher fraction", config.loss.band),
    ]
