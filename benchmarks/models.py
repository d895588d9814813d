"""Models with random weights: of MiniLM-L6's size, and so small that they take hardly any time."""

from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from scaledown.models.sources import resolve
from scaledown.models.weights import loadable


def minilm(folder: Path) -> Path:
    """6 layers, 384 wide, 12 heads, as cross-encoder/ms-marco-MiniLM-L-6-v2; BERT's own vocabulary."""
    torch.manual_seed(0)
    tokenizer = _tokenizer("bundled:splade-tiny", folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=1,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def hardly_any(folder: Path) -> dict[str, Path]:
    """A reranker and a teacher of one layer, 16 wide, with real tokenizers."""
    torch.manual_seed(0)
    paths = {name: folder / name for name in ("reranker", "teacher")}
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    size = len(_tokenizer("bundled:splade-tiny", paths["reranker"]))
    config = BertConfig(vocab_size=size, num_labels=1, **small)
    BertForSequenceClassification(config).save_pretrained(paths["reranker"])
    size = len(_tokenizer("bundled:smollm2-135m", paths["teacher"]))
    LlamaForCausalLM(LlamaConfig(vocab_size=size, **small)).save_pretrained(paths["teacher"])
    return paths


def _tokenizer(model: str, folder: Path) -> AutoTokenizer:
    """The tokenizer of a bundled model, saved in a folder."""
    name, pinned = loadable(resolve(model))
    tokenizer = AutoTokenizer.from_pretrained(name, **pinned)
    tokenizer.save_pretrained(folder)
    return tokenizer
