"""Process the chapters with nbdev's pieces, into notebooks that Quarto and our own renderer read.

Exported cells give way to the API entries of what they define, hidden cells go, names in backticks become links.
No cell runs: entries come from the exported modules, other outputs are those saved in the notebooks.
"""
import ast
import base64
import io
import re
from functools import partial
from importlib import import_module
from pathlib import Path

from PIL import Image
from execnb.nbio import read_nb, write_nb
from fastcore.xtras import dict2obj
from nbdev.config import get_config
from nbdev.process import Processor
from nbdev.processors import FilterDefaults, add_fold, exec_show_docs, insert_warning, mv_exports
from nbdev.showdoc import show_doc

import quarto
from apidoc import Entry
from blocks import definitions, directives, entry_id
from outline import BookError
from tables import mended

EXPORT = re.compile(r"^#\|\s*export\s*$", re.M)
CHART = .5  # The share of white from which an image counts as a chart
SHORT = 20  # Lines of source that are shown unfolded where no API entry stands for them


def prepare(nb):
    "Let nbdev show the source of exported definitions, by its directive `exports`."
    for cell in nb.cells:
        if cell.cell_type == "code" and EXPORT.search(cell.source) and definitions(cell.source):
            cell.set_source(EXPORT.sub("#| exports", cell.source, count=1))


class show_docs(Processor):
    "Fill the cells `show_doc(name)` from the exported module, in place of running the notebook."

    def begin(self):
        named = [c.directives_["default_exp"] for c in self.nb.cells if "default_exp" in (c.directives_ or {})]
        self.names = {}
        if named: self.names |= vars(import_module(f"{get_config().lib_path.name}.{named[0][0]}"))
        self.names["show_doc"] = partial(show_doc, renderer=Entry)

    def cell(self, cell):
        if cell.cell_type != "code" or not re.search(r"^show_doc\(", cell.source, re.M): return
        try: entry = eval(cell.source, self.names)._repr_markdown_()
        except Exception as error:
            place = f"{Path(self.nb.path_).name}, {cell.source.splitlines()[-1]}"
            raise BookError(f"{place}: {type(error).__name__}: {error} (does the module hold it? run nbdev_export)") from error
        output = {"output_type": "display_data", "metadata": {}, "data": {"text/markdown": entry}}
        cell["outputs"] = [dict2obj(output)]


class order_docs(Processor):
    "Put the API entries of a cell in the order of its definitions, and its source after them: folded unless it is short and without entry."

    def begin(self):
        cells, out = list(self.nb.cells), []
        while cells:
            cell, docs = cells.pop(0), []
            if cell.cell_type == "code" and "exports" in cell.directives_:
                while cells and getattr(cells[0], "has_sd", False): docs.insert(0, cells.pop(0))
                if (names := defined(cell)) and (docs or cell.source.count("\n") >= SHORT):
                    cell.source = f'#| code-fold: true\n#| code-summary: "Source of {names}"\n{cell.source}'
            out += [*docs, cell]
        self.nb.cells[:] = out


def defined(cell):
    "The functions and classes that `cell` defines, as text, but for `_`; empty for constants, which are shown unfolded."
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return ", ".join(n.name for n in ast.parse(cell.source).body if isinstance(n, kinds) and n.name != "_")


class Filter(FilterDefaults):
    "nbdev's processors, with our order of API entries."

    def base_procs(self):
        ours = {add_fold: None, insert_warning: None, exec_show_docs: show_docs, mv_exports: order_docs}
        return [p for p in (ours.get(p, p) for p in super().base_procs()) if p]


def entries(chapters):
    "Where the API entries of all chapters will be: `page#anchor`, in the order of reading."
    found = []
    for c in chapters:
        code = [x.source for x in c.nb.cells if x.cell_type == "code"]
        names = [n for s in code if EXPORT.search(s) for n in definitions(s) if n[0] != "_"]
        names += [n for s in code for n in re.findall(r"^show_doc\(([\w.]+)", s, re.M)]
        found += [f"{c.page}#{entry_id(n, names)}" for n in names]
    return found


def meant(known, pages, here):
    "The entry that a chapter means by each anchor: its own, else the last one before it, else the first after it."
    read, found = pages[:pages.index(here) + 1], {}
    for target in known:
        page, _, anchor = target.partition("#")
        if page in read or anchor not in found: found[anchor] = target
    return found


def repair(nb, home, known):
    "Mend what nbdev and pandas leave: odd keys, links that are absolute, in headings or to no entry, tables; `home` is the site's address."
    for cell in nb.cells:
        cell.pop("has_sd", None)
        if cell.cell_type == "markdown": cell.source = local(cell.source, home, known)
        for out in cell.get("outputs", []) if cell.cell_type == "code" else []:
            if out.output_type == "execute_result": out["execution_count"] = 0
            data = out.get("data", {})
            if "text/markdown" in data: data["text/markdown"] = local("".join(data["text/markdown"]), home, known)
            if "text/html" in data: data["text/html"] = mended("".join(data["text/html"]))
        if cell.cell_type == "code": cell["execution_count"] = cell.get("execution_count") or 0


def local(text, home, known):
    "The links that nbdev made from backticks, relative; a method without an entry goes to its class, other names lose theirs."
    def mend(m):
        anchor = m[2].partition("#")[2]
        owner = anchor.rpartition(".")[0]
        wanted = [f"{owner}-class", owner] if owner and anchor not in known else [anchor]
        if re.search(r"\b[A-Z]", m[1]): wanted.insert(0, f"{anchor}-class")
        target = next((known[w] for w in wanted if w in known), None)
        return f"[{m[1]}]({target})" if target else m[1]
    made = r"\[(`[^`]*`)\]\(" + re.escape(home) + r"([^)\s]*)\)"
    given = r"\[(?:[^][]|" + made + r")*\](?=\()"  # What an author has linked holds no link of ours
    text = re.sub(given, lambda m: re.sub(made, r"\1", m[0]), text)
    text = re.sub(made, mend, text)
    return re.sub(r"^(#+ .*)$", lambda m: re.sub(r"\[(`[^`]*`)\]\([^)]*\)", r"\1", m[1]), text, flags=re.M)


def mark_pictures(nb):
    "Give the cells whose image is no chart on white the class `true-colors`: dark pages turn the colors of charts only."
    for cell in nb.cells:
        if cell.cell_type != "code" or "classes" in directives(cell.source): continue
        images = ["".join(o.data["image/png"]) for o in cell.outputs if "image/png" in o.get("data", {})]
        if any(white(base64.b64decode(i)) < CHART for i in images): cell.source = f"#| classes: true-colors\n{cell.source}"


def white(content):
    "The share of white in an image."
    pixels = Image.open(io.BytesIO(content)).convert("L").histogram()
    return sum(pixels[250:]) / sum(pixels)


def process(chapter, folder, known, pages):
    "Write the notebook of `chapter` for Quarto into `folder`, and return it for our pages; `known` are the API entries of the book's `pages`."
    config = get_config()
    nb = read_nb(chapter.path)
    prepare(nb)
    Filter()(nb)
    repair(nb, f"{config.doc_host.rstrip('/')}/{config.doc_baseurl.strip('/')}/", meant(known, pages, chapter.page))
    mark_pictures(nb)
    path = folder / chapter.path.name
    write_nb(nb, path)
    ours = read_nb(path)
    quarto.adapt(nb, chapter)
    write_nb(nb, path)
    return ours
