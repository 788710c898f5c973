"""Every supported family against `transformers`' own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common.batching import sequence_batch
from common.logprobs import Sampling, chosen_reader
from common.models import attention
from common.models.embedding import Reader
from common.models.networks import PolicyNetwork, compute_in
from learner.algorithms import ppo
from tests.common.models.pretrained.tiny import VARIANTS, VOCABULARY, loaded, reference

LENGTHS = (13, 5, 40, 1)


def rows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=generator)
    return tokens, torch.tensor(LENGTHS)


def reader(tokens: torch.Tensor) -> Reader:
    """Log-probabilities of the following tokens, and entropies."""
    return chosen_reader(tokens.roll(-1, 1), Sampling(), ppo.entropy)


@pytest.mark.parametrize("name", VARIANTS)
def test_logprobs_and_entropy_are_the_librarys(name: str, tmp_path: Path) -> None:
    model = reference(name)
    network = PolicyNetwork(loaded(model, tmp_path, logits_mb=0.002))
    tokens, lengths = rows()
    with torch.no_grad():
        logits, _ = network(tokens, lengths_B=lengths)
        read, _ = network(tokens, lengths_B=lengths, read=reader(tokens))
        for row, length in enumerate(LENGTHS):
            expected = model(tokens[row : row + 1, :length], use_cache=False).logits[0]
            torch.testing.assert_close(logits[row, :length], expected, atol=1e-5, rtol=1e-5)
            logprobs = expected.log_softmax(-1)
            chosen = logprobs[:-1].gather(-1, tokens[row, 1:length, None])[:, 0]
            torch.testing.assert_close(read[row, : length - 1, 0], chosen, atol=1e-5, rtol=0)
            entropy = -(logprobs.exp() * logprobs).sum(-1)
            torch.testing.assert_close(read[row, :length, 1], entropy, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_are_the_librarys(name: str, tmp_path: Path) -> None:
    model = reference(name)
    decoder = loaded(model, tmp_path, logits_mb=0.002, activation_checkpointing=True)
    network = PolicyNetwork(decoder).train()
    tokens, lengths = rows(1)
    read, _ = network(tokens, lengths_B=lengths, read=reader(tokens))
    real = torch.arange(max(LENGTHS)) < lengths[:, None] - 1
    (read[real] * torch.tensor([1.0, 0.3])).sum().backward()
    loss = torch.zeros(())
    for row, length in enumerate(LENGTHS):
        logprobs = model(tokens[row : row + 1, :length], use_cache=False).logits[0].log_softmax(-1)
        chosen = logprobs[:-1].gather(-1, tokens[row, 1:length, None])
        loss = loss + chosen.sum() - 0.3 * (logprobs.exp() * logprobs)[:-1].sum()
    loss.backward()
    theirs = dict(model.named_parameters())
    assert {k for k, _ in decoder.named_parameters()} == theirs.keys()
    for key, parameter in decoder.named_parameters():
        expected = theirs[key].grad
        assert expected is not None and parameter.grad is not None, key
        scale = float(expected.abs().max())
        torch.testing.assert_close(parameter.grad, expected, atol=1e-4 * scale, rtol=1e-4, msg=key)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_prompt_of_several_rows_is_computed_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities and gradients are those of rows that are computed apart."""
    monkeypatch.setattr(attention, "_FEW", 4)  # responses to the short prompt are two chunks
    decoder = loaded(reference(name), tmp_path, logits_mb=0.002, activation_checkpointing=True)
    network = PolicyNetwork(decoder).double().train()
    prompts = [[7, 3, 9, 11, 4] * 8, [7, 3, 9], [5]]
    rows = [(0, 3), (1, 5), (0, 1), (0, 30), (1, 2), (2, 6)]
    batch = sequence_batch(
        [prompts[i] for i, _ in rows],
        [[(13 * n + 5 * t) % VOCABULARY for t in range(n)] for _, n in rows],
    )
    states, computed, found = decoder.states, list[int](), []

    def counted(tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        computed.append(len(tokens))
        return states(tokens, *rest)

    monkeypatch.setattr(decoder, "states", counted)
    for shared in ({}, {"prompts_B": batch.prompts_B}):
        read, values_BR = network(
            batch.tokens_BT,
            lengths_B=batch.lengths_B,
            predict_BR=batch.predict_BR,
            read=chosen_reader(batch.response_BR, Sampling(), ppo.entropy),
            **shared,
        )
        network.zero_grad()
        columns = torch.cat((read, values_BR[..., None]), -1)[batch.response_mask_BR]
        (columns * torch.tensor([1.0, 0.3, 0.1]).double()).sum().backward()
        gradients = {k: p.grad.clone() for k, p in network.named_parameters() if p.grad is not None}
        found.append((columns.detach(), gradients))
        assert not read[~batch.response_mask_BR].any()
    assert computed == [192, 128]  # 174 tokens, and 96 with every prompt once
    (apart, gradients), (together, shared_gradients) = found
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-5)
    assert gradients.keys() == shared_gradients.keys()
    for key, expected in gradients.items():
        near = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(shared_gradients[key], expected, atol=near, rtol=1e-4, msg=key)


