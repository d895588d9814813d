"""Corpus -> passages and their vectors, once for many runs: `scaledown index`, and a part of `prepare`."""

import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from scaledown.config.flags import build_parser, from_flags, underscored
from scaledown.config.prepare import IndexConfig
from scaledown.data.input import tables
from scaledown.data.input.corpus import build_passages, sample_corpus
from scaledown.data.input.files import Source, every, inner_suffix, input_files, locate
from scaledown.data.input.remote import Remote
from scaledown.data.retrieval.encoders import Encoder, is_sparse, load_encoder
from scaledown.data.retrieval.seismic import SeismicIndex
from scaledown.data.retrieval.stages import encode_passages
from scaledown.data.workers import settings_of, share, supervised
from scaledown.errors import UsageError, tell
from scaledown.gpus import OnDevice
from scaledown.models import ModelSource, choose_device, dtype_to_run, resolve, same_bits
from scaledown.run.directory import RunDirectory
from scaledown.run.heartbeat import publishing
from scaledown.run.locations import index_of
from scaledown.run.logs import start_logging
from scaledown.run.outputs import check_apart
from scaledown.run.progress import duration
from scaledown.run.prometheus import metrics_file
from scaledown.run.stage import Stage, StageResult
from scaledown.urls import redacted

log = logging.getLogger("scaledown")

WORK: Final = "scaledown.data.build_index:work"
"""What workers carry out."""


class Index(NamedTuple):
    """The two stages of an index, finished or not, and all that filling them needs."""

    home: RunDirectory
    passages: Stage
    vectors: Stage
    config: IndexConfig
    corpus: Sequence[Source]
    retriever: ModelSource

    def cut(self, check: Callable[[], None] = lambda: None) -> None:
        """Make the missing passages."""
        build_passages(self.passages, self.config, self.corpus, self.retriever, check)

    def fill(self, encoder: Callable[[], Encoder]) -> None:
        """Make the missing passages and vectors, both at the same time."""
        encode_passages(self.vectors, self.passages, encoder, self.config.weights, self.cut)

    @property
    def is_dense(self) -> bool:
        """Whether the finished vectors are those of a dense bi-encoder."""
        return "dense" in self.vectors.table(0).column_names

    def approximate(self, memory: float) -> SeismicIndex:
        """The index for approximate search over the finished vectors, in groups of `memory` GB."""
        return SeismicIndex(self.home, self.vectors, memory)


def find_corpus(config: IndexConfig) -> list[Source]:
    """The files and folders of the corpus, which must be there; without `--corpus_path` the sample."""
    if not config.corpus_path:
        log.info("no --corpus_path: using the sample corpus of 60 short articles")
    return [locate(name, "--corpus_path") for name in config.corpus_path or (str(sample_corpus()),)]


def corpus_identity(home: RunDirectory, corpus: Sequence[Source]) -> str:
    """What changes with the corpus: a hash of its content, or of what a server says of it."""
    return " ".join(
        source.identity()
        if isinstance(source, Remote)
        else file_identity(home, source, input_files(source, "--corpus_path"))
        for source in corpus
    )


def file_identity(home: RunDirectory, path: Path, files: Sequence[Path] = ()) -> str:
    """A hash of content, and of a file's ending, which says how it is read; a text's name is its title."""
    kind = inner_suffix(path)
    name = path.name if kind in {".txt", ".md"} else kind
    return f"{name if path.is_file() else ''}:{home.content_hash(path, files)}"


def open_index(
    home: RunDirectory, config: IndexConfig, corpus: Sequence[Source], retriever: ModelSource, identity: str
) -> Index:
    """The index of `corpus` in `home`. The settings of its stages hold all that their shards depend on."""
    passages = Stage(
        home,
        "passages",
        {
            "corpus": corpus_identity(home, corpus),
            "max_corpus_size": config.max_corpus_size,
            "passages": config.passages,
            "passage_tokens": config.passage_tokens if config.passages == "tokens" else None,
            "tokenizer": identity,
            "passages_per_shard": config.passages_per_shard,
            **({"text_column": config.text_column} if config.text_column else {}),
            **tables.version_of(every(corpus, "--corpus_path")),
        },
    )
    weights = config.weights if is_sparse(retriever) else None
    encoding = {"retriever": identity, "batch_size": config.batch_size, "weights": weights}
    vectors = Stage(home, "vectors", {"passages": passages.fingerprint, **encoding, **machine(config)})
    return Index(home, passages, vectors, config, corpus, retriever)


