"""The embedded models by name: which bases and adapters there are, and where their weights are.

The weights are a distribution of their own, nexus-adapters-embedded. Names can be looked up without it,
folders cannot. Nothing here imports torch: commands that only look up a name start fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nexus_adapters.choices import GUIDANCE_SCALE
from nexus_adapters.errors import InvalidArgument

DISTRIBUTION = "nexus-adapters-embedded"
EMBEDDED = "embedded"
"""The base that is used where none is named."""

_FORMS = {"prime": "prime-residual", "slim": "slim-residual"}


@dataclass(frozen=True)
class BundledBase:
    """An embedded base and its adapters.

    Attributes:
        name: what users write for it, such as "embedded".
        subfolder: of `weights_folder`, in diffusers format.
        adapters: condition -> name of an adapter -> its subfolder.
        guidance_scale: the one that suits it (benchmarks/guidance.py).
        words: all that its prompts are made of, in groups with a title each.
    """

    name: str
    subfolder: str
    adapters: Mapping[str, Mapping[str, str]]
    guidance_scale: float
    words: Mapping[str, tuple[str, ...]]

    @property
    def folder(self) -> Path:
        """The base's folder. For errors, see `embedded_folder`."""
        return embedded_folder(self.subfolder, "model_index.json")

    def adapter(self, name: str, condition: str) -> Path:
        """The folder of one of its adapters.

        Raises:
            InvalidArgument: for an unknown name or condition; it lists the known ones.
            InvalidArgument, FileNotFoundError: as `embedded_folder`.
        """
        if condition not in self.adapters:
            raise InvalidArgument("condition", f"one of {', '.join(self.adapters)}", repr(condition))
        names = self.adapters[condition]
        if name not in names:
            raise InvalidArgument(
                "adapter", f"one of {', '.join(names)} for {condition} on the base {self.name!r}", repr(name)
            )
        return embedded_folder(names[name])

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its adapters, for any condition."""
        return tuple(dict.fromkeys(name for names in self.adapters.values() for name in names))

    def has_adapter(self, name: str) -> bool:
        """Whether it has an adapter of that name, for any condition."""
        return name in self.names


# "t2i" is diffusers' T2IAdapter, for comparison. benchmarks/chosen.py says which training each one is from.
BUNDLED: dict[str, BundledBase] = {
    EMBEDDED: BundledBase(
        name=EMBEDDED,
        subfolder="base",
        adapters={
            "canny": {
                **{name: f"canny/{folder}" for name, folder in _FORMS.items()},
                "prime-paper": "canny/prime",
                "slim-paper": "canny/slim",
                "t2i": "canny/t2i",
            },
            **{
                condition: {name: f"{condition}/{folder}" for name, folder in _FORMS.items()}
                for condition in ("depth", "segmentation", "sketch")
            },
        },
        guidance_scale=2.0,
        words={
            "shapes": ("circle", "ring", "square", "triangle", "star", "cross", "heart", "crescent"),
            "colors": ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"),
            "materials": ("plain", "striped", "dotted", "checked"),
            "places": ("to the left of", "to the right of", "above", "below", "in front of", "behind"),
            "other words": ("a", "an", "and", "on", "there is", "picture", "image", "background"),
        },
    )
}


def guidance_for(base: str) -> float:
    """The guidance scale to use with a base where none is given: an embedded base's own, else 7.5."""
    bundle = BUNDLED.get(base)
    return GUIDANCE_SCALE if bundle is None else bundle.guidance_scale


def weights_folder() -> Path:
    """The folder of all embedded models.

    Raises:
        InvalidArgument: where the distribution is not installed; its hint says how to install it.
    """
    try:
        from nexus_adapters_embedded import WEIGHTS
    except ModuleNotFoundError as error:
        hint = "Run pip install 'nexus-adapters[embedded]'"
        raise InvalidArgument(f"the package {DISTRIBUTION}", hint=hint) from error
    return WEIGHTS


def embedded_folder(subfolder: str, file: str = "config.json") -> Path:
    """The folder of one embedded model.

    Args:
        subfolder: of `weights_folder`.
        file: one that the folder must have.

    Raises:
        InvalidArgument: where the distribution is not installed.
        FileNotFoundError: where the installed distribution is incomplete.
    """
    folder = weights_folder() / subfolder
    if not (folder / file).is_file():
        raise FileNotFoundError(f"{DISTRIBUTION} is incomplete: '{folder / file}' is missing; reinstall it")
    return folder
