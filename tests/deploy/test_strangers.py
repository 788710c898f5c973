"""Other people's modules of our names, in the working folder and on PYTHONPATH, change nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import talipot_first

ROOT = Path(__file__).parents[2]
NAMES = (*talipot_first.OURS, "tests")
PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from talipot_first import ours_first
sys.path.remove({root!r})
ours_first()
import json, ray
from common.config.run import RunConfig
from deploy.workers.attach import cluster_of
from reward_service.samples import Sample
from reward_service.scorers import FunctionScorer

def look():
    import common.config.run, learner.algorithms.gae
    return [common.config.run.__file__, learner.algorithms.gae.__file__]

request = Sample(rollout_id="a", prompt="p", response="four")
with cluster_of(RunConfig.model_validate({{"cluster": {{"dashboard": False}}}})):
    scorer = ray.remote(FunctionScorer).options(num_cpus=0).remote("my_reward:score")
    (found,) = ray.get(scorer.score.remote([request]))
    print(json.dumps([*ray.get(ray.remote(look).options(num_cpus=0).remote()), found.score]))
"""


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder with a module and a package of each name, and a reward function."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for index, name in enumerate(NAMES):
        raises = f"raise RuntimeError('theirs: {name}')\n"
        if index % 2:
            (folder / name).mkdir()
            (folder / name / "__init__.py").write_text(raises, encoding="utf8")
        else:
            (folder / f"{name}.py").write_text(raises, encoding="utf8")
    (folder / "my_reward.py").write_text(
        "def score(prompts, responses):\n    return [float(len(r)) for r in responses]\n",
        encoding="utf8",
    )
    return folder


def start(folder: Path, program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": "", "RAY_ADDRESS": "", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("on_path", [True, False])
def test_the_command_finds_ours(hostile: Path, on_path: bool) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import talipot_first; "
        f"sys.path.remove({str(ROOT)!r}); sys.argv = ['talipot', 'config', 'seed=7']; "
        "talipot_first.main()"
    )
    done = start(hostile, program, PYTHONPATH=str(hostile) if on_path else "")
    assert (done.returncode, done.stderr) == (0, "")
    assert "seed: 7\n" in done.stdout


@pytest.mark.slow
def test_workers_find_ours_and_the_users_reward(hostile: Path) -> None:
    program = PROGRAM.format(root=str(ROOT))
    done = start(hostile, program, PYTHONPATH=f"{hostile}{os.pathsep}{ROOT}")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found == [f"{ROOT}/common/config/run.py", f"{ROOT}/learner/algorithms/gae.py", 4.0]


def test_strangers_are_noticed(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(ROOT)
    assert talipot_first.strangers() == []
    monkeypatch.chdir(hostile)
    found = talipot_first.strangers()
    assert str(hostile / "actors.py") in found
    assert any(place.startswith(str(hostile / "common")) for place in found)
    monkeypatch.chdir(hostile.parent)
    monkeypatch.setenv("PYTHONPATH", str(hostile))
    assert str(hostile / "deploy.py") in talipot_first.strangers()
