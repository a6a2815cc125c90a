"""The choices that options, recipes and functions accept, and their shared defaults, each defined once.

Commands list them as choices, and configs are validated against the same types. Nothing is imported here, so
`nexus --help` can show them without torch.
"""

from __future__ import annotations

from typing import Literal, get_args

Policy = Literal["positive", "per_branch", "cond_only"]
"""Which text a text-reading adapter reads, and which guidance branches get its features. See `Control`."""
POLICIES: tuple[Policy, ...] = get_args(Policy)
DEFAULT_POLICY: Policy = "positive"

Balance = Literal["balanced", "prompt", "control"]
"""What takes precedence. See `injection.balance`."""
BALANCE_NAMES: tuple[Balance, ...] = get_args(Balance)

PredictionType = Literal["epsilon", "v_prediction"]
"""What a base predicts, with the names of diffusers' schedulers."""
PREDICTION_TYPES: tuple[PredictionType, ...] = get_args(PredictionType)

Device = Literal["auto", "cuda", "mps", "cpu"]
DEVICES: tuple[Device, ...] = get_args(Device)

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
"""The precision of models. "auto" is float16 on CUDA and float32 elsewhere."""
DTYPES: tuple[Dtype, ...] = get_args(Dtype)

DataKind = Literal["folder", "prepared", "table", "tars", "scenes"]
"""Data formats that training and evaluation read."""
DATA_KINDS: tuple[DataKind, ...] = get_args(DataKind)

SourceKind = Literal["auto", "folder", "coco", "table", "tars", "scenes"]
"""Data formats that `nexus prepare` reads."""
SOURCE_KINDS: tuple[SourceKind, ...] = get_args(SourceKind)

Captions = Literal["all", "first", "random", "none"]
"""Which captions of a sample a prepared set keeps. With "none", captions are not read and stay empty."""
CAPTIONS: tuple[Captions, ...] = get_args(Captions)

ImageFormat = Literal["jpg", "png", "webp"]
"""File format of the images in a prepared set."""
IMAGE_FORMATS: tuple[ImageFormat, ...] = get_args(ImageFormat)

MapKind = Literal["lines", "labels", "depth", "image"]
"""What a structure map shows, which decides how it is read and resized: light lines on black, a color for
each class, nearness, or anything else."""
MAP_KINDS: tuple[MapKind, ...] = get_args(MapKind)

ResizeMode = Literal["stretch", "crop", "pad"]
"""How to fit a map whose aspect ratio differs from the image's."""
RESIZE_MODES: tuple[ResizeMode, ...] = get_args(ResizeMode)

Prompts = Literal["own", "empty", "contradicting"]
"""Which prompts an evaluation uses."""
PROMPTS: tuple[Prompts, ...] = get_args(Prompts)

CONDITION = "canny"
"""The default structure map."""
STEPS = 20
"""The default number of denoising steps."""
MAX_STEPS = 1000
"""The number of training timesteps; no scheduler takes more steps."""
MAX_SEED = 2**32 - 1
"""Larger seeds overflow or are truncated in some random number generators."""
MAX_MEGAPIXELS = 64
"""Larger images are rejected by default."""
GUIDANCE_SCALE = 7.5
"""Default guidance scale, as in diffusers' pipelines. Embedded bases have their own (`guidance_for`)."""
