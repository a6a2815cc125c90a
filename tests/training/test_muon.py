import pytest
import torch
from torch import nn

from nexus_adapters.training.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 6, 20), (2, 20, 6)])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    generator = torch.Generator().manual_seed(0)
    u, s, vh = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    found = orthogonalize(u @ torch.diag_embed(s) @ vh)
    values = u.mT @ found @ vh.mT
    diagonal = values.diagonal(dim1=-2, dim2=-1)
    assert diagonal.min() > 0.6
    assert diagonal.max() < 1.3
    torch.testing.assert_close(values, torch.diag_embed(diagonal), rtol=0, atol=1e-4)


def test_a_zero_gradient_moves_nothing():
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4))


def one_step(weight, gradient, **options):
    parameter = nn.Parameter(weight.clone())
    parameter.grad = gradient.clone()
    Muon([parameter], [], lr=0.1, **options).step()
    return parameter.detach()


def test_a_step_is_as_large_as_adamws():
    """Whatever the size of the gradient: 0.2 learning rates on the mean."""
    generator = torch.Generator().manual_seed(1)
    weight, gradient = torch.randn(2, 48, 96, generator=generator)
    for scale in (1e-4, 1.0, 1e4):
        moved = one_step(weight, scale * gradient, weight_decay=0.0) - weight
        assert moved.square().mean().sqrt().item() == pytest.approx(0.1 * 0.2, rel=0.25)


def test_a_convolution_moves_as_its_matrix_does():
    generator = torch.Generator().manual_seed(2)
    weight, gradient = torch.randn(2, 8, 4, 3, 3, generator=generator)
    flat = one_step(weight.flatten(1), gradient.flatten(1))
    torch.testing.assert_close(one_step(weight, gradient), flat.view_as(weight))
    last = torch.channels_last
    torch.testing.assert_close(
        one_step(weight.to(memory_format=last), gradient.to(memory_format=last)), flat.view_as(weight)
    )


def test_weight_decay_shrinks():
    weight = torch.ones(4, 4)
    decayed = one_step(weight, torch.zeros(4, 4), weight_decay=0.5)
    torch.testing.assert_close(decayed, 0.95 * weight)


def test_all_else_takes_adamws_steps():
    generator = torch.Generator().manual_seed(3)
    ours, theirs = (nn.Parameter(torch.ones(5)) for _ in range(2))
    muon = Muon([], [ours], lr=0.1, betas=(0.8, 0.9), weight_decay=0.3)
    adamw = torch.optim.AdamW([theirs], lr=0.1, betas=(0.8, 0.9), weight_decay=0.3)
    for _ in range(3):
        ours.grad = torch.randn(5, generator=generator)
        theirs.grad = ours.grad.clone()
        muon.step()
        adamw.step()
    assert torch.equal(ours, theirs)


def test_it_learns_where_directions_differ_much_in_size():
    """A quadratic whose curvatures differ ten-thousandfold: gradients say little of the flat directions."""
    torch.manual_seed(0)
    curvature = torch.logspace(0, -4, 16)
    parameter = nn.Parameter(torch.zeros(16, 16))
    target = torch.linalg.qr(torch.randn(16, 16))[0]
    optimizer = Muon([parameter], [], lr=0.1, weight_decay=0.0)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.1 * (1 - step / 200)
        loss = (curvature[:, None] * (parameter - target).square()).sum()
        loss.backward()
        optimizer.step()
    assert (parameter - target).square().mean() < 0.01 * target.square().mean()
