"""One check for the tensors of a formula: a wrong shape would broadcast without a word."""

from __future__ import annotations

from torch import Tensor


def require_shape(rank: int, *tensors: Tensor) -> None:
    """Check that all tensors have one shape, of this rank.

    Raises:
        ValueError: they have not.
    """
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(set(shapes)) != 1 or len(shapes[0]) != rank:
        raise ValueError(f"shapes {shapes} should be one shape of rank {rank}")
