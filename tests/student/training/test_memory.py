"""What training holds, counted on weights that have shapes alone, is what the page says."""

import re
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MistralConfig

from conftest import ROOT
from scaledown.student.model import ScaleDownModel
from scaledown.student.settings import ScaleDownConfig
from scaledown.student.training.memory import Memory, memory_of

MISTRAL = MistralConfig(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
SMOLLM = LlamaConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
GENERATORS = {"Mistral-7B": MISTRAL, "SmolLM2-135M": SMOLLM}
ROWS = re.findall(
    r"^\| (Mistral-7B|SmolLM2-135M)(, 4 bits, `adamw8bit`)? \| `(n_layers|pointer)`, (\d+) layers "
    + r"\| ([\d.]+) " * 5
    + r"\|$",
    (ROOT / "docs" / "student.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


def shapes(generator: Any, **settings: Any) -> ScaleDownModel:
    """A student without any values, as a run in bfloat16 makes it ready."""
    config = ScaleDownConfig(generator=generator.to_dict(), generator_name="x", **settings)
    with torch.device("meta"):
        model = ScaleDownModel(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else torch.bfloat16)
    return model


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row[:4]))
def test_memory_table_equals_the_weights(row: tuple[str, ...]) -> None:
    generator, small, compressor, layers, *shown = row
    model = shapes(GENERATORS[generator], compressor=compressor, num_layers=int(layers))
    if small:
        in_4_bits(model)
    found = memory_of(model, "adamw8bit" if small else "adamw")
    assert [f"{size / 1e9:.1f}" for size in (*found, sum(found))] == shown


def in_4_bits(model: ScaleDownModel) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra: quantization")
    from bitsandbytes.functional import quantize_4bit

    from scaledown.student.training.quantization import quantize

    quantize_4bit(torch.ones(64), compress_statistics=True)  # makes a table, which is to have values
    quantize(model.generator)


def test_the_papers_student_is_in_the_table_and_fits_24_gb_in_4_bits() -> None:
    papers = [row for row in ROWS if (row[0], *row[2:4]) == ("Mistral-7B", "n_layers", "8")]
    assert [float(row[-1]) for row in papers] == [45.2, 23.4]
    trained = sum(
        parameter.numel()
        for parameter in shapes(MISTRAL, num_layers=8).parameters()
        if parameter.requires_grad
    )
    assert 1.91e9 < trained < 1.93e9


def test_memory_is_shown_in_gigabytes() -> None:
    shown = str(Memory(14_500_000_000, 7_670_000_000, 7_670_000_000, 15_340_000_000))
    assert shown == (
        "45.2 GB before any example: frozen weights 14.5, trained weights 7.7, gradients 7.7, "
        "moments of AdamW 15.3"
    )
