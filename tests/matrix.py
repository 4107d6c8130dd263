"""The matrix: what ties live through. Rows are models with ties, columns are what a training run does to a model.

Each cell ends in one of three ways, and anything else is an error:

    kept      the tie lived through it
    mended    the tie was broken, check_ties said so, and retie_ mended it
    refused   nothing was done, or nothing could be mended, and an error named the tie

`python tests/matrix.py` writes results/ties_matrix.json, which the chapter shows; the tests compare with it.
"""
import copy
import io
import json
import os
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch as st
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_, parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from processes import in_two_processes
from sharetie.ties import (BrokenTie, Slice, Transpose, check_ties, declared_ties, ensemble, functional, keep_ties, load_model, param_groups,
                           replace_modules, retie_, save_model, share_module_, skeleton, tie_, tie_groups)

MADE = Path(__file__).parents[1] / "results"
OUTCOMES = ("kept", "mended", "refused")


# Models: small ones, of every kind of tie

class Words(nn.Module):
    "Token embedding, body, and one or more heads over the same vocabulary."
    def __init__(self, heads=1, padding=None):
        super().__init__()
        self.tok, self.body = nn.Embedding(7, 4, padding_idx=padding), nn.Linear(4, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 7) for _ in range(heads))

    def forward(self, x): return sum(head(self.body(self.tok(x)).tanh()) for head in self.heads)


class Deep(nn.Module):
    "Two layers of one shape, each in submodules of its own."
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.decoder = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Tanh())

    def forward(self, x): return self.decoder(self.encoder(x))


class Layers(nn.Module):
    "Two layers of one shape and a last one."
    def __init__(self, norm=False):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        if norm: self.a, self.b = parametrizations.weight_norm(self.a), parametrizations.weight_norm(self.b)

    def forward(self, x): return self.out(self.b(self.a(x).tanh()).tanh())


class Coder(nn.Module):
    "An autoencoder."
    def __init__(self):
        super().__init__()
        self.enc, self.dec = nn.Linear(4, 3), nn.Linear(3, 4)

    def forward(self, x): return self.dec(self.enc(x).tanh())


class Wide(nn.Module):
    "A layer, and one of which the weight is a part of it."
    def __init__(self):
        super().__init__()
        self.big, self.small = nn.Linear(4, 6), nn.Linear(4, 3)

    def forward(self, x): return self.big(x).sum(-1, keepdim=True) * self.small(x)


class Scaled(nn.Module):
    "A layer with a buffer."
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.register_buffer("scale", torch.rand(4))

    def forward(self, x): return self.lin(x) * self.scale


# Rows

def first_rows(w): return w[:3]


@dataclass(frozen=True)
class Row:
    "A model without ties, its ties as tuples of a source and members, the map from source to members, and how to tie it."
    name: str
    build: Callable
    ties: tuple
    tie: Callable
    map: Callable = staticmethod(lambda w: w)
    pseudo: bool = False
    words: bool = False  # is the input tokens?

    def untied(self, seed=0):
        torch.manual_seed(seed)
        return self.build()

    def tied(self, seed=0):
        model = self.untied(seed)
        self.tie(model)
        return model

    def input(self, seed=0):
        g = torch.Generator().manual_seed(seed)
        return torch.randint(7, (3, 5), generator=g) if self.words else torch.randn(3, 4, generator=g)


def tie_by(*names, map=None): return lambda model: tie_(model, [*names], map=map)


def tie_all(*groups):
    def tie(model):
        for names in groups: tie_(model, [*names])
    return tie


def same_memory(model): model.b.weight.data = model.a.weight.data


def from_weight(model): model.tok = nn.Embedding(7, 4, _weight=model.heads[0].weight)


def transposed_view(model): model.dec.weight = nn.Parameter(model.enc.weight.t())


def sliced_view(model): model.small.weight = nn.Parameter(model.big.weight[:3])


def scaled(): return nn.Sequential(Scaled(), Scaled())


