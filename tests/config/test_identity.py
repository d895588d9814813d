"""Settings have the identity that they had in version 0.6.0, so runs of before go on."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import pytest

from scaledown.config.evaluate import EvaluateConfig
from scaledown.config.options import Options
from scaledown.config.prepare import PrepareConfig
from scaledown.config.train import PretrainConfig, TrainConfig
from scaledown.data.manifest import Sources, compared_settings, repeatable
from scaledown.models.sources import ModelSource
from scaledown.run.directory import fingerprint
from scaledown.student.training.origin import MODEL_FLAGS

RECORDED: Final = json.loads(Path(__file__).with_name("identities.json").read_bytes())
BASE: Final = {"queries_file": ("q.txt",), "output_file": "o.json"}
ENDPOINT: Final = {"teacher_endpoint": ("http://localhost:8000/v1",), "flush_seconds": 1.0}
PLACES: Final = {
    **{
        "corpus_path": ("corpus",),
        "work_dir": "w",
        "index_dir": "i",
        "cache_dir": "c",
        "metrics_file": "m.prom",
    },
    **{"query_dataset": "data", "prompt": "prompt.txt", "teacher_lora": "lora"},
    "decontaminate": ("e.json", "https://host/e.json?key=secret"),
}
PREPARE: Final[dict[str, Callable[[], PrepareConfig]]] = {
    "defaults": lambda: PrepareConfig(**BASE),
    "oscar": lambda: PrepareConfig.preset("oscar", **BASE),
    "demo": lambda: PrepareConfig.preset("demo", **BASE),
    "places": lambda: PrepareConfig(**BASE, **PLACES),
    "pace": lambda: PrepareConfig(**BASE, **ENDPOINT, workers=3, task_timeout=9.0, shard="1/3", strict=True),
    "search": lambda: PrepareConfig(**BASE, search="approximate", search_memory=2.0, min_recall=0.9),
    "exact": lambda: PrepareConfig(**BASE, search_memory=2.0, min_recall=0.9),
    "logprobs": lambda: PrepareConfig(**BASE, teacher_logprobs=3, device="cuda:1", teacher_batch_size=4),
    "columns": lambda: PrepareConfig(**BASE, columns=("query_id",), temperature=0.5, seed=7),
}
EVALUATE: Final[dict[str, Callable[[], EvaluateConfig]]] = {
    "answers": lambda: EvaluateConfig(model="m", data="d.json"),
    "judged": lambda: EvaluateConfig(model="m", data="d.json", judge_model="j", pairwise=True, **ENDPOINT),
    "rankings": lambda: EvaluateConfig(run=("r.trec",), qrels="q", output_dir="out", device="cuda:1"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """A working directory with the files that the sample settings name."""
    monkeypatch.chdir(tmp_path)
    for name in ("lora", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    (tmp_path / "prompt.txt").write_text("{documents} {question}")
    return tmp_path


def as_recorded(content: Any, folder: Path) -> Any:
    return json.loads(json.dumps(content).replace(str(folder.resolve()), "HERE"))


@pytest.mark.parametrize("name", PREPARE)
def test_run_directory_is_entered_by_the_settings_that_made_it(name: str, folder: Path) -> None:
    compared = compared_settings(PREPARE[name]())
    assert as_recorded(compared, folder) == RECORDED["compared"][name]
    assert fingerprint(compared) == RECORDED["fingerprint"][name]


@pytest.mark.parametrize("name", PREPARE)
def test_manifest_keeps_full_paths_and_no_secrets(name: str, folder: Path) -> None:
    model = ModelSource("m", "/m", "abc")
    sources = Sources(model, None, model, None, [folder], [], [], {}, {})
    kept, recorded = as_recorded(repeatable(PREPARE[name](), sources), folder), RECORDED["manifest"][name]
    assert {setting: kept[setting] for setting in recorded} == recorded


@pytest.mark.parametrize("name", EVALUATE)
def test_evaluation_continues_with_its_original_settings(name: str) -> None:
    compared = EVALUATE[name]().compared()
    assert as_recorded(compared, Path()) == RECORDED["evaluation"][name]
    assert fingerprint(compared) == RECORDED["fingerprint"][f"evaluation {name}"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batch_size_of_zero_is_the_default_of_the_device(device: str) -> None:
    sized, recorded = asdict(PREPARE["defaults"]().sized(device)), RECORDED["sized"][device]
    assert {setting: as_recorded(sized[setting], Path()) for setting in recorded} == recorded


@pytest.mark.parametrize("kind", [TrainConfig, PretrainConfig])
def test_training_continues_with_other_settings_only_if_the_result_is_the_same(kind: type[Options]) -> None:
    free = kind.named("input", "model", "place", "operation", "report")
    assert sorted(free) == RECORDED["free in training"][kind.__name__]


def test_flags_that_a_pretrained_model_sets() -> None:
    assert sorted(MODEL_FLAGS) == sorted(RECORDED["settled by a pretrained model"])


def test_runs_are_merged_where_their_records_are_alike() -> None:
    alike = [name for name, about in PrepareConfig.options().items() if about.in_records]
    assert sorted(alike) == sorted(RECORDED["merged"])
