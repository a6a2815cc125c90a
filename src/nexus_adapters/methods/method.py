"""A method: how to build, load, train, use, and describe a kind of adapter, and what it costs.

Methods are registered under the names that recipes, commands and tables use (`register_method`). No code
outside this package depends on an adapter's class.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from nexus_adapters.adapter.saved import Saved, check_layers, within
from nexus_adapters.adapter.tensors import load_tensors
from nexus_adapters.adapter.weights import check_tensors, check_types
from nexus_adapters.bases.base import Base
from nexus_adapters.bases.loading import quiet_loading
from nexus_adapters.bundled import BUNDLED
from nexus_adapters.choices import DEFAULT_POLICY
from nexus_adapters.data.batch import Batch
from nexus_adapters.errors import InvalidArgument, expect, one_line
from nexus_adapters.methods.cost import Cost

FEATURES = "features"
"""The key of features for the base's places in the result of `denoiser_arguments`."""


# A pipeline, or a function with the same arguments.
Generate = Callable[..., Any]


@dataclass(frozen=True)
class AdapterOptions:
    """The `[adapter]` section: what to train. Each method adds its own options."""

    method: str = "prime"
    """The name of a configuration: "prime", "slim", "prime-paper", "slim-paper", "t2i", "controlnet",
    "controlnet-xs", or one that your module registers. Default: that of the adapter in `start_from`, else
    "prime"."""
    start_from: str = ""
    """A saved adapter to start from: anything that `load_adapter` accepts. Its architecture is used."""
    start_from_optimizer: bool = False
    """Also load the optimizer state of the training run or checkpoint in `start_from`. Then the checkpoint's
    current weights are loaded too, instead of their average."""

    def identity(self) -> dict[str, Any]:
        """Return the options that decide the network and its training, in a canonical form."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class GenerationSettings:
    """How a control is used in generation; see `Control`.

    Attributes:
        scale: factor of what the adapter adds to the base; 0 is the base alone.
        policy: which text a text-reading adapter reads.
        level_scales: factors of a Nexus adapter's features.
        noise_exponent: for adapters that add features; None for the value that the adapter was trained with.
        adapter_prompts: prompts that a text-reading adapter reads instead of the base's prompts.
    """

    scale: float = 1.0
    policy: str = DEFAULT_POLICY
    level_scales: Sequence[float] | str | None = None
    noise_exponent: float | None = None
    adapter_prompts: Sequence[str] | None = None


class Method(ABC):
    """A way to control a frozen base, with one instance for each name.

    Args:
        name: the name under which it is registered.
    """

    label: ClassVar[str]
    """The name in model cards and plots."""
    Options: ClassVar[type[AdapterOptions]] = AdapterOptions
    """The dataclass that validates a recipe's `[adapter]` section."""
    settings: ClassVar[frozenset[str]] = frozenset({"scale"})
    """The fields of `GenerationSettings` that it reads; all others have no effect."""
    reads_prompt: ClassVar[bool] = True
    """Whether the adapter reads the prompt, so that its prompt can differ from the base's."""
    attaches: ClassVar[bool] = False
    """Whether it works with `Control` and `attach`; other methods have their own pipelines."""
    keeps_float32: ClassVar[bool] = False
    """Whether its weights stay float32 if the base has a lower precision, and so need autocast."""
    classes: ClassVar[tuple[type[nn.Module], ...]] = ()
    """The classes of its adapters: subclasses of diffusers' `ModelMixin` and `ConfigMixin`. By default, saved
    and loaded adapters are recognized by them."""

    def __init__(self, name: str) -> None:
        self.name = name

    # Building and loading

    @abstractmethod
    def build(self, base: Base, denoiser: nn.Module, options: Any) -> nn.Module:
        """Build the untrained adapter for a base, on the current default device.

        Args:
            base: the base.
            denoiser: the base's denoiser, possibly on the meta device.
            options: an instance of `Options`.

        Raises:
            InvalidArgument: named after an option, or "base".
        """

    def recognizes(self, saved: Saved) -> bool:
        """Return whether `load` can load it: by default, saved `classes` and checkpoints of this method."""
        if saved.run:
            return trained_as(saved) == self.name
        return saved.class_name in {kind.__name__ for kind in self.classes}

    def load(self, saved: Saved) -> nn.Module:
        """Load a saved adapter on the CPU, in eval mode, in the precision of its files.

        By default, it has the class named in its config, and exactly the tensors that this class needs.
        """
        kind = next((kind for kind in self.classes if kind.__name__ == saved.class_name), None)
        if kind is None and saved.config and not saved.class_name:
            kind = next(iter(self.classes), None)
        if kind is None:
            hint = "Keep config.json next to the weights"
            if saved.run:
                hint = "Use the adapter of the finished run"
            raise InvalidArgument(
                "adapter", f"a {self.label} with its config", f"'{saved.source}' without a config", hint
            )
        return _from_folder(kind, saved) if saved.is_folder else _from_files(kind, saved)

    def describe(self, saved: Saved) -> dict[str, str]:
        """Return label -> text, shown by `nexus info` for a saved adapter that this method recognizes."""
        return {"kind": f"{self.label} ({saved.class_name})" if saved.class_name else self.label}

    def owns(self, module: nn.Module) -> bool:
        """Return whether a loaded adapter belongs to this method: by default, an instance of `classes`."""
        return isinstance(module, self.classes)

    @abstractmethod
    def check_fit(self, module: nn.Module, base: Base) -> None:
        """Raise `InvalidArgument` named "adapter", with both numbers, unless the adapter fits the base."""

    def check_saved(self, saved: Saved, base: Base) -> None:  # noqa: B027  # a config may not say enough
        """Check the same as `check_fit` before the adapter is loaded, as far as its config states it."""

    def configuration(self, saved: Saved) -> str:
        """Return the name of the method that trains adapters like `saved`, which this method recognizes."""
        return self.name

    def adopt(self, options: Any, saved: Saved) -> Any:
        """Return the options with the architecture of a saved adapter that training starts from.

        Raises:
            InvalidArgument: named after an option that contradicts the saved adapter.
        """
        return options

    def starting_tensors(self, module: nn.Module, saved: Saved) -> dict[str, Tensor]:
        """Return the saved adapter's tensors that initialize `module`: by default, all of the same kind's.

        Raises:
            InvalidArgument: named "start_from", for an adapter of another kind or a tensor that does not fit.
        """
        received = f"'{saved.source}'" + (f", a {saved.class_name}" if saved.class_name else "")
        expect(self.recognizes(saved), "start_from", f"a {self.label}", received)
        return matching_tensors(module, dict(load_with(self, saved).state_dict()), saved.source)

    # Training

    def network(self, module: nn.Module, denoiser: nn.Module) -> nn.Module:
        """Return the module that runs in a training step: the adapter, or its fusion with the denoiser."""
        return module

    @property
    def is_fused(self) -> bool:
        """Whether `network` is called instead of the base's denoiser."""
        return False

    @abstractmethod
    def denoiser_arguments(
        self,
        module: nn.Module | Any,
        batch: Batch,
        noisy: Float[Tensor, "b c h w"],
        t: Int[Tensor, " b"],
        base: Base,
    ) -> dict[str, Any]:
        """Return the arguments that make the denoiser follow the batch's condition.

        The key `FEATURES` holds a list of features, (b, c, h, w) each, for the base's places; all other keys
        are arguments of the denoiser's `forward`. Dropped conditions add zeros: the module always runs, as
        training on several devices requires. `module` is the result of `network`, possibly wrapped (DDP,
        compiled).
        """

    # Generating

    @abstractmethod
    def generating(
        self, pipe: Any, module: nn.Module, conditions: Sequence[Image.Image], settings: GenerationSettings
    ) -> AbstractContextManager[Generate]:
        """Yield a function that generates with the control. It is called like the base's pipeline."""

    # Cost and description

    @abstractmethod
    def cost(self, module: nn.Module, base: Base, size: int, steps: int) -> Cost:
        """Return the cost for one square image with sides of `size` pixels, without running on weights."""

    def card(self, module: nn.Module, base: str, source: str) -> str:
        """Return Python code for the model card that uses the adapter `source` with `base`."""
        return "\n".join(
            [
                "from nexus_adapters import Control, attach, load_adapter, load_base",
                "",
                f'pipe = load_base("{base}")',
                f'adapter = load_adapter("{source}")',
                "# condition: a PIL image of the structure map",
                "with attach(pipe, Control(adapter, condition)):",
                f"    {card_call(base)}",
            ]
        )


