"Optimal Brain Surgeon: inverses, exactness on quadratics, tied models, masks, stopping, bad input that changes nothing."
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sharetie.checking import check_ties
from sharetie.criteria import curvature_rows
from sharetie.masks import edges, magnitude, masks_of, prune_, sparsity_of
from sharetie.surgeon import inverse_hessian, surgeon_
from tied import reused, tasks


TIED = tasks(9)


@pytest.fixture(params=TIED)
def tied(request):
    torch.manual_seed(0)
    make, data, loss = TIED[request.param]
    return make(), data(), loss


def linear(n=40, d=6, outputs=2):
    "A linear model at the minimum of its squared error, in doubles, and its data."
    torch.manual_seed(1)
    x, y = torch.randn(n, d).double(), torch.randn(n, outputs).double()
    model = nn.Linear(d, outputs, bias=False).double()
    with torch.no_grad(): model.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    return model, (x, y)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_inverse_equals_the_inverse(chunk):
    torch.manual_seed(0)
    rows = torch.randn(20, 7).double()
    for n, p in ((20, None), (4, None), (20, 5)):
        wanted = torch.linalg.inv(rows[:n].T @ rows[:n] / (p or n) + 1e-2 * torch.eye(7).double())
        torch.testing.assert_close(inverse_hessian(rows[:n], 1e-2, p, chunk), wanted, rtol=1e-9, atol=1e-9)


def test_the_first_removal_is_the_best_of_all_constrained_minima():
    model, data = linear()
    table = surgeon_(copy.deepcopy(model), data, F.mse_loss, 1, alpha=1e-9)
    start, found = F.mse_loss(model(data[0]), data[1]).item(), {}
    for i in range(2):
        for j in range(6):
            rest = [k for k in range(6) if k != j]
            w = model.weight.detach().clone()
            w[i], w[i, rest] = 0, torch.linalg.lstsq(data[0][:, rest], data[1][:, i]).solution
            found[i, j] = F.mse_loss(data[0] @ w.T, data[1]).item()
    best = min(found, key=found.get)
    assert table["index"][0] == best and table["loss"][0] == pytest.approx(found[best], rel=1e-7)
    assert table["rise"][0] == pytest.approx(found[best] - start, rel=1e-5)


@pytest.mark.parametrize("every", [1, 3, 50])
def test_foreseen_rises_happen_on_a_quadratic(every):
    model, data = linear()
    start = F.mse_loss(model(data[0]), data[1]).item()
    table = surgeon_(model, data, F.mse_loss, 9, alpha=1e-8, every=every)
    assert start + table["rise"].cumsum().iloc[-1] == pytest.approx(table["loss"].iloc[-1], rel=1e-6)
    assert table["left"].tolist() == list(range(11, 2, -1)) and int((model.weight != 0).sum()) == 3
    assert F.mse_loss(model(data[0]), data[1]).item() == table["loss"].iloc[-1]
    torch.testing.assert_close(model.weight.detach(), _refitted(masks_of(model)["weight"], *data), rtol=1e-5, atol=1e-6)


def _refitted(mask, x, y):
    "The least squares solution in what is left."
    w = torch.zeros_like(mask, dtype=x.dtype)
    for i, own in enumerate(mask):
        if own.any(): w[i, own] = torch.linalg.lstsq(x[:, own], y[:, i]).solution
    return w


def test_two_inputs_of_one_value_need_one_weight():
    "Damage would keep both; the surgeon gives one's work to the other, at no cost."
    torch.manual_seed(0)
    x = torch.randn(30, 3).double()
    x[:, 2] = x[:, 1]
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad(): model.weight.fill_(1)
    data = x, model(x).detach()
    table = surgeon_(model, data, F.mse_loss, 1, alpha=1e-8)
    assert table["rise"][0] < 1e-6 and table["loss"][0] < 1e-10
    assert sorted(model.weight.detach().flatten().round(decimals=3).tolist()) == [0, 1, 2]


def test_tied_weights_go_once_and_stay_tied(tied):
    model, data, loss = tied
    size = int(sparsity_of(model, "*").loc["all", "size"])
    held = sorted(map(id, model.parameters()))
    table = surgeon_(model, data, loss, size // 2, every=5)
    assert size == sum(p.numel() for p in model.parameters()) and sorted(map(id, model.parameters())) == held
    assert int(sparsity_of(model, "*").loc["all", "left"]) == size - size // 2 == table["left"].iloc[-1]
    check_ties(model)
    zeros = sum(int((w == 0).sum()) for w in edges(model, "*").values())
    assert zeros >= size // 2 and math.isclose(loss(model(data[0]), data[1]).item(), table["loss"].iloc[-1], rel_tol=1e-5)
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(data[0]), model(data[0]))


