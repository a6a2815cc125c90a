"""The words that options, recipes and functions accept, and the defaults that they share, each defined once.

Commands list them as choices, and configs are validated against the same types. Nothing is imported here, so
that `nexus --help` can show them without torch.
"""

from __future__ import annotations

from typing import Literal, get_args

Policy = Literal["positive", "per_branch", "cond_only"]
"""Which text a text-reading adapter reads, and which guidance branches get its features: see `Control`."""
POLICIES: tuple[Policy, ...] = get_args(Policy)
DEFAULT_POLICY: Policy = "positive"

Balance = Literal["balanced", "prompt", "control"]
"""What takes precedence: see `injection.balance`."""
BALANCE_NAMES: tuple[Balance, ...] = get_args(Balance)

PredictionType = Literal["epsilon", "v_prediction"]
"""What a base predicts, as schedulers of diffusers name it."""
PREDICTION_TYPES: tuple[PredictionType, ...] = get_args(PredictionType)

Device = Literal["auto", "cuda", "mps", "cpu"]
DEVICES: tuple[Device, ...] = get_args(Device)

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
"""What models compute in; "auto" is float16 on CUDA, float32 elsewhere."""
DTYPES: tuple[Dtype, ...] = get_args(Dtype)

DataKind = Literal["folder", "prepared", "table", "tars", "scenes"]
"""Kinds of data that training and evaluation read."""
DATA_KINDS: tuple[DataKind, ...] = get_args(DataKind)

SourceKind = Literal["auto", "folder", "coco", "table", "tars", "scenes"]
"""Kinds of data that `nexus prepare` makes a training set of."""
SOURCE_KINDS: tuple[SourceKind, ...] = get_args(SourceKind)

Captions = Literal["all", "first", "random", "none"]
"""Which of a sample's captions a prepared set keeps; "none" reads none, and all are empty."""
CAPTIONS: tuple[Captions, ...] = get_args(Captions)

ImageFormat = Literal["jpg", "png", "webp"]
"""Of the images in a prepared set."""
IMAGE_FORMATS: tuple[ImageFormat, ...] = get_args(ImageFormat)

MapKind = Literal["lines", "labels", "depth", "image"]
"""What a structure map shows, which decides how it is read and resized: light lines on black, a color for
each class, nearness, or anything else."""
MAP_KINDS: tuple[MapKind, ...] = get_args(MapKind)

ResizeMode = Literal["stretch", "crop", "pad"]
"""What becomes of a map whose aspect ratio is not the image's."""
RESIZE_MODES: tuple[ResizeMode, ...] = get_args(ResizeMode)

Prompts = Literal["own", "empty", "contradicting"]
"""Which prompts an evaluation uses."""
PROMPTS: tuple[Prompts, ...] = get_args(Prompts)

CONDITION = "canny"
"""The structure map that is meant where none is named."""
STEPS = 20
"""Denoising steps."""
MAX_STEPS = 1000
"""Of training: no scheduler takes more."""
MAX_SEED = 2**32 - 1
"""Above it, generators of random numbers overflow, or cut it off."""
MAX_MEGAPIXELS = 64
"""Larger images are refused where no other limit is given."""
GUIDANCE_SCALE = 7.5
"""Of a base of the user's own, as in diffusers' pipelines; bundled bases have their own (`guidance_for`)."""
