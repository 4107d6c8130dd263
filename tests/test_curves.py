"""The shared constants of chapter 05_curves: against SciPy, linear theory and simulation, and bad input."""
import math

import numpy as np
import pytest
import torch
from scipy.optimize import curve_fit
from torch import nn

from sharetie.curves import fit_curves
from sharetie.data import shared_curves


def decay(t, amplitude, rate, offset):
    return amplitude * torch.exp(-rate * t) + offset


GUESS = dict(amplitude=1., rate=1., offset=0.)


@pytest.fixture(scope="module")
def curves():
    return shared_curves(groups=4, points=12, rate=1., noise=.05, seed=1)


def scipy_fit(t, y, **options):
    formula = lambda t, amplitude, rate, offset: amplitude * np.exp(-rate * t) + offset
    return curve_fit(formula, t.numpy(), y.numpy(), p0=[1, 1, 0], ftol=1e-13, xtol=1e-13, gtol=1e-13, **options)


@pytest.mark.parametrize("k", range(4))
def test_single_curve_is_scipys(curves, k):
    at = curves.group == k
    ours = fit_curves(decay, curves.t[at], curves.y[at], start=GUESS)
    values, covariance = scipy_fit(curves.t[at], curves.y[at])
    np.testing.assert_allclose(ours.table["estimate"], values, rtol=1e-6)
    np.testing.assert_allclose(ours.covariance, covariance, rtol=2e-6)
    assert ours.freedom == pytest.approx(9)
    assert all(v.shape == () for v in ours.estimates.values())


def test_known_noise_is_scipys_absolute_sigma(curves):
    at = curves.group == 0
    noise = torch.linspace(.02, .1, int(at.sum()), dtype=torch.float64)
    ours = fit_curves(decay, curves.t[at], curves.y[at], start=GUESS, noise=noise)
    values, covariance = scipy_fit(curves.t[at], curves.y[at], sigma=noise.numpy(), absolute_sigma=True)
    np.testing.assert_allclose(ours.table["estimate"], values, rtol=1e-6)
    np.testing.assert_allclose(ours.covariance, covariance, rtol=2e-6)
    low, high = ours.interval("rate")
    assert (high - low).item() == pytest.approx(2 * 1.959964 * ours.errors["rate"].item(), rel=1e-6)


def test_all_shared_is_one_curve(curves):
    one = fit_curves(decay, curves.t, curves.y, start=GUESS)
    all_shared = fit_curves(decay, curves.t, curves.y, curves.group, start=GUESS, shared=list(GUESS))
    for name in GUESS: torch.testing.assert_close(all_shared.estimates[name], one.estimates[name])
    torch.testing.assert_close(all_shared.covariance, one.covariance)


def test_a_line_is_the_normal_equations():
    generator = torch.Generator().manual_seed(0)
    t, group = torch.arange(10.).repeat(3).double(), torch.arange(3).repeat_interleave(10)
    y = 2 * t + group + torch.randn(30, generator=generator).double()
    fit = fit_curves(lambda t, slope, level: slope * t + level, t, y, group, start=dict(slope=0., level=0.), shared="slope")
    A = torch.cat([t[:, None], nn.functional.one_hot(group).double()], 1)
    θ = torch.linalg.lstsq(A, y[:, None]).solution[:, 0]
    s2 = (y - A @ θ).square().sum() / 26
    torch.testing.assert_close(torch.cat([fit.estimates["slope"][None], fit.estimates["level"]]), θ)
    torch.testing.assert_close(fit.covariance, s2 * torch.linalg.inv(A.T @ A))
    assert fit.deviation == pytest.approx(s2.sqrt().item()) and fit.freedom == pytest.approx(26)


def test_information_adds_without_noise():
    curves = shared_curves(groups=5, noise=0., seed=3)
    own = fit_curves(decay, curves.t, curves.y, curves.group, start=GUESS, noise=.1)
    common = fit_curves(decay, curves.t, curves.y, curves.group, start=GUESS, noise=.1, shared="rate")
    torch.testing.assert_close(1 / common.errors["rate"]**2, (1 / own.errors["rate"]**2).sum())
    torch.testing.assert_close(common.estimates["amplitude"], curves.truth["amplitude"])


def test_order_of_points_and_names_of_groups_do_not_matter(curves):
    fit = fit_curves(decay, curves.t, curves.y, curves.group, start=GUESS, shared="rate")
    order = torch.randperm(len(curves.t), generator=torch.Generator().manual_seed(0))
    mixed = fit_curves(decay, curves.t[order], curves.y[order], 10 * curves.group[order] - 7, start=GUESS, shared="rate")
    np.testing.assert_allclose(mixed.table.to_numpy(), fit.table.to_numpy(), rtol=1e-7)
    assert mixed.groups == [-7, 3, 13, 23]


def test_own_first_guesses(curves):
    start = dict(GUESS, amplitude=curves.truth["amplitude"], offset=list(curves.truth["offset"]))
    a, b = (fit_curves(decay, curves.t, curves.y, curves.group, start=s, shared="rate") for s in (GUESS, start))
    np.testing.assert_allclose(a.table.to_numpy(), b.table.to_numpy(), rtol=1e-6)


