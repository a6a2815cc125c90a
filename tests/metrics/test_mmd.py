import numpy as np
import pytest
import torch
from jaxtyping import config
from tests.refusals import refused

from nexus_adapters.metrics import learned_features as module
from nexus_adapters.metrics.learned_features import mmd

DRAW = torch.Generator().manual_seed(0)
A, B = torch.randn(60, 8, generator=DRAW), torch.randn(50, 8, generator=DRAW) + 0.5


def by_loops(a, b, kernel, is_unbiased):
    a, b = a.double().numpy(), b.double().numpy()
    if kernel == "gaussian":
        a, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (a, b))

    def k(x, y):
        if kernel == "gaussian":
            return np.exp(-np.square(x - y).sum() / (2 * 10**2))
        return (x @ y / len(x) + 1) ** 3

    def own(rows):
        pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if i != j or not is_unbiased]
        return np.mean([k(rows[i], rows[j]) for i, j in pairs])

    found = own(a) + own(b) - 2 * np.mean([k(x, y) for x in a for y in b])
    return found * (1000 if kernel == "gaussian" else 1)


@pytest.mark.parametrize("rows_at_once", [7, 1024])
@pytest.mark.parametrize("is_unbiased", [False, True])
@pytest.mark.parametrize("kernel", ["gaussian", "polynomial"])
def test_agrees_with_the_definition(kernel, is_unbiased, rows_at_once, monkeypatch):
    monkeypatch.setattr(module, "_ROWS", rows_at_once)
    assert mmd(A, B, kernel, is_unbiased) == pytest.approx(by_loops(A, B, kernel, is_unbiased), abs=1e-6)


@pytest.mark.parametrize("kernel", ["gaussian", "polynomial"])
def test_equal_sets_have_none(kernel):
    assert mmd(A, A, kernel) == pytest.approx(0, abs=1e-9)
    assert mmd(A, A.flip(0), kernel) == pytest.approx(0, abs=1e-9)
    assert mmd(A, A, kernel, is_unbiased=True) < 0


@pytest.mark.parametrize("kernel", ["gaussian", "polynomial"])
def test_corruption_makes_it_grow(kernel):
    noise = torch.randn(60, 8, generator=torch.Generator().manual_seed(1))
    distances = [mmd(A + strength * noise, A, kernel) for strength in (0, 0.3, 1, 3)]
    assert distances == sorted(distances)


def test_the_biased_estimate_shrinks_with_samples_and_the_unbiased_one_is_right_in_the_mean():
    rows = torch.randn(4000, 4, generator=torch.Generator().manual_seed(2))
    biased = [mmd(rows[:count], rows[2000 : 2000 + count]) for count in (20, 200, 2000)]
    assert biased == sorted(biased, reverse=True)
    unbiased = [
        mmd(rows[i : i + 50], rows[2000 + i : 2050 + i], is_unbiased=True) for i in range(0, 2000, 50)
    ]
    assert abs(np.mean(unbiased)) < 3 * np.std(unbiased) / np.sqrt(len(unbiased))


@pytest.mark.parametrize(
    ("rows", "kernel", "name", "expected", "received"),
    [
        (A, "cubic", "kernel", "gaussian, polynomial", "'cubic'"),
        (A[:1], "gaussian", "reference", "at least 2 samples", "1"),
        (torch.zeros_like(A), "gaussian", "reference", "zeros", "zeros"),
    ],
)
def test_wrong_sets_are_refused(rows, kernel, name, expected, received, monkeypatch):
    monkeypatch.setattr(config, "jaxtyping_disable", True)
    with refused(name, received, expected=expected):
        mmd(A, rows, kernel)
