"The built site in headless Chromium, opened from file://: the toy book for every feature, the real book for every page."
import colorsys
import io
import os
import re
import shutil
from collections import Counter
from html.parser import HTMLParser

import pytest
from PIL import Image

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

    def open_page(path, width=1200, scheme="light", page=None, **options):
        if page is None:
            context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
            contexts.append(context)
            page = context.new_page()
            def note(what): seen.append(f"{page.url}: {what}")
            page.on("console", lambda m: note(f"{m.type}: {m.text}"))
            page.on("pageerror", note)
            page.on("requestfailed", lambda r: note(f"failed: {r.url}"))
            page.on("request", lambda r: r.url.startswith(("file:", "data:")) or note(f"asked for {r.url}"))
        page.goto(path.as_uri())
        return page
    yield open_page
    for context in contexts: context.close()
    assert not seen, seen


# Every page of both books

SITES = ["toy_site", pytest.param("real_site", marks=pytest.mark.long)]  # the real one is built first


class Anchors(HTMLParser):
    "The ids and the links of a page."

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads = Counter(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if "id" in given: self.ids[given["id"]] += 1
        if tag == "a" and "href" in given: self.links.append(given["href"])
        if tag in ("img", "script", "link", "iframe", "source"): self.loads += [given[k] for k in ("src", "href", "srcset") if k in given]


@pytest.mark.parametrize("site", SITES)
def test_all_links_and_anchors_lead_somewhere(site, request):
    site = request.getfixturevalue(site)
    pages = {p.name: Anchors(p) for p in site.glob("*.html")}
    for name, page in pages.items():
        twice = {i for i, n in page.ids.items() if n > 1}
        assert not twice, f"{name}: the ids {twice} are there twice"
        for link in page.links:
            if re.match(r"(https?|mailto):", link): continue
            file, _, anchor = link.partition("#")
            assert not file or file in pages, f"{name}: {link}"
            assert not anchor or anchor in pages[file or name].ids, f"{name}: {link}"
        for file in page.loads: assert file.startswith("data:") or (site / file).is_file(), f"{name}: {file}"


@pytest.mark.parametrize("site, part, parts", [("toy_site", 0, 1), *(pytest.param("real_site", i, 4, marks=pytest.mark.long) for i in range(4))])
def test_every_page_opens_and_fits(site, part, parts, request, open_page):
    page = None  # one for all, for a page of its own for each would take three times as long
    for path in sorted(request.getfixturevalue(site).glob("*.html"))[part::parts]:
        page = open_page(path, page=page)
        for width, scheme in (380, "light"), (1600, "dark"):
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=scheme)
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


@pytest.mark.long
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
    assert first.locator("b").inner_text() == "halve_"
    page.keyboard.press("Enter")
    page.wait_for_url("**/first.html#halve_")
    assert page.locator("#halve_").is_visible()


@pytest.mark.long
def test_search_by_keyboard(toy_site, open_page):
    page = open_page(toy_site / "index.html")
    page.keyboard.press("/")
    page.keyboard.type("double")
    page.locator("#results a").nth(1).wait_for()
    def chosen():
        marked = page.locator("#results a[aria-selected=true]").evaluate_all("x => x.map(a => a.id)")
        assert [page.get_attribute("#search", "aria-activedescendant")] == (marked or [None])
        return marked
    assert chosen() == [], "nothing is marked until an arrow is pressed"
    last = f"result-{page.locator('#results a').count() - 1}"
    for key, expected in (("ArrowDown", "result-0"), ("ArrowDown", "result-1"), ("ArrowUp", "result-0"), ("ArrowUp", last), ("ArrowDown", "result-0")):
        page.keyboard.press(key)
        assert chosen() == [expected]
    page.hover("#result-1")
    assert chosen() == ["result-1"], "what the mouse points at is what is marked"
    page.keyboard.press("Escape")
    assert page.locator("#results").is_hidden() and page.input_value("#search") == ""


