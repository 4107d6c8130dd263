"""The hybrids of chapter 05_hybrids: laws, limits against independent software, and bad input."""
import copy
import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.linear_model import LogisticRegression
from torch import nn

from sharetie.hybrids import GaussianClasses, Hybrid, fit_hybrid, tie_deviation

KINDS = [("diagonal", False), ("diagonal", True), ("spherical", False), ("spherical", True)]


def randomized(seed=0, classes=3, width=2, **options):
    "A model with random parameters in double precision."
    model, generator = GaussianClasses(classes, width, **options).double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def clouds(n=150, seed=0):
    "Three overlapping classes of two inputs."
    y = torch.arange(n) % 3
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.tensor([[0., 0.], [1.5, 0.], [0., 1.5]], dtype=torch.float64)[y] + noise, y


# The model

@pytest.mark.parametrize("covariance, shared", KINDS)
def test_log_joint_is_that_of_scipy(covariance, shared):
    model, (x, _) = randomized(covariance=covariance, shared=shared), clouds(7)
    variance = model.log_variance.exp().expand_as(model.mean).detach().numpy()
    prior = model.score.softmax(-1).detach().numpy()
    expected = [multivariate_normal(m, np.diag(v)).logpdf(x) + np.log(π) for m, v, π in zip(model.mean.detach().numpy(), variance, prior)]
    np.testing.assert_allclose(model.log_joint(x).detach(), np.stack(expected, 1), rtol=1e-10)


def test_evidence_and_posterior_follow_from_the_joint():
    model, (x, _) = randomized(), clouds(7)
    torch.testing.assert_close(model.log_evidence(x), model.log_joint(x).exp().sum(-1).log())
    torch.testing.assert_close(model.log_posterior(x).exp().sum(-1), torch.ones(7, dtype=torch.float64))


def test_evidence_integrates_to_one():
    grid = torch.linspace(-30, 30, 1201, dtype=torch.float64)[:, None]
    density = randomized(width=1).log_evidence(grid).exp()
    assert torch.trapezoid(density, grid[:, 0]).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("covariance, shared", KINDS)
def test_copies_are_models_of_their_own(covariance, shared):
    single = [randomized(seed, covariance=covariance, shared=shared) for seed in range(2)]
    both = GaussianClasses(3, 2, covariance, shared, copies=(2,)).double()
    with torch.no_grad():
        for p, *parts in zip(both.parameters(), *[m.parameters() for m in single]): p.copy_(torch.stack(parts))
    x, _ = clouds(5)
    torch.testing.assert_close(both.log_joint(x), torch.stack([m.log_joint(x) for m in single]))
    own = torch.stack([x, -x])
    torch.testing.assert_close(both.log_joint(own)[1], single[1].log_joint(-x))


def test_gradients():
    model, (x, y) = randomized(), clouds(4)
    names = [name for name, _ in model.named_parameters()]
    def loss(*values): return torch.func.functional_call(model, dict(zip(names, values)), (x,))
    model.forward = lambda x: model.log_posterior(x).gather(-1, y[:, None]).sum() + model.log_evidence(x).sum()
    assert torch.autograd.gradcheck(loss, tuple(p.detach().clone().requires_grad_() for p in model.parameters()))


# The tie

def test_deviation_is_increasing_and_inverts():
    alphas = np.linspace(.01, .99, 50)
    deviations = np.array([tie_deviation(a) for a in alphas])
    assert (np.diff(deviations) > 0).all()
    np.testing.assert_allclose(deviations**.5 / (1 + deviations**.5), alphas)
    assert tie_deviation(0) == 0 and tie_deviation(1) == math.inf


@pytest.mark.parametrize("alpha, error", [(-.1, ValueError), (1.1, ValueError), (math.nan, ValueError), (math.inf, ValueError), (1e-5, ValueError),
                                          ("0.5", TypeError), (True, TypeError), (None, TypeError)])
def test_bad_alpha(alpha, error):
    with pytest.raises(error, match="alpha"): tie_deviation(alpha)
    with pytest.raises(error, match="alpha"): Hybrid(randomized(), alpha=alpha)


