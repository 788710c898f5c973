"""What commands show: the one place that prints, and that prints every text as it is.

Rich reads square brackets as styles and ``:name:`` as emoji, breaks lines at 80 columns where there
is no terminal, and passes escape sequences on. Prompts, responses, paths and messages are plain
text: here a part of a line is text, or (text, style), and nothing else is printed to a console.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

Part = str | tuple[str, str]

LOG_EVERY_S = 30.0
"""Seconds between lines of progress in a file."""
_WATCH_S = 2.0
_BLOCKS = "▁▂▃▄▅▆▇█"
_BIDI = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
"""Characters that turn the direction of what follows, on the whole line."""
_CONTROLS = {n: f"\\x{n:02x}" for n in (*range(0x20), *range(0x7F, 0xA0))}
_CONTROLS |= {n: f"\\u{n:04x}" for n in _BIDI}
_IN_LINES = _CONTROLS | {ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t"}
_IN_TEXTS = {n: shown for n, shown in _CONTROLS.items() if chr(n) not in "\n\t"}


def visible(text: str) -> str:
    """Return a text with escapes in place of characters that steer a terminal or turn a line.

    Lines and tabs stay.
    """
    return text.translate(_IN_TEXTS)


def make_console(*, stderr: bool = False) -> Console:
    """Make a console that takes no text for markup, also in tables."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True)


def say(console: Console, *parts: Part) -> None:
    """Print one line without breaking it; a part is text, or (text, style)."""
    console.print(_assembled(parts), soft_wrap=True)


def _assembled(parts: Sequence[Part]) -> Text:
    pairs = [(part, "") if isinstance(part, str) else part for part in parts]
    return Text.assemble(*((text.translate(_IN_LINES), style) for text, style in pairs))


def show(console: Console, text: str, style: str = "") -> None:
    """Print a text of any length as it is, byte for byte where no terminal reads it.

    On a terminal, characters that would steer it are shown as escapes.
    """
    if console.is_terminal:
        console.print(Text(visible(text), style=style), soft_wrap=True)
    elif not console.quiet:
        console.file.write(text + "\n")


def table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose first column is text and whose others are numbers, cut to the width."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        shown.add_column(
            column,
            justify="left" if number == 0 else "right",
            no_wrap=number > 0,
            overflow="fold",
            header_style="dim",
        )
    for row in rows:
        shown.add_row(*(cell.translate(_IN_LINES) for cell in row))
    console.print(shown, soft_wrap=False)


def fields_of_runs(
    console: Console, names: Sequence[str], fields: Sequence[tuple[str, Sequence[str]]]
) -> None:
    """Print fields with a value for each of some runs, a line each where that fits."""
    say(console, ("what differs" if fields else "nothing differs but the run itself", "italic"))
    for setting, values in fields:
        line = f" {setting}  " + " · ".join(values)
        if len(line) <= console.width:
            say(console, f" {setting}  ", (" · ".join(values), "bold"))
            continue
        say(console, f" {setting}")
        for name, value in zip(names, values, strict=True):
            say(console, f"   {name}  ", (value, "bold"))


def degrade_unprintable() -> None:
    """Write characters that the streams' encoding lacks, and bytes that are no text, as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def keep_shown(console: Console, look: Callable[[], tuple[list[list[Part]], bool]]) -> None:
    """Show lines anew every two seconds: what `look` returns, until it says that this is the last.

    On a terminal they replace each other; elsewhere they follow each other after an empty line.
    """
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            lines, last = look()
            if console.is_terminal:
                live.update(Text("\n").join(map(_assembled, lines)), refresh=True)
            else:
                for line in [*lines, []]:
                    say(console, *line)
            if last:
                return
            time.sleep(_WATCH_S)


@contextmanager
def at_work(console: Console, title: str) -> Iterator[None]:
    """Show what takes its time while the block runs: a line with a clock, gone at the end."""
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", style="bold", markup=False),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        progress.add_task(title.translate(_IN_LINES), total=None)
        yield


@contextmanager
def progress_bar(console: Console, title: str, total: int, done: int = 0) -> Iterator[Bar]:
    """Show a live progress bar with metrics beneath it; it begins where `done` steps are done."""
    with _Bars(
        SpinnerColumn(),
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,  # in a log file it would be blank lines
    ) as progress:
        name = title.translate(_IN_LINES)
        task = progress.add_task(name, total=total, completed=done, note="")
        yield Bar(progress, task, None if console.is_terminal else console)


class _Bars(Progress):
    """Bars with their notes beneath them, as far as these fit: nothing is cut within a word."""

    def get_renderables(self) -> Iterator[RenderableType]:
        """Yield the bars, and a line of notes for each that has some."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if note := fitting(task.fields["note"], self.console.width - 2):
                yield Text(f"  {note}", no_wrap=True, overflow="ellipsis")


def fitting(note: str, width: int) -> str:
    """Return as many of a note's parts, which stand two blanks apart, as are this wide together."""
    parts = note.split("  ")
    while len(parts) > 1 and cell_len("  ".join(parts)) > width:
        parts.pop()
    return "  ".join(parts)


def spark(values: Sequence[float]) -> str:
    """Draw values as a line of blocks, each as high as it is between the least and the largest."""
    least, most = min(values), max(values)
    if least == most:
        return _BLOCKS[0] * len(values)
    steps = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round(steps * (v - least) / (most - least))] for v in values)


@dataclass(slots=True)
class Bar:
    """One line of progress; a plain line now and then where no terminal shows it."""

    _progress: Progress
    _task: TaskID
    _log: Console | None = None
    _said: float = field(default_factory=time.monotonic)

    def update(self, done: int, note: str = "") -> None:
        """Show the steps that are done and a few metrics."""
        note = note.translate(_IN_LINES)
        self._progress.update(self._task, completed=done, note=note)
        if self._log is None or time.monotonic() < self._said + LOG_EVERY_S:
            return
        self._said = time.monotonic()
        task = self._progress.tasks[self._task]
        say(
            self._log,
            f"  {task.description}: {done} of {task.total:g}",
            f"  {note}" if note else "",
        )
