from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from palm_rlhf_pytorch import PaLM as TheirPaLM

from common.config.model import PRESETS, ModelConfig, PalmConfig
from common.errors import CheckpointError
from common.logprobs import Sampling, chosen_reader
from common.models.build import build_policy, build_scalar, count_parameters
from common.models.palm import PaLM
from common.models.palm_rlhf import from_palm_rlhf
from tests.likelihoods import chosen_logprobs

SHAPE = PalmConfig(vocab_size=61, dim=32, layers=2, heads=4, head_dim=8, context=64)


def model(config: ModelConfig = SHAPE, seed: int = 0) -> PaLM:
    palm = PaLM(config)
    palm.initialise(seed)
    return palm.eval()


@pytest.mark.parametrize(
    ("preset", "billions"), [("palm-8b", 8.632), ("palm-62b", 62.495), ("palm-540b", 540.354)]
)
def test_paper_shapes_have_the_papers_parameter_counts(preset: str, billions: float) -> None:
    assert round(count_parameters(PRESETS[preset]).kernels / 1e9, 3) == billions


def random_loss(config: ModelConfig, hide_own: bool = False) -> float:
    """Loss of a fresh model on random targets; `hide_own` takes the input token out of it."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, config.vocab_size, (8, 64), generator=generator)
    targets = torch.randint(0, config.vocab_size, (8, 64), generator=generator)
    with torch.no_grad():
        logits = model(config)(tokens)
    if hide_own:
        logits = logits.scatter(-1, tokens[..., None], float("-inf"))
        targets = torch.where(targets == tokens, (targets + 1) % config.vocab_size, targets)
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))


@pytest.mark.parametrize(("dim", "layers", "vocab"), [(64, 2, 4096), (64, 2, 8192), (128, 4, 8192)])
def test_initial_loss_has_the_known_ratio_to_ln_v(dim: int, layers: int, vocab: int) -> None:
    """8.84 with tied and scaled embeddings against ln 4096 = 8.32."""
    config = PalmConfig(vocab_size=vocab, dim=dim, layers=layers, heads=4, head_dim=32, context=64)
    assert abs(random_loss(config) - math.log(vocab) * 8.84 / 8.32) < 0.1
    # The paper's trap: without the 1/sqrt(d) scale the initial loss is far above ln V.
    assert random_loss(config.model_copy(update={"scale_logits": False})) > 3 * math.log(vocab)


@pytest.mark.parametrize(("dim", "layers", "vocab"), [(64, 2, 512), (256, 4, 2048), (512, 4, 4096)])
def test_initial_logits_are_unit_normal(dim: int, layers: int, vocab: int) -> None:
    """ln V + 1/2 at any size, once the input token's own logit (tied embeddings) is left out."""
    config = PalmConfig(vocab_size=vocab, dim=dim, layers=layers, heads=4, head_dim=32, context=64)
    assert abs(random_loss(config, hide_own=True) - (math.log(vocab) + 0.5)) < 0.1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(0, 8))
def test_padding_on_the_right_changes_nothing(seed: int, length: int, padding: int) -> None:
    palm = model()
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 61, (2, length), generator=generator)
    garbage = torch.randint(0, 61, (2, padding), generator=generator)
    with torch.no_grad():
        plain = palm(tokens)
        padded = palm(torch.cat((tokens, garbage), dim=1))[:, :length]
    torch.testing.assert_close(padded, plain, atol=1e-5, rtol=0)


def test_packed_documents_do_not_see_each_other() -> None:
    palm = model()
    generator = torch.Generator().manual_seed(5)
    one, two = (torch.randint(0, 61, (n,), generator=generator) for n in (7, 4))
    positions = torch.cat((torch.arange(7), torch.arange(4)))[None]
    segments = torch.tensor([[0] * 7 + [1] * 4])
    with torch.no_grad():
        packed = palm.logits(
            palm.hidden(torch.cat((one, two))[None], positions_BT=positions, segments_BT=segments)
        )
        torch.testing.assert_close(packed[0, :7], palm(one[None])[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(packed[0, 7:], palm(two[None])[0], atol=1e-5, rtol=0)


def test_activation_checkpointing_leaves_the_gradient_as_it_is() -> None:
    tokens = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(6))
    gradients = []
    for switch in (False, True):
        palm = model(SHAPE.model_copy(update={"activation_checkpointing": switch}))
        palm(tokens).square().mean().backward()
        gradients.append([p.grad for p in palm.parameters()])
    for plain, saved in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, saved)


