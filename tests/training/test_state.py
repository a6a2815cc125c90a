import torch
from torch import nn

from nexus_adapters.training.checkpoint import latest_checkpoint, save_checkpoint
from nexus_adapters.training.state import TrainState


class Wrapping(torch.optim.SGD):
    """Keeps tensors and numbers, a part of them in a mapping of their own, as bitsandbytes does."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                state["mean"] = state.get("mean", torch.zeros(2)) + 1
                state["codes"] = torch.full((3,), state["step"], dtype=torch.uint8)

    def state_dict(self):
        whole = super().state_dict()
        wrapped = {
            index: {"step": state["step"], "__quantized__": {"codes": state["codes"], "mean": state["mean"]}}
            for index, state in whole["state"].items()
        }
        return whole | {"state": wrapped}


def test_an_optimizers_state_comes_back_whatever_it_holds(tmp_path):
    module = nn.Linear(2, 2)
    optimizer = Wrapping(module.parameters(), lr=0.1)
    state = TrainState.of(module, optimizer, ema_decay=0.5)
    for _ in range(3):
        optimizer.step()
    save_checkpoint(tmp_path, 3, state.tensors(), {"train": state.scalars()}, keep=1)
    fresh = Wrapping(nn.Linear(2, 2).parameters(), lr=0.1)
    other = TrainState.of(nn.Linear(2, 2), fresh, ema_decay=0.5)
    checkpoint = latest_checkpoint(tmp_path)
    other.restore(checkpoint, checkpoint.state["train"])
    for ours, theirs in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        assert ours.keys() == theirs.keys()
        assert theirs["step"] == 3
        assert torch.equal(ours["mean"], theirs["mean"])
        assert torch.equal(ours["codes"], theirs["codes"])
