import dataclasses
import json
import re
from pathlib import Path

import pytest

from scaledown.config.flags import Parser, command_parser, from_flags, underscored
from scaledown.config.prepare import PrepareConfig
from scaledown.config.presets import PRESETS
from scaledown.data.manifest import compared_settings
from scaledown.errors import InputError, UsageError

BASE = {"queries_file": ("q.txt",), "output_file": "o.json"}


def parsed(*words: str) -> PrepareConfig:
    return from_flags(vars(parser().parse_args(underscored(words))), PrepareConfig)


def parser() -> Parser:
    return command_parser("test", PrepareConfig, "--queries_file FILE", "")


MINIMAL = ("--queries_file", "q.txt", "--output_file", "o.json")


def test_defaults_are_the_guides() -> None:
    config = parsed(*MINIMAL)
    assert config.retriever_model == "naver/splade-cocondenser-ensembledistil"
    assert config.reranker_model == "cross-encoder/ms-marco-MiniLM-L-6-v2"
    assert config.teacher_model == "mistralai/Mistral-7B-Instruct-v0.2"
    assert (config.top_k_retrieval, config.documents_per_query, config.reranks) == (20, 20, False)
    assert parsed(*MINIMAL, "--enable_reranking").documents_per_query == 5
    assert parsed(*MINIMAL, "--top_k_reranking", "3").documents_per_query == 3
    assert parsed(*MINIMAL, "--enable_reranking", "--top_k_retrieval", "2").documents_per_query == 2
    assert config == PrepareConfig(**BASE), "the function and the command have one set of defaults"


def test_hyphens_and_underscores_are_one() -> None:
    a = parsed(
        "--queries-file",
        "q-a_b.txt",
        "--output-file=o-x.json",
        "--top-k-retrieval",
        "7",
        "--enable-reranking",
    )
    b = parsed(
        "--queries_file",
        "q-a_b.txt",
        "--output_file=o-x.json",
        "--top_k_retrieval",
        "7",
        "--enable_reranking",
    )
    assert a == b
    assert a.queries_file == ("q-a_b.txt",)


def test_flag_takes_several_values_together_or_repeated() -> None:
    for words in (["a", "b"], ["a", "--queries_file", "b"]):
        flags = vars(parser().parse_args(["--queries_file", *words, "--output_file", "x.json"]))
        assert flags["queries_file"] == ["a", "b"]


def test_words_after_double_hyphen_are_not_flags() -> None:
    assert underscored(["--a-b", "--", "--c-d", "--"]) == ["--a_b", "--", "--c-d", "--"]


def test_home_folder_is_expanded_in_flags_and_config(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.json").write_text(json.dumps({"queries_file": ["~/a.txt"], "work_dir": "~/w"}))
    config = parsed("--config=~/c.json", "--output_file=~/o.json", "--corpus_path=~/c", "--query_dataset=~/d")
    assert (config.queries_file, config.work_dir) == ((f"{tmp_path}/a.txt",), f"{tmp_path}/w")
    assert (config.output_file, config.corpus_path) == (f"{tmp_path}/o.json", (f"{tmp_path}/c",))
    assert config.query_dataset == f"{tmp_path}/d"
    assert parsed(*MINIMAL, "--queries_file=~/q.txt").queries_file == ("q.txt", f"{tmp_path}/q.txt")


@pytest.mark.parametrize(
    "name", ["corpus_path", "output_file", "queries_file", "work_dir", "config", "device"]
)
def test_an_empty_flag_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(UsageError, match=f"--{name} is empty"):
        parsed(*MINIMAL[: 2 if name == "output_file" else None], f"--{name}", "")


def test_a_flag_that_names_one_input_refuses_a_second() -> None:
    for name in ("query_dataset", "prompt"):
        with pytest.raises(UsageError, match=f"--{name} is given twice, and takes one value"):
            parsed("--queries_file", "q.txt", f"--{name}", "a.json", f"--{name}=b.json")
    assert parsed(*MINIMAL, "--corpus_path", "a", "--corpus-path", "b").corpus_path == ("a", "b")
    assert parsed(*MINIMAL, "--seed", "1", "--seed", "2").seed == 2, "of others the last counts"
    assert parsed(*MINIMAL, "--output_file", "a.json", "--output_file", "b.json").output_file == "b.json"


def test_a_manifest_of_before_had_one_corpus(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    for before, now in (("c.jsonl", ("c.jsonl",)), ("", ())):
        path.write_text(json.dumps({"parameters": {"corpus_path": before}}))
        assert parsed(*MINIMAL, "--config", str(path)).corpus_path == now


def test_presets_lie_under_flags() -> None:
    oscar = parsed(*MINIMAL, "--preset", "oscar")
    assert oscar.retriever_model == "naver/splade-v3"
    assert oscar.reranker_model == "naver/trecdl22-crossencoder-debertav3"
    assert (oscar.passage_tokens, oscar.top_k_retrieval, oscar.top_k_reranking) == (128, 20, 5)
    assert oscar.enable_reranking
    assert parsed(*MINIMAL, "--preset", "oscar", "--top_k_reranking", "4").top_k_reranking == 4
    assert not parsed(*MINIMAL, "--preset", "demo", "--no_enable_reranking").enable_reranking
    for name in PRESETS:
        PrepareConfig.preset(name, **BASE)


def test_presets_lie_under_config_files_and_one_without_effect_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"top_k_retrieval": 9}')
    config = parsed(*MINIMAL, "--preset", "demo", "--config", str(path), "--max_new_tokens", "5")
    assert config.teacher_model == PRESETS["demo"]["teacher_model"]
    assert (config.top_k_retrieval, config.top_k_reranking, config.max_new_tokens) == (9, 3, 5)
    path.write_text(json.dumps(dataclasses.asdict(config)))
    with pytest.raises(UsageError, match="--preset oscar changes nothing"):
        parsed("--config", str(path), "--preset", "oscar")


def test_config_file_repeats_a_run(tmp_path: Path) -> None:
    made = parsed(*MINIMAL, "--preset", "oscar", "--seed", "3", "--temperature", "0.5")
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({"parameters": dataclasses.asdict(made), "other": 1}))
    assert parsed("--config", str(path)) == made
    assert parsed("--config", str(path), "--seed", "4") == dataclasses.replace(made, seed=4)


