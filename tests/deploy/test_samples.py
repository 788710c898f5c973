"""`talipot samples`: which responses are shown, how, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from common.config.recipe import save_config
from common.config.run import RunConfig
from common.data.own_tokenizer import OwnTokenizer
from common.run_folder import RunFolder
from deploy.samples import pieces
from deploy.screen import say, show
from tests.deploy.commands import Run, refused
from tests.deploy.watch.served import log_samples
from tests.workspaces import run_copy

HOSTILE = "<script>alert(1)</script> \x1b[31mred\x1b[0m \u202egnp.exe ![x](http://x/y.png)"


@pytest.fixture
def logged(workspace: RunConfig, tmp_path: Path) -> RunConfig:
    """A run of one logged iteration of three responses."""
    config = run_copy(workspace, tmp_path)
    save_config(config, config.run_dir / "config.yaml")
    log_samples(config, 3, ["file", "naïve 日本", HOSTILE], scores=[0.5, -2.0, 1.5])
    return config


@pytest.mark.parametrize(
    ("order", "first"), [("best", 2), ("worst", 1), ("kl", 2), ("longest", 2), ("first", 0)]
)
def test_the_order_chooses(run: Run, logged: RunConfig, order: str, first: int) -> None:
    done = run("samples", str(logged.run_dir), "--order", order, "-n", "1", "--json")
    found = json.loads(done.out)
    assert (done.code, found["rollout_id"]) == (0, f"000003-{first:06d}")
    assert found["kl"] == pytest.approx(0.5 * found["length"])
    assert found["components"] == {"model": pytest.approx(found["score"]), "short": 0.25}


def test_tokens_are_aligned(run: Run, logged: RunConfig) -> None:
    done = run("samples", str(logged.run_dir), "--rollout", "000003-000001", "--tokens", "--json")
    sample = json.loads(done.out)
    texts = [token["text"] for token in sample["tokens"]]
    spelled = OwnTokenizer.load(logged.run_dir / "tokenizer.json").spelling(1)
    assert "".join(texts[:-1]) == "naïve 日本"
    assert texts[-1] == spelled, "EOS is called by its name"
    first = sample["tokens"][0]["advantage"]
    assert [first - t["advantage"] for t in sample["tokens"]] == list(range(len(texts)))
    shown = run("samples", str(logged.run_dir), "--rollout", "000003-000001", "--tokens").out
    assert all(name in shown for name in ("engine", "learner", "reference", "advantage"))
    assert repr(spelled) in shown


def test_random_is_seeded(run: Run, logged: RunConfig) -> None:
    def names(seed: int) -> list[str]:
        out = run("samples", str(logged.run_dir), "--json", "--seed", str(seed)).out
        return [json.loads(line)["rollout_id"] for line in out.splitlines()]

    assert names(0) == names(0)
    assert {tuple(sorted(names(seed))) for seed in range(4)} == {tuple(sorted(names(0)))}
    assert len({tuple(names(seed)) for seed in range(8)}) > 1


def test_refusals(run: Run, logged: RunConfig, workspace: RunConfig, tmp_path: Path) -> None:
    folder = str(logged.run_dir)
    refused(run("samples", folder, "--order", "bset"), 2, "best, worst, kl", "did you mean best?")
    refused(run("samples", folder, "--iteration", "7"), 3, "iteration 7", "from 3 to 3")
    refused(run("samples", folder, "--rollout", "000003-000009"), 3, "000003-000009")
    refused(run("samples", folder, "--rollout", "best"), 3, "ITERATION-NUMBER")
    path = RunFolder(logged.run_dir).trajectories(3)
    path.write_bytes(path.read_bytes()[:-20])
    refused(run("samples", folder), 3, path.name, "damaged")
    path.unlink()
    refused(run("samples", folder), 3, "no trajectory is logged")


def test_a_terminal_is_not_steered_by_what_it_shows() -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    plain = Console(file=io.StringIO(), force_terminal=True, width=80, no_color=True)
    for console in (terminal, plain):
        show(console, HOSTILE)
        say(console, HOSTILE)
        out = console.file.getvalue()  # type: ignore[attr-defined]
        assert "\x1b[31m" not in out
        assert "\u202e" not in out
        assert out.count("\\u202e") == 2
        assert "<script>" in out


def test_pieces_are_the_text() -> None:
    tokenizer = OwnTokenizer.train(iter(["read the file"] * 8), 290)
    for text in ("read the file", "日本", "a\u0301 é 🙂", ""):
        ids = tokenizer.encode(text)
        assert "".join(pieces(ids, tokenizer)) == text
    cut = tokenizer.encode("日")[:-1]
    assert "".join(pieces(cut, tokenizer)) == tokenizer.decode(cut)
