"The chapters as a book: exports in sync, notebooks clean, one Markdown for both renderers, references that lead somewhere."
import ast
import functools
import json
import re
import shutil
import socket
import subprocess
import sys
from html import unescape

import nbformat
import pandas as pd
import pytest
import yaml
from execnb.nbio import nb2str, read_nb
from nbdev.clean import clean_nb

import toybook
from toybook import BOOK, ROOT, code, md, result, shown, toy_site  # noqa: F401

sys.path.append(str(BOOK))  # last, for book/build.py is not the package `build`
import apidoc  # noqa: E402
import lint  # noqa: E402
import readme  # noqa: E402
from blocks import PANDOC, markdown  # noqa: E402
from lint import checked, lint_cells, lint_tree  # noqa: E402
from outline import BookError, Chapter, digest, entries, outline  # noqa: E402
from pages import inline  # noqa: E402
from process import local, meant  # noqa: E402
from refs import Page, number  # noqa: E402
from tables import mended  # noqa: E402

NOTEBOOKS = sorted((ROOT / "nbs").glob("[!._]*.ipynb"))
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


# The real chapters

def test_exports_are_in_sync(tmp_path):
    for name in ("nbs", "sharetie"): shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "README.md"): shutil.copy(ROOT / name, tmp_path)
    done = toybook.run(tmp_path, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()")
    assert done.returncode == 0, done.stderr
    made = {p.name: p.read_text() for p in (tmp_path / "sharetie").glob("*.py")}
    here = {p.name: p.read_text() for p in (ROOT / "sharetie").glob("*.py")}
    differ = [n for n in made.keys() | here.keys() if made.get(n) != here.get(n)]
    assert not differ, f"run nbdev_export: {', '.join(differ)}"


def test_every_module_has_a_notebook():
    for module in (ROOT / "sharetie").glob("[!_]*.py"):
        source = re.search(r"File to edit: (\S+?)\.$", module.read_text(), re.M)
        assert source and (ROOT / "sharetie" / source[1]).exists(), f"{module.name} comes from no notebook"


@by_name
def test_notebook_is_clean(path):
    nb = read_nb(path)
    clean_nb(nb)
    assert nb2str(nb) == path.read_text(encoding="utf-8"), "run nbdev_clean"


@by_name
def test_notebook_tells_nothing_of_the_machine(path):
    nb = read_nb(path)
    for i, cell in enumerate(nb.cells):
        for out in cell.get("outputs", []):
            data = {k: "".join(v) for k, v in out.get("data", {}).items() if k.startswith("text/")}
            for text in [*data.values(), "".join(out.get("text", ""))]:
                assert not re.search(r"(?<![\w.])/(?:home|root|tmp|work|Users|usr|opt|var)/|[A-Z]:\\\\", text), f"cell {i + 1} saved a path: {text[:200]}"
                assert not re.search(r"\bat 0x[0-9a-f]{6,}", text), f"cell {i + 1} saved an address: {text[:200]}"
                assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", text), f"cell {i + 1} saved this machine's name: {text[:200]}"


def imports(path):
    "The (index of the cell, module of sharetie) that a notebook imports."
    for i, cell in enumerate(read_nb(path).cells):
        if cell.cell_type != "code": continue
        for node in ast.walk(ast.parse(cell.source)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names] if isinstance(node, ast.Import) else []
            yield from ((i, n.split(".")[1]) for n in names if n.startswith("sharetie."))


@functools.cache
def order_of_chapters():
    "{notebook: its place}: by number, then as they are read."
    read = [name for name, _ in entries(yaml.safe_load((ROOT / "_quarto.yml").read_text())["book"]["chapters"])]
    return {name: (re.match(r"\d*", name)[0], i) for i, name in enumerate(read)}


@by_name
def test_chapter_imports_only_earlier_chapters(path):
    if path.stem == "index": return
    order = order_of_chapters()
    modules = {re.sub(r"^\d+[a-z0-9]*_", "", p.stem): p.name for p in NOTEBOOKS}
    for i, module in imports(path):
        assert module in modules, f"cell {i + 1} imports {module}, which no chapter exports"
        assert order[modules[module]] < order[path.name], f"cell {i + 1} imports {module}, a later chapter"


def test_the_book_keeps_to_its_markdown_and_all_references_lead_somewhere():
    checked(outline(ROOT))


def test_readme_is_in_sync_with_the_index():
    text, files = readme.compose(outline(ROOT))
    assert (ROOT / "README.md").read_text(encoding="utf-8") == text, "run make book"
    for name, content in files.items(): assert (ROOT / name).read_bytes() == content, f"{name}: run make book"


# What Quarto 1.7 documents (quarto.org/docs/reference), of what _quarto.yml may use.
DOCUMENTED = {
    "project": {"type", "output-dir"},
    "book": {"title", "subtitle", "author", "description", "site-url", "repo-url", "repo-branch", "repo-subdir", "repo-actions",
             "search", "page-navigation", "reader-mode", "chapters", "appendices"},
    "execute": {"enabled"},
    "html": {"theme", "respect-user-color-scheme", "html-math-method", "toc", "toc-depth", "number-sections", "number-depth",
             "anchor-sections", "code-copy", "code-overflow", "fig-cap-location", "tbl-cap-location"},
}


def test_quarto_yml_keeps_to_documented_options_and_asks_nothing_of_another_host():
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    assert config.keys() <= {"project", "book", "lang", "bibliography", "link-citations", "execute", "format"}
    assert config["format"].keys() == {"html"}
    for part, known in DOCUMENTED.items():
        given = config["format"]["html"] if part == "html" else config[part]
        assert given.keys() <= known, f"{part}: {given.keys() - known}"
    assert config["project"] == {"type": "book", "output-dir": "_docs"}
    assert config["execute"]["enabled"] is False
    assert config["format"]["html"]["html-math-method"] == "mathml"
    for themes in config["format"]["html"]["theme"].values(): assert "quarto.scss" in themes
    assert "$web-font-path: false" in (BOOK / "quarto.scss").read_text()


# Of nbdev's directives and Quarto's cell options for Jupyter (quarto.org/docs/reference/cells/cells-jupyter), those that chapters may use.
DIRECTIVES = {"default_exp", "export", "exporti", "hide"}
CELL_OPTIONS = {"label", "classes", "eval", "echo", "output", "include", "fig-cap", "fig-alt", "tbl-cap", "code-fold", "code-summary"}


def test_cells_use_documented_options():
    assert lint.KNOWN == DIRECTIVES | CELL_OPTIONS


def test_functions_of_the_builder_are_short():
    for path in BOOK.glob("*.py"):
        source = path.read_text()
        assert source.count("\n") < 350, path.name
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef): assert node.end_lineno - node.lineno < 40, f"{path.name}: {node.name}"