@pytest.mark.long
@pytest.mark.parametrize("keys, hit", [([], 0), (["ArrowDown"], 0), (["ArrowDown", "ArrowDown"], 1)])
def test_enter_opens_the_marked_hit_or_the_first(toy_site, open_page, keys, hit):
    page = open_page(toy_site / "index.html")
    page.fill("#search", "double")
    page.locator("#results a").nth(1).wait_for()
    wanted = page.locator("#results a").nth(hit).evaluate("a => a.href")
    for key in [*keys, "Enter"]: page.keyboard.press(key)
    page.wait_for_url(wanted)


@pytest.mark.long
def test_enter_may_come_before_the_index(toy_site, open_page):
    page = open_page(toy_site / "index.html")
    page.evaluate("""() => {
      const field = document.getElementById("search")
      field.value = "halve"
      field.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", cancelable: true}))
    }""")
    page.wait_for_url("**/first.html#halve_")


def searching(page):
    "A function that gives the headings of the hits for a query."
    def hits(query):
        page.fill("#search", query)
        page.wait_for_function("() => document.getElementById('search-status').textContent")
        page.evaluate("() => new Promise(requestAnimationFrame)")
        return page.locator("#results a b").all_inner_texts()
    page.evaluate("() => { const field = document.getElementById('search'); field.addEventListener('input', () => { document.getElementById('search-status').textContent = '' }, true) }")
    return hits


@pytest.mark.long
def test_search_ranks_names_first_and_finds_words_of_the_text(toy_site, open_page):
    hits = searching(open_page(toy_site / "index.html"))
    assert hits("double")[0] == "double", "the function before the headings and the prose that name it"
    assert hits("wide tables")[0] == "2.1 Wide tables"
    assert "double and halve_ together" in hits("quotation")
    assert hits("xyzzy") == []
    assert hits("only") == [], "outputs are not searched"


SLIPS = [
    ("duoble", "double"), ("dubl", "double"), ("doubel", "double"), ("couble", "double"), ("hakve_", "halve_"), ("quotatoin", "double and halve_ together"),
    ("fotnote qoutation", "double and halve_ together"), ("LIMTIS", "look"), ("duo", None), ("xyoubl", None), ("dubel", None)]


@pytest.mark.long
def test_search_forgives_slips(toy_site, open_page):
    hits = searching(open_page(toy_site / "index.html"))
    for query, found in SLIPS: assert found in hits(query) if found else hits(query) == [], query


@pytest.mark.long
def test_search_puts_what_is_meant_exactly_before_what_is_similar(toy_site, open_page):
    page = open_page(toy_site / "index.html")
    exact = searching(page)("wide")
    similar = page.locator("#results small").evaluate_all("x => x.map(e => e.textContent.endsWith('similar'))")
    assert "2.1 Wide tables" in exact and similar == sorted(similar)
    searching(page)("widr")
    assert set(page.locator("#results small").evaluate_all("x => x.map(e => e.textContent.endsWith('similar'))")) == {True}
    assert page.locator("#results mark").first.inner_text().lower() == "wide"


@pytest.mark.long
def test_snippets_are_as_the_page_reads(toy_site, open_page):
    page = open_page(toy_site / "index.html")
    hits = searching(page)
    assert hits("add a number to itself")[0] == "1.1 The idea"
    snippet = page.locator("#results p").first.inner_text()
    assert snippet.startswith("To double is to add a number to itself (Knuth 1984, 3). Knuth (1984) says more; see Equation")
    index = (toy_site / "assets" / "search-index.js").read_text()
    assert not re.search(r"@\w|[\\\\]\w|\$\$|y = x\$", index), "neither TeX nor keys of citations"
    assert "with y=x" in index and "x^2 and code" in index


@pytest.mark.long
def test_search_index_is_small(real_site):
    pages = list(real_site.glob("*.html"))
    index = (real_site / "assets" / "search-index.js").stat().st_size
    assert index < 30_000 * len(pages) and index < sum(p.stat().st_size for p in pages) / 4


# What a page does


