"The pipeline: stages and what they keep, ties, recipes, interruption, files, and the command line."
import copy
import importlib
import itertools
import json
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from sharetie import compression
from sharetie.archive import Archive, Scaled
from sharetie.codebooks import cluster_
from sharetie.command import main
from sharetie.compression import _digest, compress
from sharetie.finding import Transpose, find_ties
from sharetie.making import tie_
from sharetie.masks import magnitude, make_permanent_, prune_
from sharetie.pieces import quantize_pieces_
from sharetie.recipes import STAGES, Cluster, Prune, Quantize, Round, Tune, _Run, read_recipe
from sharetie.results import set_seed
from sharetie.saving import load_model, save_model
from tied import Coder, Convs, Reused, Words


def mlp():
    set_seed(0)
    return nn.Sequential(nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, 6))


def task(n=64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 8, generator=generator), torch.randint(6, (n,), generator=generator)


FULL = [{"stage": "prune", "sparsity": .5}, {"stage": "tune", "epochs": 2, "batch_size": 16}, {"stage": "cluster", "k": 4, "names": "0.weight"},
        {"stage": "tune", "epochs": 2, "batch_size": 16}, {"stage": "quantize", "bits": 4, "group_size": 8, "epochs": 2, "batch_size": 16},
        {"stage": "round"}, {"stage": "code"}]


def words(): return Words(30, 16)


def counted():
    "A loss that is never to be computed."
    return stopping(0)


TIED = {"words": (words, torch.randint(30, (20,)), F.cross_entropy), "reused": (lambda: Reused(12), torch.randn(20, 12), F.mse_loss),
        "convs": (lambda: Convs(4), torch.randn(20, 4, 4, 4), F.mse_loss), "coder": (lambda: Coder(12, 6), torch.randn(20, 12), F.mse_loss)}
CLUSTERED = [{"stage": "prune", "sparsity": .5}, {"stage": "tune", "epochs": 1}, {"stage": "cluster", "k": 4}, {"stage": "tune", "epochs": 1},
             {"stage": "round"}, {"stage": "code"}]
QUANTIZED = [{"stage": "prune", "sparsity": .5}, {"stage": "quantize", "bits": 4}, {"stage": "round"}, {"stage": "code"}]


@pytest.mark.parametrize("recipe", [CLUSTERED, QUANTIZED], ids=["clustered", "quantized"])
@pytest.mark.parametrize("kind", TIED)
def test_tied_models_stay_tied_and_are_stored_once(kind, recipe, tmp_path):
    build, x, loss = TIED[kind]
    set_seed(0)
    model, y = build(), x if kind == "words" else torch.zeros_like(x)
    before = copy.deepcopy(model.state_dict())
    compress(model, (x, y), loss, recipe, tmp_path / "a")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    fresh, archive = build(), Archive(tmp_path / "a")
    load_model(fresh, archive)
    assert len(find_ties(fresh)) == len(find_ties(model))
    assert archive.report().drop(["all", "header"])["weights"].sum() == sum(p.numel() for p in model.parameters())
    weight, = (p for p in fresh.parameters() if p.ndim > 1)
    assert int((weight == 0).sum()) >= weight.numel() // 2
    if recipe is CLUSTERED: assert len(weight.unique()) <= 5
    fresh(x)


def test_a_tie_with_a_map_is_kept_or_refused(tmp_path):
    def build():
        model = nn.Sequential(nn.Linear(12, 6), nn.Linear(6, 12))
        tie_(model, ["0.weight", "1.weight"], map=Transpose())
        return model
    set_seed(0)
    model, x = build(), torch.randn(9, 12)
    compress(model, (x, x), F.mse_loss, [{"stage": "prune", "sparsity": .5}, {"stage": "tune", "epochs": 1}, {"stage": "code"}], tmp_path / "a")
    fresh = build()
    load_model(fresh, Archive(tmp_path / "a"))
    assert torch.equal(fresh[0].weight, fresh[1].weight.T) and (fresh[0].weight == 0).sum() == 36
    compress(model, (x, x), F.mse_loss, [{"stage": "tune", "epochs": 1}, {"stage": "cluster", "k": 4}], tmp_path / "b")
    load_model(fresh, Archive(tmp_path / "b"))
    assert torch.equal(fresh[0].weight, fresh[1].weight.T) and len(fresh[0].weight.unique()) == 4
    with pytest.raises(ValueError, match=r"recipe\[2\]: names: weights that nothing is computed from"):
        compress(model, (x, x), counted(), [{"stage": "tune", "epochs": 1}, {"stage": "cluster", "k": 4}, {"stage": "tune", "epochs": 1}], tmp_path / "c")
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}


def test_every_stage_keeps_what_the_ones_before_did():
    run = _Run(mlp(), task(), F.cross_entropy)
    Prune({"0.weight": .8, "2.weight": .5})(run)
    gone = [p == 0 for p in run.model.parameters() if p.ndim > 1]
    assert [int(g.sum()) for g in gone] == [128, 60]
    def zeros(): return [p == 0 for p in run.model.parameters() if p.ndim > 1]
    Tune(1, batch_size=16)(run)
    Cluster({"0.*": 3})(run)
    Tune(1, batch_size=16)(run)
    assert all(map(torch.equal, gone, zeros())) and len(run.model[0].weight.unique()) == 4 and len(run.model[2].weight.unique()) > 4
    Quantize(1, batch_size=16, bits=3)(run)
    assert [*run.forms] == ["2.weight"] and (zeros()[1] | ~gone[1]).all() and len(run.model[0].weight.unique()) <= 4
    assert torch.equal(zeros()[0], gone[0]) and len(run.forms["2.weight"].codes.unique()) <= 7
    Round("bfloat16")(run)
    for name, p in run.model.named_parameters():
        if name not in run.forms: assert torch.equal(p, p.bfloat16().float())
    assert torch.equal(run.forms["2.weight"].values(), run.model[2].weight)


