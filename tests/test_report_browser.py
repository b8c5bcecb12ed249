"""The lock-in page in a real browser: nothing is asked of any address, and what it offers works.

Needs the extra ``browser`` and Chromium (``PORTNET_CHROMIUM``, or on the path). Without them the tests are skipped with
the reason; with ``PORTNET_BROWSER=required`` they fail. Screenshots go to the folder ``PORTNET_SCREENSHOTS``.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import reported

from portnet.assess import assess
from portnet.report import lockin_page

REQUIRED = os.environ.get("PORTNET_BROWSER") == "required"
BUDGET = 2.0
"""Seconds in which 500 records are to be on the screen."""


def missing(why: str) -> None:
    if REQUIRED:
        pytest.fail(f"PORTNET_BROWSER=required, and {why}")
    pytest.skip(why)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError as error:
        missing(f"playwright is not installed ({error}): pip install 'portnet[browser]'")
    given = os.environ.get("PORTNET_CHROMIUM")
    found = given or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not found or not Path(found).exists():
        missing(f"there is no Chromium{f' at {given}' if given else ''}: install it, or name it in PORTNET_CHROMIUM")
    with sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except Error as error:
            missing(f"{found} does not start: {error}")
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The addresses of the pages, files all of them."""
    folder = tmp_path_factory.mktemp("pages")
    made = {
        "four": reported.assessed(),
        "chip": reported.without_home(),
        "hostile": assess(reported.hostile(), problems=[reported.HOSTILE]),
        "many": assess(reported.many(500)),
    }
    return {name: lockin_page.write(seen, folder / f"{name}.html").as_uri() for name, seen in made.items()}


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("PORTNET_SCREENSHOTS")
    folder = Path(given) if given else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def opened(browser: Any, pages: dict[str, str]) -> Iterator[Any]:
    """Opens a page by its name; holds what it asked for, what it said, and what it saved.

    `whole`: every section is laid out, as for one who has scrolled through all of it.
    """
    contexts = []

    def at(name: str, *, whole: bool = True, width: int = 1280, height: int = 900, **more: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True, **more)
        contexts.append(context)
        page = context.new_page()
        seen = SimpleNamespace(page=page, requests=[], messages=[])
        page.on("request", lambda request: seen.requests.append(request.url))
        page.on("console", lambda message: seen.messages.append(message.text))
        page.on("pageerror", lambda error: seen.messages.append(str(error)))
        page.on("dialog", lambda dialog: (seen.messages.append(dialog.message), dialog.dismiss()))
        page.goto(pages[name], wait_until="load")
        if whole:
            page.evaluate(
                "document.querySelectorAll('main > section').forEach(e => e.style.contentVisibility = 'visible')"
            )
        return seen

    yield at
    for context in contexts:
        context.close()


@pytest.mark.parametrize("name", ["four", "chip", "hostile", "many"])
def test_it_asks_nothing_of_any_address_and_says_no_error(opened: Any, pages: dict[str, str], name: str) -> None:
    seen = opened(name)
    for summary in seen.page.locator("main details > summary").all()[:40]:
        if summary.is_visible():
            summary.click()
    seen.page.wait_for_timeout(100)
    assert [url for url in seen.requests if not url.startswith(("data:", "blob:"))] == [pages[name]]
    assert seen.messages == []


def column(page: Any, heading: str) -> list[str]:
    """The cells of the table of stacks that are to be seen, by their heading."""
    heads = [text.strip() for text in page.locator("#stacks-table thead th").all_inner_texts()]
    n = next(i for i, text in enumerate(heads) if text.startswith(heading)) + 1
    cells = page.locator(f"#stacks-table tbody tr:not([hidden]) > :nth-child({n})")
    return [text.split("\n")[0].strip() for text in cells.all_inner_texts()]


def test_it_sorts_by_click_and_by_keyboard(opened: Any) -> None:
    page = opened("four").page
    button = page.locator("#stacks-table thead button", has_text="Images/s")
    head = page.locator("#stacks-table thead th", has_text="Images/s")

    def rates() -> list[float]:
        return [float(x.replace(",", "")) for x in column(page, "Images/s") if x != "void"]

    assert rates() != sorted(rates())
    assert head.get_attribute("aria-sort") is None
    button.click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert rates() == sorted(rates())
    timed = [e for e in reported.assessed().entries if e.rate.figure is not None]
    assert len(rates()) == len(timed) >= 8
    assert column(page, "Images/s")[-1] == "void"
    button.focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert rates() == sorted(rates(), reverse=True)
    assert column(page, "Images/s")[-1] == "void", "what has no figure stays last"
    assert "descending" in page.locator("#sorted").inner_text()
    stack = page.locator("#stacks-table thead button", has_text="Stack")
    stack.focus()
    page.keyboard.press("Space")
    assert column(page, "Stack") == sorted(column(page, "Stack"))
    assert head.get_attribute("aria-sort") is None, "one column at a time"
    assert page.locator("#stacks-table thead th[aria-sort]").count() == 1


