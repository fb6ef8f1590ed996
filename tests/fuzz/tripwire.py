"""What planted code calls: nothing here is ever called by the product, so a call is the proof that it ran code."""

import sys

EVENT = "tests.fuzz.tripwire"
PLANTED = "fuzz_planted"  # a module of this name stands beside hostile files; to import it is to run code


def fire(*arguments: object, **names: object) -> None:
    """Tells the walls."""
    sys.audit(EVENT)


class Armed:
    """Its making, and its state, are calls too."""

    def __init__(self, *arguments: object) -> None:
        fire()

    def __setstate__(self, state: object) -> None:
        fire()
