"""Named settings of `train`: what papers set, beneath what a recipe says itself.

A preset is no algorithm of its own: it fills in fields that the recipe leaves out, and the resolved
configuration shows each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Literal

PresetName = Literal["ppo", "ppg", "grpo", "dr_grpo", "dapo", "gspo"]

_GROUPS: Final = {"samples_per_prompt": 8, "prompts_per_iteration": 32}
"""As many rollouts an iteration as without a preset."""

PRESETS: Final[Mapping[PresetName, Mapping[str, Any]]] = MappingProxyType(
    {
        # Schulman 2017; its penalty in the reward is Stiennon's (2020).
        "ppo": {"algorithm": "ppo", "ppg": None},
        # Cobbe 2020.
        "ppg": {"algorithm": "ppo", "ppg": {"n_pi": 8, "e_aux": 2, "beta_clone": 1.0}},
        # Shao 2024 (DeepSeekMath), section 4.2: the KL is a term of the loss.
        "grpo": {
            **_GROUPS,
            "algorithm": "grpo",
            "kl_coef": 0.0,
            "objective": {
                "aggregation": "sequences",
                "kl_loss": {"coef": 0.04, "estimator": "k3"},
            },
        },
        # Liu 2025 (2503.20783).
        "dr_grpo": {
            **_GROUPS,
            "algorithm": "dr_grpo",
            "kl_coef": 0.0,
            "objective": {"aggregation": "constant"},
        },
        # Yu 2025 (2503.14476), equations 8, 11 and 12; its penalty on length needs a buffer in
        # tokens, which depends on the task: `train.objective.overlong`.
        "dapo": {
            **_GROUPS,
            "algorithm": "grpo",
            "kl_coef": 0.0,
            "clip_range": 0.2,
            "dynamic_sampling": 10,
            "objective": {"clip_high": 0.28, "aggregation": "tokens"},
        },
        # Zheng 2025 (2507.18071), section 5.1.
        "gspo": {
            **_GROUPS,
            "algorithm": "grpo",
            "kl_coef": 0.0,
            "clip_range": 3e-4,
            "objective": {"ratio": "sequence", "clip_high": 4e-4, "aggregation": "sequences"},
        },
    }
)


def beneath(given: Mapping[str, Any], preset: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is given, and of a preset what is not, field by field of inner sections too."""
    both = {
        key: beneath(of, preset[key])
        for key, of in given.items()
        if isinstance(of, Mapping) and isinstance(preset.get(key), Mapping)
    }
    return {**preset, **given, **both}
