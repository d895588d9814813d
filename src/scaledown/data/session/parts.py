"""Runs in a bucket that machines share: what must be finished before each makes its part of the queries."""

from scaledown.config.prepare import PrepareConfig
from scaledown.data.build_index import open_index, settled
from scaledown.data.manifest import Sources
from scaledown.devices.choice import choose_device
from scaledown.errors import UsageError
from scaledown.run.directory import RunDirectory


def is_indexed(
    config: PrepareConfig, sources: Sources, run: RunDirectory, home: RunDirectory, retriever: str
) -> bool:
    """Whether the index is finished.

    Args:
        config: The settings of the run.
        sources: The inputs and models.
        run: The run directory.
        home: The directory of the index.
        retriever: The identity of the retriever.
    """
    if not home.storage.glob(home.path, "vectors/*/done.json"):
        return False
    settings = settled(config, home, choose_device(config.device), home if sources.corpus else run)
    index = open_index(home, settings, sources.corpus, sources.retriever, retriever)
    return index.passages.done() is not None and index.vectors.done() is not None


def check_parts(config: PrepareConfig, run: RunDirectory, home: RunDirectory, *, indexed: bool) -> None:
    """Check that machines that share a bucket would not make the same shards.

    A bucket has no leases, so the part of the queries decides which process makes a shard. Results that are
    not made by parts must exist before: the index, and questions that a teacher writes.

    Args:
        config: The settings of the run.
        run: The run directory.
        home: The directory of the index.
        indexed: Whether the index is finished.

    Raises:
        UsageError: They would make the same shards.
    """
    if not (config.shard or config.executor == "ray"):
        return
    flag = "--executor ray" if config.executor == "ray" else "--shard"
    if home.storage.in_bucket and not indexed:
        raise UsageError(
            f"{flag}: in a bucket the index comes first, otherwise each process would make it: run "
            "`scaledown index --index_dir URL` with the same settings, then this with that --index_dir"
        )
    if not run.storage.in_bucket:
        return
    if config.shard and config.executor == "ray":
        raise UsageError("--shard: in a bucket Ray gives each worker its part: leave it out")
    first = config.executor == "local" and config.part.number == 0
    if config.num_synthetic_queries and not first and not run.storage.glob(run.path, "synthetic/*/done.json"):
        raise UsageError(
            f"{flag}: in a bucket the questions of --num_synthetic_queries come first, otherwise each "
            "process would write them: run the same command with --shard 0/8 and without --executor; run "
            "this when "
            "`scaledown status` shows that synthetic is done"
        )
