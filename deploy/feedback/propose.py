"""Pairs for people to compare, sampled from a run's policies in this process; no cluster needed.

::

    prompts --by shares--> a source each --sampled--> candidates --scored--> pairs
                           supervised | best | human | policy       random and active ones
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from difflib import SequenceMatcher
from statistics import fmean
from typing import Final, Literal

import numpy as np

from common.config.feedback import RoundConfig
from common.config.run import RunConfig
from common.data.chat import Message
from common.data.prompts import encode_prompts
from common.data.records import Comparison, Prompt, read_demonstrations, read_prompts
from common.data.tokenizer import load_tokenizer
from common.errors import ConfigError, DataError
from common.logprobs import sampling_of
from common.randomness import derive_seed
from common.run_folder import RunFolder
from deploy.feedback.disagreement import disagreement, scored
from deploy.feedback.pairs import Pair, Response, read_pairs
from deploy.feedback.rounds import rounds_of
from deploy.run_folder.weights import reward_models
from deploy.sampler import Sampler

Source = Literal["supervised", "best", "human", "policy"]

_WORDS: Final[Mapping[Source, str]] = {
    "supervised": "of the policy and the supervised one",
    "best": "of the policy and the best of several",
    "human": "of the policy and a demonstration",
    "policy": "of the policy",
}
_ALIKE: Final = 0.95
"""Responses that share more of their text are no pair: there is nothing to compare."""
_SPARE: Final = 1.5
"""Prompts that are sampled for each pair that is wanted, as some responses are alike."""
_POOL: Final = 4.0
"""Candidates for each pair that is chosen by disagreement."""
_LONGEST: Final = 400
"""Words of texts that are compared for that."""
_SURE: Final = 0.9
"""Least confidence of what is known."""


def proposed(
    config: RunConfig, settings: RoundConfig, base: RunFolder | None = None
) -> tuple[list[Pair], str]:
    """Sample responses to prompts that no round before has asked, and pair them.

    Responses that did not end by themselves, or say nothing, are left out, as are pairs of which
    the responses are alike. Prompts with tools are not asked: what they may call is not shown.

    Args:
        config: of the run whose policies are sampled.
        settings: of the round.
        base: of the run that has the rounds; None: the same.

    Returns:
        The pairs, and which policy it is, in a line.

    Raises:
        ConfigError: the run has too few prompts that were not asked yet, too few demonstrations of
            them, or not the reward models that the settings need.
        DataError: too few responses differ.
    """
    judges = reward_models(config)
    _require_judges(config, settings, len(judges))
    rng = np.random.default_rng(derive_seed(settings.seed, f"propose-{settings.number}"))
    lines = _demonstrations(config) if settings.human_share else {}
    prompts = _prompts(config, settings, rng, base or config.folder)
    by_source = _sources(config, settings, prompts, lines)
    asked = {prompt.uid: prompt for of in by_source.values() for prompt in of}
    policy = Sampler(config, sft=False, checkpoint=settings.checkpoint or None)
    note = policy.note
    said = _by_policy(policy, by_source, settings, config)
    del policy
    if begun := by_source["supervised"]:
        other = _said(Sampler(config, sft=True), "sft", begun, 1, settings, config)
        said |= {uid: [*said[uid][:1], *of] for uid, of in other.items()}
    for prompt in by_source["human"]:
        line = Response(text=lines[_name(prompt.prompt, prompt.messages)], policy="human")
        said[prompt.uid] = [*said[prompt.uid][:1], line]
    if judges:
        said = scored(config, judges, asked, said)
    candidates = {
        source: [pair for prompt in of if (pair := _pair(prompt, said[prompt.uid], source, rng))]
        for source, of in by_source.items()
    }
    found = []
    for source, count in quotas(settings).items():
        if len(candidates[source]) < count:
            raise DataError(
                f"{config.run_dir}: of {len(by_source[source])} prompts only "
                f"{len(candidates[source])} had two responses ({_WORDS[source]}) that end and "
                f"differ, and {count} pairs are wanted; ask for fewer (--pairs), or other shares"
            )
        found += chosen(candidates[source], count, settings.active_share)
    return found, note


def quotas(settings: RoundConfig) -> dict[Source, int]:
    """Return how many pairs of each source are wanted; together they are all."""
    shares: dict[Source, float] = {
        "supervised": settings.supervised_share,
        "best": settings.best_share,
        "human": settings.human_share,
    }
    found: dict[Source, int] = {}
    end = 0.0
    for source, share in shares.items():  # rounded at the ends, so that they add up
        found[source] = round((end + share) * settings.pairs) - round(end * settings.pairs)
        end += share
    return {**found, "policy": settings.pairs - sum(found.values())}


def _pair(
    prompt: Prompt, said: Sequence[Response], source: Source, rng: np.random.Generator
) -> Pair | None:
    """Return two responses to a prompt, the first one drawn; None where they are no pair."""
    sides = list(said)
    if source == "best":
        if len(sides) < 3:  # there is no best of one
            return None
        sides = [sides[0], replace(max(sides[1:], key=_score), policy="best")]
    if len(sides) != 2 or alike(sides[0].text, sides[1].text):
        return None
    first, second = sides if rng.random() < 0.5 else sides[::-1]
    return Pair(prompt=prompt.prompt, messages=prompt.messages, first=first, second=second)


def chosen(candidates: Sequence[Pair], count: int, active_share: float) -> list[Pair]:
    """Take pairs at random, and of the others those on which the reward models disagree most.

    Args:
        candidates: in a random order.
        count: of pairs to take.
        active_share: of these, which are taken by disagreement; where there are no more candidates
            than pairs, nothing is chosen, and all are random.
    """
    active = math.floor(active_share * count)
    if len(candidates) <= count:
        active = 0
    random, rest = candidates[: count - active], candidates[count - active :]
    most = sorted(rest, key=disagreement, reverse=True)[:active]
    return [*random, *(replace(pair, chosen_by="active") for pair in most)]


def _require_judges(config: RunConfig, settings: RoundConfig, there: int) -> None:
    """Refuse what needs more reward models than the run has."""
    if settings.active_share and there < 2:
        raise ConfigError(
            f"{config.run_dir}: pairs are chosen where reward models disagree, and it has {there}; "
            "train several with reward_model.seeds=3 reward_model.keep_seeds=true, or leave "
            "--active out"
        )
    if settings.best_share and not there:
        raise ConfigError(
            f"{config.run_dir}: the best of several responses is chosen by a reward model, and it "
            "has none; leave --best out"
        )


def _score(response: Response) -> float:
    return fmean(response.scores)


def _demonstrations(config: RunConfig) -> dict[str, str]:
    """Return what people wrote, by the prompt, as far as the policy could have written as much."""
    if not config.data.demonstrations:
        raise ConfigError(
            f"{config.run_dir}: data.demonstrations is empty: there is no line of a human to "
            "compare with; leave --human out"
        )
    tokenizer, most = load_tokenizer(config.folder.tokenizer), config.rollout.max_response_tokens
    found = {}
    for record in read_demonstrations(config.data.demonstrations):
        asked, line = record.asked(), record.response.strip()
        if line and len(tokenizer.encode(line)) < most:
            found[_name(asked.prompt, asked.messages)] = line
    return found


def _sources(
    config: RunConfig,
    settings: RoundConfig,
    prompts: Sequence[Prompt],
    lines: Mapping[str, str],
) -> dict[Source, list[Prompt]]:
    """Divide prompts, in their random order, by where the two responses to them come from."""
    found: dict[Source, list[Prompt]] = {}
    wanted = quotas(settings)
    left = list(prompts)
    written = [p for p in left if _name(p.prompt, p.messages) in lines]
    if len(written) < wanted["human"]:
        raise ConfigError(
            f"{config.run_dir}: {len(written)} prompts that were not asked yet have a "
            f"demonstration, and {wanted['human']} are wanted (--human); ask for fewer"
        )
    enough = len(left) >= sum(_sampled(count, settings) for count in wanted.values())
    for source in ("human", "supervised", "best", "policy"):
        count = wanted[source]
        if enough:
            most = _sampled(count, settings)
        else:  # what there is, in the same shares
            most = max(count, len(prompts) * count // settings.pairs)
        free = left if source != "human" else written
        found[source] = free[:most] if count else []
        taken = {prompt.uid for prompt in found[source]}
        left = [prompt for prompt in left if prompt.uid not in taken]
    return found


def _sampled(pairs: int, settings: RoundConfig) -> int:
    """Return how many prompts are sampled for so many pairs."""
    active = settings.active_share * pairs
    return round(_SPARE * (pairs - active + _POOL * active)) + 8 if pairs else 0


def _by_policy(
    policy: Sampler,
    by_source: Mapping[Source, Sequence[Prompt]],
    settings: RoundConfig,
    config: RunConfig,
) -> dict[str, list[Response]]:
    """Sample the policy once, twice, or so often that there is a best one."""
    numbers = {"supervised": 1, "human": 1, "policy": 2, "best": 1 + settings.best_of}
    found: dict[str, list[Response]] = {}
    for source, prompts in by_source.items():
        if prompts:
            found |= _said(policy, "policy", prompts, numbers[source], settings, config)
    return found


def _said(
    sampler: Sampler,
    policy: str,
    prompts: Sequence[Prompt],
    number: int,
    settings: RoundConfig,
    config: RunConfig,
) -> dict[str, list[Response]]:
    """Sample each prompt; policies are sampled by different seeds, else they would say the same."""
    seed = derive_seed(settings.seed, f"{policy}-{settings.number}")
    how = json.dumps(asdict(sampling_of(config.rollout, ())))
    found: dict[str, list[Response]] = {prompt.uid: [] for prompt in prompts}
    for answer in sampler.answers(prompts, seed, number):
        if answer.response and answer.finish_reason != "length":
            response = Response(
                text=answer.response,
                policy=policy,
                version=sampler.iteration,
                seed=seed,
                sampling=how,
            )
            found[answer.prompt.uid].append(response)
    return found


def _prompts(
    config: RunConfig,
    settings: RoundConfig,
    rng: np.random.Generator,
    base: RunFolder,
) -> list[Prompt]:
    """Return prompts of the run that fit, have no tools, and that no round before has asked.

    In a random order.
    """
    if not config.data.prompts:
        raise ConfigError(f"{config.run_dir}: data.prompts is empty; there is nothing to ask")
    asked = {
        _name(pair.prompt, pair.messages)
        for number in rounds_of(base)
        for pair in read_pairs(base.round(number).pairs)
    }
    known = {p.uid: p for p in read_prompts(config.data.prompts) if not p.tools}
    new = [p for p in known.values() if _name(p.prompt, p.messages) not in asked]
    if new:
        fitting, _ = encode_prompts(
            new,
            load_tokenizer(config.folder.tokenizer),
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
    return [new[place] for place in rng.permutation(len(new))]


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
