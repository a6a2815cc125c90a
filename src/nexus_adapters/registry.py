"""Registries of what users can add: blocks, methods, bases, conditions, metrics.

An entry comes from the package, from a module that the user imported, or, when it is looked up by name, from
an entry point of an installed package. Nothing else is ever imported for a name.
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
    "If a module of yours registers it, import that module first: `import MODULE` in Python, --import MODULE "
    'on the command line, imports = ["MODULE"] in a recipe'
)


class Registry(Mapping[str, T]):
    """Name -> entry.

    Args:
        what: one entry is, as in error messages: "block", "method", "base".
        group: of the entry points by which installed packages add some.
        check: called with every new entry; raises `InvalidArgument` for what is none.
    """

    def __init__(self, what: str, group: str, check: Callable[[Any], None] | None = None) -> None:
        self._what = what
        self._group = group
        self._check = check
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Decorator: add an entry. `InvalidArgument` where the name is taken by something else."""
        if not name:
            raise InvalidArgument("name", f"a name for a {self._what}", repr(name))

        def add(entry: Entry) -> Entry:
            self.add(name, entry)
            return entry

        return add

    def add(self, name: str, entry: Any) -> None:
        """Add an entry; the same one again, as when a notebook's cell is run twice, replaces the former."""
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
        """A context after which the registry is as it was before: what was registered inside is forgotten.

        For tests and notebooks. Entries of installed packages stay available.
        """
        before = dict(self._entries)
        try:
            yield
        finally:
            self._entries.clear()
            self._entries.update(before)

    def newest_first(self) -> Iterator[T]:
        """The registered entries from the last to the first; then, each imported when reached, the others."""
        registered = list(self._entries)[::-1]
        for name in (*registered, *(name for name in self if name not in registered)):
            yield self[name]

    def find(self, name: object, argument: str) -> T:
        """The entry; an `InvalidArgument` for `argument` lists the known names and says how to add one."""
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
        """The entry of an installed package; KeyError where none has one of this name."""
        points = [point for point in _installed(self._group) if point.name == name]
        if not points:
            raise KeyError(name)
        if len({point.value for point in points}) > 1:
            shown = ", ".join(sorted(point.value for point in points))
            raise InvalidArgument("name", f"one installed package with a {self._what} {name!r}", shown)
        try:
            found = points[0].load()
        except Exception as error:  # whatever another package does when it is imported
            raise InvalidArgument(
                "name", f"a {self._what} {name!r} that can be imported", f"{points[0].value} ({error})"
            ) from error
        return self._entry_of(points[0], found)

    def _entry_of(self, point: EntryPoint, found: Any) -> T:
        """What an installed package has as an entry; a subclass may check or convert it."""
        entry: T = found
        return entry

    def _installed_names(self) -> set[str]:
        """The names that installed packages add, without importing any."""
        return {point.name for point in _installed(self._group)}

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._installed_names()

    def __iter__(self) -> Iterator[str]:
        yield from self._entries
        yield from sorted(self._installed_names() - set(self._entries))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _installed(group: str) -> tuple[EntryPoint, ...]:
    """The entry points of a group. They are searched for again only if what is installed has changed."""
    changed = []
    for folder in sys.path:
        with suppress(OSError):
            changed.append((folder, os.stat(folder or ".").st_mtime_ns))
    return _search(group, tuple(changed))


@lru_cache(maxsize=32)  # a search takes 20 ms, and a registry is asked often
def _search(group: str, _folders: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=group))


def import_modules(names: Iterable[str], argument: str) -> None:
    """Import modules of the user's, which register what they add.

    Args:
        names: of modules, which may lie in the working directory, or of .py files.
        argument: by which the user gave them.

    Raises:
        InvalidArgument: for a module that is not there, or fails while it is imported.
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
        except InvalidArgument as error:  # of a registration, or of the file itself
            raise error.with_name(argument) if error.name == "module" else error from None
        except (Exception, SystemExit) as error:  # whatever it does
            raise InvalidArgument(
                argument, "a module that can be imported", f"'{name}' ({type(error).__name__}: {error})"
            ) from error


def _import_file(file: Path) -> None:
    name, path = file.stem, file.resolve()
    known = sys.modules.get(name)
    other = find_spec(name) if known is None else None
    if other is not None and Path(other.origin or "").resolve() != path:
        hint = f"There is a module {name!r}, which would be hidden"
        raise InvalidArgument("module", "a .py file with a name of its own", f"'{file}'", hint)
    if known is not None and Path(getattr(known, "__file__", None) or "").resolve() == path:
        return
    spec = spec_from_file_location(name, path)
    if known is not None or spec is None or spec.loader is None or not path.is_file():
        taken = f", and there is another module {name!r}" if known is not None else ""
        raise InvalidArgument("module", "a .py file", f"'{file}'{taken}")
    module = module_from_spec(spec)
    sys.modules[name] = module  # before it runs, as Python's own import does
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def defined_alike(first: object, second: object) -> bool:
    """Whether two functions are from one place in one module; lambdas have no place of their own."""
    places = [
        (getattr(each, "__module__", ""), getattr(each, "__qualname__", "<lambda>"))
        for each in (first, second)
    ]
    return places[0] == places[1] and not places[0][1].endswith("<lambda>")


def source_of(call: Callable[..., object]) -> str:
    """The source of the module that a function is defined in, or else of the function, or its name."""
    module = sys.modules.get(str(getattr(call, "__module__", "")))
    for known in (module, call):
        try:
            if known is not None:
                return inspect.getsource(known)
        except (OSError, TypeError):  # a notebook's module has no file; a callable object no source
            continue
    return str(getattr(call, "__qualname__", type(call).__qualname__))


def _home(entry: Any) -> str:
    """Where a class or function was defined: the same for one that was defined again.

    Of an instance its class, as of a method; of one that shows its content, as a record does, the content.
    """
    kind = entry if hasattr(entry, "__qualname__") else type(entry)
    if kind is entry or kind.__repr__ is object.__repr__:
        return f"{kind.__module__}.{kind.__qualname__}"
    return repr(entry)