def test_it_filters(opened: Any) -> None:
    page = opened("four").page
    count = page.locator("#count")
    entries = reported.assessed().entries
    whole = f"{len(entries)} of {len(entries)} rows"
    assert count.inner_text() == whole
    field = page.get_by_label("Find a stack, device, outcome")
    field.fill("ROCM")
    shown = [e.stack for e in entries if e.platform == "rocm"]
    assert count.inner_text() == f"{len(shown)} of {len(entries)} rows"
    assert sorted(re.sub(r"\d*$", "", stack) for stack in column(page, "Stack")) == sorted(
        re.sub(r"\d*$", "", stack) for stack in shown
    )
    field.fill("simulated wrong")
    assert column(page, "Outcome") == ["✕ wrong"]
    field.fill("")
    page.get_by_role("combobox", name=re.compile("^Precision")).select_option("bfloat16")
    assert set(column(page, "Precision")) == {"bfloat16"}
    page.get_by_role("combobox", name=re.compile("^Mode")).select_option("train")
    both = [e for e in entries if (e.problem.precision, e.problem.mode) == ("bfloat16", "train")]
    assert 0 < len(both) < sum(e.problem.precision == "bfloat16" for e in entries)
    assert count.inner_text() == f"{len(both)} of {len(entries)} rows"
    page.get_by_role("button", name="Show all").click()
    assert count.inner_text() == whole
    assert len(column(page, "Stack")) == len(entries)
    assert field.input_value() == ""
    assert count.get_attribute("role") == "status"


def test_it_saves_plots_as_svg_and_as_png(opened: Any, tmp_path: Path) -> None:
    page = opened("four", color_scheme="dark").page
    buttons = page.locator("button[data-save=svg]")
    assert buttons.count() >= 10
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Save the cascade plot as SVG").click()
    assert waiting.value.suggested_filename == "portnet-cascade.svg"
    waiting.value.save_as(tmp_path / "plot.svg")
    root = ElementTree.parse(tmp_path / "plot.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = ["".join(t.itertext()) for t in root.iter() if t.tag.endswith("}text")]
    assert "architectural efficiency" in texts
    assert root.get("color") == "rgb(230, 232, 235)", "ink of the dark page"
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Save the cascade plot as PNG").click()
    assert waiting.value.suggested_filename == "portnet-cascade.png"
    waiting.value.save_as(tmp_path / "plot.png")
    from PIL import Image

    with Image.open(tmp_path / "plot.png") as image:
        image.load()
        wide = float(root.get("width", "0"))
        assert image.width == round(3 * wide)
        assert image.convert("RGB").getpixel((2, 2)) == (0x14, 0x17, 0x1C)
        assert len(image.convert("RGB").getcolors(1 << 20) or ()) > 100, "a plot, not an empty square"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["four", "chip", "hostile"])
def test_axe_finds_nothing(opened: Any, name: str, scheme: str) -> None:
    try:
        from axe_playwright_python.sync_playwright import Axe
    except ImportError as error:
        missing(f"axe is not installed ({error}): pip install 'portnet[browser]'")
    page = opened(name, color_scheme=scheme).page
    for summary in page.locator("main details > summary").all()[:60]:
        if summary.is_visible() and not summary.locator("xpath=..").get_attribute("open"):
            summary.click()
    found = Axe().run(page).response
    told = [f"{v['id']}: {v['help']}: {v['nodes'][0]['html'][:300]}" for v in found["violations"]]
    assert told == []
    assert len(found["passes"]) > 20


def test_axe_would_find_something(opened: Any) -> None:
    """The check itself is at work: what is wrong is found."""
    try:
        from axe_playwright_python.sync_playwright import Axe
    except ImportError as error:
        missing(f"axe is not installed ({error}): pip install 'portnet[browser]'")
    page = opened("four").page
    page.evaluate("document.querySelector('#filters input').parentElement.firstChild.remove()")
    page.evaluate("document.querySelector('.facts').style.color = '#ddd'")
    assert {v["id"] for v in Axe().run(page).response["violations"]} >= {"label", "color-contrast"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 380])
