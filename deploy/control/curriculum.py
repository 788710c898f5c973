"""Which prompts are left out since they teach nothing now: always solved, or never.

What is known of a prompt counts from a fixed distance: iteration j is issued by the responses of
iterations before ``j - max_staleness``, however far the run was when it was issued. A resumed run
therefore issues what the first one did, in asynchronous mode too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from common.config.run import CurriculumConfig
from deploy.control.batches import solves
from deploy.control.jobs import Scored

Kind = Literal["always", "never", "mixed"]


@dataclass(frozen=True, slots=True)
class Tried:
    """What is known of a prompt: its newest iterations that had all one outcome."""

    kind: Kind
    """Whether every response of these solved it, or none did."""
    responses: int
    """In these iterations."""
    last: int
    """Iteration that asked it last."""


Outcomes = Mapping[str, tuple[int, int]]
"""Of an iteration: prompt -> responses, and those that solved it."""


class Curriculum:
    """Pass rates of prompts, and which of them are left out."""

    def __init__(self, settings: CurriculumConfig, staleness: int) -> None:
        self._settings, self._staleness = settings, staleness
        self.rewind(0, None)

    def rewind(self, iteration: int, state: Mapping[str, Any] | None) -> None:
        """Know what was known before `iteration` (`state`); None is nothing."""
        state = state or {"tried": {}, "pending": {}}
        self._next = iteration
        """Iterations below this have been trained."""
        self._tried = {uid: Tried(*of) for uid, of in state["tried"].items()}
        """Of iterations below `_next` - staleness."""
        self._pending: dict[int, Outcomes] = {
            int(number): {uid: (of[0], of[1]) for uid, of in outcomes.items()}
            for number, outcomes in state["pending"].items()
        }

    def state(self) -> dict[str, Any]:
        """Return what `rewind` takes, as JSON has it."""
        return {
            "tried": {uid: [of.kind, of.responses, of.last] for uid, of in self._tried.items()},
            "pending": {str(number): dict(of) for number, of in self._pending.items()},
        }

    def trained(self, iteration: int, batch: Sequence[Scored]) -> None:
        """Note how the responses of an iteration were scored."""
        responses, solved = Counter[str](), Counter[str]()
        for scored in batch:
            score = dict(zip(scored.rollout_ids, scored.scores, strict=True))
            for request in scored.requests:
                responses[request.prompt_uid] += 1
                solved[request.prompt_uid] += solves(
                    score[request.rollout_id], self._settings.solved
                )
        self._pending[iteration] = {uid: (n, solved[uid]) for uid, n in responses.items()}
        self._next = iteration + 1
        for number in self._settled(self._next):
            self._tried = self._after(self._tried, number, self._pending.pop(number))

    def left_out(self, iteration: int, prompts: Collection[str], wanted: int) -> frozenset[str]:
        """Return the prompts that an iteration is issued without.

        Args:
            iteration: that is issued.
            prompts: all that there are.
            wanted: how many the iteration needs; where fewer are left, none is left out.
        """
        tried = self._tried
        for number in self._settled(iteration):
            tried = self._after(tried, number, self._pending[number])
        out = frozenset(
            uid for uid in prompts if (of := tried.get(uid)) and self._useless(of, iteration)
        )
        return out if len(prompts) - len(out) >= wanted else frozenset()

    def _settled(self, iteration: int) -> list[int]:
        """List the iterations not counted yet that `iteration` is issued by, in their order."""
        return sorted(number for number in self._pending if number < iteration - self._staleness)

    def _after(
        self, tried: Mapping[str, Tried], iteration: int, outcomes: Outcomes
    ) -> dict[str, Tried]:
        """Return what is known with an iteration's responses; what came back is counted anew."""
        known = dict(tried)
        for uid, (responses, solved) in outcomes.items():
            kind: Kind = "always" if solved == responses else "mixed" if solved else "never"
            before = known.get(uid)
            if before is not None and before.kind == kind and not self._has_enough(before):
                responses += before.responses
            known[uid] = Tried(kind, responses, iteration)
        return known

    def _has_enough(self, of: Tried) -> bool:
        """Whether a prompt was asked often enough, and always or never solved."""
        settings = self._settings
        wanted = {"always": settings.always, "never": settings.never, "mixed": False}[of.kind]
        return wanted and of.responses >= settings.after

    def _useless(self, of: Tried, iteration: int) -> bool:
        back = self._settings.back_after
        return self._has_enough(of) and (back is None or iteration - of.last <= back)