def test_soft_ties_run_from_own_to_shared(curves):
    options = dict(start=GUESS)
    own, common = (fit_curves(decay, curves.t, curves.y, curves.group, start=GUESS, shared=s) for s in ((), "rate"))
    tied = [fit_curves(decay, curves.t, curves.y, curves.group, strength={"rate": λ}, **options) for λ in (0., .01, 1., 1e8)]
    torch.testing.assert_close(tied[0].estimates["rate"], own.estimates["rate"])
    torch.testing.assert_close(tied[-1].estimates["rate"], common.estimates["rate"].expand(4), rtol=1e-5, atol=0)
    torch.testing.assert_close(tied[-1].errors["rate"], common.errors["rate"].expand(4), rtol=1e-4, atol=0)
    spread = [t.estimates["rate"].std().item() for t in tied]
    assert spread == sorted(spread, reverse=True)
    freedom = [t.freedom for t in tied]
    assert freedom == sorted(freedom) and freedom[0] == pytest.approx(own.freedom) and freedom[-1] == pytest.approx(common.freedom, abs=1e-3)


def test_tied_optimum_has_no_slope(curves):
    fit, λ = fit_curves(decay, curves.t, curves.y, curves.group, start=GUESS, strength={"rate": .5, "offset": .1}), dict(rate=.5, offset=.1)
    constants = {name: v.clone().requires_grad_() for name, v in fit.estimates.items()}
    loss = (decay(curves.t, *[c[curves.group] for c in constants.values()]) - curves.y).square().sum()
    loss = loss + sum(λ[n] * (constants[n] - constants[n].mean()).square().sum() for n in λ)
    loss.backward()
    for c in constants.values(): assert c.grad.abs().max() < 1e-6


def test_claimed_error_is_the_scatter():
    truth = shared_curves(groups=3, noise=0., same_amplitude=True)
    rows, generator = [], torch.Generator().manual_seed(0)
    for _ in range(90):
        y = truth.y + .05 * torch.randn(truth.y.shape, generator=generator, dtype=torch.float64)
        fit = fit_curves(decay, truth.t, y, truth.group, start=GUESS, shared="rate")
        low, high = fit.interval("rate")
        rows.append((fit.estimates["rate"], fit.errors["rate"], low < 1 < high))
    rate, error, covered = torch.tensor(rows, dtype=torch.float64).T
    assert abs(rate.std() / error.mean() - 1) < 3 / math.sqrt(2 * 89)
    assert abs(covered.mean() - .95) < 3 * math.sqrt(.95 * .05 / 90)


def test_table_and_repr(curves):
    fit = fit_curves(decay, curves.t, curves.y, curves.group, start=GUESS, shared="rate")
    assert fit.table.loc[("rate", "all"), "estimate"] == fit.estimates["rate"].item()
    assert fit.table.loc[("offset", 3), "standard error"] == fit.errors["offset"][3].item()
    assert "4 curves" in repr(fit) and "amplitude" in repr(fit) and "<table" in fit._repr_html_()
    with pytest.raises(ValueError, match="^name: one of .* is expected, got 'speed'"): fit.interval("speed")
    for level in (0, 1, 95):
        with pytest.raises(ValueError, match="level"): fit.interval("rate", level)


# Bad input

T = torch.linspace(0, 3, 12, dtype=torch.float64).repeat(2)
G = torch.arange(2).repeat_interleave(12)
V = decay(T, 1., 1., 0.) + .01 * torch.cos(9 * T)
BROKEN = V.clone()
BROKEN[3] = math.nan

