"""Triton's interpreter at twice its speed: it prepares the language anew for every call of a function in a kernel.

The launch has prepared `triton.language` already, and what the first call of a module's function prepares besides (that
of the library's own `tl.sum`) stays.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Within, functions called by an interpreted kernel are just called, from the second time on."""
    from triton.runtime.interpreter import InterpretedFunction

    prepared: set[str] = set()
    original = InterpretedFunction.__call__

    def call(function: Any, *arguments: Any, **options: Any) -> Any:
        if function.fn.__module__ in prepared:
            return function.rewrite()(*arguments, **options)
        prepared.add(function.fn.__module__)
        return original(function, *arguments, **options)

    with mock.patch.object(InterpretedFunction, "__call__", call):
        yield
