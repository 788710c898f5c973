"""LoRA: against its definition, against peft, against palm-rlhf-pytorch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from palm_rlhf_pytorch import PaLM as TheirPaLM
from peft import PeftModel
from torch import Tensor

from common.config.model import PROJECTIONS, LoraConfig, PalmConfig
from common.errors import CheckpointError, ConfigError, TrainingError
from common.models.adapter_files import (
    Adapter,
    adapter_of,
    export_merged,
    load_peft,
    load_scalar,
    put_adapter,
    require_base,
    save_adapter,
    save_peft,
)
from common.models.adapters import (
    adapter_tensors,
    add_adapter,
    attach_adapter,
    base_fingerprint,
    drop_adapter,
    load_adapter,
    merged_state,
    share_base,
    snapshot_adapter,
)
from common.models.build import build_policy, build_scalar
from common.models.lora import OFF, adapted
from common.models.palm import PaLM
from common.models.palm_rlhf import from_palm_rlhf, lora_from_palm_rlhf
from common.models.weight_files import load_weights, save_weights
from tests.common.models.pretrained.tiny import loaded, reference

SHAPE = PalmConfig(vocab_size=61, dim=32, layers=2, heads=4, head_dim=8, context=64)
TOKENS = torch.randint(0, 61, (3, 17), generator=torch.Generator().manual_seed(0))
ALL = PROJECTIONS


def palm(seed: int = 0) -> PaLM:
    network = PaLM(SHAPE)
    network.initialise(seed)
    return network


def trained(name: str = "policy", lora: LoraConfig | None = None, seed: int = 0) -> PaLM:
    """A base and an adapter that changes it."""
    network = palm()
    add_adapter(network, name, lora or LoraConfig(), seed)
    stir(network, name, seed)
    return network


def stir(network: PaLM, name: str, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, tensor in adapter_tensors(network, name):
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))


def logits(network: PaLM, adapter: str | list[str] = OFF, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return network.logits(network.hidden(tokens, adapter=adapter))


loras = st.builds(
    LoraConfig,
    rank=st.integers(1, 9),
    alpha=st.floats(0.5, 32),
    scaling=st.sampled_from(["plain", "rank_stabilised"]),
    targets=st.lists(st.sampled_from(ALL), min_size=1, unique=True).map(tuple),
)


@settings(max_examples=25)
@given(loras, st.integers(0, 2**31))
def test_an_adapter_is_what_hu_2021_says(lora: LoraConfig, seed: int) -> None:
    network = trained(lora=lora, seed=seed)
    root = lora.rank if lora.scaling == "plain" else lora.rank**0.5
    literal = palm()
    for (path, module), (_, plain) in zip(adapted(network), adapted(literal), strict=True):
        begin = position = 0
        for segment, rows in module.segments.items():
            if lora.reaches(segment):
                A = module.lora_policy_A[position : position + lora.rank]
                B = getattr(module, f"lora_policy_B_{segment}")
                assert A.shape == (lora.rank, module.in_features), path
                assert B.shape == (rows, lora.rank), path
                with torch.no_grad():
                    plain.weight[begin : begin + rows] += lora.alpha / root * (B @ A)
                position += lora.rank
            begin += rows
    with_adapter = logits(network, "policy")
    torch.testing.assert_close(with_adapter, logits(literal), atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(network), logits(palm())), "off is the base bit for bit"
    assert (with_adapter - logits(network)).abs().max() > 1e-4, "and on is not"


def test_a_new_adapter_changes_nothing() -> None:
    network = palm()
    before = logits(network)
    add_adapter(network, "policy", LoraConfig(rank=4), seed=3)
    assert torch.equal(logits(network, "policy"), before)
    A = dict(adapter_tensors(network, "policy"))["blocks.0.fused_in.lora_A"]
    assert A.std().item() == pytest.approx(SHAPE.dim**-0.5, rel=0.1)


def test_merged_equals_unmerged_and_never_touches_the_base() -> None:
    network = trained()
    before = {k: v.clone() for k, v in palm().state_dict().items()}
    merged = PaLM(SHAPE)
    merged.load_state_dict(merged_state(network, "policy"))
    torch.testing.assert_close(logits(merged), logits(network, "policy"), atol=1e-5, rtol=0)
    for _ in range(50):
        merged_state(network, "policy")
    for name, tensor in before.items():
        assert torch.equal(network.state_dict()[name], tensor), name


def test_in_bf16_merged_and_unmerged_differ_by_no_more_than_bf16_from_fp32() -> None:
    exact = logits(trained(), "policy")
    rounded = trained().to(torch.bfloat16)
    merged = PaLM(SHAPE).to(torch.bfloat16)
    merged.load_state_dict(merged_state(rounded, "policy"))
    scale = exact.abs().max()
    for found in (logits(rounded, "policy"), logits(merged)):
        assert (found - exact).abs().max() < 0.03 * scale


def test_rows_of_a_batch_run_with_adapters_of_their_own() -> None:
    network = trained("one")
    add_adapter(network, "two", LoraConfig(rank=2, targets=("v", "ff_out")), seed=5)
    stir(network, "two", 9)
    mixed = logits(network, ["two", OFF, "one"])
    for row, name in enumerate(("two", OFF, "one")):
        torch.testing.assert_close(mixed[row], logits(network, name)[row], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="2 adapters for 3 rows"):
        logits(network, ["one", "two"])
    for unknown in ("three", ["one", "three", OFF]):
        with pytest.raises(ValueError, match="no adapter 'three' among"):
            logits(network, unknown)


@pytest.mark.parametrize("remake", [False, True])
def test_gradients_are_those_of_the_merged_weights_and_none_of_the_base(remake: bool) -> None:
    lora = LoraConfig(rank=3, alpha=5.0)
    network = build_policy(SHAPE.model_copy(update={"activation_checkpointing": remake}))
    network.initialise(0)
    attach_adapter(network, "policy", lora, seed=0)
    stir(network.decoder, "policy")
    found, values = network(TOKENS)
    (found.logsumexp(-1).mean() + values.square().mean()).backward()
    trained_names = {name for name, p in network.named_parameters() if p.requires_grad}
    assert all("lora_policy" in name or name.startswith("value.") for name in trained_names)
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == (name in trained_names), name
    # The same by chain rule from the gradient of the merged weights, which autograd computes.
    merged = build_policy(SHAPE)
    merged.load_state_dict(merged_state(network, "policy"))
    found, values = merged(TOKENS)
    (found.logsumexp(-1).mean() + values.square().mean()).backward()
    for (path, module), (_, plain) in zip(adapted(network), adapted(merged), strict=True):
        parts = torch.split(module.lora_policy_A, lora.rank)
        gradients = torch.split(module.lora_policy_A.grad, lora.rank)
        for (segment, rows), A, of_A in zip(
            module.reached(lora).items(), parts, gradients, strict=True
        ):
            B = getattr(module, f"lora_policy_B_{segment}")
            whole = plain.weight.grad[rows]
            torch.testing.assert_close(
                B.grad, lora.scale * whole @ A.T, atol=1e-5, rtol=1e-4, msg=path
            )
            torch.testing.assert_close(
                of_A, lora.scale * B.T @ whole, atol=1e-5, rtol=1e-4, msg=path
            )


def test_dropout_is_of_the_adapters_input_and_only_in_training() -> None:
    network = trained(lora=LoraConfig(dropout=0.5))
    assert torch.equal(logits(network.eval(), "policy"), logits(trained(), "policy"))
    torch.manual_seed(0)
    assert not torch.equal(logits(network.train(), "policy"), logits(trained(), "policy"))
    assert torch.equal(logits(network), logits(palm())), "the base is not dropped from"


def test_a_snapshot_stays_as_it_was() -> None:
    network = trained()
    before = logits(network, "policy")
    snapshot_adapter(network, "policy", "old")
    stir(network, "policy", 4)
    assert torch.equal(logits(network, "old"), before)
    assert not torch.equal(logits(network, "policy"), before)
    names = [name for name, _ in network.named_parameters()]
    assert not any("lora_old" in name for name in names), "nothing that could be trained"
    drop_adapter(network, "old")
    assert not any("lora_old" in name for name, _ in network.named_buffers())


def test_one_base_in_memory() -> None:
    policy, value = palm(), palm(1)
    share_base(value, policy)
    add_adapter(value, "value", LoraConfig(), seed=0)
    add_adapter(policy, "policy", LoraConfig(), seed=0)
    mine = dict(value.named_parameters())
    for name, parameter in policy.named_parameters():
        if "lora" not in name:
            assert mine[name] is parameter, name
    stir(value, "value")
    assert torch.equal(logits(policy, "policy"), logits(palm()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_merged(value: float) -> None:
    network = trained()
    with torch.no_grad():
        network.get_parameter("blocks.1.ff_out.lora_policy_A")[0, 0] = value
    with pytest.raises(TrainingError, match=r"blocks\.1\.ff_out: adapter 'policy' is not finite"):
        merged_state(network, "policy")


def test_names_that_cannot_be() -> None:
    network = trained()
    with pytest.raises(ConfigError, match="has an adapter 'policy' already"):
        add_adapter(network, "policy", LoraConfig(), seed=0)
    with pytest.raises(ConfigError, match="small letters"):
        add_adapter(network, "my_policy", LoraConfig(), seed=0)


def test_a_target_that_no_projection_has(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'q_prj' is no projection of .*; it has attn_out, ff_"):
        add_adapter(palm(1), "policy", LoraConfig(targets=("q", "q_prj")), seed=0)
    decoder = loaded(reference("llama"), tmp_path)
    with pytest.raises(ConfigError, match=r"'q_prj' is no .* did you mean 'q_proj'"):
        add_adapter(decoder, "policy", LoraConfig(targets=("q_prj",)), seed=0)


# ------------------------------------------------------------------ files


def held(network: PaLM, name: str = "policy", lora: LoraConfig | None = None) -> Adapter:
    tensors = {k: t.detach().clone() for k, t in adapter_tensors(network, name)}
    base = base_fingerprint(network.state_dict())
    return Adapter(settings=lora or LoraConfig(), base=base, tensors=tensors)


@settings(max_examples=12)
@given(lora=loras)
def test_peft_reads_what_we_write(
    tmp_path_factory: pytest.TempPathFactory, lora: LoraConfig
) -> None:
    folder = tmp_path_factory.mktemp("peft")
    network = trained(lora=lora)
    save_peft(held(network, lora=lora), network, folder)
    # In fp64, so that what is compared is the mathematics and not the order of sums.
    theirs = PeftModel.from_pretrained(palm(), folder).double().eval()
    with torch.no_grad():
        found = theirs(TOKENS)
    expected = logits(trained(lora=lora).double(), "policy")
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    back = load_peft(folder, palm())
    assert back.settings == lora
    assert back.base == base_fingerprint(palm().state_dict())
    for name, tensor in adapter_tensors(network, "policy"):
        assert torch.equal(back.tensors[name], tensor), name
    other = palm()
    put_adapter(other, "policy", back)
    assert torch.equal(logits(other, "policy"), logits(network, "policy"))


def test_an_adapter_of_another_base_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    adapter = held(trained())
    other = base_fingerprint(palm(1).state_dict())
    assert other != adapter.base
    with pytest.raises(CheckpointError, match=rf"base {adapter.base}, and this one is {other}"):
        require_base(adapter, other, "somewhere")
    save_weights(build_policy(SHAPE).state_dict(), tmp_path / "policy.safetensors", {})
    with pytest.raises(CheckpointError, match=f"base {adapter.base}"):
        export_merged(adapter, {}, tmp_path / "policy.safetensors", tmp_path / "out", SHAPE)
    assert not (tmp_path / "out").exists()


def test_a_reward_adapter_comes_back_on_the_base_it_shares(tmp_path: Path) -> None:
    network = build_scalar(SHAPE)
    network.initialise(0)
    lora = LoraConfig(rank=2, dropout=0.25)
    attach_adapter(network, "reward", lora, seed=0)
    stir(network.decoder, "reward")
    network.head.offset += 0.5
    state = network.state_dict()
    adapter = adapter_of(state, "reward", lora, base_fingerprint(state))
    head = {k: v for k, v in state.items() if k.startswith("head.")}
    path = tmp_path / "reward.safetensors"
    save_adapter(adapter, head, path, SHAPE)
    assert path.stat().st_size < sum(4 * t.numel() for t in state.values()) / 2
    base, made = palm(), build_scalar(SHAPE)
    found = load_scalar(made, path, base, "value")
    assert found is not None
    assert found.rank == 2
    assert found.dropout == 0.0, "what is loaded goes on without dropout"
    assert made.decoder.embedding.weight is base.embedding.weight
    assert torch.equal(made(TOKENS), network.eval()(TOKENS))
    with pytest.raises(CheckpointError, match="was trained on base"):
        load_scalar(build_scalar(SHAPE), path, palm(1), "value")
    save_weights(state | {"extra": torch.zeros(1)}, path, {})
    with pytest.raises(CheckpointError, match="of another architecture"):
        load_scalar(build_scalar(SHAPE), path, base, "again")
    with pytest.raises(CheckpointError, match="no such weights"):
        load_scalar(build_scalar(SHAPE), tmp_path / "none", base, "again")
    path.write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="torn"):
        load_scalar(build_scalar(SHAPE), path, base, "again")


def test_export_is_merged_from_the_base_as_it_was(tmp_path: Path) -> None:
    policy = build_policy(SHAPE)
    policy.initialise(0)
    save_weights(policy.state_dict(), tmp_path / "policy.safetensors", {})
    base = base_fingerprint(policy.state_dict())
    attach_adapter(policy, "policy", LoraConfig(), seed=0)
    stir(policy.decoder, "policy")
    expected = policy(TOKENS)
    state = {k: v for k, v in policy.state_dict().items() if "lora" in k or "value" in k}
    adapter = adapter_of(state, "policy", LoraConfig(), base)
    export_merged(adapter, state, tmp_path / "policy.safetensors", tmp_path / "out", SHAPE)
    plain = build_policy(SHAPE)
    load_weights(plain, tmp_path / "out" / "policy.safetensors")
    for found, wanted in zip(plain(TOKENS), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"]["fused_in"] == 5 * LoraConfig().rank


def test_tensors_that_do_not_fit_are_named() -> None:
    adapter = held(trained())
    with pytest.raises(CheckpointError, match=r"'blocks\.0\.attn_out\.lora_A' is \(8, 32\)"):
        put_adapter(
            palm(), "policy", Adapter(settings=LoraConfig(rank=4), base="", tensors=adapter.tensors)
        )
    network = trained()
    with pytest.raises(CheckpointError, match="'more' is"):
        load_adapter(network, "policy", {**adapter.tensors, "more": torch.zeros(1)})


def test_a_peft_folder_that_is_not_ours(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such weights"):
        load_peft(tmp_path, palm())
    save_weights({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors", {})
    with pytest.raises(CheckpointError, match="not an adapter that talipot wrote"):
        load_peft(tmp_path, palm())
    metadata = {"lora": LoraConfig().model_dump_json(), "base": ""}
    save_weights({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors", metadata)
    with pytest.raises(CheckpointError, match="no tensor"):
        load_peft(tmp_path, palm())


# ------------------------------------------------------------------ palm-rlhf-pytorch


def test_their_adapters_give_their_logits() -> None:
    torch.manual_seed(0)
    theirs = TheirPaLM(
        num_tokens=61, dim=32, depth=2, heads=4, dim_head=8, finetune_scopes=("actor",)
    ).eval()
    with torch.no_grad():
        for parameter in theirs.finetune_modules.parameters():
            parameter.normal_(0, 0.1)
    shape = SHAPE.model_copy(update={"xpos": True, "scale_logits": False})
    ours = PaLM(shape)
    ours.load_state_dict(from_palm_rlhf(theirs.state_dict()))
    adapter = lora_from_palm_rlhf(theirs.state_dict(), "actor")
    assert adapter.settings.rank == 8
    require_base(adapter, base_fingerprint(ours.state_dict()), "theirs")
    put_adapter(ours, "actor", adapter)
    with torch.no_grad():
        expected, plain = theirs(TOKENS, finetune_scope="actor"), theirs(TOKENS)
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(logits(ours, "actor"), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(ours), plain, atol=1e-5, rtol=1e-5)
    with pytest.raises(CheckpointError, match="no adapters of scope 'critic'; there are actor"):
        lora_from_palm_rlhf(theirs.state_dict(), "critic")
