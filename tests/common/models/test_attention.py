"""Attention of flat tokens against one dense mask over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from common.models.attention import PLAIN, Family, Mixing, family_attention

HEADS, GROUPS, WIDTH = 4, 2, 8
MIXINGS = [PLAIN, Mixing(window=3), Mixing(softcap=2.0, scale=0.5, window=20)]
sequences = st.builds(Family, st.integers(1, 90))
families = st.builds(
    Family, st.integers(1, 40), st.lists(st.integers(1, 30), min_size=1, max_size=4).map(tuple)
)


def drawn(tokens: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(tokens, heads, WIDTH, generator=generator) for heads in (HEADS, GROUPS, GROUPS)
    ]


def dense(members: Sequence[Family], q: Tensor, k: Tensor, v: Tensor, mixing: Mixing) -> Tensor:
    """Every pair of tokens, of which a mask leaves those that may see each other."""
    family, response, place = [], [], []
    for number, member in enumerate(members):
        for index, length in enumerate((member.prompt, *member.responses), -1):
            begin = member.prompt if index >= 0 else 0
            family += [number] * length
            response += [index] * length
            place += range(begin, begin + length)
    family_N, response_N, place_N = (torch.tensor(x) for x in (family, response, place))
    sees = family_N[:, None] == family_N
    sees &= (response_N == -1) | (response_N[:, None] == response_N)
    sees &= place_N[:, None] >= place_N
    if mixing.window is not None:
        sees &= place_N[:, None] - place_N < mixing.window
    k, v = (t.repeat_interleave(HEADS // GROUPS, dim=1) for t in (k, v))
    scale = WIDTH**-0.5 if mixing.scale is None else mixing.scale
    scores = torch.einsum("qhk,lhk->hql", q, k) * scale
    if mixing.softcap is not None:
        scores = mixing.softcap * torch.tanh(scores / mixing.softcap)
    weights = scores.masked_fill(~sees, float("-inf")).softmax(-1)
    return torch.einsum("hql,lhk->qhk", weights, v)


@pytest.mark.parametrize("mixing", MIXINGS, ids=["plain", "window", "softcap"])
@given(members=st.lists(sequences | families, min_size=1, max_size=6))
def test_flat_tokens_attend_as_one_dense_mask_says(mixing: Mixing, members: list[Family]) -> None:
    tokens = sum(member.prompt + sum(member.responses) for member in members)
    found, expected = drawn(tokens), [t.double() for t in drawn(tokens)]
    for tensor in (*found, *expected):
        tensor.requires_grad_()
    ours = family_attention(members)(0, *found, mixing)
    theirs = dense(members, *expected, mixing)
    torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)
    weighted = torch.linspace(-1, 1, WIDTH)
    (ours * weighted).sum().backward()
    (theirs * weighted).sum().backward()
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, check_dtype=False, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 16, 17, 63, 64, 65, 90])
def test_what_a_sequence_becomes_does_not_depend_on_the_others(length: int) -> None:
    q, k, v = drawn(200)
    alone = family_attention([Family(length)])(0, q[:length], k[:length], v[:length])
    for before, after in ((0, 5), (3, 64), (70, 17)):
        members = [Family(n) for n in (before, length, after) if n]
        places = torch.cat([torch.arange(100, 100 + before), torch.arange(length)])
        places = torch.cat([places, torch.arange(90, 90 + after)])
        among = family_attention(members)(0, *(t[places] for t in (q, k, v)))
        assert torch.equal(among[before : before + length], alone)