def test_across_is_one_codebook_also_while_it_trains():
    run = _Run(mlp(), task(), F.cross_entropy)
    Prune(.5, scope="global")(run)
    assert sum(int((p == 0).sum()) for p in run.model.parameters() if p.ndim > 1) == 140
    Cluster(5, scope="across")(run)
    Tune(1, batch_size=16)(run)
    values = torch.cat([run.model[i].weight.flatten() for i in (0, 2)])
    assert len(values.unique()) == 6 and run.clustered == [["0.weight", "2.weight"]]


class Mirror(nn.Module):
    "A tied autoencoder whose computed weight comes before its source."
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(12, 6), nn.Linear(6, 12)
        tie_(self, ["decoder.weight", "encoder.weight"], map=Transpose())
    def forward(self, x): return self.decoder(self.encoder(x).tanh())


class Steps(nn.Module):
    "Convolutions in groups, a BatchNorm, and a half of the weights frozen."
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.head = nn.Conv1d(4, 8, 3, groups=2), nn.BatchNorm1d(8), nn.Conv1d(8, 6, 1), nn.Linear(6, 3)
        self.a.requires_grad_(False)
    def forward(self, x): return self.head(self.b(self.norm(self.a(x.unflatten(1, (4, 3)))).relu()).mean(-1))


MEASURED = {"mirror": (Mirror, 12), "steps": (Steps, 3), "words": (words, None)}
SCALES = [{"stage": "prune", "sparsity": .3}, {"stage": "tune", "epochs": 1}, {"stage": "quantize", "bits": 4, "epochs": 1},
          {"stage": "round"}, {"stage": "code"}]


RECIPES = {"quantized": QUANTIZED, "scales": SCALES, "clustered": CLUSTERED}  # a mapped tie is not clustered, nor trained on a grid


@pytest.mark.parametrize("kind, name", [("mirror", "quantized"), *itertools.product(("steps", "words"), RECIPES)])
def test_the_file_is_what_was_measured(kind, name, tmp_path):
    (build, width), recipe = MEASURED[kind], RECIPES[name]
    set_seed(0)
    model, x = build(), torch.randn(40, 12) if width else torch.randint(30, (40,))
    y, loss = (x, F.mse_loss) if kind == "mirror" else (torch.randint(width or 30, (40,)), F.cross_entropy)
    outputs, before = [], copy.deepcopy(model.state_dict())
    def watched(output, y):
        outputs.append(output.clone())
        return loss(output, y)
    compress(model, (x, y), loss, recipe, tmp_path / "a", test=(x, y), metrics={"loss": watched})
    fresh = build()
    load_model(fresh, Archive(tmp_path / "a"))
    assert torch.equal(fresh.eval()(x), outputs[-1])
    assert model.training and all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_held_for_training_is_what_was_there(dtype):
    run = _Run(nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 9)).to(dtype))
    with torch.no_grad(): run.model[0].weight.mul_(torch.logspace(-6, 2, 40)[:, None])
    Prune({"0.weight": .4})(run)
    Cluster(37)(run)
    before = copy.deepcopy(run.model.state_dict())
    run.hold()
    for name, weight in before.items(): assert torch.equal(getattr(run.model[int(name[0])], name[2:]), weight)


def test_scales_beyond_sixteen_bits_are_refused():
    run = _Run(nn.Sequential(nn.Linear(4, 4)))
    with torch.no_grad(): run.model[0].weight.mul_(1e9)
    Quantize(bits=4)(run)
    before = run.model[0].weight.clone()
    with pytest.raises(ValueError, match="the scales of 0.weight: numbers that float16 has"): Round()(run)
    assert torch.equal(run.model[0].weight, before)
    Round("bfloat16")(run)
    assert torch.equal(run.forms["0.weight"].values(), run.model[0].weight)


def test_masks_that_a_model_has_are_kept(tmp_path):
    model = mlp()
    prune_(model, magnitude(model), .7)
    compress(model, task(), F.cross_entropy, [{"stage": "cluster", "k": 4}, {"stage": "tune", "epochs": 1}, {"stage": "code"}], tmp_path / "a")
    fresh = mlp()
    load_model(fresh, Archive(tmp_path / "a"))
    for i in (0, 2): assert torch.equal(fresh[i].weight == 0, model[i].weight == 0) and len(fresh[i].weight.unique()) == 5


@pytest.mark.parametrize("scope", ["layer", "across"])
@pytest.mark.parametrize("zero", [False, True])
def test_codebooks_that_a_model_has_are_kept(tmp_path, scope, zero):
    model = mlp()
    if zero:
        prune_(model, magnitude(model), .5)
        make_permanent_(model)
    cluster_(model, 4, scope=scope, zero=zero)
    compress(model, task(), F.cross_entropy, [{"stage": "tune", "epochs": 2}, {"stage": "code"}], tmp_path / "a")
    file = Archive(tmp_path / "a")
    values = [file[f"{i}.weight"] for i in (0, 2)]
    for new, old in zip(values, (model[0].weight, model[2].weight)):
        assert not torch.equal(new, old) and not zero or torch.equal(new == 0, old == 0)
    for found in [torch.cat([v.flatten() for v in values])] if scope == "across" else values: assert len(found.unique()) == 4 + zero
    with pytest.raises(ValueError, match=r"recipe\[0\]: names: at least one weight without a codebook"):
        compress(model, None, None, [{"stage": "cluster", "k": 2}], tmp_path / "b")


@pytest.mark.parametrize("weight, k, sparsity", [([[1., -1, .1, .1], [1, -1, .1, .1]], 1, .5), ([[.3, -.3, .1, .1], [.3, -.3, 3, .1]], 2, 3 / 8),
                                                 ([[.3, -.3, .1, 2], [.3, -.3, 3, 2]], 3, 0)], ids=["one", "pruned", "whole"])
