"""A denoiser's calls: hook them, read and replace their arguments, and reject simultaneous calls."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from nexus_adapters.bases.families import inner, layers

Function = TypeVar("Function", bound=Callable[..., Any])
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
# Returns the arguments to use, or None to keep the given ones.
Before = Callable[[tuple[Any, ...], dict[str, Any]], Arguments | None]


def parameter_names(denoiser: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters of the denoiser's `forward`, in order.

    They are read from the class: compilation and offloading replace the instance's `forward` by one that
        takes
    anything. A subclass with `forward(*args, **kwargs)` has the parameters of its parent class.
    """
    names: dict[str, None] = {}
    for cls in type(inner(denoiser)).__mro__:
        if cls is nn.Module or "forward" not in vars(cls):
            continue
        parameters = list(inspect.signature(vars(cls)["forward"]).parameters.values())[1:]
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        names |= dict.fromkeys(p.name for p in named)
        if len(named) == len(parameters):
            break
    return tuple(names)


@dataclass(frozen=True)
class Call:
    """One call's arguments by name, however they were passed."""

    names: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def get(self, name: str) -> Any:
        """Return the argument, or None if it was not passed."""
        if name in self.kwargs or name not in self.names:
            return self.kwargs.get(name)
        index = self.names.index(name)
        return self.args[index] if index < len(self.args) else None

    def replace(self, name: str, value: Any) -> Arguments:
        """Return the call's arguments with one replaced or added."""
        index = self.names.index(name)
        if index < len(self.args):
            return (*self.args[:index], value, *self.args[index + 1 :]), dict(self.kwargs)
        return self.args, {**self.kwargs, name: value}


class CallGuard:
    """Rejects a call in one thread while a call in another thread is running."""

    def __init__(self, denoiser: nn.Module) -> None:
        self._denoiser = denoiser
        self._lock = threading.Lock()
        self._caller: threading.Thread | None = None

    def enter(self) -> None:
        """Begin a call. Raises `RuntimeError` if another thread is in a call."""
        me = threading.current_thread()
        with self._lock:
            # A caller that is no longer inside was interrupted, so its final hook never ran.
            if self._caller is not None and self._caller is not me and self._is_inside(self._caller):
                raise RuntimeError(
                    f"two simultaneous calls of one denoiser with controls: thread {self._caller.name} is in "
                    f"a call while thread {me.name} starts one. Run the generations one after the other, or "
                    "use a separate denoiser for each thread"
                )
            self._caller = me

    def _is_inside(self, thread: threading.Thread) -> bool:
        """Return whether the thread is in a method of the denoiser; only needed before an error."""
        frame = sys._current_frames().get(thread.ident or 0)
        while frame is not None:
            if frame.f_locals.get("self") is self._denoiser:
                return True
            frame = frame.f_back
        return False

    def leave(self) -> None:
        """End this thread's call, if it is in one."""
        with self._lock:
            if self._caller is threading.current_thread():
                self._caller = None


@dataclass(frozen=True, eq=False)
class CallHooks:
    """The functions that one attachment, `owner`, runs before and after every call of a denoiser."""

    owner: Any
    before: Before
    after: Callable[[], None]


# Held while hooks are added or removed: PyTorch's counter for hooks is not thread-safe, and of two hooks with
# one number the later replaces the earlier.
CHANGING_HOOKS = threading.Lock()


def hook_calls(denoiser: nn.Module, hooks: CallHooks) -> Callable[[], None]:
    """Run `hooks` around every call of `denoiser`; return a function that removes them without a trace.

    All attachments to a denoiser, from all threads, share one hook, which the first one installs and the last
    one removes: PyTorch looks up hooks one by one during a call, and hooks that another thread removes
        meanwhile
    would be called with the wrong arguments.

    The hook is registered on the object that is called: on the result of `torch.compile` itself, not on the
    module inside, where it would be compiled too. `denoiser.compile()` compiles hooks as well, so its
    compiled call is wrapped instead.
    """
    with CHANGING_HOOKS:
        shared = _shared_hook(denoiser)
        shared.hooks = (*shared.hooks, hooks)
        if len(shared.hooks) == 1:
            shared.install()

    def remove() -> None:
        with CHANGING_HOOKS:
            shared.hooks = tuple(each for each in shared.hooks if each is not hooks)
            if not shared.hooks:
                shared.uninstall()

    return remove


