"""Write a page, described by records, as one self-contained HTML file or as Markdown.

All texts are data and are escaped. The only script is our own; the page's security policy names its hash.
"""

import base64
import hashlib
import re
from collections.abc import Sequence
from importlib import resources
from typing import Final, NamedTuple

Cell = str | int | float | None

_CARD_ROWS: Final = 20  # a README shows plots of at most this many rows, as tables
_MARKDOWN: Final = re.compile(r"([\\`*_{}\[\]<>|#~$&])")


class Note(NamedTuple):
    """A paragraph."""

    text: str


class PageTable(NamedTuple):
    """Rows of cells. Numbers are aligned right; None is shown as a dash."""

    caption: str
    """May be empty."""
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    """Each has as many cells as there are columns."""


class Plot(NamedTuple):
    """A drawing (SVG from `plots`), and a table of its values for readers who cannot see it."""

    caption: str
    svg: str
    table: PageTable


class MarkedText(NamedTuple):
    """A part of a text, marked or not."""

    text: str
    marked: bool = False


class Field(NamedTuple):
    """A labelled text of an example."""

    label: str
    pieces: Sequence[MarkedText]


class PageExample(NamedTuple):
    """An example, which readers search by its words and filter by its tags."""

    title: str
    tags: Sequence[str]
    fields: Sequence[Field]


class PageExamples(NamedTuple):
    """Examples to search and filter."""

    caption: str
    examples: Sequence[PageExample]

    @property
    def tags(self) -> list[str]:
        """All tags of the examples, sorted."""
        return sorted({tag for example in self.examples for tag in example.tags})


PageBlock = Note | PageTable | Plot | PageExamples


class Section(NamedTuple):
    """A heading and the blocks below it."""

    heading: str
    blocks: Sequence[PageBlock]


class Page(NamedTuple):
    """A page from top to bottom."""

    title: str
    lead: str
    """The paragraph below the title."""
    sections: Sequence[Section]


def html(page: Page) -> str:
    """Return the page as one HTML file that loads no script, style, font or picture from elsewhere.

    Args:
        page: The page; all texts in it are escaped.
    """
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
    script = _resource("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html.jinja").render(
        page=page,
        script=Markup(script),  # noqa: S704 (ours)
        style=Markup(_resource("page.css")),  # noqa: S704 (ours)
        digest=digest,
        drawn=lambda plot: Markup(plot.svg),  # noqa: S704 (matplotlib escapes the texts in it)
        kind=lambda block: type(block).__name__,
    )


def markdown(page: Page) -> str:
    """Return the page as Markdown for a README.

    Args:
        page: The page. Plots become tables if they have few rows, else they are left out, as are examples.
    """
    parts = [f"# {_escaped_markdown(page.title)}", _escaped_markdown(page.lead)]
    for section in page.sections:
        blocks = [text for block in section.blocks if (text := _markdown(block))]
        if blocks:
            parts += [f"## {_escaped_markdown(section.heading)}", *blocks]
    return "\n\n".join(parts) + "\n"


def cell(value: Cell) -> str:
    """Format a value: integers with separators for thousands, fractions with four significant digits."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or (value == int(value) and abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:,.4g}"


def _markdown(block: PageBlock) -> str:
    if isinstance(block, Note):
        return _escaped_markdown(block.text)
    if isinstance(block, Plot):
        block = block.table._replace(caption=block.caption)
        if len(block.rows) > _CARD_ROWS:
            return ""
    if isinstance(block, PageExamples) or not block.rows:
        return ""
    numeric = [
        all(isinstance(row[place], int | float | None) for row in block.rows)
        for place in range(len(block.columns))
    ]
    lines = [
        list(map(_escaped_markdown, block.columns)),
        ["--:" if is_number else ":--" for is_number in numeric],
    ]
    rows = [[_escaped_markdown(cell(value)) for value in row] for row in block.rows]
    table = "\n".join("| " + " | ".join(row) + " |" for row in [*lines, *rows])
    return f"{_escaped_markdown(block.caption)}\n\n{table}" if block.caption else table


def _escaped_markdown(text: str) -> str:
    """Return the text on one line, with the special characters of Markdown and HTML escaped."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def _resource(name: str) -> str:
    return resources.files("scaledown.report").joinpath(name).read_text(encoding="utf-8")
