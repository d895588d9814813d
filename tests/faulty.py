"""A worker that fails as the variable FAULT says: `kind:stage:shard[:once]`."""

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from scaledown.data import prepare_dataset
from scaledown.run.stage import Stage

TARGET = "faulty:work"


def work(settings: Mapping[str, Any], worker: str) -> None:
    """Work on a run until the failure, which comes right before a shard is written."""
    kind, stage, shard, *once = os.environ["FAULT"].split(":")
    happened = Path(os.environ["FAULT_FILE"])
    write = Stage.write

    def faulty(self: Stage, number: int, content: pa.Table, *rest: Any, **more: Any) -> None:
        here = self.name == stage and number == int(shard)
        if here and not (once and happened.exists()) and not self.absent(number):
            with happened.open("a") as file:
                file.write(f"{worker}\n")
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "hang":
                time.sleep(600)
            raise ValueError("an accident")
        write(self, number, content, *rest, **more)

    Stage.write = faulty  # type: ignore[method-assign]
    prepare_dataset.work(settings, worker)