@pytest.mark.parametrize("lookups", [False, True])
def test_an_entry_of_a_codebook_that_is_zero_is_trained(tmp_path, weight, k, sparsity, lookups):
    set_seed(0)
    model, x, y = nn.Sequential(nn.Linear(4, 2, bias=False)), torch.randn(20, 4), torch.randn(20, 2)
    model[0].weight.data = torch.tensor(weight)
    recipe = [{"stage": "prune", "sparsity": sparsity}, {"stage": "cluster", "k": k}, {"stage": "tune", "epochs": 2}, {"stage": "code"}]
    gone = torch.zeros(2, 4, dtype=torch.bool)
    if sparsity: gone = model[0].weight.detach().abs() < .2
    if lookups:  # a model that comes with a codebook; the entry becomes zero later
        if sparsity: make_permanent_(prune_(model, {"0.weight": (~gone).float()}, sparsity))
        cluster_(model, k, zero=bool(sparsity))
        with torch.no_grad(): model[0].parametrizations.weight.original[0] = 0
        recipe = recipe[2:]
    compress(model, (x, y), F.mse_loss, recipe, tmp_path / "a")
    found = Archive(tmp_path / "a")["0.weight"]
    assert torch.equal(found == 0, gone) and len(found[~gone].unique()) == k


def pieces():
    return quantize_pieces_(mlp(), 3, 4, "0.weight")


