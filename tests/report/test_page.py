"""A page is one file without anything from outside, and no text of the data becomes anything but text."""

import re
from html.parser import HTMLParser

import pytest

from scaledown.report import plots
from scaledown.report.page import (
    Field,
    MarkedText,
    Note,
    Page,
    PageExample,
    PageExamples,
    PageTable,
    Plot,
    Section,
    cell,
    html,
    markdown,
)

pytestmark = pytest.mark.plots

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)> \"' {{ 7*7 }} $x^2$ ]]> </style> | # `code` \x00"
)


def page(text: str) -> Page:
    table = PageTable(text, (text, "n"), [(text, 3), ("b", None)])
    drawn = plots.bars([text, "b"], [1, 2.5], "n")
    example = PageExample(text, (text,), [Field(text, [MarkedText(text), MarkedText(text, marked=True)])])
    blocks = (Note(text), table, Plot(text, drawn, table), PageExamples(text, [example]))
    return Page(text, text, [Section(text, blocks)])


class Tags(HTMLParser):
    """Every element with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_hostile_text_adds_no_element_or_attribute() -> None:
    drawing = re.compile("<svg.*?</svg>", re.DOTALL)
    plain, hostile = (Tags(drawing.sub("", html(page(text)))).found for text in ("plain", HOSTILE))
    assert [tag for tag, _ in hostile] == [tag for tag, _ in plain]
    assert [sorted(attributes) for _, attributes in hostile] == [sorted(a) for _, a in plain]
    assert "{{ 7*7 }}" in html(page(HOSTILE))
    (svg,) = drawing.findall(html(page(HOSTILE)))
    assert {tag for tag, _ in Tags(svg).found} <= {
        "svg",
        "g",
        "defs",
        "path",
        "rect",
        "use",
        "text",
        "clippath",
    }


def test_nothing_comes_from_outside() -> None:
    for tag, attributes in Tags(html(page("plain"))).found:
        assert tag not in {"link", "iframe", "img", "object", "embed", "base"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert not (name in {"src", "href", "xlink:href"} and not str(value).startswith("#"))
    policy = next(a["content"] for t, a in Tags(html(page("plain"))).found if t == "meta" and "content" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_plots_have_tables_for_readers_who_cannot_see_them() -> None:
    found = Tags(html(page("plain"))).found
    assert ("html", {"lang": "en"}) in found
    assert any(tag == "caption" for tag, _ in found)
    assert all("scope" in attributes for tag, attributes in found if tag == "th")
    assert any(a.get("role") == "img" and a.get("aria-label") for _, a in found)
    ids = [a["id"] for _, a in found if "id" in a]
    assert len(ids) == len(set(ids)), "an id twice"


def test_equal_pages_have_equal_bytes() -> None:
    assert html(page("plain")) == html(page("plain"))


def test_markdown_keeps_text_as_text() -> None:
    text = markdown(page(HOSTILE))
    assert not re.search(r"(?<!\\)<", text)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert "alert" in text, "it is there to be read"


def test_markdown_leaves_out_plots_and_examples() -> None:
    long = PageTable("", ("x", "n"), [(str(n), n) for n in range(40)])
    content = Page(
        "t", "lead", [Section("s", [Plot("curve", "<svg/>", long)]), Section("e", [PageExamples("x", [])])]
    )
    assert markdown(content) == "# t\n\nlead\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        ("a", "a"),
        (1234567, "1,234,567"),
        (0.12344, "0.1234"),
        (1.0, "1"),
        (12345.0, "12,345"),
        (-3.5, "-3.5"),
    ],
)
def test_cells(value: float | str | None, text: str) -> None:
    assert cell(value) == text


@pytest.mark.parametrize("most", [11, 40, 9000])
def test_logarithmic_ticks_are_plain_numbers(most: float) -> None:
    svg = plots.plane({"s": [plots.Point("p", 10, 1), plots.Point("q", most, 2)]}, "x", "y", logarithmic=True)
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    ticks = [float(text.replace(",", "")) for text in texts if re.fullmatch(r"[\d,.]+", text)]
    assert len([tick for tick in ticks if 5 <= tick <= 2 * most]) >= 2
    assert "math" not in svg


def test_names_of_points_that_lie_together() -> None:
    """As of runs that differ in their depth: of 5 layers and 8."""
    points = {
        "16x": [plots.Point("trained-5layers-16x", 5, 0.06, 0.04, 0.09), plots.Point("trained-16x", 8, 0.07)],
        "4x": [plots.Point("trained-4x", 8, 0.07, 0.04, 0.09)],
        "many": [plots.Point(f"run-{number}", 8, 0.07) for number in range(60)],
    }
    svg = plots.plane(points, "layers", "accuracy")
    for series in points.values():
        for point in series:
            assert f">{point.name}<" in svg


@pytest.mark.parametrize(
    "svg",
    [
        plots.bars(["a", "b"], [1, 2], "n"),
        plots.histogram([0, 1, 2], [3, 4], "x", "n"),
        plots.curves({"one": [1, 2], "two": [2, 3]}, [1, 2], "k", "R@k"),
        plots.plane(
            {"s": [plots.Point("p", 1, 2, 1, 3)], "t": [plots.Point("q", 10, 1)]}, "x", "y", logarithmic=True
        ),
    ],
)
def test_plots_take_the_colours_of_the_page(svg: str) -> None:
    assert svg.startswith("<svg")
    assert "var(--ink)" in svg
    assert "var(--series-1)" in svg
    assert "#0a0a" not in svg
    assert "<text" in svg, "text stays text"
    assert "math" not in svg
