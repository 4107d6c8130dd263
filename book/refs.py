"""Numbers and cross references: what Quarto does in a book of HTML pages.

Sections, figures, tables and equations are numbered by chapter; `@fig-x`, `@tbl-x`, `@eq-x` and `@sec-x`
become links with these numbers, from any chapter to any other.
"""
import re
from dataclasses import dataclass, field
from difflib import get_close_matches

from blocks import MARKER, attr, captioned, cell_blocks, definitions, directives, elements, entry_id, node, options, raw, strip_markers, text, walk

NAMES = {"fig": "Figure", "tbl": "Table", "eq": "Equation", "sec": "Section"}
# Quarto's other kinds of cross references, which the book does not use.
OTHER_KINDS = "lst tip nte wrn imp cau thm lem cor prp cnj def exm exr sol rem alg".split()
EQUATION_LABEL = re.compile(r"^\{#(eq-[\w-]+)\}$")
SHORT_CODE = 24  # Characters up to which code in a line is not broken
LONG_TYPE = 26  # Characters from which a type in an API entry may wrap
LONG_FORMULA = 40  # Characters of TeX from which a formula in a line may need to scroll on a narrow screen
NBSP = "\N{NO-BREAK SPACE}"


@dataclass
class Label:
    "Something with a number that can be referred to."
    id: str
    number: str  # Such as 3.2; empty in a chapter without number
    page: str  # File name of its page; with the chapter's own label, the whole page
    cell: int  # Index of its cell
    whole: bool = False  # Is it a chapter's title?

    @property
    def kind(self): return self.id.partition("-")[0]

    @property
    def name(self): return "Chapter" if self.whole else NAMES[self.kind]

    @property
    def href(self): return self.page if self.whole else f"{self.page}#{self.id}"


@dataclass
class Page:
    "A chapter on its way to a page."
    chapter: object
    nb: object
    blocks: list
    labels: dict = field(default_factory=dict)  # id: Label, in the order of the text
    sections: dict = field(default_factory=dict)  # heading's id: number
    anchors: dict = field(default_factory=dict)  # any id: index of its cell
    problems: list = field(default_factory=list)
    files: dict = field(default_factory=dict)  # name: content of each image

    def where(self, cell):
        "The place of a problem, as an author finds it."
        return self.chapter.where(cell, self.nb.cells[cell].source)


def located(blocks):
    "Every element with the index of its cell."
    cell = 0
    for e in elements(blocks):
        if e["t"] == "RawBlock" and (m := MARKER.match(e["c"][1])): cell = int(m[1])
        else: yield cell, e


def callout_titles(blocks):
    "Headings that are the titles of callouts, and so no headings of the page (as ids of objects)."
    divs = (e["c"] for e in elements(blocks) if e["t"] == "Div" and any(c.startswith("callout-") for c in e["c"][0][1]))
    return {id(content[0]) for _, content in divs if content and content[0]["t"] == "Header"}


def equations(inlines):
    "The (position of the formula, position of the label, label) of each labelled equation in a paragraph."
    for i, x in enumerate(inlines):
        if x["t"] != "Math" or x["c"][0]["t"] != "DisplayMath": continue
        j = i + 2 if i + 1 < len(inlines) and inlines[i + 1]["t"] in ("Space", "SoftBreak") else i + 1
        if j < len(inlines) and inlines[j]["t"] == "Str" and (m := EQUATION_LABEL.match(inlines[j]["c"])): yield i, j, m[1]