def card_call(base: str, arguments: str = "") -> str:
    """Return a model card's line that generates an image, with the guidance scale of an embedded base."""
    bundle = BUNDLED.get(base)
    guidance = "" if bundle is None else f", guidance_scale={bundle.guidance_scale:g}"
    return f'image = pipe("a prompt"{arguments}{guidance}).images[0]'


def unread_settings(method: Method, settings: GenerationSettings) -> list[str]:
    """Return the names of settings that differ from their defaults and that the method does not read."""
    return [
        field.name
        for field in dataclasses.fields(settings)
        if field.name not in {*method.settings, "adapter_prompts"}
        and getattr(settings, field.name) != field.default
    ]


# Loaders' names of the argument that names the adapter's files.
_NAMES_OF_SOURCE = ("adapter", "source", "path", "pretrained_model_name_or_path")


def load_with(method: Method, saved: Saved, dtype: torch.dtype = torch.float32) -> Any:
    """Load an adapter with `method.load`, in eval mode. Any error is an `InvalidArgument` named "adapter"."""
    try:
        with quiet_loading():
            loaded = method.load(saved)
    except InvalidArgument as error:
        if error.name in _NAMES_OF_SOURCE:
            raise error.with_name("adapter") from error
        # Not the method's label: Prime and Slim recognize each other's adapters, and the first one is used.
        expected = f"a saved {saved.class_name or method.label}"
        raise within("adapter", expected, saved.source, error) from error
    except Exception as error:  # for odd configs and damaged files, diffusers raises nearly anything
        reason = one_line(error)
        raise InvalidArgument(
            "adapter", f"a saved {method.label}", f"'{saved.source}' ({type(error).__name__}: {reason})"
        ) from error
    # diffusers' own `to` would warn about parts to keep in float32; there are none here.
    return nn.Module.to(loaded, dtype).eval()


