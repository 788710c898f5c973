"""A run's policy in this process: samples of prompts, and a conversation in the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.generation.decoder_generator import build_engine
from common.config.model import PretrainedConfig
from common.config.run import RunConfig
from common.data.chat import Message
from common.data.prompts import EncodedPrompt, encode_prompts, evaluation_requests
from common.data.records import Prompt, told_apart
from common.data.tokenizer import load_tokenizer
from common.devices import compute_of, torch_dtype
from common.errors import ConfigError, DataError
from common.files import is_utf8, write_atomic
from common.models.build import build_policy
from common.models.networks import PolicyNetwork
from common.models.weight_files import load_weights
from common.wire.trajectory import FinishReason
from deploy.exchange.policies import policy_of
from deploy.run_folder.inputs import RunInputs
from deploy.run_folder.weights import policy_start

_AT_ONCE = 256
"""Prompts of a file that are sampled before their answers are written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One response to a prompt."""

    prompt: EncodedPrompt
    sample: int
    """Which of the prompt's responses it is, from 0."""
    response: str
    tokens: int
    finish_reason: FinishReason

    def row(self) -> dict[str, Any]:
        """Return it as a line of JSON lines; of a conversation with its messages."""
        asked: dict[str, Any] = {"prompt": self.prompt.text}
        if self.prompt.conversation is not None:
            asked["messages"] = json.loads(self.prompt.conversation)["messages"]
        return {
            "uid": self.prompt.uid,
            **asked,
            "sample": self.sample,
            "response": self.response,
            "tokens": self.tokens,
            "finish_reason": self.finish_reason,
        }


