"""A query is read once for all its documents, with the results of reading it before each document."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from scaledown.models.sources import resolve
from scaledown.student.batch import Document, group
from scaledown.student.compressors import queries
from scaledown.student.model import ScaleDownModel
from scaledown.student.settings import ScaleDownConfig

KINDS = ("n_layers", "n_layers with a head", "pointer")
LONG = "When was the iron tower in the capital city built, and who painted it so many times over the years?"
QUERIES = [LONG, LONG.replace("tower", "bridge"), LONG + " Who wrote it?"]
DOCUMENTS = [
    ["The tower was built in 1889.", "Tides come and go.", "A book about it was never printed anywhere."],
    ["A woman wrote it in 1922 and in 1923.", "Nobody knows."],
    ["It was painted by sixty people, and later by nobody at all.", "", "Books."],
]


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, models: dict[str, Path]) -> ScaleDownModel:
    torch.manual_seed(0)
    kind, _, head = request.param.partition(" ")
    config = ScaleDownConfig(
        compressor=kind,
        num_layers=2,
        doc_max_length=48,
        query_max_length=64,
        compression_rate=8,
        enable_reranking=bool(head),
    )
    made = ScaleDownModel.build(config, resolve(str(models["causal_lm"])))
    if kind == "pointer":
        for parameter in made.pointer.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


@contextmanager
def tokens_read(model: ScaleDownModel) -> Iterator[list[int]]:
    """Collect the tokens of each pass of the compressor's first layer, padding included."""
    counts: list[int] = []
    layer = model.compressor.layers[0]
    handle = layer.register_forward_pre_hook(lambda _, given: counts.append(given[0].shape[:2].numel()))
    yield counts
    handle.remove()


def documents_of(model: ScaleDownModel) -> list[Document]:
    return [
        one for query, own in zip(QUERIES, DOCUMENTS, strict=True) for one in model.reader.read(query, own)
    ]


@torch.no_grad()
def test_results_are_those_of_reading_query_and_document_together(model: ScaleDownModel) -> None:
    read = documents_of(model)
    expected = model.compress_ids(group(read))
    groups = queries.grouped(model.compressor, read, 64, "cpu")
    assert len(groups) > 1
    assert all("queries" in own for own in groups)
    found = model.compress_ids(groups)
    assert found.counts == expected.counts
    torch.testing.assert_close(found.embeddings, expected.embeddings, rtol=1e-4, atol=1e-4)
    if expected.relevance is not None:
        torch.testing.assert_close(found.relevance, expected.relevance, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_compress_reads_each_query_once(model: ScaleDownModel) -> None:
    read = documents_of(model)
    with tokens_read(model) as together:
        model.compress_ids(group(read))
    with tokens_read(model) as counts:
        model.compress(QUERIES, DOCUMENTS)
    assert counts[0] == len(QUERIES) * max(one.start for one in read)
    assert sum(counts) < 0.8 * sum(together)


def test_documents_together_have_the_results_of_each_alone(model: ScaleDownModel) -> None:
    asked = [(query, one) for query, own in zip(QUERIES, DOCUMENTS, strict=True) for one in own]
    together = [one for own in model.compress(QUERIES, DOCUMENTS) for one in own]
    for (query, document), found in zip(asked, together, strict=True):
        torch.testing.assert_close(found, model.compress(query, [document])[0], rtol=1e-4, atol=1e-4)
    if model.config.ranks:
        scores = [one for own in model.rerank(QUERIES, DOCUMENTS) for one in own]
        alone = [model.rerank(query, [document])[0] for query, document in asked]
        assert scores == pytest.approx(alone, rel=1e-4, abs=1e-4)


def test_nothing_is_read_ahead_where_it_saves_little(model: ScaleDownModel) -> None:
    short = model.reader.read("Why?", ["Tides come.", "Tides go."])
    assert all("queries" not in own for own in queries.grouped(model.compressor, short, 4096, "cpu"))
    without = [Document(own.ids[own.start :], 0, own.stop - own.start, 1) for own in documents_of(model)]
    assert all("queries" not in own for own in queries.grouped(model.compressor, without, 4096, "cpu"))


@pytest.mark.parametrize(
    "settings",
    [{"sliding_window": 8, "layer_types": ["sliding_attention"] * 2}, {"sliding_window": 8}],
)
def test_layers_that_drop_keys_read_query_and_document_together(settings: dict[str, Any]) -> None:
    from transformers import MistralConfig, MistralModel

    small = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}
    config = MistralConfig(**small, num_hidden_layers=2, intermediate_size=8, **settings)
    read = [Document([3] * 40 + [number], 40, 41, 1) for number in range(9)]
    with torch.no_grad():
        assert "queries" not in queries.grouped(MistralModel(config), read, 4096, "cpu")[0]
        config.sliding_window = None
        if "layer_types" not in settings:
            assert "queries" in queries.grouped(MistralModel(config), read, 4096, "cpu")[0]
