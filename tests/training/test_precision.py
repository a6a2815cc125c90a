import pytest
import torch

from nexus_adapters.training.precision import autocast, multiplies_bf16


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"amx_bf16": True}, True), ({"avx512_bf16": True}, True), ({"avx512_f": True}, False), ({}, False)],
)
def test_a_cpu_computes_in_bf16_only_with_units_for_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert multiplies_bf16("cpu") is expected
    with autocast("cpu"):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if expected else torch.float32)


@pytest.mark.parametrize("supported", [True, False])
def test_cuda_computes_in_bf16_where_it_does_not_emulate_it(monkeypatch, supported):
    asked = []

    def is_supported(including_emulation):
        asked.append(including_emulation)
        return supported

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert multiplies_bf16("cuda:0") is supported
    assert asked == [False]
