"""Checks of the chapters: the Markdown subset that Quarto and pandoc read alike, and all references.

`lint_cells` reads a notebook's cells as they are, `lint_tree` reads pandoc's tree of its text. Both return
problems, one line each, with the notebook and the cell.
"""
import ast
import re
from concurrent.futures import ThreadPoolExecutor

from nbdev.config import get_config

from blocks import directives, options, parse
from outline import BookError
from refs import NAMES, OTHER_KINDS, Page, callout_titles, check, equations, gather, located, number

CALLOUTS = ["note", "tip", "warning", "important", "caution"]
KNOWN = {"default_exp", "export", "exporti", "hide", "eval", "echo", "output", "include",
         "label", "classes", "fig-cap", "fig-alt", "tbl-cap", "code-fold", "code-summary"}
FENCE = re.compile(r"^(`{3,}|~{3,}).*?^\1\s*$", re.M | re.S)
CAPTIONS = {"fig": "fig-cap", "tbl": "tbl-cap"}


def lint_cells(chapter):
    "What is wrong in the cells of a notebook, before anything parses its text."
    found, depth = [], []
    for i, cell in enumerate(chapter.nb.cells):
        if cell.cell_type == "markdown": wrong = [*markdown_problems(cell.source), *fences(cell.source, i, depth)]
        elif cell.cell_type == "code": wrong = [*code_problems(cell), *output_problems(cell)]
        else: wrong = ["a raw cell; write Markdown"]
        if "{{<" in cell.source: wrong.append("a shortcode {{< … >}}, which only Quarto reads")
        found += [f"{chapter.where(i, cell.source)}: {w}" for w in wrong]
    found += [f"{chapter.where(i, chapter.nb.cells[i].source)}: ':::' opens a block that nothing closes" for i in depth]
    if not chapter.head.startswith("# "): found.append(f"{chapter.path.name}: the first cell must be '# Title' and '> promise'")
    if not chapter.description: found.append(f"{chapter.path.name}: the title needs a line '> promise' under it")
    return found


def prose(source):
    "Markdown without its code and formulas."
    source = FENCE.sub("", source)
    return re.sub(r"\$\$.*?\$\$|(`+).*?\1|\$[^$\n]+\$", "", source, flags=re.S)


def markdown_problems(source):
    "What is wrong in the text of a Markdown cell."
    plain = prose(source)
    if re.search(r"panel-tabset", plain): yield "a tabset, which only Quarto shows"
    if m := re.search(r"\\(?:eq)?ref\{.*?\}|\\label\{.*?\}|\\tag\{.*?\}|\\begin\{(?:equation|align)\*?\}", source):
        yield f"{m[0]}: label a formula with {{#eq-name}} after its $$, refer to it with @eq-name"
    if m := re.search(r"(?<![\w@])@(?:fig|tbl|eq|sec)[:_]\S+|\\@\w+", plain): yield f"{m[0]} is no reference; write @fig-name, @tbl-name, @eq-name or @sec-name"
    if m := re.search(r"\b(?:Figure|Table|Equation|Section|Chapter)\s+\?+", plain): yield f"{m[0]!r} is a reference to nothing"
    for label in re.findall(r"\{[^}]*#([\w:-]+)[^}]*\}", plain):
        kind = label.partition("-")[0]
        if label == "refs": yield "{#refs} would gather the references of the whole book; end the chapter with '## References'"
        elif kind in NAMES and not re.fullmatch(r"[a-z]+-[a-z0-9-]+", label): yield f"the label {label} must be of lower-case letters, digits and hyphens"
        elif kind in OTHER_KINDS: yield f"the label {label} is of a kind that the book does not use; it has {', '.join(NAMES)}"


def fences(source, i, depth):
    "Keep count of ':::' blocks, which may span cells, in `depth`; a close without an open is wrong."
    for line in FENCE.sub("", source).splitlines():
        if re.match(r":{3,}\s*[^\s:]", line): depth.append(i)
        elif re.match(r":{3,}\s*$", line):
            if depth: depth.pop()
            else: yield "':::' closes a block that nothing opened"


def code_problems(cell):
    "What is wrong in a code cell: directives, captions, imports."
    source, given = cell.source, directives(cell.source)
    known = KNOWN | set(get_config().tst_flags.split())
    for d in given:
        if d not in known: yield f"the directive {d!r} is not one of {', '.join(sorted(known))}"
    opts = options(source)
    label = str(opts.get("label", ""))
    kind = label.partition("-")[0]
    if label and (kind not in CAPTIONS or not re.fullmatch(r"[a-z]+-[a-z0-9-]+", label)):
        yield f"the label {label!r} must be fig-name or tbl-name, of lower-case letters, digits and hyphens"
    elif label and CAPTIONS[kind] not in opts: yield f"{label} has no {CAPTIONS[kind]}"
    if opts.get("classes", "true-colors") != "true-colors": yield f"the class {opts['classes']!r}; there is only true-colors, for images that stay as they are in the dark"
    for cap in CAPTIONS.values():
        if cap in opts and CAPTIONS.get(kind) != cap: yield f"{cap} without a label {cap[:3]}-name"
    if label and not cell.outputs and not {"hide"} & set(given): yield f"{label} has no saved output; run make chapters"
    yield from import_problems(source)


