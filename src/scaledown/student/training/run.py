"""A training run, from its settings to a model in a folder: `train`."""

import importlib.util
import logging
import os
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from scaledown.command import is_first
from scaledown.config.train import PretrainConfig
from scaledown.data.input.download import fetched
from scaledown.data.input.training_files import check_file
from scaledown.devices.choice import choose_device, dtype_to_train, emulates_bfloat16
from scaledown.errors import (
    MissingExtraError,
    OutputError,
    RunDirectoryError,
    UsageError,
    install_command,
)
from scaledown.models.weights import quiet_libraries
from scaledown.run.atomic import write_json
from scaledown.run.directory import RunDirectory
from scaledown.run.outputs import check_apart
from scaledown.run.progress import counted
from scaledown.student.labels import copied_spans
from scaledown.student.training.folder import (
    OWN_FOLDER,
    SETTINGS_FILE,
    TrainingConfig,
    alone,
    identity_of,
    read_record,
    training_of,
)
from scaledown.student.training.origin import Origin, find_origin
from scaledown.student.training.pretraining_data import pretraining_parts
from scaledown.student.training.training_data import (
    Examples,
    Lengths,
    Subset,
    load_parts,
    measure_documents,
)

log = logging.getLogger("scaledown")

_LOOKED_AT: Final = 1000  # examples to check, at least, if there are as many


class Trained(NamedTuple):
    """A finished run."""

    output: str
    """The folder of the model."""
    examples: int
    """Number of examples to train on."""
    skipped: int
    """Records that could not be used."""
    held_out: int
    """Number of held-out examples."""
    shared: int
    """Held-out examples that share an article with the training examples."""
    doc_max_length: int
    """Longest document of the model, in tokens of the compressor."""
    documents: Lengths
    """Lengths of the documents, in tokens of the compressor."""
    steps: int
    """Steps done; with early stopping they may be fewer than planned."""
    planned_steps: int
    """Steps of the schedule."""
    batch_size: int
    """Examples of a step."""
    loss_before: float
    """Mean over the first 5% of the steps."""
    loss: float
    """Mean over the last 5%."""
    held_out_before: float | None
    """Held-out loss before training; None if it was not evaluated."""
    held_out_loss: float | None
    """Held-out loss of the resulting model; None if it was not evaluated."""
    seconds_per_step: float
    """The median; 0 if no step was done."""
    already_done: bool = False
    """Whether the run was finished before, so that nothing was done."""


def train(config: TrainingConfig, *, overwrite: bool = False, command: str = "") -> Trained:
    """Train a model into `config.output_dir`. Ctrl-C writes a checkpoint before it ends the run.

    Args:
        config: The settings. A `PretrainConfig` trains on passages. With `resume` the run continues from its
            newest checkpoint. A finished run is not repeated.
        overwrite: Replace files in the output folder that no training has written.
        command: The command of `scaledown` that makes the same run, if another command has called this.

    Returns:
        Sizes, losses and speed of the finished run.

    Raises:
        ScaleDownError: An input, a model, the device or the output folder cannot be used.
    """
    if not is_first():  # with several processes, only the first logs more than errors
        log.setLevel(logging.ERROR)
    output = Path(config.output_dir)
    check_apart("--output_dir", config.output_dir, [getattr(config, "corpus_path", ""), *config.gold])
    origin = find_origin(config)
    given, config = config, _here(config)
    try:
        home = RunDirectory(output / OWN_FOLDER)
    except OutputError as error:
        raise OutputError(f"--output_dir {output} cannot be written: choose another") from error
    with alone(home):
        identity = identity_of(given, config, home, origin)
        memory = read_record(output, identity, origin.settled, type(config), overwrite=overwrite)
        if result := memory.get("result"):
            documents = Lengths(**result.pop("documents"))
            return Trained(**result, documents=documents)._replace(
                output=config.output_dir, already_done=True
            )
        return _train(config, memory, origin, command)


