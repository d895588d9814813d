"""Find the inputs of a run before any work: corpus, queries and models. Nothing is loaded."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from scaledown.config.prepare import PrepareConfig
from scaledown.data.build_index import find_corpus
from scaledown.data.cleaning.decontaminate import Cleaner
from scaledown.data.input import tables
from scaledown.data.input.files import Source, every, locate, passed_over, sources
from scaledown.data.input.queries import query_files
from scaledown.data.input.remote import Remote
from scaledown.data.manifest import Sources
from scaledown.data.prompts import load_template
from scaledown.data.reranker.api import resolve_reranker
from scaledown.data.retrieval.encoders import is_sparse
from scaledown.data.retrieval.seismic import seismic
from scaledown.data.teacher.api import check_options, check_teacher, find_teacher
from scaledown.data.teacher.base import EngineSettings, TeacherSettings
from scaledown.errors import UsageError
from scaledown.models.sources import resolve
from scaledown.run.outputs import check_apart, lies_in
from scaledown.urls import is_url, local

log = logging.getLogger("scaledown")

_REMOTE_FILES: Final = 20  # checked in advance; each takes a request


def find_sources(config: PrepareConfig) -> Sources:
    """Find inputs and models. A missing one is an error here, before any work.

    Args:
        config: The settings of the run.

    Raises:
        ScaleDownError: An input or a model cannot be used, or settings contradict each other.
    """
    corpus, queries = find_inputs(config)
    if not config.reranks and config.reranker_model != PrepareConfig.reranker_model:
        log.warning("--reranker_model is not used: add --enable_reranking or --top_k_reranking")
    load_template(config.prompt)
    engine = EngineSettings.of(config)
    check_options(engine, TeacherSettings.of(config))
    retriever, teacher = resolve(config.retriever_model), find_teacher(config.teacher_model, engine)
    second = find_teacher(config.second_teacher_model, engine) if config.second_teacher_model else None
    if config.search == "approximate":
        seismic()
        if not is_sparse(retriever):
            raise UsageError("--search approximate is for sparse vectors: use --search exact")
    for model in filter(None, (teacher, second)):
        check_teacher(model, load_in_8bit=config.teacher_8bit, load_in_4bit=config.teacher_4bit)
    return Sources(
        retriever=retriever,
        reranker=resolve_reranker(config.reranker_model) if config.reranks else None,
        teacher=teacher,
        second_teacher=second,
        corpus=corpus,
        queries=queries,
        evaluation=evaluation_files(config),
        passed_over=_passed_over(config, corpus),
        guessed=_guessed(config, corpus, queries),
    )


def _passed_over(config: PrepareConfig, corpus: Sequence[Source]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {"--corpus_path": {}}
    for source in corpus:
        here = passed_over(source, "--corpus_path")
        start = f"{source}/" if len(corpus) > 1 else ""
        found["--corpus_path"] |= {f"{start}{file}": reason for file, reason in here.items()}
    for flag, names in (("--queries_file", config.queries_file), ("--decontaminate", config.decontaminate)):
        found[flag] = {}
        for name in names:
            source = locate(name, flag)
            here = passed_over(source, flag)
            found[flag] |= {f"{source}/{file}": reason for file, reason in here.items()}
    return {flag: files for flag, files in found.items() if files}


def _guessed(
    config: PrepareConfig, corpus: Sequence[Source], queries: Sequence[Source]
) -> dict[str, dict[str, str]]:
    """Return how files are read whose columns are found by their content.

    Raises `InputError` if that fails.
    """
    read = (
        ("--corpus_path", _looked_at(every(corpus, "--corpus_path")), tables.CORPUS, config.text_column),
        ("--queries_file", [one for one in queries if not one.is_dir()], tables.QUERIES, config.query_column),
        ("--decontaminate", evaluation_files(config), tables.GOLD, ""),
    )
    found = {
        flag: {
            str(source): str(how)
            for source in sources
            if (how := tables.reading(source, meaning, column)).guessed
        }
        for flag, sources, meaning, column in read
    }
    return {flag: files for flag, files in found.items() if files}


def _looked_at(files: Sequence[Source]) -> Sequence[Source]:
    """Return the files of a corpus to check before any work: those on this machine, and some remote ones."""
    remote = [file for file in files if isinstance(file, Remote)]
    return [file for file in files if not isinstance(file, Remote)] + remote[:_REMOTE_FILES]


def find_inputs(config: PrepareConfig, *, fetch: bool = True) -> tuple[list[Source], list[Source]]:
    """Find the corpus and the files of queries, and check that no output is among them.

    Args:
        config: The settings of the run.
        fetch: Download MS MARCO's queries if they are wanted; otherwise their file is left out.

    Returns:
        The corpus, which is empty if an index replaces it, and the files of queries.

    Raises:
        InputError: An input does not exist or cannot be read.
        UsageError: An output is an input, or is inside one.
    """
    corpus = find_corpus(config)
    output, run = config.output_file, config.work_dir or f"{config.output_file}.work"
    written = {"--output_file": output, "the run directory": run}
    if config.index_dir:
        written["--index_dir"] = config.index_dir
        if lies_in(config.index_dir, run) and lies_in(run, config.index_dir):
            raise UsageError(f"--index_dir {config.index_dir} is the run directory: name another folder")
    given = (*map(str, corpus), *config.queries_file, *config.decontaminate, config.query_dataset)
    for read in filter(None, given):
        if not is_url(local(read)) and not Path(local(read)).is_dir():
            continue
        for what, path in written.items():
            check_apart(what, path, [read])
    queries = query_files(config, fetch=fetch)
    Cleaner(config).check()
    check_apart("--output_file", output, (*corpus, *queries, *evaluation_files(config)))
    check_apart("--metrics_file", config.metrics_file, (*corpus, *queries, *evaluation_files(config)))
    if lies_in(output, run):
        raise UsageError(f"--output_file {output} lies in the run directory: put it elsewhere")
    if (folder := Path(config.query_dataset)).is_dir() and config.query_dataset:
        queries.append(folder)
    return corpus, queries


def evaluation_files(config: PrepareConfig) -> list[Source]:
    """Return the files of `--decontaminate`. Raises `InputError` if one does not exist."""
    flag = "--decontaminate"
    return [path for name in config.decontaminate for path in sources(locate(name, flag), flag)]
