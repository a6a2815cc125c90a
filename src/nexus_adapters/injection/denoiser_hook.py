"""A denoiser's calls: hooking them, reading and replacing their arguments, and refusing two at once."""

import inspect
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
# Like PyTorch's pre-hook with keywords: returns the arguments to use, or None for the ones it was given.
Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Arguments | None]
After = Callable[..., None]


def parameter_names(denoiser: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of the denoiser's `forward`, in order.

    Of the class: compilation and offloading replace the instance's `forward` by one that takes anything.
    """
    inner: nn.Module = getattr(denoiser, "_orig_mod", denoiser)
    return tuple(inspect.signature(type(inner).forward).parameters)[1:]


@dataclass(frozen=True)
class Call:
    """One call's arguments by name, however they were passed."""

    names: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def get(self, name: str) -> Any:
        """The argument; None if it was not passed."""
        if name in self.kwargs or name not in self.names:
            return self.kwargs.get(name)
        index = self.names.index(name)
        return self.args[index] if index < len(self.args) else None

    def replace(self, name: str, value: Any) -> Arguments:
        """The call's arguments with one of them replaced or added; all others as they were passed."""
        index = self.names.index(name)
        if index < len(self.args):
            return (*self.args[:index], value, *self.args[index + 1 :]), dict(self.kwargs)
        return self.args, {**self.kwargs, name: value}


class CallGuard:
    """Refuses a call that starts in one thread while another thread's is running."""

    def __init__(self, denoiser: nn.Module) -> None:
        self._denoiser = denoiser
        self._lock = threading.Lock()
        self._caller: threading.Thread | None = None

    def enter(self) -> None:
        """Begin a call; RuntimeError where another thread is in one."""
        me = threading.current_thread()
        with self._lock:
            # Leftovers are from calls that were interrupted, past which no hook runs.
            if self._caller is not None and self._caller is not me and self._is_inside(self._caller):
                raise RuntimeError(
                    f"two calls at once through one attached denoiser: thread {self._caller.name} is in a "
                    f"call while {me.name} starts one. Controls follow one generation at a time; run one "
                    "after the other, or attach to a denoiser for each thread"
                )
            self._caller = me

    def _is_inside(self, thread: threading.Thread) -> bool:
        """Whether the thread is in a method of the denoiser: asked only before a call is refused."""
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


def hook_calls(denoiser: nn.Module, before: Before, after: After) -> Callable[[], None]:
    """Run `before` and `after` around every call of `denoiser`; returns what removes them, without a trace.

    The hooks go on the object that is called: around a `torch.compile`d denoiser, not on the one inside,
    where they would be compiled with it. `denoiser.compile()` compiles hooks too: there its compiled call is
    wrapped.
    """
    compiled = getattr(denoiser, "_compiled_call_impl", None)
    if compiled is not None:
        wrapper = compiled if isinstance(compiled, _HookedCall) else _HookedCall(denoiser, compiled)
        return wrapper.add(before, after)
    handles = (
        denoiser.register_forward_pre_hook(before, with_kwargs=True),
        denoiser.register_forward_hook(after, always_call=True),
    )

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


class _HookedCall:
    """Stands in for the compiled call of a denoiser after `denoiser.compile()`, while it has hooks."""

    def __init__(self, denoiser: nn.Module, compiled: Callable[..., Any]) -> None:
        self.denoiser = denoiser  # not by a pipeline's name for it, by which running pipelines are found
        self.compiled = compiled
        self.hooks: list[tuple[Before, After]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hooks = list(self.hooks)
        try:
            for before, _ in hooks:
                args, kwargs = before(self.denoiser, args, kwargs) or (args, kwargs)
            return self.compiled(*args, **kwargs)
        finally:
            for _, after in hooks:
                after()

    def add(self, before: Before, after: After) -> Callable[[], None]:
        pair = (before, after)
        self.hooks.append(pair)
        self.denoiser._compiled_call_impl = self

        def remove() -> None:
            self.hooks.remove(pair)
            if not self.hooks:
                self.denoiser._compiled_call_impl = self.compiled

        return remove
