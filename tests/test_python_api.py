"""`import talipot`: quick, documented name by name, and its page's examples run as they stand."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import talipot
from common.errors import ConfigError, DataError
from common.wire.trajectory import LEARNT, LOGGED_ITERATION, SCHEMAS, ScoredTrajectory
from tests.workspaces import WORDS

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "python-api.md").read_text(encoding="utf8")
LOG_PAGE = (ROOT / "docs" / "trajectories.md").read_text(encoding="utf8")
SMALL = (
    "train.prompts_per_iteration=8",
    "train.minibatches=1",
    "train.ppg=null",
    "rollout.lease_size=4",
    "rollout.actors=1",
    "learner.ranks=1",
    "tokenizer.vocab_size=290",
    "sft.epochs=0.5",
)


def examples(page: str, kind: str = "python") -> list[str]:
    """The page's blocks of one kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def public_names() -> dict[str, Any]:
    """Every public name, methods and fields of classes too, as the page writes them."""
    names: dict[str, Any] = {}
    for name in talipot.__all__:
        thing = getattr(talipot, name)
        names[f"talipot.{name}"] = thing
        if inspect.isclass(thing) and thing.__module__ == "talipot":
            members = {n: m for n, m in vars(thing).items() if not n.startswith("_")}
            names |= {f"{name}.{n}": m for n, m in members.items()}
    return names


@pytest.mark.parametrize("name", public_names())
def test_every_public_name_is_documented(name: str) -> None:
    thing = public_names()[name]
    is_field = inspect.isdatadescriptor(thing) and not isinstance(thing, property)
    assert is_field or inspect.getdoc(thing), f"{name} has no docstring"
    listed = re.search(rf"^\| .*`{re.escape(name)}[`(]", PAGE, re.MULTILINE)
    field = re.search(rf"^\| `talipot\.Score` \| .*`{name.split('.')[-1]}`", PAGE, re.MULTILINE)
    assert listed or field, f"{name} is not in the table of docs/python-api.md"


def test_no_name_is_documented_that_is_not_there() -> None:
    table = PAGE[PAGE.index("## All names") :]
    listed = set(re.findall(r"`((?:talipot|Run|Policy)\.\w+)[`(]", table))
    assert listed <= public_names().keys() | {"talipot.Score"}


def start(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    lines = f"import sys; sys.path.append({str(ROOT)!r})\n{program}"
    return subprocess.run(
        [sys.executable, "-c", lines], cwd=folder, capture_output=True, text=True, timeout=60
    )


def test_the_import_is_light(tmp_path: Path) -> None:
    heavy = "{'torch', 'ray', 'pyarrow', 'transformers', 'pydantic', 'numpy', 'rich'}"
    done = start(f"import talipot; print({heavy} & {{*sys.modules}})", tmp_path)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_a_module_of_the_users_that_has_our_name(tmp_path: Path) -> None:
    (tmp_path / "common.py").write_text("THEIRS = True\n", encoding="utf8")
    assert start("import talipot, common.errors; print('ours')", tmp_path).stdout == "ours\n"
    done = start("import common, talipot", tmp_path)
    assert done.returncode == 1
    assert "a module 'common' of another project is imported already" in done.stderr


def test_mistakes_are_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="not a run"):
        talipot.load_run("none")
    with pytest.raises(ConfigError, match=r"^recipe:2: unknown key 'train.kl_coeff'"):
        talipot.run("train", {"train": {"kl_coeff": 1}})
    with pytest.raises(ValueError, match="should be sft, reward or train"):
        talipot.run("tain", {})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def project(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a reward function, as the page's examples name them."""
    folder = tmp_path_factory.mktemp("project")
    texts = [(f"{a} {b}:", f" {b} {a}") for a in WORDS for b in WORDS]
    for name, rows in (
        ("demonstrations", [{"prompt": p, "response": r} for p, r in texts]),
        ("prompts", [{"prompt": p} for p, _ in texts]),
    ):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf8")
    return folder


@dataclass(frozen=True)
class Walked:
    """What both pages' examples left."""

    names: dict[str, Any]
    said: str


@pytest.fixture(scope="module")
def walked(project: Path) -> Walked:
    """All of one page after the other, in the order in which they stand."""
    whole, said, names = talipot.run, io.StringIO(), dict[str, Any]()

    def small(stage: Any, recipe: Any, *overrides: str, **more: Any) -> talipot.Run:
        # The cluster's workers find modules of the repository alone.
        function = "reward_service.components.brevity.target=tests.rewards:length"
        return whole(stage, recipe, *overrides, *SMALL, function, **more)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.chdir(project)
        patch.setattr(talipot, "run", small)
        for block in examples(PAGE) + examples(LOG_PAGE):
            exec(compile(block, "docs", "exec"), names)
    return Walked(names, said.getvalue())


def test_the_pages_examples(walked: Walked, project: Path) -> None:
    names, said = walked.names, walked.said
    assert "✓ sft" in said
    assert "✓ train" not in said, "it was asked to be quiet"
    assert "runs/none: not a run (no config.yaml) 3" in said

    run: talipot.Run = names["run"]
    assert run.path == project / "runs" / "titles"
    assert run.name == "titles"
    assert run.config.train.iterations == 2
    assert [len(texts) for texts in names["several"]] == [4, 4]
    policy: talipot.Policy = names["policy"]
    assert policy.sample(names["prompts"]) == names["titles"]
    assert policy.sample(names["prompts"], seed=7) != names["titles"]
    with pytest.raises(DataError, match="prompt 2 is empty"):
        policy.sample(["a", ""])
    with pytest.raises(TypeError, match="not one text"):
        policy.sample("open")

    logged = list(run.trajectories())
    assert len(logged) == 2 * 8
    scores = run.score([t.prompt_text for t in logged], [t.response_text for t in logged])
    assert [s.total for s in scores] == pytest.approx([t.score for t in logged])
    assert [dict(s.components) for s in scores] == [
        pytest.approx(t.score_components) for t in logged
    ]
    with pytest.raises(DataError, match="2 prompts and 1 responses"):
        run.score(["a", "b"], ["c"])
    table = run.trajectory_table([1])
    assert set(table["iteration"].to_pylist()) == {1}
    assert len(table) == 8
    assert [row["step"] for row in run.metrics()] == [1, 2]
    assert run.metrics("reward") == []


def test_the_table_of_columns_is_the_schema() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\w<>, ]+) \|", LOG_PAGE, re.MULTILINE)
    schema = [LOGGED_ITERATION, *SCHEMAS[ScoredTrajectory], *LEARNT]
    assert rows == [(field.name, _shown(field.type)) for field in schema]


def _shown(kind: Any) -> str:
    return re.sub(r"(element|item): ", "", str(kind))


def test_other_tools_read_the_log(walked: Walked, project: Path) -> None:
    """DuckDB where it is installed; it is no dependency."""
    log = project / "runs" / "titles" / "trajectories"
    whole = pq.read_table(log)
    assert whole.num_rows == 16
    listed = re.findall(r"^\| `(\w+)` \| [\w<>, ]+ \|", LOG_PAGE, re.MULTILINE)
    assert whole.column_names == listed
    duckdb = pytest.importorskip("duckdb", reason="DuckDB is not installed")
    (query,) = examples(LOG_PAGE, "sql")
    assert len(duckdb.sql(query.replace("runs/titles", str(log.parent))).fetchall()) == 2