@pytest.mark.parametrize("alpha", [.2, .5, .8])
def test_loss_is_the_sum_of_its_terms(alpha):
    a, b, (x, y) = randomized(1), randomized(2), clouds(6)
    hybrid = Hybrid(a, b, alpha, prior=2.)
    expected = -a.log_posterior(x).gather(-1, y[:, None]).sum() - b.log_evidence(x).sum() - b.log_evidence(2 * x).sum()
    expected = expected + sum((p - q).square().sum() for p, q in zip(a.parameters(), b.parameters())) / (2 * tie_deviation(alpha)**2)
    expected = expected + sum(p.square().sum() for m in (a, b) for p in m.parameters()) / (2 * 2.**2)
    torch.testing.assert_close(hybrid.loss(x, y, 2 * x), expected)


def test_loss_adds_over_copies():
    model, (x, y) = GaussianClasses(3, 2, copies=(4,)).double(), clouds(9)
    one = Hybrid(GaussianClasses(3, 2).double(), alpha=.5)
    torch.testing.assert_close(Hybrid(model, alpha=.5).loss(x, y, x), 4 * one.loss(x, y, x))


def test_generative_end_is_one_module():
    hybrid = Hybrid(randomized(), alpha=0)
    assert hybrid.generator is hybrid.classifier and hybrid.tie is None
    assert len(list(hybrid.parameters())) == 3
    assert len(list(hybrid.at(.5).parameters())) == 6 and hybrid.at(.5).generator is not hybrid.generator
    back = hybrid.at(.5).at(0)
    assert back.generator is back.classifier


def test_at_copies():
    hybrid = Hybrid(randomized(1), randomized(2), alpha=.5, prior=3.)
    other = hybrid.at(.7)
    assert other.prior == 3. and other.alpha == .7
    for p, q in zip(hybrid.parameters(), other.parameters()):
        assert p is not q and torch.equal(p, q)
    assert torch.equal(hybrid.at(0).classifier.mean, hybrid.generator.mean)


def test_a_copied_hybrid_ties_its_own_modules():
    hybrid = Hybrid(randomized(1), randomized(2), alpha=.5)
    twin = copy.deepcopy(hybrid)
    with torch.no_grad(): twin.classifier.mean.copy_(twin.generator.mean)
    assert twin.tie() < hybrid.tie()


def test_generative_fit_is_a_fixed_point_of_expectation_maximization():
    (x, y), (more, _) = clouds(30), clouds(120, seed=1)
    hybrid = Hybrid(GaussianClasses(3, 2).double(), alpha=0)
    fitted = fit_hybrid(hybrid, (x, y), more, steps=500, tolerance=1e-8)
    assert fitted.gradient < 1e-5
    model = hybrid.classifier
    share = torch.cat([nn.functional.one_hot(y, 3).double(), model.log_posterior(more).exp().detach()])
    inputs, weight = torch.cat([x, more]), share.sum(0)
    mean = share.T @ inputs / weight[:, None]
    variance = share.T @ inputs.square() / weight[:, None] - mean.square()
    torch.testing.assert_close(model.mean.detach(), mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.log_variance.exp().detach(), variance, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.score.softmax(0).detach(), weight / weight.sum(), atol=1e-5, rtol=0)


@pytest.mark.long
def test_small_alpha_nears_the_generative_end():
    data, (more, _) = clouds(30), clouds(60, seed=1)
    generative = Hybrid(GaussianClasses(3, 2).double(), alpha=0, prior=3.)
    fit_hybrid(generative, data, more, steps=500, tolerance=1e-8)
    gaps = []
    for alpha in (.1, .2):
        hybrid = generative.at(alpha)
        fit_hybrid(hybrid, data, more, steps=500, tolerance=1e-6)
        gaps.append((hybrid(data[0]) - generative(data[0])).abs().max().item())
    assert gaps[0] < .02 and gaps[1] > 2 * gaps[0]


