"""How far two sets of images lie apart in some model's features, by a kernel."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nexus_adapters.errors import InvalidArgument
from nexus_adapters.metrics.feature_sets import check_sets

Kernel = Literal["gaussian", "polynomial"]
KERNELS = ("gaussian", "polynomial")

_BANDWIDTH, _SCALE = 10.0, 1000.0  # CMMD's
_ROWS = 1024  # of the kernel matrix at once


def mmd(
    # `| Tensor`: under pytest, too, misshapen input is to meet the errors below.
    features: Float[Tensor, "n d"] | Tensor,
    reference: Float[Tensor, "m d"] | Tensor,
    kernel: Kernel = "gaussian",
    is_unbiased: bool = False,
) -> float:
    """The squared maximum mean discrepancy of two sets (Gretton et al. 2012), in float64.

    "gaussian" is CMMD (Jayasumana et al. 2024, arXiv 2401.09603): features scaled to length 1, exp(-|x - y|^2
    / (2 * 10^2)), times 1000; its authors use CLIP's. "polynomial" is the kernel of KID (Binkowski et al.
    2018): (x . y / d + 1)^3; its authors use Inception's features and the unbiased estimate.

    No assumption of Gaussians, and far fewer samples needed than for a Fréchet distance. As it stands it is
    biased upwards by about 1/N, and 0 for equal sets; `is_unbiased` leaves out the pairs of an image with
    itself, and may then come out below 0.

    Args:
        features: one row an image, (N, D), finite.
        reference: likewise, (M, D).
        kernel: one of `KERNELS`.
        is_unbiased: which estimate.

    Raises:
        InvalidArgument: for other shapes, fewer than two rows, values that are not finite, another kernel, or
            rows of zeros under "gaussian".
    """
    if kernel not in KERNELS:
        raise InvalidArgument("kernel", f"one of {', '.join(KERNELS)}", repr(kernel))
    a, b = check_sets(features, reference, least=2)
    if kernel == "gaussian":
        a, b = _of_length_1(a, "features"), _of_length_1(b, "reference")
    own = _mean_kernel(a, a, kernel, is_unbiased) + _mean_kernel(b, b, kernel, is_unbiased)
    return float(own - 2 * _mean_kernel(a, b, kernel, False)) * (_SCALE if kernel == "gaussian" else 1.0)


def _of_length_1(rows: Tensor, name: str) -> Tensor:
    lengths = rows.norm(dim=1, keepdim=True)
    if (lengths == 0).any():
        raise InvalidArgument(name, "rows that are not all zeros", "a row of zeros")
    scaled: Tensor = rows / lengths
    return scaled


def _mean_kernel(a: Tensor, b: Tensor, kernel: Kernel, without_diagonal: bool) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for first in range(0, len(a), _ROWS):
        rows = a[first : first + _ROWS]
        values = _kernel(rows, b, kernel)
        total += values.sum()
        if without_diagonal:
            total -= values.diagonal(first).sum()
    return total / (len(a) * (len(b) - without_diagonal))


def _kernel(a: Tensor, b: Tensor, kernel: Kernel) -> Tensor:
    products = a @ b.T
    if kernel == "polynomial":
        values: Tensor = (products / a.shape[1] + 1).pow(3)
        return values
    squared = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)[None] - 2 * products
    return torch.exp(-squared.clamp(min=0) / (2 * _BANDWIDTH**2))