def test_pieces_that_a_model_has_are_kept_and_go_on_learning(tmp_path):
    data, recipe = task(), [{"stage": "prune", "sparsity": .5}, {"stage": "tune", "epochs": 2, "batch_size": 16}, {"stage": "quantize", "epochs": 1, "batch_size": 16},
                            {"stage": "round"}, {"stage": "code"}]
    table = compress(pieces(), data, F.cross_entropy, recipe, tmp_path / "a", test=data, metrics={"loss": F.cross_entropy})
    form, start = Archive(tmp_path / "a").form("0.weight"), pieces()[0].parametrizations.weight
    assert torch.equal(form.codes, start[0].codes.int()) and table["loss"].iloc[-1] < table["loss"].iloc[0]
    assert not torch.allclose(form.codebooks, start.original, atol=1e-4) and torch.equal(form.codebooks, form.codebooks.half().float())
    assert isinstance(Archive(tmp_path / "a").form("2.weight"), Scaled) and int((Archive(tmp_path / "a")["2.weight"] == 0).sum()) >= 60
    fresh = mlp()
    load_model(fresh, Archive(tmp_path / "a"))
    assert torch.equal(fresh[0].weight, form.values())
    calls = 0
    while calls < 9 and not (tmp_path / "b").exists():  # an epoch takes 4 losses
        calls += 1
        try: compress(pieces(), data, stopping(5), recipe, tmp_path / "b")
        except Stopped: assert not (tmp_path / "b").exists()
    assert calls > 1 and (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


@pytest.mark.parametrize("stage", [{"stage": "prune", "sparsity": .5, "names": "0.weight"}, {"stage": "cluster", "k": 2, "names": "0.weight"},
                                   {"stage": "quantize", "names": "0.weight"}])
def test_pieces_are_not_treated_again(tmp_path, stage):
    with pytest.raises(ValueError, match=r"recipe\[0\]: names: weights without a codebook or scales.*0.weight"):
        compress(pieces(), None, None, [stage], tmp_path / "a")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("std", [1e-4, 1e-5, 1e-7, 1e-12])
@pytest.mark.parametrize("stage", [{"stage": "quantize"}, {"stage": "cluster", "k": 16}, None])
def test_what_float16_would_lose_is_refused(tmp_path, std, stage):
    set_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad(): model[0].weight.normal_(0, std)
    first, before = [stage] if stage else [], model[0].weight.detach()
    compress(model, None, None, first + [{"stage": "code"}], tmp_path / "a")
    lost = (Archive(tmp_path / "a")["0.weight"] - before).norm()
    run = _Run(model)
    for one in read_recipe(first) if first else []: one(run)
    was, forms = {name: p.clone() for name, p in run.model.named_parameters()}, dict(run.forms)
    if std < (1e-3 if stage == {"stage": "quantize"} else 1e-5):
        with pytest.raises(ValueError, match="0.weight: numbers that float16 has are expected.* too small for it; 'bfloat16' has them"): Round()(run)
        assert all(torch.equal(p, was[name]) for name, p in run.model.named_parameters()) and all(run.forms[name] is form for name, form in forms.items())
    else: Round()(run)
    compress(model, None, None, first + [{"stage": "round", "dtype": "bfloat16"}, {"stage": "code"}], tmp_path / "b")
    assert (Archive(tmp_path / "b")["0.weight"] - before).norm() < 1.1 * lost + 2**-8 * before.norm()


def test_an_entry_of_a_codebook_is_not_rounded_away():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    model[0].weight.data = torch.tensor([[1., 1e-9], [1, 1e-9]])
    Round()(_Run(model))  # of single numbers only all together count
    run = _Run(model)
    Cluster(2)(run)
    with pytest.raises(ValueError, match=r"0.weight: numbers that float16 has are expected, got 9.9.*e-10, too small"): Round()(run)
    assert torch.equal(run.model[0].weight, model[0].weight)


def zero_start():
    model = mlp()
    nn.init.zeros_(model[2].weight)
    return model


@pytest.mark.parametrize("sparsity, left", [(0, 120), (.5, 60)])
def test_a_zero_that_nobody_took_out_is_trained(tmp_path, sparsity, left):
    recipe = [{"stage": "prune", "sparsity": sparsity}, {"stage": "tune", "epochs": 2}, {"stage": "prune", "sparsity": max(sparsity, .25)}]
    compress(zero_start(), task(), F.cross_entropy, recipe[:2], tmp_path / "a")
    assert int((Archive(tmp_path / "a")["2.weight"] != 0).sum()) == left
    with pytest.raises(Stopped): compress(zero_start(), task(), stopping(0), recipe, tmp_path / "b")
    compress(zero_start(), task(), stopping(99), recipe[:2], tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    compress(zero_start(), task(), stopping(99), recipe, tmp_path / "c")
    assert int((Archive(tmp_path / "c")["2.weight"] != 0).sum()) == min(left, 90)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.out = nn.Embedding(30, 8), nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 5)
    def forward(self, x): return self.out(self.lstm(self.embed(x))[0][:, -1])


UNTRAINED = [[{"stage": "prune", "sparsity": .5}, {"stage": "quantize", "bits": 8}, {"stage": "code"}],
             [{"stage": "prune", "sparsity": .5}, {"stage": "cluster", "k": 4}, {"stage": "round"}]]


@pytest.mark.parametrize("recipe", UNTRAINED, ids=["quantized", "clustered"])
def test_a_recurrent_network_is_the_same_from_python_and_a_shell(tmp_path, monkeypatch, recipe):
    monkeypatch.chdir(tmp_path)
    set_seed(0)
    model = Tagger()
    compress(model, None, None, recipe, "a")
    save_model(model, "model")
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    assert CliRunner().invoke(main, ["compress", "model", "b", "--recipe", "r.json"]).exit_code == 0
    a, b = Archive("a"), Archive("b")
    assert {*a.names} == {*b.names} and all(torch.equal(a[name], b[name]) for name in a.names)
    assert float((a["lstm.weight_hh_l0"] == 0).float().mean()) >= .5


def frozen():
    model = mlp()
    model[0].requires_grad_(False)
    with torch.no_grad(): model[0].weight.copy_(model[0].weight.sign())
    return model


WORDS = torch.randint(30, (20, 4))
TUNE = {"stage": "tune", "epochs": 1}


@pytest.mark.parametrize("build, x, recipe, words", [
    (Tagger, WORDS, [{"stage": "prune", "sparsity": .5}, TUNE], r"recipe\[1\]: lstm.weight_ih_l0: belongs to LSTM"),
    (Tagger, WORDS, [TUNE, {"stage": "quantize", "epochs": 1}], r"recipe\[1\]: lstm.weight_ih_l0: belongs to LSTM"),
    (Tagger, WORDS, [{"stage": "cluster", "k": 4}, TUNE], r"recipe\[1\]: lstm.weight_ih_l0: belongs to LSTM"),
    (mlp, task()[0], [{"stage": "prune", "sparsity": .9}, TUNE, {"stage": "cluster", "k": 13}], r"recipe\[2\]: 2.weight: k: .* at most 12, the"),
    (mlp, task()[0], [TUNE, {"stage": "cluster", "k": 281, "scope": "across"}], r"recipe\[1\]: 0.weight: k: .* at most 280, the"),
    (frozen, task()[0], [TUNE, {"stage": "cluster", "k": 3, "names": "0.weight"}], r"recipe\[1\]: 0.weight: k: .* at most 2, the"),
    (lambda: mlp().requires_grad_(False), task()[0], [TUNE], r"recipe\[0\]: model: a module with a parameter that trains"),
    (mlp, task()[0][:0], [{"stage": "prune", "sparsity": .5}, TUNE], "data: at least one example"),
    (mlp, DataLoader(TensorDataset(task()[0][:0])), [TUNE], "data: at least one example"),
    (mlp, 3, [{"stage": "prune", "sparsity": .5}, TUNE], r"data: \(x, y\)"),
    (lambda: mlp().append(nn.Linear(6, 6, dtype=torch.double)), task()[0], [TUNE, {"stage": "cluster", "k": 2, "scope": "across"}], r"recipe\[1\]: scope: 'layer'"),
])
def test_what_can_be_known_is_known_before_anything_runs(tmp_path, build, x, recipe, words):
    data = (x, torch.randint(5, (len(x),))) if isinstance(x, torch.Tensor) else x
    with pytest.raises((ValueError, TypeError), match=words): compress(build(), data, counted(), recipe, tmp_path / "a")
    assert not [*tmp_path.iterdir()]


def test_a_loss_of_another_name_does_not_go_on(tmp_path):
    def other(output, y): return F.cross_entropy(output, y, label_smoothing=.5)
    with pytest.raises(Stopped): compress(mlp(), task(), stopping(3), FULL[:2], tmp_path / "a")
    with pytest.raises(ValueError, match="a.part: is of another run, its loss differs"): compress(mlp(), task(), other, FULL[:2], tmp_path / "a")


LOSSES = {"lambda": lambda w: lambda o, y: F.cross_entropy(o, y, label_smoothing=w), "partial": lambda w: partial(F.cross_entropy, label_smoothing=w),
          "module": lambda w: nn.CrossEntropyLoss(label_smoothing=w), "state": lambda w: nn.CrossEntropyLoss(torch.full((6,), 1 + w))}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("what", ["loss", "metrics"])
def test_functions_of_one_name_are_told_apart(tmp_path, monkeypatch, kind, what):
    if (kind, what) == ("state", "metrics"): return
    def run(w):
        one, data = LOSSES[kind](w), task()
        given = (one, {"m": F.cross_entropy}) if what == "loss" else (F.cross_entropy, {"m": one})
        return compress(mlp(), data, given[0], FULL[:2], tmp_path / "a", test=data, metrics=given[1])
    def stop(*_): raise Stopped
    with monkeypatch.context() as patch:
        patch.setattr(Tune, "train", stop)
        with pytest.raises(Stopped): run(.5)
    with pytest.raises(ValueError, match=f"a.part: is of another run, its {what} differs"): run(.25)
    run(.5)


def test_an_empty_parameter_is_rounded(tmp_path):
    model = mlp()
    model.empty = nn.Parameter(torch.zeros(0))
    compress(model, None, None, [{"stage": "round"}], tmp_path / "a")
    assert Archive(tmp_path / "a")["empty"].shape == (0,)


class Stopped(Exception): pass


def stopping(steps):
    "Cross entropy that can be computed so many times."
    def loss(output, y):
        nonlocal steps
        steps -= 1
        if steps < 0: raise Stopped
        return F.cross_entropy(output, y)
    return loss


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path):
    data, metrics = task(), {"error": lambda output, y: (output.argmax(1) != y).float().mean()}
    whole = compress(mlp(), data, stopping(10**9), FULL, tmp_path / "whole", test=data, metrics=metrics)
    table, tries = None, 0
    while table is None:  # each try computes 7 losses, and an epoch of training takes 4
        tries += 1
        try: table = compress(mlp(), data, stopping(7), FULL, tmp_path / "parts", test=data, metrics=metrics)
        except Stopped: assert not (tmp_path / "parts").exists()
    assert tries == 6 and table.equals(whole)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"parts", "whole"}


