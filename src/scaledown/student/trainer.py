"""The training loop: the Hugging Face Trainer with two learning rates and steps that fit into memory."""

import contextlib
import logging
import math
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils.memory import (
    clear_device_cache,
    should_reduce_batch_size,
)
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from scaledown.atomic import read_json
from scaledown.errors import ModelError
from scaledown.progress import Tracker, track
from scaledown.student.batch import Encoded, Reader, collate
from scaledown.student.learning_rates import COMPRESSOR_RATES, SEPARATE_RATE, parameter_groups
from scaledown.student.model import WEIGHTS
from scaledown.student.settings import POINTER_RATES
from scaledown.student.signals import noticing_signals
from scaledown.student.train_settings import PretrainConfig, StudentConfig, TrainConfig
from scaledown.student.training_data import Examples, Part

log = logging.getLogger("scaledown")


class EncodedExamples(Dataset[Encoded]):
    """Examples as token ids, tokenised when they are asked for.

    In training (`trains`) a pointer compresses each at one of its rates, and some examples have their
    documents as text or none at all. Which, depends on the seed and the place alone: `place` counts on from
    pass to pass, so that a record is drawn anew in each.
    """

    def __init__(self, examples: Examples, model: Any, config: StudentConfig, *, trains: bool) -> None:
        self._examples = examples
        self._reader: Reader = model.reader
        self._is_pointer: bool = model.config.is_pointer
        self._config = config
        self._trains = trains

    def __getitem__(self, place: int) -> Encoded:
        query, documents, answer, scores = self._examples[place % len(self._examples)]
        config, random = self._config, np.random.default_rng((self._config.seed, place))
        if isinstance(config, PretrainConfig) and self._is_pointer:  # nothing is generated
            return Encoded(self._reader.read(query, documents, answer), [], [], None)
        rate, chance = (int(random.choice(POINTER_RATES)), random.random()) if self._trains else (0, 1.0)
        if isinstance(config, TrainConfig) and chance < config.text_fraction + config.closed_book_fraction:
            shown = documents if chance < config.text_fraction else []
            ids = self._reader.answer_ids(answer)[: self._reader.context // 2]
            encoded = self._reader.encode_text(query, shown, len(ids))._replace(answer_ids=ids)
        elif self._is_pointer:
            encoded = self._reader.encode(query, documents, answer, rate=rate)
        else:
            encoded = self._reader.encode(query, documents, answer, scores)
        room = self._reader.context - encoded.prompt_length
        return encoded._replace(answer_ids=encoded.answer_ids[: max(1, room)])

    def __len__(self) -> int:
        return len(self._examples)


class _Stopped(Exception):  # noqa: N818 (no error)
    """Ctrl-C or SIGTERM, noticed where nothing is half done."""


class _EvaluateAtTheEnd(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True


class StudentTrainer(Trainer):  # type: ignore[misc]  # transformers has no types
    """Trains a `ScaleDownModel`, one whole batch a step.

    The Trainer sees one pass over batches that are each all that this process takes of one step; a batch is
    cut into micro batches here, where running out of memory can halve them and start the step again.
    """

    control: Any
    optimizer: Any

    def __init__(
        self,
        model: Any,
        arguments: TrainingArguments,
        *,
        config: StudentConfig,
        examples: Examples,
        batches: list[list[int]],
        held: Part | None,
        micro_batch: int,
    ) -> None:
        patience = config.early_stopping_patience
        super().__init__(
            model,
            arguments,
            train_dataset=EncodedExamples(examples, model, config, trains=True),
            eval_dataset=EncodedExamples(held.examples, model, config, trains=False) if held else None,
            callbacks=[_EvaluateAtTheEnd(), *([EarlyStoppingCallback(patience)] if patience else [])],
        )
        self.remove_callback(PrinterCallback)
        self.micro_batch = micro_batch
        self.noticed: list[int] = []
        self.seconds: list[float] = []
        """That each step of this process took."""
        self._tracker: Tracker | None = None
        self._config = config
        self._batches = batches
        self._held: Sequence[int] = held.rows if held else ()
        self._parts: dict[str, float] = {}

    # What the Trainer asks of a subclass.

    def get_train_dataloader(self) -> DataLoader[Encoded]:
        """Lists of examples, one list a step."""
        # Not prepared by Accelerate: which process takes what is settled, and a step moves its own tensors.
        return DataLoader(self.train_dataset, batch_sampler=self._batches, collate_fn=list)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with the two learning rates."""
        if self.optimizer is None:
            kind, keywords = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            usual = COMPRESSOR_RATES.get(self.model.config.compressor, SEPARATE_RATE)
            rates = self._config.learning_rate_generator, self._config.compressor_rate(usual)
            self.optimizer = kind(parameter_groups(model or self.model, *rates), **keywords)
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def training_step(
        self, model: nn.Module, inputs: list[Encoded], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Gradients of one step; gives its loss over all processes, [] float32.

        Raises `ModelError` where not even one example fits, or the loss is no number.
        """
        started = time.perf_counter()
        model.train()
        examples = sorted(inputs, key=self._size)  # alike together: less padding
        *sizes, stops = self._sum(*_sizes(examples), len(self.noticed))
        if stops:
            raise _Stopped
        whole = _Size(*sizes)
        before = _random_state(self.args.device)
        losses: torch.Tensor | None = None
        while losses is None:
            try:
                losses = self._accumulate(model, examples, whole)
            except RuntimeError as error:
                self._halve(error)
                model.zero_grad()
                _set_random_state(before, self.args.device)
            except _Stopped:
                _set_random_state(before, self.args.device)
                raise
        parts = dict(zip(WEIGHTS, self._sum(*losses.tolist()), strict=True))
        total = _weighted(parts)
        if not math.isfinite(total):
            raise ModelError(
                f"the loss of step {self.state.global_step + 1} is {total}: lower the learning rates, or "
                "give --dtype float32"
            )
        self._parts = self._told(parts)
        self.seconds.append(time.perf_counter() - started)
        return torch.tensor(total, device=self.args.device)

    def _accumulate(self, model: nn.Module, examples: Sequence[Encoded], whole: "_Size") -> torch.Tensor:
        """Backward passes over micro batches; gives this process's share of each loss, [losses]."""
        sums = torch.zeros(len(WEIGHTS), device=self.args.device)
        starts = range(0, len(examples), self.micro_batch)
        done = 0
        try:
            for start in starts:
                self._check_stop()
                part = examples[start : start + self.micro_batch]
                # Processes average their gradients once, in the last backward pass.
                last = start == starts[-1]
                with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                    losses = self._losses(model, part, whole)  # [losses]
                    loss = (losses * losses.new_tensor(list(WEIGHTS.values()))).sum()
                    self.accelerator.backward(loss * self.args.world_size)
                sums += losses.detach()
                self._advance(len(part))
                done += len(part)
        except BaseException:
            self._advance(-done)
            raise
        return sums

    def _losses(self, model: nn.Module, part: Sequence[Encoded], whole: "_Size") -> torch.Tensor:
        """What a micro batch adds to each loss of the whole, [losses] float32."""
        output = model(**_moved(collate(part), self.args.device))
        mine = _sizes(part)
        shares = {"answer_loss": mine.tokens / max(1, whole.tokens)}
        return torch.stack(
            [output[name] * shares.get(name, mine.examples / whole.examples) for name in WEIGHTS]
        )

    def _halve(self, error: Exception) -> None:
        """Out of memory, go on with micro batches of half the size.

        Raises `ModelError` where that cannot be, and again what was another error.
        """
        if not should_reduce_batch_size(error):
            raise error
        if self.micro_batch == 1 or self.args.world_size > 1:  # other processes wait for this one's gradients
            smaller = "" if self.micro_batch == 1 else "a smaller one, "
            raise ModelError(
                f"out of memory with --micro_batch_size {self.micro_batch}: give {smaller}"
                "--gradient_checkpointing, --dtype bfloat16 or a smaller model"
            ) from error
        self.micro_batch = (self.micro_batch + 1) // 2
        log.warning("out of memory: micro batches of %s from here on", self.micro_batch)
        self.log({"micro_batch_size": self.micro_batch})
        clear_device_cache(garbage_collection=True)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The losses over what is held out. Training goes on afterwards as if this had not been."""
        before = _random_state(self.args.device)
        self.model.eval()  # not as wrapped: processes need not have equally many micro batches here
        sums = torch.zeros(len(WEIGHTS), device=self.args.device)
        size = _Size(0, 0)
        try:
            with torch.no_grad():
                mine = self._held[self.args.process_index :: self.args.world_size]
                for start in range(0, len(mine), self._config.batch_size):
                    batch = [self.eval_dataset[row] for row in mine[start : start + self._config.batch_size]]
                    batch.sort(key=self._size)
                    while batch:
                        self._check_stop()
                        part = batch[: self.micro_batch]
                        try:
                            sums += self._losses(self.model, part, _Size(1, 1))
                        except RuntimeError as error:
                            self._halve(error)
                        else:
                            size = _Size(*map(sum, zip(size, _sizes(part), strict=True)))
                            del batch[: len(part)]
        finally:
            self.model.train()
            _set_random_state(before, self.args.device)
        *totals, tokens, examples = self._sum(*sums.tolist(), *size)
        counts = {"answer_loss": max(1, tokens)}
        parts = {
            name: total / counts.get(name, examples) for name, total in zip(WEIGHTS, totals, strict=True)
        }
        metrics = {f"{metric_key_prefix}_loss": _weighted(parts)}
        metrics |= {f"{metric_key_prefix}_{name}": value for name, value in self._told(parts).items()}
        log.info("step %s: held-out loss %.4f", self.state.global_step, metrics[f"{metric_key_prefix}_loss"])
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate(self, trial: Any, ignore_keys: Any, skip_scheduler: bool = False) -> dict[str, float]:
        metrics: dict[str, float] = super()._evaluate(trial, ignore_keys, skip_scheduler)
        if skip_scheduler:  # at the start, where the Trainer does not look for the best
            self._determine_best_metric(metrics, trial)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With both learning rates and both losses."""
        if "learning_rate" in logs:
            groups = self.optimizer.param_groups
            share = logs.pop("learning_rate") / groups[0]["initial_lr"]  # of the first group, in this step
            logs |= {f"learning_rate_{group['name']}": share * group["initial_lr"] for group in groups}
            logs |= self._parts
            if self._tracker is not None:
                self._tracker.note = f"loss {logs['loss']:.4f}"
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the Trainer's estimate knows one model and no compression."""
        return 0

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The model as `from_pretrained` reads it; without the Trainer's arguments, which are a pickle."""
        if self.args.should_save:
            self.model.save_pretrained(output_dir or self.args.output_dir, state_dict=state_dict)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        wrong = [
            *(name for name in load_result.missing_keys if name not in tied),
            *load_result.unexpected_keys,
        ]
        if wrong:
            raise ModelError(
                f"the checkpoint does not fit the model ({', '.join(wrong[:3])}): delete it, or give another "
                "--output_dir"
            )

    # Our own.

    def run(self, checkpoint: Path | None) -> None:
        """Train, from `checkpoint` where there is one.

        Ctrl-C and SIGTERM leave a checkpoint of the last whole step, and are raised again.
        """
        done = 0
        if checkpoint is not None:
            state = read_json(checkpoint / "trainer_state.json")
            history, step = state["log_history"], state["global_step"]
            done = sum(map(len, self._batches[:step])) * self.args.world_size
            halved = [entry["micro_batch_size"] for entry in history if "micro_batch_size" in entry]
            self.micro_batch = min([self.micro_batch, *halved])
            evaluated = any(entry["step"] == step and "eval_loss" in entry for entry in history)
            due = step % self.args.eval_steps == 0 or step == len(self._batches)
            # A run that was stopped while it evaluated still owes that.
            self.args.eval_on_start = bool(self._held) and due and not evaluated
        total = sum(map(len, self._batches)) * self.args.world_size
        with noticing_signals() as self.noticed, track("train", "examples", total, done) as self._tracker:
            try:
                self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            except _Stopped:
                kept = self._keep()
            else:
                return
        log.warning("%s", kept)
        if self.noticed:
            signal.raise_signal(self.noticed[0])
        raise KeyboardInterrupt

    def held_out_losses(self) -> tuple[float | None, float | None]:
        """Before training and now; None where nothing is held out. With early stopping, now is the best."""
        history = [entry for entry in self.state.log_history if "eval_loss" in entry]
        before = next((entry["eval_loss"] for entry in history if entry["step"] == 0), None)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            return before, self.state.best_metric
        return before, history[-1]["eval_loss"] if history else None

    def _keep(self) -> str:
        """Make a checkpoint of the last whole step; gives what to tell about it."""
        step = self.state.global_step
        if not step:
            return "stopped before the first step was done: there is nothing to keep"
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        if not (folder / "trainer_state.json").exists():
            self._save_checkpoint(self.model_wrapped, None)
        return (
            f"stopped after step {step} of {self.state.max_steps}, kept in {folder}: the same command with "
            "--resume goes on from there"
        )

    def _check_stop(self) -> None:
        """Raise `_Stopped` if asked to; of several processes only between steps, all at once."""
        if self.noticed and self.args.world_size == 1:
            raise _Stopped

    def _told(self, parts: dict[str, float]) -> dict[str, float]:
        """The losses that the model has, where it has more than that of the answers."""
        settings = self.model.config
        has = {"rerank_loss": settings.enable_reranking, "pointer_loss": settings.is_pointer}
        return {name: value for name, value in parts.items() if has.get(name, any(has.values()))}

    def _size(self, example: Encoded) -> int:
        return example.prompt_length + len(example.answer_ids)

    def _advance(self, count: int) -> None:
        if self._tracker is not None:
            self._tracker.advance(count * self.args.world_size)

    def _sum(self, *values: float) -> list[float]:
        """Each value summed over all processes."""
        if self.args.world_size == 1:
            return list(values)
        mine = torch.tensor(values, dtype=torch.float64, device=self.args.device)
        totals: list[float] = self.accelerator.reduce(mine, "sum").tolist()
        return totals


def _weighted(parts: dict[str, float]) -> float:
    return sum(WEIGHTS[name] * value for name, value in parts.items())


class _Size(NamedTuple):
    """What losses are means over."""

    tokens: float
    """Of the answers."""
    examples: float


def _sizes(examples: Sequence[Encoded]) -> _Size:
    return _Size(sum(len(example.answer_ids) for example in examples), len(examples))


def _moved(value: Any, device: torch.device) -> Any:
    """A batch with its tensors on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _moved(item, device) for name, item in value.items()}
    return [_moved(item, device) for item in value]


def _random_state(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state()]


def _set_random_state(states: Sequence[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state)
