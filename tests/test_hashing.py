"Hashing: XXH32 against a plain reading of its definition, gradients as sums, tied models, state, copies, census, bad input."
import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import nn

from sharetie.census import census
from sharetie.checking import check_ties
from sharetie.codebooks import stored_bits
from sharetie.hashing import Hashed, HashedLinear, buckets, hash_, xxh32
from sharetie.making import declared_ties, tie_
from sharetie.results import set_seed
from tied import TIED, Words


def plain_xxh32(words, seed):
    "XXH32 of fewer than four words, as its specification tells it, with Python's whole numbers."
    p2, p3, p4, p5, mask = 2246822519, 3266489917, 668265263, 374761393, 2**32 - 1
    h = (seed + p5 + 4 * len(words)) & mask
    for word in words:
        h = (h + word * p3) & mask
        h = ((h << 17 | h >> 15) & mask) * p4 & mask
    h = (h ^ h >> 15) * p2 & mask
    h = (h ^ h >> 13) * p3 & mask
    return h ^ h >> 16


word = some.integers(0, 2**32 - 1)


@settings(deadline=None)
@given(some.lists(word, min_size=1, max_size=3), word)
def test_hash_is_the_one_of_the_specification(words, seed):
    assert xxh32(*(torch.tensor([w]) for w in words), seed=seed).item() == plain_xxh32(words, seed)


def test_hash_has_the_published_value_of_abcd():
    assert xxh32(torch.tensor(int.from_bytes(b"abcd", "little"))).item() == 0xA3643705


@pytest.mark.parametrize("shape, chunk", [((7, 5), 1 << 20), ((7, 5), 10), ((4, 3, 2, 2), 1)])
def test_buckets_are_hashes_of_row_and_column(shape, chunk, monkeypatch):
    monkeypatch.setattr("sharetie.hashing._CHUNK", chunk)
    found = buckets(shape, 6, seed=3)
    assert found.shape == shape and found.dtype == torch.int32
    wanted = [[plain_xxh32([i, j], 3) % 6 + 6 * (plain_xxh32([i, j], 4) & 1) for j in range(found.flatten(1).shape[1])] for i in range(shape[0])]
    assert found.flatten(1).tolist() == wanted


def test_buckets_and_signs_are_even_and_independent():
    index = buckets((400, 500), 50, seed=0)
    count = torch.bincount(index.flatten(), minlength=100).double()
    chi = ((count - 2000) ** 2 / 2000).sum()
    assert abs(chi - 99) < 5 * (2 * 99) ** .5


def test_gradient_is_the_signed_sum_over_places():
    map, w = Hashed((6, 7), 5, seed=1), torch.randn(5).double().requires_grad_()
    assert torch.autograd.gradcheck(map, w) and torch.autograd.gradgradcheck(map, w)
    grad, code = torch.randn(6, 7).double(), map.index.long()
    map(w).backward(grad)
    wanted = torch.stack([(grad * ((code == k).double() - (code == k + 5).double())).sum() for k in range(5)])
    torch.testing.assert_close(w.grad, wanted)


