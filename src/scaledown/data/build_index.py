"""Makes passages and vectors of a corpus, for `scaledown index` and as a part of `scaledown prepare`.

`retrieval/parts.py` changes an index: it adds parts and removes articles.
"""

import logging
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from scaledown.command import CommandHelp, program_name, run_cli
from scaledown.config.index import IndexCommandConfig, IndexConfig
from scaledown.data.input import tables
from scaledown.data.input.corpus import build_passages, bundled_corpus
from scaledown.data.input.files import (
    Source,
    every,
    format_suffix,
    input_files,
    locate,
    passed_over,
    sources,
)
from scaledown.data.input.folders import guessed_line, passed_over_line
from scaledown.data.input.remote import Remote
from scaledown.data.retrieval.encoders import Encoder, is_sparse, load_encoder
from scaledown.data.retrieval.index import is_dense
from scaledown.data.retrieval.parts import (
    IndexPart,
    IndexState,
    Joined,
    change,
    dtype_of,
    only_state,
    open_stage,
    state_file,
    states,
)
from scaledown.data.retrieval.seismic import SeismicIndex
from scaledown.data.retrieval.stages import encode_passages
from scaledown.data.workers import AnyIndexConfig, settings_of, share_work, supervised
from scaledown.devices.choice import choose_device, dtype_to_run, same_bits
from scaledown.devices.gpus import OnDevice
from scaledown.errors import InputError, UsageError
from scaledown.models.sources import ModelSource, resolve
from scaledown.run.directory import RunDirectory
from scaledown.run.heartbeat import publishing
from scaledown.run.locations import index_of
from scaledown.run.outputs import check_apart
from scaledown.run.progress import counted, duration
from scaledown.run.prometheus import metrics_file
from scaledown.run.stage import Stage, StageResult
from scaledown.urls import redacted

log = logging.getLogger("scaledown")


WORK_ON_INDEX: Final = "scaledown.data.build_index:work_on_index"
"""The function that workers call."""


class Index(NamedTuple):
    """The two stages of an index, finished or not, and everything that is needed to finish them."""

    home: RunDirectory
    passages: Stage
    vectors: Stage
    config: IndexConfig
    corpus: Sequence[Source]
    """Empty if the index exists already and the corpus is not given."""
    retriever: ModelSource

    def cut(self, check: Callable[[], None] = lambda: None) -> None:
        """Make the missing passages."""
        if self.corpus:
            build_passages(self.passages, self.config, self.corpus, self.retriever, check)

    def fill(self, encoder: Callable[[], Encoder]) -> None:
        """Make the missing passages and vectors, both at the same time."""
        encode_passages(self.vectors, self.passages, encoder, self.config.weights, self.cut)

    def present(self) -> IndexState:
        """The present state of the index that begins with this part."""
        stages = (self.passages.settings, self.vectors.settings)
        first = IndexState(self.vectors.fingerprint, _lasting_name(self.retriever), *stages)
        return IndexState.read(self.home.storage, self._file) or first

    def at(self, state: IndexState) -> "Index":
        """The stages of the index that begins with this part, in a given state."""
        return self._replace(
            passages=open_stage(self.home, "passages", state.passages),
            vectors=open_stage(self.home, "vectors", state.vectors),
        )

    def record(self) -> None:
        """Record the state of a new index, which consists of this finished part.

        An index that has changed since is recorded already.
        """
        if isinstance(self.vectors, Joined):
            return
        with self.vectors.lease("index", wait=True):
            if not self.home.storage.exists(self._file):
                self.present().write(self.home.storage, self._file)

    @property
    def _file(self) -> Path:
        return state_file(self.home.path, self.vectors.fingerprint)

    @property
    def is_dense(self) -> bool:
        """Whether the finished vectors are from a dense bi-encoder."""
        return is_dense(self.vectors.table(0))

    def approximate(self, memory: float) -> SeismicIndex:
        """The Seismic indexes of the finished vectors, for a search memory of `memory` GB."""
        return SeismicIndex(self.home, self.vectors, memory)


