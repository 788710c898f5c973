"""Where a run's weights lie: a file of ours, or a folder like the checkpoint it starts from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from common.config.model import ModelConfig, checkpoint_of
from common.config.run import RunConfig
from common.errors import CheckpointError, ConfigError, DataError
from common.models.pretrained.config_files import CONFIG
from common.run_folder import PolicyFolder, RewardModelFolder

if TYPE_CHECKING:
    from common.models.pretrained.checkpoint import Checkpoint


def policy_start(config: RunConfig) -> Path:
    """Return the weights that policy training begins with, and measures the KL against.

    They are the supervised stage's; a pretrained model without one begins as its checkpoint.

    Raises:
        DataError: they are another run's (`reuse.sft`), and not there.
    """
    start, sft = checkpoint_of(config.model), config.folder.sft
    _require_reused("sft", config.reuse.sft)
    if start is None:
        return sft.weights
    return sft.path if (sft.path / CONFIG).exists() else start


def final_policy(config: RunConfig) -> Path:
    """Return the weights of the trained policy, whether they are there yet or not."""
    policy = config.folder.policy
    return policy.weights if checkpoint_of(config.model) is None else policy.path


def reward_start(config: RunConfig) -> Path:
    """Return the weights that the reward model's training begins with."""
    return checkpoint_of(config.reward_model.model) or policy_start(config)


def reward_weights(config: RunConfig) -> Path:
    """Return the weights of the trained reward model, or those of a checkpoint that is one.

    Raises:
        DataError: they are another run's (`reuse.reward_model`), and not there.
    """
    _require_reused("reward_model", config.reuse.reward_model)
    folder, own = config.folder.reward_model, checkpoint_of(config.reward_model.model)
    if (folder.path / CONFIG).exists():
        return folder.path
    return folder.weights if own is None or folder.weights.exists() else own


def reward_models(config: RunConfig) -> list[Path]:
    """Return the weights of the run's reward models, one of each seed where all are kept.

    Raises:
        DataError: as `reward_weights`.
    """
    folders = [config.folder.reward_seed(seed) for seed in range(config.reward_model.seeds)]
    weights = [f.path if (f.path / CONFIG).exists() else f.weights for f in folders]
    if config.reward_model.keep_seeds and all(path.exists() for path in weights):
        return weights
    if config.reward_service.needs_model and reward_weights(config).exists():
        return [reward_weights(config)]
    return []


def require_earlier_stages(stage: str, config: RunConfig) -> None:
    """Refuse a stage that begins with weights which an earlier one has not left in the run yet.

    Raises:
        CheckpointError: names the weights and the command that writes them.
    """
    needed = {"sft": policy_start(config)} if stage != "sft" else {}
    if stage == "train" and config.reward_service.needs_model:
        needed["reward"] = reward_weights(config)
    for earlier, path in needed.items():
        if path.is_relative_to(config.run_dir) and not path.exists():
            raise CheckpointError(
                f"{path}: no such weights; `talipot {earlier}` with the same recipe writes them"
            )


def _require_reused(name: str, folder: str | None) -> None:
    if folder is not None and not any(path.exists() for path in weights_in(Path(folder))):
        raise DataError(
            f"reuse.{name}: {folder}: no such results; put that run back where it was, or say "
            f"where they are now with reuse.{name}=PATH"
        )


def require_checkpoints(config: RunConfig) -> None:
    """Refuse a recipe whose checkpoints cannot be read, by their configurations and headers.

    Raises:
        CheckpointError: a folder that is none, or is torn.
        ConfigError: a model that is not supported, or a context longer than its own.
    """
    own, context = config.reward_model.model, config.model.context
    checked: list[tuple[ModelConfig, int]] = [] if own is None else [(own, own.context)]
    # What reads the policy's tokens reads sequences of the policy's context.
    readers = _readers_of_its_tokens(config)
    checked += [(model, max(model.context, context)) for _, model in readers]
    for model, longest in checked:
        if (start := checkpoint_of(model)) is not None:
            # With libraries that take seconds to import, which models of our own do without.
            from common.models.pretrained.families import read_shape, sizes_of

            _opened(start)
            sizes_of(read_shape(start), longest, start)


def require_embedded(config: RunConfig, tokens: int) -> None:
    """Refuse a tokenizer with more tokens than a checkpoint embeds that reads the policy's tokens.

    Raises:
        ConfigError: with both numbers.
    """
    for field, model in _readers_of_its_tokens(config):
        if (start := checkpoint_of(model)) is None:
            continue
        checkpoint = _opened(start)
        rows = checkpoint.facts[checkpoint.embedding].shape[0]
        if tokens > rows:
            raise ConfigError(
                f"{field}.start {start}: embeds {rows} tokens, and the tokenizer has {tokens}; "
                "bring the tokenizer that belongs to the model"
            )


def _readers_of_its_tokens(config: RunConfig) -> list[tuple[str, ModelConfig]]:
    """Return the models that read the policy's tokens, by their fields."""
    models = {
        "model": config.model,
        "train.critic": config.train.critic,
        "reward_service.reference": config.reward_service.reference,
    }
    return [(field, model) for field, model in models.items() if model is not None]


def is_there(folder: PolicyFolder) -> bool:
    """Whether a stage has left its policy in a folder."""
    return any(path.exists() for path in weights_in(folder.path))


def weights_in(folder: Path) -> list[Path]:
    """Return the files one of which exists where a stage has left weights in a folder."""
    own = (PolicyFolder(folder).weights, RewardModelFolder(folder).weights)
    return [*own, folder / CONFIG]


def files_of(weights: Path) -> list[Path]:
    """Return the files that weights consist of.

    Raises:
        CheckpointError: a folder that is no checkpoint.
    """
    if not weights.is_dir():
        return [weights]
    beside = sorted(path for path in weights.glob("*_head.safetensors"))
    return [*_opened(weights).files, *beside]


def _opened(folder: Path) -> Checkpoint:
    from common.models.pretrained.checkpoint import Checkpoint

    return Checkpoint.open(folder)