def test_a_stored_weight_is_one_variable():
    "The move of a weight with two uses is that of H by the stored weights."
    torch.manual_seed(0)
    model = reused().double()
    x, y = torch.rand(9, 4).double(), torch.rand(9, 4).double()
    rows = curvature_rows(model, (x, y), F.mse_loss, "*").flatten(0, 1)
    inverse = torch.linalg.inv(rows.T @ rows / 9 + 1e-4 * torch.eye(20).double())
    w = torch.cat([model[0].weight.flatten(), model[0].bias]).detach()
    q = int((w.square() / inverse.diagonal()).argmin())
    surgeon_(model, (x, y), F.mse_loss, 1)
    torch.testing.assert_close(torch.cat([model[0].weight.flatten(), model[0].bias]).detach(), w - w[q] / inverse[q, q] * inverse[:, q], atol=1e-9, rtol=1e-7)


def test_what_is_out_stays_out_and_counts():
    model, data = linear()
    prune_(model, magnitude(model), .5)
    mask = masks_of(model)["weight"].clone()
    table = surgeon_(model, data, F.mse_loss, 2)
    assert (model.weight[~mask] == 0).all() and table["left"].tolist() == [5, 4]


def test_named_weights_alone_move():
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), (torch.rand(9, 4), torch.rand(9, 2))
    kept = copy.deepcopy(model)
    table = surgeon_(model, data, F.mse_loss, 4, names="0.weight")
    assert set(table["weight"]) == {"0.weight"} and list(masks_of(model)) == ["0.weight"]
    for name in ("0.bias", "2.weight", "2.bias"): assert torch.equal(model.get_parameter(name), kept.get_parameter(name))


def test_it_ends_when_the_model_is_no_longer_fine_and_undoes_the_last():
    model, data = linear()
    whole, limit = copy.deepcopy(model), 1.1 * F.mse_loss(model(data[0]), data[1]).item()
    def fine(m): return F.mse_loss(m(data[0]), data[1]).item() <= limit
    table = surgeon_(model, data, F.mse_loss, fine=fine)
    assert 0 < len(table) < 11 and fine(model) and len(table) == int((model.weight == 0).sum())
    after = surgeon_(copy.deepcopy(whole), data, F.mse_loss, len(table) + 1)
    assert after["loss"].iloc[-1] > limit


def test_frozen_and_training_models_stay_so():
    model, data = linear()
    model = nn.Sequential(model, nn.Dropout(.5)).requires_grad_(False)
    surgeon_(model, data, F.mse_loss, 3)
    assert model.training and not any(p.requires_grad for p in model.parameters())


GOOD = torch.rand(6, 3), torch.rand(6, 2)
BAD = {
    "alpha": (dict(alpha=0), ValueError, "alpha: a finite number above 0"), "alpha text": (dict(alpha="1"), TypeError, "alpha: a number"),
    "remove": (dict(remove=8), ValueError, "remove: a whole number from 0 to 7"), "remove below": (dict(remove=-1), ValueError, "remove"),
    "every": (dict(every=0), ValueError, "every"), "chunk": (dict(chunk=0), ValueError, "chunk"), "fine": (dict(fine=3), TypeError, "fine: a function"),
    "names": (dict(names="wieght"), ValueError, "matches none"), "no data": (dict(data=(torch.rand(0, 3), torch.rand(0, 2))), ValueError, "at least one example"),
    "nan": (dict(data=(torch.full((6, 3), torch.nan), GOOD[1])), ValueError, "data: .* finite"),
    "loss": (dict(loss=lambda z, y: (z - y).square().sum()), ValueError, "a mean over examples"),
    "raises": (dict(fine=lambda m: 1 / 0), ZeroDivisionError, "division"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_changes_nothing(name):
    options, error, words = BAD[name]
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(error, match=words): surgeon_(model, **({"data": GOOD, "loss": F.mse_loss} | options))
    assert model.state_dict().keys() == before.keys() and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("rows, options, error", [(3, {}, TypeError), (torch.rand(3), {}, ValueError), (torch.full((2, 2), torch.nan), {}, ValueError),
    (torch.rand(2, 2), {"alpha": -1}, ValueError), (torch.rand(2, 2), {"examples": 0}, ValueError), (torch.rand(2, 2), {"chunk": 0}, ValueError)])
def test_bad_rows(rows, options, error):
    with pytest.raises(error): inverse_hessian(rows, **options)


def test_half_precision():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).bfloat16(), torch.rand(9, 4).bfloat16()
    y = model(x).detach()
    table = surgeon_(model, (x, y), F.mse_loss, 5)
    assert table["left"].tolist() == [22, 21, 20, 19, 18] and model[0].weight.dtype == torch.bfloat16


def test_a_failure_gives_back_even_what_a_mask_hides():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    prune_(model, magnitude(model), .5)
    with torch.no_grad(): model.parametrizations.weight.original.add_(1)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError): surgeon_(model, GOOD, F.mse_loss, fine=lambda m: 1 / 0)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
