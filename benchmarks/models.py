"""A cross-encoder of MiniLM-L6's size with random weights: none can be had without a hub."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from scaledown.models.sources import resolve
from scaledown.models.weights import loadable


def minilm(folder: Path) -> Path:
    """6 layers, 384 wide, 12 heads, as cross-encoder/ms-marco-MiniLM-L-6-v2; BERT's own vocabulary."""
    torch.manual_seed(0)
    name, pinned = loadable(resolve("bundled:splade-tiny"))
    tokenizer = AutoTokenizer.from_pretrained(name, **pinned)
    tokenizer.save_pretrained(folder)
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
