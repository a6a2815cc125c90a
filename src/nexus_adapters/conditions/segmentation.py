"""Semantic segmentation with any suitable model of `transformers`: a color for each class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from nexus_adapters.conditions.images import to_rgb
from nexus_adapters.conditions.transformers_models import in_batches_of_a_size, load_model, names_the_model
from nexus_adapters.errors import InvalidArgument

# 150 classes in the order of SceneParse150 (ADE20K), as in the maps of ControlNet and T2I-Adapter.
_ADE20K = """
    787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d 787846
    08ff33 ff0652 8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0 0907e6 dcdcdc
    ff095c 7009ff 08ffd6 07ffe0 ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06 ffc207 ff7a08 00ff14
    ff0829 ff0599 0633ff eb0cff a09614 00a3ff 8c8c8c fa0a0f 14ff00 1fff00 ff1f00 ffe000 99ff00 0000ff
    ff4700 00ebff 00adff 1f00ff 0bc8c8 ff5200 00fff5 003dff 00ff70 00ff85 ff0000 ffa300 ff6600 c2ff00
    008fff 33ff00 0052ff 00ff29 00ffad 0a00ff adff00 00ff99 ff5c00 ff00ff ff00f5 ff0066 ffad00 ff0014
    ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2 00ff52 000aff 0070ff 3300ff 00c2ff 007aff 00ffa3 ff9900
    00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00 08b8aa 8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070
    5cff00 00e0ff 70e0ff 46b8a0 a300ff 9900ff 47ff00 ff00a3 ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff
    ff007a fff500 0abed4 d6ff00 00ccff 1400ff ffff00 0099ff 0029ff 00ffcc 2900ff 29ff00 ad00ff 00f5ff
    4700ff 7a00ff 00ffb8 005cff b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff
"""
# 133 classes, first things, then stuff, in the order and colors of panopticapi's
# panoptic_coco_categories.json.
_COCO = """
    dc143c 770b20 00008e 0000e6 6a00e4 003c64 005064 000046 0000c0 faaa1e 64aa1e dcdc00 af74af fa001e
    a52a2a ff4dff 00e2fc b6b6ff 005200 78a69d 6e4c00 ae39ff c76400 480076 ffb3f0 007d5c d10097 bcd0b6
    00dcb0 ff63a4 5c0049 8581ff 4eb4ff 00e400 aefff3 2d59ff 868667 9194ae ffd0ba c5e2ff ab8601 6d3f36
    cf8aff 97005f 09503d 546933 4a4169 a6c466 d0c3d2 ff6d41 008f95 b300c2 d1636a 057900 e3ffcd 93bad0
    994501 035fa1 a3ff00 7700aa 00b6c7 00a578 b78258 5f2000 827287 6e8185 a64a76 db8eb9 4fd272 b25a3e
    41460f 7fa773 3b696a 8e6c2d c4ac00 5f3650 804cff c93901 f6007a bfa2d0 ffff80 93d3cb 966464 a8abac
    9270c6 d2aa64 5c8859 da58b8 f18100 d911ff 7c4ab5 464646 ffe4ff 9ad000 c1005c 4c5b71 ffb4c3 6a9ab0
    e6968c 3c8fff 804080 5c5237 fed47c 494dae ffa062 ffffff 68546d a9a483 e1c7ff 89364a 879edf 07f6e7
    6bffc8 3a2995 b7798e ff4961 6b8e23 be9999 928b8d 4682b4 86c79c d1e28c 60246c 606060 40aa40 98fb98
    d0e5e4 cebaab 98a140 747000 00728f 66669c fa8dff
"""


def _parsed(text: str) -> UInt8[np.ndarray, "classes 3"]:
    return np.array([list(bytes.fromhex(color)) for color in text.split()], np.uint8)


def _voc(classes: int = 256) -> UInt8[np.ndarray, "classes 3"]:
    """Return PASCAL VOC's palette: bits 0, 1, 2 of a label are the highest bits of red, green, blue, etc."""
    labels = np.arange(classes)
    colors = np.zeros((classes, 3), np.uint8)
    for level in range(8):
        for channel in range(3):
            colors[:, channel] |= ((labels >> (3 * level + channel)) & 1).astype(np.uint8) << (7 - level)
    return colors


