import math

import numpy as np
import pytest
import torch
from jaxtyping import config
from tests.refusals import refused

from nexus_adapters.embedded.render import render
from nexus_adapters.embedded.scene import draw_scene
from nexus_adapters.metrics.structure import (
    depth_rmse,
    edge_f1,
    mean_iou,
    ms_ssim,
    normal_angle_deg,
    psnr_db,
    rank_correlation,
)


def brute_force(predicted, reference, tolerance):
    """The definition, pixel by pixel."""
    ours, theirs = np.argwhere(predicted).tolist(), np.argwhere(reference).tolist()
    if not ours or not theirs:
        return float(not ours and not theirs)

    def matched(points, others):
        return sum(
            any(max(abs(row - r), abs(column - c)) <= tolerance for r, c in others) for row, column in points
        )

    precision, recall = matched(ours, theirs) / len(ours), matched(theirs, ours) / len(theirs)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def random_maps(seed, shape=(9, 13), share=0.06):
    rng = np.random.default_rng(seed)
    return rng.random(shape) < share, rng.random(shape) < share


@pytest.mark.parametrize("tolerance", [0, 1, 2, 5])
def test_is_the_definition(tolerance):
    found = []
    for seed in range(12):
        predicted, reference = random_maps(seed)
        found.append(edge_f1(predicted, reference, tolerance))
        assert found[-1] == pytest.approx(brute_force(predicted, reference, tolerance), abs=1e-12)
        assert found[-1] == edge_f1(reference, predicted, tolerance)
    assert len(set(found)) > 2  # the maps differ enough to tell anything


def test_pixels_count_not_edges():
    reference = np.zeros((5, 20), bool)
    reference[1, :10] = True
    predicted = np.zeros((5, 20), bool)
    predicted[2, :20] = True  # eleven of twenty lie within a pixel of the reference
    assert edge_f1(predicted, reference) == pytest.approx(2 * 0.55 / 1.55)


def test_the_tolerance_is_one_pixel_unless_given():
    reference, one_off, two_off = np.zeros((3, 16, 16), bool)
    reference[4, 4:12] = one_off[5, 5:13] = two_off[6, 4:12] = True  # one is a diagonal step away
    assert edge_f1(one_off, reference) == 1
    assert edge_f1(two_off, reference) == 0
    assert edge_f1(two_off, reference, tolerance_px=2) == 1
    assert edge_f1(one_off, reference, tolerance_px=0) == 0


def test_nothing_matches_across_the_border():
    predicted, reference = np.zeros((2, 6, 6), bool)
    predicted[0, 0] = reference[5, 5] = True
    assert edge_f1(predicted, reference, tolerance_px=4) == 0
    assert edge_f1(predicted, reference, tolerance_px=5) == 1


@pytest.mark.parametrize("shape", [(4, 4), (0, 3)])
def test_two_empty_maps_agree(shape):
    assert edge_f1(np.zeros(shape, bool), np.zeros(shape, bool)) == 1.0


def test_one_empty_map_does_not():
    empty, full = np.zeros((4, 4), bool), np.ones((4, 4), bool)
    assert edge_f1(empty, full) == edge_f1(full, empty) == 0.0


def test_the_maps_stay_as_they_are():
    predicted, reference = random_maps(0)
    copies = predicted.copy(), reference.copy()
    edge_f1(predicted, reference)
    assert np.array_equal(predicted, copies[0])
    assert np.array_equal(reference, copies[1])


FLAT = np.zeros((4, 4), bool)


@pytest.mark.parametrize(
    ("predicted", "reference", "tolerance", "name", "expected", "received"),
    [
        (FLAT.astype(np.uint8), FLAT, 1, "predicted", "bool", "uint8 (4, 4)"),
        (FLAT, FLAT[None], 1, "reference", "(H, W)", "bool (1, 4, 4)"),
        (FLAT, FLAT[:3], 1, "reference", "(4, 4)", "(3, 4)"),
        (FLAT, FLAT, -1, "tolerance_px", "at least 0", "-1"),
    ],
)
def test_bad_maps_are_named(predicted, reference, tolerance, name, expected, received):
    with refused(name, received, expected=expected):
        edge_f1(predicted, reference, tolerance)


