"""Semantic segmentation by any model of `transformers` that gives it: a color for each class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from nexus_adapters.conditions.learned import in_batches_of_a_size, load_model, names_the_model
from nexus_adapters.conditions.palettes import PALETTES
from nexus_adapters.conditions.rgb import to_rgb
from nexus_adapters.errors import InvalidArgument

DEFAULT_SEGMENTATION_MODEL = "openmmlab/upernet-convnext-tiny"  # MIT, 60M parameters, 241 MB, ADE20K
_PALETTE_OF_CLASSES = {150: "ade20k", 133: "coco"}
_VOID = (0, 0, 0)  # of pixels that no class has


def segmentation(
    image: Image.Image,
    model: str = DEFAULT_SEGMENTATION_MODEL,
    palette: str = "auto",
    device: str = "auto",
) -> Image.Image:
    """Color each pixel by its class.

    Semantic models, and models of panoptic or instance segmentation (Mask2Former, EoMT, OneFormer, ...),
    of which the most likely class of each pixel is taken.

    Args:
        image: a PIL image of any mode that `to_rgb` takes.
        model: folder or Hub id.
        palette: a name in `PALETTES`; "auto" is "ade20k" for models of 150 classes and "coco" for those of
            133. "voc" has colors for up to 256 classes of any kind, of which the first is black.
        device: as in `load_model`.

    Returns:
        RGB, same size as `image`; pixels without a class are black.

    Raises:
        InvalidArgument: for a wrong option, no such model, a palette that does not fit it, or an image that
            it cannot take.
    """
    return segmentations([image], model, palette, device)[0]


def segmentations(
    images: Sequence[Image.Image],
    model: str = DEFAULT_SEGMENTATION_MODEL,
    palette: str = "auto",
    device: str = "auto",
) -> list[Image.Image]:
    """Do as `segmentation` for several images, those of equal size together."""
    if palette not in ("auto", *PALETTES):
        raise InvalidArgument("palette", f"auto or one of {', '.join(PALETTES)}", repr(palette))
    loaded = load_model("segmentation", model, device)
    classes = int(loaded.network.config.num_labels)
    colors = _colors(palette, classes, model)
    extra = {"task_inputs": ["semantic"]} if loaded.kind == "oneformer" else {}

    def draw(batch: list[Image.Image]) -> list[Image.Image]:
        sizes = [(image.height, image.width) for image in batch]
        repeated = {name: values * len(batch) for name, values in extra.items()}
        with names_the_model("segmentation", model):
            found = loaded.processor.post_process_semantic_segmentation(
                loaded.run(batch, **repeated), target_sizes=sizes
            )
        return [_colored(labels.cpu().numpy(), colors) for labels in found]

    return in_batches_of_a_size([to_rgb(image) for image in images], draw)


def _colors(palette: str, classes: int, model: str) -> UInt8[np.ndarray, "classes 3"]:
    if palette == "auto":
        if classes not in _PALETTE_OF_CLASSES:
            expected = f"one of {', '.join(PALETTES)} for a model of {classes} classes"
            raise InvalidArgument("palette", expected, f"auto for '{model}'")
        palette = _PALETTE_OF_CLASSES[classes]
    colors = PALETTES[palette]
    if classes > len(colors):
        expected = f"at least {classes} colors, one for each class of '{model}'"
        raise InvalidArgument("palette", expected, f"{palette} of {len(colors)}")
    return colors


def _colored(labels: Int[np.ndarray, "h w"], colors: UInt8[np.ndarray, "classes 3"]) -> Image.Image:
    has_class = (labels >= 0) & (labels < len(colors))
    pixels = colors[np.where(has_class, labels, 0)]
    pixels[~has_class] = _VOID
    return Image.fromarray(pixels)
