"""Our attention inside a module of `transformers`, through the library's attention interface.

The module calls a function with its queries, keys and values; which `Attention` that function mixes
them with is set around the call (`attending`), because the module has no argument for it.

Shape suffixes: N flat tokens, H query heads, G key and value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from common.models.attention import Attention, Mixing

NAME = "talipot"
"""Of our attention in the library's registry. It has no mask there, so that none is made."""

_running: ContextVar[Attention] = ContextVar("attention")


@contextmanager
def attending(attention: Attention) -> Iterator[None]:
    """Mix values inside the block with this, given queries ``[N, H, K]``."""
    token = _running.set(attention)
    try:
        yield
    finally:
        _running.reset(token)


def attention_now() -> Attention:
    """Return what values are mixed with here."""
    return _running.get()


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Mix values as the library calls it: queries ``[1, H, N, K]`` to ``[1, N, H, K]``."""
    assert attention_mask is None, "what attends to what is the attention's own"
    layer = module.layer_idx
    assert isinstance(layer, int)
    mixing = Mixing(scale=scaling, window=sliding_window, softcap=softcap)
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    return attention_now()(layer, q, k, v, mixing).unsqueeze(0), None


AttentionInterface.register(NAME, attend)
