"""The frozen Stable Diffusion of a recipe: where it lies, its UNet, and its schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import nn

from nexus_adapters import embedded
from nexus_adapters.adapter.file_names import variant_in_name
from nexus_adapters.training.config import BaseOptions

EMBEDDED = "embedded"


def base_folder(options: BaseOptions) -> str:
    """What `from_pretrained` is given."""
    return str(embedded.WEIGHTS / "base") if options.path == EMBEDDED else options.path


def check_weights(options: BaseOptions) -> None:
    """ValueError where a base's folder has no weights of its UNet; what is on the Hub is not looked at."""
    folder = Path(base_folder(options))
    if not folder.is_dir():
        return
    files = [*(folder / "unet").glob("*.safetensors"), *(folder / "unet").glob("*.bin")]
    found = [file for file in files if variant_in_name(file) == (options.variant or None)]
    if not found:
        what = f"weights of variant {options.variant!r}" if options.variant else "weights"
        raise ValueError(f"base.path: expected {what} of a UNet in '{folder / 'unet'}'; received none")


def load_unet(options: BaseOptions, device: torch.device, dtype: torch.dtype) -> Any:
    """The base's UNet, frozen."""
    kind: Any = UNet2DConditionModel
    unet = kind.from_pretrained(base_folder(options), subfolder="unet", torch_dtype=dtype, **source(options))
    return nn.Module.to(unet, device, dtype).requires_grad_(False).eval()


def noise_schedule(scheduler: Any) -> Any:
    """The schedule that a pipeline's sampler follows, as training needs it."""
    kind: Any = DDPMScheduler
    return kind.from_config(scheduler.config)


@dataclass(frozen=True)
class BaseShape:
    """What the configs alone say.

    Attributes:
        unet: its config.
        vae_scale_factor: image pixels per latent pixel, a side.
        latent_channels: of the VAE.
    """

    unet: Mapping[str, Any]
    vae_scale_factor: int
    latent_channels: int

    @property
    def multiple(self) -> int:
        """What images' sides must be multiples of, so that no level of the UNet rounds."""
        return int(self.vae_scale_factor * 2 ** (len(self.unet["down_block_types"]) - 1))

    def empty_unet(self) -> Any:
        """The UNet without memory for its weights, to ask for shapes."""
        with torch.device("meta"):
            kind: Any = UNet2DConditionModel
            return kind.from_config(dict(self.unet))


def base_shape(options: BaseOptions) -> BaseShape:
    """Read the base's configs; no weights are.

    Raises ValueError where there is no such base, and where its UNet reads more than the latents.
    """
    folder = base_folder(options)
    where = {key: value for key, value in source(options).items() if key != "variant"}
    try:
        unet: Mapping[str, Any] = UNet2DConditionModel.load_config(folder, subfolder="unet", **where)
        vae: Mapping[str, Any] = AutoencoderKL.load_config(folder, subfolder="vae", **where)
    except (OSError, ValueError) as error:  # each with a page of hints
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            "base.path: expected a Stable Diffusion pipeline, a folder or a Hub id; received "
            f"'{options.path}' ({reason})"
        ) from error
    if unet.get("in_channels", 4) != vae.get("latent_channels", 4):
        raise ValueError(
            f"base.path: expected a UNet that reads {vae.get('latent_channels', 4)} channels, as its VAE; "
            f"received '{options.path}', whose UNet reads {unet.get('in_channels', 4)}"
        )
    for key in ("latents_mean", "latents_std"):
        if vae.get(key) is not None:
            raise ValueError(
                f"base.path: expected a VAE without {key}; received '{options.path}', which has one"
            )
    _check_schedule(options, where)
    return BaseShape(unet, 2 ** (len(vae["block_out_channels"]) - 1), int(vae.get("latent_channels", 4)))


def _check_schedule(options: BaseOptions, where: Mapping[str, Any]) -> None:
    """ValueError for a sampler whose schedule or parametrisation is not trained here; none at all passes."""
    try:
        config = DDPMScheduler.load_config(base_folder(options), subfolder="scheduler", **where)
    except (OSError, ValueError):
        return
    if config.get("beta_schedule") is None:
        raise ValueError(
            f"base.path: expected a scheduler with betas; received a {config.get('_class_name')} in "
            f"'{options.path}'"
        )
    kind = config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(
            "base.path: expected a scheduler of prediction_type epsilon or v_prediction; "
            f"received {kind!r} in '{options.path}'"
        )


def source(options: BaseOptions) -> dict[str, Any]:
    """Further arguments of `from_pretrained`. A folder is never looked for on the Hub."""
    given = {"revision": options.revision, "variant": options.variant}
    local = {"local_files_only": True} if Path(base_folder(options)).is_dir() else {}
    return {name: value for name, value in given.items() if value} | local
