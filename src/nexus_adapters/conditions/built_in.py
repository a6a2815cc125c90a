"""The package's own extractors."""

from __future__ import annotations

from nexus_adapters.conditions.canny import canny
from nexus_adapters.conditions.comparison import (
    brightness_agreement,
    compare_depths,
    compare_labels,
    compare_sketches,
)
from nexus_adapters.conditions.depth import DEFAULT_DEPTH_MODEL, depth, depths
from nexus_adapters.conditions.extractor import Extractor
from nexus_adapters.conditions.segmentation import DEFAULT_SEGMENTATION_MODEL, segmentation, segmentations
from nexus_adapters.conditions.sketch import sketch

BUILT_IN: dict[str, Extractor] = {
    extractor.name: extractor
    for extractor in (
        Extractor("canny", canny, "edges by OpenCV's Canny; options low, high, auto", lines=True),
        Extractor(
            "depth",
            depth,
            "how near each pixel is, by a model; options model, predicts, device",
            lines=False,
            needs=(f"the model {DEFAULT_DEPTH_MODEL}, 99 MB, unless another is named",),
            draw_many=depths,
            model=DEFAULT_DEPTH_MODEL,
            compare=compare_depths,
            agreement=brightness_agreement,
        ),
        Extractor(
            "segmentation",
            segmentation,
            "a color for each class, by a model; options model, palette, device",
            lines=False,
            needs=(f"the model {DEFAULT_SEGMENTATION_MODEL}, 241 MB, unless another is named",),
            draw_many=segmentations,
            labels=True,
            model=DEFAULT_SEGMENTATION_MODEL,
            compare=compare_labels,
            agreement=brightness_agreement,
        ),
        Extractor(
            "sketch",
            sketch,
            "lines by a difference of Gaussians; options sigma, threshold, coherence, model",
            lines=True,
            compare=compare_sketches,
        ),
    )
}
