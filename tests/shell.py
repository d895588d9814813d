"""Finds the commands and snippets of a Markdown page."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple


class Fence(NamedTuple):
    language: str
    text: str
    line: int


def fences(page: Path) -> list[Fence]:
    """The fenced blocks of a page, dedented."""
    found = []
    pattern = re.compile(r"^( *)```(\w+)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
    text = page.read_text(encoding="utf-8")
    for match in pattern.finditer(text):
        indent, language, body = match.groups()
        lines = [line.removeprefix(indent) for line in body.splitlines()]
        found.append(Fence(language, "\n".join(lines) + "\n", text.count("\n", 0, match.start()) + 1))
    return found


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block as words; continuation lines joined, comments dropped.

    A comment after a backslash, as in the guide's first edition, is dropped, too.
    """
    joined = re.sub(r"\\[ \t]*(?:#[^\n]*)?\n", " ", text)
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]