def shades(page, box):
    "How far the left and the right edge of `box` are from its ground, in steps of gray out of 255."
    image = Image.open(io.BytesIO(box.screenshot())).convert("L")
    ground = max(image.getcolors(1 << 20))[1]
    edges = (image.crop((x, 0, x + 1, image.height)) for x in (3, image.width - 4))
    return [abs(max(edge.getcolors(1 << 20))[1] - ground) for edge in edges]


@pytest.mark.long
@pytest.mark.parametrize("width, scheme", [(380, "light"), *(pytest.param(*way, marks=pytest.mark.long) for way in [(1600, "light"), (380, "dark"), (1600, "dark")])])
def test_what_is_wider_than_its_place_says_so_and_takes_the_keyboard(toy_site, open_page, width, scheme):
    page = open_page(toy_site / "second.html", width, scheme)
    table, formula = page.locator(".table-wrap").first, page.locator("#eq-second-wide .formula")
    for box, name in ((table, "Table\N{NO-BREAK SPACE}2.1, scrolls"), (formula, "Formula, scrolls")):
        assert box.evaluate("e => e.scrollWidth > e.clientWidth")
        assert [box.get_attribute(a) for a in ("tabindex", "role", "aria-label")] == ["0", "region", name]
        left, right = shades(page, box)
        assert left < 4 and right > 20, "the right edge is shaded"
        box.focus()
        page.keyboard.press("End" if box is formula else "ArrowRight")
        page.wait_for_function("e => e.scrollLeft > 0", arg=box.element_handle()) if box is table else None
        box.evaluate("e => { e.style.scrollBehavior = 'auto'; e.scrollLeft = e.scrollWidth }")
        if box is formula: assert shades(page, box)[0] > 20 > 4 > shades(page, box)[1], "at the end the left edge is shaded"
    fits = page.locator(".table-wrap").nth(1)
    assert fits.get_attribute("tabindex") is None and fits.get_attribute("role") is None and max(shades(page, fits)) < 4


@pytest.mark.long
def test_the_names_of_the_rows_stay_in_sight(toy_site, open_page):
    page = open_page(toy_site / "second.html", 380)
    row = page.locator(".table-wrap tbody th").first
    before = row.bounding_box()["x"]
    page.locator(".table-wrap").first.evaluate("e => { e.scrollLeft = 300 }")
    assert row.bounding_box()["x"] == before


def hue(color): return colorsys.rgb_to_hsv(*(c / 255 for c in color))[0] * 360


@pytest.mark.long
@pytest.mark.parametrize("chosen", [None, *(pytest.param(theme, marks=pytest.mark.long) for theme in ("light", "dark"))])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_charts_take_the_ground_of_the_page_and_keep_their_hues(toy_site, open_page, scheme, chosen):
    page = open_page(toy_site / "first.html", 1200, scheme)
    if chosen: page.evaluate("t => { document.documentElement.dataset.theme = t }", chosen)
    image = Image.open(io.BytesIO(page.locator("#fig-first-line img").screenshot())).convert("RGB")
    ground = [int(c) for c in re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))]
    assert all(abs(a - b) <= 2 for a, b in zip(image.getpixel((290, 10)), ground)), "white is the page's ground"
    box = page.locator("#fig-first-line img").bounding_box()
    around = page.screenshot(clip={"x": box["x"] - 8, "y": box["y"] - 4, "width": 4, "height": 4})
    assert all(abs(a - b) <= 2 for a, b in zip(Image.open(io.BytesIO(around)).convert("RGB").getpixel((2, 2)), ground)), "so is what is around the chart"
    line = image.getpixel((150, 80))
    assert abs(hue(line) - hue((0, 0x72, 0xB2))) < 6, "blue stays blue"
    assert max(abs(a - b) for a, b in zip(line, ground)) > 90, "and stands out"


