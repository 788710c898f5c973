"""Endings of work: every step of one is taken, whatever the steps before it raised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def at_the_end(*steps: Callable[[], object]) -> Iterator[None]:
    """Take all of these steps once the block has ended, and only then raise.

    A disk that is full, a cluster that has ended or a second Ctrl-C fails one step, and must not
    leave the workers that the next step would have ended. What is raised is the first failure, the
    block's own before all, because the others are mostly its consequences.
    """
    first: BaseException | None = None
    try:
        yield
    except BaseException as error:
        first = error
    for step in steps:
        try:
            step()
        except BaseException as error:
            first = first or error
    if first is not None:
        raise first


def take_all(*steps: Callable[[], object]) -> None:
    """Take all of these steps, and raise what the first of those that failed has raised."""
    with at_the_end(*steps):
        pass
