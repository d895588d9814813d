"""The command `scaledown answer`: answer one query, or the queries of a file, with a trained model."""

import contextlib
import functools
import itertools
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson
import pyarrow as pa
from filelock import FileLock, Timeout

from scaledown.command import CommandHelp, run_cli
from scaledown.config.answer import GROUPS, AnswerConfig
from scaledown.data.input.training_files import Entry, entries, is_unicode, unanswerable
from scaledown.data.output.writers import write_examples
from scaledown.data.prompts import PROMPT_VERSION
from scaledown.devices.choice import choose_device, dtype_to_run
from scaledown.errors import InputError, NoRoomError, OutputError, RunDirectoryError, each_or_error
from scaledown.models.sources import ModelSource, resolve
from scaledown.models.weights import onto
from scaledown.run.directory import RunDirectory
from scaledown.run.outputs import check_output, note_made
from scaledown.run.progress import counted, track
from scaledown.run.stage import Stage

log = logging.getLogger("scaledown")

_RECORDS_PER_SHARD: Final = 64  # records in a shard, at least; a crash loses at most one shard
_PARTIAL: Final = ".partial"
"""Suffix of the run directory beside an unfinished file of answers."""
_COLUMNS: Final = pa.schema(
    {
        "query": pa.string(),
        "answer": pa.string(),
        "error": pa.string(),
        "compression_rate": pa.int64(),
        "budget": pa.string(),
        "reranking_scores": pa.list_(pa.float64()),
    }
)


class Answered(NamedTuple):
    """Counts of a file of answers; 0 if the answer went to standard output."""

    records: int = 0
    """Records with an answer or an error."""
    failed: int = 0
    """Records with an `error` instead of an answer."""


def answer(config: AnswerConfig, *, overwrite: bool = False) -> Answered:
    """Write one answer to standard output, piece by piece, or the answers to a file.

    Args:
        config: Model, query or file of queries, output.
        overwrite: Replace an output file that this command has not written.

    Returns:
        Counts of the file of answers.

    Raises:
        ScaleDownError: The model, the input or the output cannot be used.
    """
    if config.output_file:
        output = Path(config.output_file)
        reads = [config.data, config.model]  # a file in the model's folder would change the model's hash
        check_output("--output_file", output, reads, made="answer", overwrite=overwrite)
    for text in config.document:
        if _is_file(text):
            log.warning("--document %s is read as text, not as a file: give the text itself", text)
    source = resolve(config.model)  # before the imports: a wrong name is reported at once
    load, engine, config = _loader(source, config)
    with contextlib.ExitStack() as ends:

        @functools.cache
        def model() -> Any:
            loaded = load()
            ends.callback(loaded.close)
            return loaded

        if config.data:
            return _answer_data(model, source, engine, config)
        if config.output_file:
            return _answer_query(model(), config)
        for piece in model().stream(
            config.query, list(config.document), max_new_tokens=config.max_new_tokens, **_reading(config)
        ):
            print(piece, end="", flush=True)
        print()
    return Answered()


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # no file has such a name
        return False


def _loader(source: ModelSource, config: AnswerConfig) -> tuple[Callable[[], Any], str, AnswerConfig]:
    """Return a function that loads the model, the engine's name, and settings without automatic values."""
    from scaledown.student.engine_choice import choose_engine
    from scaledown.student.model import ScaleDownModel

    device = choose_device(config.device)
    engine = choose_engine(config.engine, device, source, eight_bits=config.generator_8bit)
    dtype = dtype_to_run(config.dtype, device)
    batch_size = config.batch_size or engine.batch

    def load() -> Any:
        model = ScaleDownModel.from_pretrained(config.model, dtype=dtype, **onto(device))
        model.engine, _ = engine.start(
            model, source, device, batch_size, asked=config.engine, eight_bits=config.generator_8bit
        )
        return model

    settled = str(dtype).removeprefix("torch.")
    return load, engine.title, replace(config, batch_size=batch_size, device=device, dtype=settled)


def _reading(config: AnswerConfig) -> dict[str, Any]:
    """Return the arguments of `answer` and `stream` that decide how documents are read."""
    return {
        "compressed": not config.uncompressed,
        "compression_rate": config.compression_rate,
        "budget": config.budget,
    }


def _answer_query(model: Any, config: AnswerConfig) -> Answered:
    """Write the answer to one query to a file."""
    output = Path(config.output_file)
    entry = Entry(1, {"query": config.query, "documents": list(config.document)})
    (record,) = _answered_records(model, [entry], config)
    write_examples(output, [record], _COLUMNS)
    note_made(output, "answer")
    return Answered(1, "error" in record)


def _answer_data(load: Callable[[], Any], source: ModelSource, engine: str, config: AnswerConfig) -> Answered:
    """Write the answers to a file's queries to a file, which appears when it is complete.

    Until then the answers are in shards in a folder beside it. The same command continues from them.
    """
    output = Path(config.output_file)
    partial = output.with_name(output.name + _PARTIAL)
    try:
        run = RunDirectory(partial)
        held = FileLock(partial / ".lock").acquire(timeout=0)
    except RunDirectoryError as error:
        raise OutputError(
            f"{partial} holds other things: delete it, or name another --output_file"
        ) from error
    except Timeout:
        raise OutputError(
            f"another process writes --output_file {output}: wait for it, or name another file"
        ) from None
    complete = False
    try:
        with held:
            answered = _write_answers(run, load, source, engine, config)
        complete = True
    finally:  # after the lock is released: NFS keeps a file that is open
        if complete or not any(partial.rglob("*.arrow")):  # also none of a run with other settings
            shutil.rmtree(partial, ignore_errors=True)
    return answered


