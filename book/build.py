"""Build the site into _docs/, and README.md from the index.

    python book/build.py

Checks the chapters, processes them into _proc/, and renders with Quarto where it is on the PATH, else with pandoc.
Nothing is executed and nothing is asked of the network. A failed build leaves the old site as it was.
"""
import shutil
import subprocess
import sys
import time
from pathlib import Path

from nbdev.config import get_config

import readme
from lint import checked, keys, raise_problems, read
from outline import BookError, digest, outline
from pages import write_site
from process import entries, process
from refs import resolve

HERE = Path(__file__).parent


def processed(book):
    "Write the processed notebooks and what Quarto needs beside them into a new _proc/; return the notebooks."
    folder = fresh(book.root / "_proc.new")
    known = entries(book.chapters)
    nbs = [process(c, folder, known, [c.page for c in book.chapters]) for c in book.chapters]
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
    "Render with Quarto into `folder`, which does not exist yet."
    shutil.rmtree(folder, ignore_errors=True)
    done = subprocess.run([quarto, "render"], cwd=proc)
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
    made, quarto = book.root / "_docs.new", shutil.which("quarto")
    try:
        nbs = processed(book)
        if quarto: render_quarto(quarto, book.root / "_proc", made)
        else: render(book, nbs, fresh(made))
        (made / ".sources").write_text(digest(book.root))
        replace(get_config().doc_path, made)
    finally:
        for left in (made, book.root / "_proc.new"): shutil.rmtree(left, ignore_errors=True)
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
