import pytest
import torch
from jaxtyping import config
from torch.nn import functional as F

from nexus_adapters.metrics.clip_score import clip_scores

A, B = torch.randn((2, 9, 6), generator=torch.Generator().manual_seed(0))


def test_is_the_cosine():
    found = clip_scores(A, B)
    assert found.dtype == torch.float64
    assert torch.allclose(found, F.cosine_similarity(A.double(), B.double()), atol=1e-9)
    assert torch.allclose(clip_scores(A, 3 * A), torch.ones(9, dtype=torch.float64))
    assert torch.allclose(clip_scores(A, -A), -torch.ones(9, dtype=torch.float64))


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        (A[0], B, r"image_embeds: expected floats of shape \(N, D\); received torch.float32 \(6,\)"),
        (A[:0], B[:0], r"image_embeds: expected floats of shape \(N, D\); received torch.float32 \(0, 6\)"),
        (A, B[:3], r"text_embeds: expected shape \(9, 6\), as image_embeds; received \(3, 6\)"),
        (A, 0 * B, "text_embeds: expected finite rows that have a direction; received others"),
    ],
)
def test_wrong_rows_are_refused(images, texts, message, monkeypatch):
    monkeypatch.setattr(config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        clip_scores(images, texts)
