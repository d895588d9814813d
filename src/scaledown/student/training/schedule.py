"""When something is due in a training run: learning rates, evaluations, checkpoints; when it ends early."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

WARM_UP: Final = 0.05  # the paper's (arXiv 2504.07109, table 7)
EVALUATIONS: Final = 10  # of a run that does not say how often

Log = list[dict[str, Any]]
"""What a run told on the way, in its order: values by name, each with its `step`."""


@dataclass(frozen=True)
class Schedule:
    """A run of so many `steps`; `patience` is how many evaluations may bring nothing, 0 is any number."""

    steps: int
    eval_steps: int = 0
    save_steps: int = 0
    patience: int = 0

    def rate(self, step: int) -> float:
        """What share of its learning rate a weight has in a step: linear warm-up, linear decay to 0."""
        warm_up = int(WARM_UP * self.steps)  # none in a run so short that it would be all of it
        if step < warm_up:
            return step / warm_up
        return (self.steps - step) / (self.steps - warm_up)

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due after so many steps."""
        return step in {0, self.steps} or step % self._eval_steps == 0

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after so many steps."""
        return step > 0 and (step == self.steps or step % (self.save_steps or self._eval_steps) == 0)

    def is_finished(self, step: int, log: Log) -> bool:
        """Whether all steps are done, or the last evaluations were no better than one before them."""
        losses = [entry["step"] for entry in evaluations(log)]
        in_vain = len(losses) - 1 - losses.index(best(log)["step"]) if losses else 0
        return step >= self.steps or 0 < self.patience <= in_vain

    @property
    def _eval_steps(self) -> int:
        return self.eval_steps or math.ceil(self.steps / EVALUATIONS)


def evaluations(log: Log) -> Log:
    """The entries of evaluations, in their order."""
    return [entry for entry in log if "eval_loss" in entry]


def best(log: Log) -> dict[str, Any]:
    """The evaluation with the least loss, the first of several; its `step` is 0 where there is none."""
    found: Iterable[dict[str, Any]] = evaluations(log)
    return min(found, key=lambda entry: _order(entry["eval_loss"]), default={"step": 0})


def _order(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
