"""Llama and its relatives through the native kernels: of any shape, and the same however they run.

That their log-probabilities are the library's is `test_pretrained_engine`'s; there as here `auto`
takes these kernels.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.generation.cached_decoder import CachedDecoder
from actors.generation.engine import GenerationEngine
from actors.generation.forward import Chunk
from actors.generation.native_forward import NativeForward
from common.config.model import LoraConfig
from common.errors import ConfigError
from common.logprobs import Sampling
from common.models.adapters import add_adapter
from common.models.lora import OFF, Adapted
from common.models.pretrained.decoder import PretrainedDecoder
from common.native import library
from common.native.coverage import describe, why_not
from common.native.llama_blocks import LLAMAS
from tests.actors.generation.test_cached_decoder import two_steps
from tests.actors.generation.test_pretrained_engine import requests
from tests.common.models.pretrained.tiny import VARIANTS, VOCABULARY, loaded, reference

NATIVE = [name for name, of in VARIANTS.items() if of["model_type"] in LLAMAS]
BIASED = "llama-tied"
"""Of these the only one that the kernels do not run: its output projection has a bias."""
RUN = [name for name in NATIVE if name != BIASED]
Made = Callable[..., PretrainedDecoder]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    def make(name: str, dtype: torch.dtype = torch.float32, **changed: Any) -> PretrainedDecoder:
        model = reference(name, **changed)
        return loaded(model, tmp_path).eval().requires_grad_(False).to(dtype)

    return make


def texts(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def shared_prefixes() -> torch.Tensor:
    tokens = texts(40, 30)
    tokens[1::2, :8] = tokens[::2, :8]
    return tokens


def apart(found: torch.Tensor, decoder: PretrainedDecoder, tokens: torch.Tensor) -> float:
    """Of the forward of training, in standard deviations of the logits."""
    expected = decoder(tokens)[:, -2:].float()
    return float((found.float() - expected).abs().max() / expected.std())


@pytest.mark.parametrize("name", RUN)
def test_every_variant_runs_and_its_description_says_what_it_is(name: str, made: Made) -> None:
    decoder = made(name)
    assert why_not(decoder) == ""
    of, special = describe(decoder), VARIANTS[name]
    assert any(of.windows) == ("sliding_window" in special)
    first = next(of.blocks(decoder, OFF))
    assert (first.bias is not None) == (special["model_type"] == "qwen2")
    assert (first.norm_q_K is not None) == (special["model_type"] == "qwen3")
    tokens = shared_prefixes()
    assert apart(two_steps(decoder, tokens), decoder, tokens) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dim", "ff"),
    [
        (9, 3, 64, 72, 96),  # SmolLM2's heads
        (7, 1, 64, 33, 50),  # Qwen2.5's groups, and odd widths
        (10, 2, 16, 40, 81),
        (8, 8, 12, 64, 40),
        (6, 1, 128, 30, 64),
    ],
)
def test_any_shape_and_any_number_of_threads(
    heads: int, kv_heads: int, head_dim: int, dim: int, ff: int, dtype: torch.dtype, made: Made
) -> None:
    decoder = made(
        "qwen3",
        dtype,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=dim,
        intermediate_size=ff,
    )
    tokens = shared_prefixes()
    threads, seen = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            seen.append(two_steps(decoder, tokens))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    assert apart(seen[0], decoder, tokens) < (1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama3-rotary", "mistral", "qwen2", "qwen3", "smollm3"])
def test_what_is_sampled_depends_on_neither_slots_nor_chunks(
    name: str, dtype: torch.dtype, made: Made
) -> None:
    decoder, asked = made(name, dtype), requests(12, 3)
    seen = []
    for slots, prefill in ((12, 512), (5, 16), (2, 3)):
        engine = GenerationEngine(
            decoder,
            eos_ids=(2,),
            sampling=Sampling(temperature=0.9, top_p=0.95),
            max_tokens=25,
            slots=slots,
            prefill_tokens=prefill,
        )
        assert isinstance(engine.cached.implementation, NativeForward)
        seen.append([(r.response_ids, r.logprobs) for r in engine.generate(asked)])
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64")
@pytest.mark.parametrize(
    ("narrower", "dtype"),
    [
        ("-mno-avx512bf16", torch.bfloat16),
        ("-mno-avx512f", torch.float32),
        ("-mno-avx", torch.float32),
    ],
)
@pytest.mark.parametrize("name", ["mistral", "qwen3"])
def test_narrower_processors_compute_the_same(
    name: str, narrower: str, dtype: torch.dtype, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_FLAGS", [*library._FLAGS, narrower])
    decoder, tokens = made(name, dtype), shared_prefixes()
    found = two_steps(decoder, tokens)
    assert apart(found, decoder, tokens) < (1e-4 if dtype == torch.float32 else 0.1)


def test_an_adapter_is_merged(made: Made) -> None:
    decoder, tokens = made("llama"), shared_prefixes()
    before = two_steps(decoder, tokens)
    add_adapter(decoder, "own", LoraConfig(rank=4), seed=0)
    with torch.no_grad():
        for part in decoder.modules():
            if isinstance(part, Adapted):
                for name in part.names("own"):
                    getattr(part, name).normal_(std=0.1)
    cached = CachedDecoder(decoder, slots=1, kernels="native", merged="own")
    row = tokens[0].tolist()
    found = cached.forward([row[-1]], [29], [Chunk(slot=0, start=0, tokens=row[:-1])])[0]
    with torch.no_grad():
        expected = decoder.logits(decoder.hidden(tokens[:1], adapter="own"))[0, -1]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert float((found - before[0, 1]).abs().max()) > 0.01


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (BIASED, "projections other than queries, keys and values have biases"),
        ("gemma2", "'gemma2' has another block than llama, mistral, qwen2"),
        ("falcon", "'falcon' has another block"),
    ],
)
def test_what_is_lacking_is_said(name: str, says: str, made: Made) -> None:
    decoder = made(name)
    assert says in why_not(decoder)
    with pytest.raises(ConfigError, match=f"native kernels do not run this model: .*{says[:20]}"):
        CachedDecoder(decoder, slots=1, kernels="native")
    assert not isinstance(CachedDecoder(decoder, slots=1).implementation, NativeForward)


def test_another_activation_is_lacking(made: Made) -> None:
    assert why_not(made("llama", hidden_act="gelu")) == "its activation is gelu, not silu"
