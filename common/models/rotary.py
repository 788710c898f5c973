"""Rotary positions (Su 2021, arXiv 2104.09864), with xpos decay (Sun 2022, arXiv 2212.10554)."""

from __future__ import annotations

import torch
from torch import Tensor

_ROPE_BASE = 10_000.0
_XPOS_BASE = 512.0


def rotary(positions: Tensor, head_dim: int, *, xpos: bool, centre: int) -> tuple[Tensor, ...]:
    """Tables of a rotation in half-split layout.

    Args:
        positions: int64 ``[...]``.
        head_dim: width K of a head.
        xpos: with a decay of the distance.
        centre: position of unit scale. It cancels between queries and keys, but both must use
            the same one, so that cached keys stay valid.

    Returns:
        ``(cos_q, sin_q, cos_k, sin_k)``, fp32 ``[..., K]``.
    """
    device = positions.device
    pair = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    angles = positions[..., None].float() * _ROPE_BASE ** (-pair / head_dim)
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = angles.cos(), angles.sin()
    if not xpos:
        return cos, sin, cos, sin
    decay = (pair + 0.4 * head_dim) / (1.4 * head_dim)
    scale = decay ** ((positions[..., None].float() - centre) / _XPOS_BASE)
    scale = torch.cat((scale, scale), dim=-1)
    return cos * scale, sin * scale, cos / scale, sin / scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + K/2) of the last axis."""
    left, right = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-right, left), dim=-1) * sin.to(x.dtype)
