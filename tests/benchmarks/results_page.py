"""Writes `docs/results.md` from the summaries that `tests.benchmarks.experiments` left.

``python -m tests.benchmarks.results_page OUT > docs/results.md``. A table whose runs are missing
says so instead of being left out.
"""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from deploy.evaluation.intervals import Interval, best_of_n_kl
from deploy.evaluation.results import figure
from deploy.instruct.instructions import KINDS
from tests.benchmarks.bases import SEEDS
from tests.benchmarks.experiments import (
    BEST_FULL_LR,
    FULL_LRS,
    INSTRUCT,
    KL_COEFS,
    LORA_LR,
    LORA_LRS,
    LORA_RANK,
    LORA_RANKS,
    REASONING,
)

Summary = dict[str, Any]
RECIPE_KL = 0.1
"""The recipe's kl_coef; its run without PPG is `ppo-s0`."""
RECIPE_LR = 8e-4
T_975 = {2: 12.706, 3: 4.303}
"""Student's t at 97.5 % by the number of seeds."""

COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "judge_conformance": ("conformance", lambda x: f"{100 * x:.1f} %"),
    "win_rate": ("win rate", lambda x: f"{100 * x:.1f} %"),
    "rouge_l": ("ROUGE-L", lambda x: f"{x:.4f}"),
    "quality": ("labeler's quality", lambda x: f"{x:.3f}"),
    "distinct": ("distinct", lambda x: f"{100 * x:.1f} %"),
    "response_length": ("tokens", lambda x: f"{x:.1f}"),
    "nll": ("NLL under SFT", lambda x: f"{x:.2f}"),
    "kl": ("KL, nats", lambda x: f"{x:.1f}"),
}


OF_BOTH = ("win_rate", "kl", "judge_accuracy_rise", "seconds_train", "resident_gb")
"""Figures without a side: they are of both, or of the whole run."""
TRAINED = ("policy", "after")
"""Names of the trained side in the recipes."""
INSTRUCT_COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "judge_accuracy": ("held-out topics", lambda x: f"{100 * x:.1f} %"),
    "judge_accuracy_rise": ("rise", lambda x: f"{100 * x:.1f}"),
    "judge_accuracy_combinations": ("combinations", lambda x: f"{100 * x:.1f} %"),
    "judge_accuracy_kinds": ("kinds", lambda x: f"{100 * x:.1f} %"),
    "judge_accuracy_sampled": ("topics, sampled", lambda x: f"{100 * x:.1f} %"),
    "text_nll": ("NLL of other text", lambda x: f"{x:.3f}"),
    "capitals_known": ("capitals", lambda x: f"{100 * x:.1f} %"),
    "response_length": ("tokens", lambda x: f"{x:.1f}"),
    "kl": ("KL, nats", lambda x: f"{x:.1f}"),
    "seconds_train": ("training, s", lambda x: f"{x:.0f}"),
}


def load(out: Path, name: str) -> Summary | None:
    """Load a run's summary, if it is there."""
    path = out / name / "summary.json"
    if not path.exists():
        return None
    summary: Summary = json.loads(path.read_text(encoding="utf8"))
    return summary


def value(summary: Summary, name: str, side: str) -> float | None:
    """Return a figure of one side; win rate and KL, of both, stand beside the trained policy."""
    if name not in OF_BOTH:
        measured = figure(summary, name, side)
    else:
        measured = figure(summary, name) if side in TRAINED else None
    return measured.mean if isinstance(measured, Interval) else measured


def spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """Write a mean and the half width of its 95 % interval over seeds (Student's t)."""
    if len(values) not in T_975:
        return form(fmean(values))
    half = T_975[len(values)] * stdev(values) / math.sqrt(len(values))
    return f"{form(fmean(values))} ± {form(half)}"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Write a Markdown table."""
    head = list(header)
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def comparison(
    out: Path,
    rows: Sequence[tuple[str, Sequence[str], str]],
    columns: Mapping[str, tuple[str, Callable[[float], str]]] = COLUMNS,
) -> list[str]:
    """Show rows of (title, names of runs, side) under columns; ± is over seeds."""
    lines = []
    for title, names, side in rows:
        found = [s for name in names if (s := load(out, name)) is not None]
        cells = [title, str(len(found))]
        for key, (_, form) in columns.items():
            values = [v for s in found if (v := value(s, key, side)) is not None]
            cells.append(spread(values, form) if values else "")
        lines.append(cells)
    return table(["", "seeds", *(title for title, _ in columns.values())], lines)


def of_seeds(kind: str) -> list[str]:
    """List the names of the runs of one kind."""
    return [f"{kind}-s{seed}" for seed in SEEDS]


def outcome(out: Path) -> list[str]:
    """Show the quickstart over seeds, its cost, and the other ZeRO stages."""
    lines = comparison(
        out,
        [
            ("people's own lines", of_seeds("quickstart"), "human"),
            ("supervised policy", of_seeds("quickstart"), "sft"),
            ("policy (PPO + PPG)", of_seeds("quickstart"), "policy"),
        ],
    )
    names = [*of_seeds("quickstart"), *(f"zero-{stage}" for stage in (0, 1, 3))]
    head = ["run", "conformance", "win rate (95 %)", "ties", "ROUGE-L", "reward model accuracy"]
    rows = [one_run(name, load(out, name)) for name in names]
    return lines + table([*head, "rollouts issued / trained / dropped", "seconds"], rows)


def one_run(name: str, found: Summary | None) -> list[str]:
    """Show a whole run in a row; an arrow leads from the supervised to the trained policy."""
    if found is None:
        return [name, *["not run"] * 7]
    before, after = found["judge_conformance_sft"], found["judge_conformance_policy"]
    low, high = found["win_rate_low"], found["win_rate_high"]
    counts = (found[f"rollouts_{kind}"] for kind in ("issued", "trained", "dropped"))
    return [
        name,
        f"{100 * before:.1f} → {100 * after:.1f} %",
        f"{100 * found['win_rate']:.1f} % ({100 * low:.1f} to {100 * high:.1f})",
        f"{100 * found['ties_share']:.1f} %",
        f"{found['rouge_l_sft']:.4f} → {found['rouge_l_policy']:.4f}",
        f"{100 * found['reward_model_accuracy']:.1f} %",
        " / ".join(str(count) for count in counts),
        f"{found['seconds_pipeline']:.0f}",
    ]


def equal_samples(out: Path) -> list[str]:
    """Compare all algorithms on the same base at the same number of rollouts."""
    kinds = [
        ("supervised policy", "quickstart", "sft"),
        ("best of 16 by the reward model", "best-of-16", "policy"),
        ("PPO", "ppo", "policy"),
        ("PPG (the recipe)", "quickstart", "policy"),
        ("RLOO, 4 samples a prompt", "rloo", "policy"),
        ("GRPO, 4 samples a prompt", "grpo", "policy"),
    ]
    return comparison(out, [(title, of_seeds(kind), side) for title, kind, side in kinds])


def pairwise_kind(out: Path, rows: Sequence[tuple[str, str]]) -> list[str]:
    """Compare kinds of run over seeds."""
    return comparison(out, [(title, of_seeds(kind), "policy") for title, kind in rows])


def adapters(out: Path) -> list[str]:
    """Compare LoRA with full fine-tuning from the same base."""
    kinds = [
        (f"all weights, lr {RECIPE_LR:g} (the recipe)", "quickstart"),
        (f"all weights, lr {BEST_FULL_LR:g}", "full-best"),
    ]
    kinds += [(f"LoRA, rank {rank}, lr {LORA_LR:g}", f"lora-r{rank}") for rank in LORA_RANKS]
    rows = [("supervised policy", of_seeds("quickstart"), "sft")]
    rows += [(title, of_seeds(kind), "policy") for title, kind in kinds]
    return comparison(out, rows)


def learning_rates(out: Path) -> list[str]:
    """Compare learning rates for either kind, on seed 0."""
    full = {**{lr: f"full-lr-{lr}" for lr in FULL_LRS}, RECIPE_LR: "quickstart-s0"}
    lora = {**{lr: f"lora-lr-{lr}" for lr in LORA_LRS}, LORA_LR: f"lora-r{LORA_RANK}-s0"}
    rows = [
        (f"{kind}, lr {lr:g}", [runs[lr]], "policy")
        for kind, runs in (("all weights", full), (f"LoRA, rank {LORA_RANK}", lora))
        for lr in sorted(runs)
    ]
    return comparison(out, rows)


def kl_coefficients(out: Path) -> list[str]:
    """Show the KL at the end for each kl_coef."""
    runs = {**{c: f"kl-{c}" for c in KL_COEFS}, RECIPE_KL: "ppo-s0"}
    rows = [(f"kl_coef {c}", [runs[c]], "policy") for c in sorted(runs, reverse=True)]
    return comparison(out, rows)


def best_of_n(out: Path) -> list[str]:
    """Show the KL of best-of-N, measured, beside its closed form."""
    found = load(out, "best-of-n")
    rows = []
    for row in found["rows"] if found else ():
        n = int(row["n"])
        rows.append(
            [
                str(n),
                f"{row['kl']:.3f}",
                f"{best_of_n_kl(n):.3f}",
                f"{row['score']:.3f}",
                f"{row['quality']:.3f}",
                f"{100 * row['judge_conformance']:.1f} %",
                f"{row['rouge_l']:.4f}",
            ]
        )
    head = ["N", "KL measured", "log N - (N-1)/N", "proxy score", "labeler's quality"]
    return table([*head, "conformance", "ROUGE-L"], rows)


def reward_data(out: Path) -> list[str]:
    """Show accuracy by the number of comparisons."""
    found = load(out, "reward-data")
    rows = []
    groups = found["rows"] if found else []
    for count in sorted({row["comparisons"] for row in groups}):
        values = [r["accuracy_heldout"] for r in groups if r["comparisons"] == count]
        shown = spread(values, lambda x: f"{100 * x:.1f} %")
        rows.append([str(count), shown, str(len(values))])
    return table(["comparisons", "held-out accuracy", "seeds"], rows)


def over_optimisation(out: Path) -> list[str]:
    """Show every tenth iteration of the pushed run."""
    found = load(out, "over-optimisation")
    rows = []
    for row in (found["rows"] if found else [])[::10]:
        rows.append(
            [
                str(row["iteration"]),
                f"{row['kl']:.1f}",
                f"{row['score']:.2f}",
                f"{row['quality']:.3f}",
                f"{100 * row['judge_conformance']:.1f} %",
                f"{row['rouge_l']:.4f}",
                f"{100 * row['distinct']:.1f} %",
            ]
        )
    head = ["iteration", "KL", "proxy score", "labeler's quality", "conformance", "ROUGE-L"]
    return table([*head, "distinct"], rows)


def instruct(out: Path) -> list[str]:
    """Compare algorithms on the recipe `instruct` at equal rollouts."""
    runs = {kind: [f"instruct-{kind}-s{seed}" for seed in SEEDS] for kind in INSTRUCT}
    names = {"grpo": "GRPO (the recipe)", "rloo": "RLOO", "ppo": "PPO", "ppg": "PPG"}
    own = runs[next(iter(INSTRUCT))]
    rows = [("as it came", own, "before"), ("taught", own, "taught")]
    rows += [(names[kind], runs[kind], "after") for kind in INSTRUCT]
    return comparison(out, rows, INSTRUCT_COLUMNS)


def instruct_runs(out: Path) -> list[str]:
    """Show each run of the recipe `instruct`; an arrow leads from the model as it came."""
    names = [f"instruct-{kind}-s{seed}" for kind in INSTRUCT for seed in SEEDS]
    head = ["run", "held-out topics", "rise (95 %)", "sampled", "rise (95 %)", "KL, nats"]
    head += ["rollouts issued / trained / dropped", "GB", "seconds"]
    rows = []
    for name in names:
        if (found := load(out, name)) is None:
            continue
        cells = [name]
        for key in ("judge_accuracy", "judge_accuracy_sampled"):
            before, after = (100 * found[f"{key}_{side}"] for side in ("before", "after"))
            mean, low, high = (100 * found[f"{key}_rise{end}"] for end in ("", "_low", "_high"))
            cells += [f"{before:.1f} → {after:.1f} %", f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"]
        counts = (found[f"rollouts_{kind}"] for kind in ("issued", "trained", "dropped"))
        cells += [f"{found['kl']:.1f}", " / ".join(map(str, counts))]
        rows.append([*cells, f"{found['resident_gb']:.2f}", f"{found['seconds_pipeline']:.0f}"])
    return table(head, rows)


def instruct_kinds(out: Path) -> list[str]:
    """Show the share of instructions of each kind that are followed, over seeds."""
    own = next(iter(INSTRUCT))
    found = [s for seed in SEEDS if (s := load(out, f"instruct-{own}-s{seed}")) is not None]
    rows = []
    for name, kind in KINDS.items():
        sides = [
            [v for s in found if (v := value(s, f"follows_{name}", side)) is not None]
            for side in ("before", "after")
        ]
        shown = (spread(of, lambda x: f"{100 * x:.0f} %") if of else "" for of in sides)
        rows.append([name.replace("_", " "), "" if kind.trained else "held out", *shown])
    return table(["kind", "", "as it came", "trained"], rows)


REASONING_NAMES = {
    "grpo": "GRPO (the recipe)",
    "grpo-short": "GRPO",
    "dr-grpo": "Dr. GRPO",
    "dapo": "DAPO",
    "gspo": "GSPO",
    "reinforce-pp": "REINFORCE++",
    "ppo": "PPO",
    "ppg": "PPG",
}


def reasoning(out: Path) -> list[str]:
    """Show each run of the recipe `reasoning`; an arrow leads from the taught policy."""
    own = next(iter(REASONING))
    names = {f"reasoning-{kind}-s{seed}": (kind, seed) for kind in REASONING for seed in SEEDS}
    runs = {name: found for name in names if (found := load(out, name)) is not None}
    if not runs:
        return table(["run"], [])
    families = list(runs[f"reasoning-{own}-s0"]["judge_accuracy_after"])
    head = ["algorithm", "seed"]
    for family in families:
        head += [f"`{family}`", "rise (95 %)", "sampled"]
    head += ["KL, nats", "rollouts issued / trained / dropped", "seconds"]
    rows = []
    for name, found in runs.items():
        kind, seed = names[name]
        cells = [REASONING_NAMES[kind], str(seed)]
        for family in families:
            before, after = (
                found[f"judge_accuracy_{side}"][family] for side in ("before", "after")
            )
            mean, low, high = (
                100 * found[f"judge_accuracy_rise{end}"][family] for end in ("", "_low", "_high")
            )
            sampled = found["judge_accuracy_sampled_rise"][family]
            cells += [
                f"{100 * before:.1f} → {100 * after:.1f} %",
                f"{mean:+.1f} ({low:+.1f} to {high:+.1f})",
                f"{100 * sampled:+.1f}",
            ]
        counts = (found[f"rollouts_{kind}"] for kind in ("issued", "trained", "dropped"))
        cells += [f"{found['kl']:.1f}", " / ".join(map(str, counts))]
        rows.append([*cells, f"{found['seconds_pipeline']:.0f}"])
    return table(head, rows)


def fill(template: str, out: Path) -> str:
    """Fill the page: replace every ``<!-- table: NAME -->`` of the template by its table."""
    tables: dict[str, Callable[[], list[str]]] = {
        "outcome": lambda: outcome(out),
        "equal-samples": lambda: equal_samples(out),
        "beta-clone": lambda: pairwise_kind(
            out, [("beta_clone 1", "quickstart"), ("beta_clone 0", "beta-clone-0")]
        ),
        "value-network": lambda: pairwise_kind(
            out, [("separate", "quickstart"), ("shared", "shared-value")]
        ),
        "lora": lambda: adapters(out),
        "lora-rates": lambda: learning_rates(out),
        "kl": lambda: kl_coefficients(out),
        "best-of-n": lambda: best_of_n(out),
        "reward-data": lambda: reward_data(out),
        "over-optimisation": lambda: over_optimisation(out),
        "instruct": lambda: instruct(out),
        "instruct-runs": lambda: instruct_runs(out),
        "instruct-kinds": lambda: instruct_kinds(out),
        "reasoning": lambda: reasoning(out),
    }
    for name, make in tables.items():
        template = template.replace(f"<!-- table: {name} -->\n", "\n".join([*make(), ""]))
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "ray", "deepspeed")]
    machine = f"2 cores, Python {platform.python_version()}, {', '.join(versions)}"
    return template.replace("<!-- machine -->", machine)


def main(arguments: Sequence[str]) -> None:
    """Print the page."""
    template = Path(__file__).with_name("results_page.md").read_text(encoding="utf8")
    print(fill(template, Path(arguments[0])), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
