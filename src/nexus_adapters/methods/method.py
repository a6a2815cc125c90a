"""What a method is: how an adapter is built, loaded, trained, generated with, priced and described.

A method registers under the names that recipes, commands and tables have for it (`register_method`). Nothing
outside this package asks for an adapter's class.
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
from nexus_adapters.choices import DEFAULT_POLICY
from nexus_adapters.data.batch import Batch
from nexus_adapters.errors import InvalidArgument, expect, one_line
from nexus_adapters.methods.cost import Cost

FEATURES = "features"
"""The key under which `denoiser_arguments` gives features for the base's places."""


# What is called to generate: a pipeline, with further arguments filled in.
Generate = Callable[..., Any]


@dataclass(frozen=True)
class AdapterOptions:
    """`[adapter]`: what is trained. Each method adds options of its own."""

    method: str = "prime"
    """The name of a configuration: "prime", "slim", "prime-paper", "slim-paper", "t2i", "controlnet",
    "controlnet-xs", or one that a module of yours registers. By default that of the adapter in `start_from`,
    else "prime"."""
    start_from: str = ""
    """A saved adapter to start from: anything that `load_adapter` takes. Its architecture is taken over."""
    start_from_optimizer: bool = False
    """Also start with the optimizer's state, of a training run or checkpoint in `start_from`. The weights are
    then those that it belongs to: the checkpoint's own, not their average."""

    def identity(self) -> dict[str, Any]:
        """What decides the network and its training, the same for two ways to write it."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class GenerationSettings:
    """How a control is used while generating; as in `Control`.

    Attributes:
        scale: factor of what the adapter adds to the base.
        policy: which text a text-reading adapter reads.
        level_scales: of a Nexus adapter.
        noise_exponent: of adapters whose features can fade; None for what the adapter was trained with.
        adapter_prompts: what a text-reading adapter reads in place of the prompts that the base reads.
    """

    scale: float = 1.0
    policy: str = DEFAULT_POLICY
    level_scales: Sequence[float] | str | None = None
    noise_exponent: float | None = None
    adapter_prompts: Sequence[str] | None = None


class Method(ABC):
    """A way to control a frozen base. One instance for each name.

    Args:
        name: under which it is registered.
    """

    label: ClassVar[str]
    """In model cards and plots."""
    Options: ClassVar[type[AdapterOptions]] = AdapterOptions
    """A recipe's `[adapter]` section is validated by it."""
    settings: ClassVar[frozenset[str]] = frozenset({"scale"})
    """Which of `GenerationSettings` it reads; all others have no effect."""
    reads_prompt: ClassVar[bool] = True
    """Whether the adapter reads the prompt, so that it can be given another one than the base."""
    attaches: ClassVar[bool] = False
    """Whether it works through `Control` and `attach`; others have pipelines of their own."""
    keeps_float32: ClassVar[bool] = False
    """Whether its weights stay float32 where the base computes in less, and so need autocast."""
    classes: ClassVar[tuple[type[nn.Module], ...]] = ()
    """Of its adapters: subclasses of diffusers' `ModelMixin` and `ConfigMixin`. By them saved and loaded
    adapters are known, unless a method says otherwise."""

    def __init__(self, name: str) -> None:
        self.name = name

    # Building and loading

    @abstractmethod
    def build(self, base: Base, denoiser: nn.Module, options: Any) -> nn.Module:
        """The untrained adapter for a base, on the current default device.

        `denoiser`: the base's, perhaps on the meta device. `InvalidArgument` names an option, or "base".
        """

    def recognizes(self, saved: Saved) -> bool:
        """Whether `load` can load it. By default, what is saved of `classes`, and a run's checkpoint."""
        if saved.run:
            return trained_as(saved) == self.name
        return saved.class_name in {kind.__name__ for kind in self.classes}

    def load(self, saved: Saved) -> nn.Module:
        """The saved adapter on the CPU, in eval mode, in the precision of its files.

        By default of the class that its config names, with exactly the tensors that this needs.
        """
        kind = next((kind for kind in self.classes if kind.__name__ == saved.class_name), None)
        if kind is None and saved.config and not saved.class_name:
            kind = next(iter(self.classes), None)
        if kind is None:
            hint = "Keep config.json next to the weights"
            if saved.run:
                hint = "Use the adapter of the finished run"
            raise InvalidArgument(
                "adapter", f"a {self.label} with its config", f"'{saved.source}', without one", hint
            )
        return _from_folder(kind, saved) if saved.is_folder else _from_files(kind, saved)

    def describe(self, saved: Saved) -> dict[str, str]:
        """What `nexus info` shows of a saved adapter that this method recognizes: label -> text."""
        return {"kind": f"{self.label} ({saved.class_name})" if saved.class_name else self.label}

    def owns(self, module: nn.Module) -> bool:
        """Whether an adapter is of this method's kind. By default, an instance of `classes`."""
        return isinstance(module, self.classes)

    @abstractmethod
    def check_fit(self, module: nn.Module, base: Base) -> None:
        """`InvalidArgument` named "adapter", with both numbers, unless the adapter fits the base."""

    def check_saved(self, saved: Saved, base: Base) -> None:  # noqa: B027  # a config may not say enough
        """As `check_fit`, before the adapter is loaded: checks only what its config states."""

    def configuration(self, saved: Saved) -> str:
        """The name of the method that trains adapters like a saved one that this method recognizes."""
        return self.name

    def adopt(self, options: Any, saved: Saved) -> Any:
        """The options with the architecture of a saved adapter that training starts from.

        `InvalidArgument`, for the option, where a given one contradicts it.
        """
        return options

    def starting_tensors(self, module: nn.Module, saved: Saved) -> dict[str, Tensor]:
        """What `module` takes of a saved adapter's weights: all, of one of the same kind.

        `InvalidArgument` named "start_from" for another kind's, and where a tensor does not fit.
        """
        received = f"'{saved.source}'" + (f", a {saved.class_name}" if saved.class_name else "")
        expect(self.recognizes(saved), "start_from", f"a {self.label}", received)
        return matching_tensors(module, dict(load_with(self, saved).state_dict()), saved.source)

    # Training

    def network(self, module: nn.Module, denoiser: nn.Module) -> nn.Module:
        """What computes in a training step: the adapter, or where both only work as one network, that."""
        return module

    @property
    def is_fused(self) -> bool:
        """Whether `network` is called in place of the base's denoiser."""
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
        """The arguments that let the denoiser follow the batch's condition.

        Under the key `FEATURES` a list of features, (b, c, h, w) each, for the base's places; all others are
        arguments of the denoiser's `forward`. Dropped conditions add zeros: the module always runs, as
        training on several devices needs. `module`: `network`'s result, wrapped (DDP, compiled) or not.
        """

    # Generating

    @abstractmethod
    def generating(
        self, pipe: Any, module: nn.Module, conditions: Sequence[Image.Image], settings: GenerationSettings
    ) -> AbstractContextManager[Generate]:
        """While open, what it yields generates under the control: it is called as the base's pipeline."""

    # Cost and description

    @abstractmethod
    def cost(self, module: nn.Module, base: Base, size: int, steps: int) -> Cost:
        """Of one square image of `size` pixels a side. Counted by torch on shapes alone."""

    def card(self, module: nn.Module, base: str, source: str) -> str:
        """Python code for the model card: how to use the adapter `source` with `base`."""
        return "\n".join(
            [
                "from nexus_adapters import Control, attach, load_adapter, load_base",
                "",
                f'pipe = load_base("{base}")',
                f'adapter = load_adapter("{source}")',
                "# condition: a PIL image of the structure map",
                "with attach(pipe, Control(adapter, condition)):",
                '    image = pipe("a prompt").images[0]',
            ]
        )


