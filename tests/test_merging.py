"Merging: exact for copies and where the rest spans the outputs; draws against enumeration; refusals."
import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sharetie.masks import magnitude, prune_
from sharetie.merging import diverse, greedy_map, merge_similar_, prune_units_, sample_kdpp, similarity_kernel
from sharetie.nodes import brute_force, least
from sharetie.results import set_seed
from sharetie.shrinking import remove_units_
from sharetie.ties import Transpose, find_ties, load_model, save_model, tie_
from sharetie.tracing import trace_units
from tied import TIED, TIED_LAYERS, functional


def mlp(act=nn.ReLU): return nn.Sequential(nn.Linear(4, 6), act(), nn.Linear(6, 5), act(), nn.Linear(5, 3)).double()


class Conv(nn.Module):
    "Channels behind a norm, read by two layers, one behind a flattening."
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(1, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Conv2d(5, 2, 3, padding=1)
        self.c, self.d = nn.Linear(5 * 16, 3), nn.Linear(2 * 16, 3)
    def forward(self, x):
        x = self.norm(self.a(x)).sigmoid()
        return self.c(x.flatten(1)) + self.d(self.b(x).flatten(1))


def conv():
    set_seed(0)
    model, x = Conv().double(), torch.randn(8, 1, 4, 4).double()
    for _ in range(3): model.train()(x + 1)
    return model.eval(), x


def widened():
    "Channels 3 and 4 say what 0 and 1 do, with reading weights of their own."
    model, x = conv()
    with torch.no_grad():
        for t in (model.a.weight, model.a.bias, model.norm.weight, model.norm.bias, model.norm.running_mean, model.norm.running_var):
            t[3:] = t[:2]
    return model, x


def test_copies_are_merged_exactly_without_data():
    model, x = widened()
    expected = model(x)
    table = merge_similar_(model, "a", 2, x)
    torch.testing.assert_close(model(x), expected)
    assert {frozenset(p) for p in table[["kept", "gone"]].values.tolist()} == {frozenset({0, 3}), frozenset({1, 4})}
    assert table["saliency"].max() < 1e-20 and model.norm.num_features == 3 and model.c.in_features == 48


@pytest.mark.parametrize("factor", [.2, 3.])
def test_multiples_before_relu(factor):
    set_seed(1)
    model, x = mlp(), torch.randn(9, 4).double()
    with torch.no_grad():
        for t in (model[0].weight, model[0].bias): t[5] = factor * t[2]
    expected, other = model(x), copy.deepcopy(model)
    table = merge_similar_(model, "0", 1, x, scaled=True)
    torch.testing.assert_close(model(x), expected)
    assert {*table[["kept", "gone"]].values[0]} == {2, 5}
    merge_similar_(other, "0", 1, x)
    assert (other(x) - expected).abs().max() > 1e-6


def test_saliency_by_hand():
    "The first merge is the least of all pairs; the second sees the new columns."
    set_seed(2)
    model, x = mlp(nn.Tanh), torch.randn(2, 4).double()
    w, a = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach(), model[2].weight.detach().clone()
    alive, rows = {*range(6)}, []
    for _ in range(3):
        costs = {(i, j): ((w[i] - w[j]) ** 2).sum().item() * (a[:, j] ** 2).mean().item() for i, j in itertools.permutations(alive, 2)}
        i, j = min(costs, key=costs.get)
        rows.append((i, j, costs[i, j]))
        a[:, i] += a[:, j]
        alive.remove(j)
    table = merge_similar_(model, "0", 3, x)
    np.testing.assert_allclose(table.values, rows)
    torch.testing.assert_close(model[2].weight.detach(), a[:, sorted(alive)])


@pytest.mark.parametrize("go", [[1], [0, 4], [1, 3, 4]])
def test_least_squares_against_numpy(go):
    set_seed(3)
    model, x = mlp(nn.Tanh), torch.randn(40, 4).double()
    keep = [k for k in range(6) if k not in go]
    v, w = model[1](model[0](x)).detach().numpy(), model[2].weight.detach().numpy().copy()
    b = np.linalg.lstsq(v[:, keep], v[:, go], rcond=None)[0]
    lost = prune_units_(model, {"0": go}, x)
    np.testing.assert_allclose(model[2].weight.detach(), w[:, keep] + w[:, go] @ b.T, atol=1e-8)
    np.testing.assert_allclose(lost["2"], np.sum((v[:, keep] @ b - v[:, go]) ** 2) / np.sum(v[:, go] ** 2), rtol=1e-6)


def test_nothing_is_lost_where_the_rest_spans_the_outputs():
    model, x = widened()
    expected = model(x)
    lost = prune_units_(model, {"a": [3, 1]}, x)
    assert set(lost) == {"b", "c"} and max(lost.values()) < 1e-12
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    deep = nn.Sequential(nn.Linear(3, 7, bias=False), nn.Linear(7, 2)).double()
    x = torch.randn(20, 3).double()
    expected = deep(x)
    assert prune_units_(deep, {"0": [0, 2, 4, 6]}, x)["1"] < 1e-12  # 3 are left, and the rank is 3
    torch.testing.assert_close(deep(x), expected)


def test_merging_never_loses_more_than_dropping():
    "In what the reader gets, squared, over the data that it learned from."
    for seed in range(4):
        set_seed(seed)
        model, x = mlp(), torch.randn(30, 4).double()
        got, results = model[2](model[1](model[0](x))), {}
        go = torch.randperm(6)[:3].tolist()
        for merge in (False, True):
            small = copy.deepcopy(model)
            prune_units_(small, {"0": go}, x, merge=merge)
            results[merge] = (small[:3](x) - got).square().sum().item()
        assert results[True] < results[False]


def test_every_choice_can_be_merged():
    model, x = conv()
    data = x, torch.randn(8, 3).double()
    for units in (least(brute_force(model, data, F.mse_loss), .4), diverse(model, data, .4),
                  diverse(model, data, .4, generator=torch.Generator().manual_seed(0))):
        small = copy.deepcopy(model)
        lost = prune_units_(small, units, x)
        assert small(x).shape == (8, 3) and len(units["a"]) == 2 and all(0 <= v <= 1 + 1e-9 for v in lost.values())


def kernels():
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(5, 5, generator=draw).double()
    return {"full": a @ a.T, "scaled": 1e6 * a @ a.T, "rank 3": a[:, :3] @ a[:, :3].T, "diagonal": torch.diag(torch.tensor([1., 2, 3, 4, 5])),
            "similar": similarity_kernel(torch.randn(20, 5, generator=draw), beta=.02)}


@pytest.mark.long
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("name", kernels())
def test_draws_against_enumeration(name, k):
    "Marginals of 500 draws, within five standard errors of those of all sets."
    L, n = kernels()[name], 500
    sets = list(itertools.combinations(range(5), k))
    p = torch.stack([torch.linalg.det(L[list(s)][:, list(s)].double()) for s in sets]).clamp(min=0)
    p = p / p.sum()
    exact = torch.zeros(5, dtype=p.dtype)
    for s, q in zip(sets, p): exact[list(s)] += q
    generator, found = torch.Generator().manual_seed(1), torch.zeros(5, dtype=p.dtype)
    for _ in range(n):
        drawn = sample_kdpp(L, k, generator)
        assert len(drawn) == len(set(drawn)) == k
        found[drawn] += 1 / n
    assert ((found - exact).abs() <= 5 * (exact * (1 - exact) / n).sqrt() + 1e-9).all()


@pytest.mark.parametrize("k", [1, 2, 4])
def test_greedy_map_takes_the_best_next_unit(k):
    L = kernels()["full"]
    taken = []
    for _ in range(k):
        gains = {i: torch.linalg.det(L[taken + [i]][:, taken + [i]]).item() for i in range(5) if i not in taken}
        taken.append(max(gains, key=gains.get))
    assert greedy_map(L, k) == taken


def test_kernel_by_hand():
    v = torch.tensor([[0., 1, 0], [2, 0, 2]])
    L = similarity_kernel(v, beta=.5, eps=.1)
    near = math.exp(-.5 * 5)
    torch.testing.assert_close(L, torch.tensor([[1.1, near, 1], [near, 1.1, near], [1, near, 1.1]], dtype=torch.float64))
    assert similarity_kernel(v)[0, 1].item() == pytest.approx(math.exp(-5 * 5))


def test_copies_are_not_kept_together():
    model, x = widened()
    for generator in (None, torch.Generator().manual_seed(0)):
        keep = {*range(5)} - {*diverse(model, (x, torch.zeros(8, 3).double()), .4, ["a"], beta=1., generator=generator)["a"]}
        assert len(keep & {0, 3}) == len(keep & {1, 4}) == 1


def tied(kind):
    set_seed(0)
    if kind == "transposed":
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
        tie_(model, ["0.weight", "2.weight"], map=Transpose())
        return model, "0", torch.randn(9, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[4].weight = model[2].weight
    return model, "0", torch.randn(9, 4)


@pytest.mark.parametrize("kind", ["transposed", "shared"])
def test_tied_readers_refuse_to_merge_and_can_be_removed(kind):
    model, layer, x = tied(kind)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    for call in (lambda: prune_units_(model, {layer: [1]}, x), lambda: merge_similar_(model, layer, 1, x[:2])):
        with pytest.raises(ValueError, match="model: "): call()
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    prune_units_(model, {layer: [1]}, x, merge=False)
    assert model(x).isfinite().all()


def test_a_failure_after_teaching_takes_all_back():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        def forward(self, x): return self.b(self.a(x).view(len(x), 6))
    model, x = Written(), torch.randn(9, 4)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    for call in (lambda: prune_units_(model, {"a": [1]}, x), lambda: merge_similar_(model, "a", 1, x)):
        with pytest.raises(ValueError, match="cannot do without them"): call()
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_optimizer_files_and_parameters_follow(tmp_path):
    set_seed(0)
    model, x = mlp().float(), torch.randn(9, 4)
    before, optimizer = list(model.parameters()), torch.optim.Adam(model.parameters())
    model(x).square().sum().backward()
    optimizer.step()
    prune_units_(model, {"0": [1, 2], "2": [0]}, x, optimizer=optimizer)
    merge_similar_(model, "0", 1, x, optimizer=optimizer)
    assert all(a is b for a, b in zip(before, model.parameters()))
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters())
    save_model(model, tmp_path / "m.safetensors")
    fresh = mlp().float()
    remove_units_(fresh, {"0": [0, 1, 2], "2": [0]}, x)
    load_model(fresh, tmp_path / "m.safetensors")
    torch.testing.assert_close(fresh(x), model(x))


@pytest.mark.parametrize("call, error, message", [
    (lambda m, x: merge_similar_(m, "0", 6, x), ValueError, "from 0 to 5"), (lambda m, x: merge_similar_(m, "1", 1, x), ValueError, "layer: one of"),
    (lambda m, x: merge_similar_(m, "4", 1, x), ValueError, "cannot be removed"), (lambda m, x: merge_similar_(m, "0", 1), ValueError, "inputs"),
    (lambda m, x: prune_units_(m, {"0": range(6)}, x), ValueError, "at least one of 6 units left"), (lambda m, x: prune_units_(m, {"9": [1]}, x), ValueError, "units: one of"),
    (lambda m, x: diverse(m, (x, x), 2.), ValueError, "sparsity: a finite number from 0 to 1 is expected, got 2"), (lambda m, x: diverse(m, x, .5), TypeError, "data: a pair"),
    (lambda m, x: sample_kdpp(torch.eye(3), 4), ValueError, "from 1 to 3"), (lambda m, x: sample_kdpp(torch.eye(3), 0), ValueError, "from 1 to 3"),
    (lambda m, x: sample_kdpp(torch.ones(3, 3), 2), ValueError, "of rank 2 or more"), (lambda m, x: greedy_map(-torch.eye(3), 1), ValueError, "positive semidefinite"),
    (lambda m, x: greedy_map(torch.ones(2, 3), 1), ValueError, "symmetric"), (lambda m, x: greedy_map(torch.tensor([[1., math.nan], [math.nan, 1.]]), 1), ValueError, "NaN"),
    (lambda m, x: similarity_kernel(torch.ones(3)), ValueError, "2 axes"), (lambda m, x: similarity_kernel(torch.ones(3, 2), beta=0), ValueError, "beta"),
    (lambda m, x: similarity_kernel(torch.tensor([[1., math.nan]])), ValueError, "NaN")])
def test_bad_input(call, error, message):
    set_seed(0)
    model, x = mlp(), torch.randn(5, 4).double()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(error, match=message): call(model, x)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def copied(*tensors, of=0, to=1):
    "Let one index be another's copy."
    with torch.no_grad():
        for t in tensors: t[to] = t[of]


def test_copies_read_by_a_transposed_convolution():
    "Whose weight has what it reads on its first axis, and is none of what comes in."
    set_seed(0)
    model, x = nn.Sequential(nn.Conv2d(1, 5, 3), nn.Tanh(), nn.ConvTranspose2d(5, 2, 3)).double(), torch.randn(3, 1, 6, 6).double()
    for i in (0, 1): copied(model[0].weight, model[0].bias, of=i, to=3 + i)
    with torch.no_grad(): model[2].weight *= 9  # in these, copies are far from each other
    expected, other = model(x), copy.deepcopy(model)
    assert {frozenset(p) for p in merge_similar_(model, "0", 2, x)[["kept", "gone"]].values.tolist()} == {frozenset({0, 3}), frozenset({1, 4})}
    torch.testing.assert_close(model(x), expected)
    assert prune_units_(other, {"0": [1, 3]}, x)["2"] < 1e-20
    torch.testing.assert_close(other(x), expected)


def gated():
    "Each unit of a gate of two halves has two rows; the second unit is a copy of the first."
    set_seed(0)
    model = functional(lambda m, x: m.b(F.glu(m.a(x))), a=nn.Linear(3, 8), b=nn.Linear(4, 2)).double()
    for i in (0, 4): copied(model.a.weight, model.a.bias, of=i, to=i + 1)
    return model, torch.randn(20, 3).double()


def test_units_with_two_rows_are_one():
    model, x = gated()
    expected = model(x)
    with pytest.raises(ValueError, match="n: a whole number from 0 to 3"): merge_similar_(model, "a", 4, x)
    table = merge_similar_(model, "a", 1, x)
    torch.testing.assert_close(model(x), expected)
    assert {*table[["kept", "gone"]].values[0]} == {0, 1} and model.b.in_features == 3


@pytest.mark.parametrize("generator", [None, torch.Generator().manual_seed(0)])
def test_half_of_the_units_with_two_rows(generator):
    model, x = gated()
    gone = diverse(model, (x, x), .5, generator=generator)["a"]
    prune_units_(model, {"a": gone}, x)
    assert len(gone) == 2 and model.b.in_features == 2 and model.a.out_features == 4


def test_readers_hear_all_of_their_calls():
    set_seed(0)
    model = functional(lambda m, x: m.b(m.a(x).tanh()) - m.b(m.a(3 * x).tanh()), a=nn.Linear(3, 6), b=nn.Linear(6, 2)).double()
    x = torch.randn(30, 3).double()
    v, w = torch.cat([model.a(x).tanh(), model.a(3 * x).tanh()]).detach(), model.b.weight.detach().clone()
    b = torch.linalg.lstsq(v[:, 2:], v[:, :2]).solution
    prune_units_(model, {"a": [0, 1]}, x)
    torch.testing.assert_close(model.b.weight.detach(), w[:, 2:] + w[:, :2] @ b.T)


def test_channels_and_units_side_by_side():
    "A head reads each channel at sixteen places and each unit at one."
    set_seed(0)
    model = functional(lambda m, x: m.c(torch.cat([m.a(x).tanh().flatten(1), m.b(x.flatten(1)).tanh()], 1)),
                       a=nn.Conv2d(1, 3, 1), b=nn.Linear(16, 5), c=nn.Linear(3 * 16 + 5, 2)).double()
    x = torch.randn(40, 1, 4, 4).double()
    for layer in (model.a, model.b): copied(layer.weight, layer.bias)
    expected, other = model(x), copy.deepcopy(model)
    for layer in ("a", "b"): merge_similar_(other, layer, 1, x)
    torch.testing.assert_close(other(x), expected)
    part, w, v = copy.deepcopy(model), model.c.weight.detach()[:, 48:].clone(), model.b(x.flatten(1)).tanh().detach()
    assert prune_units_(model, {"a": [0], "b": [1]}, x)["c"] < 1e-20
    torch.testing.assert_close(model(x), expected)
    said = v[:, :4] @ torch.from_numpy(np.linalg.lstsq(v[:, :4].numpy(), v[:, 4:].numpy(), rcond=None)[0])
    lost = prune_units_(part, {"b": [4]}, x)["c"]
    torch.testing.assert_close(v[:, :4] @ part.c.weight.detach()[:, 48:].T, v[:, :4] @ w[:, :4].T + said @ w[:, 4:].T)
    np.testing.assert_allclose(lost, (said - v[:, 4:]).square().sum() / v[:, 4:].square().sum())


def test_units_read_here_and_there():
    "Each half of a layer by a layer of its own: no unit can speak for one of the other half."
    model = functional(lambda m, x: m.b(m.a(x).tanh().chunk(2, 1)[0]) + m.c(m.a(x).tanh().chunk(2, 1)[1]), a=nn.Linear(4, 6), b=nn.Linear(3, 2), c=nn.Linear(3, 2)).double()
    x = torch.randn(9, 4).double()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="layer: one whose readers read all of its units alike"): merge_similar_(model, "a", 1, x)
    with pytest.raises(ValueError, match="layers: a layer whose units are all read by one layer"): diverse(model, (x, x), .5)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    lost = prune_units_(model, {"a": [1, 4]}, x)
    assert {*lost} == {"b", "c"} and all(0 < part < 1 for part in lost.values())


