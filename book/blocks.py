"""Notebooks as one Markdown text each, and that text as pandoc's tree.

Code cells become empty divs in the text (`::: {.nb-cell data-cell="7"}`) and are filled in the tree, so that
neither code nor output can be mistaken for Markdown. A comment `<!--cell 7-->` says where each cell starts.
"""
import ast
import base64
import html
import json
import re
import struct
import subprocess
import textwrap

import pypandoc
import yaml

from outline import BookError
from tables import mended

MARKER = re.compile(r"<!--cell (\d+)-->")
OPTION = re.compile(r"^#\|\s*([\w-]+)\s*:\s*(.+?)\s*$")
IMAGES = {"image/svg+xml": "svg", "image/png": "png", "image/jpeg": "jpg"}
PANDOC = pypandoc.get_pandoc_path()
GONE = {"hide", "export", "exporti", "default_exp"}  # Directives of cells that no reader sees


def pandoc(text, *args):
    "What pandoc makes of `text`; a warning counts as an error."
    done = subprocess.run([PANDOC, *args], input=text, capture_output=True, text=True, encoding="utf-8")
    if done.returncode or done.stderr.strip(): raise BookError(done.stderr.strip() or "pandoc failed")
    return done.stdout


def options(source):
    "The options `#| key: value` that a cell starts with."
    found = {}
    for line in source.splitlines():
        if not line.startswith("#|"): break
        if m := OPTION.match(line): found[m[1]] = yaml.safe_load(m[2])
    return found


def directives(source):
    "The first words of all lines `#| …` that a cell starts with."
    lines = source.splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#|")), len(lines))
    return [words[0].rstrip(":") for line in lines[:end] if (words := line[2:].split())]


def code_only(source): return re.sub(r"\A(?:#\|.*(?:\n|\Z))+", "", source).strip("\n")