TOK, G = ("tok.weight", "heads.0.weight"), "parametrizations.weight.original"
NORM = tuple((f"a.{G}{i}", f"b.{G}{i}") for i in (0, 1))
ROWS = [
    Row("two names", Words, (TOK,), tie_by(*TOK), words=True),
    Row("three names", lambda: Words(2), ((*TOK, "heads.1.weight"),), tie_by(*TOK, "heads.1.weight"), words=True),
    Row("across submodules", Deep, (("encoder.0.weight", "decoder.0.0.weight"),), tie_by("encoder.0.weight", "decoder.0.0.weight")),
    Row("shared module", Layers, (("a.weight", "b.weight"), ("a.bias", "b.bias")), lambda model: share_module_(model, ["a", "b"])),
    Row("transposed", Coder, (("enc.weight", "dec.weight"),), tie_by("enc.weight", "dec.weight", map=Transpose()), torch.t),
    Row("sliced", Wide, (("big.weight", "small.weight"),), tie_by("big.weight", "small.weight", map=Slice(slice(0, 3))), first_rows),
    Row("shared buffer", scaled, (("0.scale", "1.scale"),), tie_by("0.scale", "1.scale")),
    Row("pseudo: one memory", Layers, (("a.weight", "b.weight"),), same_memory, pseudo=True),
    Row("pseudo: _weight=", Words, (TOK,), from_weight, pseudo=True, words=True),
    Row("pseudo: transposed", Coder, (("enc.weight", "dec.weight"),), transposed_view, torch.t, pseudo=True),
    Row("pseudo: sliced", Wide, (("big.weight", "small.weight"),), sliced_view, first_rows, pseudo=True),
    Row("in parametrizations", lambda: Layers(norm=True), NORM, tie_all(*NORM)),
    Row("with padding_idx", lambda: Words(padding=0), (TOK,), tie_by(*TOK), words=True),
]
BY_NAME = {row.name: row for row in ROWS}


# A cell

def get(model, name):
    "What a layer sees under a name."
    for part in name.split("."): model = getattr(model, part)
    return model


def raw(model, name):
    "The name of the tensor behind a weight, parametrized or not."
    path, _, attribute = name.rpartition(".")
    layer = model.get_submodule(path)
    return name if not hasattr(getattr(layer, "parametrizations", None), attribute) else f"{path}.parametrizations.{attribute}.original"


@dataclass
class Cell:
    "One model of a row, under keep_ties or not."
    row: Row
    keep: bool
    now: Callable = staticmethod(lambda name: name)  # what an operation called the members of the tie anew

    def make(self, seed=0):
        model = self.row.tied(seed)
        if self.row.pseudo: retie_(model)
        return keep_ties(model) if self.keep else model

    def alive(self, model):
        "Whether all members of all ties follow their source, and each parameter is listed once."
        tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
        for source, *members in [map(self.now, tie) for tie in self.row.ties]:
            w = tensors.get(raw(model, source))
            for name in members:
                if one_module(model, source, name): continue
                if w is None or tensors.get(raw(model, name)) is not w: return False
                computed = w.is_meta or isinstance(w, DTensor) or isinstance(model, torch.fx.GraphModule)  # no values, or none to see
                if not computed and not self.follows(model, w, name): return False
        return True

    def follows(self, model, w, name):
        "Whether a member changes with its source, as its map says."
        with torch.no_grad():
            before = w.clone()
            w += 1
            try: return torch.equal(get(model, name), self.row.map(w))
            except TypeError: return False  # it cannot be computed any more
            finally: w.copy_(before)

    def names(self, error):
        "Whether an error names a member of a tie, or its layer."
        names = {name.replace(".parametrizations", "").rpartition(".original")[0] or name for tie in self.row.ties for name in tie}
        return any(part in str(error) for name in names for part in (name, name.rpartition(".")[0]))


def one_module(model, a, b):
    "Whether two names are of one shared module."
    (a, x), (b, y) = (name.rpartition(".")[::2] for name in (a, b))
    return x == y and model.get_submodule(a) is model.get_submodule(b)


class Refused(Exception):
    "An operation was refused with a clear error."


class Silent(Exception):
    "Something went wrong without a word."


def refusable(cell, operation, *args, says=None, **options):
    "The value of an operation; Refused if it raises an error that names the tie, or what PyTorch says."
    try: return operation(*args, **options)
    except (ValueError, TypeError, RuntimeError, KeyError, AssertionError) as error:
        if cell.names(error) or says and says in str(error): raise Refused(str(error)) from error
        raise


def outcome(row, column, keep=False):
    "How a cell of the matrix ends."
    cell, said = Cell(row, keep), False
    if row.pseudo:
        said = found(cell, row.tied(), pseudo=True)
        assert said, "SILENT: check_ties says nothing of a pseudo-tie"
    model = cell.make()
    assert cell.alive(model), "the tie is not there to begin with"
    try: after = COLUMNS[column](cell, model)
    except Silent: return "silent"
    except Refused:
        assert cell.alive(model) and not broken(model), "refused, and changed"
        return "refused"
    stranger = not declared_ties(after)  # made by an exporter, knows of no ties
    if cell.alive(after):
        assert not broken(after, stranger), "check_ties finds fault with a tie that lives"
        return "mended" if said else "kept"
    assert found(cell, after, stranger), "SILENT: the tie is broken and check_ties says nothing"
    try: retie_(after)
    except (ValueError, TypeError) as error:
        assert cell.names(error), f"refused without a name: {error}"
        return "refused"
    assert cell.alive(after) and not broken(after), "SILENT: retie_ did not mend"
    return "mended"


