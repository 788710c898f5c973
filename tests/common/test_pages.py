"""Memory that is given back is the system's, and what is beside it stays."""

from __future__ import annotations

import mmap

import pytest
import torch

from common.pages import Pages


def test_a_part_is_given_back_and_what_is_beside_it_stays() -> None:
    numbers = 3 * mmap.PAGESIZE
    pages = Pages((4, numbers), torch.int32)
    pages.tensor.fill_(7)
    part = pages.tensor[1, 5 : numbers - 5]
    pages.give_back(part)
    rest = torch.ones(4, numbers, dtype=torch.bool)
    rest[1, 5 : numbers - 5] = False
    assert bool((pages.tensor[rest] == 7).all())
    assert int((part == 0).sum()) >= len(part) - 2 * mmap.PAGESIZE // 4, "whole pages are gone"
    pages.prepare()
    part.fill_(9)
    assert bool((part == 9).all())


def test_what_lies_in_it_is_known() -> None:
    pages = Pages((10,), torch.float32)
    assert pages.tensor[9:] in pages and pages.tensor in pages
    assert torch.zeros(3) not in pages


def test_memory_that_is_not_there_is_an_error_of_memory() -> None:
    with pytest.raises(MemoryError, match="bytes"):
        Pages((2**60,), torch.int8)