def definitions(source):
    "The names that the top level of `source` defines or assigns, in order; none when it only imports."
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): names.append(node.name)
        elif isinstance(node, ast.Assign): names += [t.id for t in node.targets if isinstance(t, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name): names.append(node.target.id)
    return names


def entry_id(name, names):
    "The id of the API entry of `name`: in lower case, as nbdev links to it, but of a class and a function of one name the class gives way."
    return f"{name.lower()}-class" if name != name.lower() and name.lower() in names else name.lower()


def mime(output):
    "The kind of `output` to show, in Quarto's order of preference for HTML."
    data = output.get("data", {})
    return next((k for k in ("text/html", "text/markdown", *IMAGES, "text/plain") if k in data), None)


def cell_markdown(i, cell):
    "The place in the text for code cell `i`, with its caption and its outputs in Markdown."
    opts = options(cell.source)
    if GONE & set(directives(cell.source)) or opts.get("include") is False: return ""
    written = ["".join(o.data["text/markdown"]) if mime(o) == "text/markdown" else None for o in cell.outputs]
    if opts.get("output") == "asis":
        return "\n\n".join(f"::: {{.api}}\n{w}\n:::" for w in written if w)
    parts = [f'::: {{.nb-cell data-cell="{i}"}}']
    caption = opts.get("fig-cap") or opts.get("tbl-cap")
    if caption: parts += [f"::: {{.nb-caption}}\n{caption}\n:::"]
    parts += [f'::: {{.nb-output data-output="{j}"}}\n{w}\n:::' for j, w in enumerate(written) if w]
    return "\n\n".join([*parts, ":::"])


def markdown(nb):
    "The notebook as one text."
    parts = []
    for i, cell in enumerate(nb.cells):
        if cell.cell_type == "raw": continue
        parts += [f"<!--cell {i}-->", cell.source if cell.cell_type == "markdown" else cell_markdown(i, cell)]
    return "\n\n".join(parts) + "\n"


def parse(nb):
    "The blocks of pandoc's tree for the notebook."
    try: return json.loads(pandoc(markdown(nb), "-f", "markdown", "-t", "json"))["blocks"]
    except BookError as error: raise BookError(f"{nb.path_}: {error}") from error


# Building the tree

def node(t, *c): return {"t": t, "c": c[0] if len(c) == 1 else list(c)}


def attr(id="", classes=(), **kv): return [id, list(classes), [[k.replace("_", "-"), str(v)] for k, v in kv.items()]]


def raw(text): return node("RawBlock", "html", text)


def div(classes, *blocks, **kv): return node("Div", attr("", classes, **kv), list(blocks))


def text(tree):
    "The text in `tree`, as a reader would say it."
    if isinstance(tree, list): return "".join(map(text, tree))
    if not isinstance(tree, dict): return ""
    kind, c = tree.get("t"), tree.get("c")
    if kind in ("Str", "MetaString"): return c
    if kind in ("Space", "SoftBreak", "LineBreak"): return " "
    if kind in ("Code", "CodeBlock", "Math"): return c[1] + ("\n" if kind == "CodeBlock" else "")
    if kind in ("RawInline", "RawBlock", "Note"): return ""
    return text(c) + (" " if kind in ("Para", "Plain", "Header", "Cell") else "")


LEAVES = {"Str", "Space", "SoftBreak", "LineBreak", "Code", "CodeBlock", "Math", "RawInline", "RawBlock"}


def elements(tree):
    "Every element of `tree`, parents first, in the order of the text."
    left = [tree]
    while left:
        x = left.pop()
        if isinstance(x, dict):
            if "t" in x: yield x
            if x.get("t") not in LEAVES: left += reversed(x.values())
        elif isinstance(x, list): left += reversed(x)


def walk(tree, f):
    "`tree` rebuilt: `f` gets every element, children first, and returns it, a list in its place, or None to keep it."
    if isinstance(tree, list):
        out = []
        for x in tree:
            y = walk(x, f)
            if isinstance(y, list) and isinstance(x, dict): out += y
            else: out.append(y)
        return out
    if not isinstance(tree, dict): return tree
    tree = {k: walk(v, f) for k, v in tree.items()}
    made = f(tree) if "t" in tree else None
    return tree if made is None else made


def strip_markers(tree):
    return walk(tree, lambda e: [] if e["t"] == "RawBlock" and MARKER.match(e["c"][1]) else None)


# Code cells

def cell_blocks(i, cell, place, stem, mark=()):
    """The blocks of code cell `i`, and its image files.

    `place` is the content of its div, `stem` starts the files' names, `mark` starts its caption.
    """
    opts, blocks, files = options(cell.source), [], {}
    caption = next((b for b in place if "nb-caption" in b["c"][0][1]), None)
    written = {dict(map(tuple, b["c"][0][2])).get("data-output"): b["c"][1] for b in place if b is not caption}
    if opts.get("echo", True) is not False and code_only(cell.source): blocks += source_blocks(cell.source, opts)
    if opts.get("output", True) is not False:
        for j, out in enumerate(cell.outputs):
            name = f"{stem}-{opts.get('label') or i}" + (f"-{j}" if j else "")
            shown, more = output_blocks(out, written.get(str(j)), name, opts)
            blocks += shown
            files |= more
    label = str(opts.get("label", ""))
    if caption: blocks = captioned(blocks, label, [*mark, *(x for b in caption["c"][1] for x in b["c"])])
    return [div(["cell", *str(opts.get("classes", "")).split()], *blocks)] if blocks else [], files


def source_blocks(source, opts):
    "The code, folded where the cell asks for it."
    block = node("CodeBlock", attr("", ["python", "cell-code"]), code_only(source))
    fold = opts.get("code-fold", False)
    if fold is False: return [block]
    summary = html.escape(str(opts.get("code-summary", "Code")))
    return [raw(f'<details class="fold"{" open" if fold == "show" else ""}><summary>{summary}</summary>'), block, raw("</details>")]


def output_blocks(out, written, name, opts):
    "The blocks that show one output, and the image file it needs, as {name: bytes}."
    kind = mime(out)
    if written is not None: return [div(["output", "output-text"], *written)], {}
    if out.output_type == "stream": return [plain_output("".join(out.text))], {}
    if kind == "text/html": return [div(["output", "table-wrap"], raw(mended("".join(out.data[kind]))))], {}
    if kind in IMAGES:
        file = f"figures/{name}.{IMAGES[kind]}"
        content = "".join(out.data[kind])
        content = content.encode() if kind == "image/svg+xml" else base64.b64decode(content)
        alt = str(opts.get("fig-alt") or opts.get("fig-cap") or "Figure")
        size = image_size(content, out.get("metadata", {}).get(kind, {}))
        image = node("Image", attr("", [], **size), [node("Str", alt)], [file, ""])
        return [div(["output", "output-figure"], node("Plain", [image]))], {file: content}
    return ([plain_output("".join(out.data[kind]))] if kind else []), {}


def plain_output(content):
    content = textwrap.dedent(content).strip("\n") if content.startswith("\n") else content.rstrip("\n")
    return div(["output", "output-plain"], node("CodeBlock", attr("", ["plain"]), content))


def image_size(content, declared):
    "Width and height to show an image at, as attributes; none where unknown."
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        width, height = struct.unpack(">II", content[16:24])
        if declared.get("width"): width, height = declared["width"], round(height * declared["width"] / width)
        return {"width": width, "height": height}
    return {}


def captioned(blocks, label, inlines):
    "The cell's blocks with its output in a figure: the caption over a table and under a picture."
    first = next((k for k, b in enumerate(blocks) if b["t"] == "Div"), len(blocks))
    note = [raw("<figcaption>"), node("Plain", inlines), raw("</figcaption>")]
    table = not label.startswith("fig-")
    inner = note + blocks[first:] if table else blocks[first:] + note
    id = f' id="{html.escape(label)}"' if label else ""
    return blocks[:first] + [raw(f'<figure class="{"table" if table else "picture"}"{id}>'), *inner, raw("</figure>")]
