"""How good do reward model and policy become, when people are asked round after round?

``python -m tests.benchmarks.rounds OUT`` (half an hour), with the quickstart's run of seed 0 under
OUT. Its supervised policy is kept; reward model and policy begin with few of its comparisons. Then
`talipot loop` asks three simulated people, through the page that it serves. They judge as the
quickstart's labeler does, and 10 % of what they say is the contrary.

All reward models are asked about the same comparisons, `valid2` of all rounds, which none of them
saw; all policies about the same held-out prompts, by the labeler without mistakes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from rich.console import Console

from common.config.run import RunConfig
from common.data.records import Comparison, Prompt, read_comparisons, write_jsonl
from deploy.evaluation.intervals import bootstrap_mean
from deploy.feedback.disagreement import scored
from deploy.feedback.loop import Base, base_of
from deploy.feedback.pairs import Response
from deploy.quickstart.evaluation import evaluate
from deploy.quickstart.harvest import prompt_text
from deploy.quickstart.labeler import MARGIN
from deploy.quickstart.task import Task
from deploy.stages import policy, supervised
from deploy.stages.policy import start_pools
from deploy.stages.session import open_session
from tests.benchmarks.bases import derive, save, task_of
from tests.deploy.feedback.labelers import Simulated, at_work

FEW, PAIRS, ROUNDS, NOISE = 450, 1500, 3, 0.1
ITERATIONS = "train.iterations=16"
"""Half of the recipe's."""

console = Console()


def begun(out: Path) -> RunConfig:
    """Train the base: a reward model on few comparisons, and the policy on it."""
    for old in out.glob("rounds*"):
        shutil.rmtree(old)
    config = derive(out / "quickstart-s0", out / "rounds", (ITERATIONS,))
    shutil.rmtree(config.folder.reward_model.path)
    path = config.folder.data.comparisons
    write_jsonl(str(path), list(read_comparisons([str(path)]))[:FEW])
    with open_session(config, console) as session:
        supervised.run_reward(session, config)
        policy.run_train(session, config)
    return config


def people(config: RunConfig, task: Task) -> list[Simulated]:
    """Three labelers with the same taste, who err at different pairs."""
    by_prompt = {prompt_text(pair): pair for pair in task.train}

    def quality(prompt: str, response: str) -> float:
        return task.qualities([by_prompt[prompt]], [response])[0]

    return [
        Simulated(run=config.run_dir, name=name, quality=quality, noise=NOISE, margin=MARGIN)
        for name in ("ann", "bob", "cid")
    ]


def rightly(
    config: RunConfig, models: Sequence[Path], said: Sequence[Comparison]
) -> list[list[float]]:
    """Whether each reward model prefers what people preferred; 1 or 0, by model."""
    names = [str(i) for i in range(len(said))]
    prompts = {name: Prompt(prompt=of.prompt) for name, of in zip(names, said, strict=True)}
    sides = {
        name: [Response(text=of.chosen), Response(text=of.rejected)]
        for name, of in zip(names, said, strict=True)
    }
    found = scored(config, models, prompts, sides)
    return [
        [float(found[name][0].scores[at] > found[name][1].scores[at]) for name in names]
        for at in range(len(models))
    ]


def judged(config: RunConfig, task: Task) -> dict[str, float]:
    """The policy that a round left against the supervised policy."""
    with open_session(config, console) as session:
        return evaluate(session, config, task, start_pools(session, config)).figures()


def table(base: Base, task: Task) -> list[dict[str, float]]:
    """Base and rounds: reward model and policy, each with its interval."""
    runs = [base.run_of(number) for number in range(ROUNDS + 1)]
    held_out = [
        said
        for said in read_comparisons(runs[-1].data.comparisons)
        if said.split == "valid2" and said.confidence != 0.5
    ]
    models = [run.folder.reward_model.weights for run in runs]
    right = rightly(base.config, models, held_out)
    rows: list[dict[str, float]] = []
    for number, run in enumerate(runs):
        accuracy = bootstrap_mean(right[number], 0)
        row = {
            "round": float(number),
            "comparisons": float(sum(1 for _ in read_comparisons(run.data.comparisons))),
            "accuracy": accuracy.mean,
            "accuracy_low": accuracy.low,
            "accuracy_high": accuracy.high,
        }
        rows.append(row | judged(run, task))
        console.print(rows[-1])
    for earlier, later in pairwise(range(ROUNDS + 1)):
        differ = [b - a for a, b in zip(right[earlier], right[later], strict=True)]
        gain = bootstrap_mean(differ, 0)
        rows[later] |= {
            "accuracy_gain": gain.mean,
            "accuracy_gain_low": gain.low,
            "accuracy_gain_high": gain.high,
        }
    return rows


def main(arguments: Sequence[str]) -> None:
    """Base, rounds, table."""
    config = begun(Path(arguments[0]).absolute())
    task = task_of(config)
    options = ("--rounds", str(ROUNDS), "--pairs", str(PAIRS))
    with at_work(people(config, task), together=True):
        subprocess.run(
            [sys.executable, "-m", "deploy.cli", "loop", str(config.run_dir), *options], check=True
        )
    rows = table(base_of(config), task)
    save(config.run_dir, {"rows": rows, "few": FEW, "pairs": PAIRS, "noise": NOISE})


if __name__ == "__main__":
    main(sys.argv[1:])