def import_problems(source):
    "Imports stand in cells of their own, for nbdev runs such cells when it makes pages."
    try: tree = ast.parse(source).body
    except SyntaxError:
        yield "it is not plain Python (a magic?)"
        return
    imports = [n for n in tree if isinstance(n, (ast.Import, ast.ImportFrom))]
    if imports and len(imports) < len(tree) and "nbdev_export()" not in source:
        yield "imports stand in a cell with other code; give them their own"


def output_problems(cell):
    "What is wrong in the saved outputs of a code cell."
    for out in cell.outputs:
        data = out.get("data", {})
        page = "".join(data.get("text/html", ""))
        if out.output_type == "error": yield f"it saved an error: {out.get('ename')}"
        if out.get("name") == "stderr": yield "it saved output of stderr"
        if any(k.startswith("application/") for k in data): yield f"an output of kind {', '.join(data)} needs a live page"
        if page and "<table" not in page: yield "an HTML output that is not a table"
        if re.search(r"<script|<iframe|<link|\b(?:src|href)=", page): yield "an HTML output that loads something"


def lint_tree(page):
    "What is wrong in the parsed text of a chapter."
    titles, skip, labelled = 0, callout_titles(page.blocks), set()
    for cell, e in located(page.blocks):
        t, c, here = e["t"], e.get("c"), page.where(cell)
        if t in ("RawInline", "RawBlock"): yield f"{here}: raw {c[0]} {c[1].strip()[:30]!r}; write Markdown"
        elif t == "Header" and id(e) not in skip:
            titles += c[0] == 1
            if c[0] == 1 and titles > 1: yield f"{here}: a second title; sections start with '## '"
            if c[1][0].startswith("sec-") and c[0] > 2: yield f"{here}: {c[1][0]} labels a heading without a number; only '## ' has one"
        elif t == "Div": yield from (f"{here}: {w}" for w in div_problems(*c[0]))
        elif t == "Span": yield f"{here}: a span with attributes, which the pages have no look for"
        elif t == "Image": yield from (f"{here}: {w}" for w in image_problems(page, c))
        elif t in ("Para", "Plain"): labelled |= {id(c[j]) for _, j, _ in equations(c)}
        elif t == "Str" and c.startswith(("{#", "{.")) and id(e) not in labelled: yield f"{here}: the attributes {c} belong to nothing"


def div_problems(id, classes, attributes):
    "What is wrong in the attributes of a block."
    if {"nb-cell", "nb-caption", "nb-output", "api"} & set(classes): return
    kinds = [c.removeprefix("callout-") for c in classes if c.startswith("callout-")]
    if id or len(classes) != 1 or not kinds: yield f"a block ':::' that is no callout ({' '.join(classes) or id})"
    elif kinds[0] not in CALLOUTS: yield f"no callout {kinds[0]!r}; there are {', '.join(CALLOUTS)}"
    for key, value in attributes:
        if key not in ("title", "collapse"): yield f"callouts take title and collapse, not {key!r}"
        elif key == "collapse" and value not in ("true", "false"): yield f"collapse is true or false, not {value!r}"


def image_problems(page, content):
    "What is wrong with an image in Markdown."
    target = content[2][0]
    if re.match(r"[a-z]+:|//", target): yield f"the image {target} is on another host"
    elif not (page.chapter.path.parent / target).is_file(): yield f"there is no image {target}"
    if not content[1]: yield f"the image {target} has no caption"


# The whole book

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
    "Check the chapters as they are written; raise BookError with all that is wrong, return their pages."
    problems = [p for c in book.chapters for p in lint_cells(c)]
    try:
        pages = read(book.chapters, [c.nb for c in book.chapters])
        for page in pages: page.problems += lint_tree(page)
        raise_problems(pages, keys(book.bibliography))
    except BookError as error: raise BookError(problems + error.problems) from None
    if problems: raise BookError(problems)
    return pages


def raise_problems(pages, keys):
    "Raise BookError with what is wrong in the pages; return their labels."
    labels = gather(pages)
    check(pages, keys, labels)
    problems = [p for page in pages for p in page.problems]
    if problems: raise BookError(problems)
    return labels
