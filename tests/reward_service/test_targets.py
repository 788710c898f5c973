"""What is told of a reward's target by reading alone, and what is left for a worker to tell."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from common.config.workers import RewardServiceConfig
from common.errors import ConfigError
from reward_service.targets import require_function, require_targets

SOURCE = """
import os as system
from math import sqrt
raise RuntimeError("reading is not importing")
def score(prompts, responses): ...
if True:
    def inside(prompts, responses): ...
else:
    other = score
try:
    import json.decoder
except ImportError:
    fallback = None
class Judge: ...
first, (second, *rest) = 1, (2, 3)
with open("x") as opened: ...
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on Python's path with one module, which nobody can import."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "my_rewards.py").write_text(SOURCE, encoding="utf8")
    return tmp_path / "my_rewards.py"


BOUND = "score inside other fallback Judge system sqrt json first second rest opened"


@pytest.mark.parametrize("name", BOUND.split())
def test_what_a_module_binds_is_found(module: Path, name: str) -> None:
    require_function(f"my_rewards:{name}")
    assert "my_rewards" not in sys.modules


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("my_rewards", "package.module:function"),
        ("my_rewards:", "package.module:function"),
        ("my_rewards:scor", r"my_rewards.py\) has no 'scor'; did you mean 'score'\?"),
        ("my_rewards:zzz", r"has no 'zzz'$"),
        ("my_reward:score", "no module named 'my_reward'"),
        ("my_rewards.deep:score", "no module named 'my_rewards.deep'"),
        ("tests.reward_service.nowhere:f", "no module named 'tests.reward_service.nowhere'"),
    ],
)
def test_a_typo_is_found(module: Path, target: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        require_function(target)


@pytest.mark.parametrize(
    "source", ["from math import *", "def __getattr__(name): ...", "globals()['made'] = len"]
)
def test_names_that_are_nowhere_written_are_left_to_a_worker(module: Path, source: str) -> None:
    module.write_text(source, encoding="utf8")
    require_function("my_rewards:made")
    require_function("math:fsum")  # no Python text


def test_a_module_that_is_no_python_is_named_with_its_line(module: Path) -> None:
    module.write_text("x = 1\ndef score(:\n", encoding="utf8")
    with pytest.raises(ConfigError, match=r"my_rewards.py:2: invalid syntax"):
        require_function("my_rewards:score")


def test_what_only_workers_elsewhere_have_is_not_asked_here(
    module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    components = RewardServiceConfig.model_validate(
        {
            "components": {
                "mine": {"kind": "function", "target": "their_rewards:f"},
                "remote": {"kind": "http", "target": "http://h/x", "token_env": "THEIR_TOKEN"},
            }
        }
    ).components
    require_targets(components, here=False)
    with pytest.raises(ConfigError, match=r"reward_service.components.mine: .*'their_rewards'"):
        require_targets(components, here=True)
    remote = {"remote": components["remote"]}
    with pytest.raises(ConfigError, match=r"components.remote: .*THEIR_TOKEN is not set"):
        require_targets(remote, here=True)
    monkeypatch.setenv("THEIR_TOKEN", "t")
    require_targets(remote, here=True)
