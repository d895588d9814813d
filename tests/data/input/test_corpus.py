import bz2
import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import tiny
from scaledown.config.prepare import PrepareConfig
from scaledown.data.input import files, tables
from scaledown.data.input.chunking import Chunker, Words, sentence_spans, splits_at_spaces
from scaledown.data.input.corpus import (
    PassageTable,
    build_passages,
    bundled_corpus,
    parse_article,
    parse_block,
)
from scaledown.errors import InputError
from scaledown.models.sources import resolve
from scaledown.records import Article, Block, Passage, full_text
from scaledown.run.directory import RunDirectory
from scaledown.run.stage import Stage


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    word_pieces = tiny.word_pieces(tmp_path_factory.mktemp("tokenizer"))
    return word_pieces.backend_tokenizer


@pytest.fixture(scope="module")
def byte_pairs(tmp_path_factory: pytest.TempPathFactory):
    return tiny.bytes_pairs(tmp_path_factory.mktemp("pairs"), None).backend_tokenizer


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def cut(chunker: Chunker, batch: list[Article]) -> list[list[Passage]]:
    return [[passage for passage, _ in pieces] for pieces in chunker.passages(batch)]


words = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=12)
paragraph = st.lists(
    words | st.sampled_from(["Dr.", "3.5", "end.", "Really?", "(so)", "x" * 400]), max_size=40
).map(" ".join)
articles = st.builds(
    Article,
    st.just("a"),
    st.text("abc déf", max_size=60).map(lambda text: " ".join(text.split())),
    st.lists(st.builds(Block, paragraph.map(str.strip).filter(bool), st.booleans()), max_size=6).map(tuple),
)


@pytest.mark.parametrize("kind", ["tokenizer", "byte_pairs"])
@settings(max_examples=60, deadline=None)
@given(batch=st.lists(articles, max_size=3), limit=st.integers(16, 60))
def test_passages_lose_nothing_and_keep_the_limit(kind, batch, limit, request) -> None:
    tokenizer = request.getfixturevalue(kind)
    found = Chunker(tokenizer, "tokens", limit).passages(batch)
    assert len(found) == len(batch)
    for article, passages in zip(batch, found, strict=True):
        text = "".join(passage.text for passage, _ in passages)
        assert squeezed(text) == squeezed("".join(block.text for block in article.blocks))
        for number, (passage, ids) in enumerate(passages):
            assert passage.passage_id == f"a_{number}"
            assert passage.doc_id == "a"
            assert passage.text.strip()
            assert list(ids) == tokens(tokenizer, full_text(passage.title, passage.text))
            assert len(ids) <= limit or len(passage.text) == 1


def tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


@settings(max_examples=400, deadline=None)
@given(
    st.text(
        st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \t\n\x0b\x1c\x85\u2028.,'東京é́"),
        max_size=80,
    )
)
def test_words_one_by_one_have_the_tokens_of_the_text(tokenizer, text) -> None:
    assert Words(tokenizer).ids(text) == tokens(tokenizer, text)


def test_only_word_pieces_are_taken_word_by_word(tokenizer, byte_pairs) -> None:
    assert splits_at_spaces(tokenizer)
    assert not splits_at_spaces(byte_pairs)


@pytest.mark.parametrize("kind", ["tokenizer", "byte_pairs"])
def test_a_million_characters_without_a_space_become_many_passages(kind, request) -> None:
    article = Article("1", "T", (Block("x" * 1_000_000),))
    passages = cut(Chunker(request.getfixturevalue(kind), "tokens", 128), [article])[0]
    assert "".join(passage.text for passage in passages) == "x" * 1_000_000
    assert max(len(passage.text) for passage in passages) <= 64 * 128


