"""What is recorded when, and on a GPU that replaying gives the same."""

import pytest
import torch
from tests import tiny

from nexus_adapters.training.cuda_graphs import GraphedDenoiser


@pytest.fixture
def recorded(monkeypatch):
    """Shapes of the recordings; what is recorded is called as it is."""
    found = []

    def record(call, samples, allow_unused_input):
        assert allow_unused_input
        found.append([tuple(sample.shape) for sample in samples])
        before = [sample.requires_grad for sample in samples]

        def replay(*inputs):
            assert [each.requires_grad for each in inputs] == before
            return call(*inputs)

        return replay

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    return found


def test_it_gives_what_the_unet_gives_and_its_gradients(recorded):
    unet = tiny.sd15().unet.requires_grad_(False).eval()
    graphed = GraphedDenoiser(unet)
    latents, text, times = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 16), torch.tensor([3, 700])
    shapes = [tuple(part.shape) for part in unet(latents, times, text, return_dict=False)]
    assert shapes == [(2, 4, 8, 8)]
    gradients = []
    for called in (unet, graphed, graphed):
        sides = zip(unet.config.block_out_channels, (8, 4, 2, 1), strict=True)
        parts = [torch.full((2, width, side, side), 0.5, requires_grad=True) for width, side in sides]
        predicted = called(
            latents,
            times,
            encoder_hidden_states=text,
            return_dict=False,
            down_intrablock_additional_residuals=list(parts),
        )[0]
        predicted.square().sum().backward()
        gradients.append([predicted, *(part.grad for part in parts)])
    for again in gradients[1:]:
        for found, expected in zip(again, gradients[0], strict=True):
            assert torch.equal(found, expected)
    assert len(recorded) == 1  # once for both calls
    graphed(latents[:1], times[:1], encoder_hidden_states=text[:1], return_dict=False)
    assert len(recorded) == 2  # another shape
    with torch.no_grad():
        graphed(latents, times, encoder_hidden_states=text, return_dict=False)
    assert len(recorded) == 2


def test_which_of_two_arguments_is_left_out_makes_two_recordings(recorded):
    called = []

    class Unet(torch.nn.Module):
        def forward(self, sample, first=None, second=None):
            called.append((first is None, second is None))
            return (sample,)

    graphed, values = GraphedDenoiser(Unet()), torch.ones(2)
    graphed(values, first=values, second=None)
    graphed(values, first=None, second=values)
    assert len(recorded) == 2
    assert called == [(False, True), (True, False)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_replaying_gives_what_calling_gives():
    unet = tiny.sd15().unet.requires_grad_(False).eval().cuda()
    graphed = GraphedDenoiser(unet)
    for seed in range(3):
        torch.manual_seed(seed)
        latents, text = torch.randn(2, 4, 8, 8, device="cuda"), torch.randn(2, 7, 16, device="cuda")
        times = torch.randint(1000, (2,), device="cuda")
        found = []
        for called in (unet, graphed):
            part = torch.ones(2, 8, 8, 8, device="cuda", requires_grad=True)
            residuals = {"down_block_additional_residuals": None, "mid_block_additional_residual": None}
            predicted = called(
                latents * part.mean(), times, encoder_hidden_states=text, return_dict=False, **residuals
            )[0]
            predicted.square().sum().backward()
            found.append((predicted.detach().clone(), part.grad))
        for replayed, expected in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(replayed, expected)