# The checks, on bad examples

def one_chapter(folder, *cells, name="05_some"):
    "A chapter with a title and `cells`."
    toybook.write_notebook(folder / f"{name}.ipynb", [md("# Some {#sec-some}\n\n> A promise."), *cells])
    return Chapter(folder / f"{name}.ipynb", number=5)


def problems(folder, *cells):
    "All problems of a chapter with `cells`."
    chapter = one_chapter(folder, *cells)
    found = lint_cells(chapter)
    try: page = number(Page(chapter, chapter.nb, markdown_blocks(chapter)))
    except BookError: return found
    return found + page.problems + list(lint_tree(page))


def markdown_blocks(chapter):
    from blocks import parse
    return parse(chapter.nb)


BAD = {
    "raw HTML": (md("A <br> break."), "raw html '<br>'"),
    "raw TeX": (md("\\begin{tabular} a \\end{tabular}"), "raw tex"),
    "unknown class": (code("#| classes: wide\nx"), "the class 'wide'; there is only true-colors"),
    "shortcode": (md("{{< include x.qmd >}}"), "a shortcode"),
    "tabset": (md("::: {.panel-tabset}\n## A\n:::"), "a tabset"),
    "unknown block": (md("::: {.column-margin}\nText\n:::"), "a block ':::' that is no callout (column-margin)"),
    "unknown callout": (md("::: {.callout-danger}\nText\n:::"), "no callout 'danger'"),
    "callout option": (md("::: {.callout-note icon=false}\nText\n:::"), "callouts take title and collapse, not 'icon'"),
    "callout collapse": (md("::: {.callout-note collapse=yes}\nText\n:::"), "collapse is true or false, not 'yes'"),
    "open block": (md("::: {.callout-note}\nText"), "':::' opens a block that nothing closes"),
    "close too many": (md("Text\n\n:::"), "':::' closes a block that nothing opened"),
    "span": (md("[red]{.red}"), "a span with attributes"),
    "second title": (md("# Another"), "a second title"),
    "deep section label": (md("### Deep {#sec-deep}"), "labels a heading without a number"),
    "label in capitals": (md("## X {#sec-Big}"), "must be of lower-case letters"),
    "label with underscore": (md("$$ x $$ {#eq-a_b}"), "must be of lower-case letters"),
    "label of other kind": (md("::: {#thm-x .callout-note}\nx\n:::"), "is of a kind that the book does not use"),
    "label on nothing": (md("Text {#eq-lost}"), "the attributes {#eq-lost} belong to nothing"),
    "references block": (md("::: {#refs}\n:::"), "{#refs} would gather"),
    "TeX label": (md("$$ x \\label{eq:x} $$"), "label a formula with"),
    "TeX reference": (md("See \\ref{x}."), "label a formula with"),
    "colon reference": (md("See @fig:x."), "is no reference"),
    "reference to come": (md("See Figure ??."), "is a reference to nothing"),
    "image elsewhere": (md("![A cat](https://example.org/cat.png)"), "is on another host"),
    "missing image": (md("![A cat](cat.png)"), "there is no image cat.png"),
    "raw cell": ({"cell_type": "raw", "metadata": {}, "source": "x"}, "a raw cell"),
    "unknown directive": (code("#| exprot\nx = 1"), "the directive 'exprot' is not one of"),
    "caption without label": (code('#| fig-cap: "Lost."\nx'), "fig-cap without a label fig-name"),
    "label without caption": (code("#| label: fig-x\nx", shown("image/png", toybook.png())), "fig-x has no fig-cap"),
    "table caption on a figure": (code('#| label: fig-x\n#| tbl-cap: "T."\nx', result("1")), "fig-x has no fig-cap"),
    "label of no kind": (code("#| label: setup\nx"), "the label 'setup' must be fig-name or tbl-name"),
    "figure never drawn": (code('#| label: fig-x\n#| fig-cap: "C."\nx'), "fig-x has no saved output"),
    "import among code": (code("import math\nmath.pi"), "imports stand in a cell with other code"),
    "magic": (code("%matplotlib inline"), "it is not plain Python"),
    "saved error": (code("x", {"output_type": "error", "ename": "NameError", "evalue": "x", "traceback": []}), "it saved an error: NameError"),
    "saved warning": (code("x", {"output_type": "stream", "name": "stderr", "text": "careful"}), "it saved output of stderr"),
    "widget": (code("x", shown("application/vnd.jupyter.widget-view+json", {})), "needs a live page"),
    "HTML output": (code("x", shown("text/html", "<b>x</b>")), "an HTML output that is not a table"),
    "script": (code("x", shown("text/html", "<table></table><script></script>")), "an HTML output that loads something"),
}