@pytest.mark.parametrize("other", [0, 1])
def test_discriminative_end_is_logistic_regression_whatever_the_generator(other):
    data = clouds()
    hybrid = Hybrid(GaussianClasses(3, 2, "spherical", shared=True).double(), randomized(other, covariance="spherical", shared=True), alpha=1)
    fit_hybrid(hybrid, data, -data[0], steps=500, tolerance=1e-7)
    regression = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000).fit(*data)
    np.testing.assert_allclose(hybrid(data[0]).exp().detach(), regression.predict_proba(data[0]), atol=1e-4)


def test_unlabelled_inputs_do_not_reach_a_free_classifier():
    hybrid, (x, y) = Hybrid(randomized(1), randomized(2), alpha=1), clouds(6)
    slopes = [torch.autograd.grad(hybrid.loss(x, y, u), list(hybrid.classifier.parameters())) for u in (None, 5 * x)]
    for a, b in zip(*slopes): torch.testing.assert_close(a, b)


def test_any_modules_with_the_same_names():
    class Categories(nn.Module):
        "Independent yes-or-no inputs given the class."
        def __init__(self):
            super().__init__()
            self.logits, self.score = nn.Parameter(torch.zeros(2, 4)), nn.Parameter(torch.zeros(2))
        def joint(self, x):
            log = nn.functional.logsigmoid
            return x @ log(self.logits).T + (1 - x) @ log(-self.logits).T + self.score.log_softmax(0)
        def log_posterior(self, x): return self.joint(x).log_softmax(-1)
        def log_evidence(self, x): return self.joint(x).logsumexp(-1)
    x = (torch.rand(40, 4, generator=torch.Generator().manual_seed(0)) < .5).float()
    y = x[:, 0].long()
    hybrid = Hybrid(Categories(), alpha=.8, prior=3.)
    before = hybrid.loss(x, y).item()
    assert fit_hybrid(hybrid, (x, y)).objective < before
    assert (hybrid(x).argmax(-1) == y).all()


def test_fit_reports_where_it_stopped():
    hybrid, data = Hybrid(GaussianClasses(3, 2).double(), alpha=.5, prior=3.), clouds(30)
    short = fit_hybrid(hybrid, data, steps=2)
    full = fit_hybrid(hybrid, data, steps=300)
    assert short.steps == 2 and full.objective < short.objective and full.gradient < 1e-4 < short.gradient
    assert full.objective == pytest.approx(hybrid.loss(*data).item())


# Bad input

@pytest.mark.parametrize("options, message", [(dict(classes=1, width=2), "at least 2"), (dict(classes=3, width=0), "got 0"),
                                              (dict(classes=3, width=2, covariance="full"), "'full'")])
def test_bad_model(options, message):
    with pytest.raises(ValueError, match=message): GaussianClasses(**options)


X, Y = clouds(6)

@pytest.mark.parametrize("x, y, error, message", [
    (X, Y + 1, ValueError, "labels from 0 to 2 are expected, got 1 to 3"),
    (X, Y - 1, ValueError, "got -1 to 1"),
    (X, Y.double(), TypeError, "y: a tensor of whole numbers is expected, got Tensor of float64"),
    (X, Y > 0, TypeError, "y: a tensor of whole numbers is expected, got Tensor of bool"),
    (X, None, TypeError, "y: a tensor of whole numbers is expected, got None"), (X, Y.tolist(), TypeError, "^y: "), (None, Y, TypeError, "^x: a floating point tensor is expected, got None"),
    (X.tolist(), Y, TypeError, "^x: "), (X.long(), Y, TypeError, "^x: "), (X.float(), Y, TypeError, "^x: a tensor of torch.float64, as the parameters, is expected"),
    (X[:, :1], Y, ValueError, r"^x: a tensor of shape \(…, b, 2\) is expected, got \(6, 1\)"), (X[0], Y, ValueError, r"^x: a tensor of shape"),
    (X, Y[:-1], ValueError, r"shape \(5,\)"),
    (X, Y[:, None], ValueError, r"shape \(6, 1\)"),
    (X.to("meta"), Y, ValueError, "^x: a tensor on cpu, as the parameters, is expected, got 'meta'"), (X, Y.to("meta"), ValueError, "^y: labels with values is expected"),
    (X[:0], Y[:0], ValueError, "no labeled example")])