def _lasting_name(model: ModelSource) -> str:
    """Return a name of a model that is valid from any folder, with its revision."""
    if model.revision and "@" not in model.name:
        return f"{model.name}@{model.revision}"
    path = Path(model.name).expanduser()
    return str(path.resolve()) if path.exists() else model.name


def find_corpus(config: IndexConfig) -> list[Source]:
    """Return the files and folders of the corpus, which must exist.

    Without `--corpus_path`: none if `--index_dir` has an index, else the sample corpus.
    """
    if not config.corpus_path:
        if config.index_dir and states(index_of(config)):
            return []
        log.info("no --corpus_path: using the sample corpus of 60 short articles")
    return [locate(name, "--corpus_path") for name in config.corpus_path or (str(bundled_corpus()),)]


def corpus_identity(home: RunDirectory, corpus: Sequence[Source]) -> str:
    """Return a text that changes with the corpus: a hash of its content, or of a server's data about it.

    Without a corpus, the identity of the corpus of the first part of the only index in `home`.
    """
    if not corpus:
        return str(only_state(home.storage).first[0]["corpus"])
    return " ".join(
        source.identity()
        if isinstance(source, Remote)
        else file_identity(home, source, input_files(source, "--corpus_path"))
        for source in corpus
    )


def file_identity(home: RunDirectory, path: Path, files: Sequence[Path] = ()) -> str:
    """Return a text that changes with the content of files, and with the names that decide how they are read.

    These are the suffix and, of a text file, the name, since it is the title.

    Args:
        home: The directory that keeps the hashes.
        path: The file or folder.
        files: The files of a folder that are read.
    """
    kind = format_suffix(path)
    name = path.name if kind in {".txt", ".md"} else kind
    return f"{name if path.is_file() else ''}:{home.content_hash(path, files)}"


def open_index(
    home: RunDirectory,
    config: IndexConfig,
    corpus: Sequence[Source],
    retriever: ModelSource,
    identity: str,
    *,
    beside: bool = False,
) -> Index:
    """Open the first part of an index; `Index.at` then gives the present state.

    Args:
        home: The directory of the index.
        config: The settings.
        corpus: The corpus; without one, the only index in `home` is opened.
        retriever: The model.
        identity: The identity of the model.
        beside: Whether this is a part that is added to an index. No message then compares it with others.

    Returns:
        The part, finished or not.

    Raises:
        UsageError: There is no corpus, and the index was made with other settings.
    """
    cutting = {
        "passages": config.passages,
        "passage_tokens": config.passage_tokens if config.passages == "tokens" else None,
        "tokenizer": identity,
    }
    weights = config.weights if is_sparse(retriever) else None
    encoding = {"retriever": identity, "batch_size": config.batch_size, "weights": weights}
    if not corpus:
        state = only_state(home.storage)
        _check_same(state, home, {**cutting, "weights": weights}, retriever)
        passages, vectors = (
            Stage(home, name, own) for name, own in zip(("passages", "vectors"), state.first, strict=True)
        )
        return Index(home, passages, vectors, config, corpus, retriever)
    passages = Stage(
        home,
        "passages",
        {
            "corpus": corpus_identity(home, corpus),
            "max_corpus_size": config.max_corpus_size,
            **cutting,
            "passages_per_shard": config.passages_per_shard,
            **({"text_column": config.text_column} if config.text_column else {}),
            **tables.version_of(every(corpus, "--corpus_path")),
        },
        beside=beside,
    )
    settings = {"passages": passages.fingerprint, **encoding, **machine_settings(config)}
    vectors = Stage(home, "vectors", settings, beside=beside)
    return Index(home, passages, vectors, config, corpus, retriever)


def _check_same(
    state: IndexState, home: RunDirectory, asked: Mapping[str, Any], retriever: ModelSource
) -> None:
    """Raise `UsageError` if the settings that the user gave differ from the settings of the index."""
    made = {**state.first[1], **state.first[0]}  # both have "passages", which is a mode in the latter
    for name, value in asked.items():
        if made.get(name) == value:
            continue
        there = f"the index in {home.storage} was made with"
        if name == "tokenizer":
            raise UsageError(
                f"--retriever_model {retriever.name} is not the model that {there}: give "
                f"--retriever_model {state.retriever}, unchanged"
            )
        raise UsageError(f"--{name} {value}: {there} --{name} {made.get(name)}: give the same")


