"""What a pass allocated and freed is the system's again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common import out_of_memory
from common.out_of_memory import memory_for


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


@pytest.mark.skipif(out_of_memory._heap() is None, reason="the C library tells nothing of its heap")
def test_what_a_pass_freed_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_memory, "_MUCH", 2**20)
    out_of_memory.return_freed()  # what other tests left, which this would take first
    before = resident_bytes()
    with memory_for("a pass", "nothing"):
        holes = [torch.ones(2**17) for _ in range(800)]  # 0.5 MB each: below malloc's own mappings
        kept, grown = holes[-1].clone(), resident_bytes()
        del holes
    assert kept.numel() and grown - before > 300 * 2**20
    assert resident_bytes() - before < 100 * 2**20


def test_little_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed: list[int] = []
    monkeypatch.setattr(out_of_memory, "_heap", lambda: (lambda: 5, lambda: trimmed.append(1)))
    out_of_memory.return_freed()
    assert not trimmed
    monkeypatch.setattr(out_of_memory, "_MUCH", 4)
    out_of_memory.return_freed()
    assert trimmed == [1]


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_memory, "_heap", lambda: None)
    out_of_memory.return_freed()


_TENSOR_IN_NO_HEAP = """
import ctypes, torch
from common import out_of_memory
torch.ones(16 * 2**18)  # 16 MB: once freed, malloc takes smaller blocks from its heap
facts = ctypes.CDLL(None).mallinfo2
facts.restype = out_of_memory._HeapFacts
if {frugal}:
    out_of_memory.return_large_at_once()
before = facts().hblkhd
held = torch.ones(6 * 2**18)
print(facts().hblkhd - before)
"""


@pytest.mark.skipif(out_of_memory._heap() is None, reason="the C library tells nothing of its heap")
@pytest.mark.parametrize("frugal", [False, True])
def test_a_frugal_process_keeps_large_tensors_out_of_its_heap(frugal: bool) -> None:
    program = _TENSOR_IN_NO_HEAP.format(frugal=frugal)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert (int(done.stdout) >= 6 * 2**20) == frugal