@pytest.mark.parametrize("sampler", [False, True])
def test_an_interrupted_run_goes_on_in_the_order_of_its_loader(tmp_path, sampler):
    "A generator of a loader, or of its sampler, goes on from stage to stage."
    def loader():
        data, generator = TensorDataset(*task()), torch.Generator().manual_seed(5)
        if sampler: return DataLoader(data, 16, sampler=RandomSampler(data, generator=generator))
        return DataLoader(data, 16, shuffle=True, generator=generator)
    recipe, steps = [TUNE, {"stage": "prune", "sparsity": .5}, TUNE], TUNE["epochs"] * len(loader())
    compress(mlp(), loader(), stopping(10**9), recipe, tmp_path / "whole")
    with pytest.raises(Stopped): compress(mlp(), loader(), stopping(steps + 1), recipe, tmp_path / "parts")
    fixed = DataLoader(TensorDataset(*task()), 16)
    with pytest.raises(ValueError, match="its data differs"): compress(mlp(), fixed, stopping(10**9), recipe, tmp_path / "parts")
    compress(mlp(), loader(), stopping(10**9), recipe, tmp_path / "parts")
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.filterwarnings("ignore:recipe.4.")  # of the model with one weight
def test_what_an_interrupted_run_can_go_on_with(tmp_path):
    data, path = task(), tmp_path / "a"
    with pytest.raises(Stopped): compress(mlp(), data, stopping(9), FULL, path)
    for recipe, model, words in ((FULL[1:], mlp(), "its recipe differs"), (FULL, nn.Sequential(nn.Linear(8, 6)), "its model differs"),
                                 (FULL[:1], mlp(), "its recipe differs")):
        with pytest.raises(ValueError, match=words): compress(model, data, stopping(99), recipe, path)
    compress(mlp(), data, stopping(99), [*FULL[:3], {"stage": "code"}], path)  # another end is no other run
    (tmp_path / "b.part").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="b.part: no file of an interrupted run"): compress(mlp(), data, stopping(99), FULL, tmp_path / "b")
    (tmp_path / "b.part").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="b.part: damaged, .*; remove it, or name another target"): compress(mlp(), data, stopping(99), FULL, tmp_path / "b")


STOPS = [{"stage": "prune", "sparsity": .5}, {"stage": "tune", "epochs": 4, "batch_size": 16}, {"stage": "quantize", "epochs": 3, "bits": 2, "batch_size": 16}]


def other():
    set_seed(1)
    return nn.Sequential(nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, 6))


@pytest.mark.parametrize("steps, recipe, again, refused", [
    (9, STOPS[1:2], {"model": other}, None),
    (9, STOPS[:2], {"model": other}, "model"),
    (9, STOPS[:2], {"recipe": [{"stage": "prune", "sparsity": .75}, STOPS[1]]}, "recipe"),
    (9, STOPS[:2], {"recipe": [STOPS[0], STOPS[1] | {"lr": .1}]}, None),
    (25, STOPS, {"recipe": [*STOPS[:2], STOPS[2] | {"bits": 8}]}, None),
    (9, STOPS[1:2], {"data": (task()[0], task()[1].flip(0))}, None),
    (9, STOPS[:2], {"data": (task()[0], task()[1].flip(0))}, "data"),
], ids=["model", "model of a stage", "stage before", "rate", "bits", "data", "data of a stage"])
def test_another_run_takes_nothing_of_an_interrupted_one(tmp_path, steps, recipe, again, refused):
    with pytest.raises(Stopped): compress(mlp(), task(), stopping(steps), recipe, tmp_path / "a")
    now = {"model": mlp, "data": task(), "recipe": recipe} | again
    def run(name): return compress(now["model"](), now["data"], stopping(99), now["recipe"], tmp_path / name)
    if refused:
        with pytest.raises(ValueError, match=f"a.part: is of another run, its {refused} differs; remove it"): run("a")
        (tmp_path / "a.part").unlink()
    run("a"), run("b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}  # nothing is left of the other run


def test_names_in_tuples_are_no_other_recipe(tmp_path):
    recipe = [{"stage": "prune", "sparsity": .5, "names": ("0.weight",)}, {"stage": "tune", "epochs": 1}]
    with pytest.raises(Stopped): compress(mlp(), task(), stopping(0), recipe, tmp_path / "a")
    compress(mlp(), task(), stopping(99), recipe, tmp_path / "a")


def test_a_folder_is_no_target(tmp_path):
    (tmp_path / "fold").mkdir()
    for force in (False, True):
        with pytest.raises(IsADirectoryError, match="fold: a file is expected, got a folder"):
            compress(mlp(), task(), stopping(0), [{"stage": "tune", "epochs": 1}], tmp_path / "fold", force=force)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        compress(mlp(), task(), stopping(0), [{"stage": "tune", "epochs": 1}], tmp_path / "none" / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["fold"]


def test_the_order_of_the_issue_works(tmp_path):
    recipe = [*FULL[:1], {"stage": "cluster", "k": 4}, {"stage": "tune", "epochs": 1}, {"stage": "quantize", "epochs": 1}, {"stage": "code"}]
    with pytest.warns(UserWarning, match=r"recipe\[3\]: every weight has a codebook or scales; 'quantize' finds nothing to do"):
        table = compress(mlp(), task(), stopping(99), recipe, tmp_path / "a")
    assert len(table) == 6
    with pytest.warns(UserWarning): compress(mlp(), None, None, [{"stage": "quantize"}, {"stage": "quantize"}], tmp_path / "b")


@pytest.mark.parametrize("late, words", [
    ({"stage": "quantize", "names": "9.weight"}, r"recipe\[2\]: names: '9.weight' matches none"),
    ({"stage": "cluster", "k": {"0.wieght": 2}}, r"recipe\[2\]: names: '0.wieght' matches none of 4 names; the nearest is '0.weight'"),
    ({"stage": "quantize", "names": "0.weight"}, r"recipe\[2\]: names: weights without a codebook or scales"),
])
def test_names_are_checked_before_anything_runs(tmp_path, late, words):
    recipe = [{"stage": "cluster", "k": 3, "names": "0.weight"}, {"stage": "tune", "epochs": 1}, late]
    with pytest.raises(ValueError, match=words): compress(mlp(), task(), stopping(0), recipe, tmp_path / "a")
    assert not [*tmp_path.iterdir()]


def test_an_error_in_a_stage_has_its_number(tmp_path):
    with pytest.raises(ValueError, match=r"recipe\[1\]: 0.weight: k: .* at most 160"):
        compress(mlp(), None, None, [{"stage": "prune", "sparsity": 0}, {"stage": "cluster", "k": 500}], tmp_path / "a")


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)
    def forward(self, x): return self.out(self.attend(x, x, x, need_weights=False)[0]).mean(1)


@pytest.mark.parametrize("build, x, y, loss", [
    (Attending, torch.randn(12, 5, 8), torch.randint(3, (12,)), F.cross_entropy),
    (lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 3), nn.Flatten(), nn.LazyLinear(3)), torch.randn(12, 2, 4, 4), torch.randint(3, (12,)), F.cross_entropy),
], ids=["attention", "transposed convolution"])
def test_every_weight_is_trained_on_its_grid(tmp_path, build, x, y, loss):
    set_seed(0)
    model = build()
    model(x)
    compress(model, (x, y), loss, [{"stage": "prune", "sparsity": .5}, {"stage": "quantize", "bits": 4, "epochs": 2}, {"stage": "code"}], tmp_path / "a")
    fresh = copy.deepcopy(model)
    load_model(fresh, Archive(tmp_path / "a"))
    for name, p in model.named_parameters():
        if p.ndim < 2: continue
        assert int(Archive(tmp_path / "a").form(name).codes.abs().max()) <= 7
        assert int((fresh.get_parameter(name) == 0).sum()) >= p.numel() // 2