def broken(model, pseudo=False):
    "What check_ties raises, or None."
    try: check_ties(model, pseudo=pseudo)
    except BrokenTie as error: return error


def found(cell, model, pseudo=False):
    "Whether check_ties names the broken tie."
    error = broken(model, pseudo)
    return error is not None and cell.names(error)


def same(cell, a, b, **close):
    "Assert that two models compute the same."
    x = cell.row.input()
    torch.testing.assert_close(a.eval()(x), b.eval()(x), **close)
    return a


# Columns: loading and copying

COLUMNS = {}


def column(name):
    "Register an operation: a function of a cell and its model that returns the model after it."
    def register(f):
        COLUMNS[name] = f
        return f
    return register


@column("state_dict")
def state_dict(cell, model):
    fresh = cell.make(1)
    fresh.load_state_dict(model.state_dict())
    return same(cell, fresh, model)


@column("assign=True")
def assign(cell, model):
    fresh = cell.make(1)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return same(cell, fresh, model)


@column("partial state_dict")
def partial(cell, model):
    fresh, state = cell.make(1), model.state_dict()
    for source, *_ in cell.row.ties: del state[raw(model, source)]
    refusable(cell, fresh.load_state_dict, state, strict=False)
    return same(cell, fresh, model)


@column("conflicting state_dict")
def conflicting(cell, model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state[raw(model, cell.row.ties[0][-1])] += 1
    before = copy.deepcopy(model.state_dict())
    try: refusable(cell, model.load_state_dict, state)
    except Refused:
        torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
        raise
    raise Silent("the last value wins")


@column("to_empty")
def to_empty(cell, model):
    fresh = skeleton(cell.make(1)).to_empty(device="cpu")
    fresh.load_state_dict(model.state_dict())
    return same(cell, fresh, model)


@column(".to('meta')")
def to_meta(cell, model): return model.to("meta")


@column("casts")
def casts(cell, model): return same(cell, copy.deepcopy(model).half().double().bfloat16().float(), model, atol=3e-2, rtol=3e-2)


@column("device moves")
def moves(cell, model):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return same(cell, copy.deepcopy(model).to(device, torch.float64).to("cpu", torch.float32), model)


@column("deepcopy")
def deep_copy(cell, model): return same(cell, copy.deepcopy(model), model)


@column("pickle")
def pickled(cell, model): return same(cell, pickle.loads(refusable(cell, pickle.dumps, model, says="parametrized modules")), model)


@column("torch.save")
def saved(cell, model):
    file = io.BytesIO()
    refusable(cell, torch.save, model, file, says="parametrized modules")
    file.seek(0)
    return same(cell, torch.load(file, weights_only=False), model)


# Columns: files

@column("save_model → load_model")
def our_file(cell, model):
    fresh = cell.make(1)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, f"{folder}/m.safetensors")
        load_model(fresh, f"{folder}/m.safetensors")
    return same(cell, fresh, model)


@column("safetensors → load_model")
def their_file(cell, model):
    fresh = cell.make(1)
    with tempfile.TemporaryDirectory() as folder:
        st.save_model(model, f"{folder}/m.safetensors")
        load_model(fresh, f"{folder}/m.safetensors")
    return same(cell, fresh, model)


@column("save_model → load_state_dict")
def read_as_state(cell, model):
    fresh = cell.make(1)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, f"{folder}/m.safetensors")
        refusable(cell, fresh.load_state_dict, st.load_file(f"{folder}/m.safetensors"))
    return same(cell, fresh, model)


@column("save_model → safetensors")
def read_by_them(cell, model):
    fresh = cell.make(1)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, f"{folder}/m.safetensors")
        refusable(cell, st.load_model, fresh, f"{folder}/m.safetensors")
    return same(cell, fresh, model)


@column("file of an untied model")
def untied_file(cell, model):
    with tempfile.TemporaryDirectory() as folder:
        st.save_file({name: value.clone() for name, value in cell.row.untied(3).state_dict().items()}, f"{folder}/m.safetensors")
        before = copy.deepcopy(model)
        try: refusable(cell, load_model, model, f"{folder}/m.safetensors")
        finally: same(cell, model, before, atol=0, rtol=0)
    return model


