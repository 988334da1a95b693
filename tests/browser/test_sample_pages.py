"""The pages of the sample runs in a browser: what they show, and how they are used."""

import io
import os

import pytest
from PIL import Image
from selenium.webdriver import Keys

from tests.browser.conftest import ROOT, Page

ROUTES = ("#/", "#/queries", "#/query/0/57", "#/example/train/387", "#/list/0")
LARGEST_SCREENSHOT = 150_000  # bytes of docs/report.png


def test_a_page_asks_for_nothing_and_reports_no_error(open_page, digits_page):
    page = open_page(digits_page)
    for route in ROUTES:
        page.go(route)
    assert page.requests() == []
    assert page.console() == []


def test_the_overview_shows_what_the_tables_say(open_page, digits_page):
    text = open_page(digits_page).find("#overview").text
    assert "80" in text and "tracin" in text and "digits" in text
    assert "unroll" in text and "0.96 to 0.98" in text
    assert "influence score sample_runs/digits" in text


def test_a_query_has_cards_with_pictures_scores_and_labels(open_page, digits_page):
    page = open_page(digits_page)
    page.go("#/query/0/57")
    assert page.find("#query h2").text == "Query 57"
    assert page.texts("#query .pro .names a")[:3] == ["Example 387", "Example 641", "Example 1288"]
    assert page.texts("#query .opp .names a")[:2] == ["Example 1204", "Example 407"]
    assert page.texts("#query .pro .score")[0] == "+139.3"
    assert "7 of 10 proponents, 0 of 10 opponents" in page.find("#query .head").text
    widths = page.run(
        "return [...document.querySelectorAll('#query img')].map(i => i.naturalWidth)"
    )
    assert widths == [8] * 21
    alternative = page.find("#query .opp img").get_attribute("alt")
    assert alternative == "Picture of example 1204, label 9"
    lengths = page.run(
        "return [...document.querySelectorAll('#query .bar i')].map(i => i.style.width)"
    )
    assert lengths[10] == "100%" and lengths[0] == "80.62%"  # 139.282 of 172.759


def test_influence_over_training_and_by_layer_is_drawn(open_page, digits_page):
    page = open_page(digits_page)
    page.go("#/query/0/57")
    assert len(page.find_all("#query .plot")) == 20
    label = page.find("#query .plot").get_attribute("aria-label")
    assert "checkpoint 0 to 600; strongest at 240" in label and "running sum +139.3" in label
    rows = page.texts("#query .card:first-child .layer .number")[:2]
    assert rows == ["+108.1", "+31.23"]


