"""A new user's way, on the page that leads it: every file and every command, in their order.

The commands run as they stand, in a shell and in processes of their own, in a folder of the user's.
In small they get the overrides of `SMALL` at their end and join a cluster that is there; the slow
version runs them unchanged.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import pytest
import ray

import talipot
from tests.test_python_api import examples

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "own-task.md").read_text(encoding="utf8")
HAND_OVER = (ROOT / "docs" / "hand-over.md").read_text(encoding="utf8")
_TRAIN = "train.iterations=2 train.prompts_per_iteration=8 train.minibatches=1 rollout.lease_size=8"
_QUICK = "cluster.dashboard=false"
SMALL = {
    "sft": f"sft.epochs=0.2 {_QUICK}",
    "reward": f"reward_model.epochs=0.2 {_QUICK}",
    "train": f"{_TRAIN} train.checkpoint_every=1 {_QUICK}",
    "evaluate": "evaluate.prompts=8",
}

ALONE = ("talipot validate", "talipot sft", "PYTHONPATH=")
"""Commands that start a cluster of their own in small too."""


def files() -> dict[str, str]:
    """Name -> contents of every file that the page has the reader write."""
    found = dict(re.findall(r"^```python file=(\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
    (recipe,) = examples(PAGE, "yaml recipe")
    return found | {"titles.yaml": recipe}


def commands(*, small: bool) -> Iterator[str]:
    """Every line of the page's shells."""
    for block in examples(PAGE, "sh"):
        for line in block.splitlines():
            yield in_small(line) if small else line


def in_small(line: str) -> str:
    """A command of the page with fewer steps."""
    line = re.sub(r"--stop-after \d+", "--stop-after 1", line)
    stage = re.search(r"\btalipot (\w+)", line)
    more = SMALL.get(stage[1], "") if stage and "--resume" not in line else ""
    return f"{line} {more}".strip()


def walk(folder: Path, *, small: bool, address: str = "") -> dict[str, str]:
    """Run the whole page in a folder; command -> what it printed.

    Without an address each command that needs a cluster starts its own. So do the first ones, and
    one that sets `PYTHONPATH`: workers get this variable when their node starts.
    """
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_A", "PYTHONPATH"))}
    outside["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    joined = {k: v for k, v in os.environ.items() if k.startswith("RAY_A")} if address else {}
    joined["RAY_ADDRESS"] = address
    for name, text in files().items():
        (folder / name).write_text(text, encoding="utf8")
    said: dict[str, str] = {}
    place = folder
    for line in commands(small=small):
        done = subprocess.run(
            ["bash", "-c", f"{line} && pwd > {shlex.quote(str(folder / '.pwd'))}"],
            cwd=place,
            env=outside if any(text in line for text in ALONE) else outside | joined,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, f"{line}\n{done.stderr}"
        place = Path((folder / ".pwd").read_text(encoding="utf8").strip())
        said[line] = done.stdout
    return said


def told(said: dict[str, str], command: str) -> str:
    """What the only command that begins so printed."""
    (found,) = (text for line, text in said.items() if command in line)
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_page_in_small(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = walk(tmp_path, small=True, address=ray.get_runtime_context().gcs_address)
    check(tmp_path, said)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    exec(compile("\n".join(examples(HAND_OVER, "python inside")), "docs", "exec"), {})


@pytest.mark.slow
@pytest.mark.journey
@pytest.mark.timeout(3600)
def test_the_page_as_it_stands(tmp_path: Path) -> None:
    """Some minutes: the policy learns what it is meant to."""
    said = walk(tmp_path, small=False)
    check(tmp_path, said)
    figures = (tmp_path / "runs" / "titles" / "evaluation.json").read_text(encoding="utf8")
    assert json.loads(figures)["win_rate"] > 0.6, figures
    scores = [step["score"] for step in talipot.load_run(tmp_path / "elsewhere/moved").metrics()]
    # Of 32 prompts each: one iteration alone says little.
    assert fmean(scores[-5:]) > fmean(scores[:5]), scores


def check(folder: Path, said: dict[str, str]) -> None:
    """What every way through the page leaves."""
    runs = folder / "runs" / "titles", folder / "elsewhere" / "moved"
    for run in runs:
        facts = json.loads((run / "result.json").read_text(encoding="utf8"))
        assert facts["rollouts_issued"] == facts["rollouts_trained"], facts
        assert (run / "report.html").stat().st_size > 10_000
    assert "nothing stands in the way" in told(said, "talipot validate")
    assert json.loads(told(said, "--json"))["state"] == "not running"
    assert "brand: Ardo" in told(said, "talipot sample runs/titles")
    assert facts["weights_hash"] in told(said, "talipot replay")
    assert (runs[1] / "code" / "rewards.py").read_bytes() == (folder / "rewards.py").read_bytes()
    assert (runs[1] / "policy" / "adapter").is_dir()
    exported = {path.name for path in (folder / "titles-policy").iterdir()}
    assert exported == {"README.md", "model.json", "policy.safetensors", "tokenizer.json"}
    # Nothing was left where the commands were started.
    assert {p.name for p in (folder / "elsewhere").iterdir()} == {"moved", "moved.replay"}


def test_every_file_of_the_page_is_made_on_it() -> None:
    recipe = files()["titles.yaml"]
    made = set(re.findall(r'"([\w-]+\.jsonl)"', files()["make_titles.py"]))
    assert made == set(re.findall(r"[\w-]+\.jsonl", recipe))
    assert "rewards.py" in files()
    assert {c.split()[1] for c in commands(small=True) if c.startswith("talipot")} >= {
        *("sft", "reward", "train", "sample", "evaluate", "report", "replay", "export")
    }
