"""A trainer by the paper's schedule, and the checkpoint that it goes on from."""

import importlib.util
import math
import os
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from transformers import TrainingArguments

from scaledown.atomic import read_json
from scaledown.errors import MissingExtraError, UsageError
from scaledown.models import choose_dtype
from scaledown.student.train_settings import StudentConfig, TrainConfig
from scaledown.student.trainer import StudentTrainer
from scaledown.student.training_data import Part, shares, training_order

# The paper's (arXiv 2504.07109, table 7).
WARM_UP: Final = 0.05
GRADIENT_NORM: Final = 1.0

ADAM_BETA: Final = 0.999
POINTER_BETA: Final = 0.98  # of runs of hundreds of steps, which a longer memory would span

CPU_MICRO_BATCH: Final = 4  # more is no faster there, and Linux kills what takes too much memory
EVALUATIONS: Final = 10  # of a run that does not say how often
CHECKPOINTS: Final = 2  # kept, the best among them

# transformers renamed the setting within version 5.
_CHECKPOINTING: Final = (
    "activation_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`: its `trainer_state.json` is written last."""
    numbered = ((place.name.removeprefix("checkpoint-"), place) for place in folder.glob("checkpoint-*"))
    found = sorted((int(number), place) for number, place in numbered if number.isdecimal())
    return next((place for _, place in reversed(found) if read_json(place / "trainer_state.json")), None)


def make_trainer(
    model: Any, config: StudentConfig, train: Part, held: Part | None, device: str
) -> StudentTrainer:
    """A trainer of `model` by the paper's schedule, as one of the processes that torchrun started, if any."""
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if config.batch_size % ranks:
        raise UsageError(f"--batch_size {config.batch_size}: must be a multiple of the {ranks} processes")
    total = config.max_steps * config.batch_size or max(1, round(config.num_epochs * len(train.rows)))
    order = training_order(np.asarray(train.rows), total, config.seed)
    places = order + np.arange(total) // len(train.rows) * len(train.examples)  # count on from pass to pass
    batches = shares(places, config.batch_size, rank, ranks)
    steps, share = len(batches), config.batch_size // ranks
    eval_steps = config.eval_steps or math.ceil(steps / EVALUATIONS)
    dtype = choose_dtype(config.dtype, device)
    for parameter in model.parameters():
        if parameter.requires_grad:  # small updates would be rounded away in half precision
            parameter.data = parameter.data.float()
    arguments = TrainingArguments(
        output_dir=config.output_dir,
        per_device_train_batch_size=share,
        max_steps=steps,
        learning_rate=config.learning_rate_generator,
        lr_scheduler_type="linear",
        warmup_steps=int(WARM_UP * steps),  # none in a run so short that it would be all of it
        max_grad_norm=GRADIENT_NORM,
        adam_beta2=POINTER_BETA if model.config.is_pointer else ADAM_BETA,
        ddp_find_unused_parameters=model.config.is_pointer or _reads_text(config),
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        use_cpu=device == "cpu",
        seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if held else "no",
        eval_steps=eval_steps,
        eval_on_start=held is not None,
        save_strategy="steps",
        save_steps=config.save_steps or eval_steps,
        save_total_limit=CHECKPOINTS,
        load_best_model_at_end=config.early_stopping_patience > 0,
        metric_for_best_model="loss" if held else None,
        greater_is_better=False,
        report_to=reporters(config.report_to),
        disable_tqdm=True,
        log_level="error",
        **{_CHECKPOINTING: config.gradient_checkpointing},
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process a GPU: never nn.DataParallel
    return StudentTrainer(
        model,
        arguments,
        config=config,
        examples=train.examples,
        batches=batches,
        held=held,
        micro_batch=min(share, config.micro_batch_size or (CPU_MICRO_BATCH if device == "cpu" else share)),
    )


def _reads_text(config: StudentConfig) -> bool:
    """Whether a batch may have no documents to compress."""
    return isinstance(config, TrainConfig) and config.text_fraction + config.closed_book_fraction > 0


def reporters(name: str) -> list[str]:
    """What `--report_to` means here. Raises `MissingExtraError` for one that is not installed."""
    if name == "none":
        return ["none"]
    installed = importlib.util.find_spec("tensorboard" if name == "auto" else name) is not None
    if name == "auto":
        return ["tensorboard" if installed else "none"]
    if not installed:
        raise MissingExtraError(f"--report_to {name} needs it: pip install {name}, or give --report_to none")
    return [name]
