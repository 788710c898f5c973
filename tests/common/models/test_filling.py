"""Networks without memory for their weights: where their numbers come from, and what is read."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from common.config.model import LoraConfig, PalmConfig, PretrainedConfig
from common.errors import CheckpointError, TrainingError
from common.models.adapters import (
    attach_adapter,
    base_fingerprint,
    merged_sources,
    merged_state,
    sources_fingerprint,
)
from common.models.build import build_decoder, build_policy, build_scalar
from common.models.decoder import Decoder
from common.models.filling import fill, held, place, stored, streamed, without_memory
from common.models.lora import OFF, adapted
from common.models.packing import pack
from common.models.pretrained.checkpoint import Checkpoint
from common.models.weight_files import save_weights, weights_of
from tests.common.models.pretrained.tiny import VARIANTS, reference, saved

SHAPE = PalmConfig(vocab_size=23, dim=16, layers=2, heads=2, head_dim=8, context=32)
TOKENS = torch.arange(12).view(1, 12)


def logits(decoder: Decoder) -> torch.Tensor:
    """Logits of a few tokens, by parts that are there while they run."""
    packed = pack(TOKENS)
    states = decoder.states(packed.tokens_N, packed.positions_N, packed.attention, OFF)
    return decoder.logits(packed.unpack(states))


def have_memory(decoder: Decoder) -> None:
    """Give all parameters memory."""
    for parameter in decoder.parameters():
        place(parameter, torch.empty(parameter.shape))


@given(st.data(), st.sampled_from([(), (1,), (7,), (3, 5), (4, 2, 3)]))
def test_any_part_of_a_stored_tensor_is_read_as_it_is(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, shape: tuple[int, ...]
) -> None:
    path = tmp_path_factory.mktemp("stored") / "weights.safetensors"
    tensor = torch.randn(shape, dtype=torch.bfloat16)
    save_file({"other": torch.zeros(9), "x": tensor}, path)
    size = math.prod(shape)
    begin = data.draw(st.integers(0, size))
    end = data.draw(st.integers(begin, size))
    for source in (stored(path, "x", shape), held(tensor)):
        assert torch.equal(source(begin, end), tensor.reshape(-1)[begin:end])


def test_a_file_that_is_torn_or_gone_by_the_time_it_is_read_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    source = stored(path, "x", (2, 2))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"weights\.safetensors: torn or not safetensors"):
            source(0, 4)
        path.write_bytes(b"torn")


def test_a_file_that_was_rewritten_since_its_header_was_read_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"x": torch.zeros(4, 2)}, path)
    source = stored(path, "x", (4, 2))
    assert len(source(2, 8)) == 6
    save_file({"x": torch.zeros(2, 2)}, path)
    with pytest.raises(CheckpointError, match="'x' has another shape than when it was looked at"):
        source(2, 8)


def test_a_network_without_memory_is_given_what_would_have_been_drawn() -> None:
    policy, whole = build_policy(SHAPE, empty=True), build_policy(SHAPE)
    assert all(parameter.is_meta for parameter in policy.decoder.parameters())
    assert not any(parameter.is_meta for parameter in policy.value.parameters())
    before = torch.random.get_rng_state()
    with without_memory():
        build_decoder(SHAPE)
    assert torch.equal(before, torch.random.get_rng_state()), "nothing was drawn to be discarded"
    whole.initialise(3)
    weights = policy.first_weights(3)
    have_memory(policy.decoder)
    fill(policy, weights)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(policy.state_dict()[name], tensor), name


def test_what_is_placed_stays_the_same_parameter() -> None:
    policy = build_policy(SHAPE, empty=True)
    parameter = policy.decoder.get_parameter("norm.weight").requires_grad_(False)
    place(parameter, torch.full((16,), 2.0))
    assert policy.decoder.get_parameter("norm.weight") is parameter
    assert not parameter.is_meta
    assert not parameter.requires_grad
    with without_memory():
        pass
    assert not torch.nn.Linear(2, 2).weight.is_meta, "the block before has ended"


@pytest.mark.parametrize("family", VARIANTS)
def test_every_family_computes_in_parts_what_it_computes_whole(family: str, tmp_path: Path) -> None:
    path = saved(reference(family), tmp_path / family)
    model = PretrainedConfig(start=str(path), context=32)
    whole, empty = build_decoder(model), build_policy(model, empty=True).decoder
    whole.initialise(0)
    sources = Checkpoint.open(path).weights(empty)
    with torch.no_grad(), streamed(empty, sources):
        assert torch.equal(logits(empty), logits(whole))
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.check(sources)
    broken = dict(sources)
    name = next(
        name
        for name in sources
        if name.endswith(("q_proj.weight", "k_proj.weight"))
        or ("query_key_value" in name or "qkv" in name)
    )
    calls = iter(range(99))

    def other(begin: int, end: int) -> torch.Tensor:
        return sources[name](begin, end).roll(next(calls))  # the library is given another

    broken[name] = other
    with pytest.raises(CheckpointError, match="transformers computes other logits"):
        empty.check(broken)


def test_an_adapter_is_merged_into_weights_that_nobody_holds() -> None:
    whole, empty = build_scalar(SHAPE), build_scalar(SHAPE, empty=True)
    whole.initialise(0)
    lora = LoraConfig(rank=2, targets=("q", "ff_out"))
    for network in (whole, empty):
        attach_adapter(network, "value", lora, seed=1)
        generator = torch.Generator().manual_seed(5)
        for _, module in adapted(network):
            for name in module.names("value") if module.settings else ():
                getattr(module, name).data.normal_(generator=generator)
    plain = {k: held(v) for k, v in whole.state_dict().items() if "lora" not in k}
    expected = merged_state(whole, "value")
    found = merged_sources(empty, "value", plain)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        size = tensor.numel()
        parts = [found[name](0, size // 3), found[name](size // 3, size)]
        assert torch.equal(torch.cat(parts).view(tensor.shape), tensor), name
    _, module = next(adapted(empty))
    getattr(module, module.names("value")[0]).data.fill_(float("nan"))
    path = next(path for path, other in adapted(empty) if other is module)
    with pytest.raises(TrainingError, match=rf"{path}: adapter 'value' is not finite"):
        found[f"{path}.weight"](0, 1)


def test_a_fingerprint_is_that_of_the_weights_themselves(tmp_path: Path) -> None:
    policy = build_policy(SHAPE)
    policy.initialise(4)
    path = tmp_path / "policy.safetensors"
    save_weights(policy.state_dict(), path, {})
    empty = build_policy(SHAPE, empty=True)
    sources = {
        name.removeprefix("palm."): source
        for name, source in weights_of(empty, path).items()
        if name.startswith("palm.")
    }
    assert sources_fingerprint(empty.decoder, sources) == base_fingerprint(policy.state_dict())