def test_training_equals_that_of_an_explicit_tie():
    set_seed(0)
    layer, x, y = HashedLinear(8, 6, 9).double(), torch.randn(20, 8).double(), torch.randn(20, 6).double()
    table = torch.zeros(48, 9).double()
    code = layer.map.index.flatten().long()
    table[torch.arange(48), code % 9] = 1 - 2 * (code // 9).double()
    w, b = (p.detach().clone().requires_grad_() for p in (layer.values, layer.bias))
    sgd = [torch.optim.SGD(p, .1, momentum=.9) for p in (layer.parameters(), [w, b])]
    for _ in range(5):
        outputs = layer(x), F.linear(x, (table @ w).view(6, 8), b)
        for out, optimizer in zip(outputs, sgd):
            optimizer.zero_grad()
            F.mse_loss(out, y).backward()
            optimizer.step()
    torch.testing.assert_close(layer.values.detach(), w.detach())


def test_state_holds_numbers_and_seed_and_brings_its_hash():
    set_seed(0)
    a, b, x = HashedLinear(8, 6, 9, seed=1), HashedLinear(8, 6, 9, seed=2), torch.randn(3, 8)
    assert not torch.equal(a.map.index, b.map.index)
    b.load_state_dict(a.state_dict())
    for other in (b, copy.deepcopy(a)): assert torch.equal(other(x), a(x))
    assert sum(t.numel() for t in a.state_dict().values()) == 9 + 6 + 1


def test_a_layer_without_memory_is_filled_from_a_state():
    layer, x = HashedLinear(8, 6, 9, seed=5), torch.randn(3, 8)
    for assign in (False, True):
        with torch.device("meta"): empty = HashedLinear(8, 6, 9)
        assert empty.weight.is_meta and "not there yet" in repr(empty) and "seed=5" in repr(layer)
        if not assign: empty.to_empty(device="cpu")
        empty.load_state_dict(layer.state_dict(), assign=assign)
        assert torch.equal(empty(x), layer(x))


def test_scale_is_that_of_the_used_inputs():
    set_seed(0)
    for k in (200, 40_000): assert .9 < HashedLinear(400, 100, k).weight.std() / 400 ** -.5 * 3 ** .5 < 1.1


def test_census_counts_numbers_once():
    table = census(nn.Sequential(HashedLinear(20, 30, 17), nn.ReLU(), nn.Linear(30, 2)), torch.rand(2, 20))
    assert (table["0.values"].stored, table["0.values"].used) == (17, 600)


@pytest.mark.parametrize("build, x", TIED)
@pytest.mark.parametrize("values", ["fresh", "nearest"])
def test_tied_models_are_hashed_once_and_stay_tied(build, x, values):
    set_seed(1)
    model = build()
    weight, = [p for p in model.parameters() if p.ndim > 1]
    others, n = sum(p.numel() for p in model.parameters()) - weight.numel(), weight.numel()
    hash_(model, 4, values=values)
    k = round(n / 4)
    assert sum(p.numel() for p in model.parameters()) == others + k and stored_bits(model) == 32 * (others + k) + 64  # the seed too
    for other in (copy.deepcopy(model), hash_(build(), 4, seed=9)):
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), model(x))
        assert sum(p.numel() for p in other.parameters()) == others + k
    before = model(x)
    before.square().sum().backward()
    with torch.no_grad():
        for p in model.parameters(): p -= .01 * p.grad
    assert not torch.equal(before, model(x))


def test_a_factor_of_one_may_still_collide_and_the_nearest_is_nearest():
    set_seed(0)
    layer = nn.Linear(10, 12)
    near = hash_(copy.deepcopy(layer), 6, values="nearest")
    map, source = near.parametrizations.weight[0], near.parametrizations.weight.original
    table = torch.stack([map(e).flatten() for e in torch.eye(map.k)], 1)
    wanted = torch.linalg.lstsq(table, layer.weight.detach().flatten()[:, None], driver="gelsd").solution[:, 0]
    torch.testing.assert_close(source.detach(), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_compiles():
    layer, x = HashedLinear(8, 6, 9), torch.randn(3, 8)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), layer(x))


def mlp(): return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.parametrize("build, options, error, text", [
    (mlp, dict(factor=.5), ValueError, "factor: a finite number of at least 1"),
    (mlp, dict(factor=float("nan")), ValueError, "factor: "),
    (mlp, dict(factor="4"), TypeError, "factor: a number"),
    (mlp, dict(factor=2, values="nearset"), ValueError, "did you mean 'nearest'"),
    (mlp, dict(factor=2, names="9.weight"), ValueError, "matches none"),
    (mlp, dict(factor=2, seed=-1), ValueError, "seed: "),
    (lambda: nn.LSTM(2, 2), dict(factor=2), ValueError, "RNNBase"),
    (lambda: hash_(mlp(), 2), dict(factor=2, names="*original"), ValueError, "computed from"),
    (lambda: 3, dict(factor=2), TypeError, "module"),
])
def test_refuses_and_changes_nothing(build, options, error, text):
    model = build()
    before = {} if model == 3 else {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(error, match=text): hash_(model, **options)
    after = {} if model == 3 else model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("call, error, text", [
    (lambda: HashedLinear(0, 3, 2), ValueError, "inputs: "),
    (lambda: HashedLinear(3, 3, 0), ValueError, "k: "),
    (lambda: HashedLinear(3, 3, 2, seed=2**32), ValueError, "seed: "),
    (lambda: HashedLinear(3, 3, 2)(torch.zeros(2, 4)), ValueError, "x: a tensor of shape"),
    (lambda: Hashed((2, 2), 3)(torch.zeros(4)), ValueError, "values: a tensor of shape"),
    (lambda: Hashed((2, 0), 3), ValueError, "shape: "),
    (lambda: xxh32(torch.tensor([2**32])), ValueError, "numbers from 0"),
    (lambda: xxh32(torch.tensor([1.])), TypeError, "whole numbers"),
    (lambda: xxh32(), ValueError, "one to three"),
    (lambda: buckets((3, 3), 2.), TypeError, "k: "),
])
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text): call()


def test_declared_ties_follow():
    model = Words()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    tie_(model, ["embedding.weight", "head.weight"])
    hash_(model, 4)
    check_ties(model)
    (name,) = {d.names for d in declared_ties(model)}
    assert all(n.endswith("original") for n in name) and model.embedding.weight.equal(model.head.weight)
