"Net-Trim: against SciPy's solvers, its constraints, planted layers, cascades, calls and readers of a layer, tied models, bad input that changes nothing."
import copy
import warnings
import weakref

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from torch import nn

import sharetie.trimming
from sharetie.checking import check_ties
from sharetie.making import tie_
from sharetie.masks import edges, magnitude, mask_, masks_of, prune_
from sharetie.trimming import net_trim, trim_
from sharetie.views import Transpose


def linear_program(X, y, relu):
    "The exact program for one unit and no error allowed."
    X, y, n = X.numpy(), y.numpy(), X.shape[1]
    on = y > 0 if relu else np.ones(len(y), bool)
    both = np.concatenate([X, -X], 1)
    found = scipy.optimize.linprog(np.ones(2 * n), both[~on] if relu else None, np.zeros((~on).sum()) if relu else None, both[on], y[on])
    return found.x[:n] - found.x[n:]


def planted(m=40, n=8, k=5, seed=0):
    torch.manual_seed(seed)
    W = torch.randn(n, k).double() * (torch.rand(n, k) > .5)
    X = torch.randn(m, n).double()
    return X, W


@pytest.mark.filterwarnings("ignore:.*have not converged")
@pytest.mark.parametrize("relu", [True, False])
def test_without_error_it_is_the_linear_program(relu):
    X, W = planted(12, 8, seed=1)  # fewer examples than a unique solution needs
    Y = (X @ W).relu() if relu else X[:6] @ W
    X = X if relu else X[:6]
    found = net_trim(X, Y, 0., relu, steps=2000, tolerance=1e-6)
    for u, y in zip(found.T, Y.T):
        wanted = linear_program(X, y, relu)
        assert u.abs().sum().item() == pytest.approx(np.abs(wanted).sum(), rel=1e-2)


@pytest.mark.filterwarnings("ignore:.*have not converged")
def test_with_error_the_constraints_hold_and_the_size_falls():
    X, W = planted()
    Y, sizes = (X @ W).relu(), []
    for epsilon in (0., .1, .3, .6):
        found = net_trim(X, Y, epsilon, steps=1500, tolerance=1e-4)
        on = Y > 0
        off = ((X @ found - Y) * on).norm(dim=0)
        assert (off <= (epsilon + 1e-2) * Y.norm(dim=0)).all() and (X @ found)[~on].max() <= 1e-2 * Y.max()
        sizes.append(found.abs().sum().item())
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.filterwarnings("ignore:.*have not converged")
def test_units_do_not_meet():
    X, W = planted()
    Y = (X @ W).relu()
    together = net_trim(X, Y, .2, steps=1500, tolerance=1e-5)
    for i in range(2): torch.testing.assert_close(net_trim(X, Y[:, i:i + 1], .2, steps=1500, tolerance=1e-5)[:, 0], together[:, i], atol=1e-2, rtol=1e-2)


def test_a_planted_layer_is_found_behind_a_dense_one():
    torch.manual_seed(0)
    X, W = torch.randn(150, 40).double(), torch.randn(40, 10).double() * (torch.rand(40, 10) < .1)
    found = net_trim(X, (X @ W).relu(), 0., steps=1000, tolerance=1e-4)
    assert torch.equal(found.abs() > 1e-2, W.abs() > 1e-2)
    torch.testing.assert_close(found, W, atol=1e-2, rtol=1e-2)


def test_scale_of_inputs_does_not_matter():
    X, W = planted()
    Y = (X @ W).relu()
    a, b = net_trim(X, Y, .1), net_trim(1e3 * X, 1e3 * Y, .1)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_bias_is_free():
    X, W = planted()
    X = torch.cat([X, torch.ones(40, 1)], 1)
    W = torch.cat([W, 50 * torch.ones(1, 5)])
    found = net_trim(X, (X @ W).relu(), .01, bias=True)
    assert found[-1].min() > 40 and found[:-1].abs().sum() <= 1.01 * W[:-1].abs().sum()


def test_a_start_is_allowed_at_worse_inputs():
    "What the old weights do at pruned inputs is always feasible, so the program has a solution."
    X, W = planted()
    Y = (X @ W).relu()
    worse = X * (torch.rand(40, 8) > .3)
    found = net_trim(worse, Y, 0., start=W, tolerance=1e-4)
    assert found.abs().sum() <= 1.001 * W.abs().sum()
    on = Y > 0
    assert (((worse @ found - Y) * on).norm(dim=0) <= 1.11 * ((worse @ W - Y) * on).norm(dim=0)).all()


