import numpy as np
import pytest
import torch
from jaxtyping import config
from scipy import linalg
from tests.refusals import refused

from nexus_adapters.metrics.learned_features import frechet_distance


def gaussian(count, mean, covariance, seed):
    draw = np.random.default_rng(seed)
    return torch.from_numpy(draw.multivariate_normal(mean, covariance, count))


def by_scipy(a, b):
    """By the matrix square root of the product, as Heusel's own code has it."""
    a, b = a.numpy().astype(float), b.numpy().astype(float)
    first, second = np.cov(a.T), np.cov(b.T)
    root = linalg.sqrtm(first @ second)
    apart = np.square(a.mean(0) - b.mean(0)).sum()
    return float(apart + np.trace(first) + np.trace(second) - 2 * np.trace(root).real)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_an_independent_calculation(dtype):
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(400, 16, generator=draw, dtype=dtype) @ torch.randn(16, 16, generator=draw, dtype=dtype)
    b = torch.randn(300, 16, generator=draw, dtype=dtype) + 0.3
    assert frechet_distance(a, b) == pytest.approx(by_scipy(a, b), abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), abs=1e-6)


def test_known_gaussians_give_the_closed_form():
    """Of commuting covariances it is |mu1 - mu2|^2 + sum (s1 - s2)^2."""
    a = gaussian(200_000, [0, 0, 0], np.diag([1, 4, 9]), 0)
    b = gaussian(200_000, [1, 0, -2], np.diag([4, 4, 1]), 1)
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2, rel=0.01)


def test_equal_sets_have_none_also_with_few_samples():
    for count in (2, 10, 100):
        rows = torch.randn(count, 32, generator=torch.Generator().manual_seed(count))
        assert frechet_distance(rows, rows) == pytest.approx(0, abs=1e-6)
        assert frechet_distance(rows, rows.flip(0)) == pytest.approx(0, abs=1e-6)


def test_corruption_makes_it_grow():
    draw = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(500, 8, generator=draw), torch.randn(500, 8, generator=draw)
    distances = [frechet_distance(clean + strength * noise, clean) for strength in (0, 0.1, 0.3, 1, 3)]
    assert distances == sorted(distances)
    assert distances[0] < 1e-6 < distances[1]


def test_it_is_larger_with_fewer_samples():
    """Of one and the same distribution: what the docstring warns of."""
    rows = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    distances = [frechet_distance(rows[:count], rows[2000:]) for count in (50, 200, 2000)]
    assert distances == sorted(distances, reverse=True)


ROWS = torch.randn(5, 3)


@pytest.mark.parametrize(
    ("features", "reference", "name", "expected", "received"),
    [
        (ROWS[0], ROWS, "features", "(N, D)", "torch.float32 (3,)"),
        (ROWS, ROWS.int(), "reference", "floats", "torch.int32"),
        (ROWS[:1], ROWS, "features", "at least 2 samples", "1"),
        (ROWS, ROWS * torch.nan, "reference", "finite", "nan"),
        (ROWS, ROWS[:, :2], "reference", "3 columns", "2"),
    ],
)
def test_wrong_sets_are_refused(features, reference, name, expected, received, monkeypatch):
    monkeypatch.setattr(config, "jaxtyping_disable", True)
    with refused(name, received, expected=expected):
        frechet_distance(features, reference)
