from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.generation.cached_decoder import CachedDecoder, slots_within
from actors.generation.forward import Chunk, Copy
from common.config.model import PalmConfig
from common.errors import ClusterError, ConfigError
from common.logprobs import Sampling, draw, sampling_logits
from common.models.decoder import Decoder
from common.models.palm import PaLM
from common.native import library
from common.native.coverage import Kernels

SHAPE = PalmConfig(vocab_size=61, dim=32, layers=3, heads=4, head_dim=16, context=40)
BOTH: list[Kernels] = ["native", "torch"]


def model(xpos: bool = False, dtype: torch.dtype = torch.float32) -> PaLM:
    palm = PaLM(SHAPE.model_copy(update={"xpos": xpos}))
    palm.initialise(3)
    return palm.eval().requires_grad_(False).to(dtype)


def texts(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("choice", BOTH)
@pytest.mark.parametrize("xpos", [False, True])
def test_decoding_with_a_cache_equals_the_full_forward(choice: Kernels, xpos: bool) -> None:
    """Prompts of mixed lengths, one prefilled in two chunks beside decodes."""
    palm = model(xpos)
    decoder = CachedDecoder(palm, slots=3, kernels=choice)
    tokens = texts(3, 20)
    full = palm(tokens)
    rows = tokens.tolist()
    found = decoder.forward(
        [rows[0][4], rows[1][0], rows[2][3]],
        [4, 0, 3],
        [
            Chunk(slot=0, start=0, tokens=rows[0][:4]),
            Chunk(slot=2, start=0, tokens=rows[2][:3]),
        ],
    )
    for row, at in enumerate((4, 0, 3)):
        torch.testing.assert_close(found[row], full[row, at], atol=1e-5, rtol=0)
    found = decoder.forward(
        [rows[0][5], rows[1][1], rows[2][9]],
        [5, 1, 9],
        [Chunk(slot=2, start=4, tokens=rows[2][4:9])],
    )
    for row, at in enumerate((5, 1, 9)):
        torch.testing.assert_close(found[row], full[row, at], atol=1e-5, rtol=0)
    for step in range(8):
        at = [6 + step, 2 + step, 10 + step]
        found = decoder.forward([rows[i][at[i]] for i in range(3)], at)
        torch.testing.assert_close(found, full[torch.arange(3), at], atol=1e-5, rtol=0)


@pytest.mark.parametrize("choice", BOTH)
def test_a_shared_prefix_is_copied_within_the_step_that_computes_it(choice: Kernels) -> None:
    palm = model()
    decoder = CachedDecoder(palm, slots=3, kernels=choice)
    rows = texts(3, 12).tolist()
    rows[1][:8], rows[2][:10] = rows[0][:8], rows[1][:10]
    rows[2][:8] = rows[0][:8]
    found = decoder.forward(
        [row[11] for row in rows],
        [11] * 3,
        [
            Chunk(slot=0, start=0, tokens=rows[0][:11]),
            Chunk(slot=1, start=8, tokens=rows[1][8:11]),
            Chunk(slot=2, start=8, tokens=rows[2][8:11]),
        ],
        [Copy(source=0, targets=[1, 2], positions=8)],
    )
    torch.testing.assert_close(found, palm(torch.tensor(rows))[:, -1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("choice", BOTH)
@pytest.mark.parametrize("shared", [20, 32])
def test_a_position_is_shared_in_the_step_that_computes_it_alone(
    choice: Kernels, shared: int
) -> None:
    """No step has fewer rows: the end of one prompt, and one token more of another."""
    palm, row = model(), texts(1, shared + 1)[0].tolist()
    decoder = CachedDecoder(palm, slots=2, kernels=choice)
    before = Chunk(slot=0, start=0, tokens=row[: shared - 2])
    decoder.forward([row[shared - 2]], [shared - 2], [before])
    copies = [Copy(source=0, targets=[1], positions=shared)]
    found = decoder.forward(row[-2:], [shared - 1, shared], [], copies)
    torch.testing.assert_close(found, palm(torch.tensor([row]))[0, -2:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("choice", BOTH)
def test_a_slot_takes_over_another_ones_past(choice: Kernels) -> None:
    palm = model()
    decoder = CachedDecoder(palm, slots=2, kernels=choice)
    rows = texts(2, 6).tolist()
    chunks = [Chunk(slot=i, start=0, tokens=row[:3]) for i, row in enumerate(rows)]
    decoder.forward([row[3] for row in rows], [3, 3], chunks)
    decoder.implementation.move(1, 0, 4)
    found = decoder.forward([rows[1][4]], [4])
    torch.testing.assert_close(found, palm(torch.tensor(rows))[1:, 4], atol=1e-5, rtol=0)


@pytest.mark.parametrize("choice", BOTH)
def test_bf16_is_near_the_full_forward_in_bf16(choice: Kernels) -> None:
    """Stated bound: 0.1 in logits of unit variance; both sides round at other places."""
    palm = model(dtype=torch.bfloat16)
    decoder = CachedDecoder(palm, slots=4, kernels=choice)
    rows = texts(4, 16)
    chunks = [Chunk(slot=i, start=0, tokens=row[:15]) for i, row in enumerate(rows.tolist())]
    found = decoder.forward(rows[:, 15].tolist(), [15] * 4, chunks)
    assert float((found.float() - palm(rows)[:, -1]).abs().max()) < 0.1


@pytest.mark.parametrize(
    ("heads", "head_dim", "dim", "dtype"),
    [
        (4, 64, 64, torch.bfloat16),
        (3, 12, 30, torch.float32),
        (2, 16, 33, torch.bfloat16),
        (5, 128, 48, torch.bfloat16),
    ],
)
def test_any_shape_and_any_number_of_threads(
    heads: int, head_dim: int, dim: int, dtype: torch.dtype
) -> None:
    """Threads share rows and panels out in another way, and every row stays the same."""
    changed = {"heads": heads, "head_dim": head_dim, "dim": dim}
    palm = PaLM(SHAPE.model_copy(update=changed))
    palm.initialise(3)
    palm.eval().requires_grad_(False).to(dtype)
    tokens = shared_prefixes()
    threads, seen = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            seen.append(two_steps(palm, tokens))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    assert_near(seen[0], palm(tokens)[:, -2:].float(), dtype)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64")
@pytest.mark.parametrize(
    ("narrower", "dtype"),
    [
        ("-mno-avx512bf16", torch.bfloat16),
        ("-mno-avx512f", torch.float32),
        ("-mno-avx", torch.float32),
    ],
)
def test_narrower_processors_compute_the_same(
    narrower: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_FLAGS", [*library._FLAGS, narrower])
    palm, tokens = model(dtype=dtype), shared_prefixes()
    assert_near(two_steps(palm, tokens), palm(tokens)[:, -2:].float(), dtype)


def shared_prefixes() -> torch.Tensor:
    """Texts of 12 tokens, of which every other begins like the one before it."""
    tokens = texts(100, 12)
    tokens[1::2, :8] = tokens[::2, :8]
    return tokens


def two_steps(model: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """Logits ``[B, 2, V]`` after the last two tokens: prompts with copies, then a plain decode."""
    slots, length = len(tokens), tokens.shape[1]
    rows = tokens.tolist()
    starts = [8 * (slot % 2) for slot in range(slots)]
    chunks = [
        Chunk(slot=slot, start=start, tokens=rows[slot][start : length - 2])
        for slot, start in enumerate(starts)
    ]
    copies = [Copy(source=s - 1, targets=[s], positions=8) for s in range(1, slots, 2)]
    decoder = CachedDecoder(model, slots=slots, kernels="native")
    newest = [row[-2] for row in rows]
    first = decoder.forward(newest, [length - 2] * slots, chunks, copies).clone()
    second = decoder.forward([row[-1] for row in rows], [length - 1] * slots)
    return torch.stack((first, second), dim=1)


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    bound = 1e-5 if dtype == torch.float32 else 0.1
    assert float((found - expected).abs().max()) < bound


def test_new_weights_count_after_a_refresh() -> None:
    palm = model()
    decoder = CachedDecoder(palm, slots=1)
    before = decoder.forward([5], [0]).clone()
    for parameter in palm.parameters():
        parameter.mul_(0.5)
    decoder.refresh()
    after = decoder.forward([5], [0])
    torch.testing.assert_close(after, palm(torch.tensor([[5]]))[:, 0], atol=1e-5, rtol=0)
    assert float((after - before).abs().max()) > 0.01


@pytest.mark.parametrize("vocabulary", [1, 61, 64, 2048])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_the_native_draw_is_the_draw(vocabulary: int, temperature: float) -> None:
    native = CachedDecoder(model(), slots=1, kernels="native")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, vocabulary, generator=generator) * 3
    u = torch.rand(500, dtype=torch.float64, generator=generator)
    places = np.zeros(500, dtype=np.int64)
    drawn = native.draw(logits, Sampling(temperature=temperature), places, u.numpy())
    tokens, logprobs, whole = map(torch.from_numpy, drawn)
    assert torch.equal(whole, logprobs), "nothing is filtered"
    expected, theirs = draw(logits / temperature, u)
    same = tokens == expected
    assert float(same.float().mean()) > 0.995, "only rounding at a border may tell them apart"
    torch.testing.assert_close(logprobs[same], theirs[same], atol=2e-5, rtol=0)


FILTERS = [
    Sampling(top_k=1),
    Sampling(top_k=7, temperature=0.7),
    Sampling(top_k=5000),
    Sampling(top_p=0.5),
    Sampling(top_p=0.999, temperature=2.0),
    Sampling(top_p=1e-6),
    Sampling(min_p=0.05),
    Sampling(top_k=40, top_p=0.9, min_p=0.02, temperature=0.8),
    Sampling(temperature=0.0),
    Sampling(top_p=0.9, min_tokens=2, endings=(0, 3)),
    Sampling(temperature=0.0, min_tokens=2, endings=(0, 3)),
    Sampling(min_tokens=2, endings=(0, 3)),
]


@pytest.mark.parametrize("sampling", FILTERS, ids=str)
@pytest.mark.parametrize("vocabulary", [5, 61, 2048, 20_000])
@pytest.mark.parametrize("flat", [False, True], ids=["spread", "ties"])
def test_the_native_draw_filters_as_pytorch_does(
    sampling: Sampling, vocabulary: int, flat: bool
) -> None:
    """With ties, of which the lower tokens are kept; spread out, scores are far below the best.

    Sums of probabilities round elsewhere, so that of many tied tokens one more or less is kept.
    """
    native, plain = (CachedDecoder(model(), slots=1, kernels=kernels) for kernels in BOTH)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, vocabulary, generator=generator) * 12
    if flat:
        logits = (logits / 12).round()
    u = torch.rand(200, dtype=torch.float64, generator=generator).numpy()
    places = np.arange(200) % 4
    tokens, logprobs, whole = native.draw(logits, sampling, places, u)
    expected, theirs, all_of_it = plain.draw(logits, sampling, places, u)
    same = tokens == expected
    assert same.mean() > (0.9 if flat else 0.98), "only rounding at a border may tell them apart"
    assert np.abs(logprobs[same] - theirs[same]).max() < (2e-3 if flat else 2e-4)
    assert np.abs(whole[same] - all_of_it[same]).max() < 2e-4
    assert np.isfinite(logprobs).all()
    kept = sampling_logits(
        torch.from_numpy(logits.numpy()), sampling, positions=torch.from_numpy(places)
    )
    inside = kept.gather(1, torch.from_numpy(tokens)[:, None]).isfinite()
    assert float(inside.float().mean()) > 0.98, "and else no token that is filtered is drawn"


def test_a_uniform_at_the_very_end_draws_what_is_kept() -> None:
    native = CachedDecoder(model(), slots=1, kernels="native")
    logits = torch.randn(300, 200, generator=torch.Generator().manual_seed(2))
    last, places = np.full(300, np.nextafter(1.0, 0.0)), np.zeros(300, dtype=np.int64)
    tokens, logprobs, _ = native.draw(logits, Sampling(top_k=3), places, last)
    assert all(int(t) in row.topk(3).indices for t, row in zip(tokens, logits, strict=True))
    assert np.exp(logprobs).max() <= 1.0001


def test_the_cache_is_planned_from_its_budget() -> None:
    each = 2 * 3 * 40 * 16 * 4
    assert slots_within(model().sizes, 10 * each / 2**20, torch.float32) == 10
    assert slots_within(model().sizes, 10 * each / 2**20, torch.bfloat16) == 20
    with pytest.raises(ConfigError, match=r"cache_mb=0.01 holds no sequence.*at least 0.0146"):
        slots_within(model().sizes, 0.01, torch.float32)


def test_without_a_compiler_native_is_an_error_and_auto_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(ClusterError, match=r"install gcc, or set kernels to torch"):
        CachedDecoder(model(), slots=1, kernels="native")
    CachedDecoder(model(), slots=1, kernels="auto")
    assert "generation is slower" in caplog.text


def test_a_compiler_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho no room >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ClusterError, match=r"broken-cc cannot compile.*no room"):
        library.compiled(model().sizes, 16, torch.float32)
    assert not list((tmp_path / "talipot").iterdir()), "nothing half made is left"


def test_kernels_are_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = library.compiled(model().sizes, 16, torch.float32)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("compiled a second time")

    monkeypatch.setattr(subprocess, "run", refuse)
    assert library.compiled(model().sizes, 16, torch.float32) == first