def test_a_residual_layer_reads_what_it_makes():
    set_seed(0)
    model = functional(lambda m, x: m.c((h := m.a(x).tanh()) + m.b(h).tanh()), a=nn.Linear(3, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 2)).double()
    x = torch.randn(30, 3).double()
    for layer in (model.a, model.b): copied(layer.weight, layer.bias)
    expected, other = model(x), copy.deepcopy(model)
    assert {*merge_similar_(model, "a", 1, x)[["kept", "gone"]].values[0]} == {0, 1}
    torch.testing.assert_close(model(x), expected)
    assert max(prune_units_(other, {"a": [1]}, x).values()) < 1e-20
    torch.testing.assert_close(other(x), expected)


@pytest.mark.parametrize("factor", [1e-7, 1e7])
def test_the_size_of_units_does_not_matter(factor):
    "A ReLU unit that says the same, a million times softer or louder, can take over."
    set_seed(0)
    model, x = mlp(), torch.randn(50, 4).double()
    with torch.no_grad():
        for p in (model[0].weight, model[0].bias): p[1] = p[0] * factor
    expected = model(x)
    assert prune_units_(model, {"0": [0]}, x)["2"] < 1e-15
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("x, message", [(torch.ones(0, 4), "x: a tensor of one example or more"), (torch.full((5, 4), math.nan), "x, as '2' reads it: finite numbers"),
                                        (torch.full((5, 4), math.inf), "x, as '2' reads it: finite numbers"), (torch.tensor(1.), "x: a tensor of one example or more")])
