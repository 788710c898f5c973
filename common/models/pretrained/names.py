"""How checkpoints of a family name tensors, where `transformers` names them otherwise."""

from __future__ import annotations

HEAD = "lm_head."
"""Begins the name of an output head of its own."""

_RENAMED = {"gpt_neox": (("embed_out.", HEAD),)}
"""By family: beginnings of names in files, and what the module of `transformers` calls them."""


def module_name(family: str, stored: str) -> str:
    """Return the name in the module of `transformers` of a tensor in a file."""
    for theirs, ours in _RENAMED.get(family, ()):
        if stored.startswith(theirs):
            return ours + stored.removeprefix(theirs)
    return stored
