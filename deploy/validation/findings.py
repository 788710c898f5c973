"""What a check has found: records with what is wrong, where, and how to mend it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from common.errors import ConfigError, TalipotError


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong, or that is probably not meant."""

    severity: Literal["error", "warning"]
    where: str
    """File and line, field, or override."""
    what: str
    """What is wrong there."""
    fix: str
    """What to do; empty where `what` says it."""
    kind: type[TalipotError] = ConfigError
    """What a command that stumbles over it ends with."""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}; {self.fix}" if self.fix else text


@dataclass(slots=True)
class Findings:
    """Findings in their order, and what was found to be as it should be."""

    found: list[Finding] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)

    def error(
        self, text: str, kind: type[TalipotError] = ConfigError, where: str | None = None
    ) -> None:
        """Note an error.

        Args:
            text: in our form of one: ``where: what; fix``, or without its place.
            kind: of the error that a command would end with.
            where: the place, if the text does not begin with it.
        """
        self._note("error", text, kind, where)

    def warning(self, text: str) -> None:
        """Note what is probably not meant, in the same form."""
        self._note("warning", text, ConfigError, None)

    def errors(self) -> list[Finding]:
        """Return the findings that stop a run."""
        return [finding for finding in self.found if finding.severity == "error"]

    @contextmanager
    def attempt(self, where: str | None = None) -> Iterator[None]:
        """Note the error that the body raises, and go on after it."""
        try:
            yield
        except TalipotError as error:
            self.error(str(error), type(error), where)

    def _note(
        self,
        severity: Literal["error", "warning"],
        text: str,
        kind: type[TalipotError],
        where: str | None,
    ) -> None:
        if where is None:
            place, colon, rest = text.partition(": ")
            where, text = (place, rest) if colon else ("", text)
        what, _, fix = text.partition("; ")
        noted = Finding(severity=severity, where=where, what=what, fix=fix, kind=kind)
        if noted not in self.found:
            self.found.append(noted)
