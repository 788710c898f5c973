"""Frozen passes by the native kernels, against the same networks in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.batching import SequenceBatch, sequence_batch
from common.config.model import LoraConfig, PalmConfig
from common.errors import ClusterError, ConfigError
from common.logprobs import Sampling, chosen_reader
from common.models.adapters import adapter_tensors, add_adapter
from common.models.decoder import Decoder
from common.models.networks import DecoderNetwork, PolicyNetwork, ScalarNetwork, compute_in
from common.models.palm import PaLM
from common.native.frozen import NativeDecoder, run_natively
from tests.common.models.pretrained.tiny import loaded, reference

NAMES = ["palm", "llama3-rotary", "mistral", "qwen2", "qwen3", "smollm3"]
SAMPLING = Sampling(temperature=0.7)
Network = PolicyNetwork | ScalarNetwork


@pytest.fixture(params=NAMES)
def decoder(request: pytest.FixtureRequest, tmp_path: Path) -> Decoder:
    return made(request.param, tmp_path)


def made(name: str, folder: Path) -> Decoder:
    if name != "palm":
        return loaded(reference(name), folder)
    palm = PaLM(PalmConfig(vocab_size=61, dim=33, layers=3, heads=4, head_dim=16, context=64))
    palm.initialise(3)
    return palm


def frozen(network: Network, dtype: torch.dtype = torch.float32) -> Network:
    network.initialise(5)
    network.eval().requires_grad_(False)
    if dtype == torch.bfloat16:
        compute_in(network, dtype)
    return network


def batch(rows: int = 7) -> SequenceBatch:
    """Prompts of which some are the same, of lengths that end in a block, at its end and behind."""
    drawn = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 60, (n,), generator=drawn).tolist() for n in (31, 32, 33, 1)]
    asked = [prompts[i % 4] for i in (0, 0, 1, 1, 2, 3, 2)][:rows]
    lengths = (1, 9, 12, 3, 20, 2, 5)
    responses = [torch.randint(3, 60, (n,), generator=drawn).tolist() for n in lengths][:rows]
    return sequence_batch(asked, responses)


def logprobs(network: PolicyNetwork, of: SequenceBatch, **more: Any) -> tuple[Tensor, Tensor]:
    """Of the response tokens, and what the value head reads there."""
    columns, values_BR = network(
        of.tokens_BT,
        lengths_B=of.lengths_B,
        prompts_B=of.prompts_B,
        predict_BR=of.predict_BR,
        read=chosen_reader(of.response_BR, SAMPLING),
        **more,
    )
    mask = of.response_mask_BR
    return columns[..., 0][mask], values_BR[mask]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_policy_has_the_same_logprobs(decoder: Decoder, dtype: torch.dtype) -> None:
    """Stated bounds: 1e-4 in fp32, and in bf16 0.1 for both round at other places."""
    network, of = frozen(PolicyNetwork(decoder), dtype), batch()
    assert isinstance(network, PolicyNetwork)
    expected = logprobs(network, of)
    run_natively(network, "native")
    assert isinstance(network.decoder, NativeDecoder)
    bound = 1e-4 if dtype == torch.float32 else 0.1
    for found, known in zip(logprobs(network, of), expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, known, atol=bound, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reward_model_has_the_same_scores(decoder: Decoder, dtype: torch.dtype) -> None:
    network, of = frozen(ScalarNetwork(decoder), dtype), batch()
    at = (torch.arange(len(of.last_B)), of.last_B)
    arguments = {"lengths_B": of.lengths_B, "prompts_B": of.prompts_B}
    expected = network(of.tokens_BT, **arguments)[at]
    run_natively(network, "native")
    found = network(of.tokens_BT, **arguments)[at]
    bound = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found, expected, atol=bound, rtol=0)


def test_a_row_is_the_same_alone_beside_others_in_pieces_and_with_any_threads(
    decoder: Decoder,
) -> None:
    """To the last bit: of what shares a prompt, of what does not, and of logits in pieces."""
    network, of = frozen(PolicyNetwork(decoder), torch.bfloat16), batch()
    assert isinstance(network, PolicyNetwork)
    run_natively(network, "native")
    together, _ = logprobs(network, of)
    threads, alone = torch.get_num_threads(), []
    try:
        for row in range(len(of.last_B)):
            torch.set_num_threads(1 + row % 3)
            length, prompt = int(of.lengths_B[row]), int(of.prompts_B[row])
            tokens = of.tokens_BT[row].tolist()
            one = sequence_batch([tokens[:prompt]], [tokens[prompt:length]])
            alone.append(logprobs(network, one)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat(alone), together)
    assert isinstance(network.decoder, NativeDecoder)
    network.decoder._rows = 3
    assert torch.equal(logprobs(network, of)[0], together)


def test_a_prompt_of_several_rows_is_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, of = frozen(PolicyNetwork(made("palm", tmp_path))), batch()
    run_natively(network, "native")
    assert isinstance(network.decoder, NativeDecoder)
    run, counts = network.decoder._model.run, []

    def counted(rows: Any, *rest: Any, **more: Any) -> None:
        counts.append(rows.shape[1])
        run(rows, *rest, **more)

    monkeypatch.setattr(network.decoder._model, "run", counted)
    network(of.tokens_BT, lengths_B=of.lengths_B, prompts_B=of.prompts_B)
    network(of.tokens_BT, lengths_B=of.lengths_B)
    responses = int((of.lengths_B - of.prompts_B).sum())
    assert counts == [31 + 32 + 33 + 1 + responses, int(of.lengths_B.sum())]


def test_an_adapter_is_merged_and_the_base_stays_as_it_is(tmp_path: Path) -> None:
    decoder = made("qwen2", tmp_path)
    add_adapter(decoder, "own", LoraConfig(rank=4), seed=1)
    network, of = frozen(ScalarNetwork(decoder)), batch()
    with torch.no_grad():
        for _, tensor in adapter_tensors(decoder, "own"):
            tensor.normal_(std=0.1)
    before = network(of.tokens_BT, lengths_B=of.lengths_B)
    network.adapter = "own"
    expected = network(of.tokens_BT, lengths_B=of.lengths_B)
    run_natively(network, "native")
    found = network(of.tokens_BT, lengths_B=of.lengths_B)
    inside = torch.arange(of.tokens_BT.shape[1]) < of.lengths_B[:, None]
    torch.testing.assert_close(found[inside], expected[inside], atol=1e-4, rtol=0)
    assert float((found - before)[inside].abs().max()) > 0.01


def test_what_is_no_whole_sequence_is_refused(tmp_path: Path) -> None:
    network = frozen(PolicyNetwork(made("palm", tmp_path)))
    run_natively(network, "native")
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="whole rows"):
        network(tokens, segments_BT=tokens)
    with pytest.raises(ValueError, match="no adapter"):
        network(tokens, adapter="own")
    with pytest.raises(ValueError, match="65 tokens; 64 fit"):
        network(torch.zeros(2, 65, dtype=torch.int64))
    with pytest.raises(TypeError, match="call `hidden`"):
        network.decoder.states(tokens, tokens, lambda *of: of[0], "")
    with pytest.raises(TypeError, match="has weights"):
        network.initialise(0)


def test_what_cannot_run_natively_stays_or_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def kept(network: DecoderNetwork, kernels: Any) -> bool:
        before = network.decoder
        run_natively(network, kernels)
        return network.decoder is before

    gemma = frozen(PolicyNetwork(loaded(reference("gemma2"), tmp_path)))
    assert kept(gemma, "torch") and kept(gemma, "auto")
    rounded = frozen(PolicyNetwork(made("palm", tmp_path)), torch.bfloat16)
    assert kept(rounded, "auto"), "the learner rounds as PyTorch does"
    with pytest.raises(ConfigError, match=r"'gemma2' has another block.*reward_service\.kernels"):
        run_natively(gemma, "native")
    palm = frozen(PolicyNetwork(made("palm", tmp_path)))
    assert kept(palm, "torch")
    monkeypatch.setenv("CC", "no-such-compiler")
    assert kept(palm, "auto")
    assert "frozen passes are slower without" in caplog.text
    with pytest.raises(ClusterError, match="install gcc"):
        run_natively(palm, "native")
