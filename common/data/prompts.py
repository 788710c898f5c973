"""The stream of rollout requests: seeded, resumable by one integer, the same on any cluster."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from common.data.encoding import prompts_in_ids
from common.data.fitting import Fitting, TooLong
from common.data.mixture import MixedIndex, Part
from common.data.records import Prompt
from common.data.tokenizer import Tokenizer
from common.randomness import ShuffledIndex, derive_seed
from common.wire.trajectory import RolloutRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    """A prompt with its tokens."""

    uid: str
    text: str
    """As it was written; of a conversation, as its template wrote it, control tokens spelled."""
    ids: list[int]
    conversation: str | None = None
    """As `RolloutRequest.conversation`."""
    columns: str | None = None
    """As `RolloutRequest.columns`."""
    source: str | None = None
    """As `RolloutRequest.source`."""


def encode_prompts(
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    too_long: TooLong,
    limit: int | None = None,
    source: Callable[[Prompt], str] | None = None,
) -> tuple[list[EncodedPrompt], Fitting]:
    """Tokenise the first `limit` prompts that fit; returns them and how they fitted.

    `source` says of a prompt which source of the recipe's mixture it is of.

    Raises:
        DataError: a prompt is too long and that is an error, or none are left.
    """
    prefix = len(tokenizer.prefix_ids)
    fitting = Fitting(what="prompts", prompt=max_tokens, too_long=too_long, prefix=prefix)
    kept: list[EncodedPrompt] = []
    encoded = prompts_in_ids(prompts, tokenizer)
    for prompt, whole in zip(prompts, encoded, strict=True):
        if len(kept) == limit:
            break
        parts, chat = {"prompt": whole.ids}, bool(prompt.messages)
        if (fitted := fitting.fit(prompt.place, parts, chat=chat)) is not None:
            kept.append(
                EncodedPrompt(
                    uid=prompt.uid,
                    text=whole.text,
                    ids=fitted[0],
                    conversation=conversation_of(prompt) if chat else None,
                    columns=columns_of(prompt),
                    source=source and source(prompt),
                )
            )
    fitting.require(len(kept), 1, "sampling")
    return kept, fitting


def columns_of(prompt: Prompt) -> str | None:
    """Write further columns as JSON (`RolloutRequest.columns`); None where there are none."""
    return json.dumps(prompt.columns, ensure_ascii=False) if prompt.columns else None


def conversation_of(prompt: Prompt) -> str:
    """Write a conversation as JSON (`RolloutRequest.conversation`)."""
    return json.dumps({"messages": prompt.messages, "tools": prompt.tools}, ensure_ascii=False)


class PromptStream:
    """Endless requests, epoch by epoch in seeded order. Consumed by the controller."""

    def __init__(
        self,
        prompts: Sequence[EncodedPrompt],
        *,
        seed: int,
        position: int = 0,
        adapter: str = "",
        parts: Sequence[Part] = (),
        label: str = "prompts",
    ) -> None:
        """Go on from `position`; all requests are to be sampled from `adapter`.

        Prompts are drawn of `parts` in their shares; without any, all alike. Streams of other
        labels have other orders.
        """
        self._adapter = adapter
        self._prompts = prompts
        self._seed = seed
        self._order = (
            MixedIndex(parts, seed, position, label)
            if parts
            else ShuffledIndex(len(prompts), derive_seed(seed, label) >> 1, position)
        )

    @property
    def position(self) -> int:
        """Prompts handed out so far; the whole state of the stream."""
        return self._order.position

    def requests(
        self,
        iteration: int,
        prompts: int,
        samples: int,
        first_group: int = 0,
        without: Collection[str] = (),
    ) -> list[RolloutRequest]:
        """Return requests of one iteration, samples of one prompt side by side.

        Groups, and with them rollouts, are numbered from `first_group` on. Prompts with the uids
        `without` are passed over; there is another one.
        """
        requests = []
        for group, index in enumerate(self._drawn(prompts, without), first_group):
            prompt = self._prompts[index]
            for sample in range(samples):
                rollout_id = f"{iteration:06d}-{group * samples + sample:06d}"
                requests.append(
                    RolloutRequest(
                        rollout_id=rollout_id,
                        group=group,
                        prompt_uid=prompt.uid,
                        prompt_text=prompt.text,
                        prompt_ids=prompt.ids,
                        conversation=prompt.conversation,
                        columns=prompt.columns,
                        source=prompt.source,
                        seed=derive_seed(self._seed, rollout_id),
                        adapter=self._adapter,
                    )
                )
        return requests

    def _drawn(self, prompts: int, without: Collection[str]) -> list[int]:
        """Draw so many prompts; one that is passed over is a draw too."""
        if not without:
            return self._order.next_batch(prompts)
        drawn: list[int] = []
        while len(drawn) < prompts:
            [index] = self._order.next_batch(1)
            if self._prompts[index].uid not in without:
                drawn.append(index)
        return drawn


def evaluation_requests(
    prompts: Sequence[EncodedPrompt],
    *,
    seed: int,
    label: str,
    samples: int = 1,
    adapters: Sequence[str] = ("",),
    greedy: bool | None = None,
) -> list[RolloutRequest]:
    """Request each prompt once, in their order, for evaluation and for sampling comparisons.

    Each sample is made with each of the adapters, side by side and from the same seed, which does
    not depend on what else is sampled beside it; `greedy` as in `RolloutRequest`.
    """
    wanted = itertools.product(enumerate(prompts), range(samples), adapters)
    return [
        RolloutRequest(
            rollout_id=f"{label}-{number:06d}",
            group=group,
            prompt_uid=prompt.uid,
            prompt_text=prompt.text,
            prompt_ids=prompt.ids,
            conversation=prompt.conversation,
            columns=prompt.columns,
            source=prompt.source,
            seed=derive_seed(seed, label, prompt.uid, sample),
            adapter=adapter,
            greedy=greedy,
        )
        for number, ((group, prompt), sample, adapter) in enumerate(wanted)
    ]