@pytest.mark.long
def test_pictures_keep_their_colors_in_the_dark(toy_site, open_page):
    page = open_page(toy_site / "second.html", 1200, "dark")
    color = Image.open(io.BytesIO(page.locator("#fig-second-map img").screenshot())).convert("RGB").getpixel((290, 20))
    assert abs(hue(color) - hue((0xE6, 0x9F, 0))) < 4 and .75 < color[0] / 0xE6 <= 1, "only dimmed"


@pytest.mark.long
@pytest.mark.parametrize("width", [380, 1600])
def test_a_long_default_does_not_stretch_its_entry(toy_site, open_page, width):
    page = open_page(toy_site / "second.html", width)
    entry = page.locator(".api", has=page.locator("#look"))
    assert entry.locator("pre").inner_text() == "look(where, limits=LIMITS, steps=(…))"
    assert entry.locator("pre, .table-wrap").evaluate_all("x => x.every(e => e.scrollWidth <= e.clientWidth)")
    titles = entry.locator("[title]").evaluate_all("x => x.map(e => e.title)")
    assert titles[0].startswith("{'the limit of measure number 0': (0, 0), ") and titles[1].endswith("98, 99)")
    assert "Look in $HOME/<folder>/ for" in entry.inner_text() and "a path such as <folder>/name" in entry.inner_text()


@pytest.mark.long
def test_the_chapter_that_is_read_is_in_sight_in_a_long_list(toy_site, open_page):
    page = open_page(toy_site / "second.html")
    page.set_viewport_size({"width": 1200, "height": 160})
    page.reload()
    box, list = page.locator("#sidebar [aria-current]").bounding_box(), page.locator("#sidebar").bounding_box()
    assert page.locator("#sidebar").evaluate("e => e.scrollHeight > e.clientHeight")
    assert list["y"] <= box["y"] and box["y"] + box["height"] <= list["y"] + list["height"]
    assert page.evaluate("scrollY") == 0

@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
def test_code_is_copied(toy_site, open_page):
    page = open_page(toy_site / "index.html", permissions=["clipboard-read", "clipboard-write"])
    page.locator(".cell .sourceCode").nth(1).hover()
    page.locator(".copy").nth(1).click()
    page.wait_for_function("document.querySelectorAll('.copy')[1].textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == "double(21)"


@pytest.mark.long
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
    assert second.locator("figcaption").all_inner_texts() == [f"Table{nbsp}2.1: Many columns.", f"Table{nbsp}2.2: A table of Markdown", f"Figure{nbsp}2.1: A map in colors."]
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
    assert second.locator(".api h3").evaluate_all("x => x.map(h => h.id)") == ["box", "box.open", "look"]
    assert second.locator("article p a[href='first.html#double'] code").count() == 1


@pytest.mark.long
def test_a_printed_page_shows_the_text_and_what_is_folded(toy_site, open_page):
    page = open_page(toy_site / "first.html", scheme="dark")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    for hidden in (".bar", "#sidebar", "aside", ".pager", ".copy >> nth=0"): assert page.locator(hidden).is_hidden(), hidden
    assert page.get_by_text("Inside the fold.").is_visible()
    assert page.locator("#fig-first-line img").evaluate("e => getComputedStyle(e).filter") == "none", "a chart is printed as it is"
    assert page.locator(".output-plain pre").nth(2).evaluate("e => e.scrollHeight <= e.clientHeight + 1"), "long output is printed whole"


@pytest.mark.long
def test_wide_tables_and_formulas_fit_on_paper(toy_site, open_page):
    page = open_page(toy_site / "second.html")
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 672, "height": 900})  # the text of a page of A4
    for box in (page.locator(".table-wrap table").first, page.locator("#eq-second-wide math")):
        assert box.evaluate("e => e.getBoundingClientRect().right") <= 672
        assert box.evaluate("e => e.parentElement.scrollWidth <= e.parentElement.clientWidth + 1")
    assert page.evaluate("document.documentElement.scrollWidth") <= 672
    small = page.locator(".table-wrap").nth(1)
    assert small.evaluate("e => getComputedStyle(e).zoom") == "1", "what fits keeps its size"