def test_examples_that_teach_nothing(x, message):
    set_seed(0)
    model = mlp()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message): prune_units_(model, {"0": [1]}, x.double())
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_wide_layers_are_drawn_from_everywhere():
    "There are more sets of 550 among 1,100 than a computer has numbers for; each unit is in half of them."
    drawn = sample_kdpp(torch.eye(1100), 550, torch.Generator().manual_seed(0))
    assert len({*drawn}) == 550 and 225 < sum(i >= 550 for i in drawn) < 325


def test_draws_need_a_generator():
    with pytest.raises(TypeError, match="generator: a torch.Generator of the CPU"): sample_kdpp(torch.eye(3), 2, 0)


ALL_TIED = {**{make.__name__: (make, x) for make, x in TIED}, **{name: (make, x) for name, (make, x, _) in TIED_LAYERS.items()}}
METHODS = {"remove": lambda m, layer, x: remove_units_(m, {layer: [0]}, x), "prune": lambda m, layer, x: prune_units_(m, {layer: [0]}, x, merge=False),
           "fuse": lambda m, layer, x: prune_units_(m, {layer: [0]}, x), "similar": lambda m, layer, x: merge_similar_(m, layer, 1, x),
           "diverse": lambda m, layer, x: prune_units_(m, diverse(m, (x, x), .5, layer), x, merge=False),
           "brute force": lambda m, layer, x: prune_units_(m, least(brute_force(m, (x, x), lambda output, y: output.square().sum(), layer), .5), x, merge=False)}


