import numpy as np
import pytest
import torch
import transformers as t
from jaxtyping import config
from PIL import Image
from scipy import linalg
from tests.conditions.tiny_models import clip
from tests.refusals import refused
from torch.nn import functional as F

from nexus_adapters.metrics.learned_features import (
    TransformersFeatures,
    clip_scores,
    frechet_distance,
    load_features,
    mmd,
)

# Distances between sets


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
def test_frechet_agrees_with_an_independent_calculation(dtype):
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(400, 16, generator=draw, dtype=dtype) @ torch.randn(16, 16, generator=draw, dtype=dtype)
    b = torch.randn(300, 16, generator=draw, dtype=dtype) + 0.3
    assert frechet_distance(a, b) == pytest.approx(by_scipy(a, b), abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), abs=1e-6)


def test_frechet_of_known_gaussians_give_the_closed_form():
    """Of commuting covariances it is |mu1 - mu2|^2 + sum (s1 - s2)^2."""
    a = gaussian(20_000, [0, 0, 0], np.diag([1, 4, 9]), 0)
    b = gaussian(20_000, [1, 0, -2], np.diag([4, 4, 1]), 1)
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2, rel=0.03)


def test_equal_sets_have_no_frechet_distance_also_with_few_samples():
    for count in (2, 10, 100):
        rows = torch.randn(count, 32, generator=torch.Generator().manual_seed(count))
        assert frechet_distance(rows, rows) == pytest.approx(0, abs=1e-6)
        assert frechet_distance(rows, rows.flip(0)) == pytest.approx(0, abs=1e-6)


def test_corruption_makes_frechet_grow():
    draw = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(500, 8, generator=draw), torch.randn(500, 8, generator=draw)
    distances = [frechet_distance(clean + strength * noise, clean) for strength in (0, 0.1, 0.3, 1, 3)]
    assert distances == sorted(distances)
    assert distances[0] < 1e-6 < distances[1]


def test_frechet_is_larger_with_fewer_samples():
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
def test_sets_without_a_distance_are_refused(features, reference, name, expected, received, monkeypatch):
    monkeypatch.setattr(config, "jaxtyping_disable", True)
    with refused(name, received, expected=expected):
        frechet_distance(features, reference)


SET_A = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
SET_B = torch.randn(50, 8, generator=torch.Generator().manual_seed(1)) + 0.5


def by_loops(a, b):
    a, b = (
        rows / np.linalg.norm(rows, axis=1, keepdims=True)
        for rows in (a.double().numpy(), b.double().numpy())
    )

    def mean(first, second):
        return np.mean([np.exp(-np.square(x - y).sum() / (2 * 10**2)) for x in first for y in second])

    return 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))


@pytest.mark.parametrize("rows_at_once", [7, 1024])
def test_mmd_agrees_with_the_definition(rows_at_once):
    assert mmd(SET_A, SET_B, rows_at_once) == pytest.approx(by_loops(SET_A, SET_B), abs=1e-6)


def test_equal_sets_have_no_mmd():
    assert mmd(SET_A, SET_A) == pytest.approx(0, abs=1e-9)
    assert mmd(SET_A, SET_A.flip(0)) == pytest.approx(0, abs=1e-9)


def test_corruption_makes_mmd_grow():
    noise = torch.randn(60, 8, generator=torch.Generator().manual_seed(1))
    distances = [mmd(SET_A + strength * noise, SET_A) for strength in (0, 0.3, 1, 3)]
    assert distances == sorted(distances)


def test_mmd_shrinks_with_samples():
    """Of one and the same distribution: what the docstring warns of."""
    rows = torch.randn(4000, 4, generator=torch.Generator().manual_seed(2))
    distances = [mmd(rows[:count], rows[2000 : 2000 + count]) for count in (20, 200, 2000)]
    assert distances == sorted(distances, reverse=True)


@pytest.mark.parametrize(
    ("rows", "expected", "received"),
    [(SET_A[:1], "at least 2 samples", "1"), (torch.zeros_like(SET_A), "zeros", "zeros")],
)
def test_sets_without_an_mmd_are_refused(rows, expected, received, monkeypatch):
    monkeypatch.setattr(config, "jaxtyping_disable", True)
    with refused("reference", received, expected=expected):
        mmd(SET_A, rows)


# CLIP scores

A, B = torch.randn((2, 9, 6), generator=torch.Generator().manual_seed(0))


def test_clip_scores_are_the_cosine():
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
def test_rows_without_a_clip_score_are_refused(images, texts, name, expected, received, monkeypatch):
    monkeypatch.setattr(config, "jaxtyping_disable", True)
    with refused(name, received, expected=expected):
        clip_scores(images, texts)


NOISE = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    for seed in (0, 1, 2)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    clip(root / "clip")
    dino = t.Dinov2Model(
        t.Dinov2Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
        )
    )
    dino.save_pretrained(root / "dino")
    t.BitImageProcessor(
        size={"height": 28, "width": 28}, crop_size={"height": 28, "width": 28}
    ).save_pretrained(root / "dino")
    torch.jit.script(Pool()).save(str(root / "pool.pt"))
    return root


class Pool(torch.nn.Module):
    """As NVIDIA's Inception file is called: bytes in, features by a flag."""

    def forward(self, image: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        rows = image.float().mean(dim=(2, 3))
        return rows if return_features else rows.sum(dim=1, keepdim=True)


@pytest.mark.parametrize(("name", "width"), [("clip", 12), ("dino", 16), ("pool.pt", 3)])
def test_one_row_an_image(folders, name, width):
    model = load_features(str(folders / name))
    rows = model.images(NOISE)
    assert (rows.shape, rows.dtype) == ((3, width), torch.float32)
    single = torch.cat([model.images([image]) for image in NOISE])
    assert torch.allclose(rows, single, atol=1e-5)
    assert not torch.allclose(rows[0], rows[1])


def test_clips_rows_are_its_projected_embeddings(folders):
    model = load_features(str(folders / "clip"))
    network = t.CLIPModel.from_pretrained(folders / "clip").eval()
    processor = t.CLIPImageProcessor.from_pretrained(folders / "clip")
    with torch.no_grad():
        pooled = network.vision_model(**processor(images=NOISE, return_tensors="pt")).pooler_output
        assert torch.allclose(model.images(NOISE), network.visual_projection(pooled), atol=1e-5)
    texts = model.texts(["a red star", "a blue ring " * 100])
    assert texts.shape == (2, 12)
    assert torch.allclose(model.texts(["a red star"])[0], texts[0], atol=1e-5)


def test_files_are_called_for_their_features(folders):
    rows = load_features(str(folders / "pool.pt")).images(NOISE)
    assert torch.allclose(
        rows[0], torch.tensor(np.asarray(NOISE[0]).mean((0, 1)), dtype=torch.float32), atol=1e-3
    )


def test_what_cannot_be_loaded_is_one_clear_error(folders, tmp_path):
    with refused("model", received="'no/such'", expected="vision model"):
        load_features("no/such")
    with refused("model", received="'no.pt', which does not exist", expected="a TorchScript file"):
        load_features("no.pt")
    (tmp_path / "bad.pt").write_bytes(b"none")
    with refused("model", received="bad.pt' (", expected="a TorchScript file"):
        load_features(str(tmp_path / "bad.pt"))
    dino = load_features(str(folders / "dino"))
    assert isinstance(dino, TransformersFeatures)
    with refused("model", received="dino'", expected="embeds text"):
        dino.texts(["a"])
