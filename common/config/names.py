"""Which field may have been meant by a name that no section has."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from common.config.base import Family, Section
from common.config.draft import annotation_of, only_section_of, section_of
from common.config.earlier import RENAMED
from common.config.run import RunConfig
from common.config.yaml_text import Key

_NEAR = 0.6
_MOST_NAMED = 3
_OF_OTHER_SYSTEMS = {
    "lr": ("learning_rate", "learning_rates", "actor_learning_rate", "policy_lr"),
    "value_lr": ("critic_learning_rate", "critic_lr", "vf_lr"),
    "epochs": ("num_train_epochs", "num_epochs", "n_epochs", "max_epochs"),
    "e_pi": ("ppo_epochs", "num_ppo_epochs", "num_iterations_per_batch"),
    "minibatches": (
        "mini_batch_size",
        "num_mini_batches",
        "num_minibatches",
        "ppo_mini_batch_size",
    ),
    "prompts_per_iteration": ("rollout_batch_size", "train_batch_size", "batch_size"),
    "batch_size": ("per_device_train_batch_size", "train_batch_size"),
    "batch_tokens": ("batch_size", "per_device_train_batch_size"),
    "micro_batch_tokens": ("micro_batch_size", "micro_train_batch_size"),
    "iterations": (
        "max_steps",
        "total_steps",
        "num_steps",
        "steps",
        "total_episodes",
        "num_episodes",
    ),
    "samples_per_prompt": ("num_generations", "group_size", "n_samples_per_prompt", "n", "rloo_k"),
    "kl_coef": ("init_kl_coef", "kl_beta", "beta", "kl_coefficient", "kl_loss_coef"),
    "kl_target": ("target_kl", "target"),
    "clip_range": ("cliprange", "epsilon", "eps_clip", "clip_eps", "clip_ratio"),
    "value_clip_range": ("cliprange_value", "value_clip", "vf_clip_param"),
    "gae_lambda": ("lam", "lambd", "gae_lam"),
    "entropy_coef": ("entropy_coeff", "ent_coef"),
    "missing_eos_penalty": ("eos_penalty",),
    "max_grad_norm": ("gradient_clipping", "clip_grad", "max_norm", "grad_clip"),
    "warmup": ("warmup_ratio", "warmup_steps", "lr_warmup_ratio"),
    "checkpoint_every": ("save_steps", "save_freq", "save_interval", "save_every"),
    "keep_checkpoints": ("save_total_limit", "max_ckpt_num"),
    "max_response_tokens": ("max_new_tokens", "response_length", "generate_max_len", "max_tokens"),
    "stop": ("stop_strings", "stop_sequences"),
    "stop_ids": ("stop_token_ids", "eos_token_id"),
    "actors": ("num_workers", "num_actors", "rollout_workers", "vllm_num_engines"),
    "replicas": ("num_replicas", "reward_num_nodes"),
    "ranks": ("world_size", "num_gpus", "nproc_per_node", "actor_num_nodes"),
    "precision": ("dtype", "torch_dtype", "bf16", "fp16"),
    "context": ("max_length", "max_seq_len", "max_seq_length", "seq_len", "block_size"),
    "layers": ("num_layers", "n_layers", "num_hidden_layers", "n_layer", "depth"),
    "dim": ("hidden_size", "d_model", "n_embd", "embed_dim"),
    "heads": ("num_heads", "n_heads", "num_attention_heads", "n_head"),
    "head_dim": ("dim_head",),
    "start": ("model_name_or_path", "model_path", "pretrain", "checkpoint"),
    "rank": ("r", "lora_r", "lora_rank"),
    "alpha": ("lora_alpha",),
    "dropout": ("lora_dropout",),
    "targets": ("target_modules",),
    "activation_checkpointing": ("gradient_checkpointing",),
    "zero_stage": ("stage", "deepspeed_stage"),
    "output": ("output_dir", "save_path", "default_local_dir"),
    "name": ("run_name", "experiment_name"),
    "prompts": ("prompt_data", "train_files", "dataset", "train_file"),
    "evaluation": ("eval_files", "val_files", "eval_data", "eval_dataset"),
    "target": ("url", "endpoint", "function"),
}
"""What fields are called in other systems, by our own names of them."""


def meant(key: Key) -> str:
    """Say what a field is called now, or which field may have been meant; empty where none is near.

    A field of the same section goes before others that other systems call so, then comes a name
    like it in the section, then the same name anywhere.
    """
    if key in RENAMED:
        return f"; it is called '{'.'.join(RENAMED[key])}' now"
    *parents, name = key
    section = section_of(annotation_of(RunConfig, tuple(parents)) if parents else RunConfig)
    here = list(section.every_field()) if section else []
    ours = [own for own, theirs in _OF_OTHER_SYSTEMS.items() if name.lower() in theirs]
    inside = [".".join([*parents, own]) for own in ours if own in here]
    everywhere = [full for full, _, _ in fields()]
    near = difflib.get_close_matches(name, here, 1, _NEAR)
    for proposed in (
        inside,
        [full for own in ours for full in everywhere if full.rpartition(".")[2] == own],
        [".".join([*parents, *near])] if near else [],
        [full for full in everywhere if full.endswith(f".{name}")],
    ):
        if proposed:
            *others, last = (f"'{full}'" for full in proposed[:_MOST_NAMED])
            return f"; did you mean {', '.join(others)}{' or ' if others else ''}{last}?"
    return ""


def fields(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield every dotted field as (name, default, description), for the reference page.

    A section in place of a plain value is one field, written on one line, and so is a mapping of
    sections: its keys are the user's own names. So is a family that may be null, such as a second
    model: its fields are those of the first.
    """
    for name, info in section.every_field().items():
        inner = only_section_of(info.annotation)
        default = info.get_default(call_default_factory=True)
        if inner is None or default is None:
            yield prefix + name, default, info.description or ""
        if inner is not None and not (default is None and issubclass(inner, Family)):
            yield from fields(inner, f"{prefix}{name}.")
