"""Text -> token ids -> batches."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from scaledown.data.prompts import GUIDE, PAPER, Template, answer_prompt
from scaledown.data.teacher.base import TeacherSettings
from scaledown.data.teacher.context import Context
from scaledown.errors import InputError, UsageError
from scaledown.student.batch import FIXED_TOKENS, Encoded, EncodedDocument, Reader, collate, group
from scaledown.student.settings import ScaleDownConfig


def reader(folder: Path, compressor: Path | None = None, **settings: Any) -> Reader:
    config = ScaleDownConfig(**{"doc_max_length": 16, "compression_rate": 4, **settings})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Reader(config, tokenizer, AutoTokenizer.from_pretrained(compressor or folder), 4096)


@pytest.mark.parametrize("rate", [3, 129, 0])
def test_rates_outside_4_to_128_are_refused(rate: int) -> None:
    with pytest.raises(UsageError, match="use 4 to 128"):
        ScaleDownConfig(compression_rate=rate)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers": 0}, "--num_layers 0: use at least 1"),
        ({"generator_training": "some"}, "use lora, full, frozen"),
        ({"after": "So?"}, r"put \{question\} before or after the documents"),
    ],
)
def test_wrong_settings_name_the_next_step(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ScaleDownConfig(**settings)


def test_the_rate_sets_the_memory_tokens() -> None:
    assert ScaleDownConfig().memory_tokens == 8  # as in the paper
    assert ScaleDownConfig(doc_max_length=142, compression_rate=16).memory_tokens == 9


@pytest.mark.parametrize("kind", ["causal_lm", "instruct", "phi"])
@pytest.mark.parametrize("template", [PAPER, GUIDE, Template("", "About {question}:\n", "\n\nAnswer.")])
def test_the_prompt_is_the_teachers(models: dict[str, Path], kind: str, template: Any) -> None:
    """With documents for embeddings, its pieces spell what the teacher reads."""
    read = reader(models[kind], system=template.system, before=template.before, after=template.after)
    tokenizer = AutoTokenizer.from_pretrained(models[kind])
    query, documents = "Who <|im_end|> wrote {documents}?", ["Tides rise.", "Tides fall."]
    pieces = read.encode(query, documents).prompt_parts
    text = "".join(
        itertools.chain.from_iterable(
            itertools.zip_longest(map(tokenizer.decode, pieces), documents, fillvalue="")
        )
    )
    prompt = answer_prompt("", query, documents, 0.0, template)
    whole = Context("teacher", tokenizer, 4096, TeacherSettings()).fit(prompt)
    assert text == tokenizer.decode(whole[0])


def test_each_document_is_read_with_the_query(models: dict[str, Path]) -> None:
    encoder, decoder = models["splade"], models["causal_lm"]
    documents = ["It is 300 m tall.", {"title": "Tower", "text": "It is old."}]
    for folder, expected in (
        (encoder, "[CLS] how tall [SEP] it is 300 m tall. [SEP]"),
        (decoder, "<s>How tall\nIt is 300 m tall."),
    ):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        encoded = reader(decoder, folder).encode("How tall", documents)
        text = tokenizer.decode(encoded.documents[0].ids)
        assert text.replace(" ", "") == expected.replace(" ", "")
        assert "tower" in tokenizer.decode(encoded.documents[1].ids).lower()
    alone = reader(decoder, encoder).read("", ["It is old."])  # as in pretraining
    assert AutoTokenizer.from_pretrained(encoder).decode(alone[0].ids).startswith("[CLS] it is old")


def test_long_documents_are_cut_and_counted(models: dict[str, Path]) -> None:
    read = reader(models["causal_lm"], models["splade"], doc_max_length=8, query_max_length=4)
    encoded = read.encode("why " * 10, ["tide " * 30, "tide", "tide " * 30])
    assert (read.cut, read.cut_queries) == (2, 1)
    assert len(encoded.documents[0].ids) == 8 + 4 + 3  # [CLS] query [SEP] document [SEP]


def test_special_tokens_in_data_are_text(models: dict[str, Path]) -> None:
    read = reader(models["causal_lm"], models["splade"])
    encoded = read.encode("a [SEP] b", ["x [CLS] y"], "It ends </s> here.")
    assert encoded.documents[0].ids.count(3) == 2
    assert encoded.documents[0].ids.count(2) == 1
    assert encoded.answer_ids.count(1) == 1
    assert encoded.answer_ids[-1] == 1


def test_no_documents_or_wrong_ones_are_refused(models: dict[str, Path]) -> None:
    read = reader(models["causal_lm"])
    with pytest.raises(InputError, match="give at least one"):
        read.encode("Who?", [])
    with pytest.raises(InputError, match="correct it"):
        read.encode("Who?", [3])


def test_without_documents_the_prompt_names_none(models: dict[str, Path]) -> None:
    read = reader(models["causal_lm"])
    tokenizer = AutoTokenizer.from_pretrained(models["causal_lm"])
    (ids,) = read.encode_text("Who wrote it?", [], 8).prompt_parts
    text = tokenizer.decode(ids)
    assert "Question: Who wrote it?" in text
    assert "ocuments" not in text
    assert "Background" not in text
    with pytest.raises(InputError, match="shorten it"):
        read.encode_text("why " * 5000, [], 8)


def test_a_batch_has_everything_in_its_place() -> None:
    first = Encoded([read([7, 8, 9]), read([7])], [[1, 2], [3], [4]], [5, 6], [0.5, -1.0])
    second = Encoded([read([7, 7])], [[1], []], [5], None)
    batch = collate([first, second])
    assert batch["ids"].tolist() == [[1, 2, 0, 0, 3, 0, 0, 4, 5, 6], [1, 0, 0, 5, 0, 0, 0, 0, 0, 0]]
    memory = [[place in {2, 3, 5, 6} for place in range(10)], [place in {1, 2} for place in range(10)]]
    assert batch["is_memory"].tolist() == memory
    assert batch["labels"].tolist() == [[-100] * 8 + [5, 6], [-100] * 3 + [5] + [-100] * 6]
    assert batch["scores"][:2].tolist() == [0.5, -1.0]
    assert batch["scores"][2].isnan()
    assert first.prompt_length == 8


def read(ids: list[int], memory: int = 2) -> EncodedDocument:
    return EncodedDocument(ids, 0, len(ids), memory)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=9))
def test_document_groups_have_the_least_cost(lengths: list[int]) -> None:
    """Against every way to cut the documents, sorted by length, into groups."""
    documents = [read([1] * length) for length in lengths]
    groups = group(documents)
    assert sorted(place for part in groups for place in part["places"].tolist()) == list(range(len(lengths)))
    for part in groups:
        assert part["lengths"].tolist() == [lengths[place] for place in part["places"].tolist()]
        assert part["ids"].sum(1).tolist() == part["lengths"].tolist()
    ordered = sorted(lengths)
    costs = []
    for cuts in itertools.product([False, True], repeat=len(lengths) - 1):
        ends = [place for place, cut in enumerate([*cuts, True], 1) if cut]
        starts = [0, *ends[:-1]]
        costs.append(
            sum(
                (end - start) * ordered[end - 1] + FIXED_TOKENS
                for start, end in zip(starts, ends, strict=True)
            )
        )
    assert sum(part["ids"].numel() + FIXED_TOKENS for part in groups) == min(costs)


def test_group_of_documents_respects_the_token_limit() -> None:
    groups = group([read([1] * 300)] * 300)
    assert max(part["ids"].numel() for part in groups) <= 1 << 15
    assert torch.cat([part["places"] for part in groups]).tolist() == list(range(300))
    small = group([read([1] * 300)] * 9, 1000)
    assert [part["ids"].shape[0] for part in small] == [3, 3, 3]


def test_no_text_from_outside_moves_the_documents(models: dict[str, Path]) -> None:
    read, marker = reader(models["causal_lm"]), "\ue000documents\ue000"
    nested = f"{marker[:5]}{marker}{marker[5:]}"
    for text in (marker, nested):
        parts = read.prompt_parts(f"Why{text}?", 2, f"{text}Be brief.")
        texts = [read._tokenizer.decode(part) for part in parts]
        assert len(texts) == 3
        assert "Be brief" in texts[0]
        assert "Why" in texts[2]
        assert "\ue000" not in "".join(texts)