def test_passages_never_cross_articles(tokenizer) -> None:
    batch = [Article(str(i), f"Title {i}", (Block(f"Only article {i}. " * 30),)) for i in range(3)]
    for article, passages in zip(batch, cut(Chunker(tokenizer, "tokens", 32), batch), strict=True):
        assert len(passages) > 1
        for passage in passages:
            assert passage.doc_id == article.doc_id
            assert set(re.findall(r"article (\d)", passage.text)) == {article.doc_id}
            assert passage.title == article.title


def test_passages_end_at_sentence_ends(tokenizer) -> None:
    text = "The tower is tall. It was built in 1889. Many people visit it each year. " * 6
    passages = cut(Chunker(tokenizer, "tokens", 40), [Article("1", "Tower", (Block(text.strip()),))])[0]
    assert len(passages) > 2
    assert all(passage.text.endswith(".") for passage in passages)


def test_heading_stays_with_the_next_paragraph(tokenizer) -> None:
    blocks = (
        Block("First words here. " * 5),
        Block("History", is_heading=True),
        Block("It began early. " * 5),
    )
    passages = cut(Chunker(tokenizer, "tokens", 40), [Article("1", "T", blocks)])[0]
    assert not any(passage.text.endswith("History") for passage in passages)
    assert any("History\nIt began early." in passage.text for passage in passages)


def test_other_passage_modes(tokenizer) -> None:
    blocks = (Block("One."), Block("Head", is_heading=True), Block("Two."), Block("Three."))
    article = Article("7", "T", blocks)
    by_paragraph = cut(Chunker(tokenizer, "paragraph", 128), [article])[0]
    assert [passage.text for passage in by_paragraph] == ["One.", "Head\nTwo.", "Three."]
    whole = cut(Chunker(tokenizer, "article", 128), [article])[0]
    assert [passage.text for passage in whole] == ["One.\nHead\nTwo.\nThree."]


def test_sentences_cover_the_text() -> None:
    text = 'He said "Stop!" Then he left. Did he? 東京です。大阪です。 End'
    pieces = [text[start:end] for start, end in sentence_spans(text)]
    assert "".join(pieces) == text
    assert [piece.strip() for piece in pieces] == [
        'He said "Stop!"',
        "Then he left.",
        "Did he?",
        "東京です。",
        "大阪です。",
        "End",
    ]


def test_kilt_markers() -> None:
    assert parse_block("Section::::History.:Early years.\n") == Block("History: Early years", is_heading=True)
    assert parse_block("BULLET::::- An item\n") == Block("- An item")
    assert parse_block("BULLET::::2. Second\n") == Block("2. Second")
    record = {"wikipedia_id": "12", "wikipedia_title": "Anarchism", "text": ["Anarchism\n", "It is.\n", "\n"]}
    assert parse_article(record, "x") == Article("12", "Anarchism", (Block("It is."),))


