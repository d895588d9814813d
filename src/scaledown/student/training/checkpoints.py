"""Checkpoints: a model as `from_pretrained` reads it, and the other state that a run continues from.

checkpoint-N/
├── model.safetensors, …         the model after step N
├── optimizer.safetensors        the optimiser's state, `PARAMETER/NAME`
├── random-RANK.safetensors      states of the random number generators of each process
├── shards/                      if processes share a model: Accelerate's state instead of the optimiser's
└── training.json                the step and the log; written last: a checkpoint without it is incomplete
"""

import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from scaledown.errors import ModelError, RunDirectoryError
from scaledown.run.atomic import read_json, write_json
from scaledown.student.training.passes import Passes, random_state, set_random_state
from scaledown.student.training.schedule import Log

CHECKPOINTS: Final = 2  # kept; one of them is the best

_STATE_FILE: Final = "training.json"
_OPTIMIZER: Final = "optimizer.safetensors"
_SHARDS: Final = "shards"
_CODES: Final = ("qmap1", "qmap2")  # the tables of 8-bit values, the same for all weights
_EARLIER: Final = "trainer_state.json"  # up to version 0.6


def checkpoint_folder(output: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps, whether or not it exists."""
    return output / f"checkpoint-{step}"


def newest_checkpoint(output: Path) -> Path | None:
    """Find the newest complete checkpoint.

    Args:
        output: The output folder of a run.

    Returns:
        The folder; None if there is none.

    Raises:
        RunDirectoryError: All checkpoints are of version 0.6.
    """
    steps = sorted(_steps(output), reverse=True)
    whole = [place for step in steps if read_json((place := checkpoint_folder(output, step)) / _STATE_FILE)]
    earlier = [place for step in steps if ((place := checkpoint_folder(output, step)) / _EARLIER).exists()]
    if earlier and not whole:
        raise RunDirectoryError(
            f"{earlier[0]} was written by version 0.6, and this version cannot continue from it: finish the "
            f"run with scaledown 0.6, or delete {output} to start again"
        )
    return whole[0] if whole else None


def _steps(output: Path) -> list[int]:
    names = [place.name.removeprefix("checkpoint-") for place in output.glob("checkpoint-*")]
    return [int(name) for name in names if name.isdecimal()]


def delete_old(output: Path, newest: int, best: int) -> None:
    """Keep `CHECKPOINTS` checkpoints, and delete the others.

    Args:
        output: The output folder of the run.
        newest: The checkpoint of this step is kept.
        best: The checkpoint of this step is kept too. 0 if there is none: only the newest ones are kept.
    """
    for step in sorted(_steps(output), key=lambda step: (step == newest, step == best, step))[:-CHECKPOINTS]:
        shutil.rmtree(checkpoint_folder(output, step), ignore_errors=True)


def write_state(folder: Path, passes: Passes, step: int, log: Log) -> None:
    """Write `training.json`, which makes a checkpoint complete.

    Args:
        folder: The checkpoint.
        passes: Its micro batch, and in float16 the scale of its losses, are stored.
        step: Number of finished steps.
        log: All values logged so far.
    """
    scaler = passes.accelerator.scaler  # scales losses in float16
    state = {"step": step, "micro_batch": passes.micro_batch, "scaler": scaler and scaler.state_dict()}
    write_json(folder / _STATE_FILE, state | {"log": log})


def read_state(folder: Path, passes: Passes) -> tuple[int, Log]:
    """Read `training.json`, and restore the micro batch and in float16 the scale of the losses.

    Args:
        folder: A complete checkpoint.
        passes: Its micro batch becomes the stored one, unless its own is smaller.

    Returns:
        The number of finished steps, and the log.
    """
    state = read_json(folder / _STATE_FILE)
    passes.micro_batch = min(passes.micro_batch, state["micro_batch"])
    if passes.accelerator.scaler is not None:
        passes.accelerator.scaler.load_state_dict(state["scaler"])
    return state["step"], state["log"]


def save(folder: Path, passes: Passes, model: Any) -> None:
    """Write everything of a checkpoint except `training.json`. All processes must call it.

    Args:
        folder: The checkpoint; created if it does not exist.
        passes: Optimizer and processes.
        model: The `ScaleDownModel`.
    """
    accelerator = passes.accelerator
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder, passes, model)
    if passes.is_shared:
        accelerator.save_state(str(folder / _SHARDS))
    elif accelerator.is_main_process:
        _save_optimizer(folder / _OPTIMIZER, passes.optimizer, model)
    save_file(random_state(passes.device), folder / _random_file(accelerator.process_index))
    accelerator.wait_for_everyone()


def load(folder: Path, passes: Passes, model: Any) -> None:
    """Read what `save` wrote. All processes must call it.

    Args:
        folder: A complete checkpoint.
        passes: Its optimizer and the states of random numbers are restored.
        model: The `ScaleDownModel`; its weights are replaced.

    Raises:
        ModelError: The checkpoint is of another model, or only one of the two runs has processes that share a
            model.
    """
    if passes.is_shared != (folder / _SHARDS).exists():
        how = "each had" if passes.is_shared else "shared"
        raise ModelError(
            f"{folder} is of processes that {how} the model: go on with their configuration of Accelerate"
        )
    if passes.is_shared:
        passes.accelerator.load_state(str(folder / _SHARDS))
    else:
        _load_weights(folder, model)
        _load_optimizer(folder / _OPTIMIZER, passes.optimizer, model)
    random = folder / _random_file(passes.accelerator.process_index)
    if random.exists():  # otherwise there are more processes now than before
        set_random_state(load_file(random), passes.device)


def save_model(folder: Path, passes: Passes, model: Any) -> None:
    """Write the model alone, as `from_pretrained` reads it. All processes must call it.

    Args:
        folder: Created if it does not exist.
        passes: Gathers the weights if processes share the model.
        model: The `ScaleDownModel`.
    """
    weights = passes.accelerator.get_state_dict(passes.model) if passes.is_shared else None
    if passes.accelerator.is_main_process:
        model.save_pretrained(folder, state_dict=weights)


def copy_model(folder: Path, output: Path) -> None:
    """Copy the model of a checkpoint, without the other state.

    Args:
        folder: The checkpoint.
        output: Where to copy to; may exist.
    """
    others = shutil.ignore_patterns(_STATE_FILE, _OPTIMIZER, _random_file("*"), _SHARDS)
    shutil.copytree(folder, output, ignore=others, dirs_exist_ok=True)


def _random_file(rank: int | str) -> str:
    return f"random-{rank}.safetensors"


def _save_optimizer(path: Path, optimizer: Any, model: nn.Module) -> None:
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {
        f"{names[parameter]}/{kind}": torch.as_tensor(value).contiguous()
        for parameter, state in optimizer.state.items()
        for kind, value in state.items()
        if kind not in _CODES
    }
    save_file(tensors, path)


def _load_optimizer(path: Path, optimizer: Any, model: nn.Module) -> None:
    parameters = dict(model.named_parameters())
    kept: dict[torch.Tensor, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, value in load_file(path).items():
        name, _, kind = key.rpartition("/")
        kept[parameters[name]][kind] = value
    start = getattr(
        optimizer.optimizer, "init_state", None
    )  # of bitsandbytes: creates a state with its tables
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            if parameter not in kept:
                continue
            if start:
                start(group, parameter, number, place)
            state = optimizer.state[parameter]
            for kind, value in kept[parameter].items():
                if kind not in state:
                    state[kind] = value.to(parameter.device)
                elif isinstance(state[kind], torch.Tensor):
                    state[kind].copy_(value)  # stays on the device that the optimiser chose
                else:
                    state[kind] = value.item()


def _load_weights(folder: Path, model: Any) -> None:
    weights: dict[str, torch.Tensor] = {}
    for file in folder.glob("model*.safetensors"):
        weights |= load_file(file)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if wrong := [*(name for name in missing if name not in tied), *unexpected]:
        raise ModelError(
            f"the checkpoint does not fit the model ({', '.join(wrong[:3])}): delete it, or give another "
            "--output_dir"
        )
