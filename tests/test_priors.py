"Soft weight-sharing: value and gradients against PyTorch's mixture, hyper-priors, planted heaps, merging, codebooks, tied models, bad input."
import copy
import math

import pytest
import torch
from torch import distributions, nn

from sharetie.checking import check_ties
from sharetie.codebooks import decode_, stored_bits
from sharetie.making import declared_ties, tie_
from sharetie.priors import (HyperPriors, Mixture, MixturePrior, assign_, components, merge_components, mixture_cost, mixture_groups, responsibilities)
from sharetie.results import set_seed
from sharetie.train import fit
from tied import TIED, Words

NONE = HyperPriors(None, None)


def parts(n=11, k=4, dtype=torch.double):
    draw = torch.Generator().manual_seed(0)
    w, m, s, share = (torch.randn(size, generator=draw).to(dtype) for size in (n, k, k, k))
    return [t.requires_grad_() for t in (w, m, s, share.log_softmax(0))]


def peer(means, log_precision, log_share):
    return distributions.MixtureSameFamily(distributions.Categorical(logits=log_share), distributions.Normal(means, (-log_precision / 2).exp()))


def test_value_and_gradients_are_those_of_autograd():
    w, *rest = parts()
    cost, wanted = mixture_cost(w, *rest), -peer(*rest).log_prob(w).sum()
    torch.testing.assert_close(cost, wanted)
    for mine, theirs in zip(torch.autograd.grad(cost, [w, *rest[:2]]), torch.autograd.grad(wanted, [w, *rest[:2]])): torch.testing.assert_close(mine, theirs)
    assert torch.autograd.gradcheck(mixture_cost, (w, *rest))


def test_chunks_change_nothing(monkeypatch):
    w, *rest = parts(50)
    whole = torch.autograd.grad(mixture_cost(w, *rest), [w, *rest])
    monkeypatch.setattr("sharetie.priors._chunks", lambda values: values.split(7))
    for mine, theirs in zip(torch.autograd.grad(mixture_cost(w, *rest), [w, *rest]), whole): torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("far", [1e4, 1e15])
def test_far_weights_and_sharp_components_stay_finite(far):
    w, *rest = parts(dtype=torch.float)
    with torch.no_grad():
        w[0] = far
        rest[1][0] = 20.
    cost = mixture_cost(w, *rest)
    assert cost.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(cost, [w, *rest]))


def test_one_component_is_weight_decay():
    w = parts()[0]
    zero, s = torch.zeros(1).double(), torch.tensor([math.log(4.)]).double()
    grad, = torch.autograd.grad(mixture_cost(w, zero, s, zero), w)
    torch.testing.assert_close(grad, 4 * w.detach())


def net(dtype=torch.float):
    set_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


@pytest.mark.parametrize("zero", [None, .9])
@pytest.mark.parametrize("hyper", [NONE, HyperPriors(), HyperPriors((3., .5), (9., 2.), (20., 3.))])
def test_prior_is_the_density_of_all_weights_and_of_the_mixture(zero, hyper):
    model = net(torch.double)
    prior = MixturePrior(model, 5, zero=zero, hyper=hyper, strength=.25)
    with torch.no_grad():
        for p in prior.parameters(): p += .1 * torch.randn_like(p)
    mix = components(prior)
    log_precision = -2 * mix.deviations.log()
    wanted = -sum(peer(mix.means, log_precision, mix.shares.log()).log_prob(model[i].weight).sum() for i in (0, 2))
    first = int(zero is not None)
    if hyper.precision: wanted -= distributions.Gamma(*map(torch.tensor, hyper.precision)).log_prob(log_precision[first:].exp()).sum()
    if first and hyper.zero_precision: wanted -= distributions.Gamma(*hyper.zero_precision).log_prob(log_precision[0].exp())
    if first and hyper.zero_share: wanted -= distributions.Beta(*hyper.zero_share).log_prob(mix.shares[0])
    torch.testing.assert_close(prior(), .25 * wanted, rtol=1e-5, atol=1e-4)
    learned = first and hyper.zero_share is not None
    assert len([*prior.parameters()]) == 3 + learned and (not first or mix.means[0] == 0)


def test_a_fixed_share_stays_and_a_learned_one_moves():
    for hyper, moves in ((HyperPriors(), False), (HyperPriors(zero_share=(50., 1.)), True)):
        prior = MixturePrior(net(), 3, zero=.6, hyper=hyper)
        optimizer = torch.optim.Adam(prior.parameters(), .1)
        for _ in range(3):
            optimizer.zero_grad()
            prior().backward()
            optimizer.step()
        assert (abs(components(prior).shares[0].item() - .6) > 1e-3) == moves


