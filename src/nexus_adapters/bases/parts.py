"""Check that a base is complete: every part exists, and its text encoder distinguishes prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nexus_adapters.errors import InvalidArgument, one_line
from nexus_adapters.files import WEIGHTS, read_regular

if TYPE_CHECKING:
    from nexus_adapters.bases.base import Base

# Prefix of a tensor's name -> what such a file probably is, the most reliable first.
_SIGNS = {
    "adapter.conv_in.": "a Nexus or T2I-Adapter",
    "style_embedding": "a style T2I-Adapter, which adds tokens to the prompt and reads no structure map",
    "task_embedding": "a CoAdapter fuser, which combines the features of several T2I-Adapters",
    "spatial_feat_mapping.": "a CoAdapter fuser, which combines the features of several T2I-Adapters",
    "model.diffusion_model.": "a whole Stable Diffusion checkpoint",
    "controlnet_cond_embedding.": "a ControlNet",
    "control_model.": "a ControlNet",
    "input_hint_block.": "a ControlNet",
    "lora_unet_": "a LoRA",
    "lora_te": "a LoRA",
    "unet.down_blocks.": "a LoRA",
    "ip_adapter.": "an IP-Adapter",
    "image_proj": "an IP-Adapter",
    "down_blocks.": "a UNet",
    "text_model.": "a text encoder",
    "encoder.down": "a VAE",
    "first_stage_model.": "a VAE",
    "string_to_param": "a textual inversion",
    "emb_params": "a textual inversion",
}


def seems_to_be(names: Collection[str]) -> str:
    """Describe what a file probably is, by the names of its tensors."""
    for sign, what in _SIGNS.items():
        if any(name.startswith(sign) for name in names):
            return what
    if any(".lora" in name or "lora_" in name for name in names):
        return "a LoRA"
    if any(".out_conv." in name for name in names):
        return "a light T2I-Adapter, which has a different trunk"
    if {"conv_in", "body"} <= {name.split(".")[0] for name in names}:
        return "a T2I-Adapter"
    shown = ", ".join(sorted(names)[:3]) or "empty"
    return f"something else ({shown})"


_LIBRARIES = ("diffusers", "transformers", "nexus_adapters")
_TOKENIZERS = ("tokenizer.json", "vocab.json and merges.txt", "a SentencePiece model")
_OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")
_LEAST_SHARE = 0.9  # of the text encoder's vocabulary; the rest may be padding
_WORDS = 3


def check_folder(folder: Path, index: Mapping[str, Any], source: str, with_weights: bool = True) -> None:
    """Raise `InvalidArgument` named "base" if a part that the index of a local folder names has no files.

    `with_weights=False` checks only configs and tokenizers.
    """
    for name, kind in index.items():
        is_part = isinstance(kind, (list, tuple)) and len(kind) == 2 and kind[1] is not None
        if name.startswith("_") or not is_part or name in _OPTIONAL:
            continue
        part = folder / name
        if not part.is_dir():
            raise InvalidArgument("base", f"a folder with all parts, including {name}", f"'{source}'")
        if "Tokenizer" in str(kind[1]):
            if not _has_vocabulary(part):
                raise InvalidArgument(
                    "base",
                    f"a {name} with its vocabulary ({', or '.join(_TOKENIZERS)})",
                    f"'{part}', which has {_listed(part)}",
                )
        elif with_weights and "Scheduler" not in str(kind[1]) and not _has_weights(part):
            raise InvalidArgument("base", f"weights of the {name}", f"'{part}', which has {_listed(part)}")


def check_libraries(index: Mapping[str, Any], source: str, family: type[Base]) -> None:
    """Raise `InvalidArgument` named "base" if the index names a class that would run other code.

    A module may be code in the folder, or would be imported because a file names it. The `Auto` classes of
    transformers choose a class by the part's config, and ask on the terminal whether to run its code. A
    user's own pipeline class reads its parts itself, and may name them as it likes.
    """
    from diffusers import pipelines

    for name, kind in index.items():
        if name.startswith("_") or not (isinstance(kind, (list, tuple)) and len(kind) == 2):
            continue
        library, class_name = map(str, kind)
        # A module that the user has already imported runs no further code.
        is_known = library in _LIBRARIES or hasattr(pipelines, library) or library in sys.modules
        is_auto = class_name == "AutoModel" or (library == "transformers" and class_name.startswith("Auto"))
        if kind[1] is not None and (is_auto or not is_known) and _is_stock(family.pipeline_class(index)):
            raise InvalidArgument(
                "base",
                f"a {name} of a class in diffusers or transformers",
                f"'{source}', whose {name} is {library}.{class_name}",
                "The package never runs code that ships with a model",
            )


def _is_stock(pipeline_class: type) -> bool:
    return pipeline_class.__module__.partition(".")[0] in _LIBRARIES


def check_required(base: Base, index: Mapping[str, Any], source: str) -> None:
    """Raise `InvalidArgument` named "base" if the index lacks a part that bases of this family need."""
    for name in base.required_parts:
        kind = index.get(name)
        if not isinstance(kind, (list, tuple)) or len(kind) != 2 or kind[1] is None:
            raise InvalidArgument("base", f"a pipeline with a {name}", f"'{source}', which has none")


def check_vocabulary(folder: Path, source: str) -> None:
    """Raise `InvalidArgument` named "base" if a tokenizer's files do not fit its text encoder's config.

    Reads the files of a local folder; `check_text` checks a loaded pipeline.
    """
    for part in sorted(folder.glob("tokenizer*")):
        config = folder / part.name.replace("tokenizer", "text_encoder") / "config.json"
        found = _vocabulary_size(part)
        if found is not None and config.is_file():
            size = _json_object(config).get("vocab_size")
            if isinstance(size, int):
                _check_size(part.name, found, size, source)


def _check_size(name: str, found: int, size: int, source: str) -> None:
    if not _LEAST_SHARE * size <= found <= size:
        raise InvalidArgument(
            "base", f"a {name} with {size:,} tokens, to match its text encoder", f"{found:,} in '{source}'"
        )


def _vocabulary_size(folder: Path) -> int | None:
    """Return the number of tokens in a tokenizer's files; None if they do not state it in JSON."""
    if (folder / "tokenizer.json").is_file():
        content = _json_object(folder / "tokenizer.json")
        model = content.get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
        if not isinstance(vocab, dict):
            return None
        added = [token.get("content") for token in content.get("added_tokens") or ()]
        return len({*vocab, *added})
    if (folder / "vocab.json").is_file():
        more = folder / "added_tokens.json"
        return len({*_json_object(folder / "vocab.json"), *(_json_object(more) if more.is_file() else ())})
    return None


