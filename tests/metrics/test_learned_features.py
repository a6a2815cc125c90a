import numpy as np
import pytest
import torch
import transformers as t
from jaxtyping import config
from PIL import Image
from tests.conditions.tiny_models import clip
from tests.refusals import refused
from torch.nn import functional as F

from nexus_adapters.metrics.learned_features import TransformersFeatures, clip_scores, load_features

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
    with refused("model", received="dino'", expected="embeds texts"):
        dino.texts(["a"])