def test_bad_labels_change_nothing(x, y, error, message):
    hybrid = Hybrid(randomized(), alpha=.5)
    before = copy.deepcopy(hybrid.state_dict())
    with pytest.raises(error, match=message): hybrid.loss(x, y)
    with pytest.raises(error, match=message): fit_hybrid(hybrid, (x, y))
    for name, value in hybrid.state_dict().items(): assert torch.equal(value, before[name])


def test_nan_inputs_change_nothing():
    hybrid, x = Hybrid(randomized(), alpha=.5), X.clone()
    x[2, 1] = math.nan
    before = copy.deepcopy(hybrid.state_dict())
    with pytest.raises(ValueError, match="nan at the start"): fit_hybrid(hybrid, (x, Y))
    for name, value in hybrid.state_dict().items(): assert torch.equal(value, before[name])


def test_bad_pairs():
    a, b = randomized(1), randomized(2)
    with pytest.raises(ValueError, match="generator"): Hybrid(a, b, alpha=0)
    with pytest.raises(ValueError, match="generator"): Hybrid(a, a, alpha=.5)
    with pytest.raises(TypeError, match=r"^classifier: a module with log_posterior\(x\) is expected, got Linear"): Hybrid(nn.Linear(2, 3))
    with pytest.raises(TypeError, match=r"^generator: a module with log_evidence\(x\) is expected, got Linear"): Hybrid(a, nn.Linear(2, 3))
    b.log_evidence = None
    with pytest.raises(TypeError, match=r"^generator: a module with log_evidence\(x\) is expected"): Hybrid(a, b)
    with pytest.raises(ValueError, match="shape"): Hybrid(a, randomized(classes=4))
    for prior in (0, -1, math.nan):
        with pytest.raises(ValueError, match="prior"): Hybrid(a, prior=prior)
    with pytest.raises(TypeError, match="prior"): Hybrid(a, prior="wide")


@pytest.mark.parametrize("options, error, message", [
    (dict(classes=None), TypeError, "^classes: "), (dict(classes=2.0), TypeError, "^classes: "), (dict(classes=True), TypeError, "^classes: "), (dict(width="2"), TypeError, "^width: "),
    (dict(width=-1), ValueError, "^width: "), (dict(covariance=None), TypeError, "^covariance: one of 'diagonal', 'spherical' is expected, got None"), (dict(covariance="Diagonal"), ValueError, "did you mean 'diagonal'"),
    (dict(shared=None), TypeError, "^shared: True or False"), (dict(shared="yes"), TypeError, "^shared: "), (dict(copies=3), TypeError, "^copies: a tuple of sizes is expected, got 3"),
    (dict(copies=(0,)), ValueError, "^copies: "), (dict(copies=(1.5,)), TypeError, "^copies: ")])
def test_bad_arguments_of_the_model(options, error, message):
    with pytest.raises(error, match=message): GaussianClasses(**{"classes": 3, "width": 2} | options)


@pytest.mark.parametrize("options, error, message", [
    (dict(classifier=None), TypeError, "^classifier: .* got NoneType"), (dict(classifier=3), TypeError, "^classifier: "), (dict(generator=3), TypeError, "^generator: "),
    *((dict(alpha=a), TypeError, "^alpha: a number is expected") for a in (None, "0.5", True, [0.5])), (dict(alpha=math.nan), ValueError, "^alpha: "),
    *((dict(prior=p), TypeError, "^prior: a number is expected") for p in (None, True, [1.0]))])
def test_bad_arguments_of_the_hybrid(options, error, message):
    with pytest.raises(error, match=message): Hybrid(**{"classifier": randomized()} | options)


