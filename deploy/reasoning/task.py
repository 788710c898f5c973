"""The task of `reasoning`: questions of several families, split into sides by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.config.run import DataConfig, RunConfig, SourceConfig
from common.config.stages import ReasoningConfig
from common.data.records import Prompt, read_prompts
from common.errors import ConfigError
from common.randomness import derive_seed
from common.reasoning_tasks import name_of


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


def names_of(config: RunConfig, side: str, size: int) -> tuple[str, ...]:
    """Return the name of each family's tasks of one side; the sides have seeds of their own."""
    seed = derive_seed(config.seed, "reasoning", side) >> 32
    return tuple(
        name_of(family, {**options, "size": size, "seed": seed})
        for family, options in settings_of(config).families.items()
    )


def with_data(config: RunConfig) -> RunConfig:
    """Return the config with the names of its data, the families in equal shares.

    Raises:
        ConfigError: it names other data, which would not be read.
    """
    settings = settings_of(config)
    data = DataConfig(
        prompts=names_of(config, "prompts", settings.prompts),
        demonstrations=names_of(config, "demonstrations", settings.demonstrations)
        if settings.demonstrations
        else (),
        evaluation=names_of(config, "held out", settings.held_out_prompts),
        columns=("task", "index"),
        mixture={family: SourceConfig() for family in settings.families},
    )
    if config.data not in (DataConfig(), data):
        raise ConfigError(
            "data has no effect here: the recipe reasoning makes its own of quickstart.families; "
            "leave it out, or take reasoning_gym: names through `talipot train`"
        )
    return config.model_copy(update={"data": data})


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
