"""Converts a GGUF file with Llama's architecture to an ordinary model.

transformers can do this, too, but it reads the whole file three times, and searches for the name of each
tensor again.
"""

from pathlib import Path
from typing import Any, Final

import numpy as np

_SETTINGS: Final = {
    "llama.block_count": "num_hidden_layers",
    "llama.context_length": "max_position_embeddings",
    "llama.embedding_length": "hidden_size",
    "llama.feed_forward_length": "intermediate_size",
    "llama.attention.head_count": "num_attention_heads",
    "llama.attention.head_count_kv": "num_key_value_heads",
    "llama.attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "llama.rope.dimension_count": "head_dim",
    "llama.rope.freq_base": "rope_theta",
    "llama.vocab_size": "vocab_size",
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.unknown_token_id": "unk_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
_WHOLE_TENSORS: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_llama(file: Path, folder: Path) -> bool:
    """Write the model of a GGUF file as float16 safetensors with its configuration, without the tokenizer.

    Args:
        file: The GGUF file.
        folder: The folder to write; it must not exist.

    Returns:
        Whether the model was written. It is not for another architecture or kind of tokenizer, and for files
        with settings or tensors that are unknown here (scaled rotary embeddings, experts, biases).
    """
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaConfig

    class Reader(GGUFReader):  # type: ignore[misc]
        """Reads slices of a plain array, which are three times as fast as slices of a memory map."""

        def _build_fields(self, *arguments: Any) -> Any:
            self.data: Any = self.data.view(np.ndarray)
            return super()._build_fields(*arguments)

    reader = Reader(file)
    fields = reader.fields
    names = {tensor.name: _tensor_name(tensor.name) for tensor in reader.tensors}
    kinds = [fields[key].contents() for key in ("general.architecture", "tokenizer.ggml.model")]
    unknown = [key for key in fields if key.startswith("llama.") and key not in _SETTINGS]
    if kinds != ["llama", "gpt2"] or unknown or None in names.values():
        return False
    settings = {name: fields[key].contents() for key, name in _SETTINGS.items() if key in fields}
    settings.setdefault("vocab_size", len(fields["tokenizer.ggml.tokens"].data))
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float16",
        tie_word_embeddings="output.weight" not in names,
        **settings,
    )
    weights = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float16)
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            heads = config.num_attention_heads if ".attn_q." in tensor.name else config.num_key_value_heads
            values = _unpermuted(values, heads)
        weights[str(names[tensor.name])] = torch.from_numpy(values)
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    config.save_pretrained(folder)
    return True


def _tensor_name(name: str) -> str | None:
    """The name of a tensor in transformers; None for an unknown tensor."""
    if not name.endswith(".weight"):
        return None
    block, *rest = name.removesuffix(".weight").split(".")
    if block != "blk" or len(rest) != 2:
        own = None if rest else _WHOLE_TENSORS.get(block)
        return own and f"{own}.weight"
    number, part = rest
    return f"model.layers.{number}.{_LAYER[part]}.weight" if part in _LAYER else None


def _unpermuted(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Reorder the rows of a query or key matrix, since llama.cpp interleaves the halves of each head."""
    halves = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
