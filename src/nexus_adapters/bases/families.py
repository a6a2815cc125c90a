"""The base families by name, and finding the family of a pipeline or denoiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float
from torch import nn

from nexus_adapters.bases.base import Base
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.registry import Registry

BASES: Registry[type[Base]] = Registry("base", "nexus_adapters.bases")

Family = TypeVar("Family", bound=type[Base])


def register_base(name: str) -> Callable[[Family], Family]:
    """Register a family of bases, a subclass of `Base`, under a name. A class decorator."""
    return BASES.register(name)


def known_families() -> Iterator[type[Base]]:
    """Yield the families, newest first: a user's family takes precedence over the package's.

    Families of installed packages are last, and are imported only when they are reached.
    """
    return BASES.newest_first()


def family_of(config: Mapping[str, Any]) -> type[Base] | None:
    """Return the family that recognizes a denoiser's config, or None."""
    return next((family for family in known_families() if family.recognizes(config)), None)


def check_finite(images: Float[np.ndarray, "b h w 3"]) -> None:
    """Raise `InvalidArgument` named "images" if a generated image is not finite (it would become black)."""
    if not np.isfinite(images).all():
        raise InvalidArgument(
            "images",
            "finite pixels",
            f"NaN or infinity in {sum(not np.isfinite(image).all() for image in images)} of {len(images)}",
            "Training may have diverged, or a value exceeds the range of float16; try float32",
        )


def layers(denoiser: nn.Module | Any) -> list[Any]:
    """Return the denoiser and what it wraps (`torch.compile`, PEFT's `get_peft_model`), outermost first."""
    found = [denoiser]
    while isinstance(found[-1], nn.Module):
        if isinstance(compiled := getattr(found[-1], "_orig_mod", None), nn.Module):
            found.append(compiled)
        elif callable(unwrap := getattr(found[-1], "get_base_model", None)):
            found.append(unwrap())
        else:
            break
    return found


def inner(denoiser: nn.Module | Any) -> Any:
    """Return the denoiser itself, without its wrappers."""
    return layers(denoiser)[-1]


def config_of(denoiser: object) -> Mapping[str, Any]:
    """Return a denoiser's config with its `_class_name`, also if it is wrapped; empty if there is none."""
    bare = inner(denoiser)
    config = getattr(bare, "config", None)
    if not isinstance(bare, nn.Module) or not isinstance(config, Mapping):
        return {}
    # Not the config's own name: a subclass of a denoiser belongs to the same family.
    names = [cls.__name__ for cls in type(bare).__mro__]
    for name in names:
        if family_of({"_class_name": name}) is not None:
            return {**config, "_class_name": name}
    return {**config, "_class_name": names[0]}


def base_of(pipe_or_denoiser: Any) -> tuple[Base, nn.Module]:
    """Return the base of a pipeline or a bare denoiser, and the denoiser.

    Raises:
        InvalidArgument: named "pipe_or_denoiser", if there is no denoiser of a registered family.
    """
    is_module = isinstance(pipe_or_denoiser, nn.Module)
    pipe = None if is_module else pipe_or_denoiser
    unknown: Any = None
    for family in known_families():
        denoiser = pipe_or_denoiser if is_module else getattr(pipe, family.denoiser_name, None)
        if not isinstance(denoiser, nn.Module):
            continue
        config = config_of(denoiser)
        if family.recognizes(config):
            vae = getattr(getattr(pipe, "vae", None), "config", None)
            return family(config, vae, getattr(pipe, "scheduler", None), pipe), denoiser
        unknown = denoiser
    received = f"a {type(pipe_or_denoiser).__name__}"
    if unknown is not None and not is_module:
        received += f" with a {type(inner(unknown)).__name__}"
    hint = ""
    if is_module and isinstance(getattr(pipe_or_denoiser, "unet", None), nn.Module):
        hint = "Pass its .unet"
    raise InvalidArgument(
        "pipe_or_denoiser",
        "a pipeline or denoiser of a known base, such as one with a UNet2DConditionModel",
        received,
        hint,
    )
