"""The schedule of a training run: learning rates, evaluations, checkpoints, early stopping."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

WARM_UP: Final = 0.05  # the paper's (arXiv 2504.07109, table 7)
EVALUATIONS: Final = 10  # in a run without --eval_steps

Log = list[dict[str, Any]]
"""The values that a run logged, in order: each entry has a `step` and values by name."""


@dataclass(frozen=True)
class Schedule:
    """The steps of a training run, and when it evaluates, saves and stops."""

    steps: int
    """Number of steps."""
    eval_steps: int = 0
    """Steps between evaluations; 0 for `EVALUATIONS` evaluations in the run."""
    save_steps: int = 0
    """Steps between checkpoints; 0 for one at each evaluation."""
    patience: int = 0
    """Evaluations without improvement that end the run; 0 for no limit."""

    def rate(self, step: int) -> float:
        """Return the factor of the learning rate in a step: linear warm-up, then linear decay to 0.

        Args:
            step: Number of finished steps, from 0 to `steps`.

        Returns:
            0 to 1.
        """
        warm_up = int(WARM_UP * self.steps)  # 0 in a very short run
        if step < warm_up:
            return step / warm_up
        return (self.steps - step) / (self.steps - warm_up)

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due after `step` steps."""
        return step in {0, self.steps} or step % self._eval_steps == 0

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps."""
        return step > 0 and (step == self.steps or step % (self.save_steps or self._eval_steps) == 0)

    def is_finished(self, step: int, log: Log) -> bool:
        """Whether all steps are done, or the last `patience` evaluations brought no improvement.

        Args:
            step: Number of finished steps.
            log: All values logged so far.
        """
        losses = [entry["step"] for entry in evaluations(log)]
        in_vain = len(losses) - 1 - losses.index(best_evaluation(log)["step"]) if losses else 0
        return step >= self.steps or 0 < self.patience <= in_vain

    @property
    def _eval_steps(self) -> int:
        return self.eval_steps or math.ceil(self.steps / EVALUATIONS)


def evaluations(log: Log) -> Log:
    """Return the log entries of evaluations, in order."""
    return [entry for entry in log if "eval_loss" in entry]


def best_evaluation(log: Log) -> dict[str, Any]:
    """Return the first evaluation with the lowest loss; `{"step": 0}` if there is no evaluation."""
    found: Iterable[dict[str, Any]] = evaluations(log)
    return min(found, key=lambda entry: _order(entry["eval_loss"]), default={"step": 0})


def _order(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
