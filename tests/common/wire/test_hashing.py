"""The native hash is the package's, for any length, split and place in memory."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from common.wire import hashing
from common.wire.hashing import Bytes, Hasher, NativeHasher, PackageHasher, hasher

BYTES = np.random.default_rng(0).integers(0, 256, 2**20 + 2**10, dtype=np.uint8)
ROOM = np.zeros(BYTES.nbytes + 128, dtype=np.uint8)
LENGTHS = st.one_of(
    st.integers(0, 5000),
    st.builds(lambda blocks, by: 1024 * blocks + by, st.integers(1, 40), st.integers(-2, 2)),
    st.integers(2**20 - 70, 2**20 + 70),
)


@st.composite
def splits(draw: st.DrawFn) -> list[int]:
    """Ascending bounds of up to seven parts, from 0 to the length; parts may be empty."""
    length = draw(LENGTHS)
    return [0, *sorted(draw(st.lists(st.integers(0, length), max_size=6))), length]


def native() -> NativeHasher:
    made = hasher()
    assert isinstance(made, NativeHasher), "needs gcc, as all tests do"
    return made


@given(splits(), st.integers(0, 70))
def test_any_split_has_the_digest_of_the_whole(bounds: list[int], shift: int) -> None:
    data = BYTES[shift : shift + bounds[-1]]
    ours = native()
    for begin, end in pairwise(bounds):
        ours.update([data[begin:end]])
        assert ours.hexdigest() == xxhash.xxh3_128_hexdigest(data[:end]), "more may follow"


@pytest.mark.parametrize("make", [native, PackageHasher])
@given(bounds=splits(), shifts=st.tuples(st.integers(0, 70), st.integers(0, 70)), data=st.data())
def test_what_is_copied_is_the_source_and_hashed(
    make: type[Hasher], bounds: list[int], shifts: tuple[int, int], data: st.DataObject
) -> None:
    source = BYTES[shifts[0] : shifts[0] + bounds[-1]]
    ROOM[:] = 0
    # Also at a multiple of 64, the only place from which stores go around the caches.
    aligned = -ROOM.ctypes.data % 64
    first = data.draw(st.sampled_from([aligned, shifts[1]]))
    target = ROOM[first : first + bounds[-1]]
    ours = make()
    for begin, end in pairwise(bounds):
        how, middle = data.draw(st.booleans()), data.draw(st.integers(begin, end))
        parts = [source[begin:middle], source[middle:end]]
        ours.copy(parts, target[begin:end], around_caches=how)
    assert ours.hexdigest() == xxhash.xxh3_128_hexdigest(source)
    assert np.array_equal(source, target)
    assert not ROOM[:first].any() and not ROOM[first + bounds[-1] :].any()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64")
@pytest.mark.parametrize("narrower", ["-mno-avx512f", "-mno-avx2"])
def test_narrower_processors_find_the_same(narrower: str, tmp_path: Path) -> None:
    built = tmp_path / "narrow.so"
    source = Path(hashing.__file__).with_name("xxh3.c")
    command = ["gcc", "-O3", "-march=native", narrower, "-shared", "-fPIC"]
    subprocess.run([*command, str(source), "-o", str(built)], check=True)
    ours = NativeHasher(hashing.typed(ctypes.CDLL(str(built))))
    target = np.zeros_like(BYTES)
    for begin, end in pairwise([0, 100, 5000, 2**18, BYTES.nbytes]):
        ours.copy([BYTES[begin:end]], target[begin:end], around_caches=end > 5000)
    assert ours.hexdigest() == xxhash.xxh3_128_hexdigest(BYTES)
    assert np.array_equal(BYTES, target)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CC", "no-such-compiler")
    hashing.library.cache_clear()
    yield
    hashing.library.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_package_hashes_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for length in (0, 240, 241, BYTES.nbytes):
        made, target = hasher(), np.zeros(length, dtype=np.uint8)
        assert isinstance(made, PackageHasher)
        made.update([b"first", b"second"])
        made.copy([BYTES[: length // 3], BYTES[length // 3 : length]], target)
        whole = b"firstsecond" + BYTES[:length].tobytes()
        assert made.hexdigest() == xxhash.xxh3_128_hexdigest(whole)
        assert np.array_equal(target, BYTES[:length])
    assert caplog.text.count("hashed more slowly") == 1


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "talipot").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    hashing.library.cache_clear()
    assert isinstance(hasher(), PackageHasher)
    hashing.library.cache_clear()
    assert "cannot be kept in" in caplog.text


@pytest.mark.parametrize("make", [native, PackageHasher])
def test_memory_that_is_not_ours_to_write_is_refused(make: type[Hasher]) -> None:
    frozen = np.zeros(8, dtype=np.uint8)
    frozen.flags.writeable = False
    targets: list[Bytes] = [np.zeros(7, np.uint8), np.zeros(16, np.uint8)[::2], frozen]
    for target in targets:
        with pytest.raises(ValueError, match=r"do not fit|not contiguous, or not writable"):
            make().copy([BYTES[:4], BYTES[4:8]], target)
    with pytest.raises(ValueError, match="not contiguous"):
        make().copy([BYTES[:16:2]], np.zeros(8, np.uint8))
    with pytest.raises((ValueError, BufferError), match="contiguous"):
        make().update([BYTES[:16:2]])