def unread_settings(method: Method, settings: GenerationSettings) -> list[str]:
    """The names of settings that were changed from their defaults and that the method does not read."""
    return [
        field.name
        for field in dataclasses.fields(settings)
        if field.name not in {*method.settings, "adapter_prompts"}
        and getattr(settings, field.name) != field.default
    ]


# What loaders call the argument that names the adapter's files.
_NAMES_OF_SOURCE = ("adapter", "source", "path", "pretrained_model_name_or_path")


def load_with(method: Method, saved: Saved, dtype: torch.dtype = torch.float32) -> Any:
    """What `method.load` gives, in eval mode. Whatever goes wrong is an `InvalidArgument` named "adapter"."""
    try:
        with quiet_loading():
            loaded = method.load(saved)
    except InvalidArgument as error:
        if error.name in _NAMES_OF_SOURCE:
            raise error.with_name("adapter") from error
        # The method is the first that recognizes it: Prime and Slim recognize each other's.
        expected = f"a saved {saved.class_name or method.label}"
        raise within("adapter", expected, saved.source, error) from error
    except Exception as error:  # of odd configs and damaged files diffusers raises nearly anything
        reason = one_line(error)
        raise InvalidArgument(
            "adapter", f"a saved {method.label}", f"'{saved.source}' ({type(error).__name__}: {reason})"
        ) from error
    # diffusers' own `to` warns of parts to keep in float32: here none.
    return nn.Module.to(loaded, dtype).eval()