@pytest.mark.parametrize("name", ["four", "chip", "hostile"])
def test_nothing_is_wider_than_the_screen(opened: Any, screenshots: Path, name: str, width: int, scheme: str) -> None:
    page = opened(name, width=width, color_scheme=scheme).page
    wide = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide[0] <= wide[1]
    if name != "hostile":
        page.screenshot(path=screenshots / f"{name}-{width}-{scheme}.png", full_page=True)
        page.screenshot(path=screenshots / f"{name}-{width}-{scheme}-first.png")


def test_texts_of_plots_are_not_clipped(opened: Any) -> None:
    page = opened("four").page
    outside = page.evaluate(
        """() => [...document.querySelectorAll("figure svg")].flatMap((svg) => {
            const box = svg.getBoundingClientRect();
            return [...svg.querySelectorAll("text")].filter((text) => {
                const own = text.getBoundingClientRect();
                return own.left < box.left - 2 || own.right > box.right + 2 || own.bottom > box.bottom + 2;
            }).map((text) => text.textContent);
        })"""
    )
    assert outside == []


def test_it_can_be_used_from_the_keyboard(opened: Any) -> None:
    page = opened("four").page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "To the verdict"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0, "it is seen once it has the focus"
    for _ in range(30):
        page.keyboard.press("Tab")
        style = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert style != "none", page.evaluate("document.activeElement.outerHTML")


def test_a_raised_number_leads_to_its_measurement(opened: Any) -> None:
    page = opened("four").page
    link = page.locator(".card .sources a").first
    number = link.inner_text()
    link.click()
    assert page.evaluate("location.hash") == f"#m{number}"
    assert page.locator(f"#m{number}").is_visible()
    assert page.locator(f"#m{number} th").inner_text().startswith(f"{number}. ")


def test_it_prints(opened: Any, screenshots: Path) -> None:
    page = opened("four", color_scheme="dark").page
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)", "no ink for paper"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    for hidden in ("nav", "#filters", ".save"):
        assert not page.locator(hidden).first.is_visible()
    sheet = page.pdf(path=screenshots / "four.pdf", format="A4", prefer_css_page_size=False)
    assert sheet.startswith(b"%PDF")
    count = len(re.findall(rb"/Type\s*/Page\b", sheet))
    assert 4 <= count <= 40
    # At the width of a sheet no table is cut off.
    page.set_viewport_size({"width": 700, "height": 1000})
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("#measurements details[open] code").count() > 20
    cut = "() => [...document.querySelectorAll('table')].filter((t) => t.getBoundingClientRect().right > 702).length"
    assert page.evaluate(cut) == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 700
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("#measurements td details[open]").count() == 0


def test_markup_in_records_does_nothing(opened: Any) -> None:
    seen = opened("hostile")
    assert seen.page.locator("img").count() == 0
    assert seen.page.locator("script").count() == 1
    assert seen.messages == [], "no dialog, no error, nothing blocked"
    assert "<script>alert(1)</script>" in seen.page.locator("body").inner_text()


def test_no_other_script_may_run(opened: Any) -> None:
    """What the policy is for: markup that got into the page would still not run."""
    seen = opened("four")
    seen.page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.ran = true";
            document.body.append(script);
            document.body.insertAdjacentHTML("beforeend", '<img src="data:," onerror="window.ran = true">');
        }"""
    )
    seen.page.wait_for_timeout(100)
    assert seen.page.evaluate("window.ran") is None
    assert any("Content Security Policy" in message for message in seen.messages)


def test_five_hundred_records_are_there_in_under_two_seconds(opened: Any, record_property: Any) -> None:
    seen = opened("many", whole=False)
    seen.page.wait_for_function("performance.getEntriesByName('first-contentful-paint').length > 0")
    timed = seen.page.evaluate(
        """() => ({
            load: performance.getEntriesByType("navigation")[0].loadEventEnd / 1000,
            paint: performance.getEntriesByName("first-contentful-paint")[0].startTime / 1000,
        })"""
    )
    seen.page.locator("#filters").scroll_into_view_if_needed()
    from playwright.sync_api import expect

    expect(seen.page.locator("#count")).to_have_text("500 of 500 rows", use_inner_text=True)
    began = seen.page.evaluate(
        """() => {
            const began = performance.now();
            document.querySelector("#stacks-table thead button").click();
            document.body.getBoundingClientRect();
            return (performance.now() - began) / 1000;
        }"""
    )
    record_property("seconds", {**timed, "sort": began})
    print(
        f"500 records: load event after {timed['load']:.2f} s, first paint {timed['paint']:.2f} s, sort {began:.2f} s"
    )
    assert 0 < timed["load"] < BUDGET
    assert 0 < timed["paint"] < BUDGET
    assert began < BUDGET