@pytest.mark.parametrize("name", VARIANTS)
def test_in_bf16_training_and_sampling_agree_within_a_stated_bound(
    name: str, tmp_path: Path
) -> None:
    """Root mean square of the difference in log-probability: 5 % of the logits' deviation from
    fp32, and as much between learner (fp32 weights, products in bf16) and actor (bf16 weights)."""
    model = reference(name)
    learner, exact = (PolicyNetwork(loaded(model, tmp_path / part)) for part in ("a", "b"))
    compute_in(learner, torch.bfloat16)
    actor = PolicyNetwork(loaded(model, tmp_path / "c")).to(torch.bfloat16)
    tokens, lengths = rows(2)
    real = torch.arange(max(LENGTHS)) < lengths[:, None] - 1
    with torch.no_grad():
        learnt, sampled, expected = (
            network(tokens, lengths_B=lengths, read=reader(tokens))[0][real][:, 0]
            for network in (learner, actor, exact)
        )
        spread = float(exact(tokens, lengths_B=lengths)[0][real].std(-1).mean())
    for one, other in ((learnt, expected), (sampled, expected), (learnt, sampled)):
        assert float((one - other).square().mean().sqrt()) < 0.05 * spread
    assert not torch.equal(learnt, expected)


def test_ids_that_are_no_tokens_have_no_logits(tmp_path: Path) -> None:
    model = reference("qwen2-tied")
    network = PolicyNetwork(loaded(model, tmp_path, vocab_size=90))
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        logits, _ = network(tokens)
        expected = model(tokens, use_cache=False).logits[..., :90]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_sequences_of_a_row_do_not_attend_to_each_other(tmp_path: Path) -> None:
    """The library's own packing by positions would let them, with a mask of ones or a cache."""
    model = reference("llama")
    network = PolicyNetwork(loaded(model, tmp_path))
    tokens, _ = rows(4)
    parts = [tokens[0, :13], tokens[2, :20]]
    packed = torch.cat(parts)[None]
    places = torch.cat([torch.arange(len(part)) for part in parts])[None]
    segments = torch.cat([torch.full((len(p),), i) for i, p in enumerate(parts)])[None]
    with torch.no_grad():
        logits, _ = network(packed, positions_BT=places, segments_BT=segments)
        alone = torch.cat([model(part[None], use_cache=False).logits[0] for part in parts])
        trap = model(packed, position_ids=places, attention_mask=torch.ones_like(packed)).logits[0]
    torch.testing.assert_close(logits[0], alone, atol=1e-5, rtol=1e-5)
    assert float((trap - alone).abs().max()) > 0.1


def test_few_numbers_of_rows_are_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each new number of rows costs oneDNN a product that it compiles and keeps."""
    decoder = loaded(reference("llama"), tmp_path)
    computed: set[int] = set()
    states = decoder.states

    def counted(tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        computed.add(len(tokens))
        return states(tokens, *rest)

    monkeypatch.setattr(decoder, "states", counted)
    for rows, length in ((1, 3), (2, 17), (3, 20), (5, 13), (4, 25), (8, 16)):
        tokens = torch.arange(rows * length).view(rows, length) % 50
        lengths = torch.arange(rows) % length + 1
        hidden = decoder.hidden(tokens, lengths_B=lengths)
        alone = decoder.hidden(tokens[:1, : int(lengths[0])])
        assert torch.allclose(hidden[0, : int(lengths[0])], alone[0], atol=1e-5)
    assert computed <= {64, 128}