def trained_as(saved: Saved) -> str:
    """The method's name in the recipe of a run whose checkpoints do not have their adapter's config."""
    return str(saved.run.get("adapter", {}).get("method", AdapterOptions.method))


def matching_tensors(
    module: nn.Module, theirs: dict[str, Tensor], source: str, needed: set[str] | None = None
) -> dict[str, Tensor]:
    """`theirs`, once they have been found to be what a module needs.

    `needed`: the module's names that they must have, all of them by default. `InvalidArgument` names the
    first that does not fit.
    """
    ours = module.state_dict()
    wanted = set(ours) if needed is None else needed
    for name in sorted(wanted | set(theirs)):
        expected = f"shape {tuple(ours[name].shape)}" if name in wanted else "no such tensor"
        found = f"shape {tuple(theirs[name].shape)}" if name in theirs else "no such tensor"
        if expected != found:
            raise InvalidArgument(
                "start_from", f"an adapter whose {name} has {expected}", f"'{source}', with {found}"
            )
    return theirs


def _from_files(kind: Any, saved: Saved) -> nn.Module:
    """A model of diffusers' class `kind` from its config and any files of its tensors."""
    check_layers(saved)
    with torch.random.fork_rng(devices=()):  # what it draws is replaced
        built: nn.Module = kind.from_config({k: v for k, v in saved.config.items() if not k.startswith("_")})
    tensors = load_tensors(saved)
    check_tensors(built, tensors, saved.source, "adapter")
    # Copies: those of a file stay tied to it.
    built.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    return built.eval()


def _from_folder(kind: Any, saved: Saved) -> nn.Module:
    """A model of diffusers' class `kind` from its folder.

    diffusers itself only warns of missing and surplus tensors, and leaves what is missing without values.
    """
    check_layers(saved)
    check_types(saved.tensors, "adapter")
    loaded: nn.Module
    loaded, info = kind.from_pretrained(
        saved.path, local_files_only=True, variant=saved.file_variant, output_loading_info=True
    )
    problems = {"missing": info["missing_keys"], "surplus": info["unexpected_keys"]}
    problems["not finite"] = [
        name
        for name, tensor in loaded.state_dict().items()
        if not tensor.is_meta and not bool(torch.isfinite(tensor).all())
    ]
    for what, names in problems.items():
        found = f"'{saved.source}', where {len(names)} are {what}, such as {next(iter(names), '')}"
        expect(not names, "adapter", f"the tensors of a {kind.__name__}, all finite", found)
    return loaded.eval()


def inner(module: nn.Module | Any) -> Any:
    """The adapter inside what wraps it: `torch.compile`, DistributedDataParallel."""
    while True:
        if hasattr(module, "_orig_mod"):
            module = module._orig_mod
        elif isinstance(module, nn.parallel.DistributedDataParallel):
            module = module.module
        else:
            return module


def other_pipeline(kind: Any, base: Any, **added: object) -> Any:
    """A diffusers pipeline of another class with the base's parts, as far as it takes them."""
    import inspect

    taken = inspect.signature(kind).parameters
    parts = {name: part for name, part in base.components.items() if name in taken}
    if "requires_safety_checker" in taken:
        added["requires_safety_checker"] = False
    if "force_zeros_for_empty_prompt" in taken:
        added["force_zeros_for_empty_prompt"] = base.config.force_zeros_for_empty_prompt
    built = kind(**parts, **added)
    built.set_progress_bar_config(**getattr(base, "_progress_bar_config", {}))  # as the user has it
    return built
