"""The task of `reasoning`: questions of several families, split into sides by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.config.quickstart import ReasoningConfig
from common.config.run import DataConfig, RunConfig, SourceConfig
from common.data.records import Prompt, read_prompts
from common.errors import ConfigError
from common.randomness import derive_seed
from common.reasoning_tasks import COLUMNS, family_of, name_of, require


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Prompts that the judge alone sees."""

    family: str
    prompts: list[Prompt]
    overlapping: int
    """How many were left out since training has the same question."""


def settings_of(config: RunConfig) -> ReasoningConfig:
    """Return the settings of this task, which the recipe is of."""
    assert isinstance(config.quickstart, ReasoningConfig)
    return config.quickstart


def names_of(config: RunConfig, side: str, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Return the name of each family's tasks of one side; the sides have seeds of their own."""
    settings = settings_of(config)
    seed = derive_seed(config.seed, "reasoning", side) >> 32
    return tuple(
        name_of(family, {**settings.options_of(family), "size": size, "seed": seed})
        for family, size in sizes.items()
    )


def taught(config: RunConfig) -> dict[str, int]:
    """Return how many tasks of each family are imitated, of those of which some are."""
    settings = settings_of(config)
    counts = {family: settings.demonstrations_of(family) for family in settings.families}
    return {family: count for family, count in counts.items() if count}


def with_data(config: RunConfig) -> RunConfig:
    """Return the config with the names of its data, the families in their shares.

    Raises:
        ConfigError: it names other data, which would not be read.
    """
    settings = settings_of(config)
    made = {
        "prompts": names_of(config, "prompts", dict.fromkeys(settings.families, settings.prompts)),
        "demonstrations": names_of(config, "demonstrations", taught(config)),
        "evaluation": names_of(
            config, "held out", dict.fromkeys(settings.families, settings.held_out_prompts)
        ),
        "columns": COLUMNS,
        "mixture": {
            family: SourceConfig(weight=settings.weight_of(family)) for family in settings.families
        },
    }
    for field, value in made.items():
        if getattr(config.data, field) not in (getattr(DataConfig(), field), value):
            raise ConfigError(
                f"data.{field} has no effect here: the recipe reasoning makes its own of "
                "quickstart.families; leave it out, or take reasoning_gym: names through "
                "`talipot train`"
            )
    return config.model_copy(update={"data": config.data.model_copy(update=made)})


def require_tasks(config: RunConfig) -> None:
    """Check the families and their options, before anything is imported or started.

    Raises:
        DataError: the package, a family or an option is not there.
        ConfigError: a family that has no answers to imitate is to be imitated.
    """
    data = with_data(config).data
    for name in (*data.prompts, *data.demonstrations):
        require(name)
    for name in names_of(config, "demonstrations", dict.fromkeys(taught(config), 1)):
        [shown] = read_prompts([name], columns=("answer",))
        if shown.columns["answer"] is None:
            raise ConfigError(
                f"quickstart.families.{family_of(name)}: gives no answers of its own to imitate; "
                "give it demonstrations: 0, or leave the family out"
            )


def held_out(config: RunConfig) -> list[HeldOut]:
    """Read the held-out prompts of each family, less those that training has too.

    Raises:
        ConfigError: of a family none is left.
    """
    data = config.data
    seen = {_asked(prompt) for prompt in read_prompts([*data.prompts, *data.demonstrations])}
    found = []
    for family, name in zip(settings_of(config).families, data.evaluation, strict=True):
        prompts = _apart(list(read_prompts([name], columns=data.columns)))
        kept = [prompt for prompt in prompts if _asked(prompt) not in seen]
        if not kept:
            raise ConfigError(
                f"quickstart.families.{family}: training has every held-out question; ask for "
                "harder tasks, of which there are more, or for fewer prompts"
            )
        found.append(HeldOut(family=family, prompts=kept, overlapping=len(prompts) - len(kept)))
    return found


def _apart(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Leave out what is asked a second time."""
    return list({_asked(prompt): prompt for prompt in reversed(prompts)}.values())[::-1]


def _asked(prompt: Prompt) -> str:
    return prompt.prompt
