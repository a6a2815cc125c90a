"""Registries of what users can add: blocks, methods, bases, conditions, metrics.

An entry comes from the package, from a module that the user imported, or, if it is looked up by name, from an
entry point of an installed package. Nothing else is ever imported for a name.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, TypeVar

from nexus_adapters.errors import InvalidArgument, renamed

T = TypeVar("T")
Entry = TypeVar("Entry")

IMPORT_HINT = (
    "If your own module registers it, import that module first: `import MODULE` in Python, --import MODULE "
    'on the command line, imports = ["MODULE"] in a recipe'
)


class Registry(Mapping[str, T]):
    """A mapping of name -> entry.

    Args:
        what: what an entry is called in errors: "block", "method", "base".
        group: the group of entry points with which installed packages add entries.
        check: called with every new entry; raises `InvalidArgument` if it is not valid.
    """

    def __init__(self, what: str, group: str, check: Callable[[Any], None] | None = None) -> None:
        self._what = what
        self._group = group
        self._check = check
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Return a decorator that adds an entry. `InvalidArgument` if the name is taken."""
        if not name:
            raise InvalidArgument("name", f"a name for a {self._what}", repr(name))

        def add(entry: Entry) -> Entry:
            self.add(name, entry)
            return entry

        return add

    def add(self, name: str, entry: Any) -> None:
        """Add an entry. Adding the same one again, as when a notebook cell runs twice, replaces it."""
        if self._check is not None:
            self._check(entry)
        before = self._entries.get(name)
        if before is not None and _home(before) != _home(entry):
            raise InvalidArgument(
                "name", f"a new name for a {self._what}", f"{name!r}, which is {_home(before)}"
            )
        self._entries[name] = entry

    @contextmanager
    def temporary(self) -> Iterator[None]:
        """Undo all registrations of the block when it ends, for tests and notebooks.

        Entries of installed packages stay available.
        """
        before = dict(self._entries)
        try:
            yield
        finally:
            self._entries.clear()
            self._entries.update(before)

    def newest_first(self) -> Iterator[T]:
        """Yield the registered entries, newest first; then those of packages, imported when reached."""
        registered = list(self._entries)[::-1]
        for name in (*registered, *(name for name in self if name not in registered)):
            yield self[name]

    def find(self, name: object, argument: str) -> T:
        """Return an entry. `InvalidArgument`, named `argument`, lists the known names and how to add one."""
        if not isinstance(name, str) or name not in self:
            known = ", ".join(self)
            raise InvalidArgument(argument, f"a known {self._what} ({known})", repr(name), IMPORT_HINT)
        with renamed({"name": argument}):
            return self[name]

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            self.add(name, self._load(name))
        return self._entries[name]

    def _load(self, name: str) -> T:
        """Load the entry of an installed package. `KeyError` if no package has this name."""
        points = [point for point in _installed(self._group) if point.name == name]
        if not points:
            raise KeyError(name)
        if len({point.value for point in points}) > 1:
            shown = ", ".join(sorted(point.value for point in points))
            raise InvalidArgument("name", f"one installed package with a {self._what} {name!r}", shown)
        try:
            found = points[0].load()
        except Exception as error:  # importing another package may raise anything
            raise InvalidArgument(
                "name", f"a {self._what} {name!r} that can be imported", f"{points[0].value} ({error})"
            ) from error
        return self._entry_of(points[0], found)

    def _entry_of(self, point: EntryPoint, found: Any) -> T:
        """Convert what an installed package offers into an entry; subclasses may check or convert it."""
        entry: T = found
        return entry

    def _installed_names(self) -> set[str]:
        """Return the names that installed packages add, without importing them."""
        return {point.name for point in _installed(self._group)}

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._installed_names()

    def __iter__(self) -> Iterator[str]:
        yield from self._entries
        yield from sorted(self._installed_names() - set(self._entries))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _installed(group: str) -> tuple[EntryPoint, ...]:
    """Return the entry points of a group, from a cache unless the installed packages have changed."""
    changed = []
    for folder in sys.path:
        with suppress(OSError):
            changed.append((folder, os.stat(folder or ".").st_mtime_ns))
    return _search(group, tuple(changed))


@lru_cache(maxsize=32)  # a search takes 20 ms, and registries are used often
def _search(group: str, _folders: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=group))


def import_modules(names: Iterable[str], argument: str) -> None:
    """Import the user's modules, which register their entries.

    Args:
        names: names of modules, which may be in the working directory, or .py files.
        argument: the argument with which the user gave them, for errors.

    Raises:
        InvalidArgument: for a module that does not exist, or that raises an error while it is imported.
    """
    for name in names:
        try:
            if name.endswith(".py"):
                _import_file(Path(name))
            else:
                here = str(Path.cwd())
                if here not in sys.path:
                    sys.path.append(here)
                import_module(name)
        except InvalidArgument as error:  # from a registration, or about the file itself
            raise error.with_name(argument) if error.name == "module" else error from None
        except (Exception, SystemExit) as error:  # a user's module may raise anything
            raise InvalidArgument(
                argument, "a module that can be imported", f"'{name}' ({type(error).__name__}: {error})"
            ) from error


def _import_file(file: Path) -> None:
    name, path = file.stem, file.resolve()
    known = sys.modules.get(name)
    other = find_spec(name) if known is None else None
    if other is not None and Path(other.origin or "").resolve() != path:
        hint = f"It would hide the module {name!r}; rename the file"
        raise InvalidArgument("module", "a .py file with a unique name", f"'{file}'", hint)
    if known is not None and Path(getattr(known, "__file__", None) or "").resolve() == path:
        return
    spec = spec_from_file_location(name, path)
    if known is not None or spec is None or spec.loader is None or not path.is_file():
        taken = f", but another module {name!r} is already imported" if known is not None else ""
        raise InvalidArgument("module", "a .py file", f"'{file}'{taken}")
    module = module_from_spec(spec)
    sys.modules[name] = module  # before it runs, as Python's own import does
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def defined_alike(first: object, second: object) -> bool:
    """Return whether two functions have the same module and qualified name; lambdas never do."""
    places = [
        (getattr(each, "__module__", ""), getattr(each, "__qualname__", "<lambda>"))
        for each in (first, second)
    ]
    return places[0] == places[1] and not places[0][1].endswith("<lambda>")


def source_of(call: Callable[..., object]) -> str:
    """Return the source of the module that defines a function, else of the function, else its name."""
    module = sys.modules.get(str(getattr(call, "__module__", "")))
    for known in (module, call):
        try:
            if known is not None:
                return inspect.getsource(known)
        except (OSError, TypeError):  # a notebook's module has no file, a callable object no source
            continue
    return str(getattr(call, "__qualname__", type(call).__qualname__))


def _home(entry: Any) -> str:
    """Return where an entry was defined, which is the same for one that is defined again.

    For an instance, this is its class; for an instance with its own `repr`, such as a dataclass, its content.
    """
    kind = entry if hasattr(entry, "__qualname__") else type(entry)
    if kind is entry or kind.__repr__ is object.__repr__:
        return f"{kind.__module__}.{kind.__qualname__}"
    return repr(entry)
