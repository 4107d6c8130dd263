"The outline of the book: its chapters in reading order, as `_quarto.yml` lists them."
import hashlib
import re
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml
from execnb.nbio import read_nb

TITLE = re.compile(r"^#\s+(?P<text>.*?)\s*(?:\{(?P<attr>[^}]*)\})?\s*$", re.M)


class BookError(Exception):
    "What is wrong with the book: one line each."

    def __init__(self, problems):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


@dataclass
class Chapter:
    "One notebook of the book."
    path: Path  # The notebook
    part: str | None = None  # The part that it belongs to
    number: int | None = None  # Its number; None when unnumbered

    @property
    def name(self): return self.path.stem

    @property
    def page(self):
        "The page's file name, which nbdev derives from the notebook's."
        return re.sub(r"^\d+[a-z0-9]*_", "", self.name.lower()) + ".html"

    @cached_property
    def nb(self): return read_nb(self.path)

    @cached_property
    def head(self):
        "The first Markdown cell that has a title, or an empty string."
        cells = (c.source for c in self.nb.cells if c.cell_type == "markdown")
        return next((s for s in cells if TITLE.search(s)), "")

    @cached_property
    def title(self):
        found = TITLE.search(self.head)
        return found["text"] if found else self.name

    @cached_property
    def attr(self):
        found = TITLE.search(self.head)
        return (found["attr"] or "").split() if found else []

    @property
    def label(self):
        "The label that the title carries, such as `sec-tying`."
        return next((a[1:] for a in self.attr if a.startswith("#")), None)

    @property
    def numbered(self): return self.name != "index" and ".unnumbered" not in self.attr

    def where(self, i, source):
        "The place of cell `i` with its `source`, as an author finds it."
        words = " ".join(source.split())[:40]
        return f"{self.path.parent.name}/{self.path.name}, cell {i + 1} ({words!r})"

    @cached_property
    def description(self):
        found = re.search(r"^>\s+(.*?)\s*$", self.head, re.M)
        return found[1] if found else ""


@dataclass
class Book:
    "The book as a whole."
    root: Path  # The folder of settings.ini and _quarto.yml
    config: dict  # The contents of _quarto.yml
    chapters: list  # Chapters in reading order

    def __getitem__(self, key): return self.config["book"].get(key, "")

    @property
    def sources(self): return self.root / "nbs"

    @property
    def bibliography(self): return self.sources / self.config.get("bibliography", "references.bib")


def entries(items, part=None):
    "The (notebook, part) pairs of a list of chapters."
    for item in items:
        if isinstance(item, str): yield item, part
        elif "part" in item: yield from entries(item.get("chapters", []), item["part"])
        else: raise BookError(f"_quarto.yml: a chapter is a file name or a part with chapters, not {item!r}")


def outline(root):
    "Read `_quarto.yml` in the folder `root`, and see that it lists every notebook once and nothing else."
    root = Path(root)
    config = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))
    book = Book(root, config, [])
    listed = list(entries(config["book"]["chapters"]))
    problems = misfits(book.sources, [name for name, _ in listed])
    if problems: raise BookError(problems)
    number = 0
    for name, part in listed:
        chapter = Chapter(book.sources / name, part)
        if chapter.numbered: chapter.number = number = number + 1
        book.chapters.append(chapter)
    return book


def misfits(sources, names):
    "How the chapters' `names` and the notebooks in the folder `sources` disagree."
    there = {p.name for p in sources.glob("*.ipynb") if p.name[0] not in "._"}
    problems = [f"_quarto.yml: chapter {n} is not in {sources.name}/" for n in names if n not in there]
    problems += [f"_quarto.yml: {sources.name}/{n} is in no part of the book" for n in sorted(there - set(names))]
    problems += [f"_quarto.yml: chapter {n} is listed twice" for n in sorted({n for n in names if names.count(n) > 1})]
    if not names or names[0] != "index.ipynb": problems.append("_quarto.yml: the first chapter must be index.ipynb")
    pages = {}
    for n in names:
        page = Chapter(sources / n).page
        if pages.setdefault(page, n) != n: problems.append(f"_quarto.yml: {pages[page]} and {n} both become {page}")
    return problems


def digest(root):
    "A number of all that a site is made from."
    made = hashlib.sha256(str(shutil.which("quarto")).encode())
    files = [root / "_quarto.yml", root / "settings.ini", *(root / "sharetie").glob("*.py")]
    files += [f for folder in (root / "nbs", Path(__file__).parent) for f in folder.rglob("*") if f.is_file() and f.suffix != ".pyc"]
    for file in sorted(files): made.update(f"{file.name}\n".encode() + file.read_bytes())
    return made.hexdigest()
