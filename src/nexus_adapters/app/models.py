"""The models of the app: one base and its adapters, loaded once, which generate one image at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from nexus_adapters.bundled import BUNDLED, guidance_for
from nexus_adapters.choices import Device, Dtype
from nexus_adapters.errors import InvalidArgument, expect
from nexus_adapters.files import without_folder
from nexus_adapters.generation.images import generate_image, prepare
from nexus_adapters.generation.maps import check_size, read_control
from nexus_adapters.generation.models import Model, check_methods, choose_device, find_adapters, load_model
from nexus_adapters.generation.requests import BaseRequest, GenerateRequest, ImageSource
from nexus_adapters.generation.steps import OnStep

if TYPE_CHECKING:
    from PIL import Image

NO_ADAPTER = "No adapter"
"""The column of the base's own image: the same request with scale 0."""

MOST_STEPS = 100
MOST_SIDES = 2
"""Longest side of an image, in native sizes of the base."""

_LABELS = {
    "prime": "Prime",
    "slim": "Slim",
    "prime-paper": "Prime (paper)",
    "slim-paper": "Slim (paper)",
    "t2i": "T2I-Adapter",
}


@dataclass(frozen=True)
class AdapterSource:
    """An adapter as the command line named it, and the condition that it reads."""

    source: str
    condition: str


@dataclass(frozen=True)
class Generated:
    """An image and everything needed to generate it again."""

    image: Image.Image
    settings: dict[str, Any]


@dataclass
class Models:
    """One base and its adapters.

    Attributes:
        base: the base.
        sources: adapters for a base of the user's own; empty for an embedded base, which has its own.
        device, dtype: as in the command line.
    """

    base: BaseRequest = field(default_factory=BaseRequest)
    sources: tuple[AdapterSource, ...] = ()
    device: Device = "auto"
    dtype: Dtype = "auto"

    def __post_init__(self) -> None:
        """Check that there are adapters. Nothing is loaded."""
        if not self.is_embedded:
            hint = f"--base {without_folder(self.base.path)} needs an adapter that was trained for it"
            if not self.sources:
                raise InvalidArgument("adapter", hint=hint)
        self._lock = threading.Lock()
        self._model: Model | None = None

    @property
    def is_embedded(self) -> bool:
        """Whether the base is an embedded one."""
        return self.base.path in BUNDLED

    @property
    def guidance(self) -> float:
        """The default guidance scale."""
        return guidance_for(self.base.path)

    @property
    def words(self) -> Mapping[str, Sequence[str]]:
        """The words that the base knows, in titled groups; empty if it knows all."""
        return BUNDLED[self.base.path].words if self.is_embedded else {}

    @cached_property
    def adapters(self) -> Mapping[str, Mapping[str, str]]:
        """Condition -> name on the page -> source of the adapter."""
        if self.is_embedded and not self.sources:
            return {
                condition: {_LABELS.get(name, name): name for name in names}
                for condition, names in BUNDLED[self.base.path].adapters.items()
            }
        found: dict[str, dict[str, str]] = {}
        for each in self.sources:
            names = found.setdefault(each.condition, {})
            label = _LABELS.get(each.source, without_folder(each.source))
            while label in names:
                label += "'"
            names[label] = each.source
        return found

    @property
    def conditions(self) -> tuple[str, ...]:
        """The conditions that there are adapters for."""
        return tuple(self.adapters)

    def columns(self, conditions: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Return what can be shown side by side: a name -> the adapter of each of these conditions.

        A name that exists for all conditions is one column. Otherwise, adapters are combined in the order in
        which the command line named them.
        """
        each = [self.adapters[condition] for condition in conditions]
        shared = [name for name in each[0] if all(name in names for names in each)]
        columns = {name: tuple(names[name] for names in each) for name in shared}
        if not columns:
            columns = {
                " + ".join(dict.fromkeys(name for name, _ in combined)): tuple(
                    source for _, source in combined
                )
                for combined in zip(*(names.items() for names in each), strict=False)
            }
        return columns | {NO_ADAPTER: next(iter(columns.values()))}

    def requests(
        self, request: GenerateRequest, names: Sequence[str]
    ) -> Iterator[tuple[str, GenerateRequest]]:
        """Yield the request of each of these columns. `InvalidArgument` is named "adapters"."""
        columns = self.columns([control.condition_name for control in request.controls])
        for name in names:
            expect(name in columns, "adapters", f"among {', '.join(columns)}", repr(name))
            pairs = zip(request.controls, columns[name], strict=True)
            controls = tuple(
                replace(control, adapter=source, scale=0.0 if name == NO_ADAPTER else control.scale)
                for control, source in pairs
            )
            yield name, replace(request, controls=controls)

    def extracts(self, condition: str) -> bool:
        """Return whether the page extracts maps of this condition.

        The adapters of an embedded base read exact maps, which models for photos do not give.
        """
        from nexus_adapters.conditions import EXTRACTORS

        return not (self.is_embedded and EXTRACTORS[condition].model)

    @cached_property
    def native_size(self) -> int:
        """The side, in pixels, of the square images that the base was trained on."""
        from nexus_adapters.bases.loading import open_base

        return open_base(self.base.source).native_size()

    def load(self) -> None:
        """Load the base and all adapters, so that the first image does not wait for it."""
        for condition, names in self.adapters.items():
            for source in names.values():
                self._with(find_adapter(source, condition, self.base.path))

    def generate(self, request: GenerateRequest, on_step: OnStep | None = None) -> Generated:
        """Generate the image of a request's seed; it waits until the device is free.

        An exception that `on_step` raises ends the generation.

        Raises:
            InvalidArgument: named after an argument.
            MemoryError: if the device runs out of memory.
        """
        self._check_limits(request)
        saved = find_adapters(request.controls, self.base.path)
        read = [read_control(control) for control in request.controls]
        for each in read:
            check_size(each.request, each.source, request.width, request.height)
        check_methods(request.controls, saved)
        with self._lock:
            model = self._with(*saved)
            model.pipe.set_progress_bar_config(disable=True)
            prepared = prepare(request, model, read)
            image = generate_image(model, prepared, request.seed, on_step)
        return Generated(image, prepared.settings_of(request.seed))

    def _check_limits(self, request: GenerateRequest) -> None:
        """Raise `InvalidArgument` for a request that would hold the device much longer than others."""
        expect(request.steps <= MOST_STEPS, "steps", f"at most {MOST_STEPS} on the page", request.steps)
        for control in request.controls:
            is_exact = self.is_embedded and isinstance(control.given, ImageSource)
            needs_map = is_exact and not self.extracts(control.condition_name)
            hint = "The page cannot extract such maps for this base"
            expect(
                not needs_map, "is_map", f"a structure map for {control.condition_name}", "a picture", hint
            )
        side = MOST_SIDES * self.native_size
        width, height = request.width or 0, request.height or 0
        size = f"{request.width}x{request.height}"
        expect(max(width, height) <= side, "width and height", f"at most {side} pixels a side", size)

    def _with(self, *saved: Any) -> Model:
        """Return the base with these adapters; it is loaded when it is first needed."""
        import torch

        from nexus_adapters.evaluation.provenance import choose_dtype

        if self._model is None:
            device = choose_device(self.device)
            dtype = choose_dtype(self.dtype, torch.device(device))
            self._model = load_model(self.base.source, saved, dtype, device)
            return self._model
        return self._model.with_adapters(saved)


def find_adapter(source: str, condition: str, base: str) -> Any:
    """Find a saved adapter, see `find_saved`."""
    from nexus_adapters.adapter.saved import find_saved

    return find_saved(source, condition, base)
