"""Base of all sections of the recipe: a frozen model that knows its keys, and the kinds of numbers.

A number's limits are part of its type, so pydantic refuses a wrong one by itself and the reference of the recipe
(`config/reference.py`) shows them. Pydantic would take `true` for 1; no number here does.
"""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _no_switch(value: Any) -> Any:
    """Refuses `steps: true`, which pydantic would take for 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("switch_for_number", "a number is needed")
    return value


Number = BeforeValidator(_no_switch)
Integer = Annotated[int, Number]
PositiveInt = Annotated[int, Field(gt=0), Number]
NonNegativeInt = Annotated[int, Field(ge=0), Number]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False), Number]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False), Number]
Fraction = Annotated[float, Field(ge=0.0, le=1.0), Number]
Share = Annotated[float, Field(ge=0.0, lt=1.0), Number]  # 1 would leave nothing for the rest

Plain = str | bool | int | Annotated[float, Field(allow_inf_nan=False)] | None | list[Any] | dict[str, Any]


class Section(BaseModel):
    """A frozen section that knows its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), defer_build=True)