def _here(config: TrainingConfig) -> TrainingConfig:
    """Download training data behind URLs. Returns settings that name the local files."""
    files = {
        name: tuple(str(fetched(file, f"--{name}")) for file in getattr(config, name))
        for name in config.named("input")
        if isinstance(getattr(config, name), tuple)
    }
    for name in files.keys() & {"train_data", "eval_data", "leave_out"}:
        for file in files[name]:
            check_file(Path(file))
    return replace(config, **files)  # type: ignore[arg-type]


def _train(config: TrainingConfig, memory: dict[str, Any], origin: Origin, command: str) -> Trained:
    output = Path(config.output_dir)
    device = _device(config, command)
    dtype = dtype_to_train(config.dtype, device)

    quiet_libraries()
    from accelerate.utils import set_seed

    from scaledown.student.training.checkpoints import newest_checkpoint
    from scaledown.student.training.memory import memory_of
    from scaledown.student.training.setup import make_trainer, reporters

    reporters(config.report_to)  # before the data is read
    checkpoint = newest_checkpoint(output)
    if checkpoint and not config.resume:
        raise RunDirectoryError(
            f"--output_dir {output} has {checkpoint.name} of this run: --resume goes on from there; to start "
            "again, delete the folder"
        )
    settings = origin.settings
    tokenizer = origin.compressor_tokenizer()
    folder = output / OWN_FOLDER
    if isinstance(config, PretrainConfig):
        taught, held, shared = pretraining_parts(config, tokenizer, folder)
    else:
        taught, held, shared = load_parts(config, folder)
    sources = [taught.examples]
    if held and held.examples is not taught.examples:
        sources.append(held.examples)
    documents = _measured_lengths(sources, tokenizer, memory, origin)
    if not isinstance(config, PretrainConfig) and held and not config.eval_data:
        _warn_of_seen_data(origin, memory["inputs"]["train_data"])
    if settings.kind.picks_tokens:
        _log_labels(taught)
    if is_first():
        write_json(output / SETTINGS_FILE, memory)
    set_seed(config.seed)
    # With several processes, Accelerate moves the model to each process' own device.
    model = origin.load(dtype, "cpu" if _is_one_of_several() else device)
    if isinstance(config, PretrainConfig):
        settings.kind.choose_pretrained(model)
    trainer = make_trainer(model, config, taught, held, device)
    rates = settings.kind.rates
    log.info(
        "%s, %s of %s, %s held out; documents of up to %s tokens, each compressed %s; %s",
        *(counted(len(taught.rows), "examples"), counted(trainer.schedule.steps, "steps")),
        *(config.batch_size, len(held.rows) if held else 0),
        settings.doc_max_length,
        f"{rates[0]}x to {rates[-1]}x" if rates else f"to {settings.memory_tokens} memory tokens",
        f"{device}, {dtype}".replace("torch.", ""),
    )
    log.info("memory: %s", memory_of(model, config.optimizer))
    trainer.run(checkpoint)
    before, after = trainer.held_out_losses()
    losses = [entry["loss"] for entry in trainer.log if "loss" in entry]
    few = max(1, len(losses) // 20)
    result = Trained(
        output=config.output_dir,
        examples=len(taught.rows),
        skipped=sum(source.skipped for source in sources),
        held_out=len(held.rows) if held else 0,
        shared=shared,
        doc_max_length=settings.doc_max_length,
        documents=documents,
        steps=trainer.step,
        planned_steps=trainer.schedule.steps,
        batch_size=config.batch_size,
        loss_before=statistics.fmean(losses[:few]),
        loss=statistics.fmean(losses[-few:]),
        held_out_before=before,
        held_out_loss=after,
        seconds_per_step=statistics.median(trainer.seconds) if trainer.seconds else 0.0,
    )
    trainer.save(output)
    if is_first():
        content = result._asdict() | {"documents": documents._asdict()}
        write_json(output / SETTINGS_FILE, memory | {"result": content})
    return result


def _measured_lengths(
    sources: Sequence[Examples], tokenizer: Any, memory: dict[str, Any], origin: Origin
) -> Lengths:
    """Measure the documents, unless the run has done so, and settle `doc_max_length`."""
    settings = origin.settings
    if "documents" not in memory:
        memory["documents"] = measure_documents(sources, tokenizer, settings.doc_max_length)._asdict()
    documents = Lengths(**memory["documents"])
    if documents.cut:
        log.warning(
            "%s of %s documents have more than --doc_max_length %s tokens and are cut; the longest has %s%s",
            *(f"{documents.cut:,}", f"{documents.number:,}", settings.doc_max_length, documents.longest),
            "; the pretrained model has this limit" if origin.is_pretrained else "",
        )
    is_longest = not settings.doc_max_length
    settings.doc_max_length = settings.doc_max_length or max(1, documents.longest)
    if is_longest and not settings.kind.rates and documents.longest > 2 * documents.most:
        log.warning(
            "the longest document has %s tokens, so each document gets %s memory tokens; 99%% have at most "
            "%s tokens, which compresses these at most %.1fx: --doc_max_length %s cuts the others",
            *(f"{documents.longest:,}", settings.memory_tokens, documents.most),
            *(documents.most / settings.memory_tokens, documents.most),
        )
    return documents


def _warn_of_seen_data(origin: Origin, train_data: Sequence[str]) -> None:
    """Warn if the pretrained model has learned from the data whose held-out part this run measures."""
    if training_of(origin.source).data & set(train_data):
        log.warning(
            "the pretrained model has learned from the same --train_data, and may know the held-out "
            "examples: their loss is too low to choose by; give --eval_data that pretraining has not read"
        )


def _log_labels(part: Subset) -> None:
    """Log how many examples have answers that copy nothing, from which a pointer cannot learn."""
    rows = part.rows[:: max(1, len(part.rows) // _LOOKED_AT)]
    without = sum(not any(copied_spans(*part.examples[row][:3])) for row in rows)
    if without:
        write = log.warning if 2 * without > len(rows) else log.info
        write(
            "of %s examples checked, %s have an answer that copies nothing from the documents: a pointer "
            "learns nothing from them",
            *(f"{len(rows):,}", f"{without:,}"),
        )


def _device(config: TrainingConfig, command: str = "") -> str:
    """Return the device of this process. Raises `UsageError` if it cannot train there."""
    device = choose_device(config.device)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if config.batch_size % ranks:
        nearest = max(1, round(config.batch_size / ranks)) * ranks
        raise UsageError(
            f"--batch_size {config.batch_size} must be a multiple of the {ranks} processes: give {nearest}"
        )
    if ":" in config.device:  # a chosen device may have the number of this process
        number = config.device.partition(":")[2]
        raise UsageError(
            f"--device {config.device}: set CUDA_VISIBLE_DEVICES={number} and give --device cuda"
        )
    if config.dtype == "float16" and not device.startswith("cuda"):
        raise UsageError("--dtype float16 trains on CUDA only: use bfloat16 or float32")
    if flag := config.needs_bitsandbytes:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise MissingExtraError(f"{flag} needs bitsandbytes: {install_command('quantization')}")
        if device == "mps":
            raise UsageError(f"{flag}: bitsandbytes has no support for mps; leave it out")
    if config.dtype == "auto" and emulates_bfloat16(device):
        log.warning(
            "this GPU only emulates bfloat16, so the run trains in float32: --dtype float16 is faster and "
            "needs half of the memory for frozen weights, but some states of a large model may overflow"
        )
    if device == "cuda" and not _is_one_of_several():
        _warn_of_idle_gpus(config, command)
    return device


def _is_one_of_several() -> bool:
    """Whether torchrun or `accelerate launch` started this process."""
    return "RANK" in os.environ


def _warn_of_idle_gpus(config: TrainingConfig, command: str) -> None:
    import torch

    if (count := torch.cuda.device_count()) > 1:
        own = "pretrain" if isinstance(config, PretrainConfig) else "train"
        log.warning(
            "this run trains on one GPU, and %s are idle; to train on all, stop and run torchrun "
            "--nproc_per_node %s -m scaledown %s",
            *(
                count - 1,
                count,
                f"{command}; then repeat this command" if command else f"{own}, with the same flags",
            ),
        )
