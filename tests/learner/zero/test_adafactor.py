"""PaLM's Adafactor and the schedules against literal literal."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.algorithms.schedule import linear_to_zero, warmup_cosine
from learner.zero.adafactor import PalmAdafactor


def literal(start: list[float], gradients: list[list[float]], lr: float) -> list[float]:
    """Number by number, as methods state it."""
    x, m, v = list(start), [0.0] * len(start), [0.0] * len(start)
    for k, gradient in enumerate(gradients, 1):
        beta2 = 1.0 - k**-0.8
        scale = max(1e-3, math.sqrt(sum(value * value for value in x) / len(x)))
        for i, g in enumerate(gradient):
            v[i] = beta2 * v[i] + (1 - beta2) * g * g
            m[i] = 0.9 * m[i] + 0.1 * g / math.sqrt(v[i])
            x[i] = x[i] * (1 - lr * lr) - lr * scale * m[i]
    return x


@given(
    st.lists(st.floats(-2, 2), min_size=3, max_size=3),
    st.lists(
        st.lists(st.floats(-3, 3).filter(lambda g: abs(g) > 1e-3), min_size=3, max_size=3),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([0.3, 0.01]),
)
def test_steps_are_the_paper_s(start: list[float], gradients: list[list[float]], lr: float) -> None:
    parameter = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = PalmAdafactor([parameter], lr=lr, sharded=False)
    for gradient in gradients:
        # The scale is computed in float32.
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    assert parameter.tolist() == pytest.approx(literal(start, gradients, lr), abs=1e-6)


def test_parameters_at_zero_still_move() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = PalmAdafactor([parameter], lr=0.1, sharded=False)
    parameter.grad = torch.ones(4)
    optimizer.step()
    assert bool((parameter < 0).all())


def test_padding_of_a_shard_is_not_read() -> None:
    """ZeRO 3 pads a parameter of three to pieces of two or four, and leaves the rest as it was."""
    piece = torch.nn.Parameter(torch.tensor([3.0, -3.0, 3.0, math.nan]))
    optimizer = PalmAdafactor([piece], lr=0.1, sharded=True)
    optimizer.param_groups[0]["numel"] = 3
    piece.grad = torch.ones(4)
    optimizer.step()
    assert piece[:3].tolist() == pytest.approx(literal([3.0, -3.0, 3.0], [[1.0] * 3], 0.1))


def test_warmup_then_cosine_to_a_tenth() -> None:
    factors = [warmup_cosine(step, 100, warmup=0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == pytest.approx(1.0)
    assert factors[55] == pytest.approx(0.55)
    assert all(a >= b for a, b in itertools.pairwise(factors[9:]))
    assert warmup_cosine(100, 100, warmup=0.1) == pytest.approx(0.1)


def test_rates_anneal_to_zero() -> None:
    assert [linear_to_zero(step, 4) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
