import pytest
import torch
from tests.refusals import refused
from torch import nn

from nexus_adapters.training.config import TrainingOptions
from nexus_adapters.training.muon import Muon
from nexus_adapters.training.optimizer import build_optimizer, inner_matrices


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