def settled(config: AnyIndexConfig, home: RunDirectory, device: str, keeper: RunDirectory) -> AnyIndexConfig:
    """Return the settings with batch sizes and a dtype for the device.

    Args:
        config: The settings.
        home: The directory of the index. `--dtype auto` is the dtype of the indexes in it, if they were made
            on this kind of device.
        device: cpu, cuda, cuda:N or mps.
        keeper: Otherwise this directory decides: see `RunDirectory.dtype`.
    """
    sized = config.sized(device)
    made = dtype_of(states(home.storage), device) if config.dtype == "auto" else ""
    return replace(sized, dtype=made or keeper.dtype(config.dtype, device))


def machine_settings(config: IndexConfig) -> dict[str, str]:
    """Return device kind and dtype, which influence the last bits of a model's output."""
    device = choose_device(config.device)
    return {"device": device.partition(":")[0], "dtype": str(dtype_to_run(config.dtype, device))}


def stage_line(name: str, stage: StageResult, planned: str = "") -> str:
    """Format a stage for a summary: its name, its time, the planned time, its counts.

    Args:
        name: The stage's name.
        stage: The record of the finished stage.
        planned: The planned time, with spaces before it; may be empty.
    """
    counts = ", ".join(
        [counted(count, what.replace("_", " ")) for what, count in stage.counts.items() if count]
        + [f"{what} {value:.4f}" for what, value in stage.measured.items()]
    )
    return f"  {name:<11}{duration(stage.seconds):>11}{planned}   {counts}"


class IndexResult(NamedTuple):
    """The counts and the size of a finished index."""

    stages: dict[str, StageResult]
    """The records of `passages` and `vectors`."""
    size: int
    """Bytes on disk."""
    given_up: int
    """Shards given up after repeated deaths of workers."""
    notes: Sequence[str] = ()
    """Lines about files that were not read, and files whose format was found by their content."""


def _filled(
    home: RunDirectory, config: IndexConfig, corpus: Sequence[Source], *, beside: bool = False
) -> Index:
    """Open the index, or a part that is added `beside` others, and make what is missing."""
    same_bits()
    device = choose_device(config.device)
    config = settled(config, home, device, home)
    retriever = resolve(config.retriever_model)
    index = open_index(home, config, corpus, retriever, retriever.identity(home.content_hash), beside=beside)
    encoder = OnDevice(
        "the retriever", device, lambda: load_encoder(retriever, device, config.dtype, config.batch_size)
    )
    index.fill(encoder)
    encoder.release()
    return index


def work_on_index(settings: Mapping[str, Any], worker: str) -> None:
    """Work as a worker: make shards of the index, together with others."""
    config = settings_of(IndexConfig, settings, worker)
    home = RunDirectory(index_of(config), worker=worker)
    with home.claim("index") as place, publishing(place, worker, home):
        _filled(home, config, find_corpus(config))


