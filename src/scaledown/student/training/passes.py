"""Passes over a batch: in micro batches that fit into memory, the sums over all processes."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from scaledown.errors import ModelError
from scaledown.student.batch import Encoded, collate
from scaledown.student.model import WEIGHTS

log = logging.getLogger("scaledown")

SHARED: Final = frozenset({DistributedType.FSDP, DistributedType.DEEPSPEED})
"""Where processes share a model."""


class Size(NamedTuple):
    """What losses are means over."""

    tokens: float
    """Of the answers."""
    examples: float


class Passes:
    """Passes through a model, by one process or by several that each have a share of every batch.

    Processes that share the model, too (FSDP, DeepSpeed), leave all between them to Accelerate. Others have
    the whole of it, and it is not wrapped: a wrapped one waits in its backward pass for a process that has
    run out of memory. They add up gradients once a step, when all have theirs.

    Args:
        model: What is trained, its trained weights in float32.
        accelerator: Where, how precisely, and who shares what.
        optimizer: Of the model's trained weights.
        micro_batch: How many examples at once; halved where they do not fit.
        stand_in: An example for a process that has none left while others that share its model have.
        before: Told how many examples come next, before each micro batch; what it raises ends the pass.
    """

    def __init__(
        self,
        model: Any,
        accelerator: Accelerator,
        optimizer: torch.optim.Optimizer,
        *,
        micro_batch: int,
        stand_in: Encoded,
        before: Callable[[int], None],
    ) -> None:
        self.accelerator = accelerator
        self.micro_batch = micro_batch
        self.device: torch.device = accelerator.device
        self.ranks: int = accelerator.num_processes
        self.is_shared = accelerator.distributed_type in SHARED
        self.model: Any
        self.optimizer: Any
        self._stand_in = stand_in
        self._before = before
        self._trained: list[torch.Tensor] = []  # that processes add up gradients of
        if self.is_shared:
            self.model, self.optimizer = accelerator.prepare(model, optimizer)
        else:
            self.model = accelerator.prepare_model(model, evaluation_mode=True)  # which wraps nothing
            self.optimizer = accelerator.prepare_optimizer(optimizer)
            self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            broadcast([parameter.data for parameter in self._trained])

    def gradients(self, examples: Sequence[Encoded], *, rehearses: bool = False) -> dict[str, float]:
        """Gradients of one step's examples, added up over all processes.

        Args:
            examples: Those of this process.
            rehearses: Try the largest micro batch first, so that what does not fit shows at once. It leaves
                nothing: random numbers begin again, and the step keeps its order.

        Returns:
            The losses over all processes.

        Raises:
            ModelError: Where not even one example fits.
        """
        self.model.train()
        examples = sorted(examples, key=_length)  # alike together: less padding
        whole = Size(*self.sum(*_size(examples)))
        most = math.ceil(whole.examples / self.ranks)
        if rehearses and most > self.micro_batch and not self.is_shared:
            before = random_state(self.device)
            self._fitting(lambda: self._pass(examples[-self.micro_batch :], self.micro_batch, whole))
            self.optimizer.zero_grad()
            set_random_state(before, self.device)
        losses = self._fitting(lambda: self._pass(examples, most, whole))
        if self.ranks > 1 and self._trained:
            self._add_up_gradients()
        return dict(zip(WEIGHTS, self.sum(*losses.tolist()), strict=True))

    def losses(self, batches: Iterable[Sequence[Encoded]], most: Iterable[int]) -> dict[str, float]:
        """The losses over all batches and processes. It leaves nothing, not even in random numbers.

        Args:
            batches: What this process has of each, which may be nothing.
            most: How many examples the process with the largest part has of each.
        """
        before = random_state(self.device)
        self.model.eval()
        sums, size = torch.zeros(len(WEIGHTS), device=self.device), Size(0, 0)
        try:
            with torch.no_grad():
                for unsorted, count in zip(batches, most, strict=True):
                    examples = sorted(unsorted, key=_length)
                    sums += self._fitting(partial(self._pass, examples, count, Size(1, 1)))
                    size = Size(*map(sum, zip(size, _size(examples), strict=True)))
        finally:
            set_random_state(before, self.device)
        *totals, tokens, number = self.sum(*sums.tolist(), *size)
        counts = {"answer_loss": max(1, tokens)}
        return {name: total / counts.get(name, number) for name, total in zip(WEIGHTS, totals, strict=True)}

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all processes."""
        if self.ranks == 1:
            return list(values)
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        totals: list[float] = self.accelerator.reduce(mine, "sum").tolist()
        return totals

    def _fitting(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`work()`. Where a process runs out of memory, all halve their micro batches and do it again."""
        before = random_state(self.device)
        while True:
            is_full = False
            try:
                result = work()
            except RuntimeError as error:
                if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
                    raise
                if self.is_shared:  # others are in the midst of the pass, and wait for this one
                    raise self._too_large() from error
                is_full = True  # what the error holds on to is free once it is gone
            except BaseException:
                set_random_state(before, self.device)
                raise
            if self.sum(is_full) == [0]:
                return result
            if self.micro_batch == 1:
                raise self._too_large()
            self.micro_batch = (self.micro_batch + 1) // 2
            log.warning("out of memory: micro batches of %s from here on", self.micro_batch)
            self.optimizer.zero_grad()
            clear_device_cache(garbage_collection=True)
            set_random_state(before, self.device)

    def _too_large(self) -> ModelError:
        smaller = "" if self.micro_batch == 1 else "a smaller one, "
        return ModelError(
            f"out of memory with --micro_batch_size {self.micro_batch}: give {smaller}"
            "--gradient_checkpointing, --dtype bfloat16 or a smaller model"
        )

    def _pass(self, examples: Sequence[Encoded], most: int, whole: Size) -> torch.Tensor:
        """This process's share of each loss, [losses]; in training with its gradients.

        Processes that share a model go through it together: each has as many micro batches as that with the
        largest part, which is of `most` examples.
        """
        sums = torch.zeros(len(WEIGHTS), device=self.device)
        weights = sums.new_tensor(list(WEIGHTS.values()))
        for start in range(0, most if self.is_shared else len(examples), self.micro_batch):
            part = examples[start : start + self.micro_batch]
            self._before(len(part))
            losses = self._losses(part, whole)  # [losses]
            if torch.is_grad_enabled():  # DeepSpeed's wrapper always says that it is training
                loss = (losses * weights).sum()
                if self.is_shared:  # gradients are averaged, and DeepSpeed takes its step in the last pass
                    self.accelerator.sync_gradients = start + self.micro_batch >= most
                    loss = loss * self.ranks
                self.accelerator.backward(loss)
            sums += losses.detach()
        return sums

    def _losses(self, part: Sequence[Encoded], whole: Size) -> torch.Tensor:
        """What a micro batch adds to each loss of the whole, [losses] float32; an empty one adds nothing."""
        output = self.model(**_moved(collate(part or [self._stand_in]), self.device))
        mine = _size(part)
        shares = {"answer_loss": mine.tokens / max(1, whole.tokens)}
        return torch.stack(
            [output[name] * shares.get(name, mine.examples / whole.examples) for name in WEIGHTS]
        )

    def _add_up_gradients(self) -> None:
        """Over all processes. A weight that none of them used has no gradient, as in one process."""
        used = self.sum(*(parameter.grad is not None for parameter in self._trained))
        waiting = []
        for parameter, count in zip(self._trained, used, strict=True):
            if count:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                waiting.append(torch.distributed.all_reduce(parameter.grad, async_op=True))
        for work in waiting:
            work.wait()


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """States of the random number generators that a pass draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def set_random_state(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Go back to an earlier `random_state`; that of another kind of device is passed over."""
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type])


def _length(example: Encoded) -> int:
    return example.prompt_length + len(example.answer_ids)


def _size(examples: Sequence[Encoded]) -> Size:
    return Size(sum(len(example.answer_ids) for example in examples), len(examples))


def _moved(value: Any, device: torch.device) -> Any:
    """A batch with its tensors on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _moved(item, device) for name, item in value.items()}
    return [_moved(item, device) for item in value]