@pytest.mark.parametrize("unlabeled, error, message", [([[1.0, 2.0]], TypeError, "^unlabeled: "), (3, TypeError, "^unlabeled: "), (X.long(), TypeError, "^unlabeled: "), (X.float(), ValueError, "^unlabeled: inputs like x"),
                                                       (X[:, :1], ValueError, "^unlabeled: inputs like x"), (X[0], ValueError, r"^unlabeled: a tensor of shape \(…, n, d\) is expected, got \(2,\)"), (X.to("meta"), ValueError, "^unlabeled: inputs on cpu, as x, is expected, got 'meta'")])
def test_bad_unlabeled_inputs(unlabeled, error, message):
    hybrid = Hybrid(randomized(), alpha=.5)
    with pytest.raises(error, match=message): hybrid.loss(X, Y, unlabeled)
    with pytest.raises(error, match=message): fit_hybrid(hybrid, (X, Y), unlabeled)


def test_inputs_for_another_number_of_copies():
    hybrid = Hybrid(GaussianClasses(3, 2, copies=(4,)).double(), alpha=.5)
    with pytest.raises(ValueError, match=r"^x: a shape that fits the model's copies, \(4,\), is expected, got \(3, 6, 2\)"): hybrid.loss(X.expand(3, 6, 2), Y)
    with pytest.raises(ValueError, match="^unlabeled: inputs like x"): hybrid.loss(X.expand(4, 6, 2), Y, X.expand(3, 6, 2))
    torch.testing.assert_close(hybrid.loss(X, Y, X), hybrid.loss(X.expand(4, 6, 2), Y, X.expand(1, 6, 2)))


@pytest.mark.parametrize("given, error", [(None, TypeError), ([1.0], TypeError), (torch.zeros(6, 3).long(), TypeError), (torch.tensor(1.0), ValueError), (torch.zeros(5, 3), ValueError)], ids=["none", "list", "integers", "scalar", "rows"])
def test_models_that_say_something_else(given, error):
    class Odd(GaussianClasses):
        def log_posterior(self, x): return given
        log_evidence = log_posterior
    with pytest.raises(error, match="^what log_posterior gives: .* is expected"): Hybrid(Odd(3, 2).double()).loss(X, Y)
    with pytest.raises(error, match="^what log_evidence gives: .* is expected"): Hybrid(randomized(), Odd(3, 2).double()).loss(X, Y)


def test_frozen_weights_stay():
    hybrid = Hybrid(randomized(), alpha=.5, prior=3.)
    hybrid.classifier.mean.requires_grad_(False)
    before = copy.deepcopy(hybrid.state_dict())
    fit_hybrid(hybrid, (X, Y), steps=3)
    same = {name for name, value in hybrid.state_dict().items() if torch.equal(value, before[name])}
    assert same == {"classifier.mean"}
    with pytest.raises(ValueError, match="^hybrid: at least one parameter that trains is expected, got 0"): fit_hybrid(hybrid.requires_grad_(False), (X, Y))


@pytest.mark.parametrize("arguments, error, message", [
    ((None, (X, Y)), TypeError, "^hybrid: a `Hybrid` is expected, got NoneType"), ((randomized(), (X, Y)), TypeError, "^hybrid: .* got GaussianClasses"), ((Hybrid(randomized()), None), TypeError, r"^labeled: a pair \(x, y\) is expected, got None"),
    ((Hybrid(randomized()), (X,)), TypeError, "^labeled: "), ((Hybrid(randomized()), X), TypeError, "^labeled: "), ((Hybrid(randomized()), (X, Y), None, 0), ValueError, "^steps: "), ((Hybrid(randomized()), (X, Y), None, None), TypeError, "^steps: "),
    ((Hybrid(randomized()), (X, Y), None, 1.5), TypeError, "^steps: "), ((Hybrid(randomized()), (X, Y), None, 9, -1.0), ValueError, "^tolerance: "), ((Hybrid(randomized()), (X, Y), None, 9, math.nan), ValueError, "^tolerance: "),
    ((Hybrid(randomized()), (X, Y), None, 9, None), TypeError, "^tolerance: ")])
def test_bad_arguments_of_the_fit(arguments, error, message):
    with pytest.raises(error, match=message): fit_hybrid(*arguments)
