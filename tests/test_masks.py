"Masks: hidden entries, all roles of a tied weight, optimizers, round trips, choices by scores, bad input."
import copy
import io
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from sharetie.checking import check_ties
from sharetie.making import tie_
from sharetie.masks import (Gradual, Mask, edges, gradual_sparsity, magnitude, make_permanent_, mask_, masks_of, prune_,
                            random_scores, sparsity_of, thresholds)
from sharetie.results import set_seed
from sharetie.saving import load_model, save_model
from sharetie.views import Transpose


class Words(nn.Module):
    def __init__(self, n=12, d=6):
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(n, d), nn.Linear(d, d), nn.Linear(d, n, bias=False)
        tie_(self, ["table.weight", "head.weight"])
    def forward(self, x): return self.head(torch.tanh(self.body(self.table(x))))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.b.weight = self.a.weight
    def forward(self, x): return self.b(torch.relu(self.a(x)))


def reused():
    shared = nn.Linear(5, 5)
    return nn.Sequential(shared, nn.Tanh(), shared)


def autoencoder():
    model = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 6))
    tie_(model, ["0.weight", "2.weight"], map=Transpose())
    return model


MODELS = {"words": (Words, lambda: torch.randint(12, (4, 5))), "reused": (reused, lambda: torch.rand(4, 5)),
          "twice": (Twice, lambda: torch.rand(4, 3, 5, 5)), "autoencoder": (autoencoder, lambda: torch.rand(4, 6))}


def setting(name):
    set_seed(0)
    make, inputs = MODELS[name]
    return make(), inputs()


def matrix(rows):
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    layer.weight.data = torch.tensor(rows)
    return layer


def state(model): return {n: t.clone() for n, t in model.state_dict().items()}


def unchanged(model, before):
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[n], t) for n, t in before.items())


@pytest.mark.parametrize("name", MODELS)
def test_a_mask_is_zeros_in_all_roles(name):
    model, x = setting(name)
    masks = {n: torch.rand(w.shape) > .5 for n, w in edges(model).items()}
    by_hand = copy.deepcopy(model)
    own = dict(by_hand.named_parameters())
    with torch.no_grad():
        for n, mask in masks.items(): own[n] *= mask
    held = {id(p) for p in model.parameters()}
    mask_(model, masks)
    check_ties(model)
    assert torch.equal(model(x), by_hand(x)) and {id(p) for p in model.parameters()} == held
    assert sparsity_of(model).loc["all", "left"] == sum(int(m.sum()) for m in masks.values())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in by_hand.parameters())


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, .1, momentum=.9, weight_decay=.1),
                                  lambda p: torch.optim.SGD(p, .1, momentum=.9, nesterov=True),
                                  lambda p: torch.optim.Adam(p, .1), lambda p: torch.optim.AdamW(p, .1)])
@pytest.mark.parametrize("name", MODELS)
def test_optimizers_revive_nothing(name, make):
    model, x = setting(name)
    optimizer = make(model.parameters())
    def step():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    step()
    prune_(model, magnitude(model), .7)
    before, masks = edges(model), copy.deepcopy(masks_of(model))
    before = {n: w.clone() for n, w in before.items()}
    for _ in range(3): step()
    check_ties(model, optimizer)
    for n, w in edges(model).items():
        assert (w[~masks[n]] == 0).all() and torch.equal(masks_of(model)[n], masks[n])
        assert (w[masks[n]] != before[n][masks[n]]).any()
    plain = make_permanent_(copy.deepcopy(model))
    assert torch.equal(plain(x), model(x))


@pytest.mark.parametrize("name", MODELS)
def test_round_trips(name, tmp_path):
    model, x = setting(name)
    names = {*model.state_dict()}
    prune_(model, magnitude(model), .6)
    copied = copy.deepcopy(model)
    check_ties(copied)
    assert torch.equal(copied(x), model(x)) and not {id(p) for p in copied.parameters()} & {id(p) for p in model.parameters()}
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), model(x))
    other, _ = setting(name)
    mask_(other, {n: torch.ones_like(m) for n, m in masks_of(model).items()})
    other.load_state_dict(model.state_dict())
    check_ties(other)
    assert torch.equal(other(x), model(x))
    save_model(model, tmp_path / "m.safetensors")
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for p in fresh.parameters(): p.zero_()
    load_model(fresh, tmp_path / "m.safetensors")
    assert torch.equal(fresh(x), model(x))
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
    plain = make_permanent_(copy.deepcopy(model))
    check_ties(plain)
    assert torch.equal(plain(x), model(x)) and {*plain.state_dict()} == names and not masks_of(plain)
    save_model(plain, tmp_path / "p.safetensors")
    unpruned, _ = setting(name)
    load_model(unpruned, tmp_path / "p.safetensors")
    assert torch.equal(unpruned(x), model(x))


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("sparsity", [0, .25, .5, .9])
def test_choice_against_numpy(scope, sparsity):
    set_seed(1)
    model = nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 4))
    scores = random_scores(model, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune_(model, scores, sparsity, scope=scope)
    groups = [list(scores)] if scope == "global" else [[n] for n in scores]
    for group in groups:
        flat = np.concatenate([scores[n].numpy().ravel() for n in group])
        mask = np.concatenate([masks_of(model)[n].numpy().ravel() for n in group])
        k = round(sparsity * len(flat))
        assert (~mask).sum() == k and {*np.argsort(flat)[:k]} == {*np.flatnonzero(~mask)}


def test_pattern_and_threshold():
    set_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(8, 3))
    prune_(model, magnitude(model), pattern="2:4")
    for n, w in edges(model).items():
        assert ((w.reshape(-1, 4) != 0).sum(1) == 2).all(), n
    layer = matrix([[4., 1., 3., 2.], [-4., -1., -3., -2.]])
    found = thresholds(layer, 1)["weight"]
    assert found == pytest.approx(np.std([4, 1, 3, 2, -4, -1, -3, -2]))
    prune_(layer, magnitude(layer), threshold=found)
    assert layer.weight.tolist() == [[4, 0, 3, 0], [-4, 0, -3, 0]]
    assert thresholds(layer, 1)["weight"] == pytest.approx(np.std([4, 3, -4, -3]))


