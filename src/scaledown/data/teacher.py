"""The teacher: prompts in, answers out. Engines live in `teachers/`."""

import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Final

import pyarrow as pa

from scaledown.config import PrepareConfig
from scaledown.data.corpus import PassageTable
from scaledown.data.prompts import answer_prompt
from scaledown.data.reranker import check_records
from scaledown.data.teachers import Generation, Rejection, Teacher
from scaledown.errors import InputError, MissingExtraError, ModelError, UsageError
from scaledown.models import ModelSource, choose_device, hub_errors, read_config_file, resolve
from scaledown.progress import track
from scaledown.records import Answer, Example, QueryWithDocuments, document_text, full_text
from scaledown.store import Stage

log = logging.getLogger("scaledown")


_WRITERS: Final = ("ForCausalLM", "LMHeadModel", "ModelWithLMHead", "ForConditionalGeneration")


def check_teacher(source: ModelSource, *, load_in_8bit: bool, load_in_4bit: bool) -> None:
    """Find out before any work, without loading it, whether a model can answer.

    Raises `ModelError` for one that does not write, `MissingExtraError` for bits that need one.
    """
    if load_in_8bit or load_in_4bit:
        flag = "--teacher_8bit" if load_in_8bit else "--teacher_4bit"
        if importlib.util.find_spec("bitsandbytes") is None:
            raise MissingExtraError(
                f"{flag} needs bitsandbytes: pip install 'scaledown[quantization]' "
                "(or pip install bitsandbytes)"
            )
    if source.gguf_file:
        return
    with hub_errors(source.name):
        config = read_config_file(source, "config.json") or {}
    kinds = config.get("architectures") or ["LMHeadModel"]  # who does not say may be one
    if config.get("is_encoder_decoder") or not any(kind.endswith(_WRITERS) for kind in kinds):
        raise ModelError(
            f"--teacher_model {source.name} is {kinds[0]}: a teacher is a causal LM (...ForCausalLM), "
            f"such as {PrepareConfig.teacher_model}"
        )


def load_teacher(source: ModelSource, device: str, dtype: str, generation: Generation) -> Teacher:
    """The teacher behind `--teacher_model`."""
    from scaledown.data.teachers.transformers import TransformersTeacher

    check_teacher(source, load_in_8bit=generation.load_in_8bit, load_in_4bit=generation.load_in_4bit)
    bits = " in 8 bits" if generation.load_in_8bit else " in 4 bits" if generation.load_in_4bit else ""
    log.info("teacher: %s%s, transformers on %s", source.name, bits, device)
    return TransformersTeacher(source, device, dtype, generation)


def generate_teacher_answers(
    queries_with_docs: Sequence[QueryWithDocuments],
    teacher_model: str = PrepareConfig.teacher_model,
    *,
    max_new_tokens: int = PrepareConfig.max_new_tokens,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = PrepareConfig.teacher_batch_size,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    device: str = "auto",
    dtype: str = "auto",
) -> list[Example]:
    """Training records for queries whose documents are known; `json.dump` writes them as they are.

    Documents are strings or `{"title", "text"}` and come back as strings; `reranking_scores` are kept.
    A record that cannot be asked (its question alone exceeds the teacher's context) or whose answer is
    empty is left out, and a warning names it.
    """
    if batch_size < 1 or max_new_tokens < 1:
        raise UsageError("batch_size and max_new_tokens must be at least 1")
    queries_with_docs = list(queries_with_docs)
    check_records(queries_with_docs)
    generation = Generation(max_new_tokens, seed, batch_size, load_in_8bit, load_in_4bit)
    teacher = load_teacher(resolve(teacher_model), choose_device(device), dtype, generation)
    texts = [[document_text(document) for document in record["documents"]] for record in queries_with_docs]
    prompts = [
        answer_prompt(str(number), record["query"], documents, temperature)
        for number, (record, documents) in enumerate(zip(queries_with_docs, texts, strict=True))
    ]
    with track("teach", "answers", len(prompts)) as tracker:
        answers = [not_empty(answer) for answer in teacher.answer(prompts, tracker.advance)]
    examples: list[Example] = []
    for record, documents, answer in zip(queries_with_docs, texts, answers, strict=True):
        if isinstance(answer, Rejection):
            log.warning("left out %r: %s", record["query"][:80], answer.reason)
            continue
        example: Example = {"query": record["query"], "documents": documents, "answer": answer.text}
        if "reranking_scores" in record:
            example["reranking_scores"] = record["reranking_scores"]
        examples.append(example)
    return examples


