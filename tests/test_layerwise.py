"Layer-wise surgery: against plain loops and published code's form, brute force, tied models, convolutions, cascades, bad input that changes nothing."
import copy
import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sharetie.layerwise
from sharetie.checking import check_ties
from sharetie.embeddings import ScaledEmbedding
from sharetie.layerwise import _METHODS as METHODS, calibrate, layerwise_, prune_rows, refit
from sharetie.masks import edges, magnitude, masks_of, prune_, sparsity_of
from tied import Convs, Speaker, autoencoder, reused


def problem(r=5, d=12, m=40, seed=0):
    torch.manual_seed(seed)
    X = torch.randn(m, d).double() @ (torch.eye(d) + .3 * torch.randn(d, d)).double()
    return torch.randn(r, d).double(), X.T @ X / m


def lost(W, new, H): return ((W - new) @ H * (W - new)).sum().item()


def published(W, H, sparsity, limit, block):
    "The loop of SparseGPT's published code, with the Cholesky factor of the inverse."
    W, d = W.clone(), W.shape[1]
    U, mask = torch.linalg.cholesky(torch.linalg.inv(H), upper=True), torch.ones_like(W, dtype=torch.bool)
    for s in range(0, d, block):
        e = min(s + block, d)
        if limit is None:
            scores = (W[:, s:e] / U.diagonal()[s:e]).square()
            n = round(sparsity * W.shape[0] * e) - round(sparsity * W.shape[0] * s)
            mask[:, s:e] = scores.flatten().argsort(stable=True).argsort(stable=True).view_as(scores) >= n
        for j in range(s, e):
            if limit is not None and j % limit[1] == 0:
                scores = (W[:, j:j + limit[1]] / U.diagonal()[j:j + limit[1]]).square()
                mask[:, j:j + limit[1]] = scores.argsort(1).argsort(1) >= limit[1] - limit[0]
            err = W[:, j] * ~mask[:, j] / U[j, j]
            W[:, j:] -= err[:, None] * U[j, j:]
    return W * mask, mask


@pytest.mark.parametrize("block", [1, 4, 5, 12])
def test_block_is_the_published_loop(block):
    W, H = problem()
    new, mask = prune_rows(W, H, .4, damp=0, block=block)
    wanted, kept = published(W, H, .4, None, block)
    assert torch.equal(mask, kept) and int((~mask).sum()) == round(.4 * W.numel())
    torch.testing.assert_close(new, wanted)


@pytest.mark.parametrize("block", [1, 4, 12, 100])
@pytest.mark.parametrize("pattern, limit", [("2:4", (2, 4)), ("1:3", (1, 3))])
def test_block_with_a_pattern_is_the_published_loop(pattern, limit, block):
    W, H = problem()
    new, mask = prune_rows(W, H, pattern=pattern, damp=0, block=block)
    wanted, kept = published(W, H, None, limit, 12)
    assert torch.equal(mask, kept) and (mask.view(5, -1, limit[1]).sum(2) == limit[0]).all()
    torch.testing.assert_close(new, wanted)