@pytest.mark.parametrize("cell, expected", BAD.values(), ids=BAD)
def test_linter_finds(cell, expected, tmp_path):
    found = problems(tmp_path, cell)
    assert any(expected in p for p in found), found
    place = next(p for p in found if expected in p)
    assert "05_some.ipynb, cell 2 (" in place, "the message names notebook and cell"


GOOD = {
    "code that looks bad": md("```python\nx = '<br>'  # ::: {.column}\n```\n\nInline `<br>` and `{#eq-x}` and `@fig:x`."),
    "formula": md("$$\na < b\n$$ {#eq-some-x}\n\nIn line $a<b$, and `x` < 3, 2 < 3."),
    "callout": md('::: {.callout-tip title="T" collapse="true"}\nText\n:::'),
    "autolink": md("<https://example.org>"),
    "flag": code("#| slow\nx = 1"),
    "last cell": code("#| hide\nimport nbdev; nbdev.nbdev_export()"),
    "table": code('#| label: tbl-some-t\n#| tbl-cap: "T."\nx', shown("text/html", toybook.frame())),
}


@pytest.mark.parametrize("cell", GOOD.values(), ids=GOOD)
def test_linter_passes(cell, tmp_path): assert problems(tmp_path, cell) == []


def test_linter_wants_title_and_promise(tmp_path):
    toybook.write_notebook(tmp_path / "05_some.ipynb", [md("Just text.")])
    found = lint_cells(Chapter(tmp_path / "05_some.ipynb"))
    assert any("the first cell must be '# Title'" in p for p in found) and any("needs a line '> promise'" in p for p in found)


