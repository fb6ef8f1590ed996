"""A name -> object table, the one way components are found by name (projectors, templates, sources, tasks, ...).

Duplicates raise at registration and unknown names raise at lookup, naming the near ones, so a typing error in a recipe
costs one line of reading. The hazard of registries is import order: a module registers what it defines when it is
imported, and the package that owns the registry imports all its members.
"""

import difflib
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from megatron_vlm.errors import ConfigError

T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """The end of an error about an unknown name: the nearest one, or `otherwise` where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise


class Registry(Generic[T]):
    """Named objects of one kind.

    Args:
        kind: what the entries are, in the singular, for error messages ("projector").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.packages: dict[str, str] = {}  # name -> what pip must have installed for it, where it is an extra's
        self._entries: dict[str, T] = {}

    def register(self, name: str, package: str | None = None) -> Callable[[T], T]:
        """Decorator that stores the object under `name`. Raises ConfigError where the name is taken.

        Args:
            name: as a recipe or a command line names it.
            package: what pip must have installed for it, as setup.py's extras call it, so that the doctor can say what
                the package is for; None where everybody has it.
        """

        def store(entry: T) -> T:
            if name in self._entries:
                raise ConfigError(f"{self.kind} {name!r} is registered twice; choose another name")
            self._entries[name] = entry
            if package is not None:
                self.packages[name] = package
            return entry

        return store

    def get(self, name: str) -> T:
        """The object of that name. Raises ConfigError naming the near ones."""
        if name in self._entries:
            return self._entries[name]
        hint = did_you_mean(name, self._entries, f"known: {', '.join(self.names())}")
        raise ConfigError(f"unknown {self.kind} {name!r}; {hint}")

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)

    def items(self) -> list[tuple[str, T]]:
        """All names and objects, in the order of registration."""
        return list(self._entries.items())

    def __contains__(self, name: object) -> bool:
        return name in self._entries