SHRINK = {"Words", "words", "undeclared", "autoencoder", "Coder", "coder"}  # in others no unit is free, or is not zero where its row is
SHRINK = {"remove": SHRINK, "prune": SHRINK, "fuse": set(), "similar": set(),  # a tied weight cannot take over
          "diverse": SHRINK - {"Coder", "coder"}, "brute force": SHRINK - {"Coder", "coder"}}  # no layer reads these units


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ALL_TIED)
def test_every_method_keeps_ties_or_refuses(kind, method):
    "In each layer: either less is stored and all ties are there, or nothing has changed."
    set_seed(0)
    make, x = ALL_TIED[kind]
    whole, shrunk = make(), []
    ties, size = [tie.names for tie in find_ties(whole)], sum(p.numel() for p in whole.parameters())
    for layer in trace_units(whole, x).layers:
        model = copy.deepcopy(whole)
        state = copy.deepcopy(model.state_dict())
        try: METHODS[method](model, layer, x)
        except ValueError as error:
            assert str(error).startswith(("model: ", "units", "layer"))
            assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
        else: shrunk.append(sum(p.numel() for p in model.parameters()) < size and bool(model(x).isfinite().all()))
        assert [tie.names for tie in find_ties(model)] == ties
    assert all(shrunk) and bool(shrunk) == (kind in SHRINK[method])


