"""Costs equal the formula of a transformer, and are reported for the requested sizes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from scaledown.config.evaluate import COMPRESSED, UNCOMPRESSED
from scaledown.evaluation import efficiency
from scaledown.evaluation.efficiency import Seconds, Shape, costs, inputs
from scaledown.models.sources import resolve
from scaledown.student.model import ScaleDownModel
from scaledown.student.settings import ScaleDownConfig

SHAPE = Shape(query_tokens=6, documents=3, document_tokens=20, new_tokens=4)


@pytest.fixture
def model(models: dict[str, Path]) -> ScaleDownModel:
    settings = ScaleDownConfig(num_layers=1, doc_max_length=64, compression_rate=16)
    return ScaleDownModel.build(settings, resolve(str(models["causal_lm"]))).eval()


class Formula:
    """FLOPs of a Llama-like model: two to a multiply and add, norms and the like left out."""

    def __init__(self, model: ScaleDownModel) -> None:
        self.of = model.generator.config

    def layer(self, tokens: int, seen: int) -> int:
        wide, heads, shared = self.of.hidden_size, self.of.num_attention_heads, self.of.num_key_value_heads
        size = getattr(self.of, "head_dim", None) or wide // heads
        weights = 2 * wide * heads * size + 2 * wide * shared * size + 3 * wide * self.of.intermediate_size
        return 2 * tokens * weights + 4 * heads * size * tokens * seen

    def generation(self, prompt: int, new: int) -> int:
        steps = [(prompt, prompt), *((1, prompt + number) for number in range(1, new))]
        output = 2 * self.of.hidden_size * self.of.vocab_size
        return sum(self.of.num_hidden_layers * self.layer(*step) + output for step in steps)


def test_flops_are_those_of_the_formula(model: ScaleDownModel) -> None:
    compressed, text = costs(model, [1], shape=SHAPE, repeats=1)
    (query,), (documents,) = inputs(model, 1, SHAPE)
    read = model.reader.encode(query, documents)
    formula = Formula(model)
    memory = model.config.memory_tokens
    lengths = [len(one.ids) + memory for one in read.documents]
    assert len(set(lengths)) == 1, "nothing is padded"
    assert compressed.compression_flops == sum(formula.layer(length, length) for length in lengths)
    prompt = read.prompt_length
    assert compressed.generation_flops == formula.generation(prompt, SHAPE.new_tokens)
    whole = model.reader.encode_text(query, documents, SHAPE.new_tokens)
    assert text.generation_flops == formula.generation(whole.prompt_length, SHAPE.new_tokens)
    assert text.compression_flops == 0
    assert compressed.flops == compressed.compression_flops + compressed.generation_flops


def test_flops_of_a_pointer_are_those_of_the_formula(models: dict[str, Path]) -> None:
    settings = ScaleDownConfig(compressor="pointer", num_layers=1, doc_max_length=64, compression_rate=16)
    model = ScaleDownModel.build(settings, resolve(str(models["causal_lm"]))).eval()
    compressed, text = costs(model, [1], shape=SHAPE, repeats=1)
    (query,), (documents,) = inputs(model, 1, SHAPE)
    read = model.reader.encode(query, documents)
    formula = Formula(model)
    lengths = [len(one.ids) for one in read.documents]
    assert len(set(lengths)) == 1, "nothing is padded"
    layers = sum(formula.layer(length, length) for length in lengths)
    own, picked = (
        sum(one.stop - one.start for one in read.documents),
        sum(one.memory for one in read.documents),
    )
    scorer = model.pointer
    of_each = [scorer.linear, scorer.score_state, scorer.narrow, scorer.context, scorer.score_context]
    weights = [w.numel() for part in of_each for w in part.parameters() if w.ndim == 2]
    assert compressed.compression_flops == (
        layers + 2 * own * sum(weights) + 2 * picked * scorer.carry.weight.numel()
    )
    assert compressed.generation_flops == formula.generation(read.prompt_length, SHAPE.new_tokens)
    whole = model.reader.encode_text(query, documents, SHAPE.new_tokens)
    assert text.generation_flops == formula.generation(whole.prompt_length, SHAPE.new_tokens)


@pytest.mark.parametrize(
    ("kernel", "more"),
    [("flash_attention", ()), ("efficient_attention", (None, False)), ("cudnn_attention", (None, False))],
)
def test_attention_whose_heads_share_keys_counts_the_same_on_a_gpu(
    kernel: str, more: tuple[object, ...]
) -> None:
    """Mistral has 32 heads of queries and 8 of keys; torch's own formula fails there."""
    operator = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}")
    attention = torch.nn.functional.scaled_dot_product_attention
    query, key = torch.zeros(2, 4, 8, 16), torch.zeros(2, 2, 10, 16)
    on_a_cpu = efficiency.flops(lambda: attention(query, key, key, enable_gqa=True))
    with FakeTensorMode():
        query, key = (torch.empty(one.shape, device="cuda", dtype=torch.bfloat16) for one in (query, key))
        assert efficiency.flops(lambda: operator(query, key, key, *more)) == on_a_cpu
    assert on_a_cpu == 2 * 2 * 4 * 8 * 10 * (16 + 16)