PALETTES: dict[str, UInt8[np.ndarray, "classes 3"]] = {
    "ade20k": _parsed(_ADE20K),
    "coco": _parsed(_COCO),
    "voc": _voc(),
}


DEFAULT_SEGMENTATION_MODEL = "openmmlab/upernet-convnext-tiny"  # MIT, 60M parameters, 241 MB, ADE20K
_PALETTE_OF_CLASSES = {150: "ade20k", 133: "coco"}
_VOID = (0, 0, 0)  # color of pixels without a class


def segmentation(
    image: Image.Image,
    model: str = DEFAULT_SEGMENTATION_MODEL,
    palette: str = "auto",
    device: str = "auto",
) -> Image.Image:
    """Extract a segmentation map: each pixel gets the color of its class.

    Works with semantic models, and with models for panoptic or instance segmentation (Mask2Former, EoMT,
    OneFormer, ...), which give each pixel its most likely class.

    Args:
        image: a PIL image of any mode that `to_rgb` takes.
        model: folder or Hub id.
        palette: a name in `PALETTES`; "auto" is "ade20k" for models with 150 classes and "coco" for 133.
            "voc" has colors for up to 256 classes of any kind; its first color is black.
        device: as in `load_model`.

    Returns:
        RGB, same size as `image`; pixels without a class are black.

    Raises:
        InvalidArgument: for a wrong option, an unknown model, a palette that does not fit it, or an image
            that it cannot process.
    """
    return segmentations([image], model, palette, device)[0]


def segmentations(
    images: Sequence[Image.Image],
    model: str = DEFAULT_SEGMENTATION_MODEL,
    palette: str = "auto",
    device: str = "auto",
) -> list[Image.Image]:
    """Extract the segmentation maps of several images, see `segmentation`; equal sizes run together."""
    if palette not in ("auto", *PALETTES):
        raise InvalidArgument("palette", f"auto or one of {', '.join(PALETTES)}", repr(palette))
    loaded = load_model("segmentation", model, device)
    classes = int(loaded.network.config.num_labels)
    colors = _colors(palette, classes, model)
    extra = {"task_inputs": ["semantic"]} if loaded.kind == "oneformer" else {}

    def extract(batch: list[Image.Image]) -> list[Image.Image]:
        sizes = [(image.height, image.width) for image in batch]
        repeated = {name: values * len(batch) for name, values in extra.items()}
        with names_the_model("segmentation", model):
            found = loaded.processor.post_process_semantic_segmentation(
                loaded.run(batch, **repeated), target_sizes=sizes
            )
        return [colored(labels.cpu().numpy(), colors) for labels in found]

    return in_batches_of_a_size([to_rgb(image) for image in images], extract)


def _colors(palette: str, classes: int, model: str) -> UInt8[np.ndarray, "classes 3"]:
    if palette == "auto":
        if classes not in _PALETTE_OF_CLASSES:
            expected = f"one of {', '.join(PALETTES)} for a model with {classes} classes"
            raise InvalidArgument("palette", expected, f"auto for '{model}'")
        palette = _PALETTE_OF_CLASSES[classes]
    colors = PALETTES[palette]
    if classes > len(colors):
        expected = f"at least {classes} colors, one for each class of '{model}'"
        raise InvalidArgument("palette", expected, f"{palette} with {len(colors)}")
    return colors


def colored(labels: Int[np.ndarray, "h w"], colors: UInt8[np.ndarray, "classes 3"]) -> Image.Image:
    """Color an array of labels; labels without a color become black."""
    has_class = (labels >= 0) & (labels < len(colors))
    pixels = colors[np.where(has_class, labels, 0)]
    pixels[~has_class] = _VOID
    return Image.fromarray(pixels)
