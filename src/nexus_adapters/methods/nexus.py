"""Nexus adapters (arXiv 2602.14514): Prime and Slim, with a residual connection or as in the paper."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nexus_adapters.adapter.arguments import (
    ARGUMENTS,
    OPTIONAL_ARGUMENTS,
    VARIANTS,
    base_geometry,
    check_noise_exponent,
    describe_adapter,
    shown,
    variant_arguments,
    variant_of,
)
from nexus_adapters.adapter.formats import build_adapter, import_adapter
from nexus_adapters.adapter.model import NexusAdapter
from nexus_adapters.adapter.saved import Saved, check_nexus, find_saved, within
from nexus_adapters.adapter.tensors import tensor_names, trunk_tensors
from nexus_adapters.bases.base import Base
from nexus_adapters.bases.loading import BaseSource, open_base
from nexus_adapters.choices import CONDITION
from nexus_adapters.errors import InvalidArgument, expect
from nexus_adapters.methods.feature_method import FeatureMethod, stem_fitted
from nexus_adapters.methods.method import (
    AdapterOptions,
    load_with,
    matching_tensors,
    trained_as,
)
from nexus_adapters.methods.registry import find_method, method_for, register_method

_MOST = 4096  # groups, heads, channels per head: a larger number is a mistake


@dataclass(frozen=True)
class NexusOptions(AdapterOptions):
    """The `[adapter]` section for a Nexus adapter. Defaults follow from the method's name and the base."""

    residual: bool | None = None
    """A residual connection around the attention of each stage. Default: true for "prime" and "slim", false
    for "prime-paper" and "slim-paper"."""
    zero_init: bool | None = None
    """Initialize the attention's output projection to zero; needs `residual`. Default: the value of the Nexus
    adapter in `start_from`; true if `start_from` is a T2I-Adapter, so that Prime starts with its output; else
    false."""
    groups: int = 0
    """Number of groups in Slim's 3x3 convolutions; 0 for the paper's number."""
    heads: int = 0
    """Number of attention heads; 0 to derive it from the base's widths."""
    head_width: int = 0
    """Channels per attention head; 0 to derive it from the base's widths."""
    noise_exponent: float | None = None
    """In each step, features are multiplied by the noise's share of the latents' variance to this power.
    Default: the value of the adapter in `start_from`, else 0, as in the paper."""
    reads_prompt: bool = True
    """False trains an adapter that always reads the empty prompt, to measure what reading the prompt adds."""
    block: str = ""
    """The name of the registered block that computes each stage; empty for the paper's block."""
    block_options: dict[str, Any] = field(default_factory=dict)
    """Options of that block."""
    train: Literal["all", "attention"] = "all"
    """Which weights are trained. "attention" trains the attention and its LayerNorm, and keeps the
    convolutions of the adapter in `start_from`, which it needs."""

    def __post_init__(self) -> None:
        """Check the options that depend on each other."""
        form = variant_arguments(self.method, {} if self.residual is None else {"residual": self.residual})
        expect(form["residual"] or not self.zero_init, "zero_init", "false if residual is false", True)
        starts = "'all' without start_from, since untrained convolutions would stay as they are"
        expect(self.train == "all" or bool(self.start_from), "train", starts, repr(self.train))
        for name in ("groups", "heads", "head_width"):
            fits = 0 <= getattr(self, name) <= _MOST
            expect(fits, name, f"an integer from 0 to {_MOST}", shown(getattr(self, name)))
        is_slim = form["groups"] > 1
        expect(is_slim or self.groups == 0, "groups", f"0 for method {self.method}", self.groups)
        expect(self.groups != 1, "groups", f"0, or 2 or more, for method {self.method}", self.groups)
        if self.noise_exponent is not None:
            check_noise_exponent(self.noise_exponent)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `NexusAdapter` that the options set."""
        found: dict[str, Any] = dict(variant_arguments(self.method))
        given = {
            "residual": self.residual,
            "zero_init": self.zero_init,
            "noise_exponent": self.noise_exponent,
            "groups": self.groups or None,
            "heads": self.heads or None,
            "head_width": self.head_width or None,
            "block": self.block or None,
            "block_options": self.block_options or None,
        }
        return found | {name: value for name, value in given.items() if value is not None}

    def identity(self) -> dict[str, Any]:
        """Return the options that decide the network and its training, in a canonical form.

        For example, `prime-paper` becomes `prime` with `residual = false`.
        """
        found = dataclasses.asdict(self)
        found["method"] = self.method.removesuffix("-paper")
        found["residual"] = self.arguments["residual"]
        found["zero_init"] = bool(self.zero_init)
        if self.noise_exponent is None and not self.start_from:  # else that adapter decides
            found["noise_exponent"] = 0.0
        found["block"] = self.block or "paper"
        return found


class NexusMethod(FeatureMethod):
    """A configuration of the Nexus adapter: prime, slim, prime-paper or slim-paper."""

    Options = NexusOptions

    @property
    def label(self) -> str:  # type: ignore[override]  # depends on the name
        """The configuration's name in model cards, such as "Nexus Prime"."""
        variant, _, form = self.name.partition("-")
        return f"Nexus {variant.capitalize()}" + (" (paper configuration)" if form else "")

    def build(self, base: Base, denoiser: nn.Module, options: NexusOptions) -> nn.Module:
        """Build a `NexusAdapter` for the base's shapes, with gradients for what `options.train` names."""
        built: Any = NexusAdapter.for_geometry(base_geometry(base), options.method, **options.arguments)
        module: nn.Module = built
        if options.train == "attention":
            trained = {name for name, _ in module.named_parameters() if _reads_text(name)}
            expected = "'all' for a block without norm1 and cross_attention"
            expect(bool(trained), "train", expected, f"{options.train!r} with block {options.block!r}")
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(name in trained)
        return module

    def recognizes(self, saved: Saved) -> bool:
        """Recognize our adapters and checkpoints, imported subclasses, and the paper's public release."""
        if saved.run:
            return trained_as(saved) in VARIANTS
        if saved.class_name:
            return saved.class_name in _classes()
        return saved.is_nexus or any(".cross_attention." in name for name in tensor_names(saved))

    def load(self, saved: Saved) -> nn.Module:
        """Load the adapter; check every tensor, and never unpickle code."""
        kind = _classes().get(saved.class_name, NexusAdapter)
        if saved.is_checkpoint:
            built: Any = build_adapter(saved, saved.config or _config_of_run(saved), kind)
            return built  # type: ignore[no-any-return]
        if not _is_ours(saved):
            imported: Any = import_adapter(saved).adapter
            return imported  # type: ignore[no-any-return]
        if saved.class_name and saved.is_folder and saved.files[0].suffix == ".safetensors":
            adapter: nn.Module = kind.from_pretrained(
                saved.path, local_files_only=True, variant=saved.file_variant, use_safetensors=True
            )
            return adapter.eval()
        built = build_adapter(saved, saved.config, kind)
        return built  # type: ignore[no-any-return]

    def describe(self, saved: Saved) -> dict[str, str]:
        """Describe the adapter by its config, or by the recipe of its run if it has no config."""
        if saved.run:
            residual = bool(saved.run.get("adapter", {}).get("residual", False))  # as in `_config_of_run`
            groups = VARIANTS[trained_as(saved)]["groups"]
            return {"kind": find_method(variant_of(groups, residual)).label}
        if not _is_ours(saved):
            return {"kind": "Nexus adapter of the public release"}
        if saved.class_name in ("", "NexusAdapter"):
            return describe_adapter(check_nexus(saved))
        config = {**OPTIONAL_ARGUMENTS, **saved.config}
        return {"kind": saved.class_name} | (
            describe_adapter(config) if set(ARGUMENTS) <= set(config) else {}
        )

    def owns(self, module: nn.Module) -> bool:
        """Return whether `module` is a `NexusAdapter` of this configuration."""
        return isinstance(module, NexusAdapter) and module.variant == self.name

    def configuration(self, saved: Saved) -> str:
        """Return the configuration in the saved config; all four configurations recognize any of them."""
        return _configuration(_saved_config(saved))

    def adopt(self, options: NexusOptions, saved: Saved) -> NexusOptions:
        """Take over what the options leave open of a saved Nexus adapter (not of a T2I-Adapter)."""
        method = method_for(saved)
        if not isinstance(method, NexusMethod):
            if options.zero_init is None and options.arguments["residual"] and method.attaches:
                return dataclasses.replace(options, zero_init=True)
            return options
        config = _saved_config(saved)
        form = variant_arguments(
            options.method, {} if options.residual is None else {"residual": options.residual}
        )
        theirs = {"residual": bool(config.get("residual", False)), "groups": int(config.get("groups", 1))}
        name = _configuration(config)
        same_variant = (form["groups"] > 1) == (theirs["groups"] > 1)
        by_name = options.residual is None or not same_variant
        expect(
            same_variant and form["residual"] == theirs["residual"],
            "method" if by_name else "residual",
            f"{name!r} (residual={str(theirs['residual']).lower()}), as in '{saved.source}'",
            repr(options.method) if by_name else str(options.residual).lower(),
        )
        found: dict[str, Any] = {}
        for key, default in (("groups", 1), ("heads", 0), ("head_width", 0), ("block", "paper")):
            given, saved_value = getattr(options, key), config.get(key, default)
            contradicts = bool(given) and given != saved_value
            expect(not contradicts, key, f"{saved_value}, as in '{saved.source}'", given)
            found[key] = saved_value if key != "groups" or theirs["groups"] > 1 else 0
        given, saved_value = options.block_options, dict(config.get("block_options") or {})
        expect(
            not given or given == saved_value,
            "block_options",
            f"{saved_value}, as in '{saved.source}'",
            given,
        )
        found["block_options"] = saved_value
        if options.noise_exponent is None:
            found["noise_exponent"] = float(config.get("noise_exponent", 0.0))
        if options.zero_init is None:  # a run that resumes exports what it would have without a break
            found["zero_init"] = bool(config.get("zero_init", False))
        return dataclasses.replace(options, residual=bool(theirs["residual"]), **found)

    def starting_tensors(self, module: Any, saved: Saved) -> dict[str, Tensor]:
        """Return all tensors of a Nexus adapter, or the trunk of a T2I-Adapter.

        With a T2I-Adapter, the norms and the attention keep their initial values. Prime's trunk is the
        T2I-Adapter's; Slim's is the nearest fit to it, which is reported.
        """
        method = method_for(saved)
        received = f"'{saved.source}', a {method.label}"
        expect(method.attaches, "start_from", "a Nexus adapter or a T2I-Adapter", received)
        theirs = stem_fitted(load_with(method, saved), module, saved.source)
        only_trunk = not isinstance(method, NexusMethod)
        if only_trunk and module.config["groups"] > 1:
            theirs = trunk_tensors(theirs, module.config["groups"])
            warnings.warn(
                f"start_from: Slim's convolutions cannot represent all of the T2I-Adapter's in "
                f"'{saved.source}'. It starts from the least-squares fit, whose features differ",
                UserWarning,
                stacklevel=2,
            )
        needed = {name for name in module.state_dict() if not (only_trunk and _reads_text(name))}
        return matching_tensors(module, theirs, saved.source, needed)