def test_a_recurrent_layer_counts_the_same_on_a_gpu() -> None:
    """By the operator of cuDNN, on shapes alone."""
    layer = torch.nn.GRU(10, 6, bidirectional=True, batch_first=True)
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.zeros(2, 5, 10), torch.tensor([5, 3]), True)
    weights = [parameter.to("meta") for parameter in layer.parameters()]
    read, state = packed.data.to("meta"), torch.zeros(2, 2, 6, device="meta")
    sizes = packed.batch_sizes.tolist()

    def on_a_gpu() -> object:
        return torch.ops.aten._cudnn_rnn(
            *(read, weights, 4, None, state, None, 3, 6, 0, 1, False, 0.0, False, True, sizes, None)
        )

    assert efficiency.flops(on_a_gpu) == efficiency.flops(lambda: layer(packed)) > 0


def test_batches_and_sides(model: ScaleDownModel) -> None:
    stops = model.generator.generation_config.eos_token_id
    found = costs(model, [2, 1, 2], shape=SHAPE, repeats=3)
    assert [(one.batch, one.system) for one in found] == [
        (batch, system) for batch in (1, 2) for system in (COMPRESSED, UNCOMPRESSED)
    ]
    for one in found:
        assert one.generation.low <= one.generation.median <= one.generation.high
        assert one.seconds == one.compression.median + one.generation.median
        assert one.peak_bytes is None or one.peak_bytes > 10_000_000
    assert model.generator.generation_config.eos_token_id == stops


def test_costs_end_at_the_first_batch_that_does_not_fit(
    model: ScaleDownModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    measure = efficiency._of_batch

    def small(
        model: ScaleDownModel, batch: int, shape: Shape, repeats: int, way: dict[str, Any]
    ) -> list[efficiency.Cost]:
        if batch > 1:
            raise torch.OutOfMemoryError
        return measure(model, batch, shape, repeats, way)

    monkeypatch.setattr(efficiency, "_of_batch", small)
    with caplog.at_level("WARNING", logger="scaledown"):
        found = costs(model, [1, 4, 8], shape=SHAPE, repeats=1)
    assert {one.batch for one in found} == {1}
    assert "batches of 4 and more do not fit" in caplog.text


def test_halved_batches_are_not_reported_as_whole_ones(
    model: ScaleDownModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    generate = model._generate

    def small(questions: Sequence[Any], *arguments: Any) -> list[str]:
        if len(questions) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(questions, *arguments)

    monkeypatch.setattr(model, "_generate", small)
    with caplog.at_level("WARNING", logger="scaledown"):
        found = costs(model, [2, 4, 8], shape=SHAPE, repeats=1)
    assert {one.batch for one in found} == {2}
    assert "batches of 4 and more do not fit" in caplog.text


def test_words_are_one_token_each(model: ScaleDownModel) -> None:
    (query,), (documents,) = inputs(model, 1, SHAPE)
    length = len(model.tokenizer(query, add_special_tokens=False)["input_ids"])
    assert abs(length - SHAPE.query_tokens) <= 1
    assert len(documents) == SHAPE.documents


def test_medians_and_quartiles_are_per_query() -> None:
    assert Seconds.of([2.0, 4.0, 10.0], 2) == Seconds(2.0, 1.5, 3.5)
    assert Seconds.of([3.0], 3) == Seconds(1.0, 1.0, 1.0)