def plain_row(w, H, n, limit=None):
    "The surgeon in one row, weight by weight, with inverses made anew."
    w, left, costs = w.clone(), list(range(len(w))), []
    for _ in range(n):
        inverse, best = torch.linalg.inv(H[left][:, left]), None
        for a, q in enumerate(left):
            if limit and sum(q // limit[1] == other // limit[1] for other in left) <= limit[0]: continue
            cost = (w[q] ** 2 / inverse[a, a]).item()
            if best is None or cost < best[0]: best = cost, a
        cost, a = best
        w[left] -= w[left[a]] / inverse[a, a] * inverse[:, a]
        w[left.pop(a)] = 0
        costs.append(cost)
    return w, costs


def test_greedy_is_the_plain_surgeon_in_every_row():
    W, H = problem()
    new, mask = prune_rows(W, H, .5, method="greedy", damp=0)
    assert int(mask.sum()) == 30
    total = 0
    for w, own, kept in zip(W, new, mask):
        plain, costs = plain_row(w, H, int((~kept).sum()))
        torch.testing.assert_close(own, plain, atol=1e-8, rtol=1e-6)
        total += sum(costs)
    assert lost(W, new, H) == pytest.approx(total)
    all_costs = [plain_row(w, H, 12)[1] for w in W]  # no other share of removals among the rows is cheaper, costs rising
    assert lost(W, new, H) <= sum(sum(costs[:6]) for costs in all_costs) + 1e-9


def test_greedy_with_a_pattern_is_the_plain_surgeon():
    W, H = problem()
    new, mask = prune_rows(W, H, pattern="2:4", method="greedy", damp=0)
    assert (mask.view(5, 3, 4).sum(2) == 2).all()
    for w, own in zip(W, new): torch.testing.assert_close(own, plain_row(w, H, 6, (2, 4))[0], atol=1e-8, rtol=1e-6)


def test_once_is_one_ranking_and_the_best_values():
    W, H = problem()
    new, mask = prune_rows(W, H, .3, method="once", damp=0)
    rises = W.square() / torch.linalg.inv(H).diagonal()
    assert rises[~mask].max() <= rises[mask].min() and int((~mask).sum()) == 18
    torch.testing.assert_close(new, refit(W, H, mask))


def test_refit_is_least_squares_and_brute_force_bounds_all():
    W, H = problem(2, 8)
    sets = torch.zeros(70, 8, dtype=torch.bool).scatter_(1, torch.tensor([*itertools.combinations(range(8), 4)]), True)
    for w in W:
        best = min(lost(w[None], refit(w[None], H, s[None]), H) for s in sets)
        for method in METHODS: assert best <= lost(w[None], prune_rows(w[None], H, .5, method=method, damp=0)[0], H) + 1e-12


def test_on_average_exact_beats_fixed_beats_magnitude():
    totals = dict.fromkeys((*METHODS, "magnitude"), 0)
    for seed in range(10):
        W, H = problem(8, 16, 100, seed)
        for method in METHODS: totals[method] += lost(W, prune_rows(W, H, .5, method=method)[0], H)
        totals["magnitude"] += lost(W, W * (W.abs() >= W.abs().flatten().median()), H)
    assert totals["greedy"] < totals["block"] < totals["magnitude"] and totals["greedy"] < totals["once"] < totals["magnitude"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{"sparsity": .5}, {"pattern": "2:4"}])
def test_what_is_out_stays_out(method, options):
    W, H = problem()
    known = torch.ones_like(W, dtype=torch.bool)
    known[:, ::4] = False
    new, mask = prune_rows(W * known, H, method=method, mask=known, **options)
    assert not (mask & ~known).any() and (new[~known] == 0).all() and int(mask.sum()) == 30


@pytest.mark.parametrize("method", METHODS)
def test_a_matrix_for_each_row(method):
    "Equal ones give what one gives; different ones give what each row gets alone."
    W, H = problem()
    options = {"pattern": "2:4", "method": method}
    for a, b in zip(prune_rows(W, H.expand(5, 12, 12), **options), prune_rows(W, H, **options)): torch.testing.assert_close(a, b)
    own = H + torch.diag_embed(torch.rand(5, 1).double().expand(5, 12))
    new, _ = prune_rows(W, own, **options)
    for i in range(5): torch.testing.assert_close(new[i:i + 1], prune_rows(W[i:i + 1], own[i], **options)[0])


@pytest.mark.parametrize("method", METHODS)
def test_nothing_and_nearly_all(method):
    W, H = problem()
    new, mask = prune_rows(W, H, 0., method=method)
    assert mask.all() and torch.allclose(new, W)
    new, mask = prune_rows(W, H, .99, method=method)
    assert int(mask.sum()) == 60 - 59 == int((new != 0).sum())


@pytest.mark.parametrize("method", METHODS)
def test_dead_inputs_lose_their_weights(method):
    torch.manual_seed(0)
    X, W = torch.randn(50, 8).double(), torch.randn(4, 8).double()
    X[:, [1, 5]] = 0
    new, mask = prune_rows(W, X.T @ X / 50, .25, method=method, block=8, damp=1e-6)
    assert not mask[:, [1, 5]].any() and torch.allclose(X @ new.T, X @ W.T)


# Networks

TIED = {"words": (partial(Speaker, words=12, width=4), lambda: torch.randint(12, (20, 5))), "twice": (Convs, lambda: torch.rand(20, 2, 7, 7)), "reused": (reused, lambda: torch.rand(20, 4))}


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("method", METHODS)
def test_tied_weights_are_pruned_once_and_stay_tied(name, method):
    torch.manual_seed(0)
    make, data = TIED[name]
    model, x = make(), data()
    held = sorted(map(id, model.parameters()))
    table = layerwise_(model, x, .5, method=method, batch_size=7)
    assert list(table.index) and sorted(table.index) == sorted(edges(model)) and sorted(map(id, model.parameters())) == held
    assert (sparsity_of(model)["sparsity"] - .5).abs().max() < .05
    check_ties(model)
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


