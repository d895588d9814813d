"""Changes of an index: articles are added as new parts, and removed by the rows of their passages.

`scaledown index` makes a part from a corpus: a stage of passages and a stage of their vectors. A state of an
index is a list of parts and a set of removed rows. The passages of all parts are read as one stage, and so
are the vectors (`Joined`). Parts and states are written once and never change, so a run can end with the
state it began with. Only one small file changes: `vectors/<first part>/index.json` has the present state. It
is replaced at the end of a change, in one step.
"""

import bisect
import functools
import hashlib
import itertools
import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa

from scaledown.data.retrieval.index import Array
from scaledown.devices.choice import is_slow_in_bfloat16
from scaledown.errors import InputError, UsageError
from scaledown.run.atomic import write_json
from scaledown.run.directory import FINGERPRINT, RunDirectory
from scaledown.run.stage import Stage
from scaledown.run.storage import Storage

log = logging.getLogger("scaledown")

INDEX_FILE: Final = "index.json"
_NO_INDEX: Final = "there is no index in {}: scaledown index --corpus_path PATH makes one"
_IDS_IN_ERROR: Final = 5  # ids that an error lists
# A new index is recommended above this share of removed passages, or above this number of parts.
_REMOVED_SHARE: Final = 0.2
_PARTS: Final = 100


