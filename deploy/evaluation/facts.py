"""What a run is, in a few words: its algorithm, reward, model, data and time."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from common.config.model import PalmConfig, PretrainedConfig
from common.config.rewards import FunctionComponent, HttpComponent, JudgeComponent
from common.config.run import RunConfig
from common.errors import DataError
from deploy.run_folder.inputs import RunInputs
from deploy.run_folder.log_lines import Line
from deploy.run_folder.weights import policy_start

_ALGORITHMS = {"ppo": "PPO", "rloo": "RLOO", "grpo": "GRPO", "reinforce_pp": "REINFORCE++"}
_DATA = ("demonstrations", "comparisons", "prompts")


def facts_of(config: RunConfig, lines: Sequence[Line]) -> dict[str, str]:
    """Return the facts at the head of a page, by what they are; empty ones are left out."""
    facts = {
        "when": when(lines),
        "algorithm": algorithm_of(config),
        "reward": reward_of(config),
        "model": model_of(config),
        "data": data_of(config),
        "trained": trained_of(config, lines),
    }
    return {name: text for name, text in facts.items() if text}


def when(lines: Sequence[Line]) -> str:
    """Return the time from the first to the last line of the log, as far as it has times."""
    times = [line.time for line in lines if line.time]
    if not times:
        return ""
    first, last = (datetime.fromtimestamp(end(times), UTC) for end in (min, max))
    until = f"{last:%H:%M}" if first.date() == last.date() else f"{last:%-d %B, %H:%M}"
    return f"{first:%-d %B %Y, %H:%M} to {until} UTC"


def algorithm_of(config: RunConfig) -> str:
    """Return the algorithm with what changes it most."""
    train = config.train
    name = _ALGORITHMS.get(train.algorithm, train.algorithm)
    words = [f"{name} with PPG every {train.ppg.n_pi} iterations" if train.ppg else name]
    if train.samples_per_prompt > 1:
        words.append(f"{train.samples_per_prompt} responses to a prompt")
    if train.lora is not None:
        words.append(f"adapters of rank {train.lora.rank}")
    if train.max_staleness:
        words.append(f"asynchronous, up to {train.max_staleness} versions old")
    return ", ".join(words)


def reward_of(config: RunConfig) -> str:
    """Return the parts of the score with their weights."""
    parts = []
    for name, component in config.reward_service.scoring.items():
        what = name.replace("_", " ")
        if isinstance(component, FunctionComponent):
            what = f"{name} (function {component.target})"
        elif isinstance(component, HttpComponent):
            what = f"{name} (endpoint)"
        elif isinstance(component, JudgeComponent):
            what = f"{name} (judge {component.model})"
        parts.append(what if component.weight == 1 else f"{component.weight:g} × {what}")
    return " + ".join(parts)


def model_of(config: RunConfig) -> str:
    """Return the model's kind and size, or the checkpoint's name."""
    model = config.model
    if isinstance(model, PretrainedConfig):
        return f"{Path(model.start).name}, context {model.context}"
    if isinstance(model, PalmConfig):
        return f"PaLM, {model.layers} layers of width {model.dim}, context {model.context}"
    return f"{model.kind}, context {model.context}"


def data_of(config: RunConfig) -> str:
    """Return how many records the stages read, as the run recorded it."""
    try:
        stages = RunInputs(config.run_dir).stages.values()
    except DataError:
        return ""
    found = []
    for kind in _DATA:
        files = next((s.reads[f"data.{kind}"] for s in stages if f"data.{kind}" in s.reads), [])
        counts = [file.lines for file in files]
        if counts and None not in counts:
            found.append(f"{sum(count or 0 for count in counts):,} {kind}")
        elif files:
            found.append(f"{kind} of {len(files)} files")
    return " · ".join(found)


def trained_of(config: RunConfig, lines: Sequence[Line]) -> str:
    """Return how many iterations are done."""
    done = max((line.step for line in lines if line.stage == "train"), default=0)
    return f"{done:,} of {config.train.iterations:,} iterations" if done else ""


def reference_of(config: RunConfig) -> str:
    """Return what the trained policy is compared with: what its training began with."""
    return "supervised policy" if _has_sft(config) else "model as it came"


def _has_sft(config: RunConfig) -> bool:
    if config.reuse.sft is not None:
        return True
    return policy_start(config).is_relative_to(config.folder.sft.path)
