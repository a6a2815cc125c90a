"""How far two sets of images lie apart in some model's features, as Gaussians."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from nexus_adapters.metrics.feature_sets import check_sets


def frechet_distance(
    # `| Tensor`: under pytest, too, misshapen input is to meet the errors below.
    features: Float[Tensor, "n d"] | Tensor,
    reference: Float[Tensor, "m d"] | Tensor,
) -> float:
    """The squared Fréchet distance of the Gaussians that fit the two sets (Dowson and Landau 1982).

    |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), with unbiased covariances, in float64. On the pool features
    of Inception this is FID (Heusel et al. 2017), on those of CLIP or DINOv2 its modern kin.

    It is biased: with fewer samples it comes out larger, the more so the more features there are and at equal
    quality (Chong and Forsyth 2020), so only distances of as many samples against the same reference compare.
    Below d + 1 samples the covariance is not of full rank; the distance is still defined.

    Args:
        features: one row an image, (N, D), finite.
        reference: likewise, (M, D).

    Returns:
        At least 0; 0 for equal sets.

    Raises:
        InvalidArgument: for other shapes, fewer than two rows, or values that are not finite.
    """
    a, b = check_sets(features, reference, least=2)
    apart = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    first, second = a.T.cov(), b.T.cov()
    # tr (S1 S2)^(1/2) by the symmetric S1^(1/2) S2 S1^(1/2), which has the same eigenvalues.
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float(apart + first.trace() + second.trace() - 2 * mixed))