@pytest.mark.parametrize(
    ("content", "error", "match"),
    [
        ("{", InputError, "JSON"),
        ("[1]", InputError, "object"),
        ('{"top_k": 3}', UsageError, "unknown setting 'top_k'"),
        ('{"top_k_retrieval": "3"}', UsageError, "must be int"),
        ('{"top_k_retrieval": true}', UsageError, "must be int"),
        ('{"queries_file": "q.txt"}', UsageError, "must be list"),
        ('{"queries_file": ["q.txt", 3]}', UsageError, "queries_file must be a list of file names"),
        ('{"queries_file": [""]}', UsageError, "queries_file must be a list of file names"),
    ],
)
def test_invalid_config_files_are_refused(content, error, match, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(content)
    with pytest.raises(error, match=match):
        parsed(*MINIMAL, "--config", str(path))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"top_k_reranking": 6, "top_k_retrieval": 5}, "--top_k_reranking 6 is above --top_k_retrieval 5"),
        ({"top_k_retrieval": 0}, "--top_k_retrieval 0: must be at least 1"),
        ({"num_synthetic_queries": 5}, "--queries_file and --num_synthetic_queries exclude"),
        ({"queries_file": ()}, "no queries"),
        ({"output_file": ""}, "no output"),
        ({"output_file": "o.txt"}, "ending chooses the format"),
        ({"output_file": "o.json/"}, "is a folder"),
        ({"teacher_8bit": True, "teacher_4bit": True}, "exclude each other"),
        ({"batch_size": -1}, "--batch_size -1: must not be negative"),
        ({"passage_tokens": 3}, "at least 16"),
        ({"max_bad_fraction": 1.5}, "between 0 and 1"),
        ({"temperature": -1.0}, "not be negative"),
        ({"temperature": float("nan")}, "not be negative"),
        ({"queries_file": "q.txt"}, "expected a tuple"),
        ({"queries_file": ("",)}, "expected a tuple"),
        ({"max_corpus_size": -1}, "not be negative"),
        ({"dtype": "int3"}, "--dtype int3: use one of"),
    ],
)
def test_contradictions_fail_at_construction_and_name_the_flags(settings, match) -> None:
    with pytest.raises(UsageError, match=match):
        PrepareConfig(**{**BASE, **settings})


def test_top_k_reranking_of_zero_is_refused_on_the_command_line() -> None:
    with pytest.raises(UsageError, match="--top_k_reranking 0"):
        parsed(*MINIMAL, "--top_k_reranking", "0")


def test_help_groups_every_flag_with_unit_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    text = re.sub(r"\[[^\]]* \.\.\.\]", "", " ".join(capsys.readouterr().out.split()))
    for item in dataclasses.fields(PrepareConfig):
        assert re.search(
            rf"--{item.name} [^\[]*\[[^\]]*default: ", text.replace("{", "(").replace("[0..1", "[")
        ), item
    assert "[passages; default: 20]" in text
    assert "[tokens; default: 128]" in text
    for group in (
        "queries",
        "corpus and passages",
        "retrieval",
        "reranking",
        "teacher",
        "output and run",
        "machine",
    ):
        assert f"{group}" in text


@pytest.mark.parametrize(
    ("device", "sizes"), [("cpu", (32, 16, 8)), ("mps", (32, 16, 8)), ("cuda:1", (256, 128, 32))]
)
def test_batches_suit_the_device_where_none_are_given(device: str, sizes: tuple[int, ...]) -> None:
    config = PrepareConfig(**BASE).sized(device)
    assert (config.batch_size, config.reranker_batch_size, config.teacher_batch_size) == sizes
    given = PrepareConfig(**BASE, batch_size=3, teacher_batch_size=5).sized(device)
    assert (given.batch_size, given.reranker_batch_size, given.teacher_batch_size) == (3, sizes[1], 5)


def test_run_of_an_earlier_version_with_default_batches_continues() -> None:
    """Its settings have the numbers that are zeros now."""
    numbers = {"batch_size": 32, "reranker_batch_size": 16, "teacher_batch_size": 8}
    before = compared_settings(PrepareConfig(**BASE, **numbers))
    assert compared_settings(PrepareConfig(**BASE)) == before
