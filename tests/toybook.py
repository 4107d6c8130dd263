"A small book of three chapters that uses every feature of the pages, for the tests of book/."
import base64
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from outline import digest

ROOT = Path(__file__).parent.parent
BOOK = ROOT / "book"

SETTINGS = """[DEFAULT]
repo = toybook
lib_name = toybook
version = 0.1.0
min_python = 3.11
license = apache2
author = A. Author
author_email = a@example.org
user = toy
branch = main
description = A toy book.
nbs_path = nbs
lib_path = toybook
doc_path = _docs
doc_host = https://toy.example.org
doc_baseurl = /toybook
git_url = https://github.com/toy/toybook
title = toybook
custom_sidebar = True
update_pyproject = False
recursive = False
tst_flags = notest slow gpu
"""

QUARTO = """project:
  type: book
  output-dir: _docs
book:
  title: toybook
  description: A toy book about two functions.
  site-url: https://toy.example.org/toybook
  repo-url: https://github.com/toy/toybook
  repo-branch: main
  repo-subdir: nbs
  chapters:
    - index.ipynb
    - part: Beginnings
      chapters: [00_first.ipynb]
    - part: Ends
      chapters: [02_second.ipynb]
bibliography: references.bib
lang: en
"""

BIB = """@book{knuth1984,
  author = {Knuth, Donald E.},
  title = {The TeXbook},
  publisher = {Addison-Wesley},
  year = {1984}
}
"""


def png(width=300, height=160, ground=b"\xff\xff\xff"):
    "A picture, white but for `ground`, with a blue diagonal, base64."
    rows = b"".join(b"\0" + b"".join(b"\x00\x72\xb2" if abs(x * height - y * width) < 600 else ground for x in range(width)) for y in range(height))
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")).decode()


FRAME = """<div>
<style scoped>
    .dataframe tbody tr th { vertical-align: top; }
</style>
<table border="1" class="dataframe">
  <thead>
    <tr style="text-align: right;"><th></th>%s</tr>
    <tr><th>model</th>%s</tr>
  </thead>
  <tbody>
    <tr><th>free</th>%s</tr>
    <tr><th>shared</th>%s</tr>
  </tbody>
</table>
</div>"""


def frame(columns=3):
    "The HTML of a DataFrame whose index has a name, and whose last value is missing."
    def cells(tag, values): return "".join(f"<{tag}>{v}</{tag}>" for v in values)
    return FRAME % (cells("th", [f"measure_{i}" for i in range(columns)]), cells("th", [""] * columns),
                    cells("td", [f"{i / 7:.4f}" for i in range(columns)]), cells("td", [*(f"{i / 3:.4f}" for i in range(columns - 1)), "NaN"]))


def md(source): return {"cell_type": "markdown", "metadata": {}, "source": source}


