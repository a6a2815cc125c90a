"""The registry of blocks: what an adapter computes at each level, by the name in its config.

    from nexus_adapters.adapter.stage import Stage
    from nexus_adapters.adapter.blocks import register_block

    @register_block("gate")
    class Gate(Stage):
        def __init__(self, *, channels, gain: float = 2.0, **stage):
            super().__init__(channels=channels, **stage)
            ...

    NexusAdapter.for_unet(unet, block="gate", block_options={"gain": 1.0})

A config names its block and never imports anything: import the block's module before you load the adapter.
An installed package offers its blocks in its pyproject.toml:

    [project.entry-points."nexus_adapters.blocks"]
    gate = "my_package.blocks:Gate"
"""

import inspect
import json
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from torch import nn

from nexus_adapters.errors import InvalidArgument, expect
from nexus_adapters.registry import Registry

ARGUMENTS = (
    "in_channels",
    "channels",
    "pools",
    "groups",
    "text_width",
    "heads",
    "head_width",
    "residual",
    "zero_init",
)
"""The keyword arguments of every block's constructor, as in `Stage`."""

LEVEL_ARGUMENTS = ("level", "levels")
"""Passed to blocks that accept them: the index of the level, from 0, and the number of levels."""

Block = TypeVar("Block", bound=type[nn.Module])


def register_block(name: str) -> Callable[[Block], Block]:
    """Register a class as a block, so that `NexusAdapter(block=name)` builds its levels from it. A decorator.

    The class is a subclass of `Stage`, or any `nn.Module` whose constructor takes `ARGUMENTS` by keyword and
    whose `forward(x, prompt_embeds)` maps (B, in_channels, H, W) and (B, N, text_width) to
    (B, channels, H', W'), where each of `pools` poolings halves H and W, rounding up. Further keywords are
    the block's options, `block_options` in the config: JSON values, checked against their annotations. A
    constructor that accepts `level` and `levels` gets these as well.

    Running the same definition again, as in a notebook, replaces the class.

    Raises:
        InvalidArgument: if another class has this name, or the class does not fit.
    """
    return BLOCKS.register(name)


def find_block(name: str) -> type[nn.Module]:
    """Return the class registered under a name, or offered by an installed package under it.

    Raises:
        InvalidArgument: for an unknown name; the hint says how to import the module that registers it.
    """
    return BLOCKS.find(name, "block")


def checked_options(name: str, block: type[nn.Module], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options for the block's constructor; lists become tuples if the annotation says so.

    Raises:
        InvalidArgument: for values that are not JSON, unknown or missing options, and values whose type does
            not match the constructor's annotation; the error lists the block's options.
    """
    own = {
        option: parameter
        for option, parameter in constructor_keywords(block).items()
        if option not in (*ARGUMENTS, *LEVEL_ARGUMENTS)
    }
    listed = ", ".join(map(str, own.values()))
    expected = f"the options of block {name!r}: {listed}" if own else f"no options for block {name!r}"
    given = as_json(options)
    for option, value in given.items():
        expect(option in own, "block_options", expected, f"{option}={value!r}")
        expect(_fits(value, own[option].annotation), "block_options", expected, f"{option}={value!r}")
    needed = [option for option, parameter in own.items() if parameter.default is parameter.empty]
    missing = ", ".join(option for option in needed if option not in given)
    expect(not missing, "block_options", expected, repr(given), f"Also give {missing}")
    return {
        option: tuple(value) if _kind(own[option].annotation) is tuple else value
        for option, value in given.items()
    }


def as_json(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options as they are after saving and loading. `InvalidArgument` if JSON cannot hold them."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(options), allow_nan=False))
    except (TypeError, ValueError) as error:
        reason = f"{dict(options)!r} ({error})"
        raise InvalidArgument("block_options", "a dict of JSON values", reason) from error
    return plain


def constructor_keywords(cls: type) -> dict[str, inspect.Parameter]:
    """Return the parameters that can be passed to a class by keyword.

    If its constructor takes `**kwargs`, those of the next class in the method resolution order are included.
    """
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = list(_signature(vars(base)["__init__"]).parameters.values())[1:]
            found = {p.name: p for p in parameters if p.kind in _BY_KEYWORD} | found
            if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters):
                break
    return found


_BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(function, eval_str=True)
    except (NameError, AttributeError):  # annotations with names that only type checkers know
        return inspect.signature(function)


def _check_block(block: Any) -> None:
    is_class = isinstance(block, type)
    shown = f"{block.__module__}.{block.__qualname__}" if is_class else repr(block)
    is_module = is_class and issubclass(block, nn.Module)
    expect(is_module, "block", "a subclass of torch.nn.Module", shown)
    parameters = inspect.signature(block.__init__).parameters.values()
    if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        lacking = [name for name in ARGUMENTS if name not in constructor_keywords(block)]
        expected = f"a constructor with the keywords {', '.join(ARGUMENTS)}"
        expect(not lacking, "block", expected, f"{shown}, which lacks {', '.join(lacking)}")


BLOCKS: Registry[type[nn.Module]] = Registry("block", "nexus_adapters.blocks", _check_block)


def _kind(annotation: Any) -> Any:
    return get_origin(annotation) or annotation


def _fits(value: Any, annotation: Any) -> bool:
    """Return whether a JSON value matches an annotation of plain types; other annotations accept anything."""
    kind, parts = _kind(annotation), get_args(annotation)
    if kind in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if kind in (list, tuple, Sequence):
        if not isinstance(value, list):
            return False
        if kind is tuple and parts and parts[-1] is not Ellipsis:
            return len(value) == len(parts) and all(map(_fits, value, parts))
        return not parts or all(_fits(element, parts[0]) for element in value)
    if kind in (dict, Mapping):
        return isinstance(value, dict)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (bool, str, types.NoneType):
        return isinstance(value, kind)
    return value is None if annotation is None else True
