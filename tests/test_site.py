"The built site in headless Chromium, opened from file://: the toy book for every feature, the real book for every page."
import os
import re
import shutil
from html.parser import HTMLParser

import pytest

from toybook import real_site, toy_site  # noqa: F401

CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run", "--disable-quic"]


@pytest.fixture(scope="module")
def chromium():
    if not CHROMIUM: pytest.skip("no Chromium: install it (on Debian: apt-get install chromium) or name one: CHROMIUM=/path/to/chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[dev]'")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    "Opens pages; at the end no console message and no request to another host may have been seen."
    contexts, seen = [], []

    def open_page(path, width=1200, scheme="light", **options):
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: seen.append(f"{path.name}: {m.type}: {m.text}"))
        page.on("pageerror", lambda e: seen.append(f"{path.name}: {e}"))
        page.on("requestfailed", lambda r: seen.append(f"{path.name}: failed: {r.url}"))
        page.on("request", lambda r: r.url.startswith(("file:", "data:")) or seen.append(f"{path.name}: asked for {r.url}"))
        page.goto(path.as_uri())
        return page
    yield open_page
    for context in contexts: context.close()
    assert not seen, seen


# Every page of both books

class Anchors(HTMLParser):
    "The ids and the links of a page."

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads = [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if "id" in given: self.ids.append(given["id"])
        if tag == "a" and "href" in given: self.links.append(given["href"])
        if tag in ("img", "script", "link", "iframe", "source"): self.loads += [given[k] for k in ("src", "href", "srcset") if k in given]


@pytest.mark.parametrize("site", ["toy_site", "real_site"])
def test_all_links_and_anchors_lead_somewhere(site, request):
    site = request.getfixturevalue(site)
    pages = {p.name: Anchors(p) for p in site.glob("*.html")}
    for name, page in pages.items():
        twice = {i for i in page.ids if page.ids.count(i) > 1}
        assert not twice, f"{name}: the ids {twice} are there twice"
        for link in page.links:
            if re.match(r"(https?|mailto):", link): continue
            file, _, anchor = link.partition("#")
            assert not file or file in pages, f"{name}: {link}"
            assert not anchor or anchor in pages[file or name].ids, f"{name}: {link}"
        for file in page.loads: assert file.startswith("data:") or (site / file).is_file(), f"{name}: {file}"


@pytest.mark.parametrize("site", ["toy_site", "real_site"])
@pytest.mark.parametrize("width, scheme", [(380, "light"), (380, "dark"), (1600, "light"), (1600, "dark")])
def test_every_page_opens_and_fits(site, width, scheme, request, open_page):
    for path in sorted(request.getfixturevalue(site).glob("*.html")):
        page = open_page(path, width, scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{path.name} scrolls sideways at {width} px"
        assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0 && i.alt)"), f"{path.name}: an image is broken or has no alt"
        assert page.title() and page.get_attribute("meta[name=description]", "content")
        assert page.locator("h1").count() == 1


CONTRAST = """() => {
  const canvas = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d", {willReadFrequently: true})
  const rgb = (...colors) => {
    canvas.clearRect(0, 0, 1, 1)
    for (const c of colors) { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1) }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3)
  }
  const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b }
  const bad = []
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())
    if (!own || !e.checkVisibility({opacityProperty: true, visibilityProperty: true}) || e.closest("math")) continue
    const grounds = []
    for (let x = e; x; x = x.parentElement) grounds.unshift(getComputedStyle(x).backgroundColor)
    const ground = rgb(...grounds), ink = rgb(...grounds, getComputedStyle(e).color)
    const [a, b] = [light(ground), light(ink)].sort((x, y) => y - x)
    if ((a + .05) / (b + .05) < 4.5) bad.push([e.tagName, e.className, e.textContent.slice(0, 30), (a + .05) / (b + .05)])
  }
  return bad
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(toy_site, open_page, scheme):
    assert open_page(toy_site / "first.html", 1600, scheme).evaluate(CONTRAST) == []


# Searching

def test_search_finds_a_function_and_its_hit_leads_to_it(toy_site, open_page):
    page = open_page(toy_site / "index.html")
    page.keyboard.press("/")
    page.keyboard.type("halve")
    first = page.locator("#results a").first
    first.wait_for()
    assert first.locator("b").inner_text() == "halve_" and first.get_attribute("aria-selected") == "true"
    page.keyboard.press("Enter")
    page.wait_for_url("**/first.html#halve_")
    assert page.locator("#halve_").is_visible()


def test_search_by_keyboard(toy_site, open_page):
    page = open_page(toy_site / "index.html")
    page.keyboard.press("/")
    page.keyboard.type("double")
    page.locator("#results a").nth(1).wait_for()
    def chosen(): return page.locator("#results a[aria-selected=true]").get_attribute("id")
    assert chosen() == "result-0" == page.get_attribute("#search", "aria-activedescendant")
    page.keyboard.press("ArrowDown")
    assert chosen() == "result-1"
    page.keyboard.press("ArrowUp")
    assert chosen() == "result-0"
    page.keyboard.press("ArrowUp")
    assert chosen() == f"result-{page.locator('#results a').count() - 1}"
    page.keyboard.press("Escape")
    assert page.locator("#results").is_hidden() and page.input_value("#search") == ""


def test_search_ranks_names_first_and_finds_words_of_the_text(toy_site, open_page):
    page = open_page(toy_site / "index.html")
    def hits(query):
        page.fill("#search", query)
        page.wait_for_function("q => document.getElementById('search').value === q && !document.getElementById('results').hidden", arg=query)
        page.wait_for_timeout(50)
        return page.locator("#results a b").all_inner_texts()
    assert hits("double")[0] == "double", "the function before the headings and the prose that name it"
    assert hits("wide tables")[0] == "2.1 Wide tables"
    assert "double and halve_ together" in hits("quotation")
    assert hits("xyzzy") == [] and page.locator("#results").inner_text() == "Nothing found."
    assert "only output" not in " ".join(hits("double")), "outputs are not searched"


# What a page does

def test_dark_colors_are_kept(toy_site, open_page):
    page = open_page(toy_site / "index.html", scheme="light")
    def ground(): return page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = ground()
    page.click("#theme")
    dark = ground()
    assert dark != light and page.get_attribute("#theme", "aria-pressed") == "true"
    page.goto((toy_site / "first.html").as_uri())
    assert ground() == dark, "the next page keeps the choice"
    page.click("#theme")
    assert ground() == light
    assert open_page(toy_site / "index.html", scheme="dark").evaluate("getComputedStyle(document.body).backgroundColor") == dark


def test_previous_and_next(toy_site, open_page):
    page = open_page(toy_site / "index.html")
    assert page.locator("a[rel=prev]").count() == 0
    for name in ("first", "second"):
        page.click("a[rel=next]")
        assert page.url.endswith(f"/{name}.html")
    assert page.locator("a[rel=next]").count() == 0
    page.click("a[rel=prev]")
    assert page.url.endswith("/first.html")
    assert page.get_attribute("#sidebar a[aria-current=page]", "href") == "first.html"


def test_chapters_open_as_a_menu_on_a_narrow_screen(toy_site, open_page):
    page = open_page(toy_site / "first.html", 380)
    assert page.locator("#sidebar").is_hidden()
    page.click("#menu")
    assert page.get_attribute("#menu", "aria-expanded") == "true"
    page.keyboard.press("Escape")
    assert page.locator("#sidebar").is_hidden()
    page.click("#menu")
    page.click("#sidebar a[href='second.html']")
    assert page.url.endswith("/second.html")


def test_code_is_copied(toy_site, open_page):
    page = open_page(toy_site / "index.html", permissions=["clipboard-read", "clipboard-write"])
    page.locator(".cell .sourceCode").nth(1).hover()
    page.locator(".copy").nth(1).click()
    page.wait_for_function("document.querySelectorAll('.copy')[1].textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == "double(21)"


def test_keyboard_reaches_the_text(toy_site, open_page):
    page = open_page(toy_site / "index.html")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.url.endswith("#content")


# What the pages show

def test_numbers_and_cross_references(toy_site, open_page):
    page = open_page(toy_site / "first.html")
    assert page.locator("h1").inner_text() == "1 First things"
    assert page.locator("h2").all_inner_texts() == ["1.1 The idea", "Unnumbered", "1.2 References"]
    assert page.locator("h1 math").count() == 0 and page.locator(".lead math").count() == 1
    links = page.locator("a.xref").evaluate_all("x => x.map(a => [a.textContent, a.getAttribute('href')])")
    nbsp = "\N{NO-BREAK SPACE}"
    assert links == [[f"Equation{nbsp}1.1", "#eq-first-double"], [f"Figure{nbsp}1.1", "#fig-first-line"], [f"Table{nbsp}2.1", "second.html#tbl-second-wide"],
                     [f"Chapter{nbsp}2", "second.html"], ["1.1", "#fig-first-line"], [f"Fig.{nbsp}1.1", "#fig-first-line"],
                     [f"Figure{nbsp}1.1", "#fig-first-line"], [f"Table{nbsp}2.1", "second.html#tbl-second-wide"]]
    assert page.locator("#eq-first-double .equation-number").inner_text() == "(1.1)"
    assert page.locator("#fig-first-line figcaption").inner_text().startswith(f"Figure{nbsp}1.1: A line, as of Knuth (1984), with")
    assert page.get_attribute("#fig-first-line img", "alt") == "A diagonal line"
    assert page.get_attribute("#fig-first-line img", "width") == "300"
    assert "Knuth, Donald E. 1984" in page.locator("#refs").inner_text()
    assert page.locator("math[display=block]").count() == 2
    second = open_page(toy_site / "second.html")
    assert second.locator("figcaption").all_inner_texts() == [f"Table{nbsp}2.1: Many columns.", f"Table{nbsp}2.2: A table of Markdown"]
    index = open_page(toy_site / "index.html")
    assert index.locator("h1").inner_text() == "toybook" and index.locator("h2").inner_text() == "The map"
    assert index.locator("figcaption").inner_text() == f"Figure{nbsp}1: A line, on the first page."


def test_options_of_cells(toy_site, open_page):
    page = open_page(toy_site / "first.html")
    text = page.locator("article").inner_text()
    assert "no code" not in text and "only output" in text, "echo: false"
    assert "print('no output')" in text and "hidden output" not in text, "output: false"
    assert "neither" not in text, "include: false"
    assert "default_exp" not in text and "nbdev_export" not in text and "#|" not in text
    summary = page.get_by_text("Show how")
    assert page.get_by_text("folded = 1").is_hidden()
    summary.click()
    assert page.get_by_text("folded = 1").is_visible()
    long = page.locator(".output-plain pre").nth(2)
    assert long.evaluate("e => e.scrollHeight > e.clientHeight && e.scrollWidth > e.clientWidth && e.tabIndex === 0")


def test_callouts(toy_site, open_page):
    page = open_page(toy_site / "first.html")
    boxes = page.locator(".callout").evaluate_all("x => x.map(e => [e.className, e.tagName, e.open, e.querySelector('.callout-title').textContent.trim()])")
    assert boxes == [["callout callout-note", "DIV", None, "Note"], ["callout callout-tip", "DETAILS", False, "Folded advice"],
                     ["callout callout-warning", "DIV", None, "Mind this"], ["callout callout-important", "DETAILS", True, "Important"],
                     ["callout callout-caution", "DIV", None, "Caution"]]
    assert page.get_by_text("Inside the fold.").is_hidden()
    page.get_by_text("Folded advice").click()
    assert page.get_by_text("Inside the fold.").is_visible()
    assert page.locator(".callout-warning div.sourceCode").count() == 1, "a code cell inside a callout"


def test_api_entries(toy_site, open_page):
    page = open_page(toy_site / "first.html")
    entry = page.locator(".api").first
    assert entry.locator("h3").inner_text().strip() == "double"
    assert entry.locator("pre").first.inner_text() == "double(x, *, times=1)"
    rows = entry.locator("tr").evaluate_all("x => x.map(r => [...r.children].map(c => c.textContent))")
    assert rows == [["Parameter", "Type", "Default", "Meaning"], ["x", "float", "", "the number, in any unit"],
                    ["times", "int | None", "1", "how often, from 1 to 10"], ["returns", "float", "", "x times 2 to the times"]]
    assert re.fullmatch(r"https://github\.com/toy/toybook/blob/main/toybook/first\.py#L\d+", entry.locator("a.api-source").get_attribute("href"))
    assert page.locator("details.fold summary").first.inner_text() == "Source of double, halve_"
    second = open_page(toy_site / "second.html")
    assert second.locator(".api h3").evaluate_all("x => x.map(h => h.id)") == ["box", "box.open"]
    assert second.locator("article p a[href='first.html#double'] code").count() == 1


def test_a_printed_page_shows_the_text_and_what_is_folded(toy_site, open_page):
    page = open_page(toy_site / "first.html")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    for hidden in (".bar", "#sidebar", "aside", ".pager", ".copy >> nth=0"): assert page.locator(hidden).is_hidden(), hidden
    assert page.get_by_text("Inside the fold.").is_visible()
    assert page.locator(".output-plain pre").nth(2).evaluate("e => e.scrollHeight <= e.clientHeight + 1"), "long output is printed whole"
