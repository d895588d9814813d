"""Forward and backward passes over a batch, in micro batches that fit into memory, by all processes."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast
from accelerate.utils.memory import clear_device_cache

from scaledown.devices.halving import is_out_of_memory
from scaledown.errors import ModelError
from scaledown.student.batch import Encoded, collate
from scaledown.student.model import LOSS_WEIGHTS

log = logging.getLogger("scaledown")

SHARED: Final = frozenset({DistributedType.FSDP, DistributedType.DEEPSPEED})
"""Ways of distribution in which processes share one model."""


class Size(NamedTuple):
    """The numbers that losses are divided by. They are floats because they are summed over processes."""

    tokens: float
    """Tokens of the answers."""
    examples: float
    """Number of examples."""


class Passes:
    """Passes through a model by one process, or by several of which each has a share of every batch.

    If processes share the model (FSDP, DeepSpeed), Accelerate synchronises them. Otherwise each process has
    the whole model, which is not wrapped in DistributedDataParallel: a wrapped model would wait in its
    backward pass for a process that has run out of memory. Instead, gradients are summed once in each step,
    when all processes have theirs.

    Args:
        model: The model, with its trained weights in float32.
        accelerator: Devices, precision and processes.
        optimizer: For the model's trained weights.
        micro_batch: Examples at a time; halved if they do not fit into memory.
        stand_in: An example for a process that has no examples left while others, with which it shares the
            model, still have some.
        before: Called before each micro batch with its number of examples; an exception from it ends the
            pass.
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
        self._trained: list[torch.Tensor] = []  # whose gradients are summed over processes
        if self.is_shared:
            self.model, self.optimizer = accelerator.prepare(model, optimizer)
        else:
            self.model = accelerator.prepare_model(model, evaluation_mode=True)  # does not wrap the model
            self.optimizer = accelerator.prepare_optimizer(optimizer)
            self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            broadcast([parameter.data for parameter in self._trained])

    def gradients(self, examples: Sequence[Encoded], *, rehearses: bool = False) -> dict[str, float]:
        """Compute the gradients of one step's examples, summed over all processes.

        Args:
            examples: The examples of this process.
            rehearses: Try the largest micro batch first, to find out at once whether it fits into memory. The
                trial has no effect on the step: random numbers are reset, and the order is the same.

        Returns:
            The losses over all processes, by name.

        Raises:
            ModelError: Not even one example fits into memory, or processes that share a model have too little
                memory for a micro batch.
        """
        self.model.train()
        examples = sorted(examples, key=_length)  # micro batches of similar length need less padding
        whole = Size(*self.sum(*_size_of(examples)))
        most = math.ceil(whole.examples / self.ranks)
        if rehearses and most > self.micro_batch and not self.is_shared:
            before = random_state(self.device)
            self._fitting(lambda: self._pass(examples[-self.micro_batch :], self.micro_batch, whole))
            self.optimizer.zero_grad()
            set_random_state(before, self.device)
        losses = self._fitting(lambda: self._pass(examples, most, whole))
        if self.ranks > 1 and self._trained:
            self._add_up_gradients()
        return dict(zip(LOSS_WEIGHTS, self.sum(*losses.tolist()), strict=True))

    def losses(self, batches: Iterable[Sequence[Encoded]], most: Iterable[int]) -> dict[str, float]:
        """Compute the losses over all batches and processes. The state of random numbers is restored.

        Args:
            batches: This process' examples of each batch; there may be none.
            most: The largest number of examples that a process has of each batch.

        Returns:
            The losses by name.
        """
        before = random_state(self.device)
        self.model.eval()
        sums, size = torch.zeros(len(LOSS_WEIGHTS), device=self.device), Size(0, 0)
        try:
            with torch.no_grad():
                for unsorted, count in zip(batches, most, strict=True):
                    examples = sorted(unsorted, key=_length)
                    sums += self._fitting(partial(self._pass, examples, count, Size(1, 1)))
                    size = Size(*map(sum, zip(size, _size_of(examples), strict=True)))
        finally:
            set_random_state(before, self.device)
        *totals, tokens, number = self.sum(*sums.tolist(), *size)
        counts = {"answer_loss": max(1, tokens)}
        return {
            name: total / counts.get(name, number) for name, total in zip(LOSS_WEIGHTS, totals, strict=True)
        }

    def sum(self, *values: float) -> list[float]:
        """Return the sum of each value over all processes, which must call it together."""
        if self.ranks == 1:
            return list(values)
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        totals: list[float] = self.accelerator.reduce(mine, "sum").tolist()
        return totals

    def _fitting(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return `work()`.

        If a process runs out of memory, all processes halve their micro batches and retry.
        """
        before = random_state(self.device)
        while True:
            is_full = False
            try:
                result = work()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self.is_shared:  # no retry: the others wait for this process within the pass
                    raise self._too_large() from error
                is_full = True  # handled below, after the error and the tensors that it refers to are freed
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
        smaller = "" if self.micro_batch == 1 else "a smaller one with --resume, or "
        return ModelError(
            f"out of memory with --micro_batch_size {self.micro_batch}: give {smaller}"
            "--gradient_checkpointing; in another folder also --dtype bfloat16 or a smaller model"
        )

    def _pass(self, examples: Sequence[Encoded], most: int, whole: Size) -> torch.Tensor:
        """Return this process' share of each loss, [losses]; in training, compute its gradients too.

        Processes that share a model must make the same number of passes: as many as the process with the most
        examples needs, which has `most`.
        """
        sums = torch.zeros(len(LOSS_WEIGHTS), device=self.device)
        weights = sums.new_tensor(list(LOSS_WEIGHTS.values()))
        for start in range(0, most if self.is_shared else len(examples), self.micro_batch):
            part = examples[start : start + self.micro_batch]
            self._before(len(part))
            losses = self._losses(part, whole)  # [losses]
            if torch.is_grad_enabled():  # not `model.training`: DeepSpeed's wrapper is always in training
                loss = (losses * weights).sum()
                if self.is_shared:  # gradients are averaged; DeepSpeed makes its step in the last pass
                    self.accelerator.sync_gradients = start + self.micro_batch >= most
                    loss = loss * self.ranks
                self.accelerator.backward(loss)
            sums += losses.detach()
        return sums

    def _losses(self, part: Sequence[Encoded], whole: Size) -> torch.Tensor:
        """Return a micro batch's share of each loss of the whole batch, [losses] float32.

        0 if it is empty.
        """
        batch = collate(part or [self._stand_in], one_group=self.is_shared)
        output = self.model(**_moved(batch, self.device))
        mine = _size_of(part)
        shares = {"answer_loss": mine.tokens / max(1, whole.tokens)}
        return torch.stack(
            [output[name] * shares.get(name, mine.examples / whole.examples) for name in LOSS_WEIGHTS]
        )

    def _add_up_gradients(self) -> None:
        """Sum gradients over all processes.

        A weight that no process used has no gradient, as in one process.
        """
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
    """Return the states of the random number generators that a pass uses.

    Args:
        device: The device of the model.

    Returns:
        By the type of the device, bytes as torch gives them; always with `cpu`.
    """
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def set_random_state(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Restore the states of the random number generators.

    Args:
        states: The result of `random_state`; the state of another kind of device is ignored.
        device: The device of the model.
    """
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type])


def _length(example: Encoded) -> int:
    return example.prompt_length + len(example.answer_ids)


def _size_of(examples: Sequence[Encoded]) -> Size:
    return Size(sum(len(example.answer_ids) for example in examples), len(examples))


def _moved(value: Any, device: torch.device) -> Any:
    """Move all tensors of a batch to the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _moved(item, device) for name, item in value.items()}
    return [_moved(item, device) for item in value]