# References, on the toy book

@pytest.fixture
def toy(tmp_path):
    "The notebooks of the toy book, not exported."
    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").write_text(toybook.SETTINGS)
    (tmp_path / "_quarto.yml").write_text(toybook.QUARTO)
    (tmp_path / "nbs" / "references.bib").write_text(toybook.BIB)
    for name, cells in toybook.CHAPTERS.items(): toybook.write_notebook(tmp_path / "nbs" / f"{name}.ipynb", cells())
    return tmp_path


def with_cell(toy, cell, name="02_second"):
    "The toy book with one more cell before the last."
    cells = toybook.CHAPTERS[name]()
    toybook.write_notebook(toy / "nbs" / f"{name}.ipynb", [*cells[:-1], cell, cells[-1]])
    return toy


def test_toy_book_passes_the_checks(toy):
    pages = checked(outline(toy))
    labels = {id: l.number for p in pages for id, l in p.labels.items()}
    assert labels == {"sec-map": "", "fig-index-line": "1", "sec-first": "1", "sec-first-idea": "1.1", "eq-first-double": "1.1", "fig-first-line": "1.1",
                      "sec-second": "2", "tbl-second-wide": "2.1", "tbl-second-md": "2.2", "eq-second-wide": "2.1", "fig-second-map": "2.1"}


@pytest.mark.parametrize("text, expected", [
    ("See @fig-first-lime.", "@fig-first-lime refers to nothing; is it @fig-first-line?"),
    ("See @sec-nowhere.", "@sec-nowhere refers to nothing"),
    ("As in [@knuth1985].", "@knuth1985 is not in the bibliography; is it @knuth1984?"),
    ("See @thm-x.", "@thm-x is of a kind that the book does not use"),
    ("See @sec-map.", "refers to something without a number"),
    ("[x](03_gone.ipynb)", "the link to 03_gone.ipynb leads nowhere"),
    ("[x](00_first.ipynb#sec-gone)", "the link to 00_first.ipynb#sec-gone leads to no heading or label"),
    ("[x](other.html)", "the link to other.html leads nowhere"),
    ("$$ x $$ {#eq-first-double}", "the label eq-first-double is in first.html too"),
    ("$$ x $$ {#eq-second-x}\n\n$$ y $$ {#eq-second-x}", "the label eq-second-x is there twice"),
    ("[@knuth1984; @fig-first-line]", "a reference and a citation in one bracket"),
])
def test_what_leads_nowhere_is_named(toy, text, expected):
    with pytest.raises(BookError) as error: checked(outline(with_cell(toy, md(text))))
    place = next((p for p in error.value.problems if expected in p), None)
    assert place, error.value.problems
    assert "02_second.ipynb, cell 17 (" in place


def test_a_chapter_that_cites_ends_with_references(toy):
    with pytest.raises(BookError, match="its last heading must be '## References'"):
        checked(outline(with_cell(toy, md("As @knuth1984 says."))))


def test_a_key_twice_in_the_bibliography(toy):
    (toy / "nbs" / "references.bib").write_text(toybook.BIB * 2)
    with pytest.raises(BookError, match="knuth1984 is there twice"): checked(outline(toy))


