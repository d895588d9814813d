"""Chooses the files of a folder that are input; each other file is skipped with a reason."""

import functools
import itertools
import logging
import re
import stat
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Final, NamedTuple

from scaledown.errors import InputError, one_line

log = logging.getLogger("scaledown")

COMPRESSED_SUFFIXES: Final = {".gz", ".zst", ".zstd", ".bz2"}
TEXT: Final = {".txt", ".md"}
LINES: Final = {".json", ".jsonl", ".ndjson"}
TABLES: Final = {".csv", ".tsv"}
BATCHES: Final = {".parquet", ".arrow", ".feather"}
KNOWN: Final = TEXT | LINES | TABLES | BATCHES

_ABOUT: Final = re.compile(
    r"(readme|licen[cs]e|copying|notice|changelog|contributing|authors|citation|code[-_]of[-_]conduct|security|"
    r"checksums?|md5(sums?)?|sha\d+(sums?)?|requirements|robots)([-_.].*)?",
    re.IGNORECASE,
)
_UNREAD_DOCUMENTS: Final = {".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".html", ".htm"}
_DATASETS_STATE: Final = re.compile(r"(state|dataset_info|dataset_dict)\.json|(cache|indices|tmp).*\.arrow")
_INFOS: Final = "dataset_infos.json"  # beside data of the hub
_TABLE_STATE: Final = {"_temporary", "_delta_log", "_spark_metadata", "__MACOSX"}
# A folder of BEIR has the corpus, the queries and the judgements side by side.
_CORPUS: Final = ("--corpus_path", "corpus", "holds no corpus, as its name says", {"queries", "qrels"})
_QUERIES: Final = ("--queries_file", "queries", "holds no queries, as its name says", {"corpus", "qrels"})
_FILES_IN_LOG: Final = 20  # files in the log; all are in the manifest
_SUMMED: Final = 5  # files in a summary


class Folder(NamedTuple):
    """The content of a folder."""

    files: list[PurePath]
    """The files that are read, relative to the folder, sorted."""
    passed_over: dict[str, str]
    """The reason for each file and folder that is skipped."""


def inner_suffix(path: PurePath) -> str:
    """The ending of the format, without the ending of the compression: `a.jsonl.gz` -> `.jsonl`."""
    return (
        Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSED_SUFFIXES else path.suffix.lower()
    )


def chosen(names: Iterable[PurePath], what: str) -> Folder:
    """Choose the data files of a folder.

    Args:
        names: Paths of all its files, relative to the folder.
        what: The flag that gave the folder. For `--corpus_path` and `--queries_file` the folders of BEIR are
            known.

    Returns:
        The files that are read, sorted, and the others.
    """
    files: list[PurePath] = []
    passed_over: dict[str, str] = {}
    for name in sorted(names):
        outer, reason = _unentered(name) or (name, _unread(name))
        if reason:
            passed_over[str(outer)] = reason
        else:
            files.append(name)
    texts_only = all(inner_suffix(name) in TEXT for name in files)
    saved = {name.parent for name in files if name.suffix == ".arrow"}
    about = [name for name in files if _is_about(name, texts_only=texts_only) or _is_state(name, saved)]
    if len(about) < len(files):
        passed_over |= dict.fromkeys(map(str, about), "is about the data")
        files = [name for name in files if name not in about]
    for flag, own, reason, others in (_CORPUS, _QUERIES):
        if what == flag and any(_called(name) == own for name in files):
            other = [name for name in files if _called(name) in others]
            passed_over |= dict.fromkeys(map(str, other), reason)
            files = [name for name in files if name not in other]
    return Folder(files, passed_over)


def _called(path: PurePath) -> str:
    """The folder of a file within the outer one, or its name without endings."""
    return path.parts[0].partition(".")[0].lower()


def _unentered(path: PurePath) -> tuple[PurePath, str] | None:
    """Return the outermost folder of a path that is skipped, and why; None if none is."""
    for place, part in enumerate(path.parts, 1):
        if part.startswith("."):
            return PurePath(*path.parts[:place]), "is hidden"
        if part.endswith(".work"):
            return PurePath(*path.parts[:place]), "is a run directory"
        if part in _TABLE_STATE:
            return PurePath(*path.parts[:place]), "is what a program left, and no data"
    return None


def _unread(path: PurePath) -> str:
    """Return why a file is not read, by its ending; empty if it is read."""
    if inner_suffix(path) in KNOWN:
        return ""
    if not path.suffix:
        return "has no ending, which would tell its format"
    if path.suffix.lower() in _UNREAD_DOCUMENTS:
        return "its text is not extracted here: save it as .txt"
    return f"its ending {path.suffix} names no format that is read"


def _is_state(path: PurePath, saved: set[PurePath]) -> bool:
    """Whether a file of a data set that `datasets` or the hub wrote has no rows."""
    if path.name == _INFOS:
        return True
    beside = path.parent in saved or any(folder.parent == path.parent for folder in saved)
    return beside and bool(_DATASETS_STATE.fullmatch(path.name))


def _is_about(path: PurePath, *, texts_only: bool) -> bool:
    """Whether a text describes the data; in a folder of texts only if its name is in capitals."""
    if inner_suffix(path) not in TEXT or not _ABOUT.fullmatch(path.name):
        return False
    return not texts_only or re.split(r"[-_.]", path.name)[0].isupper()


def list_folder(folder: Path, what: str) -> Folder:
    """List the data files of a local folder. Links are followed; each file or folder is read once.

    Args:
        folder: The folder.
        what: The flag that gave it.

    Raises:
        InputError: A link leads nowhere, or a folder cannot be listed.
    """
    names: list[PurePath] = []
    passed_over: dict[str, str] = {}
    known: dict[tuple[int, int], str] = {}
    waiting, links = deque([folder]), deque[Path]()
    while waiting or links:
        entry = waiting.popleft() if waiting else links.popleft()
        name = entry.relative_to(folder)
        if _unentered(name):
            names.append(name)  # for the reason
            continue
        try:
            state = entry.stat()
            inside = sorted(entry.iterdir()) if stat.S_ISDIR(state.st_mode) else []
        except OSError as error:
            problem = "is a link that leads nowhere" if entry.is_symlink() else "cannot be read"
            raise InputError(
                f"{what} {folder}: {name} {problem} ({error.strerror}): repair or delete it"
            ) from error
        same = known.setdefault((state.st_dev, state.st_ino), str(name))
        if same != str(name):
            passed_over[str(name)] = f"is the same as {same}"
        elif stat.S_ISDIR(state.st_mode):
            for one in inside:
                (links if one.is_symlink() else waiting).append(one)
        elif stat.S_ISREG(state.st_mode):
            names.append(name)
        else:
            passed_over[str(name)] = "is no regular file"
    found = chosen(names, what)
    return Folder(found.files, dict(sorted((passed_over | found.passed_over).items())))


def passed_over_line(flag: str, files: Mapping[str, str]) -> str:
    """Return the summary's line about files that are not read.

    Args:
        flag: The flag that gave the folder.
        files: The reason for each file.
    """
    named = [one_line(f"{name} ({reason})") for name, reason in itertools.islice(files.items(), _SUMMED)]
    return f"passed over: {len(files):,} of {flag}: {', '.join(named + ['…'] * (len(files) > _SUMMED))}"


def guessed_line(flag: str, files: Mapping[str, str]) -> str:
    """Return the summary's line about files whose columns were found from their content.

    Args:
        flag: The flag that gave the files.
        files: For each file, how it is read.
    """
    named = [one_line(f"{name}: {how}") for name, how in itertools.islice(files.items(), _SUMMED)]
    return f"read by its content, {flag}: {'; '.join(named + ['…'] * (len(files) > _SUMMED))}"


def log_unread_files(what: str, folder: object, passed_over: dict[str, str]) -> None:
    """Log the files of a folder that are not read; equal calls log once.

    Args:
        what: The flag that gave the folder.
        folder: The folder.
        passed_over: The reason for each file.
    """
    _tell(f"{what} {folder}", tuple(passed_over.items()))


@functools.cache
def _tell(shown: str, passed_over: tuple[tuple[str, str], ...]) -> None:
    if passed_over:
        more = f", and {len(passed_over) - _FILES_IN_LOG:,} more" if len(passed_over) > _FILES_IN_LOG else ""
        named = ", ".join(one_line(f"{name} ({reason})") for name, reason in passed_over[:_FILES_IN_LOG])
        log.warning("%s: passed over %s: %s%s", shown, f"{len(passed_over):,}", named, more)