@pytest.mark.parametrize(
    "record",
    [
        {"id": "1", "title": "T", "text": "First.\nSecond."},
        {"_id": 1, "title": "T", "contents": ["First.", "Second."]},
        {"kilt_id": "1", "wikipedia_title": "T", "text": {"paragraph": ["T\n", "First.\n", "Second.\n"]}},
    ],
)
def test_every_shape_of_record(record) -> None:
    assert parse_article(record, "x") == Article("1", "T", (Block("First."), Block("Second.")))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"id": "1"}, "no text"),
        ({"id": "1", "text": 5}, "text must be"),
        ({"id": "1", "text": ["a", 3]}, "text must be"),
        ({"id": [1], "text": "a"}, "the id is"),
        ({"id": True, "text": "a"}, "the id is"),
        ({"id": "1", "title": ["4"], "text": "a"}, "the title is"),
    ],
)
def test_records_that_are_none(record, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_article(record, "x")


def config(**settings) -> PrepareConfig:
    return PrepareConfig(queries_file=("q",), output_file="o.json", **settings)


def passages_of(path: Path, work: Path, models: dict[str, Path], **settings) -> Stage:
    stage = Stage(RunDirectory(work), "passages", {"path": str(path), **settings})
    build_passages(stage, config(**settings), [path], resolve(str(models["splade"])))
    return stage


RECORDS = [{"id": str(i), "title": f"Title {i}", "text": f"Text number {i}."} for i in range(5)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def test_articles_with_equal_ids_get_a_number_also_after_a_crash(tmp_path: Path, models) -> None:
    path = tmp_path / "c.jsonl"
    records = [RECORDS[0], RECORDS[1], RECORDS[0], {"id": "2", "text": ""}, RECORDS[2], RECORDS[0]] * 20
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    whole = passages_of(path, tmp_path / "whole", models, passages_per_shard=16)
    assert len(whole.finished().rows) > 3
    assert whole.finished().counts["ids_made_unique"] == 97
    articles = [record["doc_id"] for table in whole.tables() for record in table.to_pylist()]
    assert articles[:6] == ["0", "1", "0#2", "2", "0#3", "0#4"]
    assert len(set(articles)) == 100
    assert whole.table(0).column("passage_id")[2].as_py() == "0#2_0"
    parts = Stage(RunDirectory(tmp_path / "part"), "passages", {"path": str(path), "passages_per_shard": 16})
    for shard in (0, 1):
        parts.write(shard, whole.table(shard))
    again = passages_of(path, tmp_path / "part", models, passages_per_shard=16)
    assert [table.to_pylist() for table in again.tables()] == [t.to_pylist() for t in whole.tables()]
    assert again.finished().counts == whole.finished().counts


def _write(path: Path, kind: str) -> Path:
    if kind == "parquet":
        path = path / "c.parquet"
        pq.write_table(pa.Table.from_pylist(RECORDS), path)
    elif kind == "csv":
        path = path / "c.csv"
        path.write_text(
            "id,title,text\n" + "".join(f'{r["id"]},{r["title"]},"{r["text"]}"\n' for r in RECORDS)
        )
    elif kind == "folder":
        path = path / "c"
        path.mkdir()
        for record in RECORDS:
            (path / f"{record['title']}.txt").write_text(record["text"])
    else:
        squeeze = {
            "jsonl": bytes,
            "gz": gzip.compress,
            "bz2": bz2.compress,
            "zst": lambda data: pa.compress(data, "zstd", asbytes=True),
        }[kind]
        path = path / ("c.jsonl" if kind == "jsonl" else f"c.jsonl.{kind}")
        path.write_bytes(squeeze(LINES))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "gz", "bz2", "zst", "parquet", "csv", "folder"])
def test_every_kind_of_file(kind: str, tmp_path: Path, models) -> None:
    stage = passages_of(_write(tmp_path, kind), tmp_path / "w", models)
    table = PassageTable(stage)
    assert len(table) == 5
    assert [table[row].title for row in range(5)] == [f"Title {i}" for i in range(5)]
    assert table[3].text == "Text number 3."


@pytest.mark.parametrize("kind", ["gz", "bz2", "zst", "parquet"])
def test_a_file_cut_short_is_an_error_and_not_an_end(kind: str, tmp_path: Path, models) -> None:
    path = _write(tmp_path, kind)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="cut short|not a whole Parquet"):
        passages_of(path, tmp_path / "w", models)


def test_max_corpus_size_counts_articles(tmp_path: Path, models) -> None:
    stage = passages_of(bundled_corpus(), tmp_path / "w", models, max_corpus_size=7)
    assert stage.finished().counts["articles"] == 7
    table = PassageTable(stage)
    assert len({table[row].doc_id for row in range(len(table))}) == 7
    assert len(table) > 7


def test_shards_hold_whole_articles(tmp_path: Path, models) -> None:
    whole = passages_of(bundled_corpus(), tmp_path / "a", models)
    expected = [tuple(row.values()) for table in whole.tables() for row in table.to_pylist()]
    parts = passages_of(bundled_corpus(), tmp_path / "b", models, passages_per_shard=20)
    assert len(parts.finished().rows) == 4
    articles = [set(table.column("doc_id").to_pylist()) for table in parts.tables()]
    assert sum(map(len, articles)) == len(set().union(*articles)) == 60
    assert [tuple(row.values()) for table in parts.tables() for row in table.to_pylist()] == expected


