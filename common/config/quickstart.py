"""Settings of `talipot quickstart`: the tasks that make their own data."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from common.config.base import (
    Family,
    Float,
    Fraction,
    NonNegativeInt,
    PositiveInt,
)


class QuickstartConfig(Family):
    """The task of `talipot quickstart`, which makes its own data."""

    kind: str
    """Task: a line of documentation for each function, or answers that keep to instructions."""


class DocstringsConfig(QuickstartConfig):
    """Docstrings, harvested from the user's own Python environment."""

    kind: Literal["docstrings"] = "docstrings"
    demonstrations: PositiveInt = 20_000
    """Harvested pairs for the supervised stage and the prompts."""
    held_out: PositiveInt = 1_000
    """Harvested pairs that only the judges see."""
    comparisons: PositiveInt = 4_000
    """Comparisons that the labeler labels."""
    label_noise: Annotated[Float, Field(ge=0, lt=0.5)] = 0.05
    """Share of labels flipped at random."""
    human_share: Fraction = 0.35
    """Share of comparisons of a sample of the supervised policy with the human line."""
    borrowed_share: Fraction = 0.15
    """Share of comparisons of the human line with one about another function: equally fluent, so
    only what the line is about decides. The rest compares two samples."""

    @model_validator(mode="after")
    def _shares(self) -> DocstringsConfig:
        if self.human_share + self.borrowed_share > 1:
            raise ValueError("human_share and borrowed_share are more than everything together")
        return self


class InstructConfig(QuickstartConfig):
    """Verifiable instructions to a pretrained chat model."""

    kind: Literal["instruct"] = "instruct"
    prompts: PositiveInt = 2_000
    """Prompts that the policy is trained on."""
    demonstrations: NonNegativeInt = 500
    """Of these prompts, those whose answers by the model as it came are rewritten by a program to
    keep to their instructions, and imitated before policy training; 0 leaves that stage out."""
    held_out_prompts: PositiveInt = 128
    """Prompts that only the judge sees: of held-out topics, of held-out kinds of instructions and
    of held-out combinations, so many each."""


class ReasoningConfig(QuickstartConfig):
    """Tasks whose answers a library verifies (reasoning-gym)."""

    kind: Literal["reasoning"] = "reasoning"
    families: dict[str, dict[str, Any]] = Field(default={"chain_sum": {}, "spell_backward": {}})
    """Families of tasks, each with options of the library (its difficulty) and of ours (`chat`,
    `system`), as in the name ``reasoning_gym:FAMILY?option=value``, with a `weight`, its share of
    the prompts (1), and with `demonstrations` of its own, where it is to have fewer or more than
    the others."""
    prompts: PositiveInt = 2_000
    """Prompts of each family that the policy is trained on."""
    demonstrations: NonNegativeInt = 100
    """Tasks of each family with their answers, made by the library, that are imitated before policy
    training; 0 leaves that stage out."""
    held_out_prompts: PositiveInt = 128
    """Prompts of each family that only the judge sees."""

    @field_validator("families")
    @classmethod
    def _some(cls, families: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if not families:
            raise ValueError("names no family; name one, such as chain_sum: {}")
        for name, options in families.items():
            if own := sorted({"seed", "size"} & options.keys()):
                raise ValueError(
                    f"{name}: '{own[0]}' follows from the recipe's seed and sizes; take it out"
                )
            weight = options.get("weight", 1.0)
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
                raise ValueError(f"{name}: weight is {weight!r}; it is a number above 0")
            taught = options.get("demonstrations", 0)
            if isinstance(taught, bool) or not isinstance(taught, int) or taught < 0:
                raise ValueError(f"{name}: demonstrations is {taught!r}; it is a number from 0 up")
        return families

    def options_of(self, family: str) -> dict[str, Any]:
        """Return a family's options, without what the library and its names know nothing of."""
        return {k: value for k, value in self.families[family].items() if k not in _OWN_OPTIONS}

    def weight_of(self, family: str) -> float:
        """Return a family's share of the prompts that the policy is trained on, beside others'."""
        return float(self.families[family].get("weight", 1.0))

    def demonstrations_of(self, family: str) -> int:
        """Return how many tasks of a family are imitated."""
        return int(self.families[family].get("demonstrations", self.demonstrations))


_OWN_OPTIONS = frozenset({"weight", "demonstrations"})
"""What a family of the recipe says to us, and not to the library."""
