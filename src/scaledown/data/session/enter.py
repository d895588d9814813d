"""The start of a run: find its inputs, compare its settings, enter its directory as one of its processes."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaledown.config.prepare import PrepareConfig
from scaledown.data.build_index import corpus_identity, file_identity, open_index
from scaledown.data.input.files import Source
from scaledown.data.input.remote import Remote
from scaledown.data.manifest import Sources, compared_settings, name_differences
from scaledown.data.prompts import load_template
from scaledown.data.session.resolve import find
from scaledown.errors import UsageError
from scaledown.models import choose_device, same_bits
from scaledown.run.directory import SCHEMA, RunDirectory, fingerprint
from scaledown.run.heartbeat import publishing
from scaledown.run.locations import index_of, run_of


@dataclass(frozen=True)
class Entered:
    """A run whose inputs are all found, in which this process may work."""

    run: RunDirectory
    config: PrepareConfig
    request: str
    home: RunDirectory
    """The directory of passages and vectors."""
    sources: Sources
    identities: dict[str, str]
    inputs: dict[str, Any]


@contextlib.contextmanager
def enter(config: PrepareConfig, repeats: Path | None = None, worker: str = "") -> Iterator[Entered]:
    """Find all inputs and enter the run directory as one of its live processes.

    Args:
        config: The settings.
        repeats: The manifest of a run to be repeated; inputs that differ are named in the log.
        worker: The name of this process if it is one of several workers.

    Raises:
        ScaleDownError: An input is missing, or the directory is in use with other settings.
    """
    same_bits()
    sources = find(config)
    run = RunDirectory(run_of(config), config.part, worker)
    home = RunDirectory(index_of(config), config.part, worker) if config.index_dir else run
    identities = {name: model.identity(run.content_hash) for name, model in sources.models().items()}

    def identity(path: Source) -> str:
        return path.identity() if isinstance(path, Remote) else file_identity(run, path)

    inputs: dict[str, Any] = {
        "corpus": corpus_identity(home, sources.corpus),
        "queries": [identity(path) for path in sources.queries],
        "prompt": fingerprint(load_template(config.prompt)._asdict()),
    }
    if sources.evaluation:
        inputs["evaluation"] = [identity(path) for path in sources.evaluation]
    if config.teacher_lora:
        identities["lora"] = run.content_hash(Path(config.teacher_lora).expanduser())
    if repeats:
        name_differences(repeats, identities, inputs)
    indexed = home.storage.in_bucket and _is_indexed(config, sources, home, identities["retriever"])
    _check_shared_bucket(config, run, home, indexed=indexed)
    request = fingerprint(
        {"schema": SCHEMA, "parameters": compared_settings(config), "models": identities, "inputs": inputs}
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(publishing(stack.enter_context(run.claim(request)), worker, run, home))
        if home is not run:
            place = stack.enter_context(home.claim("index", finished=indexed))
            stack.enter_context(publishing(place, worker, home))
        yield Entered(run, config, request, home, sources, identities, inputs)


def _is_indexed(config: PrepareConfig, sources: Sources, home: RunDirectory, retriever: str) -> bool:
    """Whether the index is finished."""
    sized = config.sized(choose_device(config.device))
    index = open_index(home, sized, sources.corpus, sources.retriever, retriever)
    return index.passages.done() is not None and index.vectors.done() is not None


def _check_shared_bucket(
    config: PrepareConfig, run: RunDirectory, home: RunDirectory, *, indexed: bool
) -> None:
    """Raise `UsageError` where machines that share a bucket would all make the same shards.

    A bucket has no leases. Who makes a shard follows from the part of the queries, so what is not made by
    parts must be there before: the index, and questions that a teacher writes.
    """
    if not (config.shard or config.executor == "ray"):
        return
    flag = "--executor ray" if config.executor == "ray" else "--shard"
    if home.storage.in_bucket and not indexed:
        raise UsageError(
            f"{flag}: in a bucket the index comes first, else each process would make all of it: run "
            "`scaledown index --index_dir URL` with the same settings, then this with that --index_dir"
        )
    if not run.storage.in_bucket:
        return
    if config.shard and config.executor == "ray":
        raise UsageError("--shard: in a bucket Ray gives each worker its part: leave it out")
    first = config.executor == "local" and config.part.number == 0
    if config.num_synthetic_queries and not first and not run.storage.glob(run.path, "synthetic/*/done.json"):
        raise UsageError(
            f"{flag}: in a bucket the questions of --num_synthetic_queries come first, else each process "
            "would write them: run the same command with --shard 0/8 and without --executor; run this when "
            "`scaledown status` shows that synthetic is done"
        )
