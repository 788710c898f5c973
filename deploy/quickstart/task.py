"""The quickstart's task: its data files, its labels and its judges, from the user's environment."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

import numpy as np

from common.config.quickstart import DocstringsConfig
from common.config.run import DataConfig, RunConfig
from common.data.records import Comparison, Demonstration, Prompt, write_jsonl
from common.errors import ConfigError
from common.files import write_atomic
from common.randomness import derive_seed
from common.run_folder import DataFolder
from deploy.evaluation.intervals import bootstrap_mean
from deploy.quickstart import judges
from deploy.quickstart.harvest import Pair, fingerprint, harvest, prompt_text, split
from deploy.quickstart.labeler import label, quality, verb_lexicon
from deploy.quickstart.outcome import Verdict


@dataclass(frozen=True, slots=True)
class Task:
    """Harvested pairs: `train` for the stages, `held_out` for the judges alone."""

    train: list[Pair]
    held_out: list[Pair]
    verbs: frozenset[str]
    """Opening verbs learned from the training lines; the labeler's lexicon."""

    def qualities(self, pairs: Sequence[Pair], lines: Sequence[str]) -> list[float]:
        """Return the labeler's opinion of each line, without noise."""
        return [quality(s, p, self.verbs) for s, p in zip(lines, pairs, strict=True)]


def settings_of(config: RunConfig) -> DocstringsConfig:
    """Return the settings of this task, which the recipe is of."""
    assert isinstance(config.quickstart, DocstringsConfig)
    return config.quickstart


def make_task(pairs: Sequence[Pair], settings: DocstringsConfig, seed: int) -> Task:
    """Split harvested pairs; the same arguments give the same task."""
    train, held_out = split(pairs, settings.held_out, seed)
    order = np.random.default_rng(derive_seed(seed, "harvest")).permutation(len(train))
    train = [train[i] for i in order[: settings.demonstrations]]
    return Task(train, held_out, verb_lexicon([pair.docstring for pair in train]))


def prepare(
    settings: DocstringsConfig, seed: int, folder: DataFolder, *, begun: bool = False
) -> tuple[Task, dict[str, str]]:
    """Harvest, split, and write the data files; return the task and facts for the log.

    Raises:
        ConfigError: the run has results already (`begun`), and the data files that they were made
            from would be replaced by others.
    """
    pairs = harvest()
    task = make_task(pairs, settings, seed)
    facts = {
        "pairs": str(len(pairs)),
        "fingerprint": fingerprint(pairs),
        "demonstrations": str(settings.demonstrations),
        "held_out": str(settings.held_out),
        "seed": str(seed),
    }
    if begun and (changed := _changed(folder.harvest, facts)):
        raise ConfigError(
            f"{folder.path.parent}: its data was harvested from other packages or by another "
            f"recipe: {changed}; give the new run another name, or remove that folder"
        )
    folder.path.mkdir(parents=True, exist_ok=True)
    write_jsonl(str(folder.demonstrations), [_demonstration(p) for p in task.train])
    write_jsonl(str(folder.evaluation), [_demonstration(p) for p in task.held_out])
    write_jsonl(str(folder.prompts), [Prompt(uid="", prompt=prompt_text(p)) for p in task.train])
    write_atomic(folder.harvest, [json.dumps(facts, indent=1).encode()])
    return task, facts


def _changed(path: Path, facts: Mapping[str, str]) -> str:
    """Say how a harvest differs from the one in `path`; empty when it does not."""
    if not path.exists():
        return ""
    before: dict[str, str] = json.loads(path.read_text(encoding="utf8"))
    return "; ".join(
        f"{name} {before[name]} -> {value}"
        for name, value in facts.items()
        if before.get(name, value) != value
    )


def with_data(config: RunConfig, folder: DataFolder) -> RunConfig:
    """Return the config with its data section pointing at the prepared files.

    Raises:
        ConfigError: it points at other files, which would not be read.
    """
    data = DataConfig(
        demonstrations=(str(folder.demonstrations),),
        comparisons=(str(folder.comparisons),),
        prompts=(str(folder.prompts),),
        evaluation=(str(folder.evaluation),),
        too_long="skip",
    )
    if config.data not in (DataConfig(), data):
        raise ConfigError(
            "data has no effect here: the quickstart makes its own; leave it out, or take your "
            "files through `talipot sft`, `talipot reward` and `talipot train`"
        )
    return config.model_copy(update={"data": data})


Kind = Literal["sample-human", "sample-sample", "human-borrowed"]
"""Where the two lines of a comparison come from."""


def draw_kinds(count: int, settings: DocstringsConfig, seed: int) -> list[Kind]:
    """Draw which two lines each comparison shows."""
    rng = np.random.default_rng(derive_seed(seed, "sides"))
    names: tuple[Kind, ...] = ("sample-human", "human-borrowed", "sample-sample")
    ends = (settings.human_share, settings.human_share + settings.borrowed_share)
    return [names[int(np.searchsorted(ends, x, side="right"))] for x in rng.random(count)]


def borrowed(task: Task, count: int, seed: int) -> list[str]:
    """Draw lines that people wrote about other functions of the training pairs."""
    rng = np.random.default_rng(derive_seed(seed, "borrowed"))
    return [task.train[i].docstring for i in rng.integers(0, len(task.train), count)]


def comparisons(
    task: Task,
    pairs: Sequence[Pair],
    sides: Sequence[tuple[str, str]],
    settings: DocstringsConfig,
    seed: int,
) -> tuple[list[Comparison], int]:
    """Label two lines for each signature; return the comparisons and the number of ties."""
    rng = np.random.default_rng(derive_seed(seed, "labels"))
    labelled, ties = [], 0
    for pair, (first, second) in zip(pairs, sides, strict=True):
        shown = (first, second) if rng.random() < 0.5 else (second, first)
        if not first.strip() or not second.strip():
            ties += 1  # Nothing was written: there is nothing to compare.
            continue
        comparison = label(pair, *shown, verbs=task.verbs, rng=rng, noise=settings.label_noise)
        if comparison is None:
            ties += 1
        else:
            labelled.append(comparison)
    return labelled, ties


def judge_lines(
    pairs: Sequence[Pair],
    lines: Sequence[str],
    seed: int,
    qualities: Sequence[float] | None = None,
) -> Verdict:
    """Ask the outside judges, ruff and ROUGE-L to the human lines; `qualities` is the labeler's."""
    conforming = [float(c) for c in judges.conformance(lines, pairs)]
    overlap = judges.rouge_l(lines, [pair.docstring for pair in pairs])
    return Verdict(
        judge_conformance=bootstrap_mean(conforming, seed),
        rouge_l=bootstrap_mean(overlap, seed),
        distinct=judges.distinct_share(lines),
        quality=None if qualities is None else fmean(qualities),
    )


def _demonstration(pair: Pair) -> Demonstration:
    return Demonstration(uid="", prompt=prompt_text(pair), response=pair.docstring)
