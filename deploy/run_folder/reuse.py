"""`talipot train --from RUN`: another run's results by reference; only training is done anew.

Nothing is copied. The new recipe names where tokenizer, supervised policy and reward model lie
(`reuse`), and ``run.json`` holds the fingerprints of what they were: another content, or none, is
refused when the run goes on. What the other run took from a third one is taken from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from common.config.algorithms import ALGORITHMS
from common.config.model import checkpoint_of
from common.config.recipe import load_config
from common.config.run import ReuseConfig, RunConfig
from common.errors import ConfigError, DataError
from deploy.run_folder.folder import config_of
from deploy.run_folder.paths import anchored
from deploy.run_folder.resume_rules import within
from deploy.run_folder.weights import weights_in

_PLACE = ("name", "output")


def reused_from(
    run: Path, recipe: Path | None, overrides: Sequence[str], given: Mapping[str, str]
) -> RunConfig:
    """Return the recipe of a new run that begins with what another one has made.

    Args:
        run: the other run's folder.
        recipe: the new run's recipe; None takes the other run's.
        overrides: as on the command line; one of them gives the new run its name.
        given: as `load_config` takes it.

    Raises:
        DataError: there is no such run, or it has no supervised policy yet.
        ConfigError: the new run has no name of its own, or an override changes nothing.
    """
    source = config_of(run)
    reuse = results_of(source)
    _require_effects(overrides, reuse, source)
    if recipe is not None:
        config = anchored(load_config(recipe, overrides, given))
    else:
        placed = [o for o in overrides if o.partition("=")[0].strip() in _PLACE]
        others = [o for o in overrides if o not in placed]
        # The other run stays where it is; the new one lies beside it where nothing else is said.
        place = load_config(None, placed, {})
        said = {o.partition("=")[0].strip() for o in placed}
        here = {"name": place.name if "name" in said else source.name}
        here |= {"output": anchored(place).output if "output" in said else source.output}
        following = _following(others, source)
        config = config_of(run, [*others, *following], given).model_copy(update=here)
    if config.run_dir == source.run_dir:
        raise ConfigError(f"--from {run}: give the new run a name of its own, as name=NAME")
    return config.model_copy(update={"reuse": reuse})


def results_of(source: RunConfig) -> ReuseConfig:
    """Return where a run's results lie; of a third run's, there."""
    folder = source.folder
    sft, reward = folder.sft.path, folder.reward_model.path
    there = {path: any(file.exists() for file in weights_in(path)) for path in (sft, reward)}
    if not there[sft] and checkpoint_of(source.model) is None:
        raise DataError(
            f"{source.run_dir}: no supervised policy yet; run `talipot sft` there first"
        )
    if not folder.tokenizer.exists():
        raise DataError(f"{source.run_dir}: no tokenizer yet; run a stage there first")
    return ReuseConfig(
        tokenizer=str(folder.tokenizer),
        sft=str(sft) if there[sft] else None,
        reward_model=str(reward) if there[reward] else None,
    )


def _following(overrides: Sequence[str], source: RunConfig) -> list[str]:
    """Return what another algorithm implies: without a value function there is no phase for it."""
    said = dict(override.partition("=")[::2] for override in overrides)
    needs = ALGORITHMS.get(said.get("train.algorithm", ""))
    if needs is None or needs.values or source.train.ppg is None:
        return []
    return [] if any(within(name, "train.ppg") for name in said) else ["train.ppg=null"]


def _require_effects(overrides: Sequence[str], reuse: ReuseConfig, source: RunConfig) -> None:
    """Refuse settings of what is made already."""
    made = {"sft.": reuse.sft, "tokenizer.": reuse.tokenizer, "reward_model.": reuse.reward_model}
    for override in overrides:
        name = override.partition("=")[0].strip()
        for prefix, path in made.items():
            if name.startswith(prefix) and path is not None:
                raise ConfigError(
                    f"{name} has no effect here: what it is about is taken from {source.run_dir} "
                    "(--from); leave it out"
                )
