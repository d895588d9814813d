"""A query is read once for all its documents, with the results of reading it before each document."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from scaledown.models.sources import resolve
from scaledown.student.batch import EncodedDocument, group
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


def documents_of(model: ScaleDownModel) -> list[EncodedDocument]:
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
    without = [
        EncodedDocument(own.ids[own.start :], 0, own.stop - own.start, 1) for own in documents_of(model)
    ]
    assert all("queries" not in own for own in queries.grouped(model.compressor, without, 4096, "cpu"))


SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 64}
LLAMA = SMALL | {"num_key_value_heads": 1, "intermediate_size": 16}
LEARNED = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64}
MOST = 156
"""Positions of `READ`: its longest query and document, the memory token, and the reranking token."""


def model_of(kind: str, **settings: Any) -> Any:
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    made = AutoModel.from_config(AutoConfig.for_model(kind, pad_token_id=0, **settings)).eval()
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return made


def asked(query: int, documents: Sequence[int], seed: int) -> list[EncodedDocument]:
    """Documents of so many tokens behind one query of `query` tokens."""
    random = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(1, 64, (count,), generator=random).tolist()

    before = tokens(query)
    return [EncodedDocument(before + tokens(count), query, query + count, 1) for count in documents]


READ = [*asked(80, [0, 7, 14, 7], 0), *asked(20, [30, 70, 74, 3, 0], 1), *asked(50, [9, 30], 2)]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gpt2", LEARNED | {"n_positions": MOST}),
        (
            "gpt_neo",
            SMALL
            | {
                "num_layers": 2,
                "num_heads": 2,
                "attention_types": [[["global", "local"], 1]],
                "window_size": 8,
                "max_position_embeddings": MOST,
            },
        ),
        ("falcon", SMALL | {"alibi": True, "multi_query": False}),
        ("mistral", LLAMA | {"sliding_window": None}),
        ("qwen2", LLAMA),
        ("phi", LLAMA | {"num_key_value_heads": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@torch.no_grad()
def test_states_are_those_of_reading_query_and_document_together(kind: str, settings: dict[str, Any]) -> None:
    """Also where padding reaches the model's last position."""
    made = model_of(kind, **settings)
    extra = torch.randn(2, 16) * 0.2
    groups = queries.grouped(made, READ, 400, "cpu")
    assert all("queries" in own for own in groups)
    seen = 0
    for own in groups:
        states = queries.states_after_queries(made, own, extra)
        for row, place in enumerate(own["places"].tolist()):
            one = READ[place]
            ids = torch.tensor([one.ids])
            embedded = torch.cat([made.get_input_embeddings()(ids)[0], extra])[None]
            expected = made(inputs_embeds=embedded).last_hidden_state[0, one.start :]
            torch.testing.assert_close(states[row, : len(expected)], expected, rtol=1e-4, atol=1e-4)
            seen += 1
    assert seen == len(READ)


def test_more_positions_than_the_model_has_are_not_used() -> None:
    for most, used in ((MOST, True), (MOST - 1, False)):
        made = model_of("gpt2", **LEARNED, n_positions=most)
        with torch.no_grad():
            assert all(("queries" in own) == used for own in queries.grouped(made, READ, 400, "cpu"))


@torch.no_grad()
def test_most_tokens_bound_a_group() -> None:
    made = model_of("qwen2", **LLAMA)
    many = [one for seed in range(12) for one in asked(40, [2, 3, 50, 1], seed)]
    read: list[int] = []
    handle = made.layers[0].register_forward_pre_hook(
        lambda _, given: read.append(given[0].shape[:2].numel())
    )
    groups = queries.grouped(made, many, 200, "cpu")
    handle.remove()
    assert read == [200, 200, 80]  # 12 queries of 40 tokens
    for own in groups:
        assert len(own["ids"]) * int(own["lengths"].max()) <= 200
    assert sorted(place for own in groups for place in own["places"].tolist()) == list(range(len(many)))


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text", "jamba"])
def test_layers_that_drop_keys_read_query_and_document_together(kind: str) -> None:
    from transformers import AutoConfig

    class Compressor:
        config = AutoConfig.for_model(kind, sliding_window=8)

        def forward(self, position_ids: torch.Tensor) -> None: ...

    read = [EncodedDocument([3] * 40 + [number], 40, 41, 1) for number in range(9)]
    assert all("queries" not in own for own in queries.grouped(Compressor(), read, 4096, "cpu"))
