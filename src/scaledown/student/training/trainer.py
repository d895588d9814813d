"""The training loop: steps, evaluations and checkpoints."""

import itertools
import logging
import math
import signal
import time
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import Accelerator

from scaledown.errors import ModelError, RunDirectoryError
from scaledown.run.progress import Tracker, track
from scaledown.student.model import LOSS_WEIGHTS
from scaledown.student.training import checkpoints
from scaledown.student.training.checkpoints import checkpoint_folder
from scaledown.student.training.encoded_examples import Batches
from scaledown.student.training.passes import Passes
from scaledown.student.training.schedule import Log, Schedule, best_evaluation, evaluations
from scaledown.student.training.signals import noticing_signals

log = logging.getLogger("scaledown")

GRADIENT_NORM: Final = 1.0  # the paper's (arXiv 2504.07109, table 7)


class _TrainingStopped(Exception):  # noqa: N818 (no error)
    """Ctrl-C or SIGTERM has arrived; raised at a point where training can stop."""


class StudentTrainer:
    """Trains a `ScaleDownModel`, one batch in each step.

    Args:
        model: The model, with its trained weights in float32.
        accelerator: Devices, precision and processes.
        optimizer: Has named groups of weights, each with its full learning rate.
        schedule: Learning rates, evaluations and checkpoints.
        batches: This process' examples of each step.
        held_out: Batches that all processes evaluate together; None if nothing is held out.
        micro_batch: Examples at a time, at the beginning.
        output: The folder of the checkpoints.
    """

    def __init__(
        self,
        model: Any,
        accelerator: Accelerator,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        *,
        batches: Batches,
        held_out: Batches | None,
        micro_batch: int,
        output: Path,
    ) -> None:
        self.model = model
        self.schedule = schedule
        self.batches = batches
        self.passes = Passes(
            model,
            accelerator,
            optimizer,
            micro_batch=micro_batch,
            stand_in=batches.examples[0],
            before=self._before_part,
        )
        self.step = 0
        """Number of finished steps."""
        self.log: Log = []
        self.seconds: list[float] = []
        """Seconds of each step of this process."""
        self._accelerator = accelerator
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._held_out = held_out
        self._output = output
        self._saved = 0  # the step of the newest checkpoint
        counts = (len(places) * self.passes.ranks for places in batches.places)
        self._counts = list(itertools.accumulate(counts, initial=0))  # examples after each step
        self._noticed: list[int] = []
        self._tracker: Tracker | None = None

    def run(self, checkpoint: Path | None) -> None:
        """Train until the schedule ends.

        After Ctrl-C or SIGTERM, a checkpoint of the last complete step is written and the signal is raised
        again.

        Args:
            checkpoint: The folder of a complete checkpoint to continue from; None to begin.

        Raises:
            ModelError: A loss is not finite, too little memory for one example, or the checkpoint is of
                another model.
            RunDirectoryError: Processes on several machines found different checkpoints.
        """
        if checkpoint is not None:
            self.step, self.log = checkpoints.read_state(checkpoint, self.passes)
        if self.passes.sum(self.step) != [self.step * self.passes.ranks]:
            raise RunDirectoryError(
                f"the processes found different checkpoints in {self._output}: it must be on a disk that all "
                "machines share"
            )
        if checkpoint is not None:
            checkpoints.load(checkpoint, self.passes, self.model)
            self._saved = self.step
        self._accelerator.init_trackers("scaledown")
        done, total = self._counts[self.step], self._counts[-1]
        with noticing_signals() as self._noticed, track("train", "examples", total, done) as self._tracker:
            try:
                self._loop()
            except _TrainingStopped:
                self._count()
                message = self._keep()
            else:
                message = ""
            finally:
                for tracker in self._accelerator.trackers:
                    tracker.finish()
        if message:
            log.warning("%s", message)
            if self._noticed:
                signal.raise_signal(self._noticed[0])
            raise KeyboardInterrupt

    def _loop(self) -> None:
        while True:  # a resumed run first makes the evaluation and checkpoint that were due
            if self._held_out and self._owes_evaluation():
                self._evaluate(self._held_out)
            is_best = self.schedule.patience > 0 and self.step == best_evaluation(self.log)["step"] > 0
            if is_best or self.schedule.saves(self.step):
                self._save()
            if self.schedule.is_finished(self.step, self.log):
                return
            self._step()

    def _step(self) -> None:
        started = time.perf_counter()
        if self.passes.sum(len(self._noticed)) != [0]:
            raise _TrainingStopped
        optimizer = self.passes.optimizer
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self.schedule.rate(self.step)
        examples = [self.batches.examples[place] for place in self.batches.places[self.step]]
        losses = self.passes.gradients(examples, rehearses=not self.seconds)
        loss = _weighted(losses)
        if not math.isfinite(loss):
            raise ModelError(
                f"the loss of step {self.step + 1} is {loss}: lower the learning rates, or give --dtype "
                "float32"
            )
        norm = self._accelerator.clip_grad_norm_(self.passes.model.parameters(), GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        self.step += 1
        self._count()
        self.seconds.append(time.perf_counter() - started)
        values = {"loss": loss, **self._parts(losses)}
        if norm is not None:  # DeepSpeed may have none
            values["grad_norm"] = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        values |= {f"learning_rate_{group['name']}": group["lr"] for group in optimizer.param_groups}
        self._log("", values | {"micro_batch_size": self.passes.micro_batch})
        if self._tracker is not None:
            self._tracker.note = f"loss {loss:.4f}"

    def _owes_evaluation(self) -> bool:
        done = any(entry["step"] == self.step for entry in evaluations(self.log))
        return self.schedule.evaluates(self.step) and not done

    def _evaluate(self, held_out: Batches) -> None:
        """Log the losses over the held-out examples. This does not influence training."""
        examples, batches = held_out
        rank, ranks = self._accelerator.process_index, self.passes.ranks
        mine = ([examples[place] for place in places[rank::ranks]] for places in batches)
        losses = self.passes.losses(mine, [math.ceil(len(places) / ranks) for places in batches])
        if self._tracker is not None:
            self._tracker.wait("")
        log.info("step %s: held-out loss %.4f", self.step, _weighted(losses))
        self._log("eval_", {"loss": _weighted(losses), **self._parts(losses)})

    def held_out_losses(self) -> tuple[float | None, float | None]:
        """Return the held-out loss before training and that of the resulting model; None if not evaluated."""
        losses = {entry["step"]: entry["eval_loss"] for entry in evaluations(self.log)}
        return losses.get(0), losses.get(self._kept())

    def save(self, folder: Path) -> None:
        """Write the resulting model: with early stopping the best one, otherwise the last.

        Args:
            folder: Created if it does not exist.
        """
        if self.schedule.patience and evaluations(self.log) and not self._best:
            log.warning(
                "no evaluation had a lower held-out loss than the one before training, so the last model is "
                "kept: lower the learning rates"
            )
        if self._kept() == self.step:
            checkpoints.save_model(folder, self.passes, self.model)
        elif self._accelerator.is_main_process:
            checkpoints.copy_model(checkpoint_folder(self._output, self._kept()), folder)

    @property
    def _best(self) -> int:
        """The step with the lowest held-out loss; 0 is before training, also without evaluations."""
        step: int = best_evaluation(self.log)["step"]
        return step

    def _kept(self) -> int:
        """Return the step whose model is the result."""
        return self._best if self.schedule.patience and self._best else self.step

    def _save(self) -> None:
        """Write a checkpoint; if this step has one already, write only the log."""
        folder = checkpoint_folder(self._output, self.step)
        if self._saved != self.step:
            checkpoints.save(folder, self.passes, self.model)
            self._saved = self.step
        if self._accelerator.is_main_process:
            checkpoints.write_state(folder, self.passes, self.step, self.log)
            checkpoints.delete_old(self._output, self.step, best_evaluation(self.log)["step"])

    def _keep(self) -> str:
        """Write a checkpoint of the last complete step, if it has none. Returns a message about it."""
        if not self.step:
            return (
                "stopped before the first step was done: nothing was saved, so the same command begins again"
            )
        if self._saved != self.step:
            self._save()
        return (
            f"stopped after step {self.step} of {self.schedule.steps}, kept in "
            f"{checkpoint_folder(self._output, self.step)}: the same command with --resume goes on from there"
        )

    def _log(self, prefix: str, values: dict[str, float]) -> None:
        """Add values to the log, and send them to `--report_to`."""
        self.log.append({f"{prefix}{name}": value for name, value in values.items()} | {"step": self.step})
        part = "eval" if prefix else "train"
        self._accelerator.log({f"{part}/{name}": value for name, value in values.items()}, self.step)

    def _parts(self, losses: dict[str, float]) -> dict[str, float]:
        """Return the single losses of the model, if it has others than the loss of answers."""
        settings = self.model.config
        has = {"rerank_loss": settings.enable_reranking, "pointer_loss": settings.kind.picks_tokens}
        return {name: value for name, value in losses.items() if has.get(name, any(has.values()))}

    def _before_part(self, count: int) -> None:
        """Called before each micro batch: stop after a signal.

        Several processes stop together, between steps.
        """
        if self._noticed and self.passes.ranks == 1:
            raise _TrainingStopped
        if self._tracker is None:
            return
        if not torch.is_grad_enabled():
            self._tracker.wait("held-out examples are read")
            self._tracker.advance(0)
        else:
            left = self._counts[self.step + 1] - self._tracker.done  # a trial does not count twice
            self._tracker.advance(min(count * self.passes.ranks, left))

    def _count(self) -> None:
        """Set the progress to the examples of complete steps, without trials."""
        if self._tracker is not None:
            self._tracker.advance(self._counts[self.step] - self._tracker.done)


def _weighted(losses: dict[str, float]) -> float:
    return sum(LOSS_WEIGHTS[name] * value for name, value in losses.items())