@pytest.mark.parametrize("change, expected", [
    (("00_first.ipynb", "07_none.ipynb"), "chapter 07_none.ipynb is not in nbs/"),
    (("[02_second.ipynb]", "[]"), "nbs/02_second.ipynb is in no part of the book"),
    (("[02_second.ipynb]", "[02_second.ipynb, 00_first.ipynb]"), "chapter 00_first.ipynb is listed twice"),
    (("    - index.ipynb\n", ""), "the first chapter must be index.ipynb"),
])
def test_outline_and_notebooks_must_agree(toy, change, expected):
    (toy / "_quarto.yml").write_text(toybook.QUARTO.replace(*change))
    with pytest.raises(BookError) as error: outline(toy)
    assert any(expected in p for p in error.value.problems), error.value.problems


# API entries

def shape(
    x: "torch.Tensor",  # (b, d) | any type
    *rest: int,  # more
    scale: float = 1.0,  # of `x`
    key=object(),
) -> tuple:  # its shape
    """Give the shape.

    Raises TypeError.
    Source: nobody."""


def test_api_entry():
    text = apidoc.Entry(shape)._repr_markdown_()
    assert "### `shape` {#shape .api-name}" in text
    assert "shape(x, *rest, scale=1.0, key=<object object>)" in text
    assert "| `x` | `Tensor` |  | (b, d) \\| any type |" in text
    assert "| `scale` | `float` | `1.0` | of `x` |" in text
    assert "| *returns* | `tuple` |  | its shape |" in text
    assert "Give the shape.\n\nRaises TypeError.\n\nSource: nobody." in text
    html = subprocess.run([PANDOC, "-f", "markdown"], input=text, capture_output=True, text=True).stdout
    assert "(b, d) | any type" in html and html.count("<tr>") + html.count("<tr ") == 6


ABOUT = {f"the setting of number {i}": f'a "b" | c \\\\ {i}' for i in range(9)}


def long_defaults(
    x=ABOUT,  # known by a name
    y=tuple(range(100)),  # <of> numbers
    z="words " * 20,
):
    "Read $DATA/<name>/ and `<b>`."


def test_long_defaults_are_shortened_and_kept_whole():
    text = apidoc.Entry(long_defaults)._repr_markdown_()
    html = subprocess.run([PANDOC, "-f", "markdown"], input=text, capture_output=True, text=True).stdout
    call = re.sub("<[^>]+>", "", re.search("<pre.*?</pre>", html, re.S)[0])
    assert unescape(call) == "long_defaults(x=ABOUT, y=(…), z='words words words words words words w…')"
    titles = [unescape(t) for t in re.findall(r'title="([^"]*)"', html)]
    assert titles == [repr(ABOUT), repr(tuple(range(100))), repr("words " * 20)]
    assert "Read $DATA/&lt;name&gt;/ and <code>&lt;b&gt;</code>." in html and "&lt;of&gt; numbers" in html


def test_a_command_is_shown_as_it_is_called():
    click = pytest.importorskip("click")

    @click.command("count")
    @click.argument("file")
    @click.option("--near", metavar="TOL", help="Also <near> ones.")
    def count(file, near):
        "Count what is in FILE."
    text = apidoc.Entry(count)._repr_markdown_()
    assert f"```{{.sh .api-signature}}\n{__name__.split('.')[0]} count [OPTIONS] FILE\n```\n\nCount what is in FILE." in text
    assert "| `--near TOL` | Also \\<near> ones. |\n| `--help` | Show this message and exit. |" in text


