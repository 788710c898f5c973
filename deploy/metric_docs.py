"""The metrics reference, from the catalogue that runs log by.

``python -m deploy.metric_docs > docs/metrics.md``
"""

from __future__ import annotations

from common.metric_catalogue import Logged
from common.metric_facts import LABELS

_HEAD = """\
# Metrics

<!-- Written by `python -m deploy.metric_docs > docs/metrics.md`; do not edit. -->

A run logs these in `metrics.jsonl`, in TensorBoard (`tensorboard --logdir runs`) and, on the
cluster, as Ray's own metrics under `talipot_STAGE_NAME`. A gauge is of one step; a counter is of
the whole run: a worker's death, a restart of the learner and a resume go on with it. Parts of a
name in braces are labels, and stand for these values:
"""
_STAGES = {"sft": "Supervised policy", "reward": "Reward model", "train": "Policy training"}
_STAGES["held_out"] = "Evaluation while the policy is trained"


def metrics_page() -> str:
    """Write the whole page, ending in a newline."""
    labels = "\n".join(f"- `{{{name}}}`: {meaning}" for name, meaning in LABELS.items())
    parts = [_HEAD.strip(), labels]
    for stage, title in _STAGES.items():
        rows = [_row(metric) for metric in Logged if stage in metric.facts.stages]
        table = ["| metric | kind | unit | meaning | look for |", "|---|---|---|---|---|", *rows]
        parts += [f"## {title}: `{stage}`", "\n".join(table)]
    return "\n\n".join(parts) + "\n"


def _row(metric: Logged) -> str:
    facts = metric.facts
    meaning = facts.meaning + (f"; {facts.when}" if facts.when else "")
    return f"| `{metric}` | {facts.kind} | {facts.unit} | {meaning} | {facts.look_for} |"


if __name__ == "__main__":
    print(metrics_page(), end="")
