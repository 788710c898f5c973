"""Pairs for people to compare, sampled from a run's policies in this process; no cluster needed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from typing import Final, Literal

import numpy as np

from common.config.feedback import RoundConfig
from common.config.run import RunConfig
from common.data.chat import Message
from common.data.prompts import encode_prompts
from common.data.records import Comparison, Prompt, read_prompts
from common.data.tokenizer import load_tokenizer
from common.errors import ConfigError, DataError
from common.randomness import derive_seed
from deploy.feedback.pairs import Pair, Response, read_pairs
from deploy.feedback.rounds import rounds_of
from deploy.sampler import Sampler

_ALIKE: Final = 0.95
"""Responses that share more of their text are no pair: there is nothing to compare."""
_SPARE: Final = 1.5
"""Prompts that are sampled for each pair that is wanted, as some responses are alike."""
_LONGEST: Final = 400
"""Words of texts that are compared for that."""
_SURE: Final = 0.9
"""Least confidence of what is known."""


def proposed(config: RunConfig, settings: RoundConfig) -> tuple[list[Pair], str]:
    """Sample responses to prompts that no round before has asked, and pair them.

    Responses that did not end by themselves, or say nothing, are left out, as are pairs of which
    the responses are alike. Prompts with tools are not asked: what they may call is not shown.

    Returns:
        The pairs, and which policy it is, in a line.

    Raises:
        ConfigError: the run has too few prompts that were not asked yet.
        DataError: too few responses differ.
    """
    rng = np.random.default_rng(derive_seed(settings.seed, f"propose-{settings.number}"))
    prompts = _prompts(config, settings, rng)
    mixed = rng.random(len(prompts)) < settings.supervised_share
    policy = Sampler(config, sft=False, checkpoint=settings.checkpoint or None)
    note = policy.note
    said = _said(policy, "policy", prompts, 2, settings)
    del policy
    asked = [prompt for prompt, other in zip(prompts, mixed, strict=True) if other]
    if asked:
        begun = _said(Sampler(config, sft=True), "sft", asked, 1, settings)
        said = {
            uid: [*said[uid][:1], *begun[uid]] if uid in begun else of for uid, of in said.items()
        }
    pairs = []
    for prompt in prompts:
        sides = said[prompt.uid]
        if len(sides) != 2 or alike(sides[0].text, sides[1].text):
            continue
        first, second = sides if rng.random() < 0.5 else sides[::-1]
        pairs.append(
            Pair(prompt=prompt.prompt, messages=prompt.messages, first=first, second=second)
        )
    if len(pairs) < settings.pairs:
        raise DataError(
            f"{config.run_dir}: of {len(prompts)} prompts only {len(pairs)} had two responses that "
            f"end and differ, and {settings.pairs} pairs are wanted; ask for fewer (--pairs)"
        )
    return pairs[: settings.pairs], note


def _said(
    sampler: Sampler, policy: str, prompts: Sequence[Prompt], number: int, settings: RoundConfig
) -> dict[str, list[Response]]:
    """Sample each prompt; policies are sampled by different seeds, else they would say the same."""
    seed = derive_seed(settings.seed, f"{policy}-{settings.number}")
    found: dict[str, list[Response]] = {prompt.uid: [] for prompt in prompts}
    for answer in sampler.answers(prompts, seed, number):
        if answer.response and answer.finish_reason != "length":
            response = Response(text=answer.response, policy=policy, seed=seed)
            found[answer.prompt.uid].append(response)
    return found


def _prompts(config: RunConfig, settings: RoundConfig, rng: np.random.Generator) -> list[Prompt]:
    """Draw prompts of the run that fit, have no tools, and that no round before has asked."""
    if not config.data.prompts:
        raise ConfigError(f"{config.run_dir}: data.prompts is empty; there is nothing to ask")
    folder = config.folder
    asked = {
        _name(pair.prompt, pair.messages)
        for number in rounds_of(folder)
        for pair in read_pairs(folder.round(number).pairs)
    }
    known = {p.uid: p for p in read_prompts(config.data.prompts) if not p.tools}
    new = [p for p in known.values() if _name(p.prompt, p.messages) not in asked]
    if new:
        fitting, _ = encode_prompts(
            new,
            load_tokenizer(folder.tokenizer),
            max_tokens=config.max_prompt_tokens,
            too_long="skip",
        )
        fits = {prompt.uid for prompt in fitting}
        new = [p for p in new if p.uid in fits]
    if len(new) < settings.pairs:
        raise ConfigError(
            f"{config.run_dir}: {len(new)} prompts were not asked in an earlier round, and "
            f"{settings.pairs} pairs are wanted; ask for fewer (--pairs), or add prompts"
        )
    count = min(len(new), round(_SPARE * settings.pairs) + 8)
    return [new[place] for place in rng.permutation(len(new))[:count]]


def _name(prompt: str, messages: Sequence[Message]) -> str:
    return json.dumps([prompt, messages], sort_keys=True, ensure_ascii=False)


def alike(one: str, two: str) -> bool:
    """Whether two responses are the same for a reader, or nearly."""
    first, second = (text.casefold().split()[:_LONGEST] for text in (one, two))
    if first == second:
        return True
    return SequenceMatcher(None, first, second, autojunk=False).ratio() > _ALIKE


def known_pairs(
    comparisons: Iterable[Comparison], seed: int, use: Literal["gold", "practice"]
) -> list[Pair]:
    """Return comparisons whose better response is known as pairs, the sides drawn.

    Raises:
        ConfigError: one is not sure, or has tools.
    """
    rng = np.random.default_rng(derive_seed(seed, use))
    found = []
    for each in comparisons:
        if each.confidence < _SURE or each.tools:
            raise ConfigError(
                f"{each.place}: is not known for certain (confidence {each.confidence:g}), or has "
                f"tools: leave it out of --{use}"
            )
        better, worse = Response(text=each.chosen), Response(text=each.rejected)
        first = rng.random() < 0.5
        found.append(
            Pair(
                prompt=each.prompt,
                messages=each.messages,
                first=better if first else worse,
                second=worse if first else better,
                chosen_by=use,
                gold=3 if first else -3,
            )
        )
    return found
