"""Records in tokens against the room that the model has for them: refused, left out or cut.

What does not fit is named by its place (`data.too_long` = error) or counted, and the count is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from common.data.chat import Turn
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
    prefix: int = 0
    """Tokens at the head of a plain prompt that a cut keeps: BOS."""
    read: int = 0
    """Records seen."""
    skipped: int = 0
    """Left out as too long."""
    cut: int = 0
    """Kept, and not whole."""
    equal: int = 0
    """Comparisons left out because nothing tells their sides apart after the cut."""

    def fit(
        self, place: str, parts: Mapping[str, list[int]], *, chat: bool = False
    ) -> list[list[int]] | None:
        """Return the parts of one record as they are used, or None when it is left out.

        Of the part "prompt" a cut keeps the end, which stands next to the response; of all others,
        which are responses to it, the beginning. The prompt of a chat is not cut, as a template
        would not be whole without its beginning: it is left out.

        Raises:
            DataError: a part is too long and that is an error, or it has no tokens.
        """
        self.read += 1
        where = place or f"{self.what.removesuffix('s')} {self.read}"
        kept, long, torn = [], False, False
        for name, ids in parts.items():
            room = self.prompt if name == "prompt" else self.response
            if not ids:
                raise DataError(f"{where}: field {name!r}: has no tokens; fill it or take it out")
            if len(ids) > room:
                long, torn = True, torn or (chat and name == "prompt")
                if self.too_long == "error":
                    raise DataError(self._refusal(where, name, len(ids), room))
            kept.append(self._end(ids, room) if name == "prompt" else ids[:room])
        if torn or (long and self.too_long == "skip"):
            self.skipped += 1
            return None
        _, *responses = kept
        if len(responses) > 1 and all(response == responses[0] for response in responses):
            self.equal += 1
            return None
        self.cut += long
        return kept

    def fit_turns(self, place: str, turns: Sequence[Turn]) -> list[Turn]:
        """Return those turns of a conversation that are used; none when it is left out.

        All of them together have the room of a prompt and a response; a cut keeps whole turns.

        Raises:
            DataError: one does not fit and that is an error.
        """
        self.read += 1
        total, whole = 0, self.prompt + self.response
        for index, turn in enumerate(turns):
            total += len(turn.before) + len(turn.learnt)
            begins = index > 0 or len(turn.before) <= self.prompt
            if begins and len(turn.learnt) <= self.response and total <= whole:
                continue
            if self.too_long == "error":
                where = place or f"{self.what.removesuffix('s')} {self.read}"
                raise DataError(
                    f"{where}: field 'messages': {total} tokens up to the end of answer "
                    f"{index + 1}, which has {len(turn.learnt)}; room for {self.response} in an "
                    f"answer and {whole} in all; raise model.context or "
                    "rollout.max_response_tokens, or set data.too_long to skip or truncate"
                )
            left = self.too_long == "skip" or index == 0
            self.skipped, self.cut = self.skipped + left, self.cut + (not left)
            return [] if left else list(turns[:index])
        return list(turns)

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

    def _end(self, ids: list[int], room: int) -> list[int]:
        if len(ids) <= room or not self.prefix:
            return ids[-room:]
        return ids[: self.prefix] + ids[len(ids) - max(0, room - self.prefix) :]

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
