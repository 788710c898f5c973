"""A state in files of any number of ranks, read in any parts."""

from __future__ import annotations

import json
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.errors import CheckpointError
from common.models.tensor_files import save_tensors
from learner.zero.state_parts import MASTER, SHAPES, StateParts, masters

WHOLE = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.arange(100.0, 105.0)}


def write(folder: Path, cuts: dict[str, list[int]], leave_out: int = -1) -> None:
    """Each part of every tensor in the file of another rank."""
    files: dict[int, dict[str, Tensor]] = {}
    for name, tensor in WHOLE.items():
        ends = [0, *sorted(set(cuts[name])), tensor.numel()]
        for rank, (begin, end) in enumerate(pairwise(ends)):
            if begin < end and rank != leave_out:
                part = tensor.flatten()[begin:end].clone()
                files.setdefault(rank, {})[f"{name}|{MASTER}@{begin}"] = part
    shapes = json.dumps({name: list(tensor.shape) for name, tensor in WHOLE.items()})
    for rank, tensors in files.items():
        save_tensors(tensors, folder / f"rank-{rank:05d}.safetensors", {SHAPES: shapes})


CUTS = st.fixed_dictionaries(
    {n: st.lists(st.integers(1, t.numel() - 1), max_size=3) for n, t in WHOLE.items()}
)


@given(cuts=CUTS, bounds=st.tuples(st.integers(0, 12), st.integers(0, 12)))
@settings(deadline=None, max_examples=60)
def test_any_part_is_read_of_whoever_wrote_it(
    cuts: dict[str, list[int]], bounds: tuple[int, int]
) -> None:
    begin, end = sorted(bounds)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), cuts)
        parts = StateParts(Path(folder))
        assert torch.equal(
            parts.read("a.weight", MASTER, begin, end), WHOLE["a.weight"].flatten()[begin:end]
        )
        found = dict(masters(Path(folder)))
        assert found.keys() == WHOLE.keys()
        for name, tensor in WHOLE.items():
            assert torch.equal(found[name], tensor)


def test_a_part_that_nobody_wrote_is_missed(tmp_path: Path) -> None:
    write(tmp_path, {"a.weight": [4, 8], "b": []}, leave_out=1)
    parts = StateParts(tmp_path)
    assert torch.equal(parts.read("a.weight", MASTER, 0, 4), torch.arange(4.0))
    for begin, end in ((0, 12), (3, 5), (7, 9), (4, 8)):
        with pytest.raises(CheckpointError, match=r"no master of parameter 'a\.weight'"):
            parts.read("a.weight", MASTER, begin, end)
    with pytest.raises(CheckpointError, match="no exp_avg of parameter 'b'"):
        parts.read("b", "exp_avg", 0, 1)


def test_files_of_earlier_versions_have_whole_tensors(tmp_path: Path) -> None:
    for rank, (name, tensor) in enumerate(WHOLE.items()):
        tensors = {f"{name}|{MASTER}": tensor, f"{name}|step": torch.tensor([7.0])}
        save_tensors(tensors, tmp_path / f"rank-{rank:05d}.safetensors")
    parts = StateParts(tmp_path)
    assert parts.shape("a.weight") == (3, 4)
    assert parts.read("a.weight", MASTER, 5, 8).tolist() == [5.0, 6.0, 7.0]
    assert float(parts.read("b", "step", 0, 1)) == 7.0
    found = dict(masters(tmp_path))
    assert all(torch.equal(found[name], tensor) for name, tensor in WHOLE.items())


def test_what_is_torn_or_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights of training in it"):
        StateParts(tmp_path)
    write(tmp_path, {"a.weight": [], "b": []})
    path = tmp_path / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="torn"):
        StateParts(tmp_path)