def _reads_text(name: str) -> bool:
    """Whether a weight belongs to the attention or its LayerNorm, which a T2I-Adapter does not have."""
    return ".norm1." in name or ".cross_attention." in name


def _classes() -> dict[str, Any]:
    """Return `NexusAdapter` and its imported subclasses, by name."""
    found: dict[str, Any] = {}
    waiting: list[Any] = [NexusAdapter]
    while waiting:
        kind = waiting.pop(0)  # in order of definition: a notebook cell that is run again replaces the class
        found[kind.__name__] = kind
        waiting += kind.__subclasses__()
    return found


def _is_ours(saved: Saved) -> bool:
    """Return whether its config describes the network; the public release's config does not."""
    return saved.is_nexus or saved.class_name not in ("", "NexusAdapter")


def _saved_config(saved: Saved) -> dict[str, Any]:
    """Return the full config of a saved Nexus adapter, wherever its files keep it."""
    if saved.run:
        return _config_of_run(saved)
    return dict(saved.config) if _is_ours(saved) else dict(import_adapter(saved).adapter.config)


def _configuration(config: Mapping[str, Any]) -> str:
    """Return the name of an adapter's configuration."""
    return variant_of(int(config.get("groups", 1)), bool(config.get("residual", False)))


def _config_of_run(saved: Saved) -> dict[str, Any]:
    """Return the adapter's config from its run's recipe, for checkpoints that have no config."""
    section: Mapping[str, Any] = saved.run.get("adapter", {})
    place: Mapping[str, Any] = saved.run.get("base", {})
    source = BaseSource(**{key: str(place[key]) for key in ("path", "revision", "variant") if key in place})
    try:
        base = open_base(source)
    except InvalidArgument as error:
        raise InvalidArgument(
            "adapter", f"a checkpoint whose base is available (base: {error.expected})", error.received
        ) from error
    # Old recipes: before the configurations had names, `residual` was false by default.
    known = {f.name for f in dataclasses.fields(NexusOptions)}
    options = NexusOptions(**{"residual": False, **{k: v for k, v in section.items() if k in known}})
    if options.start_from:  # the run took over that adapter's architecture
        condition = saved.run.get("data", {}).get("condition", CONDITION)
        try:
            start = find_saved(options.start_from, str(condition), source.path)
            options = find_method(options.method).adopt(options, start)
        except InvalidArgument as error:
            expected = "a checkpoint whose run started from an adapter that is available and fits its recipe"
            raise within("adapter", expected, options.start_from, error) from error
    with torch.device("meta"):
        built = NexusAdapter.for_geometry(base_geometry(base), options.method, **options.arguments)
    return dict(built.config)


for _name in VARIANTS:
    register_method(NexusMethod(_name))
