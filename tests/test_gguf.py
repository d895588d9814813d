"""GGUF files become the same model when read by us and by transformers."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from scaledown.models.gguf import convert_llama
from scaledown.models.sources import resolve
from scaledown.models.weights import loadable

WIDTH, HEADS, KEYS, LAYERS = 64, 4, 2, 2
TOKENS = ["<pad>", "<s>", "</s>", *(chr(33 + i) for i in range(90)), "ab"]
TYPES = [gguf.GGMLQuantizationType[name] for name in ("Q4_1", "Q8_0", "F16", "F32")]


def written(path: Path, architecture: str = "llama", *, tied: bool = True, more: str = "") -> Path:
    """A small model with random weights; its tensors have several types."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    if more:
        writer.add_uint32(more, 1)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(TOKENS), WIDTH), "output_norm": (WIDTH,)}
    if not tied:
        shapes["output"] = (len(TOKENS), WIDTH)
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.{name}": shape
            for name, shape in {
                "attn_norm": (WIDTH,),
                "attn_q": (WIDTH, WIDTH),
                "attn_k": (WIDTH // HEADS * KEYS, WIDTH),
                "attn_v": (WIDTH // HEADS * KEYS, WIDTH),
                "attn_output": (WIDTH, WIDTH),
                "ffn_norm": (WIDTH,),
                "ffn_gate": (2 * WIDTH, WIDTH),
                "ffn_up": (2 * WIDTH, WIDTH),
                "ffn_down": (WIDTH, 2 * WIDTH),
            }.items()
        }
    for number, (name, shape) in enumerate(shapes.items()):
        values = random.normal(size=shape).astype(np.float32)
        kind = TYPES[number % len(TYPES)] if len(shape) > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def by_transformers(path: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float16,
        quantization_config=GgufConfig(dequantize=True),
    )
    return model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.parametrize("tied", [True, False])
def test_tensors_settings_and_tokenizer_equal_those_of_transformers(tied, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SCALEDOWN_CACHE", str(tmp_path / "cache"))
    path = written(tmp_path / "tiny.gguf", tied=tied)
    expected, tokenizer = by_transformers(path)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", None)  # not asked for a file of ours
    name, pinned = loadable(resolve(str(path)))
    monkeypatch.undo()
    model = AutoModelForCausalLM.from_pretrained(name, **pinned)
    found = model.state_dict()
    assert found.keys() == expected.state_dict().keys()
    for key, tensor in expected.state_dict().items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key
    told = {"_name_or_path", "_model_name_or_path", "quantization_config", "architectures"}
    configs = [
        {key: value for key, value in one.config.to_dict().items() if key not in told}
        for one in (model, expected)
    ]
    assert configs[0] == configs[1]
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    ours = AutoTokenizer.from_pretrained(name)
    assert ours.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert ours.special_tokens_map == tokenizer.special_tokens_map


@pytest.mark.parametrize("more", ["llama.expert_count", "llama.rope.scaling.factor"])
def test_file_with_unknown_settings_is_not_converted(more, tmp_path) -> None:
    path = written(tmp_path / "tiny.gguf", more=more)
    assert not convert_llama(path, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_other_architecture_is_read_by_transformers(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SCALEDOWN_CACHE", str(tmp_path / "cache"))
    path = written(tmp_path / "tiny.gguf", "qwen2")
    expected, _ = by_transformers(path)
    name, pinned = loadable(resolve(str(path)))
    model = AutoModelForCausalLM.from_pretrained(name, **pinned)
    assert type(model) is type(expected)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in expected.state_dict().items())
