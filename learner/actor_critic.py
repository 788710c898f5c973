"""The networks of policy training: the policy, and a value network of its own where there is one.

They are built from the weights of earlier stages, published to the actors, saved and exported here;
`learner.learner` trains them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from common.config.run import RunConfig
from common.devices import torch_dtype
from common.errors import CheckpointError
from common.models.adapter_files import (
    ScalarAdapter,
    adapter_of,
    export_merged,
    put_scalar,
    require_base,
    scalar_adapter,
)
from common.models.adapters import (
    adapter_tensors,
    attach_adapter,
    freeze_base,
    merged_sources,
    share_base,
)
from common.models.build import build_policy, build_scalar
from common.models.decoder import DECODER
from common.models.filling import Source, Weights
from common.models.networks import PolicyNetwork, ScalarNetwork
from common.models.pretrained.writing import take_tokenizer
from common.models.weight_files import decoder_part, policy_folder, prefixed, save_policy
from common.randomness import derive_seed
from common.run_folder import PolicyFolder
from common.wire.weights import Payload, state_hash
from learner.start_weights import (
    critic_start,
    fingerprint,
    policy_start,
    trained_scalar,
)
from learner.zero.engine import ZeroEngine
from learner.zero.process_group import rank
from learner.zero.publisher import Publication, publisher
from learner.zero.state_files import Snapshot, load, snapshot


class ActorCritic:
    """One rank's share of policy and value network."""

    def __init__(
        self, config: RunConfig, policy_weights: Path, reward_weights: Path | None
    ) -> None:
        """Build both (a collective).

        Args:
            config: the run's.
            policy_weights: the supervised policy.
            reward_weights: the reward model, which the value network starts as; None: functions or
                endpoints score.
        """
        self.config, self._policy_weights = config, policy_weights
        settings = config.train
        policy = build_policy(config.model, empty=True)
        found = decoder_part(policy_start(policy, policy_weights))
        weights = prefixed(f"{DECODER}.", found)
        self.base_fingerprint = ""
        """Of the frozen weights that adapters are trained on; empty where all weights are."""
        if settings.lora is not None:
            self.base_fingerprint = fingerprint(policy.decoder, weights)
            attach_adapter(policy, settings.adapter, settings.lora, config.seed)
        # The auxiliary head starts fresh: SFT never trained it.
        policy.value.initialise(derive_seed(config.seed, "auxiliary head") >> 1)
        self.shares_prompts = policy.decoder.shares_prompts
        """`Decoder.shares_prompts` of the policy."""
        self.policy = self._engine(policy, weights.items())
        self.value: ZeroEngine | None = None
        if settings.separate_values:
            self.value = self._engine(*_value_network(config, policy, weights, reward_weights))
        self._publisher = publisher(
            self.policy,
            adapter_tensors(policy.decoder, policy.adapter)
            if policy.adapter
            else policy.decoder.named_parameters(),
            dtype=torch_dtype(config.rollout.precision),
            base=self.base_fingerprint,
        )

    def publish(self) -> tuple[Publication, Payload]:
        """Return this rank's slice of the policy's decoder: facts and bytes."""
        return self._publisher.publish()

    def snapshots(self) -> dict[str, Snapshot]:
        """Copy this rank's part of both engines' state, by the folders that they go to."""
        engines = {"policy": self.policy, "value": self.value}
        return {name: snapshot(engine) for name, engine in engines.items() if engine is not None}

    def load(self, folder: Path, base: str) -> None:
        """Read what was written of `snapshots` (a collective).

        Args:
            folder: where they are.
            base: fingerprint of the base that its adapters were trained on.

        Raises:
            CheckpointError: networks of another shape, or adapters of another base.
        """
        if base != self.base_fingerprint:
            raise CheckpointError(
                f"{folder}: its adapters were trained on base {base or 'none'}, and the supervised "
                f"policy is {self.base_fingerprint or 'trained as a whole'}; put back the weights "
                "that they were trained on"
            )
        load(self.policy, folder / "policy")
        if self.value is not None:
            load(self.value, folder / "value")

    def export(self, folder: Path) -> str:
        """Write the policy for users and later stages (a collective).

        All weights, the model's shape, and of adapters the adapter alone.

        Returns:
            The hash of what was trained, on rank 0.
        """
        model, lora, adapter = self.config.model, self.config.train.lora, self.config.train.adapter
        state = self.policy.full_state(frozen=lora is None)
        if rank() != 0:
            return ""
        base = self._policy_weights
        with policy_folder(folder, base) as target:
            if lora is not None:
                trained = adapter_of(state, adapter, lora, self.base_fingerprint)
                export_merged(trained, state, base, target, model)
            else:
                save_policy(state, target, model, base)
            if base.is_dir():
                take_tokenizer(self.config.folder.tokenizer, target)
            else:  # a checkpoint's folder says its shape itself
                text = json.dumps(model.model_dump(), indent=1)
                PolicyFolder(target).shape.write_text(text, encoding="utf8")
        return state_hash(state)

    def _engine(self, network: nn.Module, weights: Weights) -> ZeroEngine:
        learner, settings = self.config.learner, self.config.train
        return ZeroEngine(
            network,
            weights,
            zero_stage=learner.zero_stage,
            precision=learner.precision,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            eps=settings.adam_eps,
            auxiliary=settings.ppg is not None,
        )


def _value_network(
    config: RunConfig,
    policy: PolicyNetwork,
    policy_weights: Mapping[str, Source],
    reward_weights: Path | None,
) -> tuple[ScalarNetwork, Weights]:
    """Return the reward model as it was trained, or the supervised policy with a fresh head.

    With LoRA its base is the policy's own, unless the reward model has whole weights. A reward
    model of its own reads other tokens than the policy's, and no value network starts as it.

    Args:
        config: the run's.
        policy: it has its weights.
        policy_weights: where those of its decoder came from.
        reward_weights: as in `ActorCritic`.

    Returns:
        The network, and where the weights are that it has no memory for yet.
    """
    lora, own = config.train.lora, config.train.critic
    if own is not None or config.reward_model.model is not None:
        reward_weights = None
    value = build_scalar(own or config.model, empty=True)
    weights: Weights = ()
    scored = None if reward_weights is None else scalar_adapter(reward_weights)
    if scored is not None and reward_weights is not None:
        base = fingerprint(value.decoder, policy_weights)
        require_base(scored.adapter, base, reward_weights)
        if lora is None:
            return _merged(config, scored, policy_weights)
        share_base(value.decoder, policy.decoder)
        put_scalar(value, "value", scored)
        freeze_base(value.decoder)  # its adapter goes on
        return value, weights
    if reward_weights is not None:
        weights = trained_scalar(value, reward_weights).items()
    else:
        value.head.initialise(derive_seed(config.seed, "value head") >> 1)
        if own is not None:
            weights = critic_start(value, Path(own.start)).items()
        elif lora is None:
            weights = policy_weights.items()
        else:
            share_base(value.decoder, policy.decoder)
    if lora is not None:
        attach_adapter(value, "value", lora, config.seed)
    return value, weights


def _merged(
    config: RunConfig, scored: ScalarAdapter, base: Mapping[str, Source]
) -> tuple[ScalarNetwork, Weights]:
    """Return a reward model with its adapter in its weights."""
    adapted, whole = (build_scalar(config.model, empty=True) for _ in range(2))
    put_scalar(adapted, "value", scored)
    whole.head.load_state_dict(scored.head)
    return whole, merged_sources(adapted, "value", base).items()
