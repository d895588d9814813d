"""`make gpu`: the rows that work on a CPU, with tiny shapes, and its result. Rates are not checked."""

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from conftest import ROOT, load_script

FILE = ROOT / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script(FILE, monkeypatch)


def test_rows_that_need_no_gpu_are_measured(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    checks = [gpu.of_device, gpu.of_kernel, gpu.of_encoding, gpu.of_reranking, gpu.of_teacher]
    rows = gpu.run(gpu.TINY, [*checks, gpu.of_capped_memory])
    assert not [row for row in rows if not row.met and "rate" not in row.expected]
    names = "\n".join(row.name for row in rows)
    for name in (
        "device",
        "width 16, torch.bfloat16",
        "encoding",
        "encoding, released",
        "reranking",
        "reranking, the device in batches of 16",
        "host memory",
        "batches of 4",
    ):
        assert name in names
    assert capsys.readouterr().out.count("\n") == len(rows)


@pytest.mark.slow
def test_demo_has_the_same_bytes_when_repeated_and_after_a_kill(
    gpu: ModuleType, tiny_flags: list[str], forked: None
) -> None:
    plan, *rows = gpu.of_demo(gpu.TINY._replace(demo=tuple(tiny_flags)), {})
    assert plan.found.startswith("the plan said ")
    assert [row.met for row in rows] == [True, True], rows


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("10 s, it took 19 s (90% more)", True),
        ("10 s, it took 21 s (110% more)", False),
        ("10 s, it took 6 s (40% less)", True),
        ("10 s, it took 4 s (60% less)", False),
    ],
)
def test_plan_is_met_within_a_factor_of_two(text: str, met: bool, gpu: ModuleType) -> None:
    assert gpu.plan(f"finished\n\nthe plan said {text}\n").met is met
    assert not gpu.plan("error: no such file").met


def test_busy_share_of_a_device_follows_its_work(gpu: ModuleType) -> None:
    def work() -> None:
        time.sleep(0.3)
        started = time.perf_counter()
        while time.perf_counter() < started + 0.3:
            torch.ones(512, 512) @ torch.ones(512, 512)

    assert 0.05 < gpu.share_busy(work, "cpu") < 0.8


def test_student_is_trained_and_answers(gpu: ModuleType) -> None:
    rows = gpu.run(gpu.TINY, [gpu.of_student, gpu.of_answers])
    assert not [row for row in rows if not row.met and "rate" not in row.expected], rows
    names = [row.name for row in rows]
    assert names[:2] == ["a student, memory", "a student, a step of 4"]
    assert names[-2:] == [f"answers of a student, batches of {size}" for size in (1, 2)]
    assert all("tokens/s" in row.found for row in rows[-2:])
    if importlib.util.find_spec("bitsandbytes"):
        assert names[2] == "a student in 24 GiB, in 4 bits, memory"


@pytest.mark.slow
def test_engine_starts_beside_others_on_the_device(
    gpu: ModuleType, models: dict[str, Path], tiny_flags: list[str], forked: None
) -> None:
    """With transformers instead of vLLM; the processes are the same."""
    scale = gpu.TINY._replace(student=str(models["causal_lm"]), demo=tuple(tiny_flags))
    rows = list(gpu.of_vllm(scale, {"encoder": models["splade"]}))
    assert len(rows) == 5
    assert all(row.met for row in rows), rows


@pytest.mark.slow
def test_training_runs_by_torchrun(gpu: ModuleType, models: dict[str, Path], forked: None) -> None:
    rows = list(gpu.of_training(gpu.TINY._replace(student=str(models["causal_lm"])), {}))
    assert [row.met for row in rows] == [True] * 3, rows


def test_check_that_fails_is_a_failed_row(gpu: ModuleType) -> None:
    def of_nothing(*_: object) -> None:
        raise RuntimeError("no driver")

    (row,) = gpu.run(gpu.TINY, [of_nothing])
    assert (row.name, row.met, row.found) == ("nothing", False, "RuntimeError: no driver")


@pytest.mark.parametrize("met", [True, False])
def test_exit_status_is_0_if_all_rows_passed(
    met: bool, gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [gpu.Check("one", "1", "1", met=True), gpu.Check("two", "2", "?", met=met)]
    chosen: list[object] = []
    monkeypatch.setattr(gpu, "run", lambda scale, checks: chosen.extend(checks) or rows)
    monkeypatch.setattr(gpu, "describe_machine", lambda: "a machine")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", "--json", str(tmp_path / "gpu.json"), "--checks", "kernel", "device"]
    )
    assert gpu.main() == (0 if met else 1)
    assert chosen == [gpu.of_kernel, gpu.of_device]
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert kept["machine"] == "a machine"
    assert [check["met"] for check in kept["checks"]] == [True, met]


def test_missing_gpu_is_reported(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 1
    assert "there is no CUDA device here" in capsys.readouterr().err
