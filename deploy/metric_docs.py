"""The metrics reference, from the catalogue that runs log by.

``python -m deploy.metric_docs > docs/metrics.md``
"""

from __future__ import annotations

from common.live_metrics import Live
from common.metric_catalogue import Logged
from common.metric_facts import LABELS, Catalogue

_HEAD = """\
# Metrics

<!-- Written by `python -m deploy.metric_docs > docs/metrics.md`; do not edit. -->

A run logs these in `metrics.jsonl`, in TensorBoard (`tensorboard --logdir runs`) and, on the
cluster, as Ray's own metrics. A gauge is of one step; a counter is of the whole run: a worker's
death, a restart of the learner and a resume go on with it. Parts of a name in braces are labels,
and stand for these values:
"""
_SERIES = """\
## As Ray's metrics

On the port where Ray hands out metrics the one called `NAME` in the column *series* is
`ray_talipot_NAME`, with the labels `run` and `stage`, those in braces, and Ray's own. Every value
is told again every five seconds, since Ray forgets within half a minute what is not; counters are
gauges (Ray's own refuse a first 0), and are 0 before anything has happened; they rise, but that a
restart of the learner takes back what its lost iterations had dropped. Fold
Ray's label `WorkerId`: `max by (run, pool)(ray_talipot_workers)` for what is,
`sum by (run, role)(rate(ray_talipot_busy_seconds_total[1m]))` for what is done.

## Of each process

No log has these; they begin and end with a process, and have no `stage`.
"""
_STAGES = {"sft": "Supervised policy", "reward": "Reward model", "train": "Policy training"}
_STAGES["held_out"] = "Evaluation while the policy is trained"


def metrics_page() -> str:
    """Write the whole page, ending in a newline."""
    labels = "\n".join(f"- `{{{name}}}`: {meaning}" for name, meaning in LABELS.items())
    parts = [_HEAD.strip(), labels]
    for stage, title in _STAGES.items():
        rows = [_row(metric) for metric in Logged if stage in metric.facts.stages]
        parts += [f"## {title}: `{stage}`", _table(rows)]
    parts += [_SERIES.strip(), _table([_row(metric) for metric in Live])]
    return "\n\n".join(parts) + "\n"


def _table(rows: list[str]) -> str:
    head = ["| metric | series | kind | unit | meaning | look for |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *rows])


def _row(metric: Catalogue) -> str:
    facts = metric.facts
    meaning = facts.meaning + (f"; {facts.when}" if facts.when else "")
    return (
        f"| `{metric}` | `{facts.series}` | {facts.kind} | {facts.unit} | {meaning} | "
        f"{facts.look_for} |"
    )


if __name__ == "__main__":
    print(metrics_page(), end="")