def number(page):
    "Find the page's labels and anchors, and number them in the order of the text."
    counts = dict.fromkeys(NAMES, 0)
    prefix = f"{page.chapter.number}." if page.chapter.number else ""
    skip = callout_titles(page.blocks)

    def label(id, cell):
        kind = id.partition("-")[0]
        if kind not in ("fig", "tbl", "eq"): return
        counts[kind] += 1
        if id in page.labels: page.problems.append(f"{page.where(cell)}: the label {id} is there twice")
        page.labels[id] = Label(id, f"{prefix}{counts[kind]}", page.chapter.page, cell)

    if page.chapter.label:
        page.labels[page.chapter.label] = Label(page.chapter.label, str(page.chapter.number or ""), page.chapter.page, 0, whole=True)
    for cell, e in located(page.blocks):
        t, c = e["t"], e["c"] if "c" in e else None
        if t == "Header" and id(e) not in skip: heading(page, cell, c, counts, prefix)
        elif t == "Div" and "nb-cell" in c[0][1]:
            given = options(page.nb.cells[cell].source).get("label")
            if given: anchor(page, str(given), cell); label(str(given), cell)
        elif t in ("Figure", "Table", "Div", "Span", "CodeBlock", "Image") and c[0][0]:
            anchor(page, c[0][0], cell)
            if t in ("Figure", "Table"): label(c[0][0], cell)
        elif t in ("Para", "Plain"):
            for _, _, found in equations(c): anchor(page, found, cell); label(found, cell)
    entries(page)
    return page


def entries(page):
    "Add the anchors that the API entries of an unprocessed notebook will have."
    found = [(i, n) for i, c in enumerate(page.nb.cells) if c.cell_type == "code" and "export" in directives(c.source) for n in definitions(c.source)]
    names = [n for _, n in found]
    for i, name in found: page.anchors.setdefault(entry_id(name, names), i)


def heading(page, cell, content, counts, prefix):
    "Number a heading of the second level, and keep its label."
    level, (id, classes, _), _ = content
    if level == 1: return
    anchor(page, id, cell)
    if level == 2 and "unnumbered" not in classes:
        counts["sec"] += 1
        if page.chapter.number: page.sections[id] = f"{prefix}{counts['sec']}"
    if id.startswith("sec-"): page.labels[id] = Label(id, page.sections.get(id, ""), page.chapter.page, cell)


def anchor(page, id, cell):
    if id in page.anchors: page.problems.append(f"{page.where(cell)}: the anchor {id} is on this page twice")
    page.anchors[id] = cell


def gather(pages):
    "All labels of the book; a label in two chapters is a problem of the second."
    labels = {}
    for page in pages:
        for id, label in page.labels.items():
            if id in labels: page.problems.append(f"{page.where(label.cell)}: the label {id} is in {labels[id].page} too")
            labels.setdefault(id, label)
    return labels


# Checks

def check(pages, keys, labels):
    "Note as problems the references, citations and links that lead nowhere; `keys` are the bibliography's."
    by_file = {p.chapter.path.name: p for p in pages}
    for page in pages:
        cites = False
        for cell, e in located(page.blocks):
            if e["t"] == "Cite":
                kinds = {check_citation(page, cell, c["citationId"], keys, labels) for c in e["c"][0]}
                cites |= "citation" in kinds
                if len(kinds) > 1: page.problems.append(f"{page.where(cell)}: a reference and a citation in one bracket")
            elif e["t"] == "Link": check_link(page, cell, e["c"][2][0], by_file)
        if cites and last_heading(page) != "References":
            page.problems.append(f"{page.chapter.path.name}: it cites, so its last heading must be '## References', under which the bibliography comes")


def last_heading(page):
    skip = callout_titles(page.blocks)
    return next((text(e["c"][2]).strip() for e in reversed(list(elements(page.blocks))) if e["t"] == "Header" and id(e) not in skip), "")


def check_citation(page, cell, id, keys, labels):
    "Note what is wrong with the reference or citation `id`; return which of both it is."
    kind = id.partition("-")[0].lower()
    if kind in OTHER_KINDS and "-" in id: page.problems.append(f"{page.where(cell)}: @{id} is of a kind that the book does not use")
    elif kind in NAMES and "-" in id:
        target = labels.get(id[0].lower() + id[1:])
        if target is None: page.problems.append(f"{page.where(cell)}: @{id} refers to nothing{suggest(id, labels)}")
        elif not target.number: page.problems.append(f"{page.where(cell)}: @{id} refers to something without a number; write a link")
        return "reference"
    elif id not in keys: page.problems.append(f"{page.where(cell)}: @{id} is not in the bibliography{suggest(id, keys)}")
    return "citation"


