"""An extension of each kind from another package: the code of docs/extending.md."""

import ast
import gzip
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import orjson
import pytest

import tiny
from conftest import ROOT
from scaledown import extensions
from scaledown.data.teacher.api import choose_backend, engine_of
from scaledown.data.teacher.base import EngineSettings, TeacherSettings
from scaledown.errors import ModelError, UsageError
from scaledown.extensions import COMPRESSORS, MEASURES, STUDENT_ENGINES, TEACHER_ENGINES, Table
from scaledown.models.sources import ModelSource, resolve
from scaledown.student.engine_choice import choose_engine
from scaledown.student.model import ScaleDownModel
from scaledown.student.settings import ScaleDownConfig
from shell import commands, fences

PAGE = ROOT / "docs" / "extending.md"
TABLES = [table for table in vars(extensions).values() if isinstance(table, Table)]
MOST_LINES = 30


def install(package: Path, entry_points: dict[str, dict[str, str]], name: str) -> None:
    """Write the metadata that pip writes beside a package."""
    info = package / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = []
    for group, entries in entry_points.items():
        lines += [f"[{group}]", *(f"{entry} = {value}" for entry, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the package of the page is installed."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "extras").mkdir()
    for fence in fences(PAGE):
        if fence.language == "toml":
            project = tomllib.loads(fence.text)["project"]
            install(folder, project["entry-points"], project["name"])
        if fence.language == "python":
            path = folder / fence.text.splitlines()[0].removeprefix("# ")
            path.write_text(fence.text)
    return folder


def run(words: list[str], place: Path, site: Path) -> str:
    paths = [str(site), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "120"}
    command = [sys.executable, "-m", "scaledown", *words[1:]]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_code_of_each_extension_is_short() -> None:
    code = [fence for fence in fences(PAGE) if fence.language == "python"]
    assert len(code) == len(TABLES) == 7
    for fence in code:
        assert len([line for line in fence.text.splitlines() if line.strip()]) < MOST_LINES


@pytest.mark.slow
def test_code_of_the_page_adds_one_extension_of_each_kind(
    site: Path, tmp_path: Path, models: dict[str, Path], corpus: Path
) -> None:
    tiny.word_pieces(tmp_path / "bag_of_words")
    config = {"model_type": "bert", "architectures": ["BagOfWords"]}
    (tmp_path / "bag_of_words" / "config.json").write_text(json.dumps(config))
    shutil.copytree(models["causal_lm"], tmp_path / "generator")
    flags = {
        "prepare": ["--corpus_path", str(corpus), "--device", "cpu", "--top_k_retrieval", "2"],
        "train": [
            *("--generator_model", "generator", "--num_layers", "1", "--doc_max_length", "64"),
            *("--max_steps", "2", "--batch_size", "2", "--device", "cpu", "--report_to", "none"),
        ],
        "answer": ["--max_new_tokens", "4", "--device", "cpu"],
        "evaluate": ["--max_new_tokens", "4", "--device", "cpu"],
    }
    printed = {}
    for fence in fences(PAGE):
        for words in commands(fence.text) if fence.language == "bash" else []:
            printed[words[1]] = run([*words, *flags[words[1]]], tmp_path, site)
    assert list(printed) == ["prepare", "train", "answer", "evaluate"]

    with gzip.open(tmp_path / "train_data.gz") as file:
        records = [orjson.loads(line) for line in file]
    assert [record["query"] for record in records] == [
        f"What is the capital of {country}?" for country in ("France", "Japan", "Peru", "Kenya")
    ]
    for record in records:
        assert record["answer"] == record["documents"][0].partition(". ")[0].strip()
    settings = json.loads((tmp_path / "train_data.gz.work" / "manifest.json").read_text())["stages"]
    assert settings["answers"]["settings"]["backend"] == "first_sentence"
    live = list((tmp_path / "train_data.gz.work" / "live").glob("*.log"))
    assert live, "a worker in a process of its own did it"

    kept = json.loads((tmp_path / "model" / "config.json").read_text())
    assert kept["compressor"] == "mean_pooling"
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    for system in ("compressed", "closed_book"):
        measured = results["systems"][system]["measures"]
        assert [*measured][:5] == ["accuracy", "EM", "F1", "ROUGE-L", "recall"]
        assert 0 <= measured["recall"]["mean"] <= 1
    with pytest.raises(ModelError, match="mean_pooling.*install the package"):
        ScaleDownModel.from_pretrained(str(tmp_path / "model"))  # here, where the package is not installed


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.group)
def test_entries_are_instances_of_the_class_of_their_table(table: Table) -> None:
    assert len(table) == len(dict(table)) > 0


def test_no_other_code_compares_names_of_entries() -> None:
    """Differences between engines and compressors are fields of their entries."""
    names = {*TEACHER_ENGINES, *STUDENT_ENGINES, *COMPRESSORS}
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                sides += [one for side in sides for one in getattr(side, "elts", [])]
                found = {one.value for one in sides if isinstance(one, ast.Constant)} & names
                assert not found, f"{path}:{node.lineno} compares with {found.pop()}"


def test_entry_of_another_package_is_found_without_import(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "recall" not in MEASURES
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "extras.recall", raising=False)
    assert "recall" in MEASURES
    assert [*MEASURES] == ["accuracy", "EM", "F1", "ROUGE-L", "recall"]
    assert "extras.recall" not in sys.modules
    assert MEASURES["recall"]("the Eiffel tower", ["Eiffel Tower", "Paris"]) == 1.0


def test_engine_of_another_package_writes_answers(
    site: Path, monkeypatch: pytest.MonkeyPatch, models: dict[str, Path]
) -> None:
    monkeypatch.syspath_prepend(site)
    source = resolve(str(models["causal_lm"]))
    model = ScaleDownModel.build(ScaleDownConfig(num_layers=1), source).eval()
    expected = model.answer("Why?", [], max_new_tokens=8)
    assert choose_engine("auto", "mps", source).title == "transformers"
    generation, title = choose_engine("one_line", "cpu", source).start(
        model, source, "cpu", 8, asked="one_line"
    )
    assert title == "one line"
    model.engine = generation
    generation._breaks = set()
    assert model.answer("Why?", [], max_new_tokens=8) == expected
    generation._breaks = set(model.tokenizer.get_vocab().values())
    assert model.answer("Why?", [], max_new_tokens=8) == ""


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nowhere:ENGINE", "teacher_engines broken .nowhere:ENGINE. cannot be imported .No module named"),
        ("json:nothing", "cannot be imported .*: correct its package, or uninstall the package"),
        (
            "json:dumps",
            "is function, expected scaledown.data.teacher.base:TeacherEngine: see docs/extending.md",
        ),
    ],
)
def test_broken_entry_is_reported(
    value: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, {"scaledown.teacher_engines": {"broken": value}}, "broken")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=message):
        engine_of("broken")


