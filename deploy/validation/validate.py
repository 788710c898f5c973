"""`talipot validate`: everything that would stop a run, found at once and before anything starts.

    recipe -> what is left of it -> functions, endpoints, checkpoints, tokenizer, data, machine

What a recipe has wrong is left out, and the rest is looked at all the same. At the head of a stage
`require_stage` asks the same of what that stage reads, but of each data file only the first
rows: the stage itself reads all of them a moment later.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

from common.config.model import PretrainedConfig
from common.config.recipe import judge_recipe
from common.config.run import RunConfig
from common.data.tokenizer import load_tokenizer
from common.errors import CheckpointError, ConfigError
from common.run_folder import writer_of
from deploy.run_folder.paths import anchored
from deploy.trackers import require_installed
from deploy.validation.data import (
    FieldFacts,
    check_lengths,
    check_mixture,
    check_overlap,
    read_field,
)
from deploy.validation.findings import Finding, Findings
from deploy.validation.parts import (
    Reach,
    check_checkpoints,
    check_endpoints,
    check_functions,
    check_tokenizer,
    elsewhere,
    misfits,
)
from reward_service.targets import require_targets

_FIRST_ROWS: Final = 1_000
"""Rows of each file that the head of a stage looks at: some milliseconds."""
_HERE: Final = "this machine"
_SAID: Final = 5
"""Errors in the line that a stage is refused with."""
_READS: Mapping[str, Sequence[str]] = {
    "sft": ("demonstrations",),
    "reward": ("comparisons", "demonstrations"),
    "train": ("prompts",),
}


def validate(
    path: Path | None,
    overrides: Sequence[str] = (),
    given: Mapping[str, str] = MappingProxyType({}),
) -> Findings:
    """Look at a recipe and at everything it names; nothing is written and no cluster started."""
    findings = Findings()
    try:
        recipe = judge_recipe(path, overrides, given)
    except ConfigError as error:
        findings.error(str(error))
        return findings
    for mistake in recipe.mistakes:
        findings.error(mistake)
    if recipe.config is None:
        return findings
    config = recipe.config
    reach = Reach(config)
    try:
        config = _check_parts(config, findings)
        _check_data(config, findings)
        _check_machine(config, findings)
    finally:
        reach.note(findings)
    return findings


def require_stage(config: RunConfig, stage: str) -> None:
    """Refuse a stage whose inputs or functions are not there, before a cluster starts for it.

    Costs some milliseconds: of functions the source is read, of each data file the first rows.

    Raises:
        TalipotError: of the kind of the first error, with all of them.
    """
    findings, data = Findings(), config.data
    reads = [(name, stage) for name in _READS[stage]]
    if stage == "train" and config.evaluate.every:
        reads.append(("evaluation", "evaluate.every"))
    for name, reader in reads:
        if not getattr(data, name):
            findings.error(f"data.{name} is empty; {reader} needs at least one file")
    with findings.attempt():
        require_installed(config)
    for name, _ in reads:
        read_field(name, getattr(data, name), findings, limit=_FIRST_ROWS)
    if stage == "train":
        components = config.reward_service.components
        for name, component in components.items():
            with findings.attempt():
                require_targets({name: component}, here=not elsewhere(config))
    _check_weights(config, stage, findings)
    _raise(findings.errors())


def _raise(errors: Sequence[Finding]) -> None:
    """Raise one error with the first of these, if there are any, in one line that can be read."""
    if not errors:
        return
    said = [str(error) for error in errors[:_SAID]]
    if len(errors) > _SAID:
        said.append(f"{len(errors) - _SAID} more, which `talipot validate` names")
    raise errors[0].kind("; and ".join(said))


def _check_parts(config: RunConfig, findings: Findings) -> RunConfig:
    # Imports torch.
    from deploy.workers.preflight import require_trainable

    with findings.attempt():
        require_installed(config)
    check_functions(config, findings)
    check_endpoints(config, findings)
    with findings.attempt("rollout"):
        require_trainable(config)
    folder = config.run_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK) or not folder.is_dir():
        findings.error(f"output: {config.run_dir} cannot be written; name another folder")
    return check_checkpoints(config, findings)


def _check_data(config: RunConfig, findings: Findings) -> None:
    data = config.data
    named = {name: getattr(data, name) for name in ("demonstrations", "comparisons", "prompts")}
    if not any(named.values()):
        findings.warning(
            "data: names no files, so that only `talipot quickstart` can run this, which makes its "
            "own; name files in data.demonstrations, data.comparisons and data.prompts"
        )
        return
    mixed = None if data.mixture is None else data
    fields = {
        name: read_field(name, paths, findings, mixed=mixed if name == "prompts" else None)
        for name, paths in {**named, "evaluation": data.evaluation}.items()
        if paths
    }
    _check_use(config, fields, findings)
    check_overlap(fields, findings)
    tokenizer = check_tokenizer(config, fields.get("demonstrations"), findings)
    if tokenizer is None:
        return
    for text in misfits(config, tokenizer.vocab_size):
        findings.error(text, where="tokenizer")
    for name, facts in fields.items():
        own, seen = config.reward_model.model, config
        if name == "comparisons" and isinstance(own, PretrainedConfig):
            with findings.attempt():
                seen = config.model_copy(update={"model": own})
                check_lengths(facts, load_tokenizer(own.start), seen, findings)
            continue
        check_lengths(facts, tokenizer, seen, findings)


def _check_use(config: RunConfig, fields: Mapping[str, FieldFacts], findings: Findings) -> None:
    """Look at whether every stage has the files that it needs, and enough in them."""
    own = isinstance(config.model, PretrainedConfig)
    if "demonstrations" not in fields and not own:
        findings.error("data.demonstrations is empty; sft needs at least one file")
    if config.reward_service.needs_model and config.reward_model.model is None:
        if "comparisons" not in fields:
            findings.error(
                "data.comparisons is empty; reward needs at least one file, as the score uses a "
                "reward model (reward_service.components)"
            )
    elif "comparisons" in fields and not config.reward_service.needs_model:
        findings.warning(
            "data.comparisons: no part of the score is a reward model, so nothing uses them; add "
            "one to reward_service.components, or leave them out"
        )
    if "prompts" not in fields:
        findings.error("data.prompts is empty; train needs at least one file")
    elif 0 < len(fields["prompts"].seen) < config.train.prompts_per_iteration:
        findings.warning(
            f"data.prompts: {len(fields['prompts'].seen)} prompts, and an iteration takes "
            f"{config.train.prompts_per_iteration}, some of them several times; lower "
            "train.prompts_per_iteration or bring more"
        )
    if config.evaluate.every and "evaluation" not in fields:
        findings.error("data.evaluation is empty; evaluate.every needs at least one file")
    if "prompts" in fields:
        check_mixture(config, fields["prompts"], findings)


def _check_machine(config: RunConfig, findings: Findings) -> None:
    """Compare what each stage needs with this machine, where the run would be at work on it."""
    if elsewhere(config):
        return
    from deploy.workers.memory import require_room
    from deploy.workers.preflight import explain

    if isinstance(config.model, PretrainedConfig) and not Path(config.model.start).is_dir():
        return  # nobody knows its size
    with findings.attempt(_HERE):
        explain(config, {"CPU": float(len(os.sched_getaffinity(0)))})
    for stage in _READS:
        with findings.attempt(_HERE):
            require_room(config, stage)


def _check_weights(config: RunConfig, stage: str, findings: Findings) -> None:
    """Look whether the stages before this one have left what it begins with."""
    from deploy.run_folder.weights import policy_start, reward_start, reward_weights

    config, needed = anchored(config), []
    if stage == "reward":
        needed = [reward_start(config)]
    elif stage == "train":
        needed = [policy_start(config)]
        if config.reward_service.needs_model:
            needed.append(reward_weights(config))
    for path in needed:
        if not path.exists():
            findings.error(f"{path}: no such weights; {writer_of(path)}", CheckpointError)
