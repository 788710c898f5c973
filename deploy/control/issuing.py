"""Which iterations have been issued, and where the prompt stream stood before each of them."""

from __future__ import annotations

from collections.abc import Sequence

from common.config.run import RunConfig
from common.data.mixture import Part, parts_of
from common.data.prompts import EncodedPrompt, PromptStream
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
        self.rewind(0, 0)

    def rewind(self, iteration: int, position: int) -> None:
        """Issue `iteration` next, from this position of the prompt stream."""
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

    def issue(self, ledger: Ledger, until: int) -> None:
        """Issue all iterations up to and including `until`, as far as the run goes."""
        train = self._config.train
        while self.next <= min(until, train.iterations - 1):
            self._positions[self.next] = self._stream.position
            requests = self._stream.requests(
                self.next, train.prompts_per_iteration, train.samples_per_prompt
            )
            size = self._config.rollout.lease_size
            ledger.issue(self.next, requests, size, least=train.least_responses)
            self.next += 1

    def trained(self, iteration: int) -> None:
        """Forget where an iteration began: it will not be issued again."""
        del self._positions[iteration]

    def position(self, iteration: int) -> int:
        """Return where the prompt stream stands before an untrained iteration."""
        return self._positions.get(iteration, self._stream.position)
