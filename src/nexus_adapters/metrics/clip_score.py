"""How well images and texts agree in a model that embeds both."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def clip_scores(
    # `| Tensor`: under pytest, too, misshapen input is to meet the ValueErrors below.
    image_embeds: Float[Tensor, "n d"] | Tensor,
    text_embeds: Float[Tensor, "n d"] | Tensor,
) -> Float[Tensor, " n"]:
    """The cosine of each image's embedding with that of its text, in float64, -1 to 1.

    The mean over a test set is the CLIP score as T2I-Adapter reports it (arXiv 2302.08453, table 1), where
    both embeddings are scaled to length 1 and nothing is clipped or multiplied.

    Args:
        image_embeds: (N, D), finite, no row of zeros.
        text_embeds: of the texts, in the same order.

    Raises:
        ValueError: for other shapes, no rows, rows of zeros, or values that are not finite.
    """
    for name, rows in (("image_embeds", image_embeds), ("text_embeds", text_embeds)):
        if rows.ndim != 2 or 0 in rows.shape or not rows.is_floating_point():
            raise ValueError(
                f"{name}: expected floats of shape (N, D); received {rows.dtype} {tuple(rows.shape)}"
            )
        if not rows.isfinite().all() or (rows.norm(dim=1) == 0).any():
            raise ValueError(f"{name}: expected finite rows that have a direction; received others")
    if image_embeds.shape != text_embeds.shape:
        expected = f"shape {tuple(image_embeds.shape)}, as image_embeds"
        raise ValueError(f"text_embeds: expected {expected}; received {tuple(text_embeds.shape)}")
    images, texts = image_embeds.double(), text_embeds.double()
    cosines: Tensor = (images * texts).sum(dim=1) / (images.norm(dim=1) * texts.norm(dim=1))
    return cosines