def test_links_lead_to_what_a_chapter_means():
    known = ["a.html#load", "b.html#census-class", "b.html#census", "b.html#load", "c.html#box", "c.html#box.open"]
    pages = ["a.html", "b.html", "c.html"]
    def links(text, here): return local(text, "https://x.org/", meant(known, pages, here))
    assert links("[`load`](https://x.org/a.html#load)", "b.html") == "[`load`](b.html#load)", "the chapter's own"
    assert links("[`load`](https://x.org/b.html#load)", "a.html") == "[`load`](a.html#load)"
    assert links("[`load`](https://x.org/a.html#load)", "c.html") == "[`load`](b.html#load)", "the last one before"
    assert links("[`box`](https://x.org/c.html#box)", "a.html") == "[`box`](c.html#box)", "or else a later one"
    assert links("[`Census`](https://x.org/b.html#census)", "a.html") == "[`Census`](b.html#census-class)"
    assert links("[`census`](https://x.org/b.html#census)", "a.html") == "[`census`](b.html#census)"
    assert links("[`Census.plot`](https://x.org/b.html#census.plot)", "a.html") == "[`Census.plot`](b.html#census-class)", "without an entry: its class"
    assert links("[`Box.open`](https://x.org/c.html#box.open)", "a.html") == "[`Box.open`](c.html#box.open)"
    assert links("[`gone`](https://x.org/c.html#gone)", "a.html") == "`gone`"
    assert links("[[`load`](https://x.org/a.html#load) and more](a.ipynb)", "a.html") == "[`load` and more](a.ipynb)", "linked by the author"


def test_bars_of_norms_stand_close():
    formula = r"$\|a\|^2 \parallel \lVert b \rVert$"
    assert inline(formula).count("‖") == 4 and inline(formula).count("∥") == 1 + formula.count("∥")


def test_a_space_stands_after_the_name_of_a_function_but_not_before_a_bracket():
    space = "<mspace "
    for formula, spaces in ((r"\log n", 1), (r"\log p(x)", 1), (r"\log(x)", 0), (r"\exp\left(x\right)", 0), (r"\log_2 n + \max_i x_i", 2), (r"x_{\max}", 0), (r"a^{\log n}", 1)):
        html = inline(f"${formula}$")
        assert html.count(space) == spaces, html
    assert inline(r"$\log_2 n$").index("</msub>") < inline(r"$\log_2 n$").index(space)


# Tables of pandas