def encoded(*vectors):
    """A map of one row, as normal maps are stored."""
    directions = np.array([vectors], float) / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.rint((directions + 1) * 127.5).astype(np.uint8)


def test_is_the_angle_between_the_normals():
    angles = (0, 30, 90, 180)
    turned = [(np.sin(np.radians(a)), 0, np.cos(np.radians(a))) for a in angles]
    for angle, vector in zip(angles, turned, strict=True):
        found = normal_angle_deg(encoded(vector), encoded((0, 0, 1)))
        assert found == pytest.approx(angle, abs=1)  # 8 bits
    assert normal_angle_deg(encoded(*turned), encoded(*[(0, 0, 1)] * 4)) == pytest.approx(75, abs=0.5)


def test_lengths_do_not_count_and_equal_maps_have_no_angle():
    noise = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    assert normal_angle_deg(noise, noise) == pytest.approx(0, abs=1e-6)
    long, short = np.full((1, 1, 3), 255, np.uint8), np.full((1, 1, 3), 191, np.uint8)
    assert normal_angle_deg(long, short) == pytest.approx(0, abs=1e-6)


def test_other_input_is_refused():
    flat = np.zeros((4, 5, 3), np.uint8)
    with refused("normals", received="float64 (4, 5, 3)"):
        normal_angle_deg(flat.astype(float), flat)
    with refused("reference", received="uint8 (4, 5)"):
        normal_angle_deg(flat, flat[..., 0])
    with refused("reference", received="(3, 5, 3)", expected="(4, 5, 3)"):
        normal_angle_deg(flat, flat[:3])


DRAW = torch.Generator().manual_seed(0)
DEPTH, OTHER = torch.rand((2, 20, 30), generator=DRAW)


def test_rmse_is_that_of_numpy():
    expected = np.sqrt(np.mean((DEPTH.numpy().astype(float) - OTHER.numpy().astype(float)) ** 2))
    assert depth_rmse(DEPTH, OTHER) == pytest.approx(expected, abs=1e-9)
    assert depth_rmse(DEPTH, DEPTH) == 0
    assert depth_rmse(torch.zeros(3, 3), torch.ones(3, 3)) == 1


def ranks(values):
    """Mean ranks of equals, the slow way."""
    return np.array([np.mean([k for k, w in enumerate(sorted(values)) if w == v]) for v in values])


def test_rank_correlation_is_that_of_mean_ranks():
    coarse = (DEPTH * 4).round() / 4  # many equal ones
    a, b = ranks(coarse.flatten().tolist()), ranks(OTHER.flatten().tolist())
    assert rank_correlation(coarse, OTHER) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-6)
    assert rank_correlation(DEPTH, DEPTH**3) == pytest.approx(1)
    assert rank_correlation(DEPTH, 1 - DEPTH) == pytest.approx(-1)
    assert rank_correlation(DEPTH, torch.zeros_like(DEPTH)) == 0


def test_iou_is_the_mean_over_classes_that_are_there():
    labels = torch.tensor([[0, 0, 1, 1], [0, 2, 1, 1]])
    reference = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 2]])
    # 0: 3 of 4; 1: 3 of 4; 2: 0 of 2; 3: in neither
    assert mean_iou(labels, reference, 4) == pytest.approx((3 / 4 + 3 / 4 + 0) / 3, abs=1e-6)
    assert mean_iou(labels, labels, 9) == 1
    assert mean_iou(torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.int64), 2) == 0
    assert mean_iou(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64), 1) == 1


def ssim_terms(a, b):
    """Contrast-structure and whole similarity of one scale, by scipy."""
    from scipy.ndimage import gaussian_filter

    def blur(x):
        return gaussian_filter(x, 1.5, truncate=5 / 1.5)[5:-5, 5:-5]  # 11x11, whole windows alone

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    both = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    contrast = (2 * both + c2) / (var_a + var_b + c2)
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return contrast.mean(), (luminance * contrast).mean()


