"""Pages of generated tables in a browser: a large one, hostile texts, tokens, several tables."""

import csv
from pathlib import Path

import pytest

from tests.browser.conftest import Page, run_influence

COLUMNS = [
    "query",
    "kind",
    "rank",
    "train",
    "score",
    "query_label",
    "train_label",
    "query_text",
    "train_text",
]
HOSTILE = (
    "</script><script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 1'>",
    "<svg onload='window.pwned = 1'>",
    "javascript:window.pwned=1",
    "=cmd|' /C calc'!A0",
    "NUL \x00 and escape \x1b[31m",
    "\u202eright to left override",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd",
    "w" * 10_000,
)


def write_rows(path: Path, columns: list[str], rows: list[list[object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


@pytest.fixture(scope="session")
def large_page(tmp_path_factory) -> Path:
    """1,000 queries x 20 rows, of 20,000 training examples with texts of 500 characters."""
    folder = tmp_path_factory.mktemp("large")
    text = "the quick brown fox jumps over the lazy dog " * 11
    rows = [
        [query, kind, rank, (query * 20 + offset + rank) % 20_000, sign * (11 - rank) / (1 + query % 7),
         f"class {query % 10}", f"class {rank}", f"query number {query}. {text}", f"example {text}"]
        for query in range(1000)
        for kind, sign, offset in (("proponent", 1, 0), ("opponent", -1, 10))
        for rank in range(1, 11)
    ]  # fmt: skip
    table = write_rows(folder / "scores.csv", COLUMNS, rows)
    run_influence("report", table, "-o", folder / "large.html")
    return folder / "large.html"


@pytest.fixture(scope="session")
def hostile_page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    rows = [
        [number, kind, 1, train, sign, text, text, text, text]
        for number, text in enumerate(HOSTILE)
        for kind, sign, train in (("proponent", 1.5, number), ("opponent", -1, 100 + number))
    ]  # fmt: skip
    table = write_rows(folder / f"{'<b>scores&amp;'}.csv", COLUMNS, rows)
    run_influence("report", table, "--title", HOSTILE[0], "-o", folder / "hostile.html")
    return folder / "hostile.html"


def first_paint(page: Page) -> float:
    """Milliseconds from the start of loading until the browser painted content."""
    return page.run("return performance.getEntriesByName('first-contentful-paint')[0].startTime")


def test_a_large_page_paints_within_two_seconds(open_page, large_page):
    page = open_page(large_page)
    assert first_paint(page) < 2000
    loaded = page.run(
        "return performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"
    )
    assert loaded < 2000
    assert page.console() == [] and page.requests() == []
    assert page.find("#matches").text == "1,000 queries"


def test_a_large_list_grows_and_is_searched(open_page, large_page):
    page = open_page(large_page)
    assert len(page.find_all("#queries li")) == 200
    page.find("#more-queries").click()
    assert len(page.find_all("#queries li")) == 400
    page.press("/", "number 99")
    assert page.find("#matches").text == "11 of 1,000 queries"
    page.go("#/query/0/999")
    assert page.find("#query h2").text == "Query 999"
    assert len(page.find_all("#query .card")) == 20


def test_a_long_text_is_clipped_until_it_is_opened(open_page, large_page):
    page = open_page(large_page)
    page.go("#/query/0/5")
    heights = "return [...document.querySelectorAll('#query .card .text')].map(e => e.offsetHeight)"
    clipped = page.run(heights)
    button = page.find("#query .card .text + button")
    assert button.get_attribute("aria-expanded") == "false"
    button.click()
    assert page.run(heights)[0] > clipped[0] and page.run(heights)[1] == clipped[1]
    assert button.get_attribute("aria-expanded") == "true" and button.text == "Show less"
    assert page.find_faults() == []


def test_hostile_texts_stay_text(open_page, hostile_page):
    page = open_page(hostile_page)
    for number, text in enumerate(HOSTILE):
        page.go(f"#/query/0/{number}")
        shown = page.run("return document.querySelector('#query .pro .card .text').textContent")
        expected = (
            text.replace("\x00", r"\x00").replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")
        )
        assert shown == expected or shown.startswith(text[:4000] + "…"), number
        assert page.run("return document.documentElement.scrollWidth") <= 1280
        page.go(f"#/example/train/{number}")
    assert page.run("return window.pwned") is None
    assert (
        page.run(
            "return document.querySelectorAll('main img, svg[onload], .card b, .source b').length"
        )
        == 0
    )
    links = page.run("return [...document.links].map(link => link.getAttribute('href'))")
    assert links and all(link.startswith("#") for link in links)
    assert page.console() == [] and page.requests() == []
    assert page.driver.title.endswith(HOSTILE[0])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_hostile_texts_fit_a_phone(open_page, hostile_page, theme):
    page = open_page(hostile_page, width=360, height=740, theme=theme)
    for route in ("#/", "#/queries", *(f"#/query/0/{number}" for number in range(len(HOSTILE)))):
        page.go(route)
        assert page.run("return document.documentElement.scrollWidth") <= 360, route
        assert page.find_faults() == [], route


def test_a_text_from_right_to_left_is_set_that_way(open_page, hostile_page):
    page = open_page(hostile_page)
    page.go(f"#/query/0/{HOSTILE.index(HOSTILE[7])}")
    text = page.find("#query .pro .card .text")
    assert page.run("return getComputedStyle(arguments[0]).direction", text) == "rtl"
    assert page.find("#query h2").value_of_css_property("direction") == "ltr"


def test_a_script_that_gets_into_the_page_does_not_run(open_page, large_page):
    page = open_page(large_page)
    page.run(
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.pwned=1\">')"
    )
    page.run(
        "const script = document.createElement('script'); script.textContent = 'window.pwned = 1';"
        "document.body.append(script)"
    )
    page.settle()
    assert page.run("return window.pwned") is None  # the policy of the page


def test_tokens_are_shaded_at_their_positions(open_page, tmp_path):
    columns = [*COLUMNS[:4], "token", *COLUMNS[4:]]
    parts = (
        ("0:The", 1.0),
        ("1:\u0120cat", 3.0),
        ("2:\u0120sat", -1.0),
        ("-", 0.5),
        ("10:\u0120:on", 0.0),
    )
    rows = [
        [0, "proponent", 1, 5, part, score, "", "", "", "The cat sat :on"] for part, score in parts
    ]
    table = write_rows(tmp_path / "tokens.csv", columns, rows)
    run_influence("report", table, "-o", tmp_path / "tokens.html")
    page = open_page(tmp_path / "tokens.html")
    page.go("#/query/0/0")
    assert (
        page.run("return document.querySelector('#query .card .text').textContent")
        == "The cat sat :on"
    )
    shades = page.run(
        "return [...document.querySelectorAll('#query .card .shade')].map(e => e.className)"
    )
    assert shades == ["shade pro", "shade pro", "shade opp"]
    assert "Without a position: +0.5000" in page.find("#query .card").text
    assert page.find("#query .card .score").text == "+3.500"


def test_tokens_of_the_query_are_shaded_in_each_card(open_page, tmp_path):
    columns = [*COLUMNS[:4], "query-token", *COLUMNS[4:]]
    parts = (("0:un", -1.0), ("1:##usual", 3.0), ("2:words", 0.25))
    rows = [[0, "proponent", 1, 5, *part, "", "", "unusual words", "text"] for part in parts]
    table = write_rows(tmp_path / "tokens.csv", columns, rows)
    run_influence("report", table, "-o", tmp_path / "tokens.html")
    page = open_page(tmp_path / "tokens.html")
    page.go("#/query/0/0")
    text = page.run("return document.querySelector('#query .card .part .text').textContent")
    assert text == "unusual words"
    assert page.texts("#query .card > .text") == ["text"]


def test_several_tables_are_chosen_by_name(open_page, tmp_path):
    for name, score in (("first", 2), ("second", -3)):
        row = [7, "proponent" if score > 0 else "opponent", 1, 5, score, "a", "b", "", ""]
        write_rows(tmp_path / f"{name}.csv", COLUMNS, [row])
    run_influence(
        "report", tmp_path / "first.csv", tmp_path / "second.csv", "-o", tmp_path / "two.html"
    )
    page = open_page(tmp_path / "two.html")
    page.go("#/query/0/7")
    assert page.texts("#query .score") == ["+2.000"]
    page.find("#view option:nth-child(2)").click()
    page.settle()
    assert page.texts("#query .score") == ["\u22123.000"]
    page.go("#/example/train/5")
    assert page.texts("#example .score") == ["+2.000", "\u22123.000"]


def test_a_page_of_self_influence_alone_has_no_list_of_queries(open_page, tmp_path):
    rows = [[rank, rank, 10 - rank, 0.5, "a", "a text"] for rank in range(1, 9)]
    columns = ["rank", "train", "score", "loss", "train_label", "train_text"]
    table = write_rows(tmp_path / "self.csv", columns, rows)
    run_influence("report", table, "-o", tmp_path / "self.html")
    page = open_page(tmp_path / "self.html")
    assert page.find_all(".side") == [] and page.find_faults() == []
    page.find("#overview .button").click()
    page.settle()
    assert len(page.find_all("#list .card")) == 8
    page.press("/")
    assert page.console() == []
