"""The HTML of a DataFrame as the book shows it: without pandas' own looks, words left and numbers right.

Both renderers get the mended table. Mending a mended table changes nothing.
"""
import html
import re

ROW = re.compile(r"(<tr[^>]*>)(.*?)(</tr>)", re.S)
CELL = re.compile(r"<(t[hd])\b([^>]*)>(.*?)</\1>", re.S)
GAP = {"NaN", "nan", "NaT", "None", "<NA>"}  # How pandas writes that there is no value
NUMBER = re.compile(r"(?:[\s\d.,+\-−±×·%°‰/()\[\]<>≤≥~≈∞–…]|\be[+-]?\d|(?<=\d)e[+-]?\d|\binf\b)*")
LONG = 28  # Letters from which the cells of a column may wrap


def mended(source):
    "The table of an HTML output: gaps as dashes, one row of names where two say the same, columns aligned by what they hold."
    source = re.sub(r"<style.*?</style>", "", source, flags=re.S)
    source = re.sub(r' border="1"|(<tr) style="text-align: \w+;"', r"\1", source)
    source = re.sub(r"^\s+|\n\s*(?=<)", "", re.sub(r"</?div>", "", source)).rstrip()
    return re.sub(r"<table.*?</table>", lambda m: one(m[0]), source, flags=re.S)


def one(table):
    "One table, mended."
    head, found, body = table.partition("<tbody>")
    if not found: return table
    rows = cells(body)
    for row in rows:
        for c in row:
            if c["tag"] == "td" and words(c) in GAP: c["inner"] = "–"
    names = merged(cells(head))
    leaf = [row for row in names if row and words(row[-1])][-1:]
    columns = [[row[-i] for row in rows if len(row) >= i] for i in range(1, max(map(len, rows), default=0) + 1)]
    for i, column in enumerate(columns, 1): align(column, [row[-i] for row in leaf if len(row) >= i], first=i == len(columns))
    named = bool(rows) and all([c["tag"] for c in row[:2]] == ["th", "td"] for row in rows) and not all(words(row[0]).isdigit() for row in rows)
    if named: head = re.sub(r'class="dataframe"', 'class="dataframe named"', head)
    return written(head, names) + found + written(body, rows)


def cells(text):
    "The rows of a part of a table, each a list of cells."
    return [[{"tag": t, "attrs": a, "inner": i} for t, a, i in CELL.findall(row)] for _, row, _ in ROW.findall(text)]


def written(text, rows):
    "A part of a table with `rows` in the place of its own; a row without cells is left out."
    rows = iter(rows)
    def row(m):
        new = next(rows)
        return m[1] + "".join(f"<{c['tag']}{c['attrs']}>{c['inner']}</{c['tag']}>" for c in new) + m[3] if new else ""
    return ROW.sub(row, text)


def words(cell): return html.unescape(re.sub(r"<[^>]+>", "", cell["inner"])).strip()


def number(cell): return NUMBER.fullmatch(words(cell)) is not None


def merged(rows):
    "The header's rows, the names of the index in the row of the columns' names where that has room for them."
    if len(rows) < 2: return rows
    above, names = rows[-2], rows[-1]
    if not any(map(words, names)): return [*rows[:-1], []]
    level = next((i for i, c in enumerate(names) if not words(c)), len(names))  # How many names the index has
    if not level or any(words(c) for c in names[level:] + above[:level]) or len(above) != len(names): return rows
    for name, place in zip(names, above[:level]): place["inner"] = name["inner"]
    return [*rows[:-2], above, []]


def align(column, head, first=False):
    "Words to the left, with their header; room to wrap where they are long."
    if column[0]["tag"] == "th" and not first:
        for c in head: c["attrs"] = ' class="level"'
    if column[0]["tag"] == "th" or all(number(c) for c in column): return
    kind = ' class="long"' if max(len(words(c)) for c in column) > LONG else ""
    for c in column:
        if c["tag"] == "td": c["attrs"] = kind + ' style="text-align: left;"'
    for c in head: c["attrs"] = ' style="text-align: left;"'
