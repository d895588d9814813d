"""Answer questions by each system: one model, used in several ways, with all other settings equal."""

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import pyarrow as pa

from scaledown.config.evaluate import COMPRESSED, EvaluateConfig
from scaledown.devices.choice import choose_device
from scaledown.devices.gpus import OnDevice
from scaledown.errors import InputError, each_or_error
from scaledown.evaluation import baselines, questions
from scaledown.run.progress import tracked
from scaledown.run.stage import Stage

_ANSWER_COLUMNS: Final = pa.schema(
    {"answer": pa.large_string(), "error": pa.large_string(), "scores": pa.list_(pa.float64())}
)


class _Answered(NamedTuple):
    """A system's answer to one question, or an error; scores of the documents if the system reranks."""

    answer: str
    error: str
    scores: list[float] | None


def answer_shards(
    stage: Stage, asked: Stage, pruned: Stage | None, load: Callable[[], Any], config: EvaluateConfig
) -> None:
    """Answer each shard of questions by one system; `stage` has the system's name.

    If a question cannot be asked, its answer is empty and `error` has the reason. `scores` are those of the
    reranking head or the pointer; None for systems without them.

    Args:
        stage: The stage of answers.
        asked: The finished stage of questions.
        pruned: The finished stage of pruned documents, for the system `pruned`.
        load: Loads the model.
        config: Length of answers, size of batches, rate and budget.
    """
    if stage.done():
        return
    rows = asked.finished().rows
    compressed = stage.name == COMPRESSED
    weigh = OnDevice(
        "the model that weighs tokens",
        choose_device(config.device),
        lambda: baselines.weighing(stage.name, config),
    )
    with tracked(stage, stage.name, "answers", rows) as tracker:

        def work(shard: int) -> pa.Table:
            own = questions.read_questions(asked, shard)
            documents: list[list[str]] = [question.documents for question in own]
            if stage.name == "closed_book":
                documents = [[] for _ in own]
            elif pruned is not None:
                documents = pruned.table(shard).column("documents").to_pylist()
            model = load()

            def answers(places: Sequence[int]) -> list[_Answered]:
                asked_of = [own[place].query for place in places]
                given = [documents[place] for place in places]
                if stage.name in {*baselines.READERS, *baselines.ECHOES}:
                    written = baselines.answer_by_baseline(
                        stage.name, model, asked_of, given, weigh=weigh, config=config
                    )
                else:
                    written = model.answer(
                        asked_of,
                        given,
                        max_new_tokens=config.max_new_tokens,
                        batch_size=config.batch_size,
                        compressed=compressed,
                        compression_rate=config.compression_rate,
                        budget=config.budget,
                    )
                scores: list[list[float] | None] = [None] * len(written)
                if compressed and model.config.ranks:
                    scores = model.rerank(asked_of, given, batch_size=config.batch_size)
                return [_Answered(text, "", own) for text, own in zip(written, scores, strict=True)]

            with stage.noting(shard, lambda: model.halving.count):
                found = [
                    _Answered("", str(one), None) if isinstance(one, InputError) else one
                    for one in each_or_error(answers, range(len(own)))
                ]
            tracker.advance(len(own))
            return pa.Table.from_pylist([one._asdict() for one in found], _ANSWER_COLUMNS)

        stage.complete(len(rows), work)
    weigh.release()
    errors = reranked = 0
    for shard in range(len(rows)):
        table = stage.table(shard)
        errors += sum(map(bool, table.column("error").to_pylist()))
        reranked += table.num_rows - table.column("scores").null_count
    stage.finish(rows, {"answers": sum(rows) - errors, "errors": errors, "reranked": reranked})


def read_answers(stage: Stage, shard: int) -> list[str]:
    """Return the answers of one shard.

    Args:
        stage: A stage that `answer_shards` has filled.
        shard: The number of the shard.

    Returns:
        The answers in the order of the shard's questions; empty for a question that could not be asked.
    """
    answers: list[str] = stage.table(shard).column("answer").to_pylist()
    return answers