def test_examples_that_the_model_cannot_take():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    with pytest.raises(ValueError, match="x: what the model can take"): prune_units_(model, {"0": [0]}, torch.zeros(4, 5))


@pytest.mark.parametrize("size", [1, 4, 50])
def test_examples_come_some_at_a_time_to_the_same_end(size):
    "Also where a batch has fewer examples than units, and where one unit is another's copy."
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3)).double(), torch.randn(23, 4).double()
    with torch.no_grad(): model[0].weight[8], model[0].bias[8] = model[0].weight[7], model[0].bias[7]
    one, parts = copy.deepcopy(model), copy.deepcopy(model)
    lost, lost_parts = prune_units_(one, {"0": [1, 3, 8]}, x)["2"], prune_units_(parts, {"0": [1, 3, 8]}, x, batch_size=size)["2"]
    assert lost_parts == pytest.approx(lost)
    torch.testing.assert_close(parts[2].weight, one[2].weight)
    for generator in (lambda: None, lambda: torch.Generator().manual_seed(1)):
        assert diverse(model, (x, x), .4, generator=generator(), batch_size=size) == diverse(model, (x, x), .4, generator=generator())
    with pytest.raises(ValueError, match="batch_size"): prune_units_(model, {"0": [1]}, x, batch_size=0)


