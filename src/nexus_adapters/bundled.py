"""The models that ship with the package, by name: where they lie, and which adapters each base has.

Nothing here imports torch: commands that only look a name up start fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nexus_adapters.errors import InvalidArgument

WEIGHTS = Path(__file__).parent / "weights"

_FORMS = {"prime": "prime-residual", "slim": "slim-residual"}


@dataclass(frozen=True)
class BundledBase:
    """A base with its adapters.

    Attributes:
        name: what users write for it, such as "embedded".
        folder: in diffusers' layout.
        adapters: condition -> name of an adapter -> its folder.
        guidance_scale: what suits it (benchmarks/guidance.py).
    """

    name: str
    folder: Path
    adapters: Mapping[str, Mapping[str, Path]]
    guidance_scale: float

    def adapter(self, name: str, condition: str) -> Path:
        """The folder of one of its adapters. `InvalidArgument` lists what there is."""
        if condition not in self.adapters:
            raise InvalidArgument("condition", f"one of {', '.join(self.adapters)}", repr(condition))
        names = self.adapters[condition]
        if name not in names:
            raise InvalidArgument(
                "adapter", f"one of {', '.join(names)} for {condition} on the base {self.name!r}", repr(name)
            )
        return present(names[name], "config.json")

    @property
    def names(self) -> tuple[str, ...]:
        """Of its adapters, for any condition."""
        return tuple(dict.fromkeys(name for names in self.adapters.values() for name in names))

    def has_adapter(self, name: str) -> bool:
        """Whether it has an adapter of that name, for any condition."""
        return name in self.names


def present(folder: Path, file: str) -> Path:
    """The folder; FileNotFoundError where this installation lacks it."""
    if not (folder / file).is_file():
        raise FileNotFoundError(f"this installation has no embedded weights: '{folder / file}' is missing")
    return folder


# "t2i" is diffusers' T2IAdapter, for comparison. Of which training each is: benchmarks/chosen.py.
BUNDLED: dict[str, BundledBase] = {
    "embedded": BundledBase(
        name="embedded",
        folder=WEIGHTS / "base",
        adapters={
            "canny": {
                **{name: WEIGHTS / "canny" / folder for name, folder in _FORMS.items()},
                "prime-paper": WEIGHTS / "canny" / "prime",
                "slim-paper": WEIGHTS / "canny" / "slim",
                "t2i": WEIGHTS / "canny" / "t2i",
            },
            **{
                condition: {name: WEIGHTS / condition / folder for name, folder in _FORMS.items()}
                for condition in ("depth", "segmentation", "sketch")
            },
        },
        guidance_scale=2.0,
    )
}
