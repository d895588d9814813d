"""Settings of `scaledown prepare`. The text of each field is its `--help`.

Precedence, lowest first: defaults, `--preset`, `--config`, flags.
"""

import re
from dataclasses import dataclass
from typing import Final

from scaledown.config.index import CORPUS_GROUP, RETRIEVAL, IndexConfig
from scaledown.config.options import SHARE, Range, check_ending, option
from scaledown.config.shared import (
    CLEANING,
    ENDPOINT,
    MACHINE,
    OUTPUT,
    TEACHER_ENGINE,
    WORKERS,
    CleanConfig,
    EngineConfig,
    QueryPart,
)
from scaledown.errors import UsageError
from scaledown.extensions import QUERY_SOURCES

MS_MARCO_URL: Final = "https://msmarco.z22.web.core.windows.net/msmarcoranking/queries.dev.small.tsv"

SEARCHES: Final = ("exact", "approximate")
SCORE_SCALES: Final = ("raw", "sigmoid")
TRUNCATED: Final = ("cut", "keep")
BAD_ANSWERS: Final = ("keep", "drop", "retry")
COLUMNS: Final = (
    "query_id",
    "finish_reason",
    "problem",
    "groundedness",
    "prompt_tokens",
    "answer_tokens",
    "prompt_hash",
    "second_answer",
    "agreement",
)
MOST_LOGPROBS: Final = 20


