"""What a program asks of a run: prompts as it writes them, and scores of any responses.

In this process, by what a reward worker computes; no cluster is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.config.run import RunConfig
from common.data.chat import Message
from common.data.conversations import last_user, prompt_of
from common.data.encoding import rows_in_ids
from common.data.prompts import columns_of, conversation_of
from common.data.records import Demonstration, Prompt, told_apart
from common.data.tokenizer import load_tokenizer
from common.devices import compute_of
from common.errors import DataError
from common.files import is_utf8
from common.logprobs import sampling_of
from common.wire.trajectory import Rollout, ScoredTrajectory, from_table, to_table
from deploy.run_folder.inputs import RunInputs
from deploy.run_folder.weights import policy_start, reward_weights
from reward_service.service import RewardWorker

Scored = tuple[float | None, Mapping[str, float], str]
"""Total, components by name, and why: what a component says, or why there is no total."""


def asked(
    prompts: Sequence[str | Sequence[Message]],
    columns: Sequence[Mapping[str, Any]] | None = None,
) -> list[Prompt]:
    """Return texts and conversations as prompts that are known by what they say.

    Args:
        prompts: texts or conversations.
        columns: what else belongs to each, as further columns of a data file.

    Raises:
        DataError: one is empty, or no conversation that the assistant could answer; or there are
            not as many of both.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts is a list of prompts, not one text: write [text]")
    if columns is not None and len(columns) != len(prompts):
        raise DataError(f"{len(prompts)} prompts and {len(columns)} columns; give as many")
    return told_apart(
        _prompt(index, given, columns[index] if columns else {})
        for index, given in enumerate(prompts)
    )


def _prompt(index: int, given: str | Sequence[Message], columns: Mapping[str, Any]) -> Prompt:
    place = f"prompt {index + 1}"
    if not isinstance(given, str):
        messages = prompt_of(given, place)
        return Prompt(
            prompt=last_user(messages), messages=messages, columns=dict(columns), place=place
        )
    if not given:
        raise DataError(f"{place} is empty; give it at least one character")
    if not is_utf8(given):
        raise DataError(f"{place} is not UTF-8: {given!r}; give it as UTF-8")
    return Prompt(prompt=given, columns=dict(columns), place=place)


class RunScorer:
    """Scores by the components of a run's `reward_service`, one worker of it in this process."""

    def __init__(self, config: RunConfig, reward: Path | None = None) -> None:
        """Load what the components score with.

        Raises what a reward worker's start does, and DataError where the reward model was changed.

        Args:
            config: the run's.
            reward: weights of the reward model, in place of the run's own.
        """
        if reward is None:
            RunInputs(config.run_dir).require_result("reward")
        settings = config.reward_service
        self._config, self._tokenizer = config, load_tokenizer(config.folder.tokenizer)
        if reward is None and settings.needs_model:
            reward = reward_weights(config)
        self._worker = RewardWorker(
            settings,
            config.model,
            str(policy_start(config)),
            None if reward is None else str(reward),
            sampling_of(config.rollout, self._tokenizer.stop_ids),
            compute_of(cpus=settings.cpus_per_replica or 1.0, threads=settings.threads),
            merge=True,
            judge=config.reward_model.model,
            precision=config.reward_precision,
        )

    def scores(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Scored]:
        """Score each response to its prompt.

        Raises:
            DataError: there are not as many of both, or a pair does not fit into the context.
            RewardError: a component cannot score.
        """
        if len(prompts) != len(responses):
            raise DataError(f"{len(prompts)} prompts and {len(responses)} responses; give as many")
        if not prompts:
            return []
        rollouts = self._rollouts(prompts, responses)
        facts, table = self._worker.score(to_table(rollouts, Rollout))
        scored = {row.rollout_id: row for row in from_table(table, ScoredTrajectory)}
        found: list[Scored] = []
        for rollout in rollouts:
            row = scored.get(rollout.rollout_id)
            if row is None:
                found.append((None, {}, facts.dead_letters[rollout.rollout_id]))
            else:
                found.append((row.score, row.score_components, row.score_reason or ""))
        return found

    def _rollouts(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Rollout]:
        """Lay prompts and responses out as rollouts that ended; nobody sampled them."""
        pairs = [
            Demonstration(
                prompt=prompt.prompt,
                response=response,
                messages=prompt.messages,
                tools=prompt.tools,
                place=prompt.place,
            )
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        made = []
        for index, (prompt, response, [[turn]]) in enumerate(
            zip(prompts, responses, rows_in_ids(pairs, self._tokenizer), strict=True)
        ):
            length, room = len(turn.before) + len(turn.learnt), self._config.model.context
            if length > room:
                raise DataError(
                    f"{prompt.place}: prompt and response have {length} tokens, and {room} fit"
                )
            made.append(
                Rollout(
                    rollout_id=f"score-{index:06d}",
                    group=index,
                    prompt_uid=prompt.uid,
                    prompt_text=prompt.prompt,
                    prompt_ids=turn.before,
                    seed=0,
                    conversation=conversation_of(prompt) if prompt.messages else None,
                    columns=columns_of(prompt),
                    response_ids=turn.learnt,
                    response_text=response,
                    behavior_logprobs=[0.0] * len(turn.learnt),
                    finish_reason="eos",
                    policy_version=0,
                    weights_fingerprint="",
                    actor_id="",
                )
            )
        return made