def test_arrow_keys_go_from_query_to_query(open_page, digits_page):
    page = open_page(digits_page)
    page.go("#/query/0/57")
    page.press(Keys.ARROW_RIGHT)
    assert page.find("#query h2").text == "Query 58"
    assert page.find("#queries [aria-current]").text.startswith("58")
    page.press(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert page.find("#query h2").text == "Query 56"
    assert page.run("return document.activeElement.tagName") == "H2"  # a screen reader reads it


def test_slash_searches_and_escape_ends_the_search(open_page, digits_page):
    page = open_page(digits_page)
    page.press("/")
    assert page.run("return document.activeElement.id") == "search"
    page.press("57")
    assert page.find("#matches").text == "1 of 80 queries"
    page.press(Keys.ARROW_DOWN, Keys.ENTER)
    assert page.find("#query h2").text == "Query 57"
    page.press("/", Keys.ESCAPE)
    assert page.find("#matches").text == "80 queries"
    page.press(Keys.ARROW_RIGHT)
    assert page.find("#query h2").text == "Query 58"


def test_slash_searches_on_a_phone(open_page, digits_page):
    page = open_page(digits_page, width=360, height=740)
    page.press("/", "57")
    assert page.texts("#queries b") == ["57"]
    page.find("#queries a").click()
    page.settle()
    assert page.find("#query h2").text == "Query 57" and page.find_all(".side") == []


def test_the_label_filter_names_its_queries_alone(open_page, digits_page):
    page = open_page(digits_page)
    page.find("#label option[value='1']").click()
    assert {text[-1] for text in page.texts("#queries .label")} == {"1"}
    assert page.find("#matches").text == f"{len(page.find_all('#queries li'))} of 80 queries"


def test_an_example_leads_back_to_the_queries_that_it_helped(open_page, digits_page):
    page = open_page(digits_page)
    page.go("#/query/0/57")
    page.find("#query .pro .names a").click()
    page.settle()
    assert page.find("#example h2").text == "Example 387"
    assert "Self-influence +108.8, number 70 of 1,400" in page.find("#example .head").text
    assert page.texts("#example .pro .names a")[0] == "Query 57"
    page.find("#example .pro .names a").click()
    page.settle()
    assert page.find("#query h2").text == "Query 57"
    page.driver.back()
    page.settle()
    assert page.find("#example h2").text == "Example 387"


def set_value(page: Page, selector: str, value: object) -> None:
    page.run(
        "const input = document.querySelector(arguments[0]); input.value = arguments[1];"
        "input.dispatchEvent(new Event('input')); input.dispatchEvent(new Event('change'))",
        selector,
        str(value),
    )
    page.settle()


def test_the_threshold_the_class_and_the_order_choose_what_is_copied(open_page, digits_page):
    page = open_page(digits_page)
    page.go("#/list/0")
    assert page.find("#list [role=status]").text == "50 of 1,400 examples"
    set_value(page, "#list input[type=range]", 0)
    assert page.texts("#list .names a") == ["Example 407"]
    set_value(page, "#list input[type=number]", 300)
    shown = page.texts("#list .score")
    assert 5 < len(shown) < 50 and all(float(score) >= 300 for score in shown)
    set_value(page, "#list .filters label:nth-child(4) select", 2)
    losses = [text.split()[-1] for text in page.texts("#list .tags .quiet")]
    assert losses == sorted(losses, key=float, reverse=True)
    set_value(page, "#list .filters label:nth-child(3) select", 7)
    assert {text[-1] for text in page.texts("#list .tags .label")} == {"7"}
    names = page.texts("#list .names a")
    page.run(
        "Object.defineProperty(navigator, 'clipboard',"
        "{value: {writeText: async (text) => { window.copied = text; }}})"
    )
    page.find("#list .filters button").click()
    page.settle()
    assert page.run("return window.copied").split() == [name.split()[-1] for name in names]
    assert page.find("#list [role=status]").text == f"{len(names)} ids copied"


def test_words_are_shaded_by_their_part_of_the_score(open_page, words_page):
    page = open_page(words_page)
    page.go("#/query/0/0")
    shades = page.run(
        "return [...document.querySelectorAll('#query .pro .card:first-child .shade')]"
        ".map(e => [e.textContent, e.title, getComputedStyle(e).backgroundColor])"
    )
    assert [text for text, *_ in shades][:3] == ["zyzzyva"] * 3
    assert shades[0][1] == "zyzzyva: +75.84" and shades[0][2] != "rgba(0, 0, 0, 0)"
    assert "Not in the text: [SEP] +0.01670" in page.find("#query .pro .card").text


def test_tokens_are_shaded_by_their_part_of_the_score(open_page, words_page):
    page = open_page(words_page)
    page.go("#/query/1/0")
    card = page.find("#query .pro .card")
    assert "[CLS] zyzzyva zyzzyva zyzzyva construct and return tuple" in card.text
    assert "Without a position: +" in card.text
    strong = page.run(
        "return [...document.querySelectorAll('#query .pro .card:first-child .shade.pro:not(.faint)')]"
        ".map(e => e.title)"
    )
    assert [title.partition(":")[0] for title in strong] == [
        "1, zyzzyva",
        "2, zyzzyva",
        "3, zyzzyva",
    ]


def test_the_theme_follows_the_system_and_the_button(open_page, digits_page):
    colour = "return getComputedStyle(document.body).backgroundColor"
    page = open_page(digits_page, theme="dark")
    dark = page.run(colour)
    page.use_theme("light")
    light = page.run(colour)
    assert dark != light
    page.find("#theme").click()
    page.find("#theme").click()
    assert page.find("#theme").text == "Theme: dark" and page.run(colour) == dark
    page.driver.refresh()
    page.settle()
    assert page.run(colour) == dark  # the browser remembers it


def test_a_page_prints_its_cards_and_not_its_controls(open_page, digits_page):
    page = open_page(digits_page, theme="dark")
    page.go("#/query/0/57")
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    page.settle()
    assert len(page.find_all("#query .card")) == 20
    assert page.find_all(".side, .steps, #theme, .top nav, .foot") == []
    assert (
        page.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    )
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


@pytest.mark.parametrize("name", ["digits", "words"])
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_view_fits_and_is_accessible(open_page, request, name, width, theme):
    page = open_page(request.getfixturevalue(f"{name}_page"), width=width, height=800, theme=theme)
    routes = (
        ROUTES
        if name == "digits"
        else ("#/", "#/queries", "#/query/0/3", "#/query/1/3", "#/example/train/33")
    )
    for route in routes:
        page.go(route)
        assert page.run("return document.documentElement.scrollWidth") <= width, route
        assert page.find_faults() == [], route
        page.screenshot(
            f"{name}-{route.strip('#/').replace('/', '-') or 'overview'}-{width}-{theme}"
        )


def test_the_judge_of_accessibility_finds_a_fault(open_page, digits_page):
    page = open_page(digits_page)
    page.run("document.querySelector('main').append(document.createElement('img'))")
    assert any(fault.startswith("image-alt") for fault in page.find_faults())


def test_the_picture_of_the_documentation_is_small(open_page, digits_page):
    page = open_page(digits_page, width=1040, height=600)
    page.go("#/query/0/57")
    page.run("document.querySelector('.side').scrollTop += 200")  # the query in the middle
    picture = Image.open(page.screenshot("report")).convert("RGB").quantize(128)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    assert len(file.getvalue()) < LARGEST_SCREENSHOT
    if os.environ.get("WRITE_DOCS"):  # make screenshots
        (ROOT / "docs" / "report.png").write_bytes(file.getvalue())