QUERY_SOURCE: Final = "queries (one source, or several of the first three)"
RERANKING: Final = "reranking (off unless one of the first two is given)"
TEACHER: Final = "teacher"
TEACHER_ANSWERS: Final = "answers"
GROUPS: Final = (
    *(
        QUERY_SOURCE,
        CLEANING,
        CORPUS_GROUP,
        RETRIEVAL,
        RERANKING,
        TEACHER,
        TEACHER_ENGINE,
        ENDPOINT,
        TEACHER_ANSWERS,
    ),
    *(OUTPUT, MACHINE, WORKERS),
)


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(IndexConfig, CleanConfig, EngineConfig):
    """Settings of `scaledown prepare`."""

    queries_file: tuple[str, ...] = option(
        (),
        QUERY_SOURCE,
        "text (one query a line), TSV, CSV, JSONL, Parquet, Arrow or TREC topics; a path or URL; may be "
        "given several times",
        role="input",
        metavar="FILE",
    )
    download_ms_marco: bool = option(
        False, QUERY_SOURCE, "use the 6,980 MS MARCO dev queries, downloaded once", role="result"
    )
    query_dataset: str = option(
        "",
        QUERY_SOURCE,
        f"{', '.join(QUERY_SOURCES)}, or any dataset of the hub or a local path",
        role="result",
        path=True,
        metavar="NAME",
    )
    num_synthetic_queries: int = option(
        0,
        QUERY_SOURCE,
        "let the teacher write this many questions about sampled passages",
        "queries",
        role="result",
        within=Range(0),
    )
    query_column: str = option(
        "",
        QUERY_SOURCE,
        "column that holds the query in a table or a dataset; dots reach into records (question.text); a "
        "number is the place of a column without a name; without it, found by its name or its content",
        role="result",
        metavar="NAME",
    )
    query_split: str = option(
        "train", QUERY_SOURCE, "split of --query_dataset", role="result", metavar="NAME"
    )
    ms_marco_url: str = option(
        MS_MARCO_URL, QUERY_SOURCE, "where --download_ms_marco downloads from", role="result", metavar="URL"
    )
    search: str = option(
        "exact",
        RETRIEVAL,
        "exact; or approximate: Seismic, for sparse vectors, if exact search would take days "
        "(extra: approximate)",
        role="result",
        choices=SEARCHES,
    )
    min_recall: float = option(
        0.99,
        RETRIEVAL,
        "stop if --search approximate finds less than this share of the exact top k on a sample",
        role="result",
        within=SHARE,
        only_with="search",
    )
    search_memory: float = option(
        1.0,
        RETRIEVAL,
        "memory that a search may use",
        "GB",
        role="result",
        within=Range(above=0),
        only_with="search",
    )
    top_k_retrieval: int = option(
        20,
        RETRIEVAL,
        "passages retrieved per query",
        "passages",
        role="result",
        within=Range(1),
        in_records=True,
    )
    enable_reranking: bool = option(
        False, RERANKING, "rerank, and write reranking_scores", role="result", in_records=True
    )
    top_k_reranking: int = option(
        0,
        RERANKING,
        "rerank, and keep this many passages per query; without it, 5 with --enable_reranking",
        "passages",
        role="result",
        within=Range(0),
        in_records=True,
    )
    reranker_model: str = option(
        "cross-encoder/ms-marco-MiniLM-L-6-v2",
        RERANKING,
        "cross-encoder, or ql:NAME for query likelihood under a causal LM",
        role="model",
    )
    reranking_score_scale: str = option(
        "raw",
        RERANKING,
        "write reranking_scores as the model gives them, or mapped to 0..1",
        role="result",
        choices=SCORE_SCALES,
        in_records=True,
    )
    reranker_batch_size: int = option(
        0, RERANKING, "pairs scored at once", "pairs", role="result", automatic=(16, 128), within=Range(0)
    )
    teacher_model: str = option(
        "mistralai/Mistral-7B-Instruct-v0.2",
        TEACHER,
        "causal LM that answers: a name, a folder or a .gguf file",
        role="model",
    )
    max_new_tokens: int = option(
        128, TEACHER, "longest answer", "tokens", role="result", within=Range(1), in_records=True
    )
    temperature: float = option(
        0.0,
        TEACHER,
        "0 decodes greedily; above 0, answers are sampled, with a seed for each query",
        role="result",
        within=Range(0),
        in_records=True,
    )
    prompt: str = option(
        "paper",
        TEACHER,
        "paper (OSCAR, figure 14: brief answers), guide (answers in sentences), or a text file with "
        "{documents} and {question}",
        role="result",
        path=True,
        metavar="PROMPT",
    )
    teacher_document_tokens: int = option(
        0,
        TEACHER,
        "show the teacher only this many tokens of each document; 0: all",
        "tokens",
        role="result",
        within=Range(0),
        in_records=True,
    )
    truncated_answers: str = option(
        "cut",
        TEACHER_ANSWERS,
        "what to do with an answer that reached --max_new_tokens: cut it after its last whole sentence, or "
        "keep it",
        role="result",
        choices=TRUNCATED,
        in_records=True,
    )
    bad_answers: str = option(
        "keep",
        TEACHER_ANSWERS,
        "what to do with refusals and echoes of the prompt: keep them, drop them, or ask once more and then "
        "drop them",
        role="result",
        choices=BAD_ANSWERS,
        in_records=True,
    )
    min_groundedness: float = option(
        0.0,
        TEACHER_ANSWERS,
        "drop an answer if less than this share of its content words occurs in its documents",
        role="result",
        within=SHARE,
        in_records=True,
    )
    second_teacher_model: str = option(
        "",
        TEACHER_ANSWERS,
        "a second teacher that also answers; the report shows how much both agree",
        role="model",
    )
    teacher_logprobs: int = option(
        0,
        TEACHER_ANSWERS,
        "for each token of the answer, write the log probabilities of the teacher's K most probable tokens, "
        "as answer_logprobs (docs/formats.md); up to 20; for transformers, vllm and servers that support it; "
        "0: none",
        "tokens",
        role="result",
        within=Range(0, MOST_LOGPROBS),
        only_with="teacher_logprobs",
    )
    columns: tuple[str, ...] = option(
        (),
        TEACHER_ANSWERS,
        f"also write: {', '.join(COLUMNS)}; may be given several times",
        role="result",
        choices=COLUMNS,
        metavar="NAME",
    )
    output_file: str = option(
        "", OUTPUT, "training data: .json, .jsonl or .parquet", role="place", metavar="FILE"
    )
    work_dir: str = option(
        "", OUTPUT, "run directory; without it, <output_file>.work", role="place", metavar="DIR"
    )
    seed: int = option(0, OUTPUT, "seed of every random choice", role="result")
    queries_per_shard: int = option(
        256,
        OUTPUT,
        "queries held in memory; a crash loses no more than these",
        "queries",
        role="result",
        within=Range(1),
    )
    shard: str = option(
        "",
        WORKERS,
        "make only this part of the queries, counted from 0: 2/8 is the third of eight; the part that ends "
        "last writes the output",
        role="operation",
        metavar="I/N",
    )
    strict: bool = option(
        False, OUTPUT, "exit with status 1 if any input line or query was quarantined", role="report"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_queries()
        if not self.output_file:
            raise UsageError("no output: give --output_file train_data.json")
        if str(self.output_file).endswith("/"):
            raise UsageError(f"--output_file {self.output_file} is a folder: name a file in it")
        check_ending("--output_file", self.output_file)
        if self.top_k_reranking > self.top_k_retrieval:
            raise UsageError(
                f"--top_k_reranking {self.top_k_reranking} is above --top_k_retrieval "
                f"{self.top_k_retrieval}: reranking can only keep what was retrieved"
            )
        if {"second_answer", "agreement"} & set(self.columns) and not self.second_teacher_model:
            raise UsageError("--columns second_answer and agreement need --second_teacher_model")
        found = re.fullmatch(r"(\d+)/(\d+)", self.shard or "0/1")
        if not found or int(found[1]) >= int(found[2]):
            raise UsageError(f"--shard {self.shard}: expected I/N with I from 0 to N-1, as 0/8")

    def _check_queries(self) -> None:
        given = [
            f"--{name}"
            for name in ("queries_file", "download_ms_marco", "query_dataset", "num_synthetic_queries")
            if getattr(self, name)
        ]
        if not given:
            raise UsageError(
                "no queries: give --queries_file, --query_dataset, --download_ms_marco or "
                "--num_synthetic_queries"
            )
        if self.num_synthetic_queries and len(given) > 1:
            raise UsageError(f"{' and '.join(given)} exclude each other: synthetic queries are used alone")

    @property
    def reranks(self) -> bool:
        """Whether a reranker runs."""
        return self.enable_reranking or self.top_k_reranking > 0

    @property
    def extra_columns(self) -> tuple[str, ...]:
        """The columns that are written in addition to the guide's format."""
        return (*self.columns, "answer_logprobs") if self.teacher_logprobs else self.columns

    @property
    def documents_per_query(self) -> int:
        """Number of documents of each training record."""
        if not self.reranks:
            return self.top_k_retrieval
        return self.top_k_reranking or min(5, self.top_k_retrieval)

    @property
    def part(self) -> QueryPart:
        """The part that `--shard` names; without it, the whole."""
        number, _, count = (self.shard or "0/1").partition("/")
        return QueryPart(int(number), int(count))
