"""A run's policy in this process: single samples, and a conversation in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from actors.generation.decoder_generator import build_engine
from common.config.run import RunConfig
from common.data.chat import Message
from common.data.prompts import EncodedPrompt, encode_prompts, evaluation_requests
from common.data.records import Prompt
from common.data.tokenizer import load_tokenizer
from common.devices import compute_of, torch_dtype
from common.errors import ConfigError, DataError
from common.files import is_utf8
from common.models.build import build_policy
from common.models.weight_files import load_weights
from deploy.run_folder.weights import final_policy, policy_start


class Sampler:
    """Samples a run's policy by `rollout.threads` threads."""

    def __init__(self, config: RunConfig, *, sft: bool) -> None:
        """Load the trained policy, or what its training began with."""
        rollout = config.rollout
        compute_of(cpus=rollout.cpus_per_actor, threads=rollout.threads).apply()
        self._config, self._tokenizer = config, load_tokenizer(config.folder.tokenizer)
        network = build_policy(config.model)
        load_weights(network, policy_start(config) if sft else final_policy(config))
        network.eval().requires_grad_(False).to(torch_dtype(rollout.precision))
        self._engine = build_engine(network.decoder, self._tokenizer, rollout)

    def responses(self, texts: Sequence[str], seed: int) -> list[str]:
        """Sample one response to each text."""
        for index, text in enumerate(texts):
            _require_text(text, f"prompt {index + 1}")
        prompts, _ = encode_prompts(
            [Prompt(uid=str(i), prompt=text) for i, text in enumerate(texts)],
            self._tokenizer,
            max_tokens=self._config.max_prompt_tokens,
            too_long="error",
        )
        return self._sample(prompts, seed)

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
        return self._sample([EncodedPrompt(uid="chat", text=whole.text, ids=whole.ids)], seed)[0]

    def _sample(self, prompts: Sequence[EncodedPrompt], seed: int) -> list[str]:
        requests = evaluation_requests(prompts, seed=seed, label="sample")
        return [self._engine.text(found).strip() for found in self._engine.generate(requests)]


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


def _turn(answer: str) -> Message:
    return {"role": "assistant", "content": answer}


def _require_text(text: str, what: str) -> None:
    if not text:
        raise DataError(f"{what} is empty; give it at least one character")
    if not is_utf8(text):
        raise DataError(f"{what} is not UTF-8: {text}; give it as UTF-8")