def suggest(word, words):
    near = get_close_matches(word, list(words), 1)
    return f"; is it @{near[0]}?" if near else ""


def check_link(page, cell, target, by_file):
    "Note a link to a notebook or an anchor that does not exist."
    if re.match(r"[a-z][a-z0-9+.-]*:", target): return
    file, _, part = target.partition("#")
    file = file.removeprefix("./")
    if file.endswith(".html"):
        found = next((p for p in by_file.values() if p.chapter.page == file), None)
    else: found = by_file.get(file) if file else page
    if found is None: page.problems.append(f"{page.where(cell)}: the link to {target} leads nowhere; link to a notebook of the book")
    elif part and part not in found.anchors and part not in found.labels:
        page.problems.append(f"{page.where(cell)}: the link to {target} leads to no heading or label{suggest(part, found.anchors).replace('@', '#')}")


# Putting numbers and links into the tree

def resolve(page, labels, pages_by_file):
    "Replace references, links, captions, headings and callouts in the page's tree by what the page shows."
    skip = callout_titles(page.blocks)
    for e in elements(page.blocks):
        if e["t"] == "Header" and id(e) not in skip and e["c"][1][0] in page.sections:
            span = node("Span", attr("", ["number"]), [node("Str", page.sections[e["c"][1][0]])])
            e["c"][2] = [span, node("Space", None), *e["c"][2]]
        if e["t"] == "Header" and id(e) not in skip:
            link = node("Link", attr("", ["anchor"], aria_label="Link to this section"), [], [f"#{e['c'][1][0]}", ""])
            e["c"][2] = [*e["c"][2], link]

    def change(e):
        t, c = e["t"], e.get("c")
        if t == "Cite": return reference(c[0], labels, page.chapter.page)
        if t == "Code" and " " in c[1] and len(c[1]) <= SHORT_CODE: c[0][1].append("keep")
        if t == "Link": c[2][0] = page_link(c[2][0], pages_by_file)
        if t in ("Para", "Plain"): e["c"] = numbered(c, page.labels)
        if t == "Figure" and c[0][0] in page.labels: caption(c, page.labels[c[0][0]])
        if t == "Table": return table(c, page.labels)
        if t == "Div" and "nb-cell" in c[0][1]: return code_cell(page, c)
        if t == "Div" and "api" in c[0][1]: api_entry(c[1])
        if t == "Div" and any(k.startswith("callout-") for k in c[0][1]): return callout(c)
    page.blocks = strip_markers(walk(page.blocks, change))


def code_cell(page, content):
    "The blocks of a code cell, whose images go to the page's files."
    i = int(dict(map(tuple, content[0][2]))["data-cell"])
    cell = page.nb.cells[i]
    label = page.labels.get(str(options(cell.source).get("label")))
    blocks, files = cell_blocks(i, cell, content[1], page.chapter.page.removesuffix(".html"), mark(label) if label else ())
    page.files |= files
    return blocks


def api_entry(blocks):
    "Let an API entry's link to its source stand beside the heading, and its table fold on narrow screens."
    for b in blocks:
        if b["t"] == "Para" and b["c"][0]["t"] == "Link" and "api-source" in b["c"][0]["c"][0][1]: b["t"] = "Plain"
        if b["t"] == "Div" and "table-wrap" in b["c"][0][1]:
            b["c"][0][1].append("api-parameters")
            for e in elements(b["c"][1]):
                for cell in (cell for body in e["c"][4] for row in body[3] for cell in row[1][1:3]) if e["t"] == "Table" else ():
                    if len(text(cell[4])) > LONG_TYPE: cell[0][1].append("wraps")


