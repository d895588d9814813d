"""Metrics of a run as Prometheus reads them."""

import re
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from scaledown.cli import main
from scaledown.run import prometheus
from scaledown.run.periodic import throughout
from scaledown.run.prometheus import metrics, metrics_file
from scaledown.run.status import StageStatus, Status, WorkerStatus, status_of

STAGE = StageStatus(
    name="ranked",
    fingerprint="0123456789abcdef",
    unit="queries",
    shards=3,
    shards_planned=12,
    rows=768,
    rows_in_progress=40,
    rows_planned=3000,
    estimated=False,
    seconds=61.5,
    rate=12.5,
    seconds_left=175.4,
    workers=2,
    deaths=1,
    given_up=1,
    quarantined=5,
    finished=False,
)


def parsed(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def workers(*names: str) -> tuple[WorkerStatus, ...]:
    return tuple(WorkerStatus(name, "host", 1, "", None, 1.0, alive=True) for name in names)


def test_prometheus_can_read_the_metrics() -> None:
    path = 'a "run"\\in\nthe \udc80 way.work'
    status = Status(path, False, None, "", None, (STAGE,), workers("worker-0", "worker-1", "supervisor"))
    found = parsed(metrics(status))
    (sample,) = found["scaledown_rows_done"].samples
    assert found["scaledown_rows_done"].type == "counter"
    assert (sample.name, sample.value) == ("scaledown_rows_done_total", 768.0)
    labels = {"run": path.replace("\udc80", "?"), "stage": "ranked", "unit": "queries"}
    assert sample.labels == {**labels, "fingerprint": "0123456789abcdef"}
    values = {name: family.samples[0].value for name, family in found.items()}
    assert values == {
        "scaledown_rows_done": 768,
        "scaledown_rows_in_progress": 40,
        "scaledown_rows_planned": 3000,
        "scaledown_shards_done": 3,
        "scaledown_shards_planned": 12,
        "scaledown_shard_seconds": 61.5,
        "scaledown_stage_workers": 2,
        "scaledown_worker_deaths": 1,
        "scaledown_given_up_shards": 1,
        "scaledown_quarantined_rows": 5,
        "scaledown_stage_finished": 0,
        "scaledown_workers": 2,
    }
    assert all(family.documentation for family in found.values())


def test_unknown_values_are_left_out() -> None:
    unknown = STAGE._replace(rows_planned=None, shards_planned=None)
    found = parsed(
        metrics(Status("run", False, None, "", None, (unknown, STAGE._replace(name="answers")), ()))
    )
    assert [sample.labels["stage"] for sample in found["scaledown_rows_planned"].samples] == ["answers"]
    assert "scaledown_run_finished_timestamp_seconds" not in found


def test_run_writes_metrics(prepare, tmp_path: Path) -> None:
    path = tmp_path / "scaledown.prom"
    assert prepare("--metrics_file", str(path)) == 0
    found = parsed(path.read_text())
    done = {sample.labels["stage"]: sample.value for sample in found["scaledown_rows_done"].samples}
    assert done["answers"] == done["queries"] == 4
    assert found["scaledown_workers"].samples[0].value == 0
    (finished,) = found["scaledown_run_finished_timestamp_seconds"].samples
    assert finished.value == status_of(prepare.work).finished_time
    assert finished.labels == {"run": str(prepare.work)}
    path.unlink()
    assert prepare("--metrics_file", str(path)) == 0, "a finished run, asked for again"
    assert parsed(path.read_text())["scaledown_run_finished_timestamp_seconds"].samples


def test_index_command_writes_metrics(tiny_flags, corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "index.prom"
    given = ["--corpus_path", str(corpus), "--retriever_model", tiny_flags[1], "--device", "cpu"]
    assert main(["index", "--index_dir", str(tmp_path / "index"), *given, "--metrics_file", str(path)]) == 0
    found = parsed(path.read_text())
    assert all(sample.value == 1 for sample in found["scaledown_stage_finished"].samples)
    assert len(found["scaledown_stage_finished"].samples) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("metrics.txt", "must end in .prom"),
        ("no/such/folder/m.prom", "cannot be written"),
        ("s3://b/m.prom", "URL"),
    ],
)
def test_invalid_path_is_reported_before_any_work(name: str, message: str, prepare, capsys) -> None:
    assert prepare("--metrics_file", name) in {1, 2}
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not prepare.work.exists()


def test_full_disk_for_metrics_does_not_end_the_run(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "m.prom"
    with metrics_file(str(path), tmp_path / "run"):
        before = path.read_bytes()

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(prometheus, "write_quickly", full)
    assert path.read_bytes() == before


def test_metrics_continue_after_a_failed_write() -> None:
    """As when a disk was full for a while."""
    import threading

    tried = []
    again = threading.Event()

    def action() -> None:
        tried.append(1)
        if len(tried) == 1:
            raise OSError(28, "No space left on device")
        again.set()

    with throughout(0.01, action):
        assert again.wait(10)


def test_names_follow_the_conventions() -> None:
    status = Status("run", True, 1.0, "", None, (STAGE,), ())
    for line in metrics(status).splitlines():
        if line.startswith("# TYPE"):
            _, _, name, kind = line.split()
            assert re.fullmatch(r"scaledown_[a-z_]+", name)
            assert name.endswith("_total") == (kind == "counter")
