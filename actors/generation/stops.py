"""What ends a response besides EOS and its length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Stops:
    """Tokens and texts that end a response."""

    ids: tuple[int, ...] = ()
    """Tokens, kept in the response as EOS is."""
    strings: tuple[str, ...] = ()
    """Texts, also across token borders; the token that completes one is the response's last."""
    decode: Callable[[Sequence[int]], str] = lambda ids: ""
    """Ids to text."""

    @property
    def longest(self) -> int:
        """Bytes of the longest text, and so the most tokens that it can be made of."""
        return max((len(text.encode()) for text in self.strings), default=0)

    def completed_at(self, ids: Sequence[int]) -> int | None:
        """Return where in the text a stop string begins that the last token completes, if any."""
        text, before = self.decode(ids), len(self.decode(ids[:-1]))
        # A character whose bytes are in two tokens counts as up to three before it is whole.
        places = [text.find(s, max(0, before - len(s) - 3)) for s in self.strings]
        return min((place for place in places if place >= 0), default=None)
