"""How long the parts of an iteration take, from operations and bytes; see docs/plan.md.

A product of N parameters and a token is 2 N operations forwards and 4 N backwards. Reading weights
is what a decode step waits for as long as its batch is small. Shares of a device's limits that are
reached are assumed (`Shares`), and said.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.config.run import RunConfig
from deploy.planning.hardware import Device

_ROUND = 2
"""Bytes of a number that is sent or that products read, in bf16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Which share of a device's limits is taken to be reached."""

    learn: float = 0.4
    """Of products, in training."""
    score: float = 0.5
    """Of products, in frozen passes and in the computing of prompts."""
    read: float = 0.6
    """Of memory, in decode steps."""
    send: float = 0.7
    """Of links."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the times follow from."""

    policy: int
    """Parameters of the policy."""
    value: int
    """Of a value network of its own; 0: there is none."""
    scored: int
    """Of all that reward workers run, over all networks."""
    sent: int
    """Numbers of the policy that are trained, and sent to the actors."""
    trained: int
    """Those, and those of the value network."""
    cached: float
    """Bytes of keys and values of a token."""
    prompt: float
    """Tokens of a prompt."""
    response: float
    """Tokens of a response."""
    shares_prompts: bool
    """Learner and reward workers compute a prompt of several responses once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """Of one iteration, by part."""

    generate: float
    score: float
    learn: float
    auxiliary: float
    """A phase's, divided by the iterations between two."""
    publish: float
    overlap: bool
    """Rollouts are sampled and scored while the learner works, each on devices of its own."""

    @property
    def iteration(self) -> float:
        """All of it."""
        rollouts, learner = self.generate + self.score, self.learn + self.auxiliary
        if self.overlap:
            return max(rollouts, learner) + self.publish
        return rollouts + learner + self.publish

    @property
    def parts(self) -> dict[str, float]:
        """What each of generate, score, learn and publish takes; auxiliary phases are learning."""
        return {
            "generate": self.generate,
            "score": self.score,
            "learn": self.learn + self.auxiliary,
            "publish": self.publish,
        }

    @property
    def bottleneck(self) -> str:
        """The part that takes longest, whether others run beside it or not."""
        return max(self.parts, key=self.parts.__getitem__)


def seconds_of(config: RunConfig, sizes: Sizes, device: Device, shares: Shares) -> Seconds:
    """Return how long an iteration's parts take where each worker has one such device."""
    train, rollout, learner = config.train, config.rollout, config.learner
    rows = train.prompts_per_iteration * train.samples_per_prompt
    together = train.samples_per_prompt if sizes.shares_prompts else 1
    tokens = rows * (sizes.prompt / together + sizes.response)
    actors, replicas, ranks = (
        rollout.actors_at_start,
        config.reward_service.replicas,
        learner.ranks,
    )
    if device.shared:  # whoever works has all of it
        actors = replicas = ranks = 1
    products = device.products
    # Forwards 2, again if activations are, and backwards 4: no weight of a base has a gradient.
    both = 2 + (2 if config.model.activation_checkpointing else 0) + (4 if not train.lora else 2)
    learn = tokens * (2 + both * train.e_pi) * sizes.policy
    learn += tokens * (2 + both * train.e_v) * sizes.value
    auxiliary = 0.0
    if train.ppg is not None:
        # The memory has the tokens of n_pi iterations; the frozen policy is run beside.
        auxiliary = train.ppg.e_aux * tokens * (2 + both) * sizes.policy
        auxiliary += train.ppg.e_aux * tokens * both * sizes.value
    link = device.link if learner.ranks <= device.per_node else device.network
    sent = _exchanged(config, sizes, tokens) / (link * shares.send)
    rate = products * shares.learn * ranks
    return Seconds(
        generate=_generate(rows / max(1, actors), config, sizes, device, shares, products),
        score=2 * sizes.scored * tokens / (products * shares.score * max(1, replicas)),
        learn=learn / rate + sent,
        auxiliary=auxiliary / rate,
        publish=_ROUND * sizes.sent / (device.network * shares.send),
        overlap=train.max_staleness > 0 and not device.shared,
    )


def _generate(
    rows: float, config: RunConfig, sizes: Sizes, device: Device, shares: Shares, products: float
) -> float:
    """Prompts are computed once for all samples of them; then a step for each token."""
    slots = min(config.rollout.slots, config.rollout.lease_size, max(1.0, rows))
    rounds = max(1.0, rows / slots)
    prompts = rows / config.train.samples_per_prompt * sizes.prompt
    prefill = 2 * sizes.policy * prompts / (products * shares.score)
    kept = slots * sizes.cached * (sizes.prompt + sizes.response / 2)
    reading = (_ROUND * sizes.policy + kept) / (device.reads * shares.read)
    computing = 2 * sizes.policy * slots / (products * shares.score)
    return prefill + rounds * sizes.response * max(reading, computing)


def _exchanged(config: RunConfig, sizes: Sizes, tokens: float) -> float:
    """Bytes that a rank sends and gets in a policy phase: gradients, and under ZeRO 3 weights."""
    learner, train = config.learner, config.train
    if learner.ranks == 1:
        return 0.0
    share = (learner.ranks - 1) / learner.ranks
    each = 4.0 * share  # fp32
    micro = max(1.0, tokens / learner.ranks / learner.micro_batch_tokens)
    steps, whole = train.e_pi * train.minibatches, sizes.trained
    if learner.zero_stage < 2:
        gradients = 2 * each * whole * steps
    else:
        gradients = each * whole * micro * train.e_pi
        gradients += each * whole * steps if learner.zero_stage == 2 else 0.0
    if learner.zero_stage < 3:
        return gradients
    return gradients + 2 * each * (sizes.policy + sizes.value) * micro * train.e_pi
