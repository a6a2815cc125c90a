import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_adapters.adapter.stage import HeterogeneousConv, ResidualUnit, Stage, TextCrossAttention

STAGE = {
    "pools": 1,
    "groups": 1,
    "text_width": 6,
    "heads": 2,
    "head_width": 4,
    "residual": False,
    "zero_init": False,
}


def stage(**changes: object) -> Stage:
    torch.manual_seed(0)
    made = Stage(8, 12, **{**STAGE, **changes})
    nn.init.normal_(made.norm1.weight)
    nn.init.normal_(made.norm1.bias)
    return made.eval()


def pooled(x: Tensor) -> Tensor:
    """2x2 mean with stride 2; a window that hangs over the edge averages what it covers."""
    rows = range(0, x.shape[2], 2)
    columns = range(0, x.shape[3], 2)
    return torch.stack(
        [torch.stack([x[:, :, r : r + 2, c : c + 2].mean((2, 3)) for c in columns], -1) for r in rows], -2
    )


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
    """Zero-padded, same-size convolution, written out as a sum over offsets."""
    size = weight.shape[-1]
    padded = F.pad(x, [size // 2] * 4)
    height, width = x.shape[2:]
    outputs = []
    for group, part in enumerate(weight.chunk(groups)):
        inputs = padded.chunk(groups, 1)[group]
        total = torch.zeros(())
        for r in range(size):
            for c in range(size):
                window = inputs[:, :, r : r + height, c : c + width]
                total = total + torch.einsum("oi,bihw->bohw", part[:, :, r, c], window)
        outputs.append(total)
    out = torch.cat(outputs, 1)
    return out if bias is None else out + bias[None, :, None, None]


def reference(weights: dict[str, Tensor], x: Tensor, text: Tensor, groups: int, residual: bool) -> Tensor:
    x = conv(pooled(x), weights["in_conv.weight"], weights["in_conv.bias"])
    for unit in ("resnets.0", "resnets.1"):
        if groups == 1:
            h = conv(x, weights[f"{unit}.block1.weight"], weights[f"{unit}.block1.bias"])
        else:
            h = conv(x, weights[f"{unit}.block1.gwc.weight"], None, groups)
            h = h + conv(x, weights[f"{unit}.block1.pwc.weight"], None)
        x = x + conv(h.clamp(min=0), weights[f"{unit}.block2.weight"], weights[f"{unit}.block2.bias"])
    out = torch.empty_like(x)
    for b in range(x.shape[0]):
        keys = torch.einsum("ed,nd->ne", weights["cross_attention.to_k.weight"], text[b])
        values = torch.einsum("ed,nd->ne", weights["cross_attention.to_v.weight"], text[b])
        for r in range(x.shape[2]):
            for c in range(x.shape[3]):
                pixel = x[b, :, r, c]
                normed = (pixel - pixel.mean()) / (pixel.var(correction=0) + 1e-5).sqrt()
                normed = normed * weights["norm1.weight"] + weights["norm1.bias"]
                query = weights["cross_attention.to_q.weight"] @ normed
                heads = []
                for head in (slice(0, 4), slice(4, 8)):
                    scores = torch.stack([query[head] @ key[head] for key in keys]) / math.sqrt(4)
                    shares = scores.exp() / scores.exp().sum()
                    heads.append(
                        sum(share * value[head] for share, value in zip(shares, values, strict=True))
                    )
                attended = weights["cross_attention.to_out.0.weight"] @ torch.cat(heads)
                attended = attended + weights["cross_attention.to_out.0.bias"]
                out[b, :, r, c] = pixel + attended if residual else attended
    return out


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("residual", [False, True])
def test_stage_is_the_formula_written_out(groups: int, residual: bool) -> None:
    block = stage(groups=groups, residual=residual)
    x, text = torch.randn(2, 8, 5, 6), torch.randn(2, 3, 6)
    with torch.no_grad():
        expected = reference(dict(block.state_dict()), x, text, groups, residual)
        assert expected.shape == (2, 12, 3, 3)
        torch.testing.assert_close(block(x, text), expected, rtol=1e-4, atol=1e-5)


def test_heterogeneous_conv_sums_its_two_halves() -> None:
    layer = HeterogeneousConv(8, groups=2)
    x = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(layer(x), layer.gwc(x) + layer.pwc(x))
    assert [(name, tuple(p.shape)) for name, p in layer.named_parameters()] == [
        ("gwc.weight", (8, 4, 3, 3)),
        ("pwc.weight", (8, 8, 1, 1)),
    ]


def test_residual_unit_chooses_its_convolution_by_groups() -> None:
    assert isinstance(ResidualUnit(8, groups=1).block1, nn.Conv2d)
    assert isinstance(ResidualUnit(8, groups=2).block1, HeterogeneousConv)


def test_stage_without_change_of_width_has_no_in_conv() -> None:
    assert Stage(8, 8, **STAGE).in_conv is None
    assert Stage(8, 12, **STAGE).in_conv is not None


@pytest.mark.parametrize(("pools", "expected"), [(0, (7, 5)), (1, (4, 3)), (2, (2, 2))])
def test_pooling_rounds_up(pools: int, expected: tuple[int, int]) -> None:
    assert stage(pools=pools)(torch.randn(1, 8, 7, 5), torch.randn(1, 3, 6)).shape[2:] == expected


def test_features_are_contiguous() -> None:
    assert stage()(torch.randn(2, 8, 6, 6), torch.randn(2, 3, 6)).is_contiguous()


def test_attention_reads_the_text() -> None:
    attention = TextCrossAttention(8, text_width=6, heads=2, head_width=4)
    pixels, text = torch.randn(1, 9, 8), torch.randn(1, 3, 6)
    assert attention(pixels, text).shape == (1, 9, 8)
    assert not torch.allclose(attention(pixels, text), attention(pixels, -text))
    # A set of tokens, not a sequence: the text encoder has put the order into them.
    torch.testing.assert_close(attention(pixels, text), attention(pixels, text.flip(1)))


def test_residual_adds_what_went_into_the_norm() -> None:
    x, text = torch.randn(1, 8, 4, 4), torch.randn(1, 3, 6)
    plain, skipped = stage(residual=False), stage(residual=True)
    skipped.load_state_dict(plain.state_dict())
    before_norm = plain.resnets(plain.in_conv(F.avg_pool2d(x, 2)))
    torch.testing.assert_close(skipped(x, text), plain(x, text) + before_norm)


def test_zero_init_starts_without_the_text() -> None:
    block = stage(residual=True, zero_init=True)
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(block(x, torch.randn(1, 3, 6)), block(x, torch.randn(1, 3, 6)))
    assert torch.equal(block(x, torch.randn(1, 3, 6)), block.resnets(block.in_conv(F.avg_pool2d(x, 2))))
    block(x, torch.randn(1, 3, 6)).sum().backward()
    assert block.cross_attention.to_out[0].weight.grad.abs().sum() > 0