def test_the_hessian_of_a_tied_weight_is_the_sum_over_uses():
    torch.manual_seed(0)
    words, x = Speaker(words=12, width=4), torch.randint(12, (20, 5))
    seen = calibrate(words, x, "table.weight", batch_size=3)["table.weight"]
    hidden = torch.tanh(words.body(words.table(x))).flatten(0, 1).detach()
    torch.testing.assert_close(seen.hessian, hidden.T @ hidden / 20)
    torch.testing.assert_close(seen.counts, torch.bincount(x.flatten(), minlength=12) / 20)
    twice, x = Convs(), torch.rand(6, 2, 7, 7)
    one = F.unfold(x, 3, padding=1).mT.flatten(0, 1)
    two = F.unfold(twice.a(x).relu(), 3, padding=1).mT.flatten(0, 1).detach()
    wanted = sum(torch.cov(rows.T, correction=0) * len(rows) for rows in (one, two)) / 6
    torch.testing.assert_close(calibrate(twice, x)["a.weight"].hessian, wanted)


def test_the_error_of_a_table_is_that_of_both_roles():
    torch.manual_seed(0)
    words, x = Speaker(words=12, width=4), torch.randint(12, (20, 5))
    before, hidden = words.table.weight.detach().clone(), torch.tanh(words.body(words.table(x))).detach()
    table = layerwise_(words, x, .5, names="table.weight")
    change = words.table.weight.detach() - before
    def size(W): return (hidden @ W.T).square().sum() + W[x].square().sum()
    assert table["error"].item() == pytest.approx((size(change) / size(before)).item(), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{"sparsity": .4}, {"pattern": "2:4"}])
def test_rows_with_more_on_the_diagonal_are_rows_with_a_matrix_each(options, method):
    W, H = problem(9, 12)
    extra = torch.tensor([0., 1, 0, .5, 0, 2, 1, .5, 0]).double()
    options |= {"method": method, "block": 5}
    each = prune_rows(W, H + extra[:, None, None] * torch.eye(12), **options)
    for given in (H, H.expand(9, 12, 12)):
        for a, b in zip(prune_rows(W, given, extra=extra, **options), each): torch.testing.assert_close(a, b)


class Largest(TorchDispatchMode):
    "How many numbers the largest tensor has that is made while it is on."
    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize("method", METHODS)
def test_a_table_takes_no_matrix_for_each_word(method, monkeypatch):
    torch.manual_seed(0)
    words, x = Speaker(words=400, width=16), torch.randint(400, (50, 5))
    monkeypatch.setattr(sharetie.layerwise, "_at_a_time", lambda H, numbers=0: 8)
    with Largest() as largest: layerwise_(words, x, .5, names="table.weight", method=method)
    assert largest.numbers <= 50 * 5 * 400  # outputs of the model; a matrix for each word had 400 · 16²
    with Largest() as largest: prune_rows(words.table.weight.detach(), torch.eye(16), .5, method=method, extra=torch.arange(400) % 20 / 20)
    assert largest.numbers <= 400 * 16


def test_what_a_layer_cannot_see_is_refused():
    class Coder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(5, 3)

        def forward(self, x): return F.linear(self.encoder(x), self.encoder.weight.T)

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(3, 5))

        def forward(self, x): return x @ self.weight.T

    class Placed(Bare):
        def __init__(self):
            super().__init__()
            self.table = self.weight
            del self.weight

    x = torch.rand(9, 5)
    pruned = prune_(Coder(), {"encoder.weight": torch.rand(3, 5)}, .2)
    for model, words in ((autoencoder(5, 3), "used through a map"), (Coder(), "uses it elsewhere"), (pruned, "uses it elsewhere"), (Bare(), "layers|linear layers"),
                         (nn.Bilinear(5, 5, 2), "linear layers"), (nn.Embedding(9, 3), "multiplies with inputs"), (Placed(), "^table: the weight of a layer"),
                         (nn.TransformerEncoderLayer(5, 1, 6), "self_attn.in_proj_weight: the weight of a layer|out_proj.weight: .* in multi_head_attention_forward")):
        before = [p.clone() for p in model.parameters()]
        with pytest.raises(ValueError, match=f"(?:{words}).*; name other weights$"): layerwise_(model, torch.arange(9) if isinstance(model, nn.Embedding) else x, .5)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


