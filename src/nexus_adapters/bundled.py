"""The embedded models by name: which bases and adapters exist, and where their weights are.

The weights are in a separate distribution, nexus-adapters-embedded. Looking up a name works without it,
finding a folder does not. Nothing here imports torch: commands that only look up a name start fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nexus_adapters.choices import GUIDANCE_SCALE
from nexus_adapters.errors import InvalidArgument

DISTRIBUTION = "nexus-adapters-embedded"
EMBEDDED = "embedded"
"""The default base."""

_FORMS = {"prime": "prime-residual", "slim": "slim-residual"}


@dataclass(frozen=True)
class BundledBase:
    """An embedded base and its adapters.

    Attributes:
        name: the name that users write, such as "embedded".
        subfolder: its subfolder of `weights_folder`, in diffusers format.
        adapters: condition -> name of an adapter -> its subfolder.
        guidance_scale: its default guidance scale (benchmarks/guidance.py).
        words: all the words that its prompts are made of, in titled groups.
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
        """Return the folder of one of its adapters.

        Raises:
            InvalidArgument: for an unknown name or condition, with a list of the known ones; and as
                `embedded_folder`.
            FileNotFoundError: as `embedded_folder`.
        """
        if condition not in self.adapters:
            raise InvalidArgument("condition", f"one of {', '.join(self.adapters)}", repr(condition))
        names = self.adapters[condition]
        if name not in names:
            raise InvalidArgument(
                "adapter", f"one of {', '.join(names)} for {condition} with base {self.name!r}", repr(name)
            )
        return embedded_folder(names[name])

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its adapters, for any condition."""
        return tuple(dict.fromkeys(name for names in self.adapters.values() for name in names))

    def has_adapter(self, name: str) -> bool:
        """Return whether it has an adapter of this name, for any condition."""
        return name in self.names


# "t2i" is diffusers' T2IAdapter, for comparison. benchmarks/chosen.py lists the training run of each adapter.
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
            "other words": (
                "a",
                "an",
                "the",
                "and",
                "on",
                "is",
                "there is",
                "picture",
                "image",
                "background",
            ),
        },
    )
}


def guidance_for(base: str) -> float:
    """Return the default guidance scale of a base: an embedded base's own, else 7.5."""
    bundle = BUNDLED.get(base)
    return GUIDANCE_SCALE if bundle is None else bundle.guidance_scale


def weights_folder() -> Path:
    """Return the folder of all embedded models.

    Raises:
        InvalidArgument: if the distribution is not installed; the hint says how to install it.
    """
    try:
        from nexus_adapters_embedded import WEIGHTS
    except ModuleNotFoundError as error:
        hint = f"In a clone of nexus-adapters, run pip install ./packages/{DISTRIBUTION}"
        raise InvalidArgument(f"the package {DISTRIBUTION}", hint=hint) from error
    return WEIGHTS


def embedded_folder(subfolder: str, file: str = "config.json") -> Path:
    """Return the folder of one embedded model.

    Args:
        subfolder: the subfolder of `weights_folder`.
        file: a file that the folder must have.

    Raises:
        InvalidArgument: if the distribution is not installed.
        FileNotFoundError: if the installed distribution is incomplete.
    """
    folder = weights_folder() / subfolder
    if not (folder / file).is_file():
        raise FileNotFoundError(f"{DISTRIBUTION} is incomplete: '{folder / file}' is missing; reinstall it")
    return folder
