import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from tests.refusals import refused

from nexus_adapters.conditions import EXTRACTORS, Extractor, find_extractor
from nexus_adapters.conditions.canny import canny
from nexus_adapters.metrics import METRICS
from nexus_adapters.metrics.structure import depth_rmse, edge_f1, ms_ssim, rank_correlation

RNG = np.random.default_rng(0)
NOISE, OTHER = (Image.fromarray(RNG.integers(0, 256, (40, 48, 3), dtype=np.uint8)) for _ in range(2))
LINES, OTHER_LINES = canny(NOISE, 700, 1100), canny(OTHER, 700, 1100)


def grey(image):
    return np.asarray(image.convert("L"))


def unit(image):
    return torch.from_numpy(grey(image).copy()).float() / 255


def test_maps_of_lines_are_compared_as_edges():
    expected = edge_f1(grey(LINES) > 127, grey(OTHER_LINES) > 127)
    assert 0 < expected < 1
    for extractor in (find_extractor("canny"), Extractor("mine", canny, "", kind="lines")):
        assert extractor.compare(LINES, OTHER_LINES) == {"edge_f1": expected}
        assert extractor.agreement(LINES, OTHER_LINES) == expected


def test_sketches_are_compared_as_soft_and_as_hard_lines():
    sketch = find_extractor("sketch")
    f1 = edge_f1(grey(NOISE) > 127, grey(OTHER) > 127)
    assert sketch.compare(NOISE, OTHER) == {
        "sketch_ms_ssim": ms_ssim(unit(NOISE)[None], unit(OTHER)[None]), "edge_f1": f1,
    }  # fmt: skip
    assert sketch.agreement(NOISE, OTHER) == f1


def test_depth_is_compared_by_error_and_order():
    depth = find_extractor("depth")
    assert depth.compare(NOISE, OTHER) == {
        "depth_rmse": depth_rmse(unit(NOISE), unit(OTHER)),
        "depth_rank_correlation": rank_correlation(unit(NOISE), unit(OTHER)),
    }
    expected = 1 - np.abs(grey(NOISE).astype(float) - grey(OTHER)).mean() / 255
    assert depth.agreement(NOISE, OTHER) == pytest.approx(expected)
    assert find_extractor("segmentation").agreement(NOISE, OTHER) == pytest.approx(expected)


def test_segmentations_are_compared_by_color():
    compare = find_extractor("segmentation").compare
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[:, 2:] = (0, 0, 9)  # as dark as the other, but another class
    shifted = np.zeros((4, 4, 3), np.uint8)
    shifted[:, 1:] = (0, 0, 9)
    found, wanted = Image.fromarray(shifted), Image.fromarray(pixels)
    assert compare(found, wanted) == {"mean_iou": pytest.approx((4 / 8 + 8 / 12) / 2)}
    assert compare(wanted, wanted) == {"mean_iou": 1}
    with refused("condition", received=str(2 * 40 * 48), expected="512 colors"):
        compare(NOISE, OTHER)


def test_normals_are_compared_by_angle_and_skeletons_not_at_all(monkeypatch):
    module = types.ModuleType("controlnet_aux")
    module.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "controlnet_aux", module)
    normal, pose = EXTRACTORS["normal"], EXTRACTORS["openpose"]
    facing, aside = Image.new("RGB", (4, 4), (128, 128, 255)), Image.new("RGB", (4, 4), (255, 128, 128))
    assert normal.compare(aside, facing) == {"normal_angle": pytest.approx(90, abs=0.5)}
    assert normal.agreement(aside, facing) == pytest.approx(0.5, abs=0.01)
    assert normal.agreement(facing, facing) == pytest.approx(1)
    assert (pose.compare, pose.agreement) == (None, None)


def test_an_extractor_without_a_comparison_has_none_unless_its_maps_are_lines():
    plain = Extractor("plain", canny, "")
    assert (plain.compare, plain.agreement) == (None, None)
    mine = Extractor(
        "mine", canny, "", kind="lines", compare=lambda *_: {"mine": 1.0}, agreement=lambda *_: 0.5
    )
    assert mine.compare(NOISE, OTHER) == {"mine": 1.0}
    assert mine.agreement(NOISE, OTHER) == 0.5


def test_what_comparisons_give_are_known_metrics():
    compared = [find_extractor(name).compare for name in ("canny", "sketch", "depth")]
    assert {name for compare in compared for name in compare(NOISE, OTHER)} <= set(METRICS)