CONVS = {"plain": lambda: nn.Conv2d(3, 4, 3), "strided": lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)), "same": lambda: nn.Conv2d(3, 4, 3, padding="same", bias=False),
         "one": lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), "valid": lambda: nn.Conv1d(3, 4, 3, padding="valid")}


@pytest.mark.parametrize("name", CONVS)
def test_convolutions_are_matrices_of_patches(name):
    torch.manual_seed(0)
    conv = CONVS[name]()
    x = torch.rand(10, 3, 9) if isinstance(conv, nn.Conv1d) else torch.rand(10, 3, 7, 8)
    before = conv(x).detach()
    table = layerwise_(conv, x, .5, batch_size=4)
    change = conv(x).detach() - before
    whole = before if conv.bias is None else before - before.transpose(0, 1).flatten(1).mean(1).view(-1, *[1] * (before.ndim - 2))
    assert table["error"].item() == pytest.approx((change.square().sum() / whole.square().sum()).item(), rel=1e-3)


@pytest.mark.parametrize("conv", [nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.ConvTranspose2d(4, 4, 3), nn.Conv3d(4, 4, 1)])
def test_other_convolutions_are_refused(conv):
    with pytest.raises(ValueError, match="convolutions without groups and with zeros as padding"): layerwise_(conv, torch.rand(2, conv.in_channels, 5, 5), .5)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4)), torch.randn(60, 8)


def test_a_cascade_sees_pruned_inputs():
    model, x = network()
    apart, cascade = copy.deepcopy(model), copy.deepcopy(model)
    layerwise_(apart, x, .6, cascade=False), layerwise_(cascade, x, .6)
    assert torch.equal(apart[0].weight, cascade[0].weight) and not torch.equal(apart[2].weight, cascade[2].weight)
    by_hand = copy.deepcopy(model)
    for name in ("0.weight", "2.weight", "4.weight"): layerwise_(by_hand, x, .6, names=name)
    for name, w in edges(cascade).items(): torch.testing.assert_close(w, edges(by_hand)[name])


def test_biases_keep_mean_outputs_and_shared_ones_stay():
    model, x = network()
    before = model[0](x).mean(0)
    layerwise_(model, x, .6, names="0.weight")
    torch.testing.assert_close(model[0](x).mean(0), before)
    held = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    held[1].bias = held[0].bias
    bias = held[0].bias.detach().clone()
    layerwise_(held, x, .6)
    assert torch.equal(held[0].bias, bias) and held[0].bias is held[1].bias


def test_sparsity_by_name_order_of_calls_and_masks_of_before():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(6, 2), nn.Linear(4, 6)

        def forward(self, x): return self.last(self.first(x).relu())

    model, x = Backwards(), torch.rand(20, 4)
    prune_(model, magnitude(model), .25)
    mask = masks_of(model)["first.weight"].clone()
    table = layerwise_(model, x, {"first.weight": .5, "last.weight": .75})
    assert list(table.index) == ["first.weight", "last.weight"] and table["left"].tolist() == [12, 3]
    assert not (masks_of(model)["first.weight"] & ~mask).any()


def test_patterns_and_modes():
    model, x = network()
    model.requires_grad_(False)
    layerwise_(model, x, pattern="2:4")
    for w in edges(model).values(): assert ((w != 0).movedim(1, -1).reshape(-1, 4).sum(1) <= 2).all()
    assert model.training and not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))


def test_a_convolution_is_pruned_along_its_channels_as_a_linear_layer_of_its_patches():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 5, 3).double(), torch.randn(6, 4, 5, 5).double()
    patches = torch.stack([x[:, :, i:i + 3, j:j + 3] for i in range(3) for j in range(3)], 1).movedim(2, -1).flatten(2).flatten(0, 1)
    linear = nn.Linear(36, 5).double()
    with torch.no_grad():
        linear.weight.copy_(conv.weight.movedim(1, -1).flatten(1))
        linear.bias.copy_(conv.bias)
    layerwise_(conv, x, pattern="2:4")
    layerwise_(linear, patches, pattern="2:4")
    torch.testing.assert_close(conv.weight.movedim(1, -1).flatten(1), linear.weight)
    torch.testing.assert_close(conv.bias, linear.bias)


