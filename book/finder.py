"The index that search.js reads: the sections of all pages, as a reader sees their text."
import json
from html.parser import HTMLParser

VOID = {"br", "hr", "img", "input", "col", "wbr"}
BLOCK = {"p", "li", "pre", "tr", "td", "th", "div", "figcaption", "h2", "h3", "h4", "mtd", "mtr", "dd", "dt"}
BETWEEN = {"mfrac": "/", "msup": "^", "msub": "_", "munder": "_", "msubsup": "_^", "munderover": "_^"}


def search_index(texts):
    "A script with [page, title, sections] of each (page, HTML of its title, of its text); a section is [anchor, heading, kind, text, code]."
    pages = []
    for page, title, main in texts:
        title = Sections("", title).found[0][3]
        pages.append([page, title, Sections(title, main).found])
    data = json.dumps(pages, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    return f"window.bookIndex = {data};\n"


class Sections(HTMLParser):
    "The sections of one page; an API entry is one too. Outputs, folded source and formulas on lines of their own are left out."

    def __init__(self, title, main):
        super().__init__()
        self.found, self.open, self.heading = [["", title, "page", "", ""]], [], None
        self.feed(main)
        self.close()
        self.found = [[anchor, *(" ".join(x.split()) for x in rest)] for anchor, *rest in self.found]

    def handle_starttag(self, tag, attrs):
        given, above = dict(attrs), self.open[-1] if self.open else {"quiet": False, "api": False, "code": False, "tag": "", "children": 0}
        classes = (given.get("class") or "").split()
        above["children"] += 1
        if above["tag"] in BETWEEN and above["children"] > 1: self.say(BETWEEN[above["tag"]][above["children"] - 2])
        if tag in VOID: return
        quiet = above["quiet"] or tag in ("annotation", "button", "script") or tag == "thead" and above["api"] or given.get("display") == "block" or bool(
            {"output", "fold", "anchor", "api-source", "equation-number"} & set(classes))
        self.open.append({"tag": tag, "quiet": quiet, "api": above["api"] or "api" in classes, "code": above["code"] or tag == "pre", "children": 0})
        if tag in ("h2", "h3", "h4") and given.get("id"):
            self.found.append([given["id"], "", "api" if self.open[-1]["api"] else "section", "", ""])
            self.heading = len(self.open)

    def handle_startendtag(self, tag, attrs):
        if tag not in VOID: self.handle_starttag(tag, attrs); self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag in VOID: return
        if tag in BLOCK: self.say(" ")
        if self.heading == len(self.open): self.heading = None
        if self.open: self.open.pop()

    def handle_data(self, data): self.say(data)

    def say(self, words):
        "Add to the text, or to the heading that is open."
        here = self.open[-1] if self.open else {"quiet": False, "code": False}
        if not here["quiet"]: self.found[-1][1 if self.heading else 4 if here["code"] else 3] += words
