"""Which iterations have been issued, and where the prompt stream stood before each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from common.config.run import RunConfig
from common.data.mixture import Part, parts_of
from common.data.prompts import EncodedPrompt, PromptStream
from deploy.control.batches import groups_of, without_signal
from deploy.control.curriculum import Curriculum
from deploy.control.jobs import Scored
from deploy.control.ledger import Ledger


def mixed(config: RunConfig, prompts: Sequence[EncodedPrompt]) -> list[Part]:
    """Return what is drawn of each source; none where all prompts are drawn alike.

    Raises:
        DataError: as `common.data.mixture.parts_of`.
    """
    if config.data.mixture is None:
        return []
    draws = config.train.iterations * config.train.prompts_per_iteration
    return parts_of([prompt.source or "" for prompt in prompts], config.data.mixture, draws)


class Issuer:
    """Issues iterations one after the other, as far ahead as it is told to."""

    def __init__(self, config: RunConfig, prompts: Sequence[EncodedPrompt]) -> None:
        self._config = config
        self._encoded = prompts
        self._parts = mixed(config, prompts)
        settings, staleness = config.data.curriculum, config.train.max_staleness
        self._curriculum = Curriculum(settings, staleness) if settings else None
        self._uids = self._all_uids()
        self._rounds = 0
        """Of further prompts, in the iteration that is collected."""
        self._groups = 0
        """Prompts of it."""
        self.rewind(0, 0)

    def rewind(
        self,
        iteration: int,
        position: int,
        further: int = 0,
        curriculum: Mapping[str, Any] | None = None,
    ) -> None:
        """Issue `iteration` next, from these positions of the streams of prompts and of others.

        `curriculum` is what was known of the prompts then.
        """
        if self._curriculum is not None:
            self._curriculum.rewind(iteration, curriculum)
        self.next = iteration
        """Iterations below this have been issued."""
        self._positions: dict[int, int] = {}
        """Position of the stream before each issued, untrained iteration."""
        self._stream = PromptStream(
            self._encoded,
            seed=self._config.seed,
            position=position,
            adapter=self._config.train.adapter,
            parts=self._parts,
        )
        # Prompts in place of others: a stream of its own, so that the first one goes on as without.
        self._further = PromptStream(
            self._encoded,
            seed=self._config.seed,
            position=further,
            adapter=self._config.train.adapter,
            parts=[replace(part, epochs=None) for part in self._parts],
            label="further prompts",
        )
        self._begin_rounds()

    def issue(self, ledger: Ledger, until: int) -> None:
        """Issue all iterations up to and including `until`, as far as the run goes."""
        train = self._config.train
        while self.next <= min(until, train.iterations - 1):
            self._positions[self.next] = self._stream.position
            requests = self._stream.requests(
                self.next,
                train.prompts_per_iteration,
                train.samples_per_prompt,
                without=self.left_out(self.next),
            )
            size = self._config.rollout.lease_size
            ledger.issue(self.next, requests, size, least=train.least_responses)
            self.next += 1

    def telling(
        self, ledger: Ledger, iteration: int, batch: Sequence[Scored]
    ) -> list[Scored] | None:
        """Replace prompts whose responses all have one score by others (dynamic sampling).

        Args:
            ledger: the books.
            iteration: that is collected.
            batch: all that was collected of it.

        Returns:
            None when others were issued, before all that waits; else the batch in rollout_id order,
            less what tells nothing. Where that is all of it, it is as without this.
        """
        train, ordered = self._config.train, sorted(batch, key=lambda s: s.rollout_ids[0])
        if not train.dynamic_sampling:
            return ordered
        flat = without_signal(ordered)
        telling = groups_of(ordered, flat)
        missing = train.prompts_per_iteration - telling
        if missing > 0 and self._rounds < train.dynamic_sampling:
            self._issue_further(ledger, iteration, missing)
            return None
        further = frozenset(
            r.rollout_id
            for s in ordered
            for r in s.requests
            if r.group >= train.prompts_per_iteration and r.rollout_id in flat
        )
        unused = flat if telling else further if further != flat else frozenset[str]()
        ledger.drop(unused, "no signal")
        return [
            replace(s, left_out=s.left_out | unused.intersection(s.rollout_ids)) for s in ordered
        ]

    def _issue_further(self, ledger: Ledger, iteration: int, prompts: int) -> None:
        train, self._rounds = self._config.train, self._rounds + 1
        requests = self._further.requests(
            iteration,
            prompts,
            train.samples_per_prompt,
            first_group=self._groups,
            without=self.left_out(iteration),
        )
        self._groups += prompts
        size = self._config.rollout.lease_size
        ledger.issue(iteration, requests, size, least=train.least_responses, first=True)

    def trained(self, iteration: int, batch: Sequence[Scored]) -> None:
        """Forget where an iteration began, which is not issued again; note what was solved."""
        del self._positions[iteration]
        self._begin_rounds()
        if self._curriculum is not None:
            self._curriculum.trained(iteration, batch)

    def left_out(self, iteration: int) -> frozenset[str]:
        """Return the prompts that an iteration is issued without."""
        if self._curriculum is None:
            return frozenset()
        wanted = self._config.train.prompts_per_iteration
        return self._curriculum.left_out(iteration, self._uids, wanted)

    def curriculum(self) -> dict[str, Any] | None:
        """Return what is known of the prompts, for `rewind`."""
        return self._curriculum.state() if self._curriculum else None

    def _all_uids(self) -> frozenset[str]:
        """Return the prompts that can be drawn."""
        if not self._parts:
            return frozenset(prompt.uid for prompt in self._encoded)
        return frozenset(self._encoded[row].uid for part in self._parts for row in part.rows)

    def _begin_rounds(self) -> None:
        self._rounds, self._groups = 0, self._config.train.prompts_per_iteration
        self.further_position = self._further.position
        """Where the stream of further prompts stands before the iteration that is collected."""

    def position(self, iteration: int) -> int:
        """Return where the prompt stream stands before an untrained iteration."""
        return self._positions.get(iteration, self._stream.position)
