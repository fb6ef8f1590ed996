"""Backends: what `auto` takes, what a name that cannot run says."""

import logging

import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.ops.dispatch import Operation
from megatron_vlm.runtime.logging import get_logger


def doubling() -> Operation:
    """Two backends: `fast` for even numbers only, `plain` for all."""
    operation: Operation = Operation("ops.double")
    operation.backend("fast", lambda n: None if n % 2 == 0 else f"it needs an even number, found {n}")(lambda n: n << 1)
    operation.backend("plain")(lambda n: n + n)
    return operation


def test_auto_takes_the_first_that_can_run_and_says_so_once(monkeypatch):
    operation = doubling()
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())
    monkeypatch.setattr(get_logger("megatron_vlm.ops.dispatch"), "handlers", [listener])
    assert operation.select("auto", 2)(2) == 4
    assert operation.select("auto", 4)(4) == 8
    assert operation.select("auto", 3)(3) == 6
    assert said == ["ops.double: auto took 'fast'", "ops.double: auto took 'plain'"]


def test_a_named_backend_that_cannot_run_raises_with_the_reason():
    with pytest.raises(ConfigError, match="'fast' cannot run: it needs an even number, found 3"):
        doubling().select("fast", 3)


def test_unknown_name_names_the_near_ones():
    with pytest.raises(ConfigError, match="'plain'"):
        doubling().select("plian", 2)


def test_no_backend_at_all_gives_every_reason():
    operation: Operation = Operation("ops.none")
    operation.backend("a", lambda: "no a here")(lambda: 1)
    with pytest.raises(ConfigError, match="a: no a here"):
        operation.select("auto")