def grid(table):
    "The texts of the header's rows and of the body's."
    return [[[re.sub("<[^>]+>", "", c) for c in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in re.findall("<tr.*?</tr>", part)]
            for part in table.split("<tbody>")]


def test_table_names_its_index_in_the_header_and_shows_gaps_as_dashes():
    made = mended(pd.DataFrame({"a": [1, None], "b": [pd.NaT, "x"]}, index=pd.Index(["p", "q"], name="who"))._repr_html_())
    assert grid(made) == [[["who", "a", "b"]], [["p", "1.0", "–"], ["q", "–", "x"]]]
    assert mended(made) == made, "mending twice is mending once"
    assert not re.search("<style|<div|border=", made)
    empty = mended(pd.DataFrame({"a": [1]}, pd.Index(["p"], name=""))._repr_html_())
    assert grid(empty) == [[["", "a"]], [["p", "1"]]], "no row without a name"


def test_table_with_levels_keeps_them():
    columns = pd.MultiIndex.from_product([["train", "test"], ["mean", "std"]])
    index = pd.MultiIndex.from_tuples([("free", 1), ("free", 2)], names=["model", "seed"])
    head, body = grid(mended(pd.DataFrame([[1, 2, 3, 4]] * 2, index, columns)._repr_html_()))
    assert head == [["", "", "train", "test"], ["model", "seed", "mean", "std", "mean", "std"]]
    assert body == [["free", "1", "1", "2", "3", "4"], ["2", "1", "2", "3", "4"]]
    claims = pd.DataFrame({"n": [1, 2]}, index)
    assert '<th>model</th><th class="level">seed</th><th>n</th>' in mended(claims._repr_html_()), "names of levels stand left, as the levels do"
    named = pd.DataFrame({"a": [1]}, pd.Index(["p"], name="who")).rename_axis("what", axis=1)
    assert grid(mended(named._repr_html_()))[0] == [["what", "a"], ["who", ""]], "no name is lost"


def test_table_columns_stand_left_or_right_as_a_whole():
    made = mended(pd.DataFrame({"n": ["0.1 ± 0.02", "-3e-05"], "w": ["shared", "0.1"], "l": ["a sentence that is longer than others", "b"]})._repr_html_())
    assert re.findall(r"<t[hd](.*?)>", made.replace(' style="text-align: left;"', " left").replace(' class="long"', " long")) == [
        "ead", "", "", " left", " left", "", "", " left", " long left", "", "", " left", " long left"]
    assert mended("<p>no table</p>") == "<p>no table</p>"


# What the processed notebooks hold (made with the site of the toy book)

def processed(site, name): return read_nb(site.parent / "_proc" / f"{name}.ipynb")


@pytest.mark.long
def test_processed_notebooks_are_valid(toy_site):
    for path in (toy_site.parent / "_proc").glob("*.ipynb"):
        nbformat.validate(json.loads(path.read_text()))
        done = subprocess.run([PANDOC, "-f", "ipynb", str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_processed_notebook_holds_entries_in_place_of_exported_cells(toy_site):
    nb = processed(toy_site, "00_first")
    entries = ["".join(o.data["text/markdown"]) for c in nb.cells if c.source.endswith(")") and "show_doc(" in c.source for o in c.outputs]
    assert [e.split("`")[1] for e in entries] == ["double", "halve_"]
    assert all("\n---\n" not in e and not e.startswith("---") for e in entries)
    assert "https://github.com/toy/toybook/blob/main/toybook/first.py#L" in entries[0]
    sources = [c.source for c in nb.cells if c.cell_type == "code"]
    assert not any("nbdev_export" in s or "default_exp" in s for s in sources)
    folded = next(s for s in sources if "def double" in s)
    assert folded.startswith('#| code-fold: true\n#| code-summary: "Source of `double`, `halve_`"\n')
    assert "CONSTANT = 2" in sources and "import math" not in sources


def test_processed_notebook_links_relative_and_keeps_labels(toy_site):
    nb = processed(toy_site, "02_second")
    text = markdown(nb)
    assert "[`double`](first.html#double)" in text and "[`Box`](second.html#box)" in text
    assert "toy.example.org" not in text
    assert any(c.source.startswith("#| label: tbl-second-wide\n#| tbl-cap: ") for c in nb.cells)
    heading = next(c.source for c in processed(toy_site, "00_first").cells if c.source.startswith("### "))
    assert heading.startswith("### `double` and `halve_` together"), "no links in headings"


def test_processed_notebook_has_its_tables_mended_and_its_pictures_marked(toy_site):
    nb = processed(toy_site, "02_second")
    tables = ["".join(o.data["text/markdown"]) for c in nb.cells if c.cell_type == "code" for o in c.outputs if "<table" in "".join(o.get("data", {}).get("text/markdown", ""))]
    assert grid(tables[1]) == [[["model", "measure_0", "measure_1"]], [["free", "0.0000", "0.1429"], ["shared", "0.0000", "–"]]]
    pictures = {c.source.split("label: ")[1].split()[0]: "#| classes: true-colors" in c.source
                for name in ("00_first", "02_second") for c in processed(toy_site, name).cells if "label: fig-" in c.source}
    assert pictures == {"fig-first-line": False, "fig-second-map": True}, "charts on white take the colors of the page"


def test_quarto_finds_labels_of_chapters_and_what_has_no_number(toy_site):
    for name, title, page in (("index", "# toybook {.unnumbered}", "index.html"), ("00_first", "# First things {#sec-first}", "first.html")):
        front = yaml.safe_load(processed(toy_site, name).cells[0].source.strip().strip("-"))
        assert front["title"] == title and front["output-file"] == page
    assert processed(toy_site, "00_first").cells[1].source == "::: {.promise}\nWhere doubling is explained, with $x^2$ and `code`.\n:::"


def test_quarto_loads_nothing_for_a_table_and_describes_every_image(toy_site):
    cells = [c for name in ("00_first", "02_second") for c in processed(toy_site, name).cells if c.cell_type == "code"]
    outputs = [o.get("data", {}) for c in cells for o in c.outputs]
    assert any("```{=html}\n<" in "".join(data.get("text/markdown", "")) for data in outputs) and not any("text/html" in data for data in outputs)
    with_images = [c.source for c in cells if any("image/png" in o.get("data", {}) for o in c.outputs)]
    assert with_images and all("#| fig-alt: " in source for source in with_images)


def test_readme_of_the_toy_book(toy_site):
    text = (toy_site.parent / "README.md").read_text()
    assert text.startswith("<!-- Written by book/build.py from nbs/index.ipynb. -->\n\n# toybook\n\n> A toy book")
    assert "``` python\ndouble(21)\n```\n\n    42\n" in text
    assert "(https://toy.example.org/toybook/first.html#sec-first-idea)" in text
    assert "![A line, on the first page.](book/figures/index-fig-index-line.png)" in text
    assert (toy_site.parent / "book" / "figures" / "index-fig-index-line.png").exists()
    assert "<div" not in text and "nbdev" not in text


@pytest.fixture
def built(toy_site, tmp_path):
    "A copy of the toy book with its site."
    shutil.copytree(toy_site.parent, tmp_path / "toy")
    return tmp_path / "toy"


def files(folder): return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.long
def test_a_second_build_gives_the_same_and_a_failed_one_keeps_the_site(built):
    before, stamp = files(built / "_docs"), (built / "README.md").stat().st_mtime_ns
    again = toybook.build(built)
    assert again.returncode == 0 and re.search(r"_docs/index\.html \(pandoc, \d", again.stdout), again.stderr
    assert files(built / "_docs") == before, "the same site twice"
    assert (built / "README.md").stat().st_mtime_ns == stamp, "an unchanged README is not written"
    with_cell(built, md("See @fig-gone."))
    failed = toybook.build(built)
    assert failed.returncode == 1 and "02_second.ipynb, cell 17" in failed.stderr and "Traceback" not in failed.stderr
    assert files(built / "_docs") == before
    assert not list(built.glob("*.new")) and not list(built.glob("*.old"))


# Quarto, played by a script

QUARTO = """#!/bin/sh
pwd > "$SEEN/folder"
echo "$@" > "$SEEN/arguments"
cp -r . "$SEEN/project"
mkdir _docs && echo quarto was here > _docs/index.html
exit ${QUARTO_EXIT:-0}
"""


@pytest.mark.long
def test_with_quarto_on_the_path_it_gets_the_whole_project(built, tmp_path):
    seen = tmp_path / "seen"
    for folder in (seen, tmp_path / "bin"): folder.mkdir()
    (tmp_path / "bin" / "quarto").write_text(QUARTO)
    (tmp_path / "bin" / "quarto").chmod(0o755)
    env = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "SEEN": str(seen)}
    done = toybook.build(built, **env)
    assert done.returncode == 0 and "(Quarto, " in done.stdout, done.stderr
    assert (seen / "arguments").read_text() == "render\n"
    assert (seen / "folder").read_text().strip() == str(built / "_proc")
    assert {p.name for p in (seen / "project").iterdir()} == {"_quarto.yml", "quarto.scss", "references.bib", "index.ipynb", "00_first.ipynb", "02_second.ipynb"}
    assert (seen / "project" / "_quarto.yml").read_text() == (built / "_quarto.yml").read_text()
    assert (built / "_docs" / "index.html").read_text() == "quarto was here\n" and not (built / "_proc" / "_docs").exists()
    assert (built / "README.md").read_text().startswith("<!-- Written by book/build.py")
    shutil.rmtree(seen / "project")
    failed = toybook.build(built, QUARTO_EXIT="3", **env)
    assert failed.returncode == 1 and "quarto render failed (exit status 3)" in failed.stderr
    assert (built / "_docs" / "index.html").read_text() == "quarto was here\n"


@pytest.mark.long
def test_a_site_knows_its_sources(tmp_path):
    "The tests open what `make book` has built only if nothing has changed since."
    root = toybook.write(tmp_path / "toy")
    assert toybook.build(root).returncode == 0
    assert (root / "_docs" / ".sources").read_text() == digest(root)
    with open(root / "nbs" / "references.bib", "a") as file: file.write("\n")
    assert (root / "_docs" / ".sources").read_text() != digest(root)
