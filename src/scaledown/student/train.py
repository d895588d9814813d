"""`scaledown train`: training data in, a model out; what its folder remembers; what a finished run tells."""

import logging
import os
import shlex
import statistics
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from filelock import FileLock, Timeout

import scaledown
from scaledown.config.flags import command_parser, from_flags, underscored
from scaledown.config.train import FREE, GROUPS, PretrainConfig, TrainConfig
from scaledown.data.build_index import corpus_identity
from scaledown.data.input.download import fetched
from scaledown.data.input.files import locate
from scaledown.data.session.summary import program_name
from scaledown.errors import OutputError, RunDirectoryError, UsageError, run_command
from scaledown.models import choose_device, choose_dtype, quiet_libraries
from scaledown.run.atomic import read_json, write_json
from scaledown.run.directory import RunDirectory
from scaledown.run.logs import start_logging
from scaledown.run.outputs import check_apart
from scaledown.run.progress import duration
from scaledown.student.labels import copied_spans
from scaledown.student.origin import MODEL_FLAGS, Origin, find_origin
from scaledown.student.training.pretraining_data import pretraining_parts
from scaledown.student.training.training_data import Lengths, Part, load_parts, measure_documents
from scaledown.urls import without_secrets

log = logging.getLogger("scaledown")

Config = TrainConfig | PretrainConfig

SETTINGS_FILE: Final = "settings.json"

