"""Set up a trainer with the paper's schedule, on the devices that Accelerate finds."""

import importlib.util
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs, GradientAccumulationPlugin, ProjectConfiguration, set_seed

from scaledown.config.train import StudentConfig
from scaledown.devices.choice import dtype_to_train
from scaledown.devices.cpu_attention import use_matrix_products
from scaledown.errors import MissingExtraError, UsageError
from scaledown.student.training.encoded_examples import Batches, EncodedExamples
from scaledown.student.training.learning_rates import parameter_groups
from scaledown.student.training.passes import SHARED
from scaledown.student.training.schedule import Schedule
from scaledown.student.training.trainer import StudentTrainer
from scaledown.student.training.training_data import Subset, shares, training_order

CPU_MICRO_BATCH: Final = 4  # more is not faster on a CPU, and Linux kills processes that run out of memory

EVALUATED: Final = 1_000
"""Held-out examples of an evaluation; all 2% of 893,000 would take longer than the steps between two."""

LARGE: Final = 1_000_000_000  # trained weights: with gradients and moments they need 16 GB

_PRECISIONS: Final = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def make_trainer(
    model: Any, config: StudentConfig, train: Subset, held: Subset | None, device: str
) -> StudentTrainer:
    """Make a trainer with the paper's schedule, in this process or as one of those that torchrun started.

    Args:
        model: The `ScaleDownModel`; its trained weights become float32.
        config: The settings of the run.
        train: The examples to train on.
        held: The held-out examples; at most `EVALUATED` of them are evaluated. None if there are none.
        device: `cpu`, `cuda`, `cuda:N` or `mps`.

    Raises:
        UsageError: Processes would share a model that cannot be shared.
        MissingExtraError: The package of `--report_to` is not installed.
    """
    recomputes = _make_ready(model, config)
    if device == "cpu" and dtype_to_train(config.dtype, device) is torch.bfloat16:
        use_matrix_products(model.generator, model.compressor)
    accelerator = _accelerator(config, device, recomputes=recomputes)
    ranks = accelerator.num_processes
    share = config.batch_size // ranks
    micro_batch = min(share, config.micro_batch_size or (CPU_MICRO_BATCH if device == "cpu" else share))
    if plugin := accelerator.state.deepspeed_plugin:
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = micro_batch
        if plugin.zero_stage == 3:  # otherwise the model cannot be saved
            plugin.deepspeed_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    set_seed(config.seed, device_specific=True)  # processes must not drop the same places
    torch.empty(
        (), dtype=torch.int64
    ).random_()  # as earlier versions did, so that a seed gives the same weights
    batches = _batches_of_rank(model, config, train, accelerator.process_index, ranks)
    return StudentTrainer(
        model,
        accelerator,
        _optimizer(model, config, device),
        Schedule(len(batches.places), config.eval_steps, config.save_steps, config.early_stopping_patience),
        batches=batches,
        held_out=_held_out(model, config, held) if held else None,
        micro_batch=micro_batch,
        output=Path(config.output_dir),
    )


def _make_ready(model: Any, config: StudentConfig) -> bool:
    """Prepare a model for training. Returns whether it uses gradient checkpointing."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:  # half precision would round small updates to zero
        parameter.data = parameter.data.float()
    recomputes = config.gradient_checkpointing
    if recomputes is None:
        recomputes = sum(parameter.numel() for parameter in trained) >= LARGE
    if recomputes:
        names = (
            "activation_checkpointing_enable",
            "gradient_checkpointing_enable",
        )  # of different releases of transformers 5
        enable = next(getattr(model, name) for name in names if hasattr(model, name))
        enable({"use_reentrant": False})
    return recomputes


def _accelerator(config: StudentConfig, device: str, *, recomputes: bool) -> Accelerator:
    """Configure Accelerate, which `accelerate launch` or torchrun may have started, for this run.

    Raises `UsageError` if processes would share a model that cannot be shared.
    """
    # Accelerate remembers an earlier run in this process, which may have had another precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    # autocast's cache keeps half-precision copies of all trained weights until the end of a pass. With
    # gradient checkpointing there is no memory for them.
    autocast = AutocastKwargs(cache_enabled=not recomputes)
    accelerator = Accelerator(
        kwargs_handlers=[autocast],
        cpu=device == "cpu",
        mixed_precision=_PRECISIONS.get(dtype_to_train(config.dtype, device), "no"),
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=1
        ),  # `Passes` accumulates, not Accelerate
        log_with=reporters(config.report_to) or None,
        project_config=ProjectConfiguration(logging_dir=str(Path(config.output_dir) / "runs")),
    )
    if accelerator.distributed_type in SHARED and (flag := config.needs_bitsandbytes):
        raise UsageError(f"{flag}: not with FSDP or DeepSpeed, which share weights and moments: leave it out")
    return accelerator


def _batches_of_rank(model: Any, config: StudentConfig, train: Subset, rank: int, ranks: int) -> Batches:
    """Return the examples of each step for process `rank` of `ranks`."""
    total = config.max_steps * config.batch_size or max(1, round(config.num_epochs * len(train.rows)))
    order = training_order(np.asarray(train.rows), total, config.seed)
    places = order + np.arange(total) // len(train.rows) * len(
        train.examples
    )  # indices keep growing from pass to pass
    examples = EncodedExamples(train.examples, model, config, trains=True)
    return Batches(examples, shares(places, config.batch_size, rank, ranks))


def _held_out(model: Any, config: StudentConfig, held: Subset) -> Batches:
    """Return the held-out examples to evaluate: at most `EVALUATED`, evenly chosen."""
    count, size = min(len(held.rows), EVALUATED), config.batch_size
    rows = [held.rows[place * len(held.rows) // count] for place in range(count)]
    places = [list(rows[start : start + size]) for start in range(0, len(rows), size)]
    return Batches(EncodedExamples(held.examples, model, config, trains=False), places)


def _optimizer(model: Any, config: StudentConfig, device: str) -> torch.optim.Optimizer:
    """Make AdamW for the trained weights of a model."""
    kind = model.config.kind
    rate = config.compressor_rate(kind.learning_rate)
    groups = parameter_groups(model, config.learning_rate_generator, rate)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=kind.betas, fused=True)
    from bitsandbytes.optim import AdamW8bit

    # Paged: the driver moves moments to the host's memory if the GPU's memory does not suffice.
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, betas=kind.betas, is_paged=device.startswith("cuda"))
    return optimizer


def reporters(name: str) -> list[str]:
    """Return the reporters that `--report_to` names.

    Args:
        name: `auto`, `none` or the name of a reporter, which is the name of its package.

    Returns:
        Names for Accelerate's `log_with`; for `auto` TensorBoard if it is installed.

    Raises:
        MissingExtraError: The named reporter is not installed.
    """
    if name == "none":
        return []
    installed = importlib.util.find_spec("tensorboard" if name == "auto" else name) is not None
    if name == "auto":
        return ["tensorboard"] if installed else []
    if not installed:
        raise MissingExtraError(f"--report_to {name} needs it: pip install {name}, or give --report_to none")
    return [name]
