from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest

from common.errors import ConfigError, DataError
from deploy.quickstart.harvest import Pair
from deploy.quickstart.judges import conformance, distinct_share, rouge_l

AREA = Pair(name="area", params=("r",), signature="def area(r):", docstring="Return the area.")

CASES = {
    "Return the area.": True,
    "  Return the area. \n": True,
    'Return the "area".': True,
    "Return caf\u00e9 areas.": True,
    "Return a back\\slash area.": True,
    'Say """ and go on.': True,
    "": False,
    " \n": False,
    ".": False,
    "...": False,
    "Return the area": False,
    "return the area.": False,
    "Returns the area.": False,
    "This returns the area.": False,
    "Return area(r) now.": False,
    "Return the area\nof it.": False,
    "Return the area.\x00": False,
    "Return the \ud800 area.": False,
    "Return the area \\": False,  # ruff alone lets it pass
    "Parameters": False,  # and this
    '"""': False,
    '\\"""\n    import os': False,
    "returns the area  # noqa": False,
    '"""  # noqa: D400\ndef f():\n    """Return it.': False,
}


@pytest.mark.parametrize("line", CASES, ids=repr)
def test_each_line_alone(line: str) -> None:
    assert conformance([line], [AREA]) == [CASES[line]]


def test_no_line_disturbs_its_neighbours() -> None:
    lines = [text for line in CASES for text in ("Return the area.", line, "Returns it.")]
    expected = [good for line in CASES for good in (True, CASES[line], False)]
    assert conformance(lines, [AREA] * len(lines)) == expected


def test_judged_under_the_real_name() -> None:
    other = Pair(name="size", params=(), signature="async def size(self):", docstring="")
    assert conformance(["Return area(r) now."] * 2, [AREA, other]) == [False, True]


def test_ruff_runs_once_for_all_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The real ruff behind a script that counts its starts.
    real = Path(sys.executable).parent / "ruff"
    ruff = tmp_path / "ruff"
    ruff.write_text(f'#!/bin/sh\necho started >> "{tmp_path}/log"\nexec "{real}" "$@"\n')
    ruff.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert conformance(["Go.", "Go.", "Goes", "Go."], [AREA] * 4) == [True, True, False, True]
    assert (tmp_path / "log").read_text() == "started\n"


def test_configuration_of_the_user_is_kept_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ruff.toml").write_text('lint.per-file-ignores = { "*.py" = ["D401"] }\n')
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert conformance(["Returns the area."], [AREA]) == [False]


def test_missing_or_broken_ruff_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="ruff, its judge, was not found; run `pip install"):
        conformance(["Go."], [AREA])
    ruff = tmp_path / "ruff"
    ruff.write_text("#!/bin/sh\necho broken >&2\nexit 2\n")
    ruff.chmod(0o755)
    with pytest.raises(ConfigError, match=r"ruff failed \(broken\)"):
        conformance(["Go."], [AREA])


def test_signature_that_is_not_python_is_refused() -> None:
    torn = Pair(name="f", params=(), signature="def f(:", docstring="")
    with pytest.raises(DataError, match=r"pair 1: 'def f\(:' is not Python"):
        conformance(["Go now."] * 2, [AREA, torn])


def test_no_lines_and_unequal_lengths() -> None:
    assert conformance([], []) == []
    with pytest.raises(ValueError, match="zip"):
        conformance(["Go."], [])


def test_rouge_l() -> None:
    lines = ["Return the area.", "Returns areas", "Close a file", ""]
    scores = rouge_l(lines, ["Return the area."] * 4)
    # "return area" is 2 of 2 words and 2 of 3: F = 2 * 1 * (2/3) / (1 + 2/3) = 0.8
    assert scores == pytest.approx([1.0, 0.8, 0.0, 0.0])


def test_shares_and_means() -> None:
    assert distinct_share(["a", "b", "a", "a"]) == 0.5
    assert distinct_share([]) == 0.0