def test_a_dead_layer_is_named():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].bias.data.fill_(-100)
    with pytest.raises(ValueError, match="x: a set of examples at which the inputs of '2.weight' differ"): layerwise_(model, torch.rand(5, 3), .5)


def test_half_precision_is_pruned_in_single():
    model, x = network()
    half = copy.deepcopy(model).bfloat16()
    table, exact = layerwise_(half, x.bfloat16(), .5), layerwise_(model, x, .5)
    assert half[0].weight.dtype == torch.bfloat16 and table["left"].equals(exact["left"]) and (table["error"] < 2 * exact["error"] + .05).all()


# Bad input

NET = {"sparsity 1": (dict(sparsity=1.), ValueError, "below 1"), "none": (dict(), ValueError, "one of sparsity and pattern"),
       "both": (dict(sparsity=.5, pattern="2:4"), ValueError, "one of sparsity and pattern"), "pattern": (dict(pattern="2:5"), ValueError, "multiple of 5"),
       "method": (dict(sparsity=.5, method="blocks"), ValueError, "did you mean 'block'"), "damp": (dict(sparsity=.5, damp=-1), ValueError, "damp"),
       "block": (dict(sparsity=.5, block=0), ValueError, "block"), "batch": (dict(sparsity=.5, batch_size=0), ValueError, "batch_size"),
       "names": (dict(sparsity=.5, names="wieght"), ValueError, "matches none"), "cascade": (dict(sparsity=.5, cascade=1), TypeError, "True or False"),
       "by name": (dict(sparsity={"0.weight": .5}), ValueError, "sparsity: a part for '2.weight' too"), "by no name": (dict(sparsity={}), ValueError, "sparsity: a part for '0.weight' too"),
       "a bias": (dict(sparsity=.5, names="*"), ValueError, "0.bias: a weight with rows and columns"), "a pattern of a bias": (dict(pattern="2:4", names="2*"), ValueError, "2.bias: a weight with rows"), "unknown": (dict(sparsity={"1.weight": .5}), ValueError, "one of '0.weight'"),
       "empty": (dict(sparsity=.5, x=torch.rand(0, 8)), ValueError, "at least one element"), "nan": (dict(sparsity=.5, x=torch.full((3, 8), torch.nan)), ValueError, "finite"),
       "shape": (dict(sparsity=.5, x=torch.rand(3, 7)), ValueError, "x: what the model can take"), "a number": (dict(sparsity=.5, x=torch.rand(3)), ValueError, "x: what the model can take"),
       "zeros": (dict(sparsity=.5, x=torch.zeros(3, 8)), ValueError, "x: a set of examples at which the inputs of '0.weight' differ"), "no tensor": (dict(sparsity=.5, x=3), TypeError, "x: a tensor")}


@pytest.mark.parametrize("name", NET)
def test_bad_input_changes_nothing(name):
    options, error, words = NET[name]
    model, x = network()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(error, match=words): layerwise_(model, **({"x": x} | options))
    assert model.state_dict().keys() == before.keys() and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_bad_weights_change_nothing():
    model, x = network()
    with torch.no_grad(): model[4].weight[0, 0] = torch.nan
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match="4.weight.*NaN"): layerwise_(model, x, .5)
    assert torch.equal(model[0].weight, before) and not masks_of(model)


W, H = torch.rand(3, 4), torch.eye(4)
ROWS = {"W": (dict(W=torch.rand(4)), ValueError), "H": (dict(H=torch.eye(3)), ValueError), "types": (dict(H=H.double()), ValueError), "nan": (dict(W=W * torch.nan), ValueError),
        "mask": (dict(mask=torch.ones(3, 3, dtype=torch.bool)), ValueError), "not definite": (dict(H=-H), ValueError), "zeros": (dict(H=0 * H), ValueError), "kind": (dict(W=3), TypeError), "extra": (dict(extra=torch.ones(2)), ValueError), "extra below 0": (dict(extra=-torch.ones(3)), ValueError),
        "extra of another type": (dict(extra=torch.ones(3).double()), ValueError), "mask": (dict(mask=torch.ones(3, 4)), TypeError)}


@pytest.mark.parametrize("name", ROWS)
def test_bad_matrices(name):
    options, error = ROWS[name]
    with pytest.raises(error): prune_rows(**({"W": W, "H": H, "sparsity": .5} | options))


