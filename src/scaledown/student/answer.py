"""The command `scaledown answer`: answer one query, or the queries of a file, with a trained model."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import pyarrow as pa

from scaledown.command import Usage, run_cli
from scaledown.config.answer import GROUPS, AnswerConfig
from scaledown.data.input.training_files import Entry, entries, is_unicode, unanswerable
from scaledown.data.output.writers import write_examples
from scaledown.devices.choice import choose_device, dtype_to_run
from scaledown.errors import InputError, each_or_error
from scaledown.models.sources import resolve
from scaledown.models.weights import onto
from scaledown.run.outputs import check_output, note_made
from scaledown.run.progress import track

log = logging.getLogger("scaledown")

_AT_ONCE: Final = 256  # records in memory at a time
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
        check_output("--output_file", output, [config.data], made="answer", overwrite=overwrite)
    for text in config.document:
        if _is_file(text):
            log.warning("--document %s is read as text, not as a file: give the text itself", text)
    model, config = _load(config)
    try:
        if config.output_file:
            return _answer_file(model, config)
        for piece in model.stream(
            config.query, list(config.document), max_new_tokens=config.max_new_tokens, **_way(config)
        ):
            print(piece, end="", flush=True)
        print()
    finally:
        model.close()
    return Answered()


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # no file has such a name
        return False


def _load(config: AnswerConfig) -> tuple[Any, AnswerConfig]:
    """Load the model with its engine; return it with settings whose batch size suits the engine."""
    source = resolve(config.model)  # before the imports: a wrong name is reported at once
    from scaledown.student.engine_choice import choose_engine
    from scaledown.student.model import ScaleDownModel

    device = choose_device(config.device)
    engine = choose_engine(config.engine, device, source, eight_bits=config.generator_8bit)
    config = replace(config, batch_size=config.batch_size or engine.batch)
    dtype = dtype_to_run(config.dtype, device)
    model = ScaleDownModel.from_pretrained(config.model, dtype=dtype, **onto(device))
    model.engine, _ = engine.start(
        model,
        source,
        device,
        config.batch_size,
        asked=config.engine,
        eight_bits=config.generator_8bit,
    )
    return model, config


def _way(config: AnswerConfig) -> dict[str, Any]:
    """Return the options that say how the model reads documents."""
    return {
        "compressed": not config.uncompressed,
        "compression_rate": config.compression_rate,
        "budget": config.budget,
    }


def _answer_file(model: Any, config: AnswerConfig) -> Answered:
    """Write the answers to a file's queries, or to one query, to a file. It appears when it is complete."""
    output, failed = Path(config.output_file), 0
    if config.data:
        source = entries(Path(config.data))
    else:
        source = iter([Entry(1, {"query": config.query, "documents": list(config.document)})])

    def answered() -> Iterator[dict[str, Any]]:
        nonlocal failed
        while block := list(itertools.islice(source, _AT_ONCE)):
            wrong = {place: reason for place, entry in enumerate(block) if (reason := unanswerable(entry))}
            valid = [entry.record for place, entry in enumerate(block) if place not in wrong]
            made = iter(_answers(model, valid, config))
            for place, entry in enumerate(block):
                record = {"error": wrong[place]} if place in wrong else next(made)
                if "error" in record:
                    failed += 1
                    log.warning("%s:%s: %s", config.data or "--query", entry.line, record["error"])
                query = entry.record.get("query") if isinstance(entry.record, dict) else None
                yield {"query": query if isinstance(query, str) and is_unicode(query) else None} | record
            tracker.advance(len(block))

    with track("answer", "answers", None) as tracker:
        count = write_examples(output, answered(), _COLUMNS)
    note_made(output, "answer")
    return Answered(count, failed)


def _answers(model: Any, records: list[dict[str, Any]], config: AnswerConfig) -> list[dict[str, Any]]:
    """Return for each record its answer and scores, or its error."""

    def answers(part: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        queries = [record["query"] for record in part]
        documents = [record["documents"] for record in part]
        given, scores = documents, None
        if model.config.ranks and not config.uncompressed:
            chosen = {"compression_rate": config.compression_rate, "budget": config.budget}
            read = model.compress_and_rerank(queries, documents, batch_size=config.batch_size, **chosen)
            given, scores = [embeddings for embeddings, _ in read], [relevance for _, relevance in read]
        elif model.config.ranks:
            scores = model.rerank(queries, documents, batch_size=config.batch_size)
        written = model.answer(
            queries,
            given,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            **_way(config),
        )
        made: list[dict[str, Any]] = [{"answer": answer} for answer in written]
        if model.config.kind.rates and not config.uncompressed:
            rate = config.compression_rate or model.config.compression_rate
            made = [own | {"compression_rate": rate, "budget": config.budget} for own in made]
        if scores is None:
            return made
        return [own | {"reranking_scores": row} for own, row in zip(made, scores, strict=True)]

    found = each_or_error(answers, records)
    return [{"error": str(own)} if isinstance(own, InputError) else own for own in found]


def summary(result: Answered, config: AnswerConfig) -> str:
    """Return what the finished command prints about the file of answers; empty without a file."""
    if not config.output_file:
        return ""
    errors = f", {result.failed:,} with an error instead of an answer" if result.failed else ""
    return (
        f"{config.output_file}: {result.records:,} {'record' if result.records == 1 else 'records'}{errors}"
    )


def main(argv: Sequence[str] | None = None, program: str = "scaledown answer") -> int:
    """Run the command line. Returns the exit status."""
    usage = Usage(
        program,
        "--model DIR --query TEXT | --data FILE --output_file FILE",
        "Answer a query about documents, or the queries of a file, with a trained model.",
        GROUPS,
    )
    return run_cli(
        AnswerConfig,
        answer,
        summary,
        failure=lambda result, config: "" if config.output_file and result.failed == result.records else None,
        usage=usage,
        argv=argv,
    )


if __name__ == "__main__":
    raise SystemExit(main())