# Columns: compilers

@column("torch.compile")
def compiled(cell, model):
    torch._dynamo.reset()
    x, made = cell.row.input(), torch.compile(model, backend="eager")
    loss(made, x).backward()
    got = grads(model)
    model.zero_grad()
    loss(model, x).backward()
    torch.testing.assert_close(got, grads(model))
    return model


@column("torch.export")
def exported(cell, model):
    file, x = io.BytesIO(), cell.row.input()
    torch.export.save(torch.export.export(model, (x,)), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    torch.testing.assert_close(loaded(x), model(x))
    return loaded


@column("functional")
def as_function(cell, model):
    x, (call, params) = cell.row.input(), functional(model)
    got = torch.func.grad(lambda values: loss(call, values, x))(params)
    loss(model, x).backward()
    torch.testing.assert_close(got, {name: params[name].grad for name in got})
    return model


@column("vmap ensemble")
def vmapped(cell, model):
    models, x = [model, cell.make(1), cell.make(2)], cell.row.input()
    call, params, buffers = ensemble(models)
    out = torch.vmap(lambda p, b: call({**p, **b}, x))(params, buffers)
    torch.testing.assert_close(out, torch.stack([m(x) for m in models]))
    return model


# Columns: training

def loss(f, *inputs): return (f(*inputs) ** 2).mean()


def grads(model): return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Reference:
    "The same model without ties: members are copied from a source by hand, and their gradients summed by hand."

    def __init__(self, row, model):
        self.row, self.model = row, row.untied()
        params = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in [*params.items(), *self.model.named_buffers()]: value.copy_(get(model, name))
        members = {name for _, *names in row.ties for name in names}
        self.leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items() if name not in members}

    def backward(self, x, autocast=False):
        "Gradients of the leaves."
        params = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, leaf in self.leaves.items(): params[name].copy_(leaf)
            for source, *names in self.row.ties:
                if source in self.leaves:
                    for name in names: params[name].copy_(self.row.map(self.leaves[source]))
        self.model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast): value = loss(self.model, x)
        value.backward()
        for name, leaf in self.leaves.items(): leaf.grad = params[name].grad.clone()
        for source, *names in self.row.ties:
            for name in names if source in self.leaves else ():
                _, back = torch.func.vjp(self.row.map, self.leaves[source].detach())
                self.leaves[source].grad += back(params[name].grad)[0]

    def compare(self, model, grad=False, **close):
        "Assert that a tied model has the same weights, or gradients."
        tensors = dict(model.named_parameters(remove_duplicate=False))
        for name, leaf in self.leaves.items():
            mine = tensors[raw(model, name)]
            mine, leaf = (mine.grad, leaf.grad) if grad else (mine.detach(), leaf.detach())
            torch.testing.assert_close(mine.full_tensor() if isinstance(mine, DTensor) else mine, leaf, **close)


def trained(make):
    "A column: three steps of an optimizer, as the reference does them."
    def run(cell, model):
        reference = Reference(cell.row, model)
        mine, theirs = make(param_groups(model, {})), make(reference.leaves.values())
        for step in range(3):
            x = cell.row.input(step)
            mine.zero_grad()
            loss(model, x).backward()
            mine.step()
            reference.backward(x)
            theirs.step()
        reference.compare(model)
        check_ties(model, mine)
        return model
    return run


COLUMNS["SGD"] = trained(lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1))
COLUMNS["Adam"] = trained(lambda p: torch.optim.Adam(p, 0.1))
COLUMNS["AdamW"] = trained(lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1))


@column("gradient clipping")
def clipped(cell, model):
    reference, x = Reference(cell.row, model), cell.row.input()
    loss(model, x).backward()
    reference.backward(x)
    mine, theirs = clip_grad_norm_(model.parameters(), 0.01), clip_grad_norm_(reference.leaves.values(), 0.01)
    torch.testing.assert_close(mine, theirs)
    reference.compare(model, grad=True)
    return model


@column("AMP")
def amp(cell, model):
    reference, x = Reference(cell.row, model), cell.row.input()
    with torch.autocast("cpu", torch.bfloat16): value = loss(model, x)
    value.backward()
    reference.backward(x, autocast=True)
    reference.compare(model, grad=True, atol=1e-2, rtol=5e-2)
    return model


@column("EMA")
def ema(cell, model):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=False)
    average.update_parameters(model)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters(): p += 1
    average.update_parameters(model)
    torch.testing.assert_close([*average.module.parameters()], [nn.Parameter(p + 0.5) for p in before])
    return average.module


# Columns: quantization and weight_norm