def test_the_table_has_the_sizes_of_files(tmp_path):
    model, data = mlp(), task()
    save_model(model, tmp_path / "dense")
    recipe = [{"stage": "prune", "sparsity": .9}, {"stage": "code"}]
    table = compress(model, None, None, recipe, tmp_path / "a", test=data, metrics={"loss": F.cross_entropy})
    compress(model, None, None, recipe[:1], tmp_path / "b")
    assert table["bytes"].tolist() == [os.path.getsize(tmp_path / name) for name in ("dense", "b", "a")]
    assert table["rate"].iloc[0] == 1 and table["loss"].iloc[0] == pytest.approx(F.cross_entropy(model(data[0]), data[1]).item())


def test_data_are_told_apart_by_their_tensors():
    x, y = task()
    split, loader = (x, y), DataLoader(TensorDataset(x, y), 16)
    assert _digest(split) == _digest(loader) == _digest(SimpleNamespace(train=split)) != _digest((x, y + 1))
    assert _digest((x.to(torch.complex128), y)) == _digest((None, y))  # a file has no such type, nor a check


def test_loaders_train_too(tmp_path):
    loader = DataLoader(TensorDataset(*task()), 16)
    compress(mlp(), loader, F.cross_entropy, [{"stage": "tune", "epochs": 1}, {"stage": "code"}], tmp_path / "a")


@pytest.mark.parametrize("recipe, error, words", [
    ([], ValueError, "at least one stage"),
    ("nothing.json", FileNotFoundError, "nothing.json"),
    ({"other": []}, TypeError, "a list of dictionaries"),
    (["prune"], TypeError, "a list of dictionaries"),
    ([{"sparsity": .5}], TypeError, r"recipe\[0\]: stage: one of 'prune'"),
    ([{"stage": "huffman"}], ValueError, f"one of {', '.join(map(repr, STAGES))}"),
    ([{"stage": "quantise"}], ValueError, "did you mean 'quantize'"),
    ([{"stage": "prune"}], ValueError, "the option 'sparsity'"),
    ([{"stage": "code", "k": 2}], ValueError, "an option of 'code'"),
    ([{"stage": "code"}, {"stage": "prune", "sparsity": 1}], ValueError, r"recipe\[1\]: sparsity"),
    ([{"stage": "prune", "sparsity": "much"}], TypeError, "sparsity: a number"),
    ([{"stage": "prune", "sparsity": {"a": 2}}], ValueError, "sparsity"),
    ([{"stage": "prune", "sparsity": {"a": .5}, "names": "a"}], ValueError, "names: None with options by name"),
    ([{"stage": "prune", "sparsity": {"a": .5}, "scope": "global"}], ValueError, "scope: 'layer'"),
    ([{"stage": "prune", "sparsity": .5, "scope": "across"}], ValueError, "one of 'layer', 'global'"),
    ([{"stage": "cluster", "k": 0}], ValueError, "k: a whole number of at least 1"),
    ([{"stage": "cluster", "k": 2.5}], TypeError, "k: a whole number"),
    ([{"stage": "cluster", "k": 4, "init": "random"}], ValueError, "init"),
    ([{"stage": "tune", "epochs": 0}], ValueError, "epochs"),
    ([{"stage": "tune", "epochs": 1, "lr": -1}], ValueError, "lr"),
    ([{"stage": "quantize", "bits": 9}], ValueError, "bits"),
    ([{"stage": "quantize", "group_size": 0}], ValueError, "group_size"),
    ([{"stage": "round", "dtype": "int8"}], ValueError, "dtype"),
    ([{"stage": "code"}, {"stage": "tune", "epochs": 1}], ValueError, r"recipe\[1\]: no 'tune' after 'code'"),
    ([{"stage": "quantize"}, {"stage": "cluster", "k": 2}], ValueError, "no 'cluster' after 'quantize'"),
    ([{"stage": "round"}, {"stage": "quantize", "epochs": 1}], ValueError, r"recipe\[1\]: no 'quantize' with epochs after 'round'"),
    ([{"stage": "quantize", "names": "0.weight"}, {"stage": "code"}, {"stage": "quantize", "epochs": 1}], ValueError, r"recipe\[2\]: no 'quantize' with"),
    ([{"stage": "tune", "epochs": 1}], ValueError, "data and a loss"),
    ([{"stage": "cluster", "k": 500}], ValueError, "at most 160, the number of distinct values"),
    ([{"stage": "prune", "sparsity": .5, "names": "9.weight"}], ValueError, "matches none"),
    ([{"stage": "cluster", "k": 4}, {"stage": "quantize", "names": "0.weight"}], ValueError, "without a codebook or scales"),
    ([{"stage": "cluster", "k": 4}, {"stage": "cluster", "k": 2}], ValueError, r"recipe\[1\]: names: at least one weight without a codebook"),
])
def test_recipes_that_are_refused(tmp_path, recipe, error, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=words): compress(model, None, None, recipe, "a")
    assert not os.path.exists("a") and all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_recipes_in_files(tmp_path):
    rows = [{"stage": "prune", "sparsity": {"0.weight": .5}}, {"stage": "code"}]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    (tmp_path / "s.json").write_text(json.dumps({"stages": rows}))
    (tmp_path / "r.toml").write_text('[[stages]]\nstage = "prune"\nsparsity = {"0.weight" = 0.5}\n[[stages]]\nstage = "code"\n')
    for name in ("r.json", "s.json", "r.toml"): assert read_recipe(tmp_path / name) == read_recipe(rows)
    for name, text in (("bad.json", "[{"), ("bad.toml", "stages = [")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name}: a recipe in"): read_recipe(tmp_path / name)


