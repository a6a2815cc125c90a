import math

import pytest
import torch
from tests.refusals import refused
from torch import nn

from nexus_adapters.training.config import TrainingOptions
from nexus_adapters.training.optimizer import (
    Muon,
    build_optimizer,
    inner_matrices,
    learning_rate_at,
    orthogonalize,
)


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


def rate(step, **changes):
    given = {"learning_rate": 0.05, "max_train_steps": 110, "warmup_steps": 10}
    return learning_rate_at(TrainingOptions(**given | changes), step)


def test_constant_after_the_warm_up():
    rates = [rate(step, schedule="constant", warmup_steps=3) for step in range(6)]
    assert rates == pytest.approx([0.05 / 4, 0.05 / 2, 0.05 * 3 / 4, 0.05, 0.05, 0.05])


def test_cosine():
    assert [rate(step, schedule="cosine") for step in (0, 4, 10)] == pytest.approx(
        [0.05 / 11, 0.05 * 5 / 11, 0.05]
    )
    assert rate(60, schedule="cosine") == pytest.approx(0.025)
    assert rate(85, schedule="cosine") == pytest.approx(0.025 * (1 - math.sqrt(0.5)))
    assert 0 < rate(109, schedule="cosine") < 0.001 * 0.05
    assert rate(110, schedule="cosine") == rate(500, schedule="cosine") == 0


def test_linear():
    assert [rate(step, schedule="linear") for step in (10, 35, 60, 85, 110, 500)] == pytest.approx(
        [0.05, 0.0375, 0.025, 0.0125, 0, 0]
    )


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_no_warm_up_starts_at_the_peak(schedule):
    assert rate(0, schedule=schedule, warmup_steps=0) == 0.05


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.conv_in = nn.Conv2d(3, 4, 1)
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.conv_out = nn.Conv2d(4, 3, 1)


def names(model, parameters):
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return [known[id(parameter)] for parameter in parameters]


def built(name, model):
    options = TrainingOptions(
        optimizer=name, learning_rate=0.1, betas=(0.8, 0.9), weight_decay=0.3, epsilon=1e-3
    )
    return build_optimizer(options, model)


def settings(group):
    return group["lr"], group["betas"], group["weight_decay"], group["eps"]


def test_muon_takes_the_inner_matrices_and_adamw_the_rest():
    model = Model()
    optimizer = built("muon", model)
    rest, matrices = (names(model, group["params"]) for group in optimizer.param_groups)
    assert matrices == ["inner.0.weight", "inner.2.weight"]
    assert set(rest) == {name for name, p in model.named_parameters() if p.requires_grad} - set(matrices)
    assert isinstance(optimizer, Muon)
    assert [settings(group) for group in optimizer.param_groups] == 2 * [(0.1, (0.8, 0.9), 0.3, 1e-3)]


def test_adamw_takes_all_that_is_trained():
    model = Model()
    optimizer = built("adamw", model)
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.AdamW
    assert names(model, group["params"]) == [n for n, p in model.named_parameters() if p.requires_grad]
    assert settings(group) == (0.1, (0.8, 0.9), 0.3, 1e-3)


def test_the_frozen_matrices_are_known_but_not_trained():
    model = Model()
    assert id(model.frozen.weight) in inner_matrices(model)
    assert "frozen.weight" not in names(model, built("muon", model).param_groups[1]["params"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_eight_bits_need_cuda():
    with refused("training.optimizer", "'adamw8bit' without a CUDA device", expected="adamw or muon"):
        built("adamw8bit", Model())
