"""Records in tokens against the room that the model has for them: refused, left out or cut.

What does not fit is named by its place (`data.too_long` = error) or counted, and the count is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from common.errors import DataError

TooLong = Literal["error", "skip", "truncate"]


@dataclass(slots=True, kw_only=True)
class Fitting:
    """The room, and what became of the records so far."""

    what: str
    """What the records are: prompts, demonstrations, comparisons."""
    prompt: int
    """Tokens that a prompt may have."""
    response: int = 0
    """Tokens that a response may have, EOS included; 0 where records have none."""
    too_long: TooLong
    read: int = 0
    """Records seen."""
    skipped: int = 0
    """Left out as too long."""
    cut: int = 0
    """Kept, and not whole."""
    equal: int = 0
    """Comparisons left out because nothing tells their sides apart after the cut."""

    def fit(self, place: str, parts: Mapping[str, list[int]]) -> list[list[int]] | None:
        """Return the parts of one record as they are used, or None when it is left out.

        Of the part "prompt" a cut keeps the end, which stands next to the response; of all others,
        which are responses to it, the beginning.

        Raises:
            DataError: a part is too long and that is an error, or it has no tokens.
        """
        self.read += 1
        where = place or f"{self.what.removesuffix('s')} {self.read}"
        kept, long = [], False
        for name, ids in parts.items():
            room = self.prompt if name == "prompt" else self.response
            if not ids:
                raise DataError(f"{where}: field {name!r}: has no tokens; fill it or take it out")
            if len(ids) > room:
                long = True
                if self.too_long == "error":
                    raise DataError(self._refusal(where, name, len(ids), room))
            kept.append(ids[-room:] if name == "prompt" else ids[:room])
        if long and self.too_long == "skip":
            self.skipped += 1
            return None
        _, *responses = kept
        if len(responses) > 1 and all(response == responses[0] for response in responses):
            self.equal += 1
            return None
        self.cut += long
        return kept

    def said(self) -> list[str]:
        """Return one line for each thing that happened to some of the records."""
        of, room = f"of {self.read} {self.what}", f"longer than {self._room()}"
        return [
            f"{count} {of} {done}"
            for count, done in (
                (self.skipped, f"skipped: {room} (data.too_long)"),
                (self.cut, f"cut: {room} (data.too_long)"),
                (self.equal, f"left out: equal sides after the cut to {self.response} tokens"),
            )
            if count
        ]

    def require(self, left: int, needed: int, use: str) -> None:
        """Raise DataError when fewer than `needed` records are left for this use."""
        if left >= needed:
            return
        if not (self.skipped or self.equal):
            raise DataError(f"{left} {self.what}, and {use} needs at least {needed}; add some")
        raise DataError(
            f"{left} {self.what} left, and {use} needs at least {needed}: {'; '.join(self.said())}"
            "; raise model.context or rollout.max_response_tokens, or set data.too_long to truncate"
        )

    def _room(self) -> str:
        return f"{self.prompt} prompt" + (
            f" or {self.response} response tokens" if self.response else " tokens"
        )

    def _refusal(self, where: str, name: str, length: int, room: int) -> str:
        setting, counted = "model.context", ""
        if name != "prompt":
            setting, counted = "rollout.max_response_tokens", ", EOS included"
        return (
            f"{where}: field {name!r}: {length} tokens{counted}, room for {room}; raise {setting} "
            "or set data.too_long to skip or truncate"
        )
