"""The pages in a real browser: search and filter, plots, light and dark, narrow, nothing hostile happens."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scaledown.data.report.page import write_report
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
    html,
)

pytestmark = [pytest.mark.slow, pytest.mark.plots]

HOSTILE = "</script><script>window.hit=1</script><img src=x onerror='window.hit=1'><svg onload=window.hit=1>"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    table = PageTable("Counts", ("what", HOSTILE), [(HOSTILE, 1), ("b", 2)])
    drawn = Plot("A plot", plots.bars([HOSTILE, "b"], [1, 2], "n"), table)
    examples = [
        PageExample(
            f"Question {n} about {'honey' if n % 2 else 'tides'}",
            ("right",) if n % 4 else ("wrong",),
            [
                Field(
                    "document",
                    [MarkedText("The "), MarkedText("Moon", marked=True), MarkedText(f" pulls {n}.")],
                )
            ],
        )
        for n in range(12)
    ]
    examples.append(PageExample(HOSTILE, (HOSTILE,), [Field(HOSTILE, [MarkedText(HOSTILE, marked=True)])]))
    content = Page(
        "Report",
        "Lead.",
        [
            Section("Plots", [Note(HOSTILE), table, drawn]),
            Section("Examples", [PageExamples("Look.", examples)]),
        ],
    )
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html(content), encoding="utf-8")
    return path


@pytest.fixture
def opened(browser: Any, page_file: Path) -> Iterator[Any]:
    """The page on a phone; what it says on the console and what it asks the network for."""
    context = browser.new_context(viewport={"width": 360, "height": 740})
    page = context.new_page()
    page.console_messages, page.asked = [], []
    page.on("console", lambda message: page.console_messages.append(message.text))
    page.on("pageerror", lambda error: page.console_messages.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(page_file.as_uri())
    yield page
    context.close()


def test_a_real_report_of_hostile_records(browser: Any, tmp_path: Path) -> None:
    record = {"query": HOSTILE, "documents": [HOSTILE, f"{HOSTILE} Moon"], "answer": "Moon"}
    records = [record | {"reranking_scores": [score, -score]} for score in (1.0, 1e308)]
    data = tmp_path / "data.json"
    data.write_text(json.dumps([*records, record | {"query": "Why?", "answer": "I'm sorry."}]))
    write_report(data, tmp_path / "report.html", tmp_path / "card.md")
    page = browser.new_page()
    console_messages: list[str] = []
    page.on("console", lambda message: console_messages.append(message.text))
    page.on("pageerror", lambda error: console_messages.append(str(error)))
    page.goto((tmp_path / "report.html").as_uri())
    assert page.locator(".drawing svg").count() >= 4
    page.get_by_label("Show").select_option("refusal")
    assert shown(page) == 1
    page.get_by_label("Search").fill("moon")
    page.get_by_label("Show").select_option("")
    assert shown(page) == 3
    assert page.evaluate("window.hit") is None
    assert console_messages == []


def shown(page: Any) -> int:
    count: int = page.locator(".example:visible").count()
    return count


def test_search_and_filter(opened: Any) -> None:
    assert shown(opened) == 13
    opened.get_by_label("Search").fill("HONEY question")
    assert shown(opened) == 6
    assert opened.locator("output").inner_text() == "6 of 13 examples"
    opened.get_by_label("Show").select_option("wrong")
    assert shown(opened) == 0
    opened.get_by_label("Search").fill("")
    assert shown(opened) == 3


def test_nothing_hostile_happens(opened: Any) -> None:
    for summary in opened.locator("summary").all():
        summary.click()
    opened.get_by_label("Show").select_option(HOSTILE)
    assert shown(opened) == 1
    assert opened.evaluate("window.hit") is None
    assert opened.console_messages == []
    assert len(opened.asked) == 1, "nothing but the page itself is loaded"


def test_keyboard(opened: Any) -> None:
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.textContent") == "Skip to the content"
    first = opened.locator(".example summary").first
    first.focus()
    opened.keyboard.press("Enter")
    assert opened.locator(".example dd").first.is_visible()
    assert opened.locator(".example mark").first.inner_text() == "Moon"


def test_plots_are_there_in_both_schemes(opened: Any) -> None:
    box = opened.locator(".drawing svg").bounding_box()
    assert 250 < box["width"] <= 360
    colours = []
    for scheme in ("light", "dark"):
        opened.emulate_media(color_scheme=scheme)
        style = "e => [getComputedStyle(document.body).backgroundColor, getComputedStyle(e).fill]"
        colours.append(opened.locator(".drawing path").nth(1).evaluate(style))
    assert colours[0][0] != colours[1][0]


def test_a_phone_needs_no_sideways_scrolling(opened: Any) -> None:
    assert opened.evaluate("document.documentElement.scrollWidth") <= 360


def test_screen_reader_gets_names_and_tables(opened: Any) -> None:
    assert opened.get_by_role("heading", level=1).inner_text() == "Report"
    assert opened.get_by_role("navigation").get_by_role("link").count() == 2
    assert opened.get_by_role("img").get_attribute("aria-label").startswith("A plot")
    assert opened.get_by_role("main").count() == 1
