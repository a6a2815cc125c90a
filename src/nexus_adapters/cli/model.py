"""From `--base` and `--adapter` to a pipeline and adapters: embedded ones, folders, files, or the Hub's."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_adapters.cli.adapters import EMBEDDED, LoadedAdapter, check_adapter, load_adapter
from nexus_adapters.cli.checks import expect, expect_source
from nexus_adapters.cli.sources import fetch, file_variant, files_sha256, refused, weight_files

if TYPE_CHECKING:
    import torch

SINGLE_FILE = ".safetensors"
_BASE = "a Stable Diffusion pipeline"
_CONFIGS = ["model_index.json", "unet/config.json", "vae/config.json"]
_PARTS = {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}


@dataclass(frozen=True)
class Model:
    """A stock pipeline, an adapter for each control, and what they were made of, as settings tell it."""

    pipe: Any
    base: str
    base_unet_sha256: str
    adapters: Sequence[LoadedAdapter]


def check_model(base: str | None, base_config: str | None, adapters: Sequence[str | None]) -> None:
    """What can be said of the arguments before anything is imported or fetched."""
    is_file = base is not None and base.endswith(SINGLE_FILE)
    if base is not None:
        for adapter in adapters:
            expect(adapter is not None, "--adapter", "a folder or Hub id beside --base", "none")
        if is_file:
            expect(Path(base).is_file(), "--base", "an existing file", f"'{base}'")
            expect(base_config is not None, "--base-config", "a folder beside a --base in one file", "none")
        else:
            expect_source("--base", base, "model_index.json", _BASE)
    expect(
        base_config is None or is_file, "--base-config", "--base FILE.safetensors beside it", "another base"
    )
    if base_config is not None:
        expect_source("--base-config", base_config, "model_index.json", _BASE)
    for adapter in adapters:
        check_adapter(base, adapter)


def load_model(
    base: str | None,
    base_config: str | None,
    adapters: Sequence[str | None],
    condition: str,
    torch_dtype: "torch.dtype",
) -> Model:
    """The pipeline and the adapters on the CPU. ValueError names the argument that is wrong, in one line.

    Args:
        base: a folder, Hub id or .safetensors file; None for the embedded one.
        base_config: of a file: a folder or Hub id in diffusers' layout, of which only the configs are read.
        adapters: of each control a folder or Hub id; without a base also "prime" or "slim", the embedded
            ones, and None is "prime". The same one is loaded once.
        condition: what the embedded adapter was trained on.
        torch_dtype: of all parts.
    """
    from nexus_adapters import embedded

    configs = embedded.WEIGHTS / "base"
    if base is not None:
        configs = fetch(
            "--base" if base_config is None else "--base-config", base_config or base, _BASE, _CONFIGS
        )
        check_kind(configs, base_config or base)
    with embedded.no_loading_bars():
        loaded = {name: load_adapter(name, condition) for name in dict.fromkeys(adapters)}
        for each in loaded.values():
            check_fits(each.adapter, configs)
        pipe, files = _load_pipe(base, base_config, configs)
    embedded.convert(pipe, torch_dtype)
    for each in loaded.values():
        _torch_to(each.adapter, torch_dtype)
    return Model(pipe, base or EMBEDDED, files_sha256(files), [loaded[name] for name in adapters])


def _torch_to(adapter: Any, torch_dtype: "torch.dtype") -> None:
    """Of all parts; diffusers' own `to` warns of those to keep in float32: here none."""
    from torch import nn

    nn.Module.to(adapter, torch_dtype)


def _load_pipe(base: str | None, base_config: str | None, configs: Path) -> tuple[Any, list[Path]]:
    """The stock pipeline, and the files of its UNet. Only here what may be gigabytes is fetched."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    from nexus_adapters import embedded

    if base is None:
        return embedded.load_embedded_base(), weight_files(embedded.WEIGHTS / "base" / "unet")
    kind: Any = StableDiffusionXLPipeline if is_xl(configs) else StableDiffusionPipeline
    with refused("--base", base, _BASE):
        if base_config is not None:
            pipe = kind.from_single_file(base, config=str(configs), local_files_only=True)
            return pipe, [Path(base)]
        folder = fetch_pipeline(base)
        variant = file_variant(folder / "unet")
        pipe = kind.from_pretrained(folder, local_files_only=True, variant=variant)
    return pipe, weight_files(folder / "unet", variant)


def is_xl(folder: Path) -> bool:
    """Whether a pipeline's index names a second text encoder."""
    return "text_encoder_2" in json.loads((folder / "model_index.json").read_bytes())


def fetch_pipeline(base: str) -> Path:
    """The folder `base`, or the one into which all was put that the Hub's pipeline needs."""
    if Path(base).is_dir():
        return Path(base)
    with refused("--base", base, _BASE):
        from diffusers import DiffusionPipeline

        kind: Any = DiffusionPipeline
        return Path(kind.download(base))


def check_kind(folder: Path, base: str) -> None:
    """ValueError unless the folder's index is that of a pipeline that an adapter for it can be run in."""
    with refused("--base", base, _BASE):
        index: dict[str, Any] = json.loads((folder / "model_index.json").read_bytes())
        kind = index.get("_class_name")
    expect(
        set(index) >= _PARTS, "--base", "a Stable Diffusion 1.x, 2.x or XL pipeline", f"'{base}', a {kind}"
    )


def check_fits(adapter: Any, base: Path) -> None:
    """ValueError, with both numbers, unless the base draws from noise and the adapter fits it.

    From the configs of its UNet and VAE alone. Inpainting and the like have UNets that read more than the
    latents.
    """
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from nexus_adapters.injection.fit import check_fit, check_pixels

    with refused("--base", str(base), _BASE), torch.device("meta"):
        config = UNet2DConditionModel.load_config(base, subfolder="unet")
        unet = UNet2DConditionModel.from_config(config)  # type: ignore[no-untyped-call]  # diffusers' own
        vae = AutoencoderKL.load_config(base, subfolder="vae")
        latent_channels = vae["latent_channels"]
        pixels = 2 ** (len(vae["block_out_channels"]) - 1)
    fits = unet.config.in_channels == unet.config.out_channels == latent_channels
    received = f"{unet.config.in_channels} and {unet.config.out_channels}"
    expect(fits, "--base", f"a UNet with {latent_channels} channels in and out, as the VAE has", received)
    try:
        check_fit(adapter, unet)
        check_pixels(adapter, unet, pixels)
    except ValueError as error:
        is_adapters = str(error).startswith("adapter:")
        raise ValueError(f"--{error}" if is_adapters else f"--base: {error}") from error