def test_continues_after_the_last_whole_shard(tmp_path: Path, models) -> None:
    path = tmp_path / "c.jsonl"
    records = [{"id": str(i), "title": "T", "text": f"Text number {i}."} for i in range(700)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records[:300]) + "broken\n")
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records[300:])
    settings = {"passages_per_shard": 100}
    stage = passages_of(path, tmp_path / "w", models, **settings)
    before = {file.name: file.read_bytes() for file in stage.folder.glob("*.arrow")}
    assert len(before) > 3
    quarantined = [file.read_text() for file in (tmp_path / "w" / "quarantine").iterdir()]
    (stage.folder / "done.json").unlink()
    for shard in (2, 3, 4):
        stage.path(shard).unlink(missing_ok=True)
    kept = stage.path(1).stat().st_mtime_ns
    again = passages_of(path, tmp_path / "w", models, **settings)
    assert {file.name: file.read_bytes() for file in again.folder.glob("*.arrow")} == before
    assert stage.path(1).stat().st_mtime_ns == kept
    assert [file.read_text() for file in (tmp_path / "w" / "quarantine").iterdir()] == quarantined
    assert again.finished().counts["bad"] == 1


def test_malformed_lines_are_set_aside_with_line_and_reason(tmp_path: Path, models) -> None:
    path = tmp_path / "c.jsonl"
    bad = [b'{"id": "x"', b'"text"', b"\xff\xfe not utf-8", b'{"id": "1"}']
    path.write_bytes(LINES * 20 + b"\n\n" + b"\n".join(bad) + b"\n")
    stage = passages_of(path, tmp_path / "w", models)
    counts = stage.finished().counts
    assert (counts["articles"], counts["bad"]) == (100, 4)
    (file,) = (tmp_path / "w" / "quarantine").iterdir()
    rejected = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["line"] for row in rejected] == [103, 104, 105, 106]
    reasons = " | ".join(row["reason"] for row in rejected)
    for reason in ("invalid JSON", "expected a JSON object", "invalid UTF-8", "no text"):
        assert reason in reasons


def test_too_many_malformed_lines_are_an_error(tmp_path: Path, models) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(LINES + b"broken\n" * 3)
    with pytest.raises(InputError, match=r"3 of 8 lines are malformed.*line 6"):
        passages_of(path, tmp_path / "w", models)


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", b'{"id": "1", "title": "Only a title", "text": ["Only a title"]}\n']
)
def test_a_corpus_without_text_is_an_error(content: bytes, tmp_path: Path, models) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match="no article with text"):
        passages_of(path, tmp_path / "w", models)


def test_json_array_is_refused_with_the_command_that_converts_it(tmp_path: Path, models) -> None:
    path = tmp_path / "my corpus.json"
    path.write_text(json.dumps(RECORDS))
    with pytest.raises(
        InputError, match=rf"`jq -c '\.\[\]' '{path}' > '{tmp_path}/my corpus\.lines\.jsonl'`"
    ):
        passages_of(path, tmp_path / "w", models)


def test_lines_are_numbered_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_CHUNK_BYTES", 7)
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\ntwo is long enough\nlast")
    assert list(files.lines(path)) == [(1, b"one"), (3, b"two is long enough"), (4, b"last")]


@pytest.mark.parametrize("kind", ["jsonl", "gz", "parquet", "csv", "folder"])
def test_the_share_that_was_read_grows_to_the_whole(kind: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(files, "_CHUNK_BYTES", 64)
    meter = files.ReadingMeter(files.input_files(_write(tmp_path, kind), "corpus"))
    seen = [meter.fraction()]
    for path in meter.paths:
        seen += [meter.fraction() for _ in tables.rows(path, tables.CORPUS, meter=meter)]
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert 0.5 < seen[-1] <= 1
