"README.md, written from the chapter `index`."
import json
import re

from nbdev.config import get_config

from blocks import attr, pandoc, parse, walk
from pages import VERSION
from refs import Page, number, resolve

FIGURES = "book/figures"  # Where the README's pictures lie, seen from the root


def compose(book):
    "The text of README.md and its image files, as {name: bytes}."
    chapter = book.chapters[0]
    page = number(Page(chapter, chapter.nb, parse(chapter.nb)))
    site = f"{get_config().doc_host.rstrip('/')}/{get_config().doc_baseurl.strip('/')}"
    pages = {c.path.name: f"{site}/{c.page}" for c in book.chapters}
    resolve(page, page.labels, pages)
    page.blocks = walk(page.blocks, lambda e: simple(e, site))
    tree = json.dumps(VERSION | {"meta": {}, "blocks": page.blocks})
    body = pandoc(tree, "-f", "json", "-t", "gfm", "--wrap=none", "--citeproc", f"--bibliography={book.bibliography}")
    body = re.sub(r"^(#+ .*)\n(?=\S)", r"\1\n\n", body, flags=re.M)
    note = f"<!-- Written by book/build.py from nbs/{chapter.path.name}. -->\n\n"
    return note + body.strip() + "\n", {n.replace("figures/", f"{FIGURES}/"): c for n, c in page.files.items()}


def simple(e, site):
    "An element of a page in what a README can show: no anchors, no boxes, plain output as code."
    t, c = e["t"], e.get("c")
    if t == "Link" and "anchor" in c[0][1]: return []
    if t == "Link" and {"caption-number", "xref", "equation-number"} & set(c[0][1]): return c[1]
    if t == "Link": c[0] = attr()
    if t == "Image": c[0], c[2][0] = attr(), c[2][0].replace("figures/", f"{FIGURES}/")
    if t == "CodeBlock": c[0] = attr("", [k for k in c[0][1] if k in ("python", "sh", "bash", "text")])
    if t == "Header": c[1] = attr()
    if t == "Span": return c[1]
    if t == "Div": return c[1]
    if t == "RawBlock": return table(c[1]) if c[1].startswith("<table") else []


def table(source):
    "The Markdown table for one in HTML."
    return json.loads(pandoc(source, "-f", "html", "-t", "json"))["blocks"]


def update(book):
    "Write README.md and its pictures where they differ from what is there; return whether they did."
    content, files = compose(book)
    wanted = {"README.md": content.encode(), **files}
    changed = {n: c for n, c in wanted.items() if not (f := book.root / n).exists() or f.read_bytes() != c}
    for name, data in changed.items():
        (book.root / name).parent.mkdir(parents=True, exist_ok=True)
        (book.root / name).write_bytes(data)
    for old in (book.root / FIGURES).glob("*"):
        if f"{FIGURES}/{old.name}" not in wanted: old.unlink()
    return bool(changed)
