"""Add features to a denoiser: `attach(pipe, Control(adapter, condition))` works in any stock pipeline.

There is no denoising loop here. A hook on the denoiser computes each row's features from that row's prompt
embeddings and condition, caches them for the following steps, and adds them to the call.
"""

from nexus_adapters.bases.unet import noise_factors
from nexus_adapters.injection.attach import Attachment, attach, detach
from nexus_adapters.injection.control import Control
from nexus_adapters.injection.features import residuals
from nexus_adapters.injection.scales import balance

__all__ = ["Attachment", "Control", "attach", "balance", "detach", "noise_factors", "residuals"]