def test_responsibilities_add_up_and_follow_the_rule_of_bayes():
    mix = Mixture(torch.tensor([0., 1.]), torch.tensor([.5, .25]), torch.tensor([.75, .25]))
    values = torch.randn(3, 4)
    r = responsibilities(values, mix)
    each = torch.stack([s * distributions.Normal(m, d).log_prob(values).exp() for m, d, s in zip(*mix)], -1)
    torch.testing.assert_close(r, each / each.sum(-1, keepdim=True))


def test_planted_heaps_are_found():
    set_seed(0)
    truth, layer = torch.tensor([-.5, .1, .4]), nn.Linear(40, 50, bias=False)
    with torch.no_grad(): layer.weight.copy_(truth[torch.randint(3, (50, 40))] + .02 * torch.randn(50, 40))
    prior = MixturePrior(layer, 7, zero=None, strength=1 / 2000)
    optimizer = torch.optim.Adam(prior.parameters(), 2e-2)
    for _ in range(300):
        optimizer.zero_grad()
        prior().backward()
        optimizer.step()
    mix = merge_components(components(prior), .1, zero=False)
    near = mix.means[mix.shares > .05].sort().values
    assert len(near) >= 3 and (near[:, None] - truth).abs().min(1).values.max() < .02


def test_merging_keeps_mass_mean_and_variance():
    mix = Mixture(torch.tensor([0., .50, .51, -2.]), torch.tensor([.1, .2, .21, .3]), torch.tensor([.4, .3, .2, .1]))
    few = merge_components(mix, .1)
    assert len(few.means) == 3
    for power in (0, 1, 2):
        moments = [(m.shares * (m.means if power == 1 else m.means**2 + m.deviations**2 if power else 1)).sum() for m in (mix, few)]
        torch.testing.assert_close(*moments)
    assert merge_components(mix, 0.).means.tolist() == mix.means.tolist()
    assert mix.means.tolist() == torch.tensor([0., .50, .51, -2.]).tolist()
    assert merge_components(mix, 1e9).means.tolist() == [0]


@pytest.mark.parametrize("build, x", TIED)
def test_tied_models_are_one_weight_and_stay_tied(build, x):
    set_seed(1)
    model = build()
    weight, = [p for p in model.parameters() if p.ndim > 1]
    bits = stored_bits(model)
    prior = MixturePrior(model, 4, zero=.5, deviation=.1, hyper=NONE)
    mix = components(prior)
    torch.testing.assert_close(prior(), -peer(mix.means, -2 * mix.deviations.log(), mix.shares.log()).log_prob(weight).sum())
    fit(model, (x, x), lambda out, y: out.square().mean(), penalty=prior, optimizer=torch.optim.Adam(mixture_groups(prior)), epochs=3, progress=False)
    merged = merge_components(components(prior))
    wanted = merged.means[responsibilities(weight.detach(), merged).argmax(-1)]
    assert assign_(prior) is model
    book, = [p for name, p in model.named_parameters() if name.endswith("original")]
    used = len(wanted[wanted != 0].unique())
    assert len(book) == used and stored_bits(model) < bits
    out = model(x)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), out)
    decode_(model)
    weight, = [p for p in model.parameters() if p.ndim > 1]
    assert torch.equal(weight, wanted) and torch.equal(model(x), out)


def test_several_layers_look_up_one_codebook_in_ascending_order():
    model = net()
    prior = MixturePrior(model, 6, deviation=.02, zero=.3)
    assign_(prior)
    a, b = (model[i].parametrizations.weight for i in (0, 2))
    assert a.original is b.original and a[0].zero and (a.original.diff() > 0).all()
    with pytest.raises(ValueError, match="plain"): prior()
    with pytest.raises(ValueError, match="plain"): assign_(prior)


def test_all_zeros_is_a_codebook_that_nobody_looks_up():
    model = net()
    with torch.no_grad():
        for i in (0, 2): model[i].weight.mul_(1e-6)
    assign_(MixturePrior(model, 2, span=(-1., 1.), deviation=.01))
    assert not model[0].weight.any() and not model[2].weight.any()


def test_state_and_copies():
    model = net()
    prior, other = MixturePrior(model, 4), MixturePrior(net(), 4, zero=.5, deviation=2.)
    with torch.no_grad(): prior.means += 1
    other.load_state_dict(prior.state_dict())
    torch.testing.assert_close(other(), prior())
    both = copy.deepcopy(nn.ModuleDict({"model": model, "prior": prior}))
    assert both["prior"].weights()[0] is both["model"][0].weight


