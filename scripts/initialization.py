"""An initialization with which small convolutional models learn immediately.

PyTorch's default shrinks a signal by 1/sqrt(3) at every convolution. After the dozen convolutions of an
autoencoder's skip path, nothing of the image is left, and training must first recover it. Here the skip path
preserves the signal's magnitude, and the residual branches start small. benchmarks/embedded_training.py
compares the two.
"""

from __future__ import annotations

from torch import nn

_BRANCH_ENDS = ("conv2", "proj_out")  # the last convolutions of ResnetBlock2D and Transformer2DModel
_BRANCH_GAIN = 0.1


def preserve_signal(model: nn.Module) -> None:
    """Make every convolution of a diffusers model orthogonal, and the last of each residual branch small."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            branch_end = name.rpartition(".")[2] in _BRANCH_ENDS
            nn.init.orthogonal_(module.weight, gain=_BRANCH_GAIN if branch_end else 1.0)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