def teach(
    stage: Stage,
    ranked: Stage,
    passages: Stage,
    load: Callable[[], Teacher],
    *,
    documents_per_query: int,
    temperature: float,
) -> None:
    """Let the teacher answer each shard of queries with the first `documents_per_query` documents.

    Adds the columns of `Answer`. Queries that could not be asked, or whose answer is empty, go to the
    quarantine. Raises `InputError` when no query at all was answered.
    """
    if stage.done():
        return
    rows = ranked.finished().rows
    done = sum(count for shard, count in enumerate(rows) if stage.has(shard))
    with track("teach", "answers", sum(rows), done) as tracker:

        def work(shard: int) -> pa.Table:
            texts = PassageTable(passages)
            table = _first_documents(ranked.table(shard), documents_per_query)
            prompts = []
            for record in table.to_pylist():
                found = [texts[row] for row in record["rows"]]
                documents = [full_text(passage.title, passage.text) for passage in found]
                prompts.append(answer_prompt(record["query_id"], record["query"], documents, temperature))
            teacher = load()
            with stage.noting(shard, lambda: teacher.halving.count):
                answers = [not_empty(answer) for answer in teacher.answer(prompts, tracker.advance)]
            stage.quarantine(
                f"{shard:06d}",
                [
                    {"query_id": prompt.key, "reason": answer.reason}
                    for prompt, answer in zip(prompts, answers, strict=True)
                    if isinstance(answer, Rejection)
                ],
            )
            kept = [i for i, answer in enumerate(answers) if isinstance(answer, Answer)]
            table = table.take(pa.array(kept, pa.int64()))
            given = [answer for answer in answers if isinstance(answer, Answer)]
            for name in Answer._fields:
                kind = pa.large_string() if name in {"text", "finish_reason"} else pa.int64()
                table = table.append_column(name, pa.array([getattr(a, name) for a in given], kind))
            return table

        stage.complete(len(rows), work)
    counts = dict.fromkeys(("answers", "rejected", "truncated", "shortened"), 0)
    answered = []
    for shard, asked in enumerate(rows):
        table = stage.table(shard)
        answered.append(table.num_rows)
        counts["answers"] += table.num_rows
        counts["rejected"] += asked - table.num_rows
        counts["truncated"] += table.column("finish_reason").to_pylist().count("length")
        counts["shortened"] += sum(map(bool, table.column("dropped_tokens").to_pylist()))
    if not counts["answers"]:
        raise InputError("no query was answered: quarantine/ in the run directory says why, one by one")
    stage.finish(answered, counts)


def not_empty(answer: Answer | Rejection) -> Answer | Rejection:
    """An answer, or the rejection of an empty one: nothing can be learnt from it."""
    if isinstance(answer, Answer) and not answer.text:
        return Rejection("the teacher's answer is empty")
    return answer


def _first_documents(table: pa.Table, count: int) -> pa.Table:
    """The table with its lists cut to their first `count` entries."""
    for name in ("rows", "scores", "reranking_scores"):
        if name in table.column_names:
            lists = [entries[:count] for entries in table.column(name).to_pylist()]
            place = table.column_names.index(name)
            table = table.set_column(place, name, pa.array(lists, table.schema.field(name).type))
    return table
