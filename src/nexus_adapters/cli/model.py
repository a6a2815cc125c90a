"""From `--base` and `--adapter` to a pipeline: the embedded ones, folders, or what the Hub has."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_adapters.adapter.file_names import WEIGHTS, variant_in_name
from nexus_adapters.cli.checks import expect, expect_source
from nexus_adapters.cli.saved_adapter import read_saved_adapter

if TYPE_CHECKING:
    import torch

    from nexus_adapters.adapter.model import NexusAdapter
    from nexus_adapters.pipelines import StableDiffusionNexusPipeline

EMBEDDED = "embedded"  # what settings call the base and the adapters that come with the package
_VARIANTS = ("prime", "slim")
_BASE = "a Stable Diffusion pipeline"
_ADAPTER = "a saved NexusAdapter"
_CONFIGS = ["model_index.json", "unet/config.json", "vae/config.json"]
_ADAPTER_FILES = ["config.json", "diffusion_pytorch_model*"]
_PARTS = {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}


@dataclass(frozen=True)
class Model:
    """A pipeline, and what it was made of, as settings tell it."""

    pipe: "StableDiffusionNexusPipeline"
    base: str
    base_unet_sha256: str
    adapter: str
    adapter_sha256: str


def check_model(base: str | None, adapter: str | None) -> None:
    """What can be said of `--base` and `--adapter` before anything is imported or fetched."""
    if base is not None:
        expect(adapter is not None, "--adapter", "a folder or Hub id beside --base", "none")
        expect_source("--base", base, "model_index.json", _BASE)
    if adapter is None or (base is None and adapter in _VARIANTS):
        return  # embedded
    # Not a Hub id, all of which have an owner now.
    is_name = "/" not in adapter and not Path(adapter).exists()
    received = f"'{adapter}'" if base is None else f"'{adapter}' beside --base"
    expected = f"a folder, a Hub id, or without --base one of {', '.join(_VARIANTS)}"
    expect(not is_name, "--adapter", expected, received)
    expect_source("--adapter", adapter, "config.json", _ADAPTER)


def load_model(base: str | None, adapter: str | None, condition: str, torch_dtype: "torch.dtype") -> Model:
    """The pipeline on the CPU. ValueError names the argument that is wrong, in one line.

    Args:
        base: a folder or Hub id; None for the embedded one.
        adapter: a folder or Hub id; without a base also "prime" or "slim", the embedded ones, and None is
            "prime".
        condition: what the embedded adapter was trained on.
        torch_dtype: of all parts.
    """
    from nexus_adapters import embedded
    from nexus_adapters.adapter.model import NexusAdapter
    from nexus_adapters.pipelines import StableDiffusionNexusPipeline

    if base is None and (adapter is None or adapter in _VARIANTS):
        variant = adapter or "prime"
        method = embedded.BETTER_FORM[variant]
        ours = embedded.load_embedded(condition, variant, torch_dtype)
        saved = read_saved_adapter(embedded.WEIGHTS / condition / method)
        unet_sha256 = files_sha256(weight_files(embedded.WEIGHTS / "base" / "unet"))
        return Model(ours, EMBEDDED, unet_sha256, f"{EMBEDDED} {method}", saved.sha256())
    assert adapter is not None
    configs = embedded.WEIGHTS / "base" if base is None else fetch("--base", base, _BASE, _CONFIGS)
    if base is not None:
        check_kind(configs, base)
    folder = fetch("--adapter", adapter, _ADAPTER, _ADAPTER_FILES)
    saved = read_saved_adapter(folder, "--adapter")
    with embedded.no_loading_bars():
        with refused("--adapter", adapter, _ADAPTER):
            loaded = NexusAdapter.from_pretrained(
                folder, local_files_only=True, variant=saved.file_variant, use_safetensors=True
            )
        check_fits(loaded, configs)
        # Only now what may be gigabytes.
        base_folder = configs if base is None else fetch_pipeline(base)
        files = file_variant(base_folder / "unet")
        if base is None:
            parts = embedded.load_embedded_base().components
            pipe = StableDiffusionNexusPipeline(**parts, adapter=loaded, requires_safety_checker=False)
        else:
            with refused("--base", base, _BASE):
                pipe = StableDiffusionNexusPipeline.from_pretrained(
                    base_folder, adapter=loaded, local_files_only=True, variant=files
                )
    embedded.convert(pipe, torch_dtype)
    unet_sha256 = files_sha256(weight_files(base_folder / "unet", files))
    return Model(pipe, base or EMBEDDED, unet_sha256, adapter, saved.sha256())


def fetch(argument: str, source: str, what: str, files: list[str]) -> Path:
    """The folder `source`, or the one into which these of the Hub's files of that id were put."""
    if Path(source).is_dir():
        return Path(source)
    with refused(argument, source, what):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(source, allow_patterns=files))


def fetch_pipeline(base: str) -> Path:
    """The folder `base`, or the one into which all was put that the Hub's pipeline needs."""
    if Path(base).is_dir():
        return Path(base)
    with refused("--base", base, _BASE):
        from diffusers import StableDiffusionPipeline

        return Path(StableDiffusionPipeline.download(base))


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Those that diffusers loads from a model's folder, where others may lie beside them, such as fp16's."""
    stem = WEIGHTS if variant is None else f"{WEIGHTS}.{variant}"
    for pattern in ("safetensors", "bin"):
        for name in (f"{stem}.{pattern}", f"{stem}-*-of-*.{pattern}"):
            if found := sorted(folder.glob(name)):
                return found
    return []


def file_variant(folder: Path) -> str | None:
    """What diffusers calls `variant`, of a model's folder without plain weights; the first of several."""
    if weight_files(folder):
        return None
    return next(map(variant_in_name, sorted(folder.glob(f"{WEIGHTS}.*.safetensors"))), None)


def files_sha256(files: Sequence[Path]) -> str:
    """Hash of the files' contents, one behind the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def check_kind(folder: Path, base: str) -> None:
    """ValueError unless the folder's index is that of a pipeline that an adapter for it can be run in."""
    with refused("--base", base, _BASE):
        index: dict[str, Any] = json.loads((folder / "model_index.json").read_bytes())
        fits = set(index) >= _PARTS and "text_encoder_2" not in index
        kind = index.get("_class_name")
    expect(fits, "--base", "a Stable Diffusion 1.x or 2.x pipeline", f"'{base}', a {kind}")


def check_fits(adapter: "NexusAdapter", base: Path) -> None:
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


@contextmanager
def refused(argument: str, source: str, what: str) -> Iterator[None]:
    """Turn whatever loading raises into a ValueError of one line.

    Of any kind: the Hub's client, safetensors, JSON and torch each have their own, and damaged files bring
    out more. `--debug` shows the original.
    """
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{argument}: expected a folder or the Hub id of {what}; received '{source}' "
            f"({type(error).__name__}: {reason})"
        ) from error