def machine(config: IndexConfig) -> dict[str, str]:
    """What the last bits of a model's output depend on besides its weights: device kind and dtype."""
    device = choose_device(config.device)
    return {"device": device.partition(":")[0], "dtype": str(dtype_to_run(config.dtype, device))}


def stage_line(name: str, stage: StageResult, planned: str = "") -> str:
    """A stage in a summary: its name, how long it took, what was planned, what it counted."""
    counts = ", ".join(
        [f"{count:,} {what}" for what, count in stage.counts.items() if count]
        + [f"{what} {value:.4f}" for what, value in stage.measured.items()]
    )
    return f"  {name:<11}{duration(stage.seconds):>11}{planned}   {counts}"


class IndexResult(NamedTuple):
    """A finished index: what its stages counted, and its size on disk in bytes."""

    stages: dict[str, StageResult]
    size: int
    given_up: int
    """Shards that workers died of, again and again."""


def _filled(home: RunDirectory, config: IndexConfig, corpus: Sequence[Source]) -> Index:
    """The index, with all that was missing."""
    same_bits()
    device = choose_device(config.device)
    config = config.sized(device)
    retriever = resolve(config.retriever_model)
    index = open_index(home, config, corpus, retriever, retriever.identity(home.content_hash))
    encoder = OnDevice(
        "the retriever", device, lambda: load_encoder(retriever, device, config.dtype, config.batch_size)
    )
    index.fill(encoder)
    encoder.release()
    return index


def work(settings: Mapping[str, Any], worker: str) -> None:
    """What a worker does: fill the index, together with others."""
    config = settings_of(IndexConfig, settings, worker)
    home = RunDirectory(index_of(config), worker=worker)
    with home.claim("index") as place, publishing(place, worker, home):
        _filled(home, config, find_corpus(config))


def build_index(config: IndexConfig, *, overwrite: bool = False) -> IndexResult:
    """Build the index that `config` describes in its `index_dir`, or continue one that was interrupted.

    With `overwrite` the metrics file takes the place of what is no such file.
    """
    if not config.index_dir:
        raise UsageError("no index: give --index_dir DIR")
    corpus = find_corpus(config)
    folder = index_of(config)
    check_apart("--index_dir", config.index_dir, corpus)
    check_apart("--metrics_file", config.metrics_file, corpus)
    home = RunDirectory(folder)
    with (
        metrics_file(config.metrics_file, home.path, overwrite=overwrite),
        home.claim("index") as place,
        publishing(place, "", home),
    ):
        if supervised(config):
            share(config, WORK, [home])
        index = _filled(home, config, corpus)
    stages: dict[str, Any] = {"passages": index.passages, "vectors": index.vectors}
    return IndexResult(
        {name: stage.finished() for name, stage in stages.items()},
        sum(home.storage.size(file) for stage in stages.values() for file in stage.files()),
        home.given_up(),
    )


def main(argv: Sequence[str], program: str = "scaledown index") -> int:
    """The command line; gives the exit status."""
    parser = build_parser(program, IndexConfig)

    flags = vars(parser.parse_args(underscored(argv)))
    flags.pop("debug", None)
    overwrite = flags.pop("overwrite", False)
    start_logging(flags.pop("log_level", "info"), flags.pop("log_format", "text"))
    config = from_flags(flags, IndexConfig)
    result = build_index(config, overwrite=overwrite)
    print(f"{index_of(config)}: {result.size / 1e6:,.1f} MB")
    print()
    for name, stage in result.stages.items():
        print(stage_line(name, stage))
    if result.given_up:
        tell(
            f"error: {result.given_up:,} shards were given up: mend their cause, which the logs in "
            f"{index_of(config).root / 'live'} show, and run the same command again: it tries again"
        )
        return 1
    given = [shlex.quote(redacted(path)) for path in config.corpus_path]
    corpus = f" --corpus_path {' '.join(given)}" if given else ""
    print()
    print(
        f"next: scaledown prepare --index_dir {shlex.quote(config.index_dir)}{corpus} "
        "--queries_file FILE --output_file FILE, with the same settings"
    )
    return 0
