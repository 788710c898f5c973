"""Is a label worth more where reward models disagree? Simulated people, the quickstart's data.

``python -m tests.benchmarks.choosing OUT [FEW [DRAWS]]`` (450 labels and 5 draws: a quarter of an
hour), with the quickstart's run of seed 0 under OUT. People are wrong in 25 % of the answers. In
each draw three reward models learn from the same few labels; then as many labels again are bought:
at random, or 70 % of them where the three disagree most. A reward model on all of them is asked
about comparisons that nobody was wrong about.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console

from common.config.run import RunConfig
from common.data.records import Comparison, Prompt, read_comparisons
from deploy.evaluation.intervals import bootstrap_mean
from deploy.feedback.disagreement import disagreement, scored
from deploy.feedback.pairs import Pair, Response
from deploy.stages.encoding import encode_comparisons
from deploy.stages.session import Session, open_session
from learner.supervised.examples import EncodedComparison
from tests.benchmarks.bases import SEEDS, derive, save

FEW, DRAWS = 450, 5
HELD_OUT, NOISE, ACTIVE = 600, 0.25, 0.7

console = Console()


def encoded(
    session: Session, config: RunConfig, records: Sequence[Comparison]
) -> list[EncodedComparison]:
    """Comparisons in tokens; the quickstart's all fit."""
    found, _ = encode_comparisons(records, session.tokenizer(), config)
    return found


def answered(record: Comparison, rng: np.random.Generator) -> Comparison:
    """What a person says of it: in a quarter of the cases the contrary."""
    sides = (record.chosen, record.rejected)
    first, second = sides if rng.random() >= NOISE else sides[::-1]
    return replace(record, uid="", chosen=first, rejected=second, confidence=1 - NOISE)


def trained(
    session: Session, config: RunConfig, said: Sequence[Comparison], judged: Sequence[Comparison],
    seed: int,
) -> float:  # fmt: skip
    """Accuracy of a reward model on these labels."""
    gang = session.gang()
    training, held_out = (encoded(session, config, part) for part in (said, judged))
    start = session.folder.sft.weights
    gang.advance(gang.begin_reward(config, training, held_out, [], start, seed))
    return gang.evaluate()["accuracy_heldout"]


def by_disagreement(
    session: Session, config: RunConfig, said: Sequence[Comparison], pool: Sequence[Comparison],
    judged: Sequence[Comparison],
) -> list[int]:  # fmt: skip
    """Places in the pool, where three models that learnt from the same labels disagree most."""
    models = []
    for seed in SEEDS:
        trained(session, config, said, judged, seed)
        folder = session.folder.reward_seed(seed)
        session.gang().export_stage(folder.path)
        models.append(folder.weights)
    prompts = {str(i): Prompt(prompt=record.prompt) for i, record in enumerate(pool)}
    sides = {
        str(i): [Response(text=record.chosen), Response(text=record.rejected)]
        for i, record in enumerate(pool)
    }
    found = scored(config, models, prompts, sides)
    apart = [
        disagreement(Pair(prompt=record.prompt, first=found[str(i)][0], second=found[str(i)][1]))
        for i, record in enumerate(pool)
    ]
    return sorted(range(len(pool)), key=lambda i: -apart[i])


def drawn(
    session: Session, config: RunConfig, records: Sequence[Comparison], draw: int, few: int
) -> None:
    """One draw, added to the summary."""
    rng = np.random.default_rng(draw)
    order = rng.permutation(len(records))
    judged = [records[i] for i in order[:HELD_OUT]]
    said = [answered(records[i], rng) for i in order[HELD_OUT : HELD_OUT + few]]
    pool = [records[i] for i in order[HELD_OUT + few :]]
    answers = [answered(record, rng) for record in pool]
    most = by_disagreement(session, config, said, pool, judged)
    active = math.floor(ACTIVE * few)
    chosen = most[:active]
    rest = [i for i in range(len(pool)) if i not in set(chosen)]
    bought = {
        "random": list(range(few)),
        "active": chosen + rest[: few - active],
    }
    row: dict[str, float] = {"draw": draw, "few": trained(session, config, said, judged, 0)}
    for name, places in bought.items():
        row[name] = trained(session, config, [*said, *(answers[i] for i in places)], judged, 0)
    console.print(row)
    path = config.run_dir / "rows.jsonl"
    with path.open("a", encoding="utf8") as file:
        file.write(json.dumps(row) + "\n")


def main(arguments: Sequence[str]) -> None:
    """All draws, and their difference with its interval over draws."""
    out = Path(arguments[0]).absolute()
    few = int(arguments[1]) if len(arguments) > 1 else FEW
    draws = int(arguments[2]) if len(arguments) > 2 else DRAWS
    config = derive(out / "quickstart-s0", out / f"choosing-{few}", ())
    with open_session(config, console) as session:
        records = [
            record
            for record in read_comparisons(config.data.comparisons)
            if record.chosen.strip() and record.rejected.strip()
        ]
        for draw in range(draws):
            drawn(session, config, records, draw, few)
    text = (config.run_dir / "rows.jsonl").read_text(encoding="utf8")
    rows = [json.loads(line) for line in text.splitlines()]
    gain = bootstrap_mean([row["active"] - row["random"] for row in rows], 0)
    console.print(f"active less random: {gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})")
    save(config.run_dir, {"rows": rows, "gain": [gain.mean, gain.low, gain.high]})


if __name__ == "__main__":
    main(sys.argv[1:])