def _write_answers(
    run: RunDirectory, load: Callable[[], Any], source: ModelSource, engine: str, config: AnswerConfig
) -> Answered:
    rows = max(_RECORDS_PER_SHARD, config.batch_size)
    depends = {name: getattr(config, name) for name in config.named("result")}
    depends |= {"model": source.identity(run.content_hash), "data": run.content_hash(Path(config.data))}
    depends |= {"device": config.device.partition(":")[0], "engine": engine, "prompts": PROMPT_VERSION}
    stage = Stage(run, "answers", depends | {"rows_per_shard": rows})
    shards = count = failed = 0
    blocks = entries(Path(config.data))
    try:
        with track("answer", "answers", None) as tracker:
            while block := list(itertools.islice(blocks, rows)):
                if stage.has(shards):
                    tracker.skip(len(block))
                else:
                    began = time.perf_counter()
                    lines = [orjson.dumps(record) for record in _answered_records(load(), block, config)]
                    stage.write(shards, pa.table({"record": lines}), time.perf_counter() - began)
                    tracker.advance(len(block))
                shards += 1
                count += len(block)
    except BaseException:
        if count:
            kept = counted(count, "answers")
            log.info("%s in %s are kept: the same command continues from there", kept, run.path)
        raise

    def answered() -> Iterator[dict[str, Any]]:
        nonlocal failed
        for shard in range(shards):
            for line in stage.table(shard, check=True).column("record").to_pylist():
                record = orjson.loads(line)
                failed += "error" in record
                yield record

    output = Path(config.output_file)
    write_examples(output, answered(), _COLUMNS)
    note_made(output, "answer")
    return Answered(count, failed)


def _answered_records(model: Any, block: Sequence[Entry], config: AnswerConfig) -> list[dict[str, Any]]:
    """Return query and answer, or error, of each entry."""
    wrong = {place: reason for place, entry in enumerate(block) if (reason := unanswerable(entry))}
    valid = [entry.record for place, entry in enumerate(block) if place not in wrong]
    made = iter(_answers(model, valid, config))
    found = []
    for place, entry in enumerate(block):
        record = {"error": wrong[place]} if place in wrong else next(made)
        if "error" in record:
            log.warning("%s:%s: %s", config.data or "--query", entry.line, record["error"])
        query = entry.record.get("query") if isinstance(entry.record, dict) else None
        found.append({"query": query if isinstance(query, str) and is_unicode(query) else None} | record)
    return found


def _answers(model: Any, records: list[dict[str, Any]], config: AnswerConfig) -> list[dict[str, Any]]:
    """Return for each record its answer and scores, or its error."""

    def answers(part: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        try:
            return written(part)
        except NoRoomError as error:  # otherwise one long record would end the whole file, each time
            raise InputError(str(error)) from error

    def written(part: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        queries = [record["query"] for record in part]
        documents = [record["documents"] for record in part]
        given, scores = documents, None
        if model.config.ranks and not config.uncompressed:
            chosen = {"compression_rate": config.compression_rate, "budget": config.budget}
            read = model.compress_and_rerank(queries, documents, batch_size=config.batch_size, **chosen)
            given, scores = [embeddings for embeddings, _ in read], [relevance for _, relevance in read]
        elif model.config.ranks:
            scores = model.rerank(queries, documents, batch_size=config.batch_size)
        texts = model.answer(
            queries,
            given,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            **_reading(config),
        )
        made: list[dict[str, Any]] = [{"answer": text} for text in texts]
        if model.config.kind.rates and not config.uncompressed:
            rate = config.compression_rate or model.config.compression_rate
            made = [own | {"compression_rate": rate, "budget": config.budget} for own in made]
        if scores is None:
            return made
        return [own | {"reranking_scores": row} for own, row in zip(made, scores, strict=True)]

    found = each_or_error(answers, records)
    return [{"error": str(own)} if isinstance(own, InputError) else own for own in found]


def answer_summary(result: Answered, config: AnswerConfig) -> str:
    """Return what the finished command prints about the file of answers.

    Args:
        result: The result of `answer`.
        config: The settings of the command.

    Returns:
        One line; empty without a file.
    """
    if not config.output_file:
        return ""
    errors = f", {result.failed:,} with an error instead of an answer" if result.failed else ""
    return f"{config.output_file}: {counted(result.records, 'records')}{errors}"


def main(argv: Sequence[str] | None = None, program: str = "scaledown answer") -> int:
    """Run the command line.

    Args:
        argv: The arguments after the command's name; None for those of this process.
        program: The name of the command in its help.

    Returns:
        The exit status, see `run_command`.
    """
    usage = CommandHelp(
        program,
        "--model DIR --query TEXT | --data FILE --output_file FILE",
        "Answer a query about documents, or the queries of a file, with a trained model.",
        GROUPS,
    )
    return run_cli(
        AnswerConfig,
        answer,
        answer_summary,
        failure=lambda result, config: "" if config.output_file and result.failed == result.records else None,
        usage=usage,
        argv=argv,
    )
