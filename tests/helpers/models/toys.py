"""A language family that an extension adds, for tests of what a family must bring (`toy_family`)."""

import importlib

TOY = {"model_type": "toy"}
TOY_FAMILY = "tests.helpers.models.toy_family"


def register_toy_family() -> None:
    """As an extension of a recipe is: by importing it. A rank keeps it."""
    importlib.import_module(TOY_FAMILY)