def _json_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_regular(file))
    except (OSError, ValueError) as error:
        raise InvalidArgument("base", "readable JSON", f"'{file}' ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise InvalidArgument("base", "a JSON object", f"'{file}', a {type(content).__name__}")
    return content


def check_text(base: Base, source: str) -> None:
    """Raise `InvalidArgument` named "base" unless its pipeline encodes different prompts differently."""
    pipe = base.pipe
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        tokenizer = getattr(pipe, name, None)
        encoder = getattr(pipe, name.replace("tokenizer", "text_encoder"), None)
        size = getattr(getattr(encoder, "config", None), "vocab_size", None)
        if tokenizer is None or size is None:
            continue
        _check_size(name, len(tokenizer), size, source)
    if getattr(pipe, "text_encoder", None) is None or getattr(pipe, "tokenizer", None) is None:
        return
    first, second = _two_prompts(pipe.tokenizer)
    embeds = base.encode_prompts([first, second])["prompt_embeds"]
    if not bool(torch.isfinite(embeds).all()):
        raise InvalidArgument("base", "a text encoder that gives finite numbers", f"'{source}'")
    if first != second and torch.equal(embeds[0], embeds[1]):
        raise InvalidArgument(
            "base",
            "a text encoder that distinguishes prompts",
            f"'{source}', which gives the same embeddings for all prompts",
        )


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Return the weights that diffusers loads from a model's folder, which may hold others, such as fp16."""
    stem = WEIGHTS if variant is None else f"{WEIGHTS}.{variant}"
    for pattern in ("safetensors", "bin"):
        for name in (f"{stem}.{pattern}", f"{stem}-*-of-*.{pattern}"):
            if found := sorted(folder.glob(name)):
                return found
    return []


def file_variant(folder: Path) -> str | None:
    """Return diffusers' `variant` for a model's folder without plain weights; the first of several."""
    if weight_files(folder):
        return None
    names = (file.name for file in sorted(folder.glob(f"{WEIGHTS}.*.safetensors")))
    return next((name.split(".")[1].split("-")[0] for name in names), None)


def _two_prompts(tokenizer: Any) -> tuple[str, str]:
    """Return two prompts of words in the vocabulary, which may be small."""
    special = set(tokenizer.all_special_ids)
    pieces = [piece for piece, number in tokenizer.get_vocab().items() if number not in special]
    words = sorted({w for piece in pieces if (w := piece.replace("</w>", "").strip("▁Ġ")).isalpha()})
    return " ".join(words[:_WORDS]), " ".join(words[-_WORDS:])


def _has_vocabulary(folder: Path) -> bool:
    names = {file.name for file in folder.iterdir()}
    is_sentencepiece = any(name.endswith(".model") for name in names)
    return "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names or is_sentencepiece


def _has_weights(folder: Path) -> bool:
    return any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir())


def _listed(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir())
    return ", ".join(names[:4]) + (" ..." if len(names) > 4 else "") if names else "no files"
