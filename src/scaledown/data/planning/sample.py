"""A sample of rows from the whole corpus, cut into passages, on which a plan is based."""

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from scaledown.config.prepare import PrepareConfig
from scaledown.data.input import files, tables
from scaledown.data.input.chunking import Chunker
from scaledown.data.input.corpus import Cut, cut_rows
from scaledown.data.retrieval.parts import kept_rows, only_state, open_stage, removed_rows
from scaledown.errors import InputError
from scaledown.run.directory import RunDirectory
from scaledown.run.locations import index_of

_Reader = Callable[..., Iterator[files.Row]]
_PLACES: Final = 20
_PASSAGES: Final = 1000  # of an index
_BYTES_A_PLACE: Final = 1 << 17


class CorpusSample(NamedTuple):
    """Rows from the whole corpus, cut into passages."""

    cut: Cut
    """The passages."""
    whole: float
    """The size of the corpus divided by the size of the sample."""
    seconds: float
    """The time of one process for cutting them."""
    of: str = "corpus"
    """`corpus` or `index`, for messages."""


def sample_index(config: PrepareConfig) -> CorpusSample:
    """Sample passages from the whole index in `--index_dir`; cutting takes no time."""
    storage = index_of(config)
    passages = open_stage(RunDirectory(storage), "passages", only_state(storage).passages)
    counts, removed = passages.finished().counts, removed_rows(passages)
    number = min(counts["passages"], _PASSAGES)
    rows = np.array(kept_rows([counts["passages"] * place // number for place in range(number)], removed))
    ends = np.cumsum(passages.finished().rows)
    shards = np.searchsorted(ends, rows, side="right")
    starts = ends - passages.finished().rows
    tables = [
        passages.table(shard).take(rows[shards == shard] - starts[shard])
        for shard in np.unique(shards).tolist()
    ]
    share = counts["passages"] / number
    found = Cut(pa.concat_tables(tables), [], [], max(1, round(counts["articles"] / share)))
    return CorpusSample(found, share, 0.0, "index")


def sample_corpus(
    config: PrepareConfig, corpus: Sequence[files.Source], tokenizer: Tokenizer
) -> CorpusSample:
    """Cut a sample of rows from the whole corpus into passages.

    Args:
        config: The run's settings.
        corpus: The files and folders of the corpus.
        tokenizer: The retriever's tokenizer.

    Raises:
        InputError: The sample has no article with text, or too many malformed rows.
    """
    read = functools.partial(tables.rows, meaning=tables.CORPUS, column=config.text_column)
    rows, whole = _sample_rows(files.every(corpus, "--corpus_path"), config.max_corpus_size, read)
    chunker = Chunker(tokenizer, config.passages, config.passage_tokens)
    started = time.perf_counter()
    cut = cut_rows(rows, chunker, files.folders_of(corpus), config.text_column)
    shown = ", ".join(map(str, corpus))
    seconds = time.perf_counter() - started
    if len(cut.rejected) > config.max_bad_fraction * cut.rows:
        row, reason = cut.rejected[0]
        raise InputError(
            f"{shown}: {len(cut.rejected):,} of {cut.rows:,} rows read are malformed ({row.source}: "
            f"{reason}), more than --max_bad_fraction {config.max_bad_fraction:g} allows: correct them or "
            "raise the flag"
        )
    if not cut.passages.num_rows:
        raise InputError(
            f"{shown}: no article with text among {cut.rows:,} rows; expected KILT lines, or id, title and "
            "text in each record"
        )
    return CorpusSample(cut, whole, seconds)


class _Place(NamedTuple):
    """Rows read at a place of the corpus, their bytes, and the bytes of the corpus that they represent."""

    rows: list[files.Row]
    read: float
    width: float


def _sample_rows(paths: Sequence[files.Source], limit: int, read: _Reader) -> tuple[list[files.Row], float]:
    """Sample rows of `paths`, and estimate the ratio of all rows to them; of the first `limit` rows, if set.

    A small corpus is read whole. Of a large one, some rows are read at each of 20 places that are evenly
    spread over its bytes; from files that cannot be entered midway, the first ones.
    """
    ends = list(itertools.accumulate(files.size_of(path) for path in paths))
    span = ends[-1]
    places: list[_Place] = []
    for last in (False, False, True) if limit else (True,):
        if span <= _PLACES * _BYTES_A_PLACE:
            every = itertools.chain.from_iterable(map(read, paths))
            return list(itertools.islice(every, limit or None)), 1.0
        offsets = [span * place // _PLACES for place in range(_PLACES)]
        places = []
        for path, start, end in zip(paths, [0, *ends], ends, strict=False):
            if here := [offset - start for offset in offsets if start <= offset < end]:
                places += _places_at(path, here, span / _PLACES, read)
        if not last:
            span = min(ends[-1], round(_reach(places, limit)))
    return [row for place in places for row in place.rows], span / max(1.0, sum(p.read for p in places))


def _reach(places: Sequence[_Place], rows: int) -> float:
    """Estimate the bytes of the first `rows` rows from the rows read at places in order."""
    left, reach, each = float(rows), 0.0, 0.0
    for place in places:
        each = place.read / max(1, len(place.rows))
        if left * each <= place.width:
            break
        left -= place.width / each
        reach += place.width
    return reach + left * each


def _places_at(path: files.Source, offsets: Sequence[int], width: float, read: _Reader) -> list[_Place]:
    """Read some rows of a file at each of `offsets`."""
    first, length = _first_rows(path, _BYTES_A_PLACE * len(offsets), read)
    head = [_Place(first, length, width * len(offsets))]
    lines = bool(first) and isinstance(first[0].content, bytes) and not first[0].problem
    if not lines or not isinstance(path, Path):
        return head
    places = []
    with files.open_stream(path) as stream:
        if files.is_compressed(stream):
            return head
        for offset in offsets:
            stream.seek(offset)
            if offset:
                stream.readline()  # the rest of a line
            begin = stream.tell()
            rows = []
            while stream.tell() - begin < _BYTES_A_PLACE and (line := stream.readline()):
                if line.strip():
                    rows.append(files.Row(str(path), 0, line.strip()))
            places.append(_Place(rows, stream.tell() - begin, width))
    return places


def _first_rows(path: files.Source, enough: int, read: _Reader) -> tuple[list[files.Row], float]:
    """Read the first rows of a file, about `enough` bytes.

    Returns them and their size in the (compressed) file.
    """
    meter = files.ReadingMeter([path])
    rows: list[files.Row] = []
    length, before = 0, 0.0
    for row in read(path, meter=meter):
        # The position changes when another block is read: all rows so far are from the blocks before it.
        if length >= enough and meter.fraction() != before:
            return rows, before * meter.size
        before = meter.fraction()
        rows.append(row)
        length += len(row.content) if isinstance(row.content, bytes) else len(str(row.content))
    return rows, float(meter.size)
