"""How well images and texts agree in a model that embeds both."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from nexus_adapters.errors import InvalidArgument


def clip_scores(
    # `| Tensor`: under pytest, too, misshapen input is to meet the errors below.
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
        InvalidArgument: for other shapes, no rows, rows of zeros, or values that are not finite.
    """
    for name, rows in (("image_embeds", image_embeds), ("text_embeds", text_embeds)):
        if rows.ndim != 2 or 0 in rows.shape or not rows.is_floating_point():
            raise InvalidArgument(name, "floats of shape (N, D)", f"{rows.dtype} {tuple(rows.shape)}")
        if not rows.isfinite().all():
            raise InvalidArgument(name, "finite rows", rows[~rows.isfinite()][0].item())
        if (rows.norm(dim=1) == 0).any():
            raise InvalidArgument(name, "rows that are not all zeros", "a row of zeros")
    if image_embeds.shape != text_embeds.shape:
        expected = f"shape {tuple(image_embeds.shape)}, as image_embeds"
        raise InvalidArgument("text_embeds", expected, tuple(text_embeds.shape))
    images, texts = image_embeds.double(), text_embeds.double()
    cosines: Tensor = (images * texts).sum(dim=1) / (images.norm(dim=1) * texts.norm(dim=1))
    return cosines
