"""Finds the columns of a table without names by their cells: ids, questions, answers, titles, texts."""

import re
from collections.abc import Collection, Sequence
from typing import Final

_ALIKE: Final = 0.9  # if this share of a column's cells is of a kind, so is the column
_LONGER: Final = 2.0  # the text of a corpus is this many times as long as any other column
_LONGEST_TITLE: Final = 200  # characters
_LIST: Final = re.compile(r"\s*(\[.*\]|\{.*\}|array\(.*\))\s*", re.DOTALL)
_ADDRESS: Final = re.compile(r"\s*\w+://\S+\s*")
_CODE: Final = re.compile(r"\S*\d\S*")
_LOOKS_LIKE_QUESTION: Final = re.compile(
    r".*[?？؟]\s*$|\s*(who|whose|whom|what|when|where|which|why|how|is|are|was|were|do|does|did|can|could|in "
    r"(what|which)|on (what|which)|name the)\b",
    re.IGNORECASE | re.DOTALL,
)
NAME: Final = re.compile(r"[^\W\d][\w.-]{0,30}( [\w.-]{1,20})?")
"""A cell that looks like the name of a column."""


def may_be_names(records: Sequence[Sequence[str]]) -> bool:
    """Whether the first line looks like unknown names of columns, and the next lines do not."""
    first, rest = [cell.strip() for cell in records[0]], records[1:]
    below = [[record[place].strip() for record in rest if place < len(record)] for place in range(len(first))]
    if len(rest) > 1 and NAME.fullmatch(first[0]) and all(re.fullmatch(r"[\d.]+", cell) for cell in below[0]):
        return True
    if not all(NAME.fullmatch(cell) for cell in first if cell):
        return False
    return not rest or any(sum(len(cell.split()) for cell in own) > 2 * len(own) for own in below)


def main_column(cells: Sequence[Sequence[str]], main: str) -> int | None:
    """Find the column of a corpus's `text` or of a `question`.

    Args:
        cells: Of each column, the cells that are not empty.
        main: `text` or `question`.

    Returns:
        The index of the column; None if the cells do not show it.
    """
    likely = [
        place
        for place, own in enumerate(cells)
        if own and not _is_code(own) and not _are(own, _LIST) and not _are(own, _ADDRESS)
    ]
    if not likely:
        alone = len(cells) == 1 or (len(cells) == 2 and _are(cells[0], _CODE))
        return len(cells) - 1 if alone and cells[-1] else None
    if len(likely) == 1:
        return likely[0]
    if main == "text":
        length = {place: sum(map(len, cells[place])) / len(cells[place]) for place in likely}
        longest, second = sorted(likely, key=length.__getitem__, reverse=True)[:2]
        return longest if length[longest] >= _LONGER * length[second] else None
    asks = {
        place: sum(map(bool, map(_LOOKS_LIKE_QUESTION.match, cells[place]))) / len(cells[place])
        for place in likely
    }
    most, second = sorted(likely, key=asks.__getitem__, reverse=True)[:2]
    return most if asks[most] >= 0.5 and asks[second] < asks[most] / 2 else None


def _are(cells: Sequence[str], pattern: re.Pattern[str]) -> bool:
    return sum(bool(pattern.fullmatch(cell)) for cell in cells) >= _ALIKE * len(cells) > 0


def _is_code(cells: Sequence[str]) -> bool:
    """Whether a column holds ids: each without a space, and with a digit or unlike all others."""
    if not cells or not _are(cells, re.compile(r"\S+")):
        return False
    spaced = any(re.search(r"\s", cell) for cell in cells)
    return not spaced and (
        _are(cells, _CODE) or (len(cells) > 1 and _differ(cells) and all(map(str.isascii, cells)))
    )


def _differ(cells: Sequence[str]) -> bool:
    return len(set(cells)) == len(cells)


def _title(cells: Sequence[Sequence[str]], main: int, ids: Sequence[int]) -> int | None:
    """Return the only other column of short texts."""
    others = [
        place
        for place, own in enumerate(cells)
        if place != main and place not in ids and own and not _are(own, _ADDRESS)
    ]
    if len(others) != 1 or sum(map(len, cells[others[0]])) > _LONGEST_TITLE * len(cells[others[0]]):
        return None
    return others[0]


def _answers_column(cells: Sequence[Sequence[str]], main: int) -> int | None:
    """Return the column of lists, or the only column after the question."""
    lists = [place for place, own in enumerate(cells) if place != main and own and _are(own, _LIST)]
    behind = [place for place in range(main + 1, len(cells)) if cells[place]]
    if lists:
        return lists[0]
    return behind[0] if len(behind) == 1 else None


def places(cells: Sequence[Sequence[str]], main: int, parts: Collection[str]) -> dict[str, int]:
    """Find the columns of the other parts, given the column of the main part.

    Args:
        cells: Of each column, the cells that are not empty.
        main: The index of the main part.
        parts: The parts; with `text` the table is a corpus, else it has questions.

    Returns:
        The index of each part that was found, also of the main part.
    """
    found = {}
    codes = [place for place in range(main) if _is_code(cells[place])]
    ids = [place for place in codes if _differ(cells[place])]
    if not ids and main == 1:
        ids = codes  # repeated ids, as in concatenated files
    if ids:
        found["id"] = ids[0]
    if "title" in parts and (title := _title(cells, main, ids)) is not None:
        found["title"] = title
    found["text" if "text" in parts else "question"] = main
    if "answers" in parts and (answers := _answers_column(cells, main)) is not None:
        found["answers"] = answers
    return found