class IndexState(NamedTuple):
    """The content of an index at one time."""

    base: str
    """The fingerprint of the first part's vectors. It stays when the index changes."""
    retriever: str
    """The name of the model that encoded the passages, as the user gave it."""
    passages: dict[str, Any]
    """The settings of the stage of passages, for `open_stage`."""
    vectors: dict[str, Any]
    """The settings of the stage of vectors, for `open_stage`."""

    @property
    def first(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings of the passages and of the vectors of the first part."""
        passages, vectors = (own.get("parts", [own])[0] for own in (self.passages, self.vectors))
        return passages, vectors

    @classmethod
    def read(cls, storage: Storage, path: Path) -> "IndexState | None":
        """Read the state of an index from a file.

        Args:
            storage: The storage of the file.
            path: The file.

        Returns:
            The state; None if the file is missing or another version wrote it.
        """
        content = storage.read_json(path)
        if not isinstance(content, dict) or content.keys() != set(cls._fields):
            return None
        state = cls(**content)
        sound = isinstance(state.passages, dict) and isinstance(state.vectors, dict)
        return state if sound and FINGERPRINT.fullmatch(str(state.base)) else None

    def write(self, storage: Storage, path: Path) -> None:
        """Write the state in one step."""
        write_json(path, self._asdict())
        storage.publish(path)


def state_file(home: Path, base: str) -> Path:
    """The path of the file with the present state of the index in `home` that begins with the part `base`."""
    return home / "vectors" / base / INDEX_FILE


def states(storage: Storage) -> list[IndexState]:
    """The present state of each index in a directory."""
    paths = storage.glob(storage.root / "vectors", f"*/{INDEX_FILE}")
    found = ((path, IndexState.read(storage, path)) for path in paths)
    return [state for path, state in found if state and state.base == path.parent.name]


def dtype_of(indexes: Sequence[IndexState], device: str) -> str:
    """Return the dtype in which indexes were encoded on one kind of device.

    Args:
        indexes: The states of the indexes.
        device: cpu, cuda, cuda:N or mps; the number does not matter.

    Returns:
        float32, bfloat16 or float16; empty if no index was encoded on this kind of device, or in several
        dtypes.
    """
    made = [index.first[1] for index in indexes]
    kind = device.partition(":")[0]
    found = {str(own.get("dtype")).removeprefix("torch.") for own in made if own.get("device") == kind}
    if found == {"bfloat16"} and is_slow_in_bfloat16(device):
        log.warning(
            "the index was encoded in bfloat16, which is very slow here: give --dtype float32 without "
            '--corpus_path (in Python: dtype="float32"), then only new queries are encoded so'
        )
    return found.pop() if len(found) == 1 else ""


def only_state(storage: Storage) -> IndexState:
    """The present state of the only index in a directory. Raises `UsageError` for none or several."""
    found = states(storage)
    if not found:
        raise UsageError(_NO_INDEX.format(storage))
    if len(found) > 1:
        raise UsageError(
            f"{storage} holds {len(found)} indexes: choose one by --corpus_path; in Python, use a directory "
            "with one index"
        )
    return found[0]


class Joined(Stage):
    """The finished stages of the parts of an index, read as one stage.

    Its rows are the rows of all parts, in order. Its own folder has only `done.json`; the shards stay in the
    folders of the parts.
    """

    def __init__(self, run: RunDirectory, name: str, settings: Mapping[str, Any]) -> None:
        self.parts = [Stage(run, name, own, beside=True) for own in settings["parts"]]
        self._ends = list(itertools.accumulate(len(part.finished().rows) for part in self.parts))
        super().__init__(run, name, settings, beside=True)

    def path(self, shard: int) -> Path:
        """The path of a shard, in the folder of its part."""
        number = bisect.bisect_right(self._ends, shard)
        return self.parts[number].path(shard - (self._ends[number - 1] if number else 0))

    def files(self) -> list[Path]:
        """All files of its parts."""
        return sorted({path for part in self.parts for path in part.files()})

    def journal(self) -> list[dict[str, Any]]:
        """The journals of its parts, one after the other."""
        return [event for part in self.parts for event in part.journal()]

    @functools.cached_property
    def removed(self) -> Array:
        """The rows that a search must not find, int64, ascending."""
        if not (name := self.settings["removed"]):
            return np.empty(0, np.int64)
        rows: Array = _removed_stage(self._run, name).table(0, check=True).column("row").to_numpy()
        return rows


def _removed_stage(run: RunDirectory, name: str) -> Stage:
    return Stage(run, "removed", {"rows": name}, beside=True)


def open_stage(run: RunDirectory, name: str, settings: Mapping[str, Any]) -> Stage:
    """Open a stage of an index by its settings, whether it has one part or several.

    Args:
        run: The directory of the index.
        name: `passages` or `vectors`.
        settings: The settings of the stage, from `IndexState`.

    Raises:
        RunDirectoryError: The index has several parts, and one of them is unfinished.
    """
    return (Joined if "parts" in settings else Stage)(run, name, settings)


def parts_of(stage: Stage) -> list[Stage]:
    """The stages of the parts of an index."""
    return stage.parts if isinstance(stage, Joined) else [stage]


def removed_rows(stage: Stage) -> Array:
    """The rows of a stage of an index that a search must not find, int64, ascending."""
    return stage.removed if isinstance(stage, Joined) else np.empty(0, np.int64)


def kept_rows(places: Sequence[int], removed: Array) -> list[int]:
    """Convert positions among the passages that were not removed to rows of passages.

    Args:
        places: Positions, counted without the removed rows.
        removed: Rows that were removed, int64, ascending.

    Returns:
        The row of each position.
    """
    kept_before = removed - np.arange(len(removed))
    rows = np.asarray(places, np.int64)
    found: list[int] = (rows + np.searchsorted(kept_before, rows, side="right")).tolist()
    return found


def began_with(run: RunDirectory, present: IndexState) -> IndexState:
    """Return the state of the index that a run uses; for a new run this is written into the run directory.

    Args:
        run: The run directory.
        present: The present state of the index.

    Returns:
        The state that the run began with; `present` for a new run.
    """
    path = run.path / INDEX_FILE
    began = IndexState.read(run.storage, path)
    if began and began.base == present.base:
        return began
    present.write(run.storage, path)
    return present


def warn_about_changes(run: RunDirectory, home: RunDirectory) -> None:
    """Log a warning if an index has changed since a run began.

    Args:
        run: The run directory.
        home: The directory of the index.
    """
    began = IndexState.read(run.storage, run.path / INDEX_FILE)
    present = began and IndexState.read(home.storage, state_file(home.path, began.base))
    if began and present and present != began:
        log.warning(
            "the index in %s has changed since this run began; the run goes on with the earlier state: to "
            "use the new state, start a run with another --output_file",
            home.storage,
        )


class IndexPart(NamedTuple):
    """The finished stages of one corpus."""

    source: str
    """The path or URL that the user gave."""
    passages: Stage
    """The stage of passages."""
    vectors: Stage
    """The stage of their vectors."""


def change(home: RunDirectory, base: Stage, remove: Collection[str], add: Sequence[IndexPart]) -> IndexState:
    """Remove articles from an index, then add parts; both in one step.

    An added article replaces an earlier one with the same id, and its passages come last. A part is not added
    again if all its passages are in the index.

    Args:
        home: The directory of the index.
        base: The stage of vectors of its first part.
        remove: The ids of articles to remove.
        add: The parts to add.

    Returns:
        The new state, or the present one if nothing changes.

    Raises:
        InputError: Some of `remove` are not in the index, or no article would be left.
    """
    path = state_file(home.path, base.fingerprint)
    with base.lease("index", wait=True):
        state = IndexState.read(home.storage, path)
        if state is None:
            raise UsageError(_NO_INDEX.format(home.storage))
        now = open_stage(home, "passages", state.passages)
        parts = [IndexPart("", *own) for own in zip(parts_of(now), _vectors_of(home, state), strict=True)]
        removed, articles = removed_rows(now), now.finished().counts["articles"]
        if remove:
            found = _rows_of_articles(parts, set(remove), removed)
            _check_found(set(remove) - found.keys(), home)
            removed, articles = _union(removed, found.values()), articles - len(found)
            log.info("%s articles removed", f"{len(found):,}")
        for part in add:
            if _has_all(parts, part, removed):
                log.info("%s: all of its articles are in the index already", part.source)
                continue
            ids = {doc for table in part.passages.tables() for doc in table.column("doc_id").to_pylist()}
            found = _rows_of_articles(parts, ids, removed)
            removed, articles = _union(removed, found.values()), articles - len(found)
            parts.append(part)
            counts = part.passages.finished().counts
            articles += counts["articles"]
            log.log(
                logging.WARNING if found else logging.INFO,
                "%s: %s articles added%s",
                part.source,
                f"{counts['articles']:,}",
                f"; {len(found):,} of them replace articles with the same id" if found else "",
            )
        settings = {"removed": _keep_removed(home, removed)}
        new = state._replace(
            passages={**settings, "parts": [part.passages.settings for part in parts]},
            vectors={**settings, "parts": [part.vectors.settings for part in parts]},
        )
        if len(parts) == len(parts_of(now)) and np.array_equal(removed, removed_rows(now)):
            return state
        _finish_state(home, new, articles, len(removed))
        new.write(home.storage, path)
    return new


def _vectors_of(home: RunDirectory, state: IndexState) -> list[Stage]:
    return parts_of(open_stage(home, "vectors", state.vectors))


def _rows_of_articles(
    parts: Iterable[IndexPart], ids: Collection[str], removed: Array
) -> dict[str, list[int]]:
    """The rows of articles with one of `ids`, by id, without removed ones."""
    found: dict[str, list[int]] = defaultdict(list)
    first = 0
    for part in parts:
        for table in part.passages.tables():
            names = table.column("doc_id").to_pylist()
            gone = set(_between(removed, first, first + len(names)).tolist())
            for row, name in enumerate(names, first):
                if name in ids and row not in gone:
                    found[name].append(row)
            first += len(names)
    return found


def _between(rows: Array, first: int, end: int) -> Array:
    return rows[np.searchsorted(rows, first) : np.searchsorted(rows, end)]


def _union(removed: Array, more: Iterable[Sequence[int]]) -> Array:
    return np.union1d(removed, np.fromiter(itertools.chain.from_iterable(more), np.int64))


def _has_all(parts: Sequence[IndexPart], new: IndexPart, removed: Array) -> bool:
    """Whether a part is in the index already, and none of its passages was removed."""
    first = 0
    for part in parts:
        end = first + sum(part.passages.finished().rows)
        if part.passages.fingerprint == new.passages.fingerprint and not len(_between(removed, first, end)):
            return True
        first = end
    return False


def _check_found(missing: set[str], home: RunDirectory) -> None:
    if missing:
        named = ", ".join(
            [*sorted(missing)[:_IDS_IN_ERROR], *(["…"] if len(missing) > _IDS_IN_ERROR else [])]
        )
        raise InputError(
            f"--remove: {len(missing):,} ids not found in the index in {home.storage}: {named}: leave them "
            "out; nothing was changed"
        )


def _keep_removed(home: RunDirectory, rows: Array) -> str | None:
    """Write the removed rows to a stage; returns the name of their set, None for no rows."""
    if not len(rows):
        return None
    name = hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:16]
    stage = _removed_stage(home, name)
    if not stage.done():
        stage.write(0, pa.table({"row": pa.array(rows, pa.int64())}))
        stage.finish([len(rows)], {"removed": len(rows)})
    return name


def _finish_state(home: RunDirectory, state: IndexState, articles: int, removed: int) -> None:
    """Finish the two stages of a new state: write their counts and the number of rows of each shard."""
    for name, settings in (("passages", state.passages), ("vectors", state.vectors)):
        stage = open_stage(home, name, settings)
        results = [part.finished() for part in parts_of(stage)]
        rows = [count for result in results for count in result.rows]
        counts: dict[str, int] = defaultdict(int)
        for result in results:
            for kind, count in result.counts.items():
                counts[kind] += count
        counts.pop("halved_batches", None)  # `finish` counts them from the journal
        counts["passages"] = sum(rows) - removed
        if not counts["passages"]:
            raise InputError("--remove: no article would be left: make a new index; nothing was changed")
        if name == "passages":
            counts["articles"] = articles
        stage.finish(rows, {**counts, **({"removed": removed} if removed else {})})
    if removed > _REMOVED_SHARE * sum(rows) or len(results) > _PARTS:
        log.warning(
            "the index has %s parts, and %.0f%% of its passages are removed: a new index of the same "
            "articles is smaller and faster: scaledown index --corpus_path PATH --index_dir NEW",
            len(results),
            100 * removed / sum(rows),
        )