def trained_as(saved: Saved) -> str:
    """Return the method's name in the run's recipe, for checkpoints without a config."""
    return str(saved.run.get("adapter", {}).get("method", AdapterOptions.method))


def matching_tensors(
    module: nn.Module, theirs: dict[str, Tensor], source: str, needed: set[str] | None = None
) -> dict[str, Tensor]:
    """Check that `theirs` are the tensors that a module needs, and return them.

    `needed` names the module's tensors that must be there; by default, all. `InvalidArgument`, named
    "start_from", reports the first tensor that does not fit.
    """
    ours = module.state_dict()
    wanted = set(ours) if needed is None else needed
    for name in sorted(wanted | set(theirs)):
        expected = f"shape {tuple(ours[name].shape)}" if name in wanted else "no such tensor"
        found = f"shape {tuple(theirs[name].shape)}" if name in theirs else "no such tensor"
        if expected != found:
            raise InvalidArgument(
                "start_from", f"an adapter whose {name} has {expected}", f"'{source}' with {found}"
            )
    return theirs


def _from_files(kind: Any, saved: Saved) -> nn.Module:
    """Build a model of diffusers' class `kind` from its config and its files."""
    check_layers(saved)
    with torch.random.fork_rng(devices=()):  # its random initial weights are replaced
        built: nn.Module = kind.from_config({k: v for k, v in saved.config.items() if not k.startswith("_")})
    tensors = load_tensors(saved)
    check_tensors(built, tensors, saved.source, "adapter")
    # Copied, since loaded tensors may stay mapped to their file.
    built.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    return built.eval()


def _from_folder(kind: Any, saved: Saved) -> nn.Module:
    """Load a model of diffusers' class `kind` from its folder.

    diffusers itself only warns of missing and unexpected tensors, and leaves missing ones uninitialized.
    """
    check_layers(saved)
    check_types(saved.tensors, "adapter")
    loaded: nn.Module
    loaded, info = kind.from_pretrained(
        saved.path, local_files_only=True, variant=saved.file_variant, output_loading_info=True
    )
    problems = {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"]}
    problems["not finite"] = [
        name
        for name, tensor in loaded.state_dict().items()
        if not tensor.is_meta and not bool(torch.isfinite(tensor).all())
    ]
    for what, names in problems.items():
        found = f"'{saved.source}', in which {len(names)} are {what}, such as {next(iter(names), '')}"
        expect(not names, "adapter", f"the tensors of a {kind.__name__}, all finite", found)
    return loaded.eval()


def inner(module: nn.Module | Any) -> Any:
    """Return the adapter without its wrappers: `torch.compile`, `DistributedDataParallel`."""
    while True:
        if hasattr(module, "_orig_mod"):
            module = module._orig_mod
        elif isinstance(module, nn.parallel.DistributedDataParallel):
            module = module.module
        else:
            return module


def other_pipeline(kind: Any, base: Any, **added: object) -> Any:
    """Build a diffusers pipeline of another class from the base's parts and `added`."""
    import inspect

    taken = inspect.signature(kind).parameters
    parts = {name: part for name, part in base.components.items() if name in taken}
    if "requires_safety_checker" in taken:
        added["requires_safety_checker"] = False
    if "force_zeros_for_empty_prompt" in taken:
        added["force_zeros_for_empty_prompt"] = base.config.force_zeros_for_empty_prompt
    built = kind(**parts, **added)
    built.set_progress_bar_config(**getattr(base, "_progress_bar_config", {}))  # keep the user's setting
    return built
