"""Metrics by name: what each is called, whether higher or lower is better, and how it is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from nexus_adapters.errors import InvalidArgument, expect
from nexus_adapters.registry import Registry, defined_alike

if TYPE_CHECKING:
    from torch import Tensor

_RESERVED = ("features", "gmacs", "parameters")  # columns of results that are no metrics


@dataclass(frozen=True)
class Generated:
    """A generated image with the sample that it was generated for: what a metric's function reads.

    Attributes:
        image: the generated one, RGB.
        original: the sample's own image, RGB of the same size.
        condition: the structure map that the image was to follow, RGB of the same size.
        caption: of the sample.
    """

    image: Image.Image
    original: Image.Image
    condition: Image.Image
    caption: str


@dataclass(frozen=True)
class Metric:
    """A number that an evaluation reports.

    Attributes:
        name: in files of results; an identifier, such as "edge_f1".
        label: in tables; by default the name with spaces.
        better: which values are better.
        function: gives the number of one generated image; a finite one. None where the number is computed
            elsewhere: by a condition's `compare`, from the scenes, or from CLIP's embeddings.
        distance: gives the number of a whole set: of the features of the generated images and of the
            original images, (N, D) each, float64. It is reported with a jackknife interval.
        applies_to: names of the conditions for which `function` is computed; empty for all.
        short: in captions of images; by default the label.
        is_merit: whether images of a study are ranked by it. Its best value must be 1, and higher better.
    """

    name: str
    label: str = ""
    better: Literal["higher", "lower", "unknown"] = "higher"
    function: Callable[[Generated], float] | None = None
    distance: Callable[[Tensor, Tensor], float] | None = None
    applies_to: tuple[str, ...] = ()
    short: str = ""
    is_merit: bool = False

    def __post_init__(self) -> None:
        """Fill in the label and the short label."""
        object.__setattr__(self, "label", self.label or self.name.replace("_", " "))
        object.__setattr__(self, "short", self.short or self.label)


def _frechet(features: Tensor, reference: Tensor) -> float:
    from nexus_adapters.metrics.learned_features import frechet_distance

    return frechet_distance(features, reference)


def _mmd(features: Tensor, reference: Tensor) -> float:
    from nexus_adapters.metrics.learned_features import mmd

    return mmd(features, reference)


def _ms_ssim(generated: Generated) -> float:
    """Of luminance, as the metric's authors define it."""
    from nexus_adapters.metrics.structure import luminance, ms_ssim

    return ms_ssim(luminance(generated.image), luminance(generated.original))


class _Metrics(Registry[Metric]):
    """The registry, which checks what installed packages add; what modules add, `register_metric` checks."""

    def add(self, name: str, entry: Any) -> None:
        self._entries[name] = entry

    def _entry_of(self, point: EntryPoint, found: Any) -> Metric:
        if not (isinstance(found, Metric) and found.name == point.name):
            raise InvalidArgument(
                "metric", f"a Metric of the name {point.name!r} from its package", repr(found)
            )
        return found


_BUILT_IN = (  # in the order of tables
    Metric("frechet", "Fréchet", "lower", distance=_frechet),
    Metric("mmd", "MMD", "lower", distance=_mmd),
    Metric("clip_score", "CLIP score"),
    Metric("binding_color", short="colors", is_merit=True),
    Metric("binding_material"),
    Metric("background"),
    Metric("edge_f1", "edge F1", short="edges", is_merit=True),
    Metric("ms_ssim", "MS-SSIM", function=_ms_ssim),
    Metric("sketch_ms_ssim", "sketch MS-SSIM", short="sketch", is_merit=True),
    Metric("depth_rmse", "depth RMSE", "lower"),
    Metric("depth_rank_correlation", "depth rank corr.", short="depth", is_merit=True),
    Metric("mean_iou", "mIoU", is_merit=True),
    Metric("normal_angle", "normal angle (degrees)", "lower"),
)

METRICS: Registry[Metric] = _Metrics("metric", "nexus_adapters.metrics")
"""Name -> metric, in the order of tables: the package's own, then those of `register_metric` and of installed
packages, which add them by entry points."""
for _metric in _BUILT_IN:
    METRICS.add(_metric.name, _metric)


def register_metric(metric: Metric) -> Metric:
    """Add a metric: evaluations compute and report it from now on.

    A metric replaces one of the same name whose function is defined in the same place, so that a notebook's
    cell can run again.

    Returns:
        `metric`.

    Raises:
        InvalidArgument: for a name that is no identifier, is taken by another metric, or names another column
            of results; for `better` of another value; for both or several kinds of function.
    """
    name = metric.name
    expect(name.isidentifier(), "metric", "a name of letters, digits and underscores", repr(name))
    expect(name not in _RESERVED, "metric", f"a name other than {', '.join(_RESERVED)}", repr(name))
    expect(
        metric.better in ("higher", "lower"), "metric", "better of 'higher' or 'lower'", repr(metric.better)
    )
    expect(
        metric.function is None or metric.distance is None,
        "metric",
        "a function or a distance",
        f"both in '{name}'",
        "Register two metrics",
    )
    expect(
        not metric.is_merit or metric.better == "higher",
        "metric",
        "better='higher' of a merit",
        f"'lower' of '{name}'",
    )
    taken = METRICS.get(name)
    if taken is not None and taken != metric and (taken in _BUILT_IN or not _is_again(taken, metric)):
        raise InvalidArgument(
            "metric", "a name that is not taken", repr(name), "Register it under another name"
        )
    METRICS.add(name, metric)
    return metric


def find_metric(name: str) -> Metric:
    """The metric of this name; of one that is not registered here, `better` is "unknown"."""
    return METRICS.get(name) or Metric(name, better="unknown")


def _is_again(first: Metric, second: Metric) -> bool:
    return defined_alike(first.function or first.distance, second.function or second.distance)
