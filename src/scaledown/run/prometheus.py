"""The status of a run as a metrics file for node_exporter's textfile collector.

https://prometheus.io/docs/instrumenting/exposition_formats/, names as in .../practices/naming/
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from scaledown.errors import OutputError
from scaledown.run.heartbeat import SUPERVISOR, write_quickly
from scaledown.run.outputs import check_free
from scaledown.run.periodic import throughout
from scaledown.run.status import StageStatus, Status, status_of

_EVERY_SECONDS: Final = 5.0
_FIRST: Final = b"# HELP scaledown_"

Value = float | None

# Name, type, help and value of the metrics of each stage; a value of None is left out.
_OF_STAGES: Final[tuple[tuple[str, str, str, Callable[[StageStatus], Value]], ...]] = (
    ("rows_done_total", "counter", "Rows in whole shards.", lambda stage: stage.rows),
    (
        *("rows_in_progress", "gauge", "Rows done of shards that are not whole yet."),
        lambda stage: stage.rows_in_progress,
    ),
    ("rows_planned", "gauge", "Rows that the stage will have; may be an estimate.", lambda s: s.rows_planned),
    ("shards_done_total", "counter", "Whole shards.", lambda stage: stage.shards),
    ("shards_planned", "gauge", "Shards that the stage will have.", lambda stage: stage.shards_planned),
    ("shard_seconds_total", "counter", "Time that whole shards took.", lambda stage: stage.seconds),
    ("stage_workers", "gauge", "Processes that work on the stage.", lambda stage: stage.workers),
    ("worker_deaths_total", "counter", "Deaths of workers at the stage.", lambda stage: stage.deaths),
    ("given_up_shards", "gauge", "Shards given up: workers died.", lambda stage: stage.given_up),
    ("quarantined_rows", "gauge", "Rows set aside with a reason.", lambda stage: stage.quarantined),
    ("stage_finished", "gauge", "1 when the stage is finished.", lambda stage: stage.finished),
)


def metrics(status: Status) -> str:
    """Return the status in Prometheus' text format.

    Each sample has a label for the run, most also the stage.

    Args:
        status: The status of a run.
    """
    run = {"run": status.path}
    lines: list[str] = []

    def add(name: str, kind: str, text: str, samples: list[tuple[Mapping[str, str], Value]]) -> None:
        if known := [(labels, value) for labels, value in samples if value is not None]:
            lines.extend((f"# HELP scaledown_{name} {text}", f"# TYPE scaledown_{name} {kind}"))
            lines.extend(f"scaledown_{name}{_labels(labels)} {float(value)!r}" for labels, value in known)

    for name, kind, text, value in _OF_STAGES:
        add(name, kind, text, [(run | _stage_labels(stage), value(stage)) for stage in status.stages])
    working = [worker for worker in status.workers if worker.worker != SUPERVISOR]
    add("workers", "gauge", "Processes that work on the run.", [(run, len(working))])
    finished = "When the run was finished, in seconds since 1970."
    add("run_finished_timestamp_seconds", "gauge", finished, [(run, status.finished_time)])
    return "\n".join(lines) + "\n"


def _stage_labels(stage: StageStatus) -> dict[str, str]:
    return {"stage": stage.name, "unit": stage.unit, "fingerprint": stage.fingerprint}


def _labels(labels: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{name}="{_escaped_label(value)}"' for name, value in labels.items()) + "}"


def _escaped_label(text: str) -> str:
    text = text.encode(errors="replace").decode()  # a path may hold bytes that are not text
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


@contextlib.contextmanager
def metrics_file(path: str, run: Path, *, overwrite: bool = False) -> Iterator[None]:
    """Write the metrics of a run to a file every 5 s while the block runs, and once more at the end.

    Args:
        path: The file; empty for none.
        run: The run directory.
        overwrite: Replace a file that holds something else.

    Raises:
        OutputError: The file cannot be written at first, or holds something else. A failure later is ignored.
    """
    if not path:
        yield
        return
    made = Path(path)
    check_free("--metrics_file", made, lambda: made.read_bytes().startswith(_FIRST), overwrite=overwrite)

    def write() -> None:
        write_quickly(Path(path), metrics(status_of(run.resolve())))

    try:
        write()
    except OSError as error:
        raise OutputError(f"--metrics_file {path} cannot be written ({error.strerror})") from error
    with throughout(_EVERY_SECONDS, write):
        yield
