"""What a stock Quarto needs beyond what our own renderer reads, in the processed notebooks that it gets.

Each is a way of Quarto's (seen with 1.9) that its documentation does not tell.
"""
import re

import yaml
from fastcore.xtras import dict2obj


def adapt(nb, chapter):
    "Change the processed notebook of `chapter` for Quarto, in place."
    title(nb, chapter)
    for cell in nb.cells:
        if cell.cell_type == "code": code(cell)


def title(nb, chapter):
    "Attributes of a title are read after `# ` only, also in front matter; the promise is shown in the text alone."
    front = yaml.safe_load(nb.cells[0].source.strip().strip("-"))
    attr = " ".join(dict.fromkeys([*chapter.attr, *[".unnumbered"] * (not chapter.numbered)]))
    if attr: front["title"] = f"# {front['title'].partition(' {')[0]} {{{attr}}}"
    nb.cells[0].source = f"---\n{yaml.safe_dump(front, allow_unicode=True, width=1000)}---\n"
    if chapter.name == "index": return  # it carries the book's own line
    text = f"::: {{.promise}}\n{chapter.description}\n:::"
    nb.cells.insert(1, dict2obj({"cell_type": "markdown", "id": "promise", "metadata": {}, "source": text}))


def code(cell):
    "HTML outputs would load scripts from other hosts; images have no description of their own; names would lose their underscores."
    for out in cell.outputs:
        data = out.get("data", {})
        if "text/html" in data: data["text/markdown"] = f"```{{=html}}\n{''.join(data.pop('text/html')).strip()}\n```"
    if "fig-alt:" not in cell.source: cell.source = re.sub(r"^#\| fig-cap: (.*)$", r"\g<0>\n#| fig-alt: \1", cell.source, flags=re.M)
    def quoted(m): return m[1] + re.sub(r"\w+", r"`\g<0>`", m[2]) + m[3]
    cell.source = re.sub(r'^(#\| code-summary: "Source of )(.*)(")$', quoted, cell.source, flags=re.M)