@pytest.mark.parametrize("change, message", [
    (dict(y=V[:-1]), r"y: shape \(23,\), but t has \(24,\)"),
    (dict(y=V[:, None]), r"y: shape \(24, 1\)"),
    (dict(group=G[:-1]), r"group: shape \(23,\)"),
    (dict(y=BROKEN), "y: 1 of 24 values are NaN"),
    (dict(t=T / 0), "t: 24 of 24 values are NaN or infinite"),
    (dict(t=T[:0], y=V[:0], group=G[:0]), "no points"),
    (dict(noise=0.), "noise"), (dict(noise=-1.), "noise"), (dict(noise=math.nan), "noise"), (dict(noise=torch.ones(3)), r"noise: shape \(3,\)"),
    (dict(shared="speed"), "no constant 'speed'"), (dict(shared=("rate", "speed")), "no constant 'speed'"),
    (dict(strength={"speed": 1.}), "no constant 'speed'"),
    (dict(strength={"rate": -1.}), "strength of 'rate'"), (dict(strength={"rate": math.inf}), "strength of 'rate'"),
    (dict(strength={"rate": 1.}, shared="rate"), "shared already"),
    (dict(start=dict(amplitude=1., rate=1.)), "start: .*do not fit"),
    (dict(start=dict(GUESS, speed=1.)), "start: .*do not fit"),
    (dict(start=dict(GUESS, rate=[1., 1., 1.])), "'rate' has 3 values, 2 are expected"),
    (dict(start=dict(GUESS, rate=[1., 1.]), shared="rate"), "'rate' has 2 values, 1 are expected"),
    (dict(start=dict(GUESS, rate=math.nan)), "start: 'rate'"), (dict(start=dict(GUESS, rate=[[1., 1.]])), "start: 'rate': one number per curve at most"), (dict(steps=0), "^steps: "), (dict(steps=-3), "^steps: "),
    (dict(strength={"rate": math.nan}), "strength of 'rate'"), (dict(curve=lambda t, a: 3.0, start=dict(a=1.)), "^curve: values that follow from the constants"), (dict(curve=lambda t, a: t, start=dict(a=1.)), "^curve: values that follow"),
    (dict(curve=lambda t, a: a.detach() * t, start=dict(a=1.)), "^curve: values that follow"), (dict(curve=lambda t, a: a @ torch.zeros(3, 3), start=dict(a=1.)), "^curve: values that follow"), (dict(curve=lambda t, a: None, start=dict(a=1.)), "^curve: "),
    (dict(start=dict(GUESS, rate=-1e4)), "not finite"),
    (dict(t=T[:14], y=V[:14], group=G[:14]), "2 points for 3 constants"),
    (dict(curve=lambda t, a, b: (a + b) * t, start=dict(a=1., b=2.)), "do not determine a, b"),
    (dict(curve=lambda t, a, b: a * t + 0 * b, start=dict(a=1., b=2.)), "do not determine b"),
    (dict(curve=lambda t, a: a * t.mean() + 0 * t, start=dict(a=1.)), "by itself"),
    (dict(curve=lambda t, a: (a * t).sum(), start=dict(a=1.)), "24 values are expected"),
])
def test_bad_curves(change, message):
    options = dict(curve=decay, t=T, y=V, group=G, start=GUESS) | change
    with pytest.raises(ValueError, match=message): fit_curves(**options)


@pytest.mark.parametrize("change", [dict(group=G.double()), dict(group=G > 0), dict(group="ab"), dict(group=[None]), dict(start=[1., 1., 0.]), dict(start={}), dict(start=None), dict(start={1: 2.}), dict(start=dict(GUESS, rate=None)), dict(start=dict(GUESS, rate="1")),
                                    dict(curve=None), dict(curve=3), dict(curve="decay"), dict(curve=max), dict(t=None), dict(t="abc"), dict(t=[[1.0], [2.0, 3.0]]), dict(t=T > 1), dict(y=None), dict(y=V.cfloat()), dict(y=V.to_sparse()), dict(t=T.to_sparse()), dict(y=[None] * 24),
                                    dict(noise="small"), dict(noise=True), dict(noise=[None]), dict(shared=3), dict(shared=[3]), dict(shared=None), dict(shared=[["rate"]]), dict(strength=3), dict(strength=["rate"]), dict(strength={"rate": "big"}),
                                    dict(strength={"rate": True}), dict(strength={"rate": None}), dict(steps=None), dict(steps=10.0), dict(steps=True)], ids=lambda change: next(iter(change)))
def test_bad_kinds(change):
    with pytest.raises(TypeError, match=f"^{next(iter(change))}.* expected, got"): fit_curves(**dict(curve=decay, t=T, y=V, group=G, start=GUESS) | change)


def test_points_for_as_many_constants():
    t, y = T[:3], V[:3]
    with pytest.raises(ValueError, match="leave none"): fit_curves(decay, t, y, start=GUESS)
    exact = fit_curves(decay, t, y, start=GUESS, noise=.1)
    torch.testing.assert_close(decay(t, *exact.estimates.values()), y)


def test_a_curve_that_writes_to_its_points_changes_none():
    t = T.clone()
    fit = fit_curves(lambda t, a, b: t.mul_(2) * a + b, t, V, G, start=dict(a=1., b=0.))
    assert torch.equal(t, T)
    torch.testing.assert_close(2 * fit.estimates["a"], fit_curves(lambda t, a, b: t * a + b, T, V, G, start=dict(a=1., b=0.)).estimates["a"])


def test_no_convergence():
    with pytest.raises(RuntimeError, match="no convergence in"): fit_curves(decay, T, V, G, start=GUESS, steps=2)


@pytest.mark.parametrize("name, level, error, message", [(None, .9, TypeError, "^name: "), (3, .9, TypeError, "^name: "), ("rate", None, TypeError, "^level: "), ("rate", "0.9", TypeError, "^level: "), ("rate", True, TypeError, "^level: "),
                                                         ("rate", 0, ValueError, "^level: "), ("rate", 1, ValueError, "^level: "), ("rate", math.nan, ValueError, "^level: ")])
def test_bad_arguments_of_an_interval(name, level, error, message):
    fit = fit_curves(decay, T, V, G, start=GUESS)
    with pytest.raises(error, match=message): fit.interval(name, level)