def build_index(config: IndexConfig, *, overwrite: bool = False) -> IndexResult:
    """Build an index, or continue an interrupted one; then change it, in one step.

    Args:
        config: The settings. An `IndexCommandConfig` may add articles to the index and remove others.
        overwrite: Whether the metrics file may replace a file that is not a metrics file.

    Returns:
        The counts of the index.

    Raises:
        ScaleDownError: The message says what to do.
    """
    if not config.index_dir:
        raise UsageError("no index: give --index_dir DIR")
    add, remove = (config.add, config.remove) if isinstance(config, IndexCommandConfig) else ((), ())
    if (add or remove) and not config.corpus_path:
        only_state(index_of(config))
    only = {item.name: getattr(config, item.name) for item in fields(IndexConfig)}
    first = IndexConfig(**only)
    added = [IndexConfig(**{**only, "corpus_path": (name,), "max_corpus_size": 0}) for name in add]
    corpora = [find_corpus(first), *([locate(name, "--add")] for name in add)]
    folder = index_of(config)
    read = [source for corpus in corpora for source in corpus]
    check_apart("--index_dir", config.index_dir, read)
    check_apart("--metrics_file", config.metrics_file, read)
    if folder.in_bucket and config.executor == "ray":
        raise UsageError(
            "--executor ray: in a bucket one machine makes the index: leave out this flag; --workers N uses "
            "several GPUs of the machine"
        )
    ids = _ids(remove)
    home = RunDirectory(folder)
    with (
        metrics_file(config.metrics_file, home.path, overwrite=overwrite),
        home.claim("index") as place,
        publishing(place, "", home),
    ):
        parts: list[Index] = []
        given_up = 0
        for own, corpus in zip([first, *added], corpora, strict=True):
            if supervised(own):
                share_work(own, WORK_ON_INDEX, [home])
            parts.append(_filled(home, own, corpus, beside=bool(parts)))
            given_up += home.given_up()
        index, *others = parts
        index.record()
        if (add or remove) and not given_up:
            new = [IndexPart(name, own.passages, own.vectors) for name, own in zip(add, others, strict=True)]
            change(home, index.vectors, ids, new)
        index = index.at(index.present())
    stages: dict[str, Any] = {"passages": index.passages, "vectors": index.vectors}
    return IndexResult(
        {name: stage.finished() for name, stage in stages.items()},
        sum(home.storage.size(file) for stage in stages.values() for file in stage.files()),
        given_up,
        tuple(_notes(config.text_column, corpora)),
    )


def _notes(column: str, corpora: Sequence[Sequence[Source]]) -> Iterator[str]:
    """Lines for the summary: files that were not read, and files whose format was found by their content."""
    for number, corpus in enumerate(corpora):
        flag = "--add" if number else "--corpus_path"
        for source in corpus:
            if over := passed_over(source, "--corpus_path"):
                yield passed_over_line(flag, {f"{source}/{name}": why for name, why in over.items()})
            here = [one for one in sources(source, "--corpus_path") if not isinstance(one, Remote)]
            readings = ((str(one), tables.reading(one, tables.CORPUS, column)) for one in here)
            if guessed := {name: str(how) for name, how in readings if how.guessed}:
                yield guessed_line(flag, guessed)


def index_summary(result: IndexResult, config: IndexConfig) -> str:
    """The text that the finished command prints: size, counts and seconds of each stage, the next command."""
    lines = [f"{index_of(config)}: {result.size / 1e6:,.1f} MB", ""]
    lines += [stage_line(name, stage) for name, stage in result.stages.items()]
    for note in result.notes:
        lines += ["", note]
    if not result.given_up:
        corpus = "".join(f" --corpus_path {shlex.quote(redacted(path))}" for path in config.corpus_path)
        lines += [
            "",
            f"next: {program_name()} prepare --index_dir {shlex.quote(config.index_dir)}{corpus} "
            "--queries_file FILE --output_file FILE, with the same settings",
        ]
    return "\n".join(lines)


def index_failure(result: IndexResult, config: IndexConfig) -> str | None:
    """Why the command failed although there is a summary; None if it did not fail."""
    if not result.given_up:
        return None
    return (
        f"{result.given_up:,} shards were given up: correct the cause, which the logs in "
        f"{index_of(config).root / 'live'} show, and run the same command again"
    )


def _ids(given: Sequence[str]) -> set[str]:
    """Return the ids of `--remove`, given directly or one on each line of a file."""
    ids: set[str] = set()
    for name in given:
        path = Path(name)
        if not path.is_file():
            ids.add(name)
            continue
        try:
            found = {line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()} - {""}
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--remove {name}: cannot be read ({error}): expected one id a line") from error
        if not found:
            raise InputError(f"--remove {name}: the file is empty: expected one id a line")
        log.info("--remove %s: a file with %s ids", name, f"{len(found):,}")
        ids |= found
    return ids


def main(argv: Sequence[str], program: str = "scaledown index") -> int:
    """Run the command line. Returns the exit status."""
    usage = CommandHelp(
        program,
        "--corpus_path PATH --index_dir DIR",
        "Make passages and their vectors once, for many runs. The same command again continues an "
        "interrupted run.",
    )
    return run_cli(
        IndexCommandConfig,
        build_index,
        index_summary,
        failure=index_failure,
        usage=usage,
        argv=argv,
        resumes=True,
    )
