"How an exported symbol is shown: heading, source link, signature, docstring, table of parameters."
import inspect
import re
import sys

from fastcore.docments import docments
from nbdev.doclinks import NbdevLookup

from blocks import entry_id

WIDTH = 76  # A longer signature gets a line for each parameter
LONG = 40  # A longer default is shortened
STARS = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


class Entry:
    "Renders what `show_doc` shows, in Markdown that Quarto and pandoc read alike."

    def __init__(self, sym, name=None, title_level=3, **_):
        self.command = sym if hasattr(sym, "collect_usage_pieces") else None  # of click
        self.sym = getattr(sym, "fget", None) or getattr(self.command, "callback", None) or sym
        self.name = name or self.sym.__qualname__
        self.level = title_level

    def _repr_markdown_(self):
        source = address(self.sym)
        parts = [f"{'#' * self.level} `{self.name}` {{#{entry_id(self.name, vars(sys.modules[self.sym.__module__]))} .api-name}}"]
        if source: parts.append(f'[source]({source}){{.api-source target="_blank" rel="noopener"}}')
        if self.command: return "\n\n".join(parts + usage(self.command))
        parts.append(f"```{{.python .api-signature}}\n{signature(self.sym, self.name)}\n```")
        return "\n\n".join(parts + paragraphs(self.sym) + table(self.sym))


def address(sym):
    "Where the code of `sym` is on the web, or None."
    found = NbdevLookup()[f"{sym.__module__}.{sym.__qualname__}"]
    return f"{found[2]}#L{inspect.getsourcelines(sym)[1]}" if isinstance(found, tuple) else None


def plain(obj):
    "`repr` without addresses; a function or class by its name, what a factory makes by dots."
    if repr(obj) == "<factory>": return "..."
    if inspect.isroutine(obj) or inspect.isclass(obj): return obj.__name__
    return " ".join(re.sub(r" at 0x[0-9a-f]+", "", repr(obj)).split())


def default(p, sym):
    "A parameter's default: as it is, or where it is long by its name in the module, or shortened."
    if p.default is p.empty: return ""
    text = plain(p.default)
    if isinstance(p.default, float) and len(text) > 8: return f"{p.default:.4g}"
    if len(text) <= LONG: return text
    named = next((k for k, v in vars(sys.modules[sym.__module__]).items() if v is p.default), None)
    if named: return named
    if m := re.match(r"(\w*[(\[{]).*([)\]}])$", text): return f"{m[1]}…{m[2]}"
    return text[:LONG - 2] + "…" + (text[0] if text[0] in "'\"" else "")


def shown_default(p, sym):
    "The default for a table's cell; where it is shortened, pointing at it shows the whole."
    short = default(p, sym)
    if not short or short == plain(p.default): return code(short)
    whole = re.sub(r"([\\\"|])", r"\\\1", plain(p.default))
    return f'[{code(short)}]{{title="{whole}"}}'


def kind(annotation):
    "A type as a reader says it: without the modules."
    if annotation is inspect.Parameter.empty: return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", text).replace("NoneType", "None")


def parameters(sym):
    "The parameters of `sym` without `self`; none for a class that leaves construction to another library."
    if inspect.isclass(sym):
        maker = next(c for c in sym.__mro__ if vars(c).keys() & {"__init__", "__new__"})
        if maker.__module__.split(".")[0] != sym.__module__.split(".")[0]: return []
    try: found = list(inspect.signature(sym).parameters.values())
    except (TypeError, ValueError): return []
    return [p for i, p in enumerate(found) if i or p.name not in ("self", "cls")]


def signature(sym, name):
    "The call, with defaults and without types: those are in the table."
    pieces, star = [], False
    for p in parameters(sym):
        if p.kind == p.VAR_POSITIONAL: star = True
        if p.kind == p.KEYWORD_ONLY and not star: pieces.append("*"); star = True
        pieces.append(STARS.get(p.kind, "") + p.name + ("" if p.default is p.empty else f"={default(p, sym)}"))
    if inspect.isclass(sym) and not pieces: return f"class {name}"
    line = f"{name}({', '.join(pieces)})"
    if len(line) <= WIDTH: return line
    return name + "(\n" + "".join(f"    {p},\n" for p in pieces) + ")"


def usage(command):
    "How a command is called, what it says of itself, and the table of its options."
    program = command.callback.__module__.split(".")[0]
    name = program if hasattr(command, "commands") else f"{program} {command.name}"
    context = command.context_class(command, info_name=name, **command.context_settings)
    call = " ".join([name, *command.collect_usage_pieces(context)])
    rows = [r for p in command.get_params(context) if (r := p.get_help_record(context)) and r[1]]
    lines = [f"| `{option}` | {cell(prose(note))} |" for option, note in rows]
    return [f"```{{.sh .api-signature}}\n{call}\n```", prose(command.help or ""), "\n".join(["| Option | Meaning |", "|:----|:----------|", *lines])]


def paragraphs(sym):
    "The docstring's paragraphs; `Raises` and `Source` each start one."
    if not inspect.getdoc(sym) or (inspect.isclass(sym) and not sym.__doc__): return []
    doc = re.sub(r"\n(?=(?:Raises|Source|From|Returns)\b)", "\n\n", inspect.getdoc(sym).strip())
    if inspect.isclass(sym) and doc.startswith(f"{sym.__name__}("): return []  # what dataclass makes up
    return [prose(p.strip("\n")) for p in doc.split("\n\n")]


def prose(text):
    "A docstring's text with its angle brackets kept from being taken for HTML."
    parts = re.split(r"(`+[^`]*`+|<https?://[^>]*>)", text or "")
    return "".join(part if i % 2 else re.sub(r"<(?=[A-Za-z/!?])", r"\<", part) for i, part in enumerate(parts))


def cell(text):
    "`text` for a cell of a pipe table."
    return re.sub(r"\s*\n\s*", " ", text or "").strip().replace("|", r"\|")


def table(sym):
    "The parameters' table, or nothing when no parameter is described."
    try: notes = docments(sym, full=True, returns=True)
    except (OSError, TypeError): return []
    rows, fields = [], field_notes(sym)
    for p in parameters(sym):
        note = notes.get(p.name, {}).get("docment") or fields.get(p.name)
        rows.append((f"`{STARS.get(p.kind, '')}{p.name}`", code(kind(p.annotation)), shown_default(p, sym), cell(prose(note))))
    back = notes.get("return") or {}
    if not any(r[3] for r in rows) and not back.get("docment"): return []
    if back.get("docment") and not inspect.isclass(sym):
        rows.append(("*returns*", code(kind(back.get("anno", inspect.Parameter.empty))), "", cell(prose(back["docment"]))))
    head = ["| Parameter | Type | Default | Meaning |", "|:----|:------|:----|:------------|"]
    return ["\n".join(head + [f"| {' | '.join(r)} |" for r in rows])]


def field_notes(sym):
    "The comments behind the fields of a class such as a NamedTuple: {field: comment}."
    if not inspect.isclass(sym): return {}
    return dict(re.findall(r"^    (\w+)\s*:[^#\n]*#\s*(.+)$", inspect.getsource(sym), re.M))


def code(text): return f"`{text}`" if text else ""
