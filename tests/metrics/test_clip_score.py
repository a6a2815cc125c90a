import pytest
import torch
from jaxtyping import config
from tests.refusals import refused
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
    ("images", "texts", "name", "expected", "received"),
    [
        (A[0], B, "image_embeds", "(N, D)", "torch.float32 (6,)"),
        (A[:0], B[:0], "image_embeds", "(N, D)", "torch.float32 (0, 6)"),
        (A, B[:3], "text_embeds", "(9, 6)", "(3, 6)"),
        (A, 0 * B, "text_embeds", "zeros", "zeros"),
        (A * torch.nan, B, "image_embeds", "finite", "nan"),
    ],
)
def test_wrong_rows_are_refused(images, texts, name, expected, received, monkeypatch):
    monkeypatch.setattr(config, "jaxtyping_disable", True)
    with refused(name, received, expected=expected):
        clip_scores(images, texts)
