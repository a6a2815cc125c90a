"""Metrics by name: the label of each, whether higher or lower is better, and how it is computed."""

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

_RESERVED = ("features", "gmacs", "parameters")  # columns of results that are not metrics


@dataclass(frozen=True)
class Generated:
    """A generated image with its sample, which is the input of a metric's function.

    Attributes:
        image: the generated RGB image.
        original: the sample's own image, RGB with the same size.
        condition: the structure map that the image should follow, RGB with the same size.
        caption: the sample's caption.
    """

    image: Image.Image
    original: Image.Image
    condition: Image.Image
    caption: str


@dataclass(frozen=True)
class Metric:
    """A number that an evaluation reports.

    Attributes:
        name: its name in result files; an identifier such as "edge_f1".
        label: its label in tables; by default, the name with spaces.
        better: which values are better.
        function: returns the finite number for one generated image. None if the number is computed elsewhere:
            by a condition's `compare`, from the scenes, or from CLIP embeddings.
        distance: returns the number for a whole set, from the features of the generated and of the original
            images, (N, D) each, float64. It is reported with a jackknife interval.
        applies_to: names of the conditions for which `function` is computed; empty for all.
        short: its label in captions of images; by default, the label.
        is_merit: whether a study ranks images by it. If so, its best value must be 1 and higher must be
            better.
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
    """MS-SSIM of the luminance, as its authors define it."""
    from nexus_adapters.metrics.structure import luminance, ms_ssim

    return ms_ssim(luminance(generated.image), luminance(generated.original))


class _Metrics(Registry[Metric]):
    """The registry, which checks metrics of installed packages; `register_metric` checks all others."""

    def add(self, name: str, entry: Any) -> None:
        self._entries[name] = entry

    def _entry_of(self, point: EntryPoint, found: Any) -> Metric:
        if not (isinstance(found, Metric) and found.name == point.name):
            raise InvalidArgument("metric", f"a Metric named {point.name!r} from its package", repr(found))
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
"""Name -> metric, in the order of tables: built-in ones, then those added by `register_metric` and by the
entry points of installed packages."""
for _metric in _BUILT_IN:
    METRICS.add(_metric.name, _metric)


def register_metric(metric: Metric) -> Metric:
    """Register a metric, which evaluations then compute and report.

    A metric replaces one with the same name whose function is defined in the same place, so that you can run
    a notebook cell again.

    Returns:
        `metric`.

    Raises:
        InvalidArgument: for a name that is not an identifier, belongs to another metric or is another column
            of results; for another value of `better`; for both a function and a distance; and for a merit of
            which lower is better.
    """
    name = metric.name
    expect(name.isidentifier(), "metric", "a name of letters, digits and underscores", repr(name))
    expect(name not in _RESERVED, "metric", f"a name other than {', '.join(_RESERVED)}", repr(name))
    expect(metric.better in ("higher", "lower"), "metric", "better='higher' or 'lower'", repr(metric.better))
    expect(
        metric.function is None or metric.distance is None,
        "metric",
        "a function or a distance",
        f"both in '{name}'",
        "Register two metrics instead",
    )
    expect(
        not metric.is_merit or metric.better == "higher",
        "metric",
        "better='higher' for a merit",
        f"'lower' for '{name}'",
    )
    taken = METRICS.get(name)
    if taken is not None and taken != metric and (taken in _BUILT_IN or not _is_again(taken, metric)):
        raise InvalidArgument(
            "metric", "a name that is not in use", repr(name), "Register it under another name"
        )
    METRICS.add(name, metric)
    return metric


def find_metric(name: str) -> Metric:
    """Return the metric with this name. For one that is not registered, `better` is "unknown"."""
    return METRICS.get(name) or Metric(name, better="unknown")


def _is_again(first: Metric, second: Metric) -> bool:
    return defined_alike(first.function or first.distance, second.function or second.distance)
