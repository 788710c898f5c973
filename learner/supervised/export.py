"""What the supervised stages do to a network before and after training."""

from __future__ import annotations

from pathlib import Path

from common.config.model import LoraConfig
from common.config.run import RunConfig
from common.models.adapters import attach_adapter, base_fingerprint
from common.models.networks import PolicyNetwork, ScalarNetwork
from common.models.weight_files import save_weights
from learner.zero.engine import ZeroEngine
from learner.zero.process_group import rank


def adapt_network(
    network: PolicyNetwork | ScalarNetwork, name: str, settings: LoraConfig | None, seed: int
) -> str:
    """Train adapters where they are asked for; the base's fingerprint."""
    if settings is None:
        return ""
    base = base_fingerprint(network.state_dict())
    attach_adapter(network, name, settings, seed)
    return base


def export_network(engine: ZeroEngine, path: Path, config: RunConfig) -> None:
    state = engine.full_state()
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_weights(state, path, {"model": config.model.model_dump_json()})