def test_too_few_steps_are_a_warning():
    X, W = planted()
    with pytest.warns(UserWarning, match="5 of 5 units have not converged after 2 steps"): net_trim(X, (X @ W).relu(), .1, steps=2)


# Networks

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)), torch.randn(80, 6)


@pytest.mark.long
@pytest.mark.parametrize("cascade", [True, False])
def test_layers_put_out_nearly_what_they_did(cascade):
    model, x = network()
    whole, y = copy.deepcopy(model), model(x).detach()
    table = trim_(model, x, .05, cascade=cascade)
    assert table["relu"].tolist() == [True, True, False] and (table["left"] < table["size"]).any() and (table["error"] < .4).all()
    assert table["left"].tolist() == [int((w != 0).sum()) for w in edges(model).values()]
    first = (model[0](x).relu() - whole[0](x).relu()).norm() / whole[0](x).relu().norm()
    assert table["error"].iloc[0] == pytest.approx(first.item(), rel=1e-3) and first < .06
    assert (model(x) - y).norm() < .5 * y.norm()
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x)) and model.training


@pytest.mark.long
def test_a_layer_that_something_else_reads_too_is_kept_near_everywhere():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            h = self.a(x)
            return self.b(h.relu() + h)

    torch.manual_seed(0)
    assert trim_(Skip(), torch.randn(30, 4), .1)["relu"].tolist() == [False, False]
    for act, wanted in ((nn.Tanh(), False), (nn.ReLU(), True), (nn.GELU(), False)):
        assert trim_(nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 2)), torch.randn(30, 4), .1)["relu"].tolist() == [wanted, False]


@pytest.mark.long
@pytest.mark.parametrize("cascade", [True, False])
def test_what_layers_read_and_put_out_is_held_for_one_at_a_time(cascade, monkeypatch):
    "In the order of the calls, with outputs of the whole network, and no others alive."
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)), torch.randn(60, 6)
    whole, held, real = copy.deepcopy(model), [], sharetie.trimming._trim_one
    def watched(weight, bias, X, Z, *rest):
        assert not any(alive() is not None for pair in held for alive in pair)
        torch.testing.assert_close(Z, whole[:2 * len(held) + 1](x))
        torch.testing.assert_close(X, (model if cascade else whole)[:2 * len(held)](x))
        held.append([weakref.ref(X), weakref.ref(Z)])
        return real(weight, bias, X, Z, *rest)

    monkeypatch.setattr(sharetie.trimming, "_trim_one", watched)
    trim_(model, x, .2, cascade=cascade)
    assert len(held) == 3


def test_other_uses_are_refused_before_anything_is_trimmed(monkeypatch):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 4)
        def forward(self, x): return self.b(self.a(x).relu()) @ self.b.weight

    class Idle(Last):
        def forward(self, x): return self.a(x)

    monkeypatch.setattr(sharetie.trimming, "_trim_one", lambda *args: pytest.fail("a layer was trimmed"))
    for model, words in ((Last(), "b.weight: .* uses it elsewhere"), (Idle(), "b.weight: a layer that the model calls")):
        with pytest.raises(ValueError, match=words): trim_(model, torch.randn(9, 4))


def test_a_layer_called_twice_is_trimmed_on_both():
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    model, x = nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU()), torch.randn(40, 4)
    y = [layer(x).relu().detach(), model(x).detach()]
    table = trim_(model, x, .1, cascade=False)
    both = torch.cat([layer(x), layer(y[0])]).relu()
    assert table["error"].item() == pytest.approx(((both - torch.cat(y)).norm() / torch.cat(y).norm()).item(), rel=1e-3)
    assert model[0] is model[2] and len(list(model.parameters())) == 2
    check_ties(model)


def test_masks_of_before_stay():
    model, x = network()
    prune_(model, magnitude(model), .3)
    before = {n: m.clone() for n, m in masks_of(model).items()}
    trim_(model, x, .1)
    for n, m in masks_of(model).items(): assert not (m & ~before[n]).any()


