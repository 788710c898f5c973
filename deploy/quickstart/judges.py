"""Judges of the quickstart's results, which neither the labeler nor the policy ever asked.

`conformance` asks ruff's implementation of PEP 257 (written by others, in another language);
`rouge_l` compares with what a person wrote. They are for held-out evaluation: a judge that is
trained against stops being one.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rouge_score.rouge_scorer import RougeScorer

from common.errors import ConfigError, DataError
from common.files import one_line
from deploy.quickstart.harvest import Pair

RULES: Final = "D200,D400,D401,D402,D403,D404,D415"
"""One line, ends in a period, imperative mood, not the signature, capital letter, not "This"."""

_LINES_PER_FUNCTION: Final = 2
_TIMEOUT_SECONDS: Final = 120.0


def conformance(lines: Sequence[str], pairs: Sequence[Pair]) -> list[bool]:
    """Tell whether ruff accepts each line as the docstring of its function, `[B]`.

    Spaces around a line do not count. An empty line does not conform, nor does one without a
    letter, with a line break or a control character. Ruff runs once for all lines.

    Raises:
        ConfigError: ruff is not installed.
        DataError: a pair's signature is not Python.
    """
    module, good = [], []
    for line, pair in zip(lines, pairs, strict=True):
        text = line.strip()
        # isprintable is False for line breaks, control characters and lone surrogates, all of
        # which could end the literal early or make the module unreadable. ruff lets section
        # headings ("Args") and lines that end in a backslash go without a period, and "." with.
        whole = text.endswith(".") and any(c.isalpha() for c in text)
        good.append(whole and text.isprintable())
        literal = text.replace("\\", "\\\\").replace('"', '\\"') if good[-1] else "Stand in."
        module.append(f'{pair.signature}\n    """{literal}"""\n')
    if not module:
        return []
    for row, code, message in _ruff("".join(module)):
        index = (row - 1) // _LINES_PER_FUNCTION
        if code not in RULES.split(","):
            raise DataError(f"pair {index}: {pairs[index].signature!r} is not Python: {message}")
        good[index] = False
    return good


def rouge_l(lines: Sequence[str], references: Sequence[str]) -> list[float]:
    """Compute ROUGE-L of each line and its reference on word stems (F-measure), `[B]` in [0, 1]."""
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [
        float(scorer.score(reference, line)["rougeL"].fmeasure)
        for line, reference in zip(lines, references, strict=True)
    ]


def distinct_share(lines: Sequence[str]) -> float:
    """Return distinct lines over all lines: 1 is all different, 1/B one line for everything."""
    return len(set(lines)) / len(lines) if lines else 0.0


def _find_ruff() -> str:
    beside = Path(sys.executable).parent / "ruff"
    ruff = str(beside) if beside.is_file() else shutil.which("ruff")
    if ruff is None:
        raise ConfigError("quickstart: ruff, its judge, was not found; run `pip install ruff`")
    return ruff


def _ruff(source: str) -> list[tuple[int, str, str]]:
    """Return (row from 1, rule, message) of every violation in `source`."""
    # A response may hold a comment that silences a linter; the user's own configuration, found
    # by ruff in the folders above the temporary one, must not decide either.
    options = ["--isolated", "--no-cache", "--ignore-noqa", "--output-format", "json"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "judged.py"
        path.write_text(source, encoding="utf-8", newline="\n")
        done = subprocess.run(
            [_find_ruff(), "check", *options, "--select", RULES, str(path)],
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    if done.returncode not in (0, 1):  # 1: violations were found
        reason = one_line(RuntimeError(done.stderr))
        raise ConfigError(f"quickstart: ruff failed ({reason}); try another version of ruff")
    violations = json.loads(done.stdout)
    return [(v["location"]["row"], str(v["code"]), str(v["message"])) for v in violations]
