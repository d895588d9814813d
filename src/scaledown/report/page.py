"""A page as a record -> one self-contained HTML file, or Markdown.

Every text is data and is escaped; the only script is ours, named by its hash in the page's own policy.
"""

import base64
import hashlib
import re
from collections.abc import Sequence
from importlib import resources
from typing import Final, NamedTuple

Cell = str | int | float | None

_CARD_ROWS: Final = 20  # of a plot in a README
_MARKDOWN: Final = re.compile(r"([\\`*_{}\[\]<>|#~$&])")


class Note(NamedTuple):
    """A paragraph."""

    text: str


class Table(NamedTuple):
    """Rows of cells; numbers stand on the right, None is a dash."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


class Plot(NamedTuple):
    """A drawing (SVG of `plots`), and the table of what it shows for those who cannot see it."""

    caption: str
    svg: str
    table: Table


class Piece(NamedTuple):
    """A part of a text, marked or not."""

    text: str
    marked: bool = False


class Field(NamedTuple):
    """A labelled text of an example."""

    label: str
    pieces: Sequence[Piece]


class Example(NamedTuple):
    """One thing to look at, found by its words and filtered by its tags."""

    title: str
    tags: Sequence[str]
    fields: Sequence[Field]


class Examples(NamedTuple):
    """Examples to search and filter."""

    caption: str
    examples: Sequence[Example]

    @property
    def tags(self) -> list[str]:
        """All that there are."""
        return sorted({tag for example in self.examples for tag in example.tags})


Block = Note | Table | Plot | Examples


class Section(NamedTuple):
    """A heading and what stands under it."""

    heading: str
    blocks: Sequence[Block]


class Page(NamedTuple):
    """A page from top to bottom."""

    title: str
    lead: str
    sections: Sequence[Section]


def html(page: Page) -> str:
    """One file that needs nothing else: no script, style, font or picture from outside."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("scaledown.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = cell
    environment.tests["number"] = lambda value: isinstance(value, int | float)
    script = _own("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html.jinja").render(
        page=page,
        script=Markup(script),  # noqa: S704 (ours)
        style=Markup(_own("page.css")),  # noqa: S704 (ours)
        digest=digest,
        drawn=lambda plot: Markup(plot.svg),  # noqa: S704 (matplotlib escapes the texts in it)
        kind=lambda block: type(block).__name__,
    )


def markdown(page: Page) -> str:
    """The same for a README: plots by their numbers where these are few, no examples."""
    parts = [f"# {_escaped(page.title)}", _escaped(page.lead)]
    for section in page.sections:
        blocks = [text for block in section.blocks if (text := _markdown(block))]
        if blocks:
            parts += [f"## {_escaped(section.heading)}", *blocks]
    return "\n\n".join(parts) + "\n"


def cell(value: Cell) -> str:
    """A value as people write it: thousands apart, four digits of a fraction."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or (value == int(value) and abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:,.4g}"


def _markdown(block: Block) -> str:
    if isinstance(block, Note):
        return _escaped(block.text)
    if isinstance(block, Plot):
        block = block.table._replace(caption=block.caption)
        if len(block.rows) > _CARD_ROWS:
            return ""
    if isinstance(block, Examples) or not block.rows:
        return ""
    numeric = [
        all(isinstance(row[place], int | float | None) for row in block.rows)
        for place in range(len(block.columns))
    ]
    lines = [list(map(_escaped, block.columns)), ["--:" if is_number else ":--" for is_number in numeric]]
    rows = [[_escaped(cell(value)) for value in row] for row in block.rows]
    table = "\n".join("| " + " | ".join(row) + " |" for row in [*lines, *rows])
    return f"{_escaped(block.caption)}\n\n{table}" if block.caption else table


def _escaped(text: str) -> str:
    """One line without what Markdown or HTML would take for a sign."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def _own(name: str) -> str:
    return resources.files("scaledown.report").joinpath(name).read_text(encoding="utf-8")