def test_a_singular_matrix_without_damping_is_refused():
    with pytest.raises(ValueError, match="damp: a larger number"): prune_rows(W, torch.diag(torch.tensor([1., 1., 1., -1.])), .5, damp=0)


@pytest.mark.parametrize("mask, error", [(torch.ones(3, 4), TypeError), (torch.ones(2, 4, dtype=torch.bool), ValueError), (None, TypeError)])
def test_bad_masks(mask, error):
    with pytest.raises(error): refit(W, H, mask)


# What is out before, what reads weights, what is not a layer

@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options, left", [({"sparsity": .3}, 30), ({"sparsity": .5}, 30), ({"sparsity": .7}, 18), ({"pattern": "2:4"}, 20)])
def test_what_is_out_comes_back_for_no_method(method, options, left):
    "Half of the columns are out, more than a block or a pattern takes out itself; what stays has its best values."
    W, H = problem()
    known = torch.ones_like(W, dtype=torch.bool)
    known[:, :6] = False
    new, mask = prune_rows(W * known, H, method=method, mask=known, damp=0, block=4, **options)
    assert not (mask & ~known).any() and (new[~known] == 0).all() and int(mask.sum()) == left
    if method != "block" or left == 30: torch.testing.assert_close(new, refit(W * known, H, mask))
    if method == "greedy" and "sparsity" in options:  # the same as the smaller problem of the columns that are left
        assert torch.equal(mask[:, 6:], prune_rows(W[:, 6:], H[6:, 6:], 1 - left / 30, method=method, damp=0)[1])