class Sampler:
    """Samples a run's policy by `rollout.threads` threads."""

    def __init__(
        self,
        config: RunConfig,
        *,
        sft: bool,
        checkpoint: str | None = None,
        exported: Path | None = None,
    ) -> None:
        """Load a policy of the run, or what its training began with.

        Args:
            config: the run's.
            sft: take what training began with.
            checkpoint: which policy else, by its word (`deploy.exchange.policies`).
            exported: weights of an exported policy, which is its only one.

        Raises:
            ConfigError: the word is none, or both are asked for.
            CheckpointError: no such checkpoint.
            DataError: no such policy.
        """
        if exported is not None and (sft or checkpoint is not None):
            raise ConfigError(
                f"{config.run_dir} is one exported policy, not a run: leave --sft and --checkpoint "
                "out"
            )
        if sft and checkpoint is not None:
            raise ConfigError(
                "--sft is the policy that training began with: leave --checkpoint out, or --sft"
            )
        rollout = config.rollout
        compute_of(cpus=rollout.cpus_per_actor or 1.0, threads=rollout.threads).apply()
        self._config, self._tokenizer = config, load_tokenizer(config.folder.tokenizer)
        self.note = ""
        """Which policy it is, in one line; empty where the user said so."""
        self.iteration = 0
        """How many iterations it was trained for; -1 where nobody says."""
        if exported is not None:
            network, self.iteration = _loaded(config, exported), -1
        elif sft:
            RunInputs(config.run_dir).require_result("sft")
            network = _loaded(config, policy_start(config))
        else:
            with policy_of(config, checkpoint) as (chosen, weights):
                network = _loaded(config, weights)
            self.note, self.iteration = chosen.note, chosen.iteration
        network.eval().requires_grad_(False).to(torch_dtype(rollout.precision))
        self._engine = build_engine(network.decoder, self._tokenizer, rollout)

    def responses(self, texts: Sequence[str], seed: int) -> list[str]:
        """Sample one response to each text."""
        return [answer.response for answer in self.answers(prompts_of(texts), seed)]

    def answers(self, prompts: Sequence[Prompt], seed: int, number: int = 1) -> Iterator[Answer]:
        """Sample `number` responses to each prompt, in their order, some prompts at a time.

        A response depends on the seed, the prompt's uid and its own number, not on its neighbours.

        Raises:
            DataError: a prompt does not fit into the context, or its template refuses it.
        """
        encoded, _ = encode_prompts(
            prompts,
            self._tokenizer,
            max_tokens=self._config.max_prompt_tokens,
            too_long="error",
        )
        for first in range(0, len(encoded), _AT_ONCE):
            yield from self._sample(encoded[first : first + _AT_ONCE], seed, number)

    def reply(self, messages: Sequence[Message], seed: int) -> str:
        """Sample the assistant's turn that follows a conversation.

        Raises:
            ConfigError: the tokenizer has no chat template.
            DataError: the template refuses the conversation, or it does not fit into the context.
        """
        if self._tokenizer.chat is None:
            raise ConfigError(
                f"{self._config.run_dir}: {self._tokenizer.chat_missing}; use `talipot sample`"
            )
        whole, room = self._tokenizer.chat.prompt(messages), self._config.max_prompt_tokens
        if len(whole.ids) > room:
            raise DataError(
                f"the conversation has {len(whole.ids)} tokens, and {room} fit; begin a new one"
            )
        prompt = EncodedPrompt(uid="chat", text=whole.text, ids=whole.ids)
        [answer] = self._sample([prompt], seed, 1)
        return answer.response

    def _sample(self, prompts: Sequence[EncodedPrompt], seed: int, number: int) -> list[Answer]:
        requests = evaluation_requests(prompts, seed=seed, label="sample", samples=number)
        return [
            Answer(
                prompt=prompts[index // number],
                sample=index % number,
                response=self._engine.text(found).strip(),
                tokens=len(found.response_ids),
                finish_reason=found.finish_reason,
            )
            for index, found in enumerate(self._engine.generate(requests))
        ]


def _loaded(config: RunConfig, weights: Path) -> PolicyNetwork:
    """Return the network that weights are of.

    A folder like a checkpoint's says itself what it is, so a policy that was handed over needs no
    other checkpoint to be there.
    """
    model = config.model
    if isinstance(model, PretrainedConfig) and weights.is_dir():
        model = model.model_copy(update={"start": str(weights)})
    network = build_policy(model)
    load_weights(network, weights)
    return network


class Conversation:
    """Turns of a user and of a run's policy."""

    def __init__(self, sampler: Sampler, system: str, seed: int) -> None:
        """Begin one; every answer is sampled from a seed of its own."""
        self._sampler, self._seed = sampler, seed
        self._messages: list[Message] = []
        if system:
            self._messages.append({"role": "system", "content": system})

    def say(self, text: str) -> str:
        """Take the user's turn, and return the assistant's."""
        _require_text(text, "your turn")
        asked = [*self._messages, {"role": "user", "content": text}]
        answer = self._sampler.reply(asked, self._seed)
        self._messages, self._seed = [*asked, _turn(answer)], self._seed + 1
        return answer


def prompts_of(texts: Sequence[str]) -> list[Prompt]:
    """Return texts as prompts, known by what they say, as in files.

    Raises:
        DataError: one is empty, or no UTF-8.
    """
    for index, text in enumerate(texts):
        _require_text(text, f"prompt {index + 1}")
    return told_apart(Prompt(prompt=text) for text in texts)


def write_answers(answers: Iterator[Answer], path: Path) -> int:
    """Write answers as JSON lines, whole or not at all; returns how many there were.

    Raises:
        StorageError: the file cannot be written.
    """
    written = 0

    def lines() -> Iterator[bytes]:
        nonlocal written
        for written, answer in enumerate(answers, 1):  # noqa: B007 counts
            yield (json.dumps(answer.row(), ensure_ascii=False) + "\n").encode()

    write_atomic(path, lines())
    return written


def _turn(answer: str) -> Message:
    return {"role": "assistant", "content": answer}


def _require_text(text: str, what: str) -> None:
    if not text:
        raise DataError(f"{what} is empty; give it at least one character")
    if not is_utf8(text):
        raise DataError(f"{what} is not UTF-8: {text}; give it as UTF-8")