def owners_of_hooks(denoiser: nn.Module) -> list[Any]:
    """Return the attachments to a denoiser and to the modules that it wraps."""
    with CHANGING_HOOKS:
        found = [hook for module in layers(denoiser) for hook in _installed_hooks(module)]
    return [hooks.owner for hook in found for hooks in hook.hooks]


def _shared_hook(denoiser: nn.Module) -> _SharedHook:
    """Return the installed hook, or a new one."""
    compiled = getattr(denoiser, "_compiled_call_impl", None)
    kind = _ModuleHook if compiled is None else _CompiledCallHook
    found = (hook for hook in _installed_hooks(denoiser) if isinstance(hook, kind))
    return next(found, None) or kind(denoiser)


def _installed_hooks(module: nn.Module) -> list[_SharedHook]:
    candidates = (*module._forward_pre_hooks.values(), getattr(module, "_compiled_call_impl", None))
    return [hook for hook in candidates if isinstance(hook, _SharedHook)]


def _not_compiled(function: Function) -> Function:
    """Let the compiler skip the function if a denoiser is compiled together with its hooks."""
    disable: Any = torch.compiler.disable
    has_reason = "reason" in inspect.signature(disable).parameters  # from torch 2.7
    reason = "attached controls run outside of the compiled denoiser"
    skipped: Function = disable(function, **({"reason": reason} if has_reason else {}))
    return skipped


class _SharedHook:
    """One hook for all attachments to a denoiser. The tuple `hooks` is replaced as a whole."""

    def __init__(self, denoiser: nn.Module) -> None:
        # Not named "unet" or "transformer": running pipelines are found by an attribute of this name.
        self.denoiser = denoiser
        self.hooks: tuple[CallHooks, ...] = ()

    def install(self) -> None:
        raise NotImplementedError

    def uninstall(self) -> None:
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Reject copies: their controls could not be removed, and without controls they would differ."""
        raise RuntimeError(
            "a denoiser with attached controls cannot be copied or pickled; remove them first with "
            "handle.remove(), or by leaving the `with attach(...)` block"
        )


class _ModuleHook(_SharedHook):
    """A PyTorch forward pre-hook and forward hook."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__(denoiser)
        self._handles: tuple[Any, ...] = ()

    def install(self) -> None:
        self._handles = (
            self.denoiser.register_forward_pre_hook(self, with_kwargs=True),
            self.denoiser.register_forward_hook(self.after, always_call=True),
        )

    def uninstall(self) -> None:
        for handle in self._handles:
            handle.remove()

    @_not_compiled
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> Arguments | None:
        """Run before the call. PyTorch passes no `kwargs` if another thread has just removed the hook."""
        hooks = self.hooks
        if kwargs is None or not hooks:
            return None
        for each in hooks:
            args, kwargs = each.before(args, kwargs) or (args, kwargs)
        return args, kwargs

    @_not_compiled
    def after(self, *_: object) -> None:
        """Run after the call, also after an exception."""
        for each in self.hooks:
            each.after()


class _CompiledCallHook(_SharedHook):
    """Replaces the compiled call of a denoiser after `denoiser.compile()`."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__(denoiser)
        self.compiled: Any = denoiser._compiled_call_impl

    def install(self) -> None:
        self.denoiser._compiled_call_impl = self

    def uninstall(self) -> None:
        if self.denoiser._compiled_call_impl is self:  # otherwise it has been compiled again
            self.denoiser._compiled_call_impl = self.compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hooks = self.hooks
        try:
            for each in hooks:
                args, kwargs = each.before(args, kwargs) or (args, kwargs)
            return self.compiled(*args, **kwargs)
        finally:
            for each in hooks:
                each.after()