_FILES: Final = ("train_data", "eval_data", "gold")  # flags that take several
_LOOKED_AT: Final = 1000  # examples, at least, where there are so many
_OWN_FOLDER: Final = ".train"  # in the output: hashes of what was read, and a lock
_CHECKPOINTS: Final = "checkpoint-*"
# What training writes into its folder, as patterns.
_WRITTEN: Final = (
    *(_CHECKPOINTS, SETTINGS_FILE, "README.md", "config.json", "generation_config.json", "*.safetensors*"),
    *("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "trainer_state.json"),
)


class Trained(NamedTuple):
    """A finished run."""

    output: str
    examples: int
    skipped: int
    """Records that could not be used."""
    held_out: int
    shared: int
    """Held-out examples one of whose articles is trained on."""
    doc_max_length: int
    documents: Lengths
    steps: int
    planned_steps: int
    batch_size: int
    loss_before: float
    """Mean over the first twentieth of the steps."""
    loss: float
    """Mean over the last twentieth."""
    held_out_before: float | None
    held_out_loss: float | None
    seconds_per_step: float
    already_done: bool = False


def train(config: Config, *, overwrite: bool = False) -> Trained:
    """Train the model that `config` describes into its `output_dir`, or go on with `config.resume`.

    A `PretrainConfig` does so on passages. A finished run is left as it is. With `overwrite` the model takes
    the place of files that no training made. Raises `ScaleDownError`; Ctrl-C leaves a checkpoint first.
    """
    output = Path(config.output_dir)
    check_apart("--output_dir", config.output_dir, [*getattr(config, "corpus_path", ()), *config.gold])
    try:
        home = RunDirectory(output / _OWN_FOLDER)
    except OutputError as error:
        raise OutputError(f"--output_dir {output} cannot be written: choose another") from error
    with _alone(home):
        origin = find_origin(config)
        given, config = config, _here(config)
        identity = _identity(given, config, home, origin)
        memory = _recall(output, identity, origin.settled, type(config), overwrite=overwrite)
        if result := memory.get("result"):
            documents = Lengths(**result.pop("documents"))
            return Trained(**result, documents=documents)._replace(
                output=config.output_dir, already_done=True
            )
        return _train(config, memory, origin)


@contextmanager
def _alone(home: RunDirectory) -> Iterator[None]:
    """Keep a second run out of the folder; processes of one run count as one."""
    lock = FileLock(home.path / ".lock")
    if _is_first():
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunDirectoryError(
                f"--output_dir {home.path.parent} is in use by another run: wait for it, or choose another"
            ) from None
    try:
        yield
    finally:
        lock.release()


def _is_first() -> bool:
    """Whether this is the process that writes, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _here(config: Config) -> Config:
    """The same, but for training data behind URLs, which is fetched."""
    files = {
        name: tuple(str(fetched(file, f"--{name}")) for file in getattr(config, name))
        for name in _FILES
        if hasattr(config, name)
    }
    return replace(config, **files)  # type: ignore[arg-type]


def _identity(given: Config, config: Config, home: RunDirectory, origin: Origin) -> dict[str, Any]:
    """All that a run depends on, files and models by their contents; `given` is kept of its settings."""
    return {
        "scaledown": scaledown.__version__,
        "parameters": without_secrets(asdict(given)) | origin.settled,
        "inputs": _inputs(config, home),
        "models": origin.identity(home.content_hash),
    }


def _inputs(config: Config, home: RunDirectory) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    if isinstance(config, PretrainConfig):
        inputs["corpus_path"] = corpus_identity(
            home, [locate(name, "--corpus_path") for name in config.corpus_path]
        )
    for name in ("train_data", "eval_data"):
        if not hasattr(config, name):
            continue
        paths = [Path(file) for file in getattr(config, name)]
        for path in paths:
            if not path.is_file():
                raise UsageError(f"--{name} {path}: there is no such file; check the path")
        inputs[name] = [home.content_hash(path) for path in paths]
    inputs["gold"] = [home.content_hash(Path(str(locate(file, "--gold")))) for file in config.gold]
    return inputs


def _recall(
    output: Path,
    identity: dict[str, Any],
    settled: Container[str],
    kind: type[Config],
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """What the folder remembers of this same run, at least `identity`; its models settle some flags.

    Raises `RunDirectoryError` where it holds another run, or files of another origin which `overwrite` does
    not allow to replace; foreign checkpoints stay, for they would be gone on from.
    """
    memory = read_json(output / SETTINGS_FILE)
    if not isinstance(memory, dict) or not memory.keys() >= identity.keys():
        for pattern in (_CHECKPOINTS,) if overwrite else _WRITTEN:
            for path in output.glob(pattern):
                way = "" if pattern == _CHECKPOINTS else ", or give --overwrite to replace it"
                raise RunDirectoryError(
                    f"--output_dir {output} holds {path.name}, and no run: choose another{way}"
                )
        return identity
    defaults = {
        item.name: item.default for item in fields(kind)
    }  # of flags that a run of before did not have
    compared = [
        {
            **{
                name: value
                for name, value in (_plain(defaults) | side["parameters"]).items()
                if name not in FREE and name not in settled
            },
            "train_data": [],
            "gold": [],
            **side["inputs"],
            **side["models"],
        }
        for side in (_plain(memory), _plain(identity))
    ]
    there, here = compared
    different = sorted(name for name in there | here if there.get(name) != here.get(name))
    if different:
        name = different[0]
        values = "" if name in FREE else f": {there.get(name)} there, {here.get(name)} here"
        others = f", and {len(different) - 1} more" if different[1:] else ""
        raise RunDirectoryError(
            f"--output_dir {output} holds a run with another --{name}{values}{others}: use the same, or "
            "choose another folder"
        )
    return memory | {"parameters": identity["parameters"]}


def _plain(content: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from JSON."""
    import orjson

    plain: dict[str, Any] = orjson.loads(orjson.dumps(content))
    return plain


def _train(config: Config, memory: dict[str, Any], origin: Origin) -> Trained:
    output = Path(config.output_dir)
    device = _device(config)
    dtype = choose_dtype(config.dtype, device)

    quiet_libraries()
    from accelerate.utils import set_seed

    from scaledown.student.memory import memory_of
    from scaledown.student.training.checkpoints import newest_checkpoint
    from scaledown.student.training.setup import make_trainer

    checkpoint = newest_checkpoint(output)
    if checkpoint and not config.resume:
        raise RunDirectoryError(
            f"--output_dir {output} has {checkpoint.name} of this run: --resume goes on from there; to start "
            "again, delete the folder"
        )
    settings = origin.settings
    tokenizer = origin.compressor_tokenizer()
    folder = output / _OWN_FOLDER
    if isinstance(config, PretrainConfig):
        taught, held, shared = pretraining_parts(config, tokenizer, folder)
    else:
        taught, held, shared = load_parts(config, folder)
    sources = [taught.examples]
    if held and held.examples is not taught.examples:
        sources.append(held.examples)
    if "documents" not in memory:
        memory["documents"] = measure_documents(sources, tokenizer, settings.doc_max_length)._asdict()
    documents = Lengths(**memory["documents"])
    if documents.cut:
        log.warning(
            "%s of %s documents have more than --doc_max_length %s tokens and are cut; the longest has %s%s",
            *(f"{documents.cut:,}", f"{documents.number:,}", settings.doc_max_length, documents.longest),
            "; pretraining has settled that" if origin.is_pretrained else "",
        )
    if not settings.doc_max_length and documents.longest > 2 * documents.most:
        log.warning(
            "the longest document has %s tokens, 99%% have at most %s: --doc_max_length %s needs fewer "
            "memory tokens for all of them",
            *(documents.longest, documents.most, documents.most),
        )
    settings.doc_max_length = settings.doc_max_length or max(1, documents.longest)
    if settings.is_pointer:
        _tell_labels(taught)
    if _is_first():
        write_json(output / SETTINGS_FILE, memory)
    set_seed(config.seed)
    # Accelerate knows which device is that of each of several processes.
    model = origin.load(dtype, "cpu" if _is_one_of_several() else device)
    if isinstance(config, PretrainConfig) and model.config.is_pointer:
        model.train_pointer_only()
    trainer = make_trainer(model, config, taught, held, device)
    log.info(
        "%s examples, %s steps of %s, %s held out; %s memory tokens a document of up to %s; %s",
        *(f"{len(taught.rows):,}", trainer.schedule.steps, config.batch_size, len(held.rows) if held else 0),
        *(settings.memory_tokens, settings.doc_max_length, f"{device}, {dtype}".replace("torch.", "")),
    )
    log.info("memory: %s", memory_of(model))
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
    if _is_first():
        content = result._asdict() | {"documents": documents._asdict()}
        write_json(output / SETTINGS_FILE, memory | {"result": content})
    return result


def _tell_labels(part: Part) -> None:
    """Say how many examples have answers that teach a pointer nothing."""
    rows = part.rows[:: max(1, len(part.rows) // _LOOKED_AT)]
    without = sum(not any(copied_spans(*part.examples[row][:3])) for row in rows)
    told = log.warning if 2 * without > len(rows) else log.info
    told(
        "of %s of %s examples looked at, the answer copies nothing from the documents: they teach a pointer "
        "nothing",
        *(f"{without:,}", f"{len(rows):,}"),
    )


def _device(config: Config) -> str:
    """Where this process trains. Raises `UsageError` for what cannot be."""
    device = choose_device(config.device)
    if ":" in config.device:  # of what is chosen the number is this process's own
        number = config.device.partition(":")[2]
        raise UsageError(
            f"--device {config.device}: set CUDA_VISIBLE_DEVICES={number} and give --device cuda"
        )
    if config.dtype == "float16" and not device.startswith("cuda"):
        raise UsageError("--dtype float16 trains on CUDA only: use bfloat16 or float32")
    if device == "cuda" and not _is_one_of_several():
        _tell_idle_gpus(config)
    return device


def _is_one_of_several() -> bool:
    """Whether torchrun or `accelerate launch` started this process."""
    return "RANK" in os.environ


def _tell_idle_gpus(config: Config) -> None:
    import torch

    if (count := torch.cuda.device_count()) > 1:
        command = "pretrain" if isinstance(config, PretrainConfig) else "train"
        log.warning(
            "this trains on one GPU, and %s are idle: torchrun --nproc_per_node %s -m scaledown %s, with the "
            "same flags, trains on all",
            *(count - 1, count, command),
        )


def summary(result: Trained, *, pretrained: bool = False) -> str:
    """What a finished command prints: what was trained on what, losses, speed, the next command."""
    lines = ["nothing to do: this run is finished"] if result.already_done else []
    early = f" of {result.planned_steps:,}, stopped early" if result.steps < result.planned_steps else ""
    lines += [
        f"{result.output}: {result.examples:,} examples, {result.steps:,} steps{early}",
        "",
        f"  loss        {result.loss_before:.4f} at the start, {result.loss:.4f} at the end",
    ]
    if result.held_out_loss is not None:
        before = "" if result.held_out_before is None else f"{result.held_out_before:.4f} before training, "
        lines.append(f"  held out    {before}{result.held_out_loss:.4f} after; {result.held_out:,} examples")
    if result.shared:
        lines.append(f"              {result.shared:,} of them share an article with training")
    number, longest, _, cut = result.documents
    lines.append(
        f"  documents   {number:,}, the longest of {longest:,} tokens; "
        + (f"{cut:,} cut to {result.doc_max_length:,}" if cut else "none cut")
    )
    lines.append(f"  step        {duration(result.seconds_per_step)} for {result.batch_size:,} examples")
    if result.skipped:
        lines.append(f"  skipped     {result.skipped:,} unusable records")
    folder = shlex.quote(result.output)
    following = f"answer --model {folder} --help"
    if pretrained:
        following = f"train --pretrained_model {folder} --train_data FILE --output_dir DIR"
    return "\n".join([*lines, "", f"next: {program_name()} {following}"])


def main(argv: Sequence[str] | None = None, program: str = "scaledown train") -> int:
    """The command line; gives the exit status."""
    return run_command_line(
        argv,
        program,
        TrainConfig,
        "--train_data FILE",
        "Train OSCAR: a compressor of documents, and a generator that answers from what it leaves of them. "
        "torchrun and accelerate launch start it on several GPUs.",
    )


def run_command_line(
    argv: Sequence[str] | None, program: str, kind: type[Config], needed: str, description: str
) -> int:
    """A command with the settings `kind`, of which its usage shows the `needed`; gives the exit status."""
    parser, _ = command_parser(program, kind, needed, description, GROUPS)

    words = underscored(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        flags = vars(parser.parse_args(words))
        flags.pop("debug", None)
        overwrite = flags.pop("overwrite", False)
        level = flags.pop("log_level", "info")
        start_logging(level if _is_first() else "error", flags.pop("log_format", "text"))
        flags = {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
        for name in MODEL_FLAGS:
            if "pretrained_model" in flags and name in flags:
                raise UsageError(f"--{name} is settled by --pretrained_model: leave one of them out")
        result = train(from_flags(flags, kind), overwrite=overwrite)
        if _is_first():
            print(summary(result, pretrained=kind is PretrainConfig))
        return 0

    return run_command(command, debug="--debug" in words)