def test_ms_ssim_agrees_with_an_independent_calculation():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:176, 0:192] / 24
    a = 0.5 + 0.4 * np.sin(x) * np.cos(y)
    b = np.clip(a + rng.normal(0, 0.08, a.shape), 0, 1)
    found = ms_ssim(torch.from_numpy(a)[None], torch.from_numpy(b)[None])
    weights, expected = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333), 1.0
    for scale, weight in enumerate(weights):
        contrast, whole = ssim_terms(a, b)
        expected *= (whole if scale == 4 else contrast) ** weight
        a, b = (
            p.reshape(p.shape[0] // 2, 2, p.shape[1] // 2, 2).mean((1, 3)) if scale < 4 else p for p in (a, b)
        )
    assert found == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("size", [(11, 11), (64, 80), (128, 128), (200, 170)])
def test_ms_ssim_takes_any_size_from_its_window_on(size):
    image = torch.rand((3, *size), generator=torch.Generator().manual_seed(1))
    noise = torch.randn((3, *size), generator=torch.Generator().manual_seed(2))
    scores = [ms_ssim((image + s * noise).clamp(0, 1), image) for s in (0, 0.05, 0.2, 1.0)]
    assert scores[0] == pytest.approx(1, abs=1e-6)
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    ("call", "name", "expected", "received"),
    [
        (lambda: depth_rmse(DEPTH, OTHER[:5]), "reference", "(20, 30)", "(5, 30)"),
        (lambda: depth_rmse(2 * DEPTH, OTHER), "depth", "in [0, 1]", " to 1.9"),
        (lambda: rank_correlation(DEPTH, OTHER * torch.nan), "reference", "in [0, 1]", "nan"),
        (lambda: depth_rmse(DEPTH[0], OTHER), "depth", "2 dimensions", "torch.float32"),
        (lambda: mean_iou(DEPTH, OTHER, 2), "labels", "integers", "torch.float32"),
        (lambda: mean_iou(torch.tensor([[3]]), torch.tensor([[0]]), 3), "labels", "0 to 2", "3 to 3"),
        (lambda: ms_ssim(DEPTH[None, :10], OTHER[None, :10]), "image", "at least 11 pixels", "(10, 30)"),
    ],
)
def test_wrong_maps_are_refused(call, name, expected, received, monkeypatch):
    monkeypatch.setattr(config, "jaxtyping_disable", True)
    with refused(name, received, expected=expected):
        call()


def test_ms_ssim_in_float32_is_nearly_that_in_float64():
    for seed in range(5):
        a, b = (
            torch.from_numpy(render(draw_scene(number, "test")).image).permute(2, 0, 1).double() / 255
            for number in (seed, seed + 100)
        )
        assert ms_ssim(a.float(), b.float()) == pytest.approx(ms_ssim(a, b), abs=1e-4)


GREY = np.full((4, 6, 3), 100, np.uint8)


def test_psnr_is_twenty_log_of_peak_over_an_even_error():
    assert psnr_db(GREY + 10, GREY) == pytest.approx(20 * math.log10(255 / 10))
    assert psnr_db(GREY, GREY + 10) == psnr_db(GREY + 10, GREY)


def test_an_error_in_a_part_counts_by_its_share():
    image = GREY.copy()
    image[:1] = 255  # a quarter of the pixels
    assert psnr_db(image, GREY) == pytest.approx(20 * math.log10(255 / 155) + 10 * math.log10(4))


def test_equal_images_are_infinitely_close():
    assert psnr_db(GREY, GREY.copy()) == math.inf


def test_psnr_of_other_input_is_refused():
    with refused("image", received="float64", expected="uint8"):
        psnr_db(GREY / 255, GREY)
    with refused("reference", received="(4, 5, 3)", expected="(4, 6, 3)"):
        psnr_db(GREY, GREY[:, :5])