def reference(citations, labels, here):
    "Links for a group of references; None for real citations."
    if citations[0]["citationId"].partition("-")[0].lower() not in NAMES: return None
    out = []
    for i, c in enumerate(citations):
        id = c["citationId"]
        label = labels.get(id[0].lower() + id[1:])
        if label is None: return None
        words = text(c["citationPrefix"]).strip() or label.name
        words = label.number if c["citationMode"]["t"] == "SuppressAuthor" else f"{words}{NBSP}{label.number}"
        href = f"#{id}" if label.page == here and not label.whole else label.href
        if i: out += [node("Str", ","), node("Space", None)]
        out += [node("Link", attr("", ["xref"]), [node("Str", words)], [href, ""]), *c["citationSuffix"]]
    return out


def page_link(target, pages_by_file):
    "A link to a notebook as a link to its page."
    file, hash, part = target.partition("#")
    page = pages_by_file.get(file.removeprefix("./"))
    return f"{page}{hash}{part}" if page else target


def numbered(inlines, labels):
    "A paragraph with its equations numbered, display formulas in boxes of their own, and punctuation kept at its formula."
    out, found = [], {i: (j, id) for i, j, id in equations(inlines)}
    skip = -1
    for i, x in enumerate(inlines):
        if i <= skip: continue
        if i in found:
            skip, id = found[i]
            mark = node("Link", attr("", ["equation-number"], aria_label=f"Equation {labels[id].number}"), [node("Str", f"({labels[id].number})")], [f"#{id}", ""])
            out.append(node("Span", attr(id, ["equation"]), [node("Span", attr("", ["formula"]), [x]), mark]))
        elif x["t"] == "Math" and x["c"][0]["t"] == "DisplayMath":
            out.append(node("Span", attr("", ["equation"]), [node("Span", attr("", ["formula"]), [x])]))
        elif x["t"] == "Math":
            after = [y for y in inlines[i + 1:i + 2] if y["t"] == "Str"]  # stays on the formula's line, as does a bracket before it
            before = [out.pop()] if out and out[-1]["t"] == "Str" and out[-1]["c"][-1] in "([“‘" else []
            skip, long = i + len(after), len(x["c"][1]) > LONG_FORMULA
            out.append(node("Span", attr("", ["long-formula" if long else "keep"]), [*before, x, *after]) if long or before or after else x)
        else: out.append(x)
    return out


def mark(label):
    "The start of a caption: its name and number, linking to itself."
    name = f"{label.name}{NBSP}{label.number}"
    return [node("Link", attr("", ["caption-number"]), [node("Str", name)], [f"#{label.id}", ""]), node("Str", ":"), node("Space", None)]


def caption(content, label):
    "Put the number before the caption of a picture in Markdown."
    for block in content[1][1][:1]: block["c"] = mark(label) + block["c"]


def table(content, labels):
    "A table in a box that scrolls, its columns as wide as their text, its caption over it."
    for spec in content[2]: spec[1] = {"t": "ColWidthDefault"}
    words, id = [x for b in content[1][1] for x in b["c"]], content[0][0]
    content[1] = [None, []]
    if id in labels: content[0][0] = ""
    box = node("Div", attr("", ["table-wrap"]), [node("Table", *content)])
    return captioned([box], id, [*(mark(labels[id]) if id in labels else []), *words]) if words else [box]


def callout(content):
    "A callout: its title, given or its kind's name, then its text; with `collapse` it opens and closes."
    (id, classes, kv), blocks = content
    kind = next(c for c in classes if c.startswith("callout-"))
    given = dict(map(tuple, kv))
    title = [node("Str", given.get("title") or kind.removeprefix("callout-").capitalize())]
    if not given.get("title") and blocks and blocks[0]["t"] == "Header": title, blocks = blocks[0]["c"][2], blocks[1:]
    collapse = given.get("collapse")
    outer, inner = ("details", "summary") if collapse else ("div", "p")
    start = f'<{outer} class="callout {kind}"' + (" open" if collapse == "false" else "") + ("" if collapse else ' role="note"') + ">"
    return [raw(start), raw(f'<{inner} class="callout-title">'), node("Plain", title), raw(f"</{inner}>"), *blocks, raw(f"</{outer}>")]