@column("dynamic quantization")
def dynamic(cell, model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return refusable(cell, torch.ao.quantization.quantize_dynamic, model, {nn.Linear}, dtype=torch.qint8, says="ParametrizedLinear")


class Codes(nn.Module):
    "Whole numbers from -127 to 127 and a scale per row in the place of a Linear's or an Embedding's weight."
    def __init__(self, layer, codes, scale):
        super().__init__()
        self.embeds = isinstance(layer, nn.Embedding)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.bias = None if self.embeds else layer.bias

    def forward(self, x):
        weight = self.codes * self.scale
        return nn.functional.embedding(x, weight) if self.embeds else nn.functional.linear(x, weight, self.bias)


def coder():
    "A function from layers to Codes that codes each weight once."
    made = {}

    def code(layer):
        w = layer.weight
        if w not in made:
            scale = w.detach().abs().amax(1, keepdim=True) / 127
            made[w] = (w.detach() / scale).round().to(torch.int8), scale
        return Codes(layer, *made[w])
    return code


@column("weight-only quantization")
def weight_only(cell, model):
    x = cell.row.input()
    before = model(x)
    refusable(cell, replace_modules, model, (nn.Linear, nn.Embedding) if cell.row.words else nn.Linear, coder())
    torch.testing.assert_close(model(x), before, atol=2e-2, rtol=5e-2)
    cell.now = lambda name: name.replace("weight", "codes")
    return model


@column("weight_norm")
def weight_norm(cell, model):
    layer, _, attribute = cell.row.ties[0][-1].rpartition(".")
    try: refusable(cell, parametrizations.weight_norm, model.get_submodule(layer), attribute)
    except TypeError: pass  # of a mapped weight: PyTorch raises, and leaves what it began
    return model


# Columns: two processes

def two_processes(cell, wrapped, reference):
    "Three steps on two processes, each with half of a batch, while the reference does them with all of it."
    mine, theirs = (torch.optim.SGD(p, 0.1, momentum=0.9) for p in (wrapped.parameters(), reference.leaves.values()))
    for step in range(3):
        halves = [cell.row.input(2 * step + rank) for rank in range(2)]
        mine.zero_grad()
        loss(wrapped, halves[dist.get_rank()]).backward()
        mine.step()
        reference.backward(torch.cat(halves))
        theirs.step()


@column("DDP")
def replicated(cell, model):
    reference = Reference(cell.row, model)
    two_processes(cell, nn.parallel.DistributedDataParallel(model), reference)
    reference.compare(model)
    return model


def sharded(model):
    "A model sharded as tie_groups says."
    for group in tie_groups(model): fully_shard([*group.values()])
    return fully_shard(model)


@column("FSDP2")
def fully_sharded(cell, model):
    reference = Reference(cell.row, model)
    two_processes(cell, sharded(model), reference)
    reference.compare(model)
    return model


@column("distributed checkpoint")
def checkpoint(cell, model):
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    state, fresh = dict(sharded(model).named_parameters()), sharded(cell.make(1))
    dcp.save(state, checkpoint_id=folder[0])
    assert dcp.FileSystemReader(folder[0]).read_metadata().state_dict_metadata.keys() == state.keys()
    dcp.load(dict(fresh.named_parameters()), checkpoint_id=folder[0])
    for name, p in fresh.named_parameters(): assert torch.equal(p.full_tensor(), state[name].full_tensor())
    if dist.get_rank() == 0: shutil.rmtree(folder[0])  # the other process has read it: full_tensor waited for it
    return fresh


DISTRIBUTED = ("DDP", "FSDP2", "distributed checkpoint")


def on_each():
    "All distributed cells, on one of two processes."
    return {column: outcomes(column) for column in DISTRIBUTED}


def distributed():
    "The outcomes of the distributed columns, from one pair of processes."
    with tempfile.TemporaryDirectory() as folder: return in_two_processes(on_each, folder)[0]


# The table

def outcomes(column, rows=BY_NAME):
    "How the cells of a column end, by row, with ties declared only and under keep_ties."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: {"declared": outcome(BY_NAME[name], column), "keep_ties": outcome(BY_NAME[name], column, keep=True)} for name in rows}


def matrix():
    "How all cells end, by column and row."
    found = distributed()
    return {column: found[column] if column in found else outcomes(column) for column in COLUMNS}


if __name__ == "__main__":
    from sharetie.results import record
    os.environ.setdefault("SHARETIE_RESULTS", str(MADE))
    record("ties_matrix", measured=matrix(), note="per cell: with ties declared by tie_, and under keep_ties; made by tests/matrix.py")