def test_arguments_and_targets(tmp_path):
    code = [{"stage": "code"}]
    with pytest.raises(TypeError, match="a module"): compress({"a": 1}, None, None, code, tmp_path / "a")
    with pytest.raises(ValueError, match="data for the metrics"): compress(mlp(), None, None, code, tmp_path / "a", metrics={"loss": F.cross_entropy})
    for metrics in (["e"], {"e": 3}):
        with pytest.raises(TypeError, match="metrics: a dictionary of functions"): compress(mlp(), None, None, code, tmp_path / "a", metrics=metrics)
    (tmp_path / "r.json").write_bytes(b"[\xff]")
    with pytest.raises(ValueError, match="r.json: a recipe in JSON is expected"): read_recipe(tmp_path / "r.json")
    (tmp_path / "r.json").unlink()
    with pytest.raises(FileNotFoundError, match="no folder"): compress(mlp(), None, None, code, tmp_path / "none" / "a")
    (tmp_path / "a").write_text("mine")
    with pytest.raises(FileExistsError, match="force=True"): compress(mlp(), None, None, code, tmp_path / "a")
    assert (tmp_path / "a").read_text() == "mine" and len([*tmp_path.iterdir()]) == 1
    compress(mlp(), None, None, code, tmp_path / "a", force=True)
    Archive(tmp_path / "a")
    model = mlp()
    with torch.no_grad(): model[0].bias[0] = 1e6
    with pytest.raises(ValueError, match="0.bias: numbers that float16 has"): compress(model, None, None, [{"stage": "round"}], tmp_path / "b")