def test_bf16_is_close_to_fp32() -> None:
    tokens = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        exact, rounded = model()(tokens), model().bfloat16()(tokens)
    assert rounded.dtype == torch.float32
    assert float((exact - rounded).abs().max()) < 0.2


def test_heads_read_the_positions_asked_for() -> None:
    policy, scalar = build_policy(SHAPE), build_scalar(SHAPE)
    policy.initialise(0)
    scalar.initialise(0)
    tokens = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        logits, values = policy(tokens)
        some, some_values = policy(tokens, predict_BR=torch.tensor([[2, 3], [7, 8]]))
        assert scalar(tokens).shape == (2, 9)
    torch.testing.assert_close(some[0], logits[0, 2:4])
    torch.testing.assert_close(some_values[1], values[1, 7:9])


@pytest.mark.parametrize("logits_mb", [4.0, 0.001])
def test_logits_read_in_pieces_give_the_same_values_and_gradients(logits_mb: float) -> None:
    tokens = torch.randint(0, 61, (3, 11), generator=torch.Generator().manual_seed(10))
    predict = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0], [9, 0, 0, 0]])
    sampling = Sampling(temperature=0.8, top_k=7, min_tokens=2, endings=(3,))
    policy = build_policy(SHAPE.model_copy(update={"logits_mb": logits_mb}))
    policy.initialise(0)
    chosen = tokens.gather(1, predict + 1)
    chosen[chosen == 3] = 4
    largest = 0

    def more(logits: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, len(logits))
        return logits.logsumexp(-1)

    read = chosen_reader(chosen, sampling, more)
    found, _ = policy(tokens, predict_BR=predict, read=read)
    found.square().sum().backward()
    assert largest == (12 if logits_mb > 1 else 4)
    gradients = [p.grad.clone() for p in policy.decoder.parameters()]
    policy.zero_grad()
    logits, _ = policy(tokens, predict_BR=predict)
    plain = torch.stack((chosen_logprobs(logits, chosen, sampling), logits.logsumexp(-1)), -1)
    torch.testing.assert_close(found, plain)
    plain.square().sum().backward()
    for ours, parameter in zip(gradients, policy.decoder.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, atol=1e-4, rtol=1e-4)


def test_tensors_keep_the_names_that_files_have() -> None:
    assert {name.split(".")[0] for name in build_policy(SHAPE).state_dict()} == {"palm", "value"}
    scalar = build_scalar(SHAPE).state_dict()
    assert {name.split(".")[0] for name in scalar} == {"palm", "head"}
    assert {name.removeprefix("palm.blocks.0.") for name in scalar if ".0." in name} == {
        "norm.weight",
        "fused_in.weight",
        "attn_out.weight",
        "ff_out.weight",
    }


def test_a_missing_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size"):
        PaLM(PalmConfig())


def test_parity_with_palm_rlhf_pytorch() -> None:
    torch.manual_seed(0)
    theirs = TheirPaLM(num_tokens=61, dim=32, depth=2, heads=4, dim_head=8).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "gamma" in name:
                parameter.normal_(std=0.1)
            elif "token_emb" in name:
                parameter.normal_()
    ours = PaLM(SHAPE.model_copy(update={"xpos": True, "scale_logits": False}))
    ours.load_state_dict(from_palm_rlhf(theirs.state_dict()))
    tokens = torch.randint(0, 61, (3, 21), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens), atol=1e-5, rtol=1e-5)
        wrong = PaLM(SHAPE.model_copy(update={"scale_logits": False}))
        wrong.load_state_dict(ours.state_dict())
        assert float((wrong(tokens) - theirs(tokens)).abs().max()) > 1e-3, "xpos must matter"


def test_foreign_weights_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"layers\.0\.fn\.conv"):
        from_palm_rlhf({"layers.0.fn.conv.weight": torch.zeros(1)})
