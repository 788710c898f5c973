"""Random ragged batches for the property tests of the learner's mathematics.

Everything outside the mask is NaN: a function that reads padding, or that takes the mask's polarity
the wrong way round, cannot give the right number by luck.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

# The machine may be busy: time limits belong to pytest, not to single examples.
EXAMPLES = settings(deadline=None, max_examples=60)

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}
"""What a result may differ from the reference by, relatively and absolutely."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ragged:
    """The shape of a batch and a source of numbers for it."""

    mask_BR: Tensor
    """bool, a prefix of at least one True in each row."""
    generator: torch.Generator
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        """Response tokens in the batch."""
        return int(self.mask_BR.sum())

    def numbers(self, *more: int, scale: float = 1.0) -> Tensor:
        """Normal numbers ``[B, R, *more]``, NaN outside the mask."""
        shape = (*self.mask_BR.shape, *more)
        full = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        outside = ~self.mask_BR.reshape(*self.mask_BR.shape, *[1] * len(more))
        return full.masked_fill(outside, math.nan).to(self.dtype)

    def per_row(self) -> Tensor:
        """Normal numbers ``[B]``."""
        rows = torch.randn(len(self.mask_BR), generator=self.generator, dtype=torch.float64)
        return rows.to(self.dtype)


@st.composite
def raggeds(draw: st.DrawFn, dtype: torch.dtype | None = None, rows: int = 5) -> Ragged:
    """Up to `rows` rows of 1 to 7 tokens, with up to two columns of nothing but padding."""
    lengths = torch.tensor(draw(st.lists(st.integers(1, 7), min_size=1, max_size=rows)))
    columns = int(lengths.max()) + draw(st.integers(0, 2))
    return Ragged(
        mask_BR=torch.arange(columns)[None] < lengths[:, None],
        generator=torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1))),
        dtype=dtype or draw(st.sampled_from([torch.float64, torch.float32])),
    )


def widen(x: Tensor, columns: int) -> Tensor:
    """Columns of padding after column R of ``[B, R]`` or ``[B, R, V]``: False, or NaN."""
    after = (0, columns) if x.dim() == 2 else (0, 0, 0, columns)
    return F.pad(x, after, value=False if x.dtype == torch.bool else math.nan)


def same(found: Tensor, expected: object, dtype: torch.dtype) -> None:
    """`found` is of this dtype and holds these numbers, to this dtype's tolerance."""
    assert found.dtype == dtype
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.detach().double(), wanted, atol=tolerance, rtol=tolerance)