TASK = """
import os, torch, torch.nn.functional as F
from torch import nn

def loss(output, y):
    if "STEPS" in os.environ:
        os.environ["STEPS"] = str(int(os.environ["STEPS"]) - 1)
        if os.environ["STEPS"] == "0": os._exit(9)
    return F.cross_entropy(output, y)

def task():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, 6)), (torch.randn(64, 8), torch.randint(6, (64,))), loss

def wrong(): return 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(mlp(), "model.safetensors")
    (tmp_path / "few.json").write_text(json.dumps([{"stage": "prune", "sparsity": .5}, {"stage": "cluster", "k": 4}, {"stage": "code"}]))
    (tmp_path / "full.json").write_text(json.dumps(FULL[:4]))
    (tmp_path / "tasks.py").write_text(TASK)
    return tmp_path


def shell(*words, **variables):
    return subprocess.run([sys.executable, "-c", "from sharetie.command import main; main()", *words], capture_output=True, text=True, env=os.environ | variables)


@pytest.mark.long
def test_the_commands_in_a_shell(folder):
    done = shell("compress", "model.safetensors", "small", "--recipe", "few.json")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:-1]] == [["dense", "1520"], ["1", "prune"], ["2", "cluster"], ["3", "code"]]
    assert done.stdout.splitlines()[-1].startswith("small: 1.5 kB became ")
    again = shell("compress", "model.safetensors", "small", "--recipe", "few.json")
    assert [again.returncode, again.stdout] == [2, ""]
    assert again.stderr == "Error: small: a new file is expected, this one exists; --force replaces it\n"
    done = CliRunner().invoke(main, ["decompress", "small", "plain.safetensors"])
    assert done.exit_code == 0 and done.output.startswith("plain.safetensors: ")
    run = _Run(mlp())
    Prune(.5)(run), Cluster(4)(run)
    assert all(torch.equal(t, load_file("plain.safetensors")[name]) for name, t in run.model.state_dict().items())


@pytest.mark.long
def test_a_killed_process_is_gone_on_with(folder):
    words = "compress", "model.safetensors", "small", "--recipe", "full.json", "--task", "tasks:task"
    done = shell(*words, STEPS="14")
    assert done.returncode == 9 and not os.path.exists("small") and os.path.exists("small.part")
    run = CliRunner().invoke(main, words)
    assert run.exit_code == 0, run.output
    whole = CliRunner().invoke(main, [*words[:2], "other", *words[3:]])
    assert whole.output.replace("other", "small") == run.output
    assert (folder / "small").read_bytes() == (folder / "other").read_bytes()


@pytest.mark.parametrize("words, line", [
    (["compress", "none", "small", "--recipe", "few.json"], "none: No such file or directory"),
    (["compress", "model.safetensors", "small", "--recipe", "none.json"], "none.json: No such file or directory"),
    (["compress", "few.json", "small", "--recipe", "few.json"], "few.json: neither safetensors nor a torch file"),
    (["compress", "model.safetensors", "small", "--recipe", "bad.json"], "recipe[0]: stage: one of 'prune'"),
    (["compress", "model.safetensors", "small", "--recipe", "full.json"], "data and a loss (at the command line: --task)"),
    (["compress", "model.safetensors", "none/small", "--recipe", "few.json"], "there is no folder"),
    (["compress", "model.safetensors", "model.safetensors", "--recipe", "few.json"], "--force replaces it"),
    (["compress", "model.safetensors", ".", "--recipe", "few.json", "--force"], ".: a file is expected, got a folder"),
    (["decompress", "model.safetensors", "."], ".: a file is expected, got a folder"),
    (["compress", "model.safetensors", "small", "--recipe", "full.json", "--task", "tasks"], "--task: module:function"),
    (["compress", "model.safetensors", "small", "--recipe", "full.json", "--task", "nothing:task"], "cannot be imported"),
    (["compress", "model.safetensors", "small", "--recipe", "full.json", "--task", "tasks:nothing"], "cannot be imported"),
    (["compress", "model.safetensors", "small", "--recipe", "full.json", "--task", "tasks:wrong"], "a function that returns model, data and loss"),
    (["decompress", "model.safetensors", "plain"], "a compressed file is expected"),
    (["decompress", "none", "plain"], "none: No such file or directory"),
    (["decompress", "model.safetensors", "few.json"], "--force replaces it"),
])
def test_errors_are_one_line_and_status_2(folder, words, line):
    (folder / "bad.json").write_text('[{"stage": "squeeze"}]')
    before = {p.name for p in folder.iterdir()}
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2 and done.output.startswith("Error: ") and line in done.output, done.output
    assert len(done.output.splitlines()) == 1 and {p.name for p in folder.iterdir()} - {"__pycache__"} == before


@pytest.mark.parametrize("code, line", [
    ("def task(): return None.nothing", "--task: 'own:task', {file}, line 1: AttributeError: 'NoneType' object has no attribute 'nothing'"),
    ("\ndef task():\n    raise RuntimeError('of two\\nlines')", "--task: 'own:task', {file}, line 3: RuntimeError: of two lines"),
    ("def task(size): pass", "--task: 'own:task': TypeError: task() missing 1 required positional argument: 'size'"),
    ("1 / 0", "--task: 'own:task' cannot be imported (ZeroDivisionError: division by zero)"),
    ("def task(:", "--task: 'own:task' cannot be imported (SyntaxError: invalid syntax (own.py, line 1))"),
])
def test_an_error_in_a_task_names_its_place(folder, monkeypatch, code, line):
    monkeypatch.delitem(sys.modules, "own", raising=False)
    (folder / "own.py").write_text(code)
    importlib.invalidate_caches()
    done = CliRunner().invoke(main, ["compress", "model.safetensors", "small", "--recipe", "full.json", "--task", "own:task"])
    assert done.exit_code == 2 and done.output == f"Error: {line.format(file=folder / 'own.py')}\n" and not os.path.exists("small")


def test_usage_json_and_help(folder):
    assert CliRunner().invoke(main, ["compress", "model.safetensors", "small"]).exit_code == 2
    done = CliRunner().invoke(main, ["compress", "model.safetensors", "small", "--recipe", "few.json", "--json"])
    held = json.loads(done.output)
    assert held["before"] == held["stages"][0]["bytes"] and held["after"] == os.path.getsize("small") and len(held["stages"]) == 4
    done = CliRunner().invoke(main, ["decompress", "small", "plain", "--json"])
    assert json.loads(done.output)["after"] == os.path.getsize("plain")
    done = CliRunner().invoke(main, ["--help"])
    assert done.exit_code == 0 and all(word in done.output for word in ("compress", "decompress", "dedup", "ties"))


def test_a_checkpoint_of_more_than_weights_is_refused_with_a_way_out(folder):
    torch.save({"model": mlp().state_dict(), "epoch": 3}, "run.pt")
    done = CliRunner().invoke(main, ["compress", "run.pt", "small", "--recipe", "few.json"])
    assert done.exit_code == 2 and "got also epoch; save its state dict by itself" in done.output and not os.path.exists("small")


def test_help_names_stages_and_options():
    text = " ".join(CliRunner().invoke(main, ["compress", "--help"]).output.split())
    assert all(f"{name} (" in text for name in STAGES) and "cluster (k, names, scope, init)" in text


def test_a_file_with_ties_is_compressed_with_them(folder):
    set_seed(0)
    save_model(words(), "words.safetensors")
    run = CliRunner().invoke(main, ["compress", "words.safetensors", "small", "--recipe", "few.json"])
    assert run.exit_code == 0, run.output
    fresh = words()
    load_model(fresh, Archive("small"))
    assert fresh.head.weight is fresh.embedding.weight and len(fresh.head.weight.unique()) == 5
    assert "head.weight" not in Archive("small").entries


@pytest.mark.parametrize("how", ["cluster_", "decode_", "hash_", "quantize_pieces_", "quantize_", "prepare_", "convert_", "factorize_",
                                 "share_basis_"])
def test_what_replaces_parameters_says_so(how):
    "Of an optimizer made before, some Parameters are no more the model's."
    model, options = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), {"cluster_": [4], "hash_": [3], "quantize_pieces_": [3, 2]}
    if how == "decode_": cluster_(model, 4)
    if how == "convert_": compression.prepare_(model)
    before, call = {id(p) for p in model.parameters()}, getattr(compression, how)
    call(model, *options.get(how, []), **{"factorize_": {"rank": 2}, "share_basis_": {"names": "*", "rank": 2}}.get(how, {}))
    replaced = not before <= {id(p) for p in model.parameters()}
    assert replaced == ("Make the optimizer after." in " ".join(call.__doc__.split())) == (how != "prepare_")
