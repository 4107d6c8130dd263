"""Build the site into _docs/, and README.md from the index.

    python book/build.py

Checks the chapters, processes them into _proc/, and renders with Quarto where it is on the PATH, else with pandoc.
Nothing is executed and nothing is asked of the network. A failed build leaves the old site as it was.
"""
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nbdev.config import get_config

import readme
from blocks import parse
from lint import lint_cells, lint_tree
from outline import BookError, outline
from pages import write_site
from process import entries, process
from refs import Page, check, gather, number, resolve

HERE = Path(__file__).parent


def keys(bibliography):
    "The keys of the bibliography; one that is there twice is an error."
    found = re.findall(r"^@\w+\{\s*([^,\s]+)", bibliography.read_text(encoding="utf-8"), re.M)
    twice = sorted({k for k in found if found.count(k) > 1})
    if twice: raise BookError(f"{bibliography.name}: {', '.join(twice)} is there twice")
    return set(found)


def read(chapters, nbs):
    "The chapters as numbered pages."
    with ThreadPoolExecutor() as pool: trees = list(pool.map(parse, nbs))
    return [number(Page(c, nb, blocks)) for c, nb, blocks in zip(chapters, nbs, trees)]


def checked(book):
    "Check the chapters as they are written; raise BookError with all that is wrong."
    problems = [p for c in book.chapters for p in lint_cells(c)]
    if problems: raise BookError(problems)
    pages = read(book.chapters, [c.nb for c in book.chapters])
    for page in pages: page.problems += lint_tree(page)
    raise_problems(pages, keys(book.bibliography))


def raise_problems(pages, keys):
    "Raise BookError with what is wrong in the pages; return their labels."
    labels = gather(pages)
    check(pages, keys, labels)
    problems = [p for page in pages for p in page.problems]
    if problems: raise BookError(problems)
    return labels


def processed(book):
    "Write the processed notebooks and what Quarto needs beside them into a new _proc/; return the notebooks."
    folder = fresh(book.root / "_proc.new")
    known = entries(book.chapters)
    nbs = [process(c, folder, known) for c in book.chapters]
    for file in book.sources.iterdir():
        if file.suffix == ".ipynb" or file.name[0] in "._": continue
        if file.is_dir(): shutil.copytree(file, folder / file.name)
        else: shutil.copyfile(file, folder / file.name)
    shutil.copyfile(book.root / "_quarto.yml", folder / "_quarto.yml")
    shutil.copyfile(HERE / "quarto.scss", folder / "quarto.scss")
    replace(book.root / "_proc", folder)
    return nbs


def render(book, nbs, folder):
    "Render with pandoc into `folder`."
    pages = read(book.chapters, nbs)
    labels = raise_problems(pages, keys(book.bibliography))
    for page in pages: resolve(page, labels, {p.chapter.path.name: p.chapter.page for p in pages})
    write_site(book, pages, folder)


def render_quarto(quarto, proc, folder):
    "Render with Quarto into `folder`."
    done = subprocess.run([quarto, "render", "--no-execute"], cwd=proc)
    made = proc / "_docs"
    if done.returncode or not (made / "index.html").exists():
        raise BookError(f"quarto render failed (exit status {done.returncode}); its messages are above")
    shutil.move(made, folder)


def fresh(folder):
    "An empty `folder`."
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def replace(old, new):
    "Put the folder `new` in the place of `old`."
    aside = old.with_name(old.name + ".old")
    shutil.rmtree(aside, ignore_errors=True)
    if old.exists(): old.rename(aside)
    new.rename(old)
    shutil.rmtree(aside, ignore_errors=True)


def build(root):
    "Build the site of the book in the folder `root`; return the folder of the site."
    book = outline(root)
    checked(book)
    nbs = processed(book)
    made, quarto = fresh(book.root / "_docs.new"), shutil.which("quarto")
    try:
        if quarto: made.rmdir(); render_quarto(quarto, book.root / "_proc", made)
        else: render(book, nbs, made)
        replace(get_config().doc_path, made)
    finally: shutil.rmtree(made, ignore_errors=True)
    readme.update(book)
    return get_config().doc_path


def main():
    start = time.time()
    try: site = build(get_config().config_path)
    except BookError as error:
        for problem in error.problems: print(problem, file=sys.stderr)
        sys.exit(f"book: {len(error.problems)} problem{'s' * (len(error.problems) > 1)}; the site is as it was")
    tool = "Quarto" if shutil.which("quarto") else "pandoc"
    print(f"{site / 'index.html'} ({tool}, {time.time() - start:.1f} s)")


if __name__ == "__main__": main()