SIDES = {"late columns": lambda r, d: (torch.arange(d) < d // 2).expand(r, d), "early columns": lambda r, d: (torch.arange(d) >= d // 2).expand(r, d),
         "some rows": lambda r, d: (torch.arange(r) % 2 == 0)[:, None].expand(r, d), "the last column": lambda r, d: (torch.arange(d) < d - 1).expand(r, d),
         "at random in late columns": lambda r, d: (torch.rand(r, d) < .1) | (torch.arange(d) < d // 2)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", ["shared", "one each", "of three kinds"])
@pytest.mark.parametrize("side", SIDES)
def test_what_is_out_counts_wherever_it_is(side, rows, method, monkeypatch):
    "The part that is out is the one asked for, or what was out before where that is more; also where rows come some at a time."
    W, H = problem(14, 20)
    known = SIDES[side](14, 20).clone()
    extra = None if rows != "of three kinds" else (torch.arange(14) % 3).double()
    if rows == "one each": H = H.expand(14, 20, 20)
    if rows != "shared": monkeypatch.setattr(sharetie.layerwise, "_at_a_time", lambda H, numbers=0: 2)
    for sparsity in (0., .3, .5, .55, .7, .95):
        new, mask = prune_rows(W * known, H, sparsity, method=method, mask=known, extra=extra, block=4)
        assert int((~mask).sum()) == max(round(sparsity * 280), int((~known).sum()))
        assert not (mask & ~known).any() and (new[~mask] == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_are_sparse_enough_lose_nothing(method):
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    with torch.no_grad(): layer.weight[:, 32:] *= .01
    prune_(layer, magnitude(layer), .5)
    before = masks_of(layer)["weight"].clone()
    layerwise_(layer, torch.randn(100, 64), .5, method=method)
    assert torch.equal(masks_of(layer)["weight"], before) and int(before.sum()) == 1024


def test_columns_lose_equal_parts_of_what_is_left():
    W, H = problem(40, 24, 200)
    known = SIDES["late columns"](40, 24)
    _, mask = prune_rows(W * known, H, .75, mask=known, block=3)
    assert (mask[:, :12].view(40, 4, 3).sum((0, 2)) == 60).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_error_after_masks_of_before_is_what_happens(method):
    model, x = network()
    prune_(model, magnitude(model), .75)
    before = model[2](model[0](x).relu()).detach()
    inputs, masks = model[0](x).relu().detach(), {n: m.clone() for n, m in masks_of(model).items()}
    table = layerwise_(model, x, pattern="2:4", names="2.weight", method=method)
    change = model[2](inputs).detach() - before
    assert not (masks_of(model)["2.weight"] & ~masks["2.weight"]).any()
    assert table["error"].item() == pytest.approx((change.square().sum() / (before - before.mean(0)).square().sum()).item(), rel=1e-3)
    assert table["left"].item() == int(masks_of(model)["2.weight"].sum())


class Experts(nn.Module):
    "Two layers, each for some of the examples."
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        out = torch.zeros_like(x)
        for layer, own in zip(self.layers, (x[:, 0] > 0, x[:, 0] <= 0)):
            if own.any(): out[own] = layer(x[own])
        return out


def test_a_layer_that_the_first_example_does_not_reach_is_pruned_too():
    torch.manual_seed(0)
    model, x = Experts(), torch.randn(30, 4)
    table = layerwise_(model, x, .5, batch_size=1)
    assert sorted(table.index) == ["layers.0.weight", "layers.1.weight"] and table["left"].tolist() == [8, 8]


def named(x, layer): return F.linear(layer(x), weight=layer.weight)
def listed(x, layer): return layer(x) @ torch.cat([layer.weight, layer.weight])[:5]


@pytest.mark.parametrize("f", [named, listed])
def test_other_uses_are_seen_however_they_are_written(f):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def forward(self, x): return f(x, self.layer)

    with pytest.raises(ValueError, match="uses it elsewhere"): layerwise_(Other(), torch.rand(9, 5), .5)


def test_layers_with_a_forward_of_their_own_are_refused():
    class Cosine(nn.Linear):
        def forward(self, x): return F.linear(x, F.normalize(self.weight, dim=1))

    with pytest.raises(ValueError, match="a weight of linear layers.* got Cosine"): layerwise_(nn.Sequential(Cosine(4, 3)), torch.rand(9, 4), .5)


def test_inputs_by_name():
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x): return self.layer(input=x)

    model, x = ByName(), torch.rand(9, 4)
    torch.testing.assert_close(calibrate(model, x)["layer.weight"].hessian, torch.cov(x.T, correction=0))


def test_a_scaled_table_errs_by_its_scale():
    torch.manual_seed(0)
    words, x = Speaker(words=12, width=4), torch.randint(12, (20, 5))
    words.table = ScaledEmbedding(12, 4)
    words.head.weight = words.table.weight
    before, hidden = words.table.weight.detach().clone(), torch.tanh(words.body(words.table(x))).detach()
    table = layerwise_(words, x, .5, names="table.weight")
    change = words.table.weight.detach() - before
    def size(W): return (hidden @ W.T).square().sum() + (2 * W[x]).square().sum()
    assert table["error"].item() == pytest.approx((size(change) / size(before)).item(), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_singular_matrices_are_refused(method):
    singular = torch.diag(torch.tensor([1., 1., 1., 0.]))
    with pytest.raises(ValueError, match="damp: a larger number"): prune_rows(W, singular, .5, method=method, damp=0)
    with pytest.raises(ValueError, match="H: one that is positive definite"): refit(W, singular, torch.ones(3, 4, dtype=torch.bool))


def test_a_compiled_model_is_pruned_as_it_is_written():
    model, x = network()
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    layerwise_(compiled, x, .5), layerwise_(model, x, .5)
    for name, w in edges(model).items(): torch.testing.assert_close(edges(compiled)[f"_orig_mod.{name}"], w)
    torch.testing.assert_close(compiled(x), model(x))


def test_inputs_far_from_zero_have_their_covariance():
    "Batch by batch and in single precision, where a difference of sums of squares would leave nothing."
    torch.manual_seed(0)
    x = 1000 + torch.randn(50, 4)
    exact = torch.cov(x.double().T, correction=0).float()
    torch.testing.assert_close(calibrate(nn.Linear(4, 3), x, batch_size=7)["weight"].hessian, exact, rtol=1e-3, atol=1e-3)
    layer = nn.Linear(4, 4)
    both = nn.Sequential(layer, nn.Identity(), layer)
    inputs = torch.cat([x, layer(x).detach()]).double()
    torch.testing.assert_close(calibrate(both, x, batch_size=7)["0.weight"].hessian, 2 * torch.cov(inputs.T, correction=0).float(), rtol=1e-4, atol=1e-2)


def test_hundreds_of_layers_are_calibrated_at_once():
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(400)])
    assert len(calibrate(model, torch.rand(3, 2))) == 400


def test_a_layer_that_loses_all_is_a_warning():
    with pytest.warns(UserWarning, match="nothing is left of .*'weight'"): layerwise_(nn.Linear(4, 1), torch.rand(9, 4), .9)
