"""Names, paths and texts reach files and terminals as they are: no YAML, no markup, no codec."""

from __future__ import annotations

import ast
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from common.config.recipe import load_config, save_config
from common.config.run import RunConfig
from deploy.run_folder import checkpoints
from deploy.screen import make_console, progress_bar, say, show
from tests.deploy.commands import Outcome, Run
from tests.workspaces import run_copy

ROOT = Path(__file__).parents[2]


def place(config: RunConfig, folder: Path) -> Path:
    """A run with a supervised policy and a log, in exactly this folder."""
    made = run_copy(config, folder.parent / "placing")
    save_config(made, made.run_dir / "config.yaml")
    line = {"stage": "sft", "step": 1, "time": 0.0, "metrics": {"loss": 1.5}}
    (made.run_dir / "metrics.jsonl").write_text(json.dumps(line) + "\n", encoding="utf8")
    made.run_dir.rename(folder)
    return folder


# ------------------------------------------------------------------ folders

FOLDERS = [
    "2024-11-28",
    "007",
    "null",
    "true",
    "1e3",
    "exp #2/run",
    "a: b/run",
    "[x]/[/y]/run",
    "[bold]/:smile:",
    "a=b",
    "it's",
    'say "x"',
    "{a: 1}",
    "two  blanks",
    "naïve",
    "-dash",
    "~",
    "a\nb",
]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_run_opens_whatever_its_folder_is_called(
    run: Run, workspace: RunConfig, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    for decoy in ("exp/run", "a/run"):
        (tmp_path / decoy).mkdir(parents=True)
        save_config(RunConfig(), tmp_path / decoy / "config.yaml")
    folder = place(workspace, tmp_path / name)
    sampled = run("sample", str(folder), "--sft", "-p", "open:")
    assert sampled.code == 0, sampled
    assert sampled.out.splitlines()[0] == "open:"
    reported = run("report", str(folder))
    assert reported.code == 0, reported
    assert (folder / "report.html").exists()
    assert reported.out == f"report: {folder}/report.html\n".replace("a\nb", "a\\nb")


@pytest.mark.parametrize("name", FOLDERS)
def test_a_run_is_resumed_whatever_its_folder_is_called(
    run: Run, workspace: RunConfig, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    folder = place(workspace, tmp_path / name)
    state = {"iteration": 4, "config": yaml.safe_load((folder / "config.yaml").read_text())}
    checkpoints.write(folder, 4, lambda _: state, keep=1)
    (folder / "result.json").write_text('{"iterations": 4}', encoding="utf8")
    (folder / "policy").mkdir()
    shutil.copy(folder / "sft" / "policy.safetensors", folder / "policy")
    resumed = run("train", "--resume", str(folder))
    assert resumed.code == 0, resumed
    shown = str(folder).replace("a\nb", "a\\nb")
    assert resumed.out == f"{shown} is finished; nothing to train\n"


def test_a_folder_named_in_other_ways(
    run: Run, workspace: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place(workspace, tmp_path / "007")
    (tmp_path / "latest").symlink_to("007")
    (folder / "inside").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    for here, written in (
        (tmp_path, "007/"),
        (tmp_path, "./007"),
        (folder, "."),
        (folder / "inside", ".."),
        (tmp_path, "~/007"),
        (tmp_path, "latest"),
    ):
        monkeypatch.chdir(here)
        assert run("report", written).out == f"report: {folder}/report.html\n", written
        assert run("sample", written, "--sft", "-p", "open:").code == 0, written


def test_a_built_in_recipe_and_one_at_home(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r.yaml").write_text("seed: 5\n", encoding="utf8")
    assert "seed: 5\n" in run("config", "--config=~/r.yaml").out
    assert run("config", "--config", "quickstart").code == 0


# ------------------------------------------------------------------ texts

TEXTS = [
    "[INST] open the file [/INST]",
    "def f(x: list[str]) -> dict[str, int]:",
    "[/y] [bold]read",
    ":smile: 12 'x' True",
    "if a:\n\treturn 'tab'",
    "naïve 名前",
    "back\\[slash\\",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_is_echoed_as_it_was_given(
    run: Run, workspace: RunConfig, tmp_path: Path, text: str
) -> None:
    folder = place(workspace, tmp_path / "run")
    sampled = run("sample", str(folder), "--sft", "-p", text)
    assert sampled.code == 0, sampled
    assert sampled.out.startswith(text + "\n")


@pytest.mark.parametrize("text", [*TEXTS, "long " * 60])
def test_what_is_said_is_one_line_of_exactly_that_text(text: str) -> None:
    for console in (make_console(), Console()):
        console.file = io.StringIO()
        say(console, text, (text, "bold"))
        line = text.replace("\n", "\\n").replace("\t", "\\t")
        assert console.file.getvalue() == f"{line}{line}\n"
        console.file = io.StringIO()
        show(console, text)
        assert console.file.getvalue() == text + "\n"


@pytest.mark.parametrize("text", TEXTS)
def test_titles_and_notes_of_progress_are_texts(text: str) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=400, color_system=None)
    with progress_bar(console, text, 3) as bar:
        bar.update(1, f"note {text}")
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    line = text.replace("\n", "\\n").replace("\t", "\\t")
    assert f"{line} " in shown
    assert f"note {line}" in shown


def test_a_text_does_not_steer_the_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=400, color_system=None)
    show(console, "a\x1b[2Jb\x07\rc\nd")
    say(console, "e\x1b]0;title\x07\nf")
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown == "a\\x1b[2Jb\\x07\\x0dc\nd\ne\\x1b]0;title\\x07\\nf\n"


def test_an_error_names_a_path_as_it_is(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "[x]  [/y]" / (":smile:" * 30)
    path.mkdir(parents=True)
    assert run("status", str(path)) == Outcome(3, f"error {path}: not a run (no config.yaml)\n", "")
    refused = run("config", "--config", f"{path}/[red].yaml")
    assert refused.error.startswith(f"error {path}/[red].yaml: no such recipe")


def test_a_recipe_that_is_printed_is_one_that_can_be_read(run: Run, tmp_path: Path) -> None:
    output = str(tmp_path / ("[x] " * 40))
    shown = run("config", f"output={output}", "name=007")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(shown.out, encoding="utf8")
    assert load_config(recipe) == RunConfig(output=output, name="007")


def test_nothing_is_printed_but_through_the_screen() -> None:
    for path in (ROOT / "deploy").rglob("*.py"):
        if path.name in ("screen.py", "config_docs.py", "metric_docs.py"):
            continue
        if path.parent.name == "monitoring" and path.name in ("dashboard.py", "manifests.py"):
            continue  # generators, too
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ("print", "Console", "Progress"), f"{path}:{node.lineno}"
            if called.endswith(".print"):
                assert [ast.unparse(a) for a in node.args] == ["table"], f"{path}:{node.lineno}"


# ------------------------------------------------------------------ bytes and encodings


def command(*arguments: str | bytes, **environment: str) -> tuple[int, bytes, bytes]:
    """A command of its own process: code, out, error."""
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def test_bytes_that_are_no_text_and_a_terminal_of_ascii(
    workspace: RunConfig, tmp_path: Path
) -> None:
    folder = place(workspace, tmp_path / "naïve")
    sample = ("sample", str(folder), "--sft", "-p")
    code, _, error = command(*sample, b"open \xff:")
    assert (code, error.splitlines()) == (
        3,
        [b"error prompt 1 is not UTF-8: open \\udcff:; give it as UTF-8"],
    )
    code, out, error = command(*sample, "naïve 名前:".encode(), PYTHONIOENCODING="ascii")
    assert (code, error) == (0, b"")
    assert out.splitlines()[0] == b"na\\xefve \\u540d\\u524d:"


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "latin-1"}])
def test_a_path_that_is_no_text(tmp_path: Path, environment: dict[str, str]) -> None:
    folder = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(folder)
    Path(os.fsdecode(folder), "config.yaml").write_text("seed: 0\n", encoding="utf8")
    code, _, error = command("report", folder, **environment)
    assert code == 3
    assert len(error.splitlines()) == 1
    assert b"\\udcff: the path is not UTF-8" in error
    code, _, error = command("config", b"output=\xff", **environment)
    assert (code, len(error.splitlines())) == (2, 1)
    assert b"not UTF-8" in error


def test_files_have_the_same_encoding_in_every_locale() -> None:
    for folder in ("actors", "common", "deploy", "learner", "reward_service"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                given = {keyword.arg for keyword in node.keywords}
                binary = any("b" in ast.unparse(argument) for argument in node.args)
                is_text = node.func.attr in ("read_text", "write_text") or (
                    node.func.attr == "open"
                    and not binary
                    and ast.unparse(node.func) not in ("os.open", "Checkpoint.open")
                )
                assert not is_text or "encoding" in given, f"{path}:{node.lineno}"