def test_own_entry_is_used_before_one_with_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, {"scaledown.compressors": {"pointer": "json:dumps"}}, "thief")
    monkeypatch.syspath_prepend(tmp_path)
    assert COMPRESSORS["pointer"].picks_tokens
    assert "pointer" not in COMPRESSORS.outside


@pytest.mark.parametrize(
    ("engine", "generation", "message"),
    [
        (EngineSettings("endpoint"), TeacherSettings(load_in_8bit=True), "a server loads its model itself"),
        (EngineSettings("vllm"), TeacherSettings(load_in_4bit=True), "name a quantised checkpoint"),
        (EngineSettings("transformers", lora="adapter"), TeacherSettings(), "merge it into the model first"),
        (EngineSettings("vllm", ("http://localhost/v1",)), TeacherSettings(), "exclude each other"),
        (EngineSettings("nothing"), TeacherSettings(), "use auto, transformers, vllm, openvino, endpoint"),
        (EngineSettings(lora="adapter"), TeacherSettings(load_in_8bit=True), "leave some out"),
    ],
)
def test_settings_that_an_engine_does_not_support_are_refused(
    engine: EngineSettings, generation: TeacherSettings, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        choose_backend(engine, ModelSource("a/b", "a/b"), "cpu", generation)


@pytest.mark.parametrize(
    ("engine", "device", "chosen"),
    [
        (EngineSettings(), "cpu", "transformers"),
        (EngineSettings(endpoints=("http://localhost/v1",)), "cpu", "endpoint"),
        (EngineSettings(lora="adapter"), "cuda", "vllm"),
        (EngineSettings("openvino"), "cpu", "openvino"),
    ],
)
def test_auto_selects_an_engine_that_suits(
    engine: EngineSettings, device: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    absent: dict[str, Any] = {"vllm": None, "openvino_genai": None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: absent.get(name, name) and find(name))
    assert choose_backend(engine, ModelSource("a/b", "a/b"), device, TeacherSettings()) == chosen
    assert chosen in TEACHER_ENGINES