def words():
    model = nn.ModuleDict({"table": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    tie_(model, ["table.weight", "head.weight"])
    return model


def twice():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def autoencoder():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 4))
    tie_(model, ["0.weight", "2.weight"], map=Transpose())
    return model


class Coder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 3)

    def forward(self, x): return F.linear(self.encoder(x), self.encoder.weight.T)


@pytest.mark.parametrize("make, match", [(words, "one linear layer"), (twice, "one linear layer"), (autoencoder, "through a map"), (Coder, "uses it elsewhere"),
    (lambda: nn.Conv2d(4, 4, 1), "one linear layer"), (lambda: nn.LSTM(4, 4), "reads its weights from a list")])
def test_other_uses_are_refused_and_nothing_changes(make, match):
    model = make()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=match): trim_(model, torch.rand(9, 4))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()) and not masks_of(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules() if not hasattr(m, "_one_value"))


BAD = {"epsilon": (dict(epsilon=-1), ValueError, "epsilon"), "steps": (dict(steps=0), ValueError, "steps"), "tolerance": (dict(tolerance=0), ValueError, "tolerance"),
       "names": (dict(names="wieght"), ValueError, "matches none"), "cascade": (dict(cascade=0), TypeError, "True or False"), "batch": (dict(batch_size=0), ValueError, "batch_size"),
       "empty": (dict(x=torch.rand(0, 6)), ValueError, "at least one element"), "nan": (dict(x=torch.full((4, 6), torch.nan)), ValueError, "finite"), "no tensor": (dict(x=[1]), TypeError, "x: a tensor")}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_changes_nothing(name):
    options, error, match = BAD[name]
    model, x = network()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(error, match=match): trim_(model, **({"x": x} | options))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()) and not masks_of(model)


X, Y = torch.rand(5, 3), torch.rand(5, 2)
MATRICES = {"X": (dict(X=X[0]), ValueError), "Y": (dict(Y=Y[:3]), ValueError), "types": (dict(Y=Y.double()), ValueError), "below 0": (dict(Y=-Y), ValueError), "nan": (dict(X=X * torch.nan), ValueError),
            "zeros": (dict(X=0 * X), ValueError), "start": (dict(start=torch.rand(2, 2)), ValueError), "relu": (dict(relu=1), TypeError), "bias": (dict(bias=1), TypeError), "mask": (dict(mask=torch.ones(3, 2)), TypeError), "size of mask": (dict(mask=torch.ones(2, 2, dtype=torch.bool)), ValueError), "kind": (dict(X=3), TypeError)}


@pytest.mark.parametrize("name", MATRICES)
def test_bad_matrices(name):
    options, error = MATRICES[name]
    with pytest.raises(error): net_trim(**({"X": X, "Y": Y} | options))


def test_a_failure_on_the_way_undoes_all(monkeypatch):
    import sharetie.trimming as trimming
    model, x = network()
    before, calls, real = {n: t.clone() for n, t in model.state_dict().items()}, [], trimming.net_trim
    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3: raise MemoryError
        return real(*args, **kwargs)
    monkeypatch.setattr(trimming, "net_trim", failing)
    with warnings.catch_warnings(), pytest.raises(MemoryError):
        warnings.simplefilter("ignore")
        trim_(model, x, .1, steps=50)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def read_by(f):
    "A layer of which `f` reads."
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x): return f(self.a(x))

    torch.manual_seed(0)
    return Model()


@pytest.mark.parametrize("f, wanted", [(lambda h: torch.cat([h.relu(), h], 1), False), (lambda h: (h.relu(), h), False), (lambda h: {"all": [h.relu(), h]}, False), (lambda h: h.relu() + torch.mul(2, other=h), False),
    (lambda h: h.relu() + h.chunk(2, 1)[0].repeat(1, 2), False), (lambda h: (h.relu(), h.shape), True), (lambda h: (h.relu_(), h), True), (lambda h: torch.relu(input=h), True)])
def test_all_readers_of_a_layer_count(f, wanted):
    assert trim_(read_by(f), torch.randn(30, 4), .1)["relu"].item() == wanted


