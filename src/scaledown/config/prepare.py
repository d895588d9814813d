"""One frozen dataclass per command. Each field is documented once; that text is the `--help`.

Precedence, lowest first: defaults, `--preset`, `--config`, flags.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Self

from scaledown.config.options import check_ending, option
from scaledown.config.shared import (
    AUTO_DTYPE,
    BATCHES,
    CLEANING,
    DTYPES,
    ENDPOINT,
    ENGINE,
    MACHINE,
    WORKERS,
    CleanConfig,
    EngineConfig,
    Part,
    WorkersConfig,
    batch_for,
)
from scaledown.errors import UsageError
from scaledown.urls import check_store

MS_MARCO_URL: Final = "https://msmarco.z22.web.core.windows.net/msmarcoranking/queries.dev.small.tsv"

WEIGHTS: Final = ("float16", "uint8", "float32")
SEARCHES: Final = ("exact", "approximate")
PASSAGE_MODES: Final = ("tokens", "paragraph", "article")
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
QA_DATASETS: Final = ("natural_questions", "trivia_qa", "squad", "nq_open", "pisco")

# The paper's models and sizes (arXiv 2504.07109, section 4 and table 7) and the bundled ones.
PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "guide": {},
    "oscar": {
        "retriever_model": "naver/splade-v3",
        "reranker_model": "naver/trecdl22-crossencoder-debertav3",
        "teacher_model": "mistralai/Mistral-7B-Instruct-v0.2",
        "passages": "tokens",
        "passage_tokens": 128,
        "top_k_retrieval": 20,
        "top_k_reranking": 5,
        "enable_reranking": True,
        "max_new_tokens": 128,
    },
    "demo": {
        "retriever_model": "bundled:splade-tiny",
        "reranker_model": "ql:bundled:smollm2-135m",
        "teacher_model": "bundled:smollm2-135m",
        "top_k_retrieval": 10,
        "top_k_reranking": 3,
        "enable_reranking": True,
        "max_new_tokens": 48,
    },
}


QUERIES: Final = "queries (one source, or several of the first three)"
CORPUS: Final = "corpus and passages"
RETRIEVAL: Final = "retrieval"
RERANKING: Final = "reranking (off unless one of the first two is given)"
TEACHER: Final = "teacher"
ANSWERS: Final = "answers"
OUTPUT: Final = "output and run"
GROUPS: Final = (
    *(QUERIES, CLEANING, CORPUS, RETRIEVAL, RERANKING, TEACHER, ENGINE, ENDPOINT, ANSWERS),
    *(OUTPUT, MACHINE, WORKERS),
)


@dataclass(frozen=True, kw_only=True)
class IndexConfig(WorkersConfig):
    """Settings of `scaledown index`, and of `scaledown prepare` as far as it makes passages and vectors."""

    corpus_path: str = option(
        "",
        CORPUS,
        "KILT JSON lines, JSONL / Parquet / CSV with id, title, text, or a folder of such or of text files; "
        "plain, gzip, zstd or bzip2; also a URL (https://, s3://), read as a stream; without it, the index "
        "in --index_dir, or else the sample corpus",
        metavar="PATH",
    )
    max_corpus_size: int = option(
        0, CORPUS, "read only this many articles from the start", "articles", metavar="N"
    )
    passages: str = option("tokens", CORPUS, "what a passage is", choices=PASSAGE_MODES)
    passage_tokens: int = option(
        128, CORPUS, "longest passage, title included, by the retriever's tokenizer", "tokens", metavar="N"
    )
    max_bad_fraction: float = option(
        0.05, CORPUS, "stop when more than this share of the input lines is malformed", "0..1", metavar="X"
    )
    retriever_model: str = option(
        "naver/splade-cocondenser-ensembledistil",
        RETRIEVAL,
        "SPLADE model or sentence-transformers bi-encoder (dense retrieval)",
        metavar="MODEL",
    )
    batch_size: int = option(
        0, RETRIEVAL, "texts encoded at once; 0 is 32, on CUDA 256", "texts", metavar="N"
    )
    weights: str = option(
        "float16", RETRIEVAL, "how the weights of sparse vectors are stored", choices=WEIGHTS
    )
    index_dir: str = option(
        "",
        OUTPUT,
        "keep passages and vectors here, for many runs (scaledown index); without it, in the run directory; "
        "also a URL (s3://, hf://buckets/), like the other two",
        metavar="DIR",
    )
    cache_dir: str = option(
        "",
        OUTPUT,
        "what is read and written behind such URLs is kept here, too; without it, where downloads are",
        metavar="DIR",
    )
    passages_per_shard: int = option(
        8192, OUTPUT, "passages kept in memory and lost at most by a crash", "passages", metavar="N"
    )
    device: str = option("auto", MACHINE, "auto, cpu, cuda, cuda:N or mps", metavar="DEVICE")
    dtype: str = option("auto", MACHINE, AUTO_DTYPE, choices=DTYPES)

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_workers()
        self._check_at_least(1, "passages_per_shard")
        self._check_at_least(0, "batch_size", "max_corpus_size")
        self._check_at_least(16, "passage_tokens")
        self._check_share("max_bad_fraction")
        for name in ("index_dir", "output_file", "work_dir"):
            check_store(getattr(self, name, ""))

    def sized(self, device: str) -> Self:
        """With batches that suit the device where none are given."""
        sizes: dict[str, Any] = {
            name: batch_for(name, getattr(self, name), device) for name in BATCHES if hasattr(self, name)
        }
        return replace(self, **sizes)

    @classmethod
    def preset(cls, name: str, **settings: Any) -> Self:
        """The settings of `--preset NAME`, as far as this command has them, with `settings` on top."""
        if name not in PRESETS:
            raise UsageError(f"--preset {name}: use one of {', '.join(PRESETS)}")
        own = {item.name for item in fields(cls)}
        return cls(**{key: value for key, value in PRESETS[name].items() if key in own} | settings)


@dataclass(frozen=True, kw_only=True)
class IndexCommandConfig(IndexConfig):
    """Settings of `scaledown index`: an index, and what changes in it."""

    add: tuple[str, ...] = option(
        (),
        CORPUS,
        "add the articles of these files to the index in --index_dir, with its other settings; an article "
        "takes the place of one with the same id",
        metavar="FILE",
    )
    remove: tuple[str, ...] = option(
        (),
        CORPUS,
        "first remove these articles from the index: ids, or files with an id a line",
        metavar="ID",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_files("add", "remove")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(IndexConfig, CleanConfig, EngineConfig):
    """Settings of `scaledown prepare`."""

    queries_file: tuple[str, ...] = option(
        (),
        QUERIES,
        "text (one query a line), TSV (qid<TAB>query), JSONL, CSV or Parquet; a path or URL; "
        "may be given several times",
        metavar="FILE",
    )
    download_ms_marco: bool = option(False, QUERIES, "use the 6,980 MS MARCO dev queries, downloaded once")
    query_dataset: str = option(
        "",
        QUERIES,
        f"{', '.join(QA_DATASETS)}, or any dataset of the hub or a local path",
        metavar="NAME",
    )
    num_synthetic_queries: int = option(
        0, QUERIES, "let the teacher write this many questions about sampled passages", "queries", metavar="N"
    )
    query_column: str = option(
        "",
        QUERIES,
        "column that holds the query in JSONL, CSV, Parquet or a dataset; dots reach into records "
        "(question.text); without it, found by its name",
        metavar="NAME",
    )
    query_split: str = option("train", QUERIES, "split of --query_dataset", metavar="NAME")
    ms_marco_url: str = option(MS_MARCO_URL, QUERIES, "where --download_ms_marco looks", metavar="URL")
    search: str = option(
        "exact",
        RETRIEVAL,
        "exact, or approximate: Seismic, for sparse vectors, where exact search would take days "
        "(extra: approximate)",
        choices=SEARCHES,
    )
    min_recall: float = option(
        0.99,
        RETRIEVAL,
        "stop when --search approximate finds less than this share of the exact top k on a sample",
        "0..1",
        metavar="X",
    )
    search_memory: float = option(1.0, RETRIEVAL, "what a search may hold at once", "GB", metavar="GB")
    top_k_retrieval: int = option(20, RETRIEVAL, "passages retrieved per query", "passages", metavar="K")
    enable_reranking: bool = option(False, RERANKING, "rerank, and write reranking_scores")
    top_k_reranking: int = option(
        0,
        RERANKING,
        "rerank, and keep this many passages per query; without it, 5 with --enable_reranking",
        "passages",
        metavar="K",
    )
    reranker_model: str = option(
        "cross-encoder/ms-marco-MiniLM-L-6-v2",
        RERANKING,
        "cross-encoder, or ql:NAME for query likelihood under a causal LM",
        metavar="MODEL",
    )
    reranking_score_scale: str = option(
        "raw", RERANKING, "reranking_scores as the model gives them, or mapped to 0..1", choices=SCORE_SCALES
    )
    reranker_batch_size: int = option(
        0, RERANKING, "pairs scored at once; 0 is 16, on CUDA 128", "pairs", metavar="N"
    )
    teacher_model: str = option(
        "mistralai/Mistral-7B-Instruct-v0.2",
        TEACHER,
        "causal LM that answers: a name, a folder or a .gguf file",
        metavar="MODEL",
    )
    max_new_tokens: int = option(128, TEACHER, "longest answer", "tokens", metavar="N")
    temperature: float = option(
        0.0, TEACHER, "0 decodes greedily; above, answers are sampled, seeded per query", metavar="T"
    )
    prompt: str = option(
        "paper",
        TEACHER,
        "paper (OSCAR, figure 14: brief answers), guide (answers in sentences), or a text file with "
        "{documents} and {question}",
        metavar="PROMPT",
    )
    teacher_document_tokens: int = option(
        0, TEACHER, "show the teacher only so much of each document; 0 is all", "tokens", metavar="N"
    )
    truncated_answers: str = option(
        "cut",
        ANSWERS,
        "an answer that ran into --max_new_tokens: cut back to its last sentence end, or kept",
        choices=TRUNCATED,
    )
    bad_answers: str = option(
        "keep",
        ANSWERS,
        "refusals and echoes of the prompt: kept, dropped, or asked once more and then dropped",
        choices=BAD_ANSWERS,
    )
    min_groundedness: float = option(
        0.0,
        ANSWERS,
        "drop answers of whose content words a smaller share is in their documents",
        "0..1",
        metavar="X",
    )
    second_teacher_model: str = option(
        "", ANSWERS, "a second teacher answers too, and how far both agree is reported", metavar="MODEL"
    )
    teacher_logprobs: int = option(
        0,
        ANSWERS,
        "write the teacher's log probabilities of the K likeliest tokens in each place of the answer, as "
        "answer_logprobs (docs/formats.md); up to 20; with transformers, vllm and servers that give them; "
        "0: none",
        "tokens",
        metavar="K",
    )
    columns: tuple[str, ...] = option(
        (), ANSWERS, f"write this too: {', '.join(COLUMNS)}; may be given several times", metavar="NAME"
    )
    output_file: str = option("", OUTPUT, "training data: .json, .jsonl or .parquet", metavar="FILE")
    work_dir: str = option("", OUTPUT, "run directory; without it, <output_file>.work", metavar="DIR")
    seed: int = option(0, OUTPUT, "seed of every random choice", metavar="N")
    queries_per_shard: int = option(
        256, OUTPUT, "queries kept in memory and lost at most by a crash", "queries", metavar="N"
    )
    shard: str = option(
        "",
        WORKERS,
        "make only this part of the queries, from 0: 2/8 is the third of eight; the part that ends last "
        "writes the output",
        metavar="I/N",
    )
    strict: bool = option(False, OUTPUT, "exit with status 1 when any input line or query was quarantined")

    def __post_init__(self) -> None:
        super().__post_init__()
        CleanConfig.__post_init__(self)
        self._check_files("queries_file")
        self._check_queries()
        self._check_numbers()
        if not self.output_file:
            raise UsageError("no output: give --output_file train_data.json")
        if str(self.output_file).endswith("/"):
            raise UsageError(f"--output_file {self.output_file} is a folder: name a file in it")
        check_ending("--output_file", self.output_file)
        self._check_teacher()
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
            raise UsageError(f"{' and '.join(given)} exclude each other: synthetic queries stand alone")

    def _check_teacher(self) -> None:
        for name in self.columns:
            if name not in COLUMNS:
                raise UsageError(f"--columns {name}: use one of {', '.join(COLUMNS)}")
        if {"second_answer", "agreement"} & set(self.columns) and not self.second_teacher_model:
            raise UsageError("--columns second_answer and agreement need --second_teacher_model")
        if not 0 <= self.teacher_logprobs <= MOST_LOGPROBS:
            raise UsageError(
                f"--teacher_logprobs {self.teacher_logprobs}: must lie between 0 and {MOST_LOGPROBS}, the "
                "most that servers give"
            )
        if self.teacher_logprobs and self.teacher_backend == "openvino":
            raise UsageError(
                "--teacher_logprobs: openvino gives none; use --teacher_backend transformers, vllm or "
                "endpoint"
            )
        self._check_engine()

    def _check_numbers(self) -> None:
        self._check_at_least(
            1,
            "top_k_retrieval",
            "max_new_tokens",
            "queries_per_shard",
        )
        self._check_at_least(
            0,
            "reranker_batch_size",
            "num_synthetic_queries",
            "top_k_reranking",
            "teacher_document_tokens",
        )
        if self.top_k_reranking > self.top_k_retrieval:
            raise UsageError(
                f"--top_k_reranking {self.top_k_reranking} is above --top_k_retrieval "
                f"{self.top_k_retrieval}: reranking can only keep what was retrieved"
            )
        self._check_share("min_recall")
        self._check_share("min_groundedness")
        self._check_positive("search_memory")
        self._check_finite("temperature")

    @property
    def reranks(self) -> bool:
        """Whether a reranker runs at all."""
        return self.enable_reranking or self.top_k_reranking > 0

    @property
    def extra_columns(self) -> tuple[str, ...]:
        """What is written beyond the guide's format."""
        return (*self.columns, "answer_logprobs") if self.teacher_logprobs else self.columns

    @property
    def documents_per_query(self) -> int:
        """How many documents each training record has."""
        if not self.reranks:
            return self.top_k_retrieval
        return self.top_k_reranking or min(5, self.top_k_retrieval)

    @property
    def part(self) -> Part:
        """`--shard`; without it, all."""
        number, _, count = (self.shard or "0/1").partition("/")
        return Part(int(number), int(count))
