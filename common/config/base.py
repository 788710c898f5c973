"""What every section of a recipe is made of: frozen, validated, and numbers that are numbers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)


def _number(value: Any) -> Any:
    """`lr: yes` would be 1.0."""
    if isinstance(value, bool):
        raise ValueError("should be a number")
    return value


NoSwitch = BeforeValidator(_number)


"""Of a field that is a number: YAML's true and false are none."""


Integer = Annotated[int, NoSwitch]


Float = Annotated[float, NoSwitch, Field(allow_inf_nan=False)]


"""The only floats of a recipe: `.inf` and `.nan` are no settings."""


PositiveInt = Annotated[Integer, Field(gt=0)]


NonNegativeInt = Annotated[Integer, Field(ge=0)]


PositiveFloat = Annotated[Float, Field(gt=0)]


NonNegativeFloat = Annotated[Float, Field(ge=0)]


PathText = Annotated[str, AfterValidator(os.path.expanduser)]


"""A path or URI; a ``~`` at its start is the home folder."""


Fraction = Annotated[Float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A frozen group of settings that knows all its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, values: Any) -> Any:
        """A section, mapping or list under which only comments stand is null to YAML; it means
        its defaults, unless null is a value of the field."""
        if values is None:
            return {}
        if not isinstance(values, Mapping):
            return values
        return {
            name: value
            for name, value in values.items()
            if value is not None
            or name not in cls.model_fields
            or not isinstance(
                cls.model_fields[name].get_default(call_default_factory=True), Mapping | tuple
            )
        }