def code(source, *outputs): return {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": list(outputs), "source": source}


def shown(kind, data): return {"output_type": "display_data", "metadata": {}, "data": {kind: data, "text/plain": "…"}}


def result(text): return {"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": {"text/plain": text}}


def stdout(text): return {"output_type": "stream", "name": "stdout", "text": text}


def index():
    return [
        md("# toybook\n\n> A toy book about two functions."),
        md("The proof, in three lines. Start with [the first chapter](00_first.ipynb)."),
        code("from toybook.first import double\ndouble(21)".split("\n")[0]),
        code("double(21)", result("42")),
        md("## The map {#sec-map}\n\n| part | chapter |\n|---|---|\n| Beginnings | [First](00_first.ipynb#sec-first-idea) |"),
        code('#| label: fig-index-line\n#| fig-cap: "A line, on the first page."\n#| echo: false\nline()', shown("image/png", png())),
        code("#| hide\nimport nbdev; nbdev.nbdev_export()"),
    ]


def first():
    return [
        md("# First things {#sec-first}\n\n> Where doubling is explained, with $x^2$ and `code`."),
        code("#| default_exp first"),
        code("#| hide\nfrom nbdev.showdoc import show_doc"),
        code("#| export\nimport math"),
        md("## The idea {#sec-first-idea}\n\nTo double is to add a number to itself [@knuth1984, p. 3]. @knuth1984 says more; see @eq-first-double and @fig-first-line, and @tbl-second-wide in @sec-second."),
        md("$$\nd(x) = x + x\n$$ {#eq-first-double}\n\nHere $x$ is a number. A formula without a number:\n\n$$ \\sum_{i=1}^n i = \\frac{n(n+1)}{2} $$"),
        code('#| export\nCONSTANT = 2'),
        code('#| export\ndef double(\n    x: float,  # the number, in any unit\n    *,\n    times: int | None = 1,  # how often, from 1 to 10\n) -> float:  # x times 2 to the `times`\n'
             '    """Double a number.\n\n    Raises ValueError where `times` is out of range.\n    Source: Knuth (1984), equation 1."""\n    return x * 2**times\n\ndef halve_(\n    x: float,  # the number\n) -> float:  # half of it\n    "Halve a number."\n    return x / 2'),
        code("double(4)", result("8.0")),
        code("#| echo: false\nprint('no code')", stdout("only output\n")),
        code("#| output: false\nprint('no output')", stdout("hidden output\n")),
        code("#| include: false\nprint('neither')", stdout("neither\n")),
        code("for i in range(60): print('a long line of output, ' * 8, i)", stdout("".join("a long line of output, " * 8 + f"{i}\n" for i in range(60)))),
        code("#| code-fold: true\n#| code-summary: Show how\nfolded = 1"),
        code('#| label: fig-first-line\n#| fig-cap: "A line, as of @knuth1984, with $y = x$."\n#| fig-alt: A diagonal line\nline()', shown("image/png", png())),
        code("#| gpu\nimport nowhere"),
        md("::: {.callout-note}\nA note about `double`.\n:::\n\n::: {.callout-tip collapse=\"true\"}\n## Folded advice\nInside the fold.\n:::\n\n::: {.callout-warning title=\"Mind this\"}"),
        code("'in a callout'", result("'in a callout'")),
        md(":::\n\n::: {.callout-important collapse=\"false\"}\nOpen.\n:::\n\n::: {.callout-caution}\nCareful.\n:::"),
        md("### `double` and `halve_` together\n\nA footnote.[^1]\n\n[^1]: At the foot of the page.\n\n- one\n- two\n\n1. `first`\n2. second\n\n> A quotation."),
        md("## Unnumbered {.unnumbered}\n\nSee [-@fig-first-line], [Fig. @fig-first-line] and [@fig-first-line; @tbl-second-wide]."),
        md("## References"),
        code("#| hide\nimport nbdev; nbdev.nbdev_export()"),
    ]


def second():
    return [
        md("# Second things {#sec-second}\n\n> Where tables are wide."),
        code("#| default_exp second"),
        code("#| export\nfrom toybook.first import double"),
        md("## Wide tables\n\nBack to @fig-first-line, @eq-first-double and @sec-first-idea; `double` is explained there, `Box` here."),
        code('#| label: tbl-second-wide\n#| tbl-cap: "Many columns."\n1', shown("text/html", frame(14))),
        code("2", shown("text/html", frame(2))),
        md("| a | b |\n|---|--:|\n| text | 1 |\n\n: A table of Markdown {#tbl-second-md}\n\nIt is @tbl-second-md."),
        code('#| export\nfrom dataclasses import dataclass'),
        code('#| export\n@dataclass(frozen=True)\nclass Box:\n    "A box that holds a number."\n    number: float  # what it holds\n    name: str = "box"  # how it is called\n\n    def open(self):\n        "Give what it holds."\n        return double(self.number)'),
        md("Opening:"),
        code("show_doc(Box.open)"),
        code("#| export\nLIMITS = {f'the limit of measure number {i}': (0, i) for i in range(60)}"),
        code("#| export\ndef look(\n    where: str,  # a path such as <folder>/name\n    limits: dict = LIMITS,  # what is allowed\n    steps: tuple = tuple(range(100)),  # one by one\n) -> bool:  # was it there?\n"
             '    "Look in $HOME/<folder>/ for what keeps to all limits."\n    return bool(where and limits and steps)'),
        md("A formula that is wide:\n\n$$ y = " + " + ".join(f"a_{{{i}}} x^{{{i}}}" for i in range(24)) + " $$ {#eq-second-wide}"),
        code('#| label: fig-second-map\n#| fig-cap: "A map in colors."\nmap()', shown("image/png", png(ground=b"\xe6\x9f\x00"))),
        md("### The same line\n\nTo the [index](index.ipynb) and the [entry](00_first.ipynb#double)."),
        code("#| hide\nimport nbdev; nbdev.nbdev_export()"),
    ]


CHAPTERS = {"index": index, "00_first": first, "02_second": second}


def write_notebook(path, cells):
    cells = [c | {"id": f"cell{i:04d}"} for i, c in enumerate(cells)]
    meta = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    path.write_text(json.dumps({"cells": cells, "metadata": meta, "nbformat": 4, "nbformat_minor": 5}, indent=1), encoding="utf-8")


def write(root):
    "Write the toy project, its module exported, into the folder `root`."
    (root / "nbs").mkdir(parents=True)
    (root / "settings.ini").write_text(SETTINGS)
    (root / "_quarto.yml").write_text(QUARTO)
    (root / "nbs" / "references.bib").write_text(BIB)
    for name, cells in CHAPTERS.items(): write_notebook(root / "nbs" / f"{name}.ipynb", cells())
    info = root / "toybook-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toybook\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[nbdev]\ntoybook = toybook._modidx:d\n")
    run(root, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()")
    return root


def run(root, *args, **env):
    "Run Python in the project at `root`; return the finished process."
    env = os.environ | {"PYTHONPATH": str(root)} | env
    env.pop("IN_TEST", None)
    return subprocess.run([sys.executable, *args], cwd=root, env=env, capture_output=True, text=True)


def build(root, **env):
    "Build the site of the project at `root`."
    return run(root, str(BOOK / "build.py"), **env)


def once(factory, name, make):
    "What `make(folder)` makes, made once for all workers of a test run; returns the site in it."
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ: base = base.parent
    root, done = base / name, base / f"{name}.done"
    try: (base / f"{name}.lock").mkdir()
    except FileExistsError:
        for _ in range(6000):
            if done.exists(): break
            time.sleep(.1)
    else:
        try: made = build(make(root))
        except Exception as error: done.write_text(repr(error)); raise
        done.write_text("" if made.returncode == 0 else made.stderr)
    assert done.exists() and not done.read_text(), done.read_text()
    return root / "_docs"


@pytest.fixture(scope="session")
def toy_site(tmp_path_factory):
    "The site of the toy book."
    return once(tmp_path_factory, "toy", write)


def copy_book(root):
    "A copy of the real book, so that a test never touches its site."
    root.mkdir()
    for name in ("settings.ini", "_quarto.yml", "README.md"): shutil.copy(ROOT / name, root)
    for name in ("nbs", "sharetie"): shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    return root


@pytest.fixture(scope="session")
def real_site(tmp_path_factory):
    "The site of the real book: what `make book` has built, if it is of these sources."
    made = ROOT / "_docs" / ".sources"
    if made.exists() and made.read_text() == digest(ROOT): return made.parent
    return once(tmp_path_factory, "real", copy_book)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if not target.exists(): write(target)
    done = build(target)
    print(done.stdout, done.stderr)