@pytest.mark.parametrize("change, words", [(lambda m: prune_(m, magnitude(m), .5), "2.weight is masked, .* make_permanent_"),
    (lambda m: tie_(m, ["0.weight", "2.weight"], map=Transpose()), "2.weight is tied or computed, .* untie_")])
def test_the_reader_that_cannot_be_taught_says_why(change, words):
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)), torch.randn(9, 4)
    change(model)
    with pytest.raises(ValueError, match=words): prune_units_(model, {"0": [1]}, x)
    prune_units_(model, {"0": [1]}, x, merge=False)


@pytest.mark.parametrize("way", ["least squares", "similarity"])
def test_a_twin_in_a_layer_that_is_called_twice_goes_for_nothing(way):
    "It is read in one call as it is put out in the other."
    set_seed(0)
    line = nn.Linear(6, 6)
    model, x = nn.Sequential(nn.Linear(5, 6), line, nn.Tanh(), line, nn.Sigmoid(), nn.Linear(6, 3)).double(), torch.randn(40, 5).double()
    with torch.no_grad():
        for layer in (model[0], line):
            layer.weight[4], layer.bias[4] = layer.weight[1], layer.bias[1]
    before = model(x)
    if way == "similarity": assert merge_similar_(model, "0", 1, x)[["kept", "gone"]].values.tolist() == [[1, 4]]
    else: prune_units_(model, {"0": [4]}, x)
    assert model[1] is model[3] and model[1].weight.shape == (5, 5)
    torch.testing.assert_close(model(x), before)