def test_a_mask_is_part_of_the_program():
    "A unit with inputs that are out has the program of the inputs that are left."
    X, W = planted()
    mask = torch.rand(8, 5) > .3
    W, steps = W * mask, dict(steps=5000, tolerance=1e-6)
    Y = (X @ W).relu()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = net_trim(X, Y, .2, mask=mask, **steps)
        for u, y, own in zip(found.T, Y.T, mask.T):
            if not y.any(): continue
            assert (u[~own] == 0).all()
            torch.testing.assert_close(u[own], net_trim(X[:, own], y[:, None], .2, **steps)[:, 0], atol=1e-2, rtol=1e-2)


def test_after_pruning_the_error_is_still_the_one_allowed():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 3)), torch.randn(200, 20)
    prune_(model, magnitude(model), .5)
    table = trim_(model, x, .2, names="0.weight", tolerance=1e-4)
    assert table["error"].item() <= .2001 and (model[0].weight != 0).sum() == table["left"].item() <= 300


def test_biases_that_others_read_or_that_are_masked_are_refused():
    masked, x = network()
    mask_(masked, {"0.bias": torch.rand(10) > .5})
    shared = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    shared[2].bias = shared[0].bias
    for model in (shared, masked):
        before = [p.clone() for p in model.parameters()]
        with pytest.raises(ValueError, match="a layer whose bias is its own, and not masked"): trim_(model, x, .1)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_a_layer_that_the_first_example_does_not_reach_is_trimmed_too():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x): return (self.one if x[0, 0] > 0 else self.other)(x)

    torch.manual_seed(0)
    table = trim_(Experts(), torch.randn(20, 4), .3, batch_size=1)
    assert sorted(table.index) == ["one.weight", "other.weight"] and (table["left"] < 16).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_trimmed_in_single(dtype):
    model, x = network()
    half = copy.deepcopy(model).to(dtype)
    table, exact = trim_(half, x.to(dtype), .1, names="0.weight"), trim_(model, x, .1, names="0.weight")
    assert half[0].weight.dtype == dtype and (table["error"] < 1.2 * exact["error"]).all() and (table["left"] - exact["left"]).abs().max() <= 4


def convex_program(X, y, epsilon, relu, start):
    "The least absolute sum for one unit by SciPy, u = p - q with p and q of at least 0."
    on, out = (y > 0 if relu else np.ones(len(y), bool)), np.zeros(len(y)) if start is None else X @ start
    radius = max(epsilon * np.linalg.norm(y), 0 if start is None else 1.1 * np.linalg.norm((out - y)[on]))
    def made(s): return X @ (s[:X.shape[1]] - s[X.shape[1]:])
    rules = [{"type": "ineq", "fun": lambda s: radius ** 2 - np.sum((made(s) - y)[on] ** 2)}]
    if not on.all(): rules.append({"type": "ineq", "fun": lambda s: (np.maximum(out, 0) - made(s))[~on]})
    u = np.linalg.lstsq(X, y, rcond=None)[0] if start is None else start
    return scipy.optimize.minimize(np.sum, np.concatenate([np.maximum(u, 0), np.maximum(-u, 0)]), jac=np.ones_like, bounds=[(0, None)] * 2 * len(u),
                                   constraints=rules, method="SLSQP", options={"maxiter": 500}).fun


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("worse", [False, True])
@pytest.mark.filterwarnings("ignore:.*have not converged")
def test_the_program_of_a_cascade_and_that_without_a_relu(relu, worse):
    "Outputs of whole inputs, from inputs of which some are lost: the old weights set the limits."
    X, W = planted()
    Y = (X @ W).relu() if relu else X @ W
    inputs = X * (torch.rand(40, 8) > .1) if worse else X
    found = net_trim(inputs, Y, .2, relu, start=W if worse else None, steps=5000, tolerance=1e-5)
    for u, y, w in zip(found.T, Y.T, W.T):
        assert u.abs().sum().item() == pytest.approx(convex_program(inputs.numpy(), y.numpy(), .2, relu, w.numpy() if worse else None), rel=5e-3, abs=1e-3)


def test_a_layer_that_loses_all_is_a_warning():
    with pytest.warns(UserWarning, match="nothing is left of .*'weight'"): table = trim_(nn.Linear(4, 3), torch.rand(40, 4), 2.)
    assert table["left"]["weight"] == 0


def test_inputs_that_the_model_cannot_take():
    with pytest.raises(ValueError, match="x: what the model can take"): trim_(nn.Linear(4, 3), torch.rand(9, 5))