def test_groups_hold_everything_once():
    model, x = net(), torch.randn(4, 8)
    prior = MixturePrior(model, 4, hyper=HyperPriors(zero_share=(5., 1.)))
    given = [p for g in mixture_groups(prior, 1., 2., 3.) for p in g["params"]]
    assert {id(p) for p in given} == {id(p) for m in (model, prior) for p in m.parameters()} and len(given) == 4 + 4
    assert [g["lr"] for g in mixture_groups(prior, 1., 2., 3.)] == [1., 2., 3.]


class Rows(nn.Module):
    "Two parameters of one memory."
    def __init__(self):
        super().__init__()
        memory = torch.randn(4, 3)
        self.a, self.b = nn.Parameter(memory[:2]), nn.Parameter(memory[2:])


def nan():
    model = net()
    with torch.no_grad(): model[2].weight[0, 0] = torch.nan
    return model


MIX = Mixture(torch.zeros(2), torch.ones(2), torch.full((2,), .5))
BAD = {
    "no model": (lambda: MixturePrior(3), TypeError, "module"),
    "none": (lambda: MixturePrior(net(), 0), ValueError, "components: "),
    "share": (lambda: MixturePrior(net(), zero=1.), ValueError, "zero: a share between 0 and 1"),
    "deviation": (lambda: MixturePrior(net(), deviation=0.), ValueError, "deviation: "),
    "span": (lambda: MixturePrior(net(), span=(1., 0.)), ValueError, "span: "),
    "span of one": (lambda: MixturePrior(net(), span=3), TypeError, "span: two numbers"),
    "strength": (lambda: MixturePrior(net(), strength=-1), ValueError, "strength: "),
    "hyper": (lambda: MixturePrior(net(), hyper=(1, 2, 3)), TypeError, "hyper: HyperPriors"),
    "hyper pair": (lambda: MixturePrior(net(), hyper=HyperPriors(precision=(1., 0.))), ValueError, "hyper.precision"),
    "hyper three": (lambda: MixturePrior(net(), hyper=HyperPriors(precision=(1., 1., 1.))), TypeError, "two numbers"),
    "names": (lambda: MixturePrior(net(), names="9.weight"), ValueError, "matches none"),
    "memory": (lambda: MixturePrior(Rows(), names="a"), ValueError, "memory of others"),
    "recurrent": (lambda: MixturePrior(nn.GRU(2, 2)), ValueError, "RNNBase"),
    "NaN": (lambda: MixturePrior(nan()), ValueError, "2.weight"),
    "cost": (lambda: mixture_cost(torch.zeros(3), torch.zeros(2), torch.zeros(3), torch.zeros(2)), ValueError, "log_precision"),
    "components": (lambda: components(net()), TypeError, "MixturePrior"),
    "groups": (lambda: mixture_groups(net()), TypeError, "MixturePrior"),
    "rate": (lambda: mixture_groups(MixturePrior(net()), means=-1.), ValueError, "means: "),
    "assign": (lambda: assign_(net()), TypeError, "MixturePrior"),
    "mixture": (lambda: responsibilities(torch.zeros(2), (0, 1, 1)), TypeError, "a Mixture"),
    "merge": (lambda: merge_components(MIX, -1.), ValueError, "threshold: "),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, text = BAD[case]
    with pytest.raises(error, match=text): call()


def test_weights_that_became_nan_are_refused_and_stay():
    model = net()
    prior = MixturePrior(model, 3)
    with torch.no_grad(): model[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="0.weight"): assign_(prior)
    assert not nn.utils.parametrize.is_parametrized(model[0]) and not nn.utils.parametrize.is_parametrized(model[2])


def test_a_mixture_that_became_nan_is_refused():
    model = net()
    prior = MixturePrior(model, 3)
    for p in prior.parameters():
        before = p.detach().clone()
        with torch.no_grad(): p[0] = torch.nan
        with pytest.raises(ValueError, match="prior: finite numbers are expected"): assign_(prior)
        with torch.no_grad(): p.copy_(before)
    assert not nn.utils.parametrize.is_parametrized(model[0]) and assign_(prior) is model


def test_declared_ties_follow():
    model = Words()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    tie_(model, ["embedding.weight", "head.weight"])
    assign_(MixturePrior(model, 4))
    check_ties(model)
    (name,) = {d.names for d in declared_ties(model)}
    assert all(n.endswith("original") for n in name) and model.embedding.weight.equal(model.head.weight)
