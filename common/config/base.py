"""What every section of a recipe is made of: frozen, validated, and numbers that are numbers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Annotated, Any, ClassVar, Self, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError


def _number(value: Any) -> Any:
    """Refuse what Python takes for a number: `lr: yes` would be 1.0."""
    if isinstance(value, bool):
        raise ValueError("should be a number")
    return value


NoSwitch = BeforeValidator(_number)
"""Of a field that is a number: YAML's true and false are none."""
Integer = Annotated[int, NoSwitch]
PositiveInt = Annotated[Integer, Field(gt=0)]
NonNegativeInt = Annotated[Integer, Field(ge=0)]
Float = Annotated[float, NoSwitch, Field(allow_inf_nan=False)]
"""The only floats of a recipe: `.inf` and `.nan` are no settings."""
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
GpuShare = Annotated[Float, Field(ge=0, le=1)]
"""GPUs of one worker: none computes on more than one."""
Fraction = Annotated[Float, Field(ge=0, le=1)]
PathText = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path or URI; a ``~`` at its start is the home folder."""


def is_list_of_texts(annotation: Any) -> bool:
    """Whether a field is a list of texts."""
    parts = get_args(annotation)
    if get_origin(annotation) is not tuple or len(parts) != 2 or parts[1] is not Ellipsis:
        return False
    return parts[0] is str or get_args(parts[0])[:1] == (str,)


CONFLICT = "conflict"
"""Type of an error that names fields which cannot be together."""
Conflict = tuple[Sequence[str], str]
"""Fields of a section by their dotted names in it, and why they cannot be together."""


def require_no_conflict(section: BaseModel, conflicts: Sequence[Conflict]) -> None:
    """Refuse a section in which some fields cannot be together; all at once."""
    if conflicts:
        raise ValidationError.from_exception_data(
            type(section).__name__,
            [
                {
                    "type": PydanticCustomError(
                        CONFLICT, "{text}", {"text": text, "fields": tuple(fields)}
                    ),
                    "loc": (),
                    "input": section,
                }
                for fields, text in conflicts
            ],
        )


class Section(BaseModel):
    """A frozen group of settings that knows all its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _as_meant(cls, values: Any) -> Any:
        """Take nothing for the defaults, unless null is a value of the field, and one for a list.

        A section, mapping or list under which only comments stand is null to YAML. A list of texts
        that has one may be written as the text.
        """
        if values is None:
            return {}
        if not isinstance(values, Mapping):
            return values
        return {
            name: [value] if isinstance(value, str) and cls._is_list_of_texts(name) else value
            for name, value in values.items()
            if value is not None
            or name not in cls.model_fields
            or not isinstance(
                cls.model_fields[name].get_default(call_default_factory=True), Mapping | tuple
            )
        }

    @classmethod
    def _is_list_of_texts(cls, name: str) -> bool:
        info = cls.model_fields.get(name)
        return info is not None and is_list_of_texts(info.annotation)

    @classmethod
    def kind_of(cls, values: Any) -> type[Section] | None:
        """Return the class that these values are of; None where they name no kind there is."""
        return cls

    @classmethod
    def every_field(cls) -> dict[str, FieldInfo]:
        """Return the fields of this section, whatever its kind."""
        return dict(cls.model_fields)


class Family(Section):
    """A section of which there are several kinds, each with only the fields that it uses.

    ``class Reward(Family)`` is a family and ``class Http(Reward)`` one of its kinds: its field
    `kind` has one literal type, and that literal as its default. A kind is known as soon as its
    class is, wherever that stands; the first is the default. A field of the family's type holds any
    kind of it (with `SerializeAsAny`, which writes down all fields of a kind), and `kind` in the
    recipe chooses. A field that two kinds share has one type.
    """

    kinds: ClassVar[dict[str, type[Section]]] = {}
    """Of each family its own."""

    kind: str
    """Which of the kinds it is."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Begin a family, or enter a kind into its family."""
        super().__pydantic_init_subclass__(**kwargs)
        if Family in cls.__bases__:
            cls.kinds = {}
        elif isinstance(kind := cls.model_fields["kind"].default, str):
            cls.kinds[kind] = cls  # what several kinds share is no kind

    @model_validator(mode="wrap")
    @classmethod
    def _choose(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Any:
        """Validate what is given for a family as the kind that it names."""
        if Family not in cls.__bases__ or isinstance(values, cls):
            return handler(values)
        chosen = cls.kind_of(values)
        if chosen is not None:
            return chosen.model_validate(values)
        *others, last = map(repr, cls.kinds)
        expected = f"{', '.join(others)} or {last}" if others else last
        raise ValidationError.from_exception_data(
            cls.__name__,
            [
                {
                    "type": "literal_error",
                    "loc": ("kind",),
                    "input": values["kind"],
                    "ctx": {"expected": expected},
                }
            ],
        )

    @classmethod
    def kind_of(cls, values: Any) -> type[Section] | None:
        """Return the class of the kind that these values name, or of the default."""
        if Family not in cls.__bases__:
            return cls
        default = next(iter(cls.kinds))
        kind = values.get("kind", default) if isinstance(values, Mapping) else default
        return cls.kinds.get(kind) if isinstance(kind, str) else None

    @classmethod
    def every_field(cls) -> dict[str, FieldInfo]:
        """Return the fields of all kinds; the default of `kind` is the first kind."""
        fields = dict(cls.model_fields)
        if Family in cls.__bases__:
            fields["kind"] = copy(fields["kind"])
            fields["kind"].default = next(iter(cls.kinds))
            for kind in cls.kinds.values():
                fields |= {n: info for n, info in kind.model_fields.items() if n not in fields}
        return fields
