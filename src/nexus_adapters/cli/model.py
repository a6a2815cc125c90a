"""From `--base` and `--adapter` to a pipeline and adapters: embedded ones, folders, files, or the Hub's."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_adapters.adapter.file_names import WEIGHTS, variant_in_name
from nexus_adapters.cli.checks import expect, expect_source
from nexus_adapters.cli.saved_adapter import CONFIG, read_saved_adapter

if TYPE_CHECKING:
    import torch

EMBEDDED = "embedded"  # what settings call the base and the adapters that come with the package
SINGLE_FILE = ".safetensors"
_VARIANTS = ("prime", "slim")
_BASE = "a Stable Diffusion pipeline"
_ADAPTER = "a saved NexusAdapter or T2IAdapter"
_CONFIGS = ["model_index.json", "unet/config.json", "vae/config.json"]
_ADAPTER_FILES = ["config.json", "diffusion_pytorch_model*"]
_PARTS = {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter, and what settings call it."""

    adapter: Any
    name: str
    sha256: str


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
        _check_adapter(base, adapter)


def _check_adapter(base: str | None, adapter: str | None) -> None:
    if adapter is None or (base is None and adapter in _VARIANTS):
        return  # embedded
    # Not a Hub id, all of which have an owner now.
    is_name = "/" not in adapter and not Path(adapter).exists()
    received = f"'{adapter}'" if base is None else f"'{adapter}' beside --base"
    expected = f"a folder, a Hub id, or without --base one of {', '.join(_VARIANTS)}"
    expect(not is_name, "--adapter", expected, received)
    expect_source("--adapter", adapter, "config.json", _ADAPTER)


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


def load_adapter(name: str | None, condition: str) -> LoadedAdapter:
    """The adapter of `load_model`'s name."""
    from diffusers import T2IAdapter

    from nexus_adapters import embedded
    from nexus_adapters.adapter.model import NexusAdapter

    if name is None or name in _VARIANTS:
        method = embedded.BETTER_FORM[name or "prime"]
        ours = embedded.embedded_adapter(method, condition)
        sha256 = read_saved_adapter(embedded.WEIGHTS / condition / method).sha256()
        return LoadedAdapter(ours, f"{EMBEDDED} {method}", sha256)
    folder = fetch("--adapter", name, _ADAPTER, _ADAPTER_FILES)
    if _class_name(folder) == "T2IAdapter":
        with refused("--adapter", name, _ADAPTER):
            kind: Any = T2IAdapter
            t2i = kind.from_pretrained(folder, local_files_only=True, variant=file_variant(folder))
        return LoadedAdapter(t2i.eval(), name, files_sha256(weight_files(folder, file_variant(folder))))
    saved = read_saved_adapter(folder, "--adapter")
    with refused("--adapter", name, _ADAPTER):
        nexus = NexusAdapter.from_pretrained(
            folder, local_files_only=True, variant=saved.file_variant, use_safetensors=True
        )
    return LoadedAdapter(nexus, name, saved.sha256())


def _class_name(folder: Path) -> object:
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError):
        return None  # `read_saved_adapter` says what is wrong
    return config.get("_class_name") if isinstance(config, dict) else None


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
        from diffusers import DiffusionPipeline

        kind: Any = DiffusionPipeline
        return Path(kind.download(base))


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
