"""Rounds of a run: numbered folders, each with its settings, pairs and answers."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import yaml
from pydantic import ValidationError

from common.config.feedback import RoundConfig
from common.data.records import write_jsonl
from common.errors import ConfigError, DataError, StorageError
from common.files import one_line, write_atomic
from common.randomness import derive_seed
from common.run_folder import RoundFolder, RunFolder
from common.unfinished import unfinished
from deploy.feedback.export import How, comparisons
from deploy.feedback.pairs import Pair, read_pairs, write_pairs
from deploy.feedback.store import Asked, Store


def rounds_of(folder: RunFolder) -> list[int]:
    """Return the numbers of a run's rounds."""
    found = (re.fullmatch(r"round-(\d+)", path.name) for path in folder.feedback.glob("round-*"))
    return sorted(int(match[1]) for match in found if match)


def round_of(folder: RunFolder, number: int | None) -> tuple[RoundFolder, RoundConfig]:
    """Return a round of a run, the newest where none is named.

    Raises:
        ConfigError: there is none.
        DataError: its settings are damaged.
    """
    known = rounds_of(folder)
    if not known:
        raise ConfigError(f"{folder.path} has no round; `talipot feedback propose` makes one")
    if number is not None and number not in known:
        shown = ", ".join(map(str, known))
        raise ConfigError(f"{folder.path} has no round {number}; there are {shown}")
    chosen = folder.round(known[-1] if number is None else number)
    return chosen, read_settings(chosen.settings)


def read_settings(path: Path) -> RoundConfig:
    """Read a round's settings. Raises DataError where they are missing or damaged."""
    try:
        return RoundConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError) as error:
        raise DataError(f"{path}: damaged, or no settings of a round ({one_line(error)})") from None


def make_round(
    folder: RunFolder,
    settings: RoundConfig,
    pairs: Sequence[Pair],
    gold: Sequence[Pair] = (),
    practice: Sequence[Pair] = (),
) -> RoundFolder:
    """Write a new round: its pairs in a random order, and how often each is asked.

    Args:
        folder: of the run.
        settings: of the round.
        pairs: that people are asked.
        gold: pairs whose better response is known, which everybody is asked now and then.
        practice: likewise, which everybody begins with, and whose answers are told.

    Raises:
        StorageError: the disk is full, or another command has made this round.
    """
    rng = np.random.default_rng(derive_seed(settings.seed, f"round-{settings.number}"))
    pairs = [pairs[place] for place in rng.permutation(len(pairs))]
    several = _drawn(rng, len(pairs), settings.overlap_share)
    # Of the first three quarters: there has to be something between the two showings.
    again = _drawn(rng, len(pairs), settings.repeat_share, among=max(1, 3 * len(pairs) // 4))
    asked = [
        (
            pair,
            Asked(uid=pair.uid, wanted=settings.overlap if i in several else 1, again=i in again),
        )
        for i, pair in enumerate(pairs)
    ]
    # Known pairs are asked now and then, wherever they stand (`Store`).
    ordered = asked + [(pair, Asked(uid=pair.uid, wanted=None)) for pair in gold]
    text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    final = folder.round(settings.number)
    try:
        folder.feedback.mkdir(parents=True, exist_ok=True)
        with unfinished(final.path, folder=True) as partial:
            made = RoundFolder(partial)
            write_pairs(made.pairs, [pair for pair, _ in ordered])
            store = Store(made.answers, make=True)
            store.ask(each for _, each in ordered)
            store.close()
            if practice:
                write_pairs(made.practice, practice)
            write_atomic(made.settings, [text.encode()])
            partial.rename(final.path)
    except OSError as error:
        raise StorageError(f"{final.path}: cannot be written: {error}") from None
    return final


def _drawn(
    rng: np.random.Generator, count: int, share: float, among: int | None = None
) -> set[int]:
    """Draw a share of so many places, among the first of them."""
    first = count if among is None else min(among, count)
    return {int(place) for place in rng.permutation(first)[: round(share * count)]}


def read_guidelines(path: Path) -> str:
    """Read what everybody is to read. Raises ConfigError where it is no text."""
    try:
        text = path.expanduser().read_text(encoding="utf8").strip()
    except (OSError, UnicodeDecodeError, RuntimeError) as error:
        raise ConfigError(f"--guidelines {path}: cannot be read ({one_line(error)})") from None
    if not text:
        raise ConfigError(f"--guidelines {path}: is empty")
    return text


def close_round(folder: RoundFolder, *, reopen: bool = False) -> None:
    """End a round, or go on asking.

    Raises:
        DataError: its file is missing or damaged.
    """
    store = Store(folder.answers)
    if reopen:
        store.reopen_round()
    else:
        store.close_round()
    store.close()


def end_round(
    folder: RoundFolder, settings: RoundConfig, without: Collection[str] = (), how: How = "rows"
) -> int:
    """Close a round and write its comparisons; it stays open where there are none.

    Returns:
        How many there are.

    Raises:
        TalipotError: as `export_round`.
    """
    close_round(folder)
    try:
        return export_round(folder, settings, without, how)
    except ConfigError:
        close_round(folder, reopen=True)
        raise


def is_closed(folder: RoundFolder) -> bool:
    """Whether a round was closed. Raises DataError where its file is missing or damaged."""
    store = Store(folder.answers)
    try:
        return store.is_closed()
    finally:
        store.close()


def export_round(
    folder: RoundFolder, settings: RoundConfig, without: Collection[str] = (), how: How = "rows"
) -> int:
    """Write a round's comparisons, and beside them all answers as they were given.

    Returns:
        How many comparisons there are.

    Raises:
        ConfigError: one who is to be left out has answered nothing, or nobody has.
        DataError: a file of the round is damaged.
        StorageError: the disk is full.
    """
    store = Store(folder.answers)
    standing, history = store.standing(), store.history()
    store.close()
    names = {answer.labeler for answer in standing}
    if unknown := sorted(set(without) - names):
        there = ", ".join(sorted(names))
        raise ConfigError(f"--without {', '.join(unknown)}: has answered nothing; {there} have")
    pairs = read_pairs(folder.pairs)
    found = list(comparisons(pairs, standing, without=without, how=how, number=settings.number))
    if not found:
        what = "nothing else is answered" if without else "nothing is answered yet"
        raise ConfigError(f"{folder.path}: {what}, skipped and known pairs left out")
    write_atomic(
        folder.raw, (json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in history)
    )
    write_jsonl(folder.comparisons, found)  # last: it says that all is there
    return len(found)
