"The pages of the site: the chapters' trees in the frame of page.html."
import html
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from blocks import elements, pandoc, raw, walk
from finder import search_index

HERE = Path(__file__).parent
ASSETS = ["book.css", "page.js", "search.js"]
VERSION = {"pandoc-api-version": [1, 23, 1]}
SPLIT = "<!--split-->"


def write_site(book, pages, folder):
    "Write all pages, images and assets into `folder`."
    frame = (HERE / "page.html").read_text(encoding="utf-8")
    (folder / "assets").mkdir(parents=True)
    for name in ASSETS: shutil.copyfile(HERE / name, folder / "assets" / name)
    highlight(pages)
    with ThreadPoolExecutor() as pool: bodies = list(pool.map(lambda p: body(p, book.bibliography), pages))
    texts = []
    for page, (toc, main) in zip(pages, bodies):
        texts.append((page.chapter.page, inline(page.chapter.title), f"<p>{inline(page.chapter.description)}</p>{main}"))
        fields = page_fields(book, page, pages) | {"toc": toc, "body": main}
        (folder / page.chapter.page).write_text(fill(frame, fields), encoding="utf-8")
        for name, content in page.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
    (folder / "assets" / "search-index.js").write_text(search_index(texts), encoding="utf-8")
    copy_images(book.sources, folder, pages)


def fill(frame, fields):
    "`frame` with each `{{name}}` replaced by its field."
    return re.sub(r"\{\{(\w+)\}\}", lambda m: fields[m[1]], frame)


def highlight(pages):
    "Turn all code of the book into HTML in one run, for pandoc takes half a second to learn a language."
    blocks = [[e for e in elements(page.blocks) if e["t"] == "CodeBlock"] for page in pages]
    tree = json.dumps(VERSION | {"meta": {}, "blocks": [x for own in blocks for b in own for x in (b, raw(SPLIT))]})
    pieces = iter(enumerate(pandoc(tree, "-f", "json", "-t", "html5", "--wrap=none").split(SPLIT), 1))
    for own in blocks:
        for k, (block, (n, piece)) in enumerate(zip(own, pieces), 1):
            block |= raw(re.sub(rf'(?<=["#])cb{n}(?=[-"])', f"cb{k}", piece.strip()))


def body(page, bibliography):
    "The table of contents and the text of a page, in HTML."
    meta = {"link-citations": {"t": "MetaBool", "c": True}, "lang": {"t": "MetaString", "c": "en"}}
    tree = json.dumps(VERSION | {"meta": meta, "blocks": walk(page.blocks, open_entry)})
    template = HERE / "body.html"
    out = pandoc(tree, "-f", "json", "-t", "html5", "--mathml", "--citeproc", f"--bibliography={bibliography}", "--toc",
                 "--toc-depth=3", f"--template={template}", "--syntax-highlighting=none", "--email-obfuscation=none", "--wrap=none")
    toc, _, main = out.partition(SPLIT)
    return re.sub(r' id="toc-[^"]*"', "", toc.strip()), spaced(main.strip())  # the page shows it twice


def spaced(text):
    """HTML with formulas set as TeX sets them: browsers put the sign that pandoc takes for the bars of `\\|`, of parallel lines,
    far from its neighbours, and no space between a function's name and what it is applied to."""
    text = re.sub(r'(<mo [^>]*form="\w+"[^>]*>)∥(?=</mo>)', r"\1‖", text)
    name = r'<mrow><mi mathvariant="normal">\w+</mi><mo>&#8289;</mo></mrow>'
    name = rf"(?<!<msub>)(?<!<msup>)(?<!<msubsup>)(?<!<munder>){name}|<msub>{name}<m[in]>[^<]*</m[in]></msub>"
    return re.sub(rf'({name})(?=<m(?!o|space)(?!row><mo [^>]*form="prefix"))', r'\1<mspace width="0.167em"></mspace>', text)


def open_entry(e):
    "An API entry's block in HTML, for pandoc would take the id of its heading for the block."
    if e["t"] == "Div" and "api" in e["c"][0][1]: return [raw('<div class="api">'), *e["c"][1], raw("</div>")]


def page_fields(book, page, pages):
    "What page.html asks for, but for the text."
    chapter = page.chapter
    title = inline(chapter.title)
    heading = f'<span class="number">{chapter.number}</span> {title}' if chapter.number else title
    name = html.escape(book["title"])
    plain = re.sub(r"<[^>]+>", "", title)
    return {
        "lang": book.config.get("lang", "en"),
        "pagetitle": name if plain == name else f"{plain} – {name}",
        "description": html.escape(chapter.description or book["description"]),
        "name": name,
        "kicker": html.escape(chapter.part or ""),
        "heading": heading,
        "lead": inline(chapter.description),
        "label": f' id="{chapter.label}"' if chapter.label else "",
        "chapters": chapters(pages, page),
        "pager": pager(pages, page),
        "repository": html.escape(book["repo-url"]),
        "source": html.escape(f"{book['repo-url']}/blob/{book['repo-branch']}/{book['repo-subdir']}/{chapter.path.name}"),
    }


@cache
def inline(markdown):
    "One line of Markdown in HTML: emphasis, code and formulas."
    if not markdown: return ""
    return spaced(re.sub(r"^<p>|</p>$", "", pandoc(markdown, "-f", "markdown", "-t", "html5", "--mathml").strip()))


def chapters(pages, here):
    "The list of chapters by part."
    out, part = [], None
    for page in pages:
        c = page.chapter
        if c.part != part:
            if part is not None: out.append("</ul></li>")
            if c.part is not None: out.append(f'<li class="part"><span>{html.escape(c.part)}</span><ul>')
            part = c.part
        now = ' aria-current="page"' if page is here else ""
        number = f'<span class="number">{c.number}</span> ' if c.number else ""
        out.append(f'<li><a href="{c.page}"{now}>{number}<span>{inline(c.title)}</span></a></li>')
    return "\n".join(out + (["</ul></li>"] if part is not None else []))


def pager(pages, here):
    "Links to the chapters before and after."
    i, out = pages.index(here), []
    for j, rel, word in ((i - 1, "prev", "Previous"), (i + 1, "next", "Next")):
        if not 0 <= j < len(pages): continue
        c = pages[j].chapter
        out.append(f'<a rel="{rel}" href="{c.page}"><small>{word}</small> <span>{inline(c.title)}</span></a>')
    return "\n".join(out)


def copy_images(sources, folder, pages):
    "Copy the image files that the chapters' Markdown shows."
    for page in pages:
        for e in elements(page.blocks):
            if e["t"] == "Image" and (file := sources / e["c"][2][0]).is_file() and e["c"][2][0] not in page.files:
                target = folder / e["c"][2][0]
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
