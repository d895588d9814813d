"""Settings of `scaledown index`; `scaledown prepare` has the first class, too."""

from dataclasses import dataclass, fields
from typing import Any, Final, Self

from scaledown.config.options import SHARE, Range, option
from scaledown.config.presets import PRESETS
from scaledown.config.shared import AUTO_DTYPE, DTYPES, MACHINE, OUTPUT, WorkersConfig
from scaledown.errors import UsageError

INDEX_WEIGHTS: Final = ("float16", "uint8", "float32")
PASSAGE_MODES: Final = ("tokens", "paragraph", "article")

CORPUS_GROUP: Final = "corpus and passages"
RETRIEVAL: Final = "retrieval"


@dataclass(frozen=True, kw_only=True)
class IndexConfig(WorkersConfig):
    """Settings of `scaledown index`, and those of `scaledown prepare` that make passages and vectors."""

    corpus_path: tuple[str, ...] = option(
        (),
        CORPUS_GROUP,
        "KILT JSON lines, JSONL / Parquet / Arrow / CSV / TSV with id, title, text, or a folder of such or "
        "of text files; plain, gzip, zstd or bzip2; also a URL (https://, s3://), read as a stream; may be "
        "given several times; without it, the index in --index_dir, or else the sample corpus",
        role="input",
        metavar="PATH",
    )
    text_column: str = option(
        "",
        CORPUS_GROUP,
        "column that holds the text; dots reach into records; a number is the place of a column without a "
        "name; without it, found by its name or its content",
        role="result",
        only_with="text_column",
        metavar="NAME",
    )
    max_corpus_size: int = option(
        0,
        CORPUS_GROUP,
        "read only this many articles from the start",
        "articles",
        role="result",
        within=Range(0),
        in_records=True,
    )
    passages: str = option(
        "tokens", CORPUS_GROUP, "what a passage is", role="result", choices=PASSAGE_MODES, in_records=True
    )
    passage_tokens: int = option(
        128,
        CORPUS_GROUP,
        "longest passage, title included, by the retriever's tokenizer",
        "tokens",
        role="result",
        within=Range(16),
        in_records=True,
    )
    max_bad_fraction: float = option(
        0.05,
        CORPUS_GROUP,
        "stop if more than this share of the input lines is malformed",
        role="result",
        within=SHARE,
    )
    retriever_model: str = option(
        "naver/splade-cocondenser-ensembledistil",
        RETRIEVAL,
        "SPLADE model, or sentence-transformers bi-encoder for dense retrieval",
        role="model",
    )
    batch_size: int = option(
        0, RETRIEVAL, "texts encoded at once", "texts", role="result", automatic=(32, 256), within=Range(0)
    )
    weights: str = option(
        "float16",
        RETRIEVAL,
        "how the weights of sparse vectors are stored",
        role="result",
        choices=INDEX_WEIGHTS,
    )
    index_dir: str = option(
        "",
        OUTPUT,
        "keep passages and vectors here, for many runs (scaledown index); without it, in the run directory; "
        "also a URL (s3://, gs://, az://), as for --output_file and --work_dir",
        role="place",
        metavar="DIR",
    )
    cache_dir: str = option(
        "",
        OUTPUT,
        "local copies of what is read and written at such URLs; without it, the usual cache of downloads",
        role="place",
        metavar="DIR",
    )
    passages_per_shard: int = option(
        8192,
        OUTPUT,
        "passages held in memory; a crash loses no more than these",
        "passages",
        role="result",
        within=Range(1),
    )
    device: str = option("auto", MACHINE, "auto, cpu, cuda, cuda:N or mps", role="result", metavar="DEVICE")
    dtype: str = option("auto", MACHINE, AUTO_DTYPE, role="result", choices=DTYPES, in_records=True)

    @classmethod
    def preset(cls, name: str, **settings: Any) -> Self:
        """Return the settings of a preset.

        Args:
            name: `guide`, `oscar` or `demo`. Settings of the preset that this command does not have are left
                out.
            settings: Settings that replace those of the preset.

        Raises:
            UsageError: There is no such preset, or a setting is not allowed.
        """
        if name not in PRESETS:
            raise UsageError(f"--preset {name}: use one of {', '.join(PRESETS)}")
        own = {item.name for item in fields(cls)}
        return cls(**{key: value for key, value in PRESETS[name].items() if key in own} | settings)


@dataclass(frozen=True, kw_only=True)
class IndexCommandConfig(IndexConfig):
    """Settings of `scaledown index`: of an index, and of changes to it."""

    add: tuple[str, ...] = option(
        (),
        CORPUS_GROUP,
        "add the articles of these files to the index in --index_dir, with its other settings; an article "
        "replaces one with the same id",
        role="input",
        metavar="FILE",
    )
    remove: tuple[str, ...] = option(
        (),
        CORPUS_GROUP,
        "first remove these articles from the index: ids, or files with an id on each line",
        role="input",
        metavar="ID",
        ids=True,
    )