def test_what_is_out_stays_out():
    layer = matrix([[4., 1., 3., 2.]])
    prune_(layer, magnitude(layer), .5)
    prune_(layer, {"weight": torch.tensor([[0., 9, 8, 7]])}, .5)
    assert layer.weight.tolist() == [[4, 0, 3, 0]]
    mask_(layer, {"weight": torch.tensor([[False, True, True, True]])})
    assert layer.weight.tolist() == [[0, 0, 3, 0]]
    with pytest.warns(UserWarning, match="nothing is left"): prune_(layer, magnitude(layer), threshold=100.)


def test_gradual_schedule():
    for t in range(30):
        u = min(max(t - 4, 0), 20) / 20
        assert gradual_sparsity(t, .9, 20, 4, .1) == pytest.approx(.9 - .8 * (1 - u) ** 3)
    model = matrix([[float(k) for k in range(1, 11)]])
    schedule = Gradual(model, .8, steps=4, start=1, every=2)
    seen = []
    for t in range(7):
        schedule(t)
        seen.append(int((model.weight == 0).sum()))
    assert seen == [0, 0, 0, 7, 7, 8, 8]


def test_half_precision_and_autocast():
    set_seed(0)
    model = nn.Linear(8, 8).to(torch.bfloat16)
    prune_(model, magnitude(model), .5)
    assert model.weight.dtype == torch.bfloat16 and model(torch.rand(2, 8, dtype=torch.bfloat16)).isfinite().all()
    model = nn.Linear(8, 8)
    prune_(model, magnitude(model), .5)
    with torch.autocast("cpu", torch.bfloat16): model(torch.rand(2, 8)).sum().backward()
    assert (next(iter(model.parameters())).grad is not None) and (model.double().weight == 0).sum() == 32


BAD = [(dict(sparsity=1.), ValueError, "below 1"), (dict(sparsity=-.1), ValueError, "at least 0"),
       (dict(sparsity="half"), TypeError, "sparsity"), (dict(), ValueError, "one of sparsity, threshold and pattern"),
       (dict(sparsity=.5, threshold=1.), ValueError, "one of sparsity, threshold and pattern"),
       (dict(sparsity=.5, scope="row"), ValueError, "scope"), (dict(pattern="4:2"), ValueError, "n of m neighbours"),
       (dict(pattern="2:5"), ValueError, "a multiple of 5"), (dict(threshold={"other": 1.}), ValueError, "scores"),
       (dict(threshold=torch.nan), ValueError, "threshold")]


@pytest.mark.parametrize("arguments, error, words", BAD)
def test_bad_choices_change_nothing(arguments, error, words):
    model, _ = setting("words")
    before = state(model)
    with pytest.raises(error, match=words): prune_(model, magnitude(model, names="body.weight"), **arguments)
    assert unchanged(model, before)


@pytest.mark.parametrize("scores, error, words", [
    ({}, ValueError, "at least one weight"), ([1], TypeError, "a dictionary"),
    ({"table.weight": torch.full((12, 6), torch.nan)}, ValueError, "NaN or infinite"),
    ({"table.weight": torch.rand(6, 12)}, ValueError, "a tensor of shape"),
    ({"tabel.weight": torch.rand(12, 6)}, ValueError, "did you mean 'table.weight'"),
    ({"body.weight": torch.rand(6, 6), "table.weight": torch.rand(1, 2)}, ValueError, "a tensor of shape"),
    ({"table.weight": torch.rand(12, 6), "head.weight": torch.rand(12, 6)}, ValueError, "several names")])
def test_bad_scores_change_nothing(scores, error, words):
    model, _ = setting("words")
    before = state(model)
    with pytest.raises(error, match=words): prune_(model, scores, .5)
    assert unchanged(model, before)


def test_what_cannot_be_masked():
    with pytest.raises(ValueError, match="reads its weights from a list"): edges(nn.LSTM(2, 3))
    with pytest.raises(ValueError, match="parametrization first"):
        edges(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), "*")
    with pytest.raises(ValueError): edges(nn.Sequential(nn.ReLU()))
    with pytest.raises(TypeError): edges(3)
    with pytest.raises(TypeError, match="a tensor of bool"): Mask(torch.rand(3))
    with pytest.raises(TypeError, match="a tensor of bool"): mask_(nn.Linear(2, 2), {"weight": torch.rand(2, 2)})
    with pytest.raises(ValueError): thresholds(nn.Linear(2, 2), -1)
    with pytest.raises(ValueError): gradual_sparsity(1, .2, 5, initial=.5)
    with pytest.raises(ValueError): gradual_sparsity(1, 1., 5)
    with pytest.raises(ValueError): random_scores(nn.Linear(2, 2), seed=-1)
