"Scores of single weights and rewinding: against Jacobians multiplied by hand, finite differences and brute force; tied models, masks, bad input."
import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sharetie.checking import check_ties
from sharetie.criteria import _EACH, _MEANS, _MOVES, _PRODUCTS, _output_curvature, _output_diagonal, _Squares, curvature_rows, obd, remember, rewind_, taylor
from sharetie.masks import edges, magnitude, mask_, masks_of, prune_
from tied import Convs, Speaker, tasks


TIED = tasks(6)


@pytest.fixture(params=TIED)
def tied(request):
    torch.manual_seed(0)
    make, data, loss = TIED[request.param]
    x, y = data()
    model = make().double()
    return model, tuple(t.double() if t.is_floating_point() else t for t in (x, y)), loss


def squared_chain(layers, x, h):
    "Second derivatives of all weights of a chain, by squares of whole Jacobians, example by example."
    inputs = [x]
    for layer in layers: inputs.append(layer(inputs[-1]).detach())
    found = {}
    for i in reversed(range(len(layers))):
        layer = layers[i]
        for name, p in layer.named_parameters():
            total = 0
            for e in range(len(x)):
                jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(layer, {name: p}, (inputs[i][e:e + 1],)).flatten())(p.detach())
                total = total + torch.einsum("o,o...->...", h[e].flatten(), jacobian.square())
            found[f"{i}.{name}"] = total
        back = [torch.func.jacrev(lambda x: layer(x[None]).flatten())(inputs[i][e]).detach().square() for e in range(len(x))]
        h = torch.stack([torch.einsum("o,o...->...", h[e].flatten(), j) for e, j in enumerate(back)])
    return found


CHAINS = {
    "linear": lambda: [nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Sigmoid(), nn.Linear(4, 3)],
    "convolutions": lambda: [nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.GELU(), nn.Conv2d(4, 4, 2, groups=2), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 3)],
    "pools": lambda: [nn.Conv2d(2, 3, 3), nn.ELU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Dropout(.5), nn.Flatten(), nn.Linear(3, 3)],
    "transposed": lambda: [nn.Conv1d(2, 3, 2), nn.SiLU(), nn.ConvTranspose1d(3, 2, 2, stride=2), nn.Flatten(), nn.Linear(20, 3)],
}


@pytest.mark.parametrize("name", CHAINS)
def test_one_backward_pass_is_the_product_of_squared_jacobians(name):
    torch.manual_seed(1)
    layers = CHAINS[name]()
    model = nn.Sequential(*layers).double()
    if name == "convolutions":
        model(torch.rand(8, 2, 7, 7).double())
        with torch.no_grad(): layers[1].weight.uniform_(.5, 2)
    model.eval()
    x = {"linear": torch.rand(4, 6), "transposed": torch.rand(4, 2, 6)}.get(name, torch.rand(4, 2, 7, 7)).double()
    y = torch.randint(3, (4,))
    p = model(x).softmax(1)
    wanted = squared_chain(layers, x, (p * (1 - p)).detach() / 4)
    for key, score in obd(model, (x, y), F.cross_entropy, names="*").items():
        torch.testing.assert_close(score, wanted[key] * model.get_parameter(key).detach().square() / 2)


def test_residuals_products_and_numbers():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x): return 2 * (self.a(x) + x) * self.b(x) / 3

    torch.manual_seed(0)
    model, x, y = Branches().double(), torch.rand(5, 3).double(), torch.rand(5, 3).double()
    h = torch.full((5, 3), 2 / 3 / 5).double()
    factor = (2 / 3 * model.b(x)).square().detach()
    torch.testing.assert_close(obd(model, (x, y), F.mse_loss)["a.weight"], (h * factor).T @ x.square() * model.a.weight.detach().square() / 2)


@pytest.mark.parametrize("cross", [False, True])
def test_a_linear_model_is_scored_exactly(cross):
    torch.manual_seed(0)
    x, y = torch.randn(30, 5).double(), torch.randn(30, 2).double()
    model = nn.Linear(5, 2, bias=False).double()
    with torch.no_grad(): model.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    scores = obd(model, (x, y), F.mse_loss, cross=cross, batch_size=7)["weight"]
    for at in itertools.product(range(2), range(5)):
        without = copy.deepcopy(model)
        with torch.no_grad(): without.weight[at] = 0
        assert scores[at].item() == pytest.approx((F.mse_loss(without(x), y) - F.mse_loss(model(x), y)).item(), rel=1e-8)


def test_cross_terms_are_the_diagonal_of_gauss_and_newton(tied):
    model, data, loss = tied
    names = list(edges(model))
    rows = curvature_rows(model, data, loss)
    matrix = torch.einsum("pcn,pcm->nm", rows, rows) / len(data[1])
    h = torch.cat([(2 * s / w.square()).flatten() for s, w in zip(obd(model, data, loss, cross=True, batch_size=2).values(), edges(model).values())])
    torch.testing.assert_close(matrix.diagonal(), h)
    assert list(obd(model, data, loss)) == list(taylor(model, data, loss)) == names


@pytest.mark.parametrize("tied", ["twice", "reused", "autoencoder"], indirect=True)
def test_rows_are_the_derivatives_of_the_stored_weights(tied):
    "For squared error, by finite differences in the Parameter, all uses moving together."
    model, data, loss = tied
    name, w = next(iter(edges(model).items()))
    place, rows = model.get_parameter(name), curvature_rows(model, data, loss, name)
    for k in range(0, w.numel(), 7):
        out = []
        for sign in (1, -1):
            with torch.no_grad():
                place.view(-1)[k] += sign * 1e-6
                out.append(model(data[0]).flatten(1))
                place.view(-1)[k] -= sign * 1e-6
        slope = (out[0] - out[1]) / 2e-6
        torch.testing.assert_close(rows[:, :, k].square().sum(1), (2 / slope.shape[1] * slope.square()).sum(1), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("tied", ["twice", "reused", "autoencoder"], indirect=True)
def test_the_sum_over_uses_is_that_of_untied_copies(tied):
    model, data, loss = tied
    name, = edges(model)
    apart = copy.deepcopy(model)
    if isinstance(model, Convs): apart.b.weight = nn.Parameter(apart.a.weight.detach().clone())
    elif model[0] is model[2]: apart[2] = copy.deepcopy(apart[0])
    else:
        apart[2] = nn.Linear(3, 5).double()
        apart[2].load_state_dict({"weight": model[2].weight.detach(), "bias": model[2].bias.detach()})
    one, two = obd(apart, data, loss).values()
    torch.testing.assert_close(obd(model, data, loss)[name], one + (two if two.shape == one.shape else two.T))


def test_taylor_is_the_slope_times_the_weight(tied):
    model, data, loss = tied
    scores = taylor(model, data, loss)
    loss(model(data[0]), data[1]).backward()
    for name, s in scores.items():
        p = model.get_parameter(name)
        torch.testing.assert_close(s, (p * p.grad).abs().detach())


def test_what_is_masked_scores_nothing_and_frozen_weights_are_scored(tied):
    model, data, loss = tied
    for p in model.parameters(): p.requires_grad_(False)
    prune_(model, magnitude(model), .4)
    for criterion in (taylor, obd, lambda *a: obd(*a, cross=True)):
        for name, s in criterion(model, data, loss).items(): assert (s[~masks_of(model)[name]] == 0).all() and s.max() > 0 and not s.requires_grad
    assert not any(p.requires_grad for p in model.parameters()) and model.training
    check_ties(model)


def test_rewinding_keeps_masks_and_ties(tied):
    model, data, loss = tied
    began = remember(model)
    prune_(model, magnitude(model), .5)
    for _ in range(3):
        optimizer = torch.optim.SGD(model.parameters(), .1)
        loss(model(data[0]), data[1]).backward()
        optimizer.step()
    assert rewind_(model, began) is model
    check_ties(model)
    for name, w in edges(model).items(): assert torch.equal(w, torch.where(masks_of(model)[name], began[name], 0))
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(data[0]), model(data[0]))


def test_rewinding_takes_any_name_of_a_tied_weight():
    model = Speaker(words=7, width=4)
    rewind_(model, {"head.weight": torch.ones(7, 4)})
    assert (model.table.weight == 1).all() and model.table.weight is model.head.weight


def test_unused_weights_score_zero():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.spare = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x): return self.a(x)

    data = torch.rand(3, 2), torch.rand(3, 2)
    for criterion in (taylor, obd, lambda *a: obd(*a, cross=True)): assert (criterion(Spare(), data, F.mse_loss)["spare.weight"] == 0).all()


# Bad input

class Detached(nn.Linear):
    def forward(self, x): return super().forward(x).detach()


GOOD = torch.rand(4, 3), torch.rand(4, 2)
BAD = {
    "no module": (lambda: taylor(3, GOOD, F.mse_loss), TypeError, "model: a module"),
    "no pair": (lambda: obd(nn.Linear(3, 2), GOOD[0], F.mse_loss), TypeError, "data: a pair"),
    "no examples": (lambda: obd(nn.Linear(3, 2), (torch.rand(0, 3), torch.rand(0, 2)), F.mse_loss), ValueError, "at least one example"),
    "lengths": (lambda: taylor(nn.Linear(3, 2), (GOOD[0], GOOD[1][:2]), F.mse_loss), ValueError, "an equal number of examples"),
    "no loss": (lambda: taylor(nn.Linear(3, 2), GOOD, 3), TypeError, "loss: a function"),
    "sum of parts": (lambda: taylor(nn.Linear(3, 2), GOOD, lambda z, y: (z - y).square().sum(), batch_size=1), ValueError, "loss: a mean over examples"),
    "sum": (lambda: obd(nn.Linear(3, 2), GOOD, lambda z, y: (z - y).square().sum()), ValueError, "a mean over examples"),
    "batch": (lambda: obd(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), GOOD, F.mse_loss), ValueError, "layer_norm mixes entries"),
    "between": (lambda: obd(nn.Sequential(nn.Conv1d(1, 1, 1), nn.Upsample(scale_factor=2, mode="linear")), (torch.rand(4, 1, 3), torch.rand(4, 1, 6)), F.mse_loss),
                ValueError, "interpolate mixes entries"),
    "names": (lambda: obd(nn.Linear(3, 2), GOOD, F.mse_loss, names="wieght"), ValueError, "matches none"),
    "batch size": (lambda: obd(nn.Linear(3, 2), GOOD, F.mse_loss, cross=True, batch_size=0), ValueError, "batch_size"),
    "batch size, one pass": (lambda: obd(nn.Linear(3, 2), GOOD, F.mse_loss, batch_size=0), ValueError, "batch_size"),
    "batch size, slope": (lambda: taylor(nn.Linear(3, 2), GOOD, F.mse_loss, batch_size=1.5), TypeError, "batch_size"),
    "cross": (lambda: obd(nn.Linear(3, 2), GOOD, F.mse_loss, cross=1), TypeError, "True or False"),
    "recurrent": (lambda: taylor(nn.LSTM(3, 2), GOOD, F.mse_loss), ValueError, "would not see a mask"),
    "each": (lambda: taylor(nn.Linear(3, 2), GOOD, lambda z, y: (z - y).square()), ValueError, "loss: a function to one number"),
    "each, twice": (lambda: obd(nn.Linear(3, 2), GOOD, lambda z, y: (z - y).square().mean(1)), ValueError, "loss: a function to one number"),
    "nan, slope": (lambda: taylor(nn.Linear(3, 2), (GOOD[0] * torch.nan, GOOD[1]), F.mse_loss), ValueError, "data: .* finite"),
    "nan, curvature": (lambda: obd(nn.Linear(3, 2), (GOOD[0] * torch.nan, GOOD[1]), F.mse_loss), ValueError, "data: .* finite"),
    "nan, rows": (lambda: curvature_rows(nn.Linear(3, 2), (GOOD[0] * torch.nan, GOOD[1]), F.mse_loss), ValueError, "data: .* finite"),
    "no slope": (lambda: taylor(Detached(3, 2), GOOD, F.mse_loss), ValueError, "names: a weight on which the outputs depend"),
    "no curvature": (lambda: obd(Detached(3, 2), GOOD, F.mse_loss), ValueError, "names: a weight on which the outputs depend"),
    "rewind two": (lambda: rewind_(Speaker(words=7, width=4), {"table.weight": torch.ones(7, 4), "head.weight": torch.zeros(7, 4)}), ValueError, "one value for 'table.weight', which has several names"),
    "rewind nothing": (lambda: rewind_(nn.Linear(3, 2), 3), TypeError, "values: a dictionary"),
    "rewind elsewhere": (lambda: rewind_(nn.Linear(3, 2), {"wieght": GOOD[0]}), ValueError, "the name of a weight"),
    "rewind shape": (lambda: rewind_(nn.Linear(3, 2), {"weight": GOOD[0]}), ValueError, "a tensor of shape"),
    "rewind nan": (lambda: rewind_(nn.Linear(3, 2), {"weight": torch.full((2, 3), torch.nan)}), ValueError, "NaN"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, words = BAD[name]
    with pytest.raises(error, match=words): call()


def test_a_refusal_changes_nothing():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    mask_(model, {"0.weight": torch.rand(2, 3) > .5})
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError): rewind_(model, {"0.weight": torch.ones(2, 3), "1.weight": torch.ones(1)})
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


# What models do besides layers

def written_like(f):
    "A model of two layers with `f` of the first one's output, its input and itself between."
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x): return self.b(f(self.a(x), x, self))

    torch.manual_seed(0)
    return Model().double()


def added(h, x, model):
    h += x
    return h


def scaled(h, x, model):
    h *= 3
    return h


ALIKE = {"in place": (lambda h, x, m: F.elu(h, inplace=True), lambda h, x, m: F.elu(h)), "in place, by position": (lambda h, x, m: F.leaky_relu(h, .3, True), lambda h, x, m: F.leaky_relu(h, .3)),
         "by its name": (lambda h, x, m: h.sigmoid_(), lambda h, x, m: h.sigmoid()), "a sum in place": (added, lambda h, x, m: h + x), "a product in place": (scaled, lambda h, x, m: 3 * h),
         "a factor": (lambda h, x, m: torch.add(x, h, alpha=3), lambda h, x, m: x + 3 * h), "a power": (lambda h, x, m: h ** 2, lambda h, x, m: h.square()),
         "an argument by name": (lambda h, x, m: F.relu(input=h), lambda h, x, m: h.relu()), "weights by name": (lambda h, x, m: F.linear(h, weight=m.a.weight, bias=m.a.bias), lambda h, x, m: m.a(h)),
         "parts": (lambda h, x, m: torch.cat(h.split([1, 2], 1), 1), lambda h, x, m: h), "what an in-place function leaves": (lambda h, x, m: (h.relu_(), h)[1], lambda h, x, m: h.relu())}


@pytest.mark.parametrize("name", ALIKE)
def test_however_a_function_is_written_its_curvature_is_one(name):
    data = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    one, other = (obd(written_like(f), data, F.mse_loss) for f in ALIKE[name])
    for key in one: torch.testing.assert_close(one[key], other[key])


@pytest.mark.parametrize("f", [lambda h, x, m: torch.var_mean(h, 1, keepdim=True)[0] * h, lambda h, x, m: F.multi_head_attention_forward(
    h[:, None], h[:, None], h[:, None], 3, 1, torch.eye(3).double().repeat(3, 1), None, None, None, False, 0., torch.eye(3).double(), None)[0][:, 0]])
def test_functions_of_several_results_are_not_passed_over(f):
    with pytest.raises(ValueError, match="mixes entries"): obd(written_like(f), (torch.randn(6, 3).double(), torch.randn(6, 2).double()), F.mse_loss)


def test_rows_are_the_whole_hessian_where_a_model_is_linear():
    "Under cross-entropy too, against a Hessian by autograd, and the slope against one by hand."
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3).double(), torch.randn(9, 4).double(), torch.randint(3, (9,))
    def of(w): return F.cross_entropy(x @ w[:12].view(3, 4).T + w[12:], y)
    w = torch.cat([model.weight.flatten(), model.bias]).detach()
    rows = curvature_rows(model, (x, y), F.cross_entropy, "*").flatten(0, 1)
    torch.testing.assert_close(rows.T @ rows / 9, torch.func.hessian(of)(w))
    slope = (model(x).softmax(1) - F.one_hot(y, 3)).T @ x / 9
    torch.testing.assert_close(taylor(model, (x, y), F.cross_entropy)["weight"], (slope * model.weight).abs().detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), (torch.randn(8, 4), torch.randint(3, (8,)))
    half = copy.deepcopy(model).to(dtype)
    for options in ({}, {"cross": True}):
        exact = obd(model, (x, y), F.cross_entropy, **options)
        for name, s in obd(half, (x.to(dtype), y), F.cross_entropy, **options).items(): torch.testing.assert_close(s.float(), exact[name], rtol=.2, atol=.02 * exact[name].max().item())


def test_a_model_that_treats_examples_together_has_no_rows_of_its_own():
    class Centered(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            return out - out.mean(0)

    for criterion in (curvature_rows, lambda *a: obd(*a, cross=True)):
        with pytest.raises(ValueError, match="treats each example alone"): criterion(Centered(3, 2), GOOD, F.mse_loss)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.cell, self.out = nn.Linear(3, 3), nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x): return self.out(self.cell(self.inner(x).tanh())[0][:, -1])


def test_a_recurrent_layer_is_in_the_way_of_weights_before_it_alone():
    "And the exact diagonal needs no rule: it is that of autograd, example by example."
    torch.manual_seed(0)
    model, data = Recurrent().double(), (normal(4, 5, 3), normal(4, 2))
    with pytest.raises(ValueError, match="gru mixes entries"): obd(model, data, F.mse_loss, "inner.weight")
    before = [p.requires_grad_(i % 2 > 0).requires_grad for i, p in enumerate(model.parameters())]
    torch.testing.assert_close(obd(model, data, F.mse_loss, "out.weight"), obd(model, data, F.mse_loss, "out.weight", cross=True))
    assert [p.requires_grad for p in model.parameters()] == before
    w, total = model.inner.weight.requires_grad_(), 0
    for x in data[0]: total = total + sum(torch.autograd.grad(o, w, retain_graph=True)[0].square() for o in model(x[None])[0]) / 4
    torch.testing.assert_close(obd(model, data, F.mse_loss, "inner.weight", cross=True)["inner.weight"], total * w.detach().square() / 2)


@pytest.mark.parametrize("before", [nn.LayerNorm(3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Softmax(1)])
def test_what_comes_before_the_weights_needs_no_rule(before):
    model, data = nn.Sequential(nn.Linear(3, 3), before, nn.Linear(3, 2)).double(), (normal(4, 3), torch.randint(2, (4,)))
    torch.testing.assert_close(*[obd(model, data, F.cross_entropy, "2.weight", cross=cross) for cross in (False, True)])


def test_examples_come_some_at_a_time_to_the_same_end(tied):
    model, data, loss = tied
    for criterion in (taylor, obd):
        for size in (1, len(data[1]) - 1): torch.testing.assert_close(criterion(model, data, loss, batch_size=size), criterion(model, data, loss))


def test_no_square_of_the_outputs_is_in_memory():
    c = 3000
    model, data = nn.Linear(2, c), (torch.ones(1, 2), torch.rand(1, c))
    with torch.profiler.profile(profile_memory=True) as run: scores = obd(model, data, F.mse_loss)["weight"]
    assert max(e.cpu_memory_usage for e in run.events()) < c ** 2  # bytes, where the square takes 4 c²
    torch.testing.assert_close(scores, model.weight.detach().square() / c)


@pytest.mark.parametrize("loss", [F.mse_loss, F.smooth_l1_loss, lambda z, y: F.cross_entropy(z.flatten(1), y.flatten(1).softmax(1))])
def test_the_diagonal_of_the_loss_is_that_of_its_hessian(loss):
    z, y = normal(5, 2, 3), normal(5, 2, 3)
    torch.testing.assert_close(_output_diagonal(z, y, loss, numbers=60), _output_curvature(z, y, loss).diagonal(dim1=1, dim2=2).reshape(z.shape))


def test_a_compiled_model_is_scored_as_it_is_written():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    compiled = torch.compile(model, backend="eager")
    for name, s in obd(model, GOOD, F.mse_loss).items(): torch.testing.assert_close(obd(compiled, GOOD, F.mse_loss)[f"_orig_mod.{name}"], s)


@pytest.mark.parametrize("f", [taylor, obd, curvature_rows])
def test_data_that_the_model_cannot_take(f):
    with pytest.raises(ValueError, match="data: what the model can take"): f(nn.Linear(4, 3), (torch.rand(5, 3), torch.rand(5, 3)), F.mse_loss)


def test_advice_names_the_function_that_takes_it():
    model, data = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), (torch.rand(5, 4), torch.rand(5, 4))
    with pytest.raises(ValueError, match=r"layer_norm mixes entries .* obd\(…, cross=True\) needs no rule"): obd(model, data, F.mse_loss)


# Every operation that has a rule, with its options, against its squared Jacobian

def normal(*shape): return torch.randn(shape).double()


def positive(*shape): return torch.rand(shape).double() + .5


ENTRIES = {name: [(lambda x, name=name: getattr(F, name)(x), (normal(2, 6),))] for name in "relu relu6 leaky_relu elu selu celu gelu silu mish softplus hardtanh hardsigmoid hardswish softsign".split()}
ENTRIES |= {name: [(lambda x, name=name: getattr(torch, name)(x), (positive(2, 6),))] for name in "sigmoid tanh exp log sin cos square sqrt rsqrt reciprocal erf abs neg negative".split()}
ENTRIES |= {name: [(lambda x, name=name: getattr(F, name)(x, training=False), (normal(2, 3, 4, 4, 4)[..., 0, 0, 0] if name == "dropout" else normal(*[2, 3, 4, 4, 4][:2 + int(name[-2]) if name[-1] == "d" else 5]),))]
            for name in "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout".split()}
PAIRS = {name: [(lambda a, b, name=name: getattr(torch, name)(a, b), (normal(3, 4), positive(4)))] for name in "add sub subtract rsub mul multiply div divide true_divide maximum minimum".split()}
for name in ("add", "sub", "rsub"): PAIRS[name] += [(lambda a, b, name=name: getattr(torch, name)(a, b, alpha=-3), (normal(3, 4), normal(3, 1))), (lambda a, name=name: getattr(torch, name)(a, 2, alpha=5), (normal(3),))]
RULES = ENTRIES | PAIRS | {
    "log_sigmoid": [(F.logsigmoid, (normal(2, 6),))],
    "__neg__": [(lambda x: -x, (normal(3),))], "clamp": [(lambda x: x.clamp(-.5, .5), (normal(9),)), (torch.clamp, (normal(3, 4), normal(4) - 1, normal(3, 1) + 1))], "clip": [(lambda x: x.clip(0), (normal(9),))],
    "pow": [(lambda x: x.pow(3), (normal(4),)), (torch.pow, (positive(3, 2), normal(2))), (lambda x: torch.pow(input=x, exponent=2), (normal(4),))], "__pow__": [(lambda x: x ** 3, (normal(4),)), (lambda x: x ** -1, (positive(4),))],
    "__rpow__": [(lambda x: 2 ** x, (normal(4),))], "__add__": [(lambda a, b: a + b, (normal(3, 4), normal(4))), (lambda a: a + a, (normal(3),))], "__radd__": [(lambda x: 1 + x, (normal(4),))],
    "__sub__": [(lambda a, b: a - b, (normal(3, 4), normal(4))), (lambda a: a - 3, (normal(3),))], "__rsub__": [(lambda x: 1 - x, (normal(4),))], "__mul__": [(lambda a, b: a * b, (normal(3, 4), normal(3, 1))), (lambda a: a * a, (normal(4),)), (lambda a: a * -3, (normal(4),))],
    "__rmul__": [(lambda x: 3 * x, (normal(4),))], "__truediv__": [(lambda a, b: a / b, (normal(3, 4), positive(4))), (lambda a: a / 3, (normal(3),))], "__rdiv__": [(lambda x: 2 / x, (positive(4),))],
    "lerp": [(lambda a, b: torch.lerp(a, b, .3), (normal(4), normal(4))), (torch.lerp, (normal(4), normal(4), positive(4)))], "addcmul": [(lambda a, b, c: torch.addcmul(a, b, c, value=-2), (normal(4), normal(4), normal(4)))],
    "addcdiv": [(lambda a, b, c: torch.addcdiv(a, b, c, value=3), (normal(4), normal(4), positive(4)))],
    "linear": [(F.linear, (normal(3, 4), normal(2, 4), normal(2))), (F.linear, (normal(2, 3, 4), normal(2, 4)))], "matmul": [(torch.matmul, (normal(3, 4), normal(4, 2))), (torch.matmul, (normal(2, 3, 4), normal(4)))], "__matmul__": [(lambda a, b: a @ b, (normal(3, 4), normal(4, 2)))],
    "mm": [(torch.mm, (normal(3, 4), normal(4, 2)))], "bmm": [(torch.bmm, (normal(2, 3, 4), normal(2, 4, 2)))], "conv1d": [(lambda x, w, b: F.conv1d(x, w, b, 2, 1, 2), (normal(2, 3, 9), normal(4, 3, 2), normal(4)))],
    "conv2d": [(lambda x, w, b: F.conv2d(x, w, b, padding="same", groups=2), (normal(2, 4, 4, 4), normal(4, 2, 3, 3), normal(4))), (F.conv2d, (normal(3, 4, 4), normal(2, 3, 2, 2)))], "conv3d": [(F.conv3d, (normal(1, 2, 3, 3, 3), normal(2, 2, 2, 2, 2)))],
    "conv_transpose1d": [(lambda x, w, b: F.conv_transpose1d(x, w, b, stride=2), (normal(2, 3, 4), normal(3, 2, 3), normal(2)))], "conv_transpose2d": [(lambda x, w: F.conv_transpose2d(x, w, None, 2, 1, 1), (normal(2, 3, 3, 3), normal(3, 2, 3, 3)))],
    "conv_transpose3d": [(F.conv_transpose3d, (normal(1, 2, 2, 2, 2), normal(2, 1, 2, 2, 2)))],
    "where": [(lambda a, b: torch.where(a > b, a, b), (normal(3, 4), normal(4)))], "flatten": [(lambda x: x.flatten(1), (normal(2, 3, 2),))], "unflatten": [(lambda x: x.unflatten(1, (2, 3)), (normal(2, 6),))], "view": [(lambda x: x.view(-1), (normal(2, 3),))],
    "reshape": [(lambda x: x.reshape(3, 2), (normal(2, 3),))], "permute": [(lambda x: x.permute(2, 0, 1), (normal(2, 3, 2),))], "transpose": [(lambda x: x.transpose(0, 1), (normal(2, 3),))], "movedim": [(lambda x: x.movedim(0, 1), (normal(2, 3),))],
    "t": [(lambda x: x.t(), (normal(2, 3),))], "__get__": [(lambda x: x.mT, (normal(2, 3),))], "unsqueeze": [(lambda x: x.unsqueeze(0), (normal(3),))], "squeeze": [(lambda x: x.squeeze(0), (normal(1, 3),))], "expand": [(lambda x: x.expand(4, 3), (normal(1, 3),))],
    "contiguous": [(lambda x: x.contiguous(), (normal(3),))], "__getitem__": [(lambda x: x[[0, 0, 2]], (normal(3, 2),)), (lambda x: x[:, None, ::2], (normal(2, 4),))], "index_select": [(lambda x: x.index_select(0, torch.tensor([1, 1])), (normal(3, 2),))],
    "select": [(lambda x: x.select(0, 1), (normal(3, 2),))], "narrow": [(lambda x: x.narrow(0, 1, 2), (normal(3, 2),))], "chunk": [(lambda x: x.chunk(2)[1], (normal(4, 2),))], "split": [(lambda x: x.split([1, 3])[1], (normal(4, 2),))], "unbind": [(lambda x: x.unbind()[1], (normal(4, 2),))],
    "cat": [(lambda a, b: torch.cat([a, b, a]), (normal(2), normal(3)))], "stack": [(lambda a, b: torch.stack([a, b]), (normal(2), normal(2)))], "pad": [(lambda x, mode=mode: F.pad(x, (2, 1), mode), (normal(1, 2, 4),)) for mode in ("constant", "reflect", "replicate", "circular")],
    "sum": [(lambda x: x.sum(), (normal(3, 2),)), (lambda x: x.sum(1, keepdim=True), (normal(3, 2),))], "max": [(lambda x: x.max(), (normal(5),)), (lambda x: x.max(1)[0], (normal(2, 5),)), (lambda a: torch.max(a, other=torch.zeros(()).double()), (torch.tensor([0., 1, -1]).double(),))],
    "min": [(lambda x: x.min(1).values, (normal(2, 5),)), (lambda a, b: a.min(b), (torch.tensor([0., 1, -1]).double(), torch.zeros(3).double()))], "topk": [(lambda x: x.topk(2)[0], (normal(5),))], "sort": [(lambda x: x.sort()[0], (normal(5),))],
    "max_pool1d": [(lambda x: F.max_pool1d(x, 3, 1), (normal(1, 2, 6),))], "max_pool2d": [(lambda x: F.max_pool2d(x, 3, 2, 1), (normal(1, 2, 6, 6),))], "max_pool3d": [(lambda x: F.max_pool3d(x, 2), (normal(1, 1, 4, 4, 4),))], "adaptive_max_pool1d": [(lambda x: F.adaptive_max_pool1d(x, 4), (normal(1, 2, 6),))],
    "adaptive_max_pool2d": [(lambda x: F.adaptive_max_pool2d(x, (4, 3)), (normal(1, 2, 6, 5),))], "embedding": [(lambda w: F.embedding(torch.tensor([0, 2, 2]), w), (normal(4, 3),))], "clone": [(lambda x: x.clone(), (normal(3),))], "to": [(lambda x: x.to(torch.float64), (normal(3),))],
    "float": [(lambda x: x.float().double(), (normal(3),))], "double": [(lambda x: x.double(), (normal(3),))], "masked_fill": [(lambda x: x.masked_fill(x > 0, 1.), (normal(4),))], "roll": [(lambda x: x.roll(1), (normal(4),))], "flip": [(lambda x: x.flip(0), (normal(4),))],
    "mean": [(lambda x: x.mean(), (normal(3, 4),)), (lambda x: x.mean((0, 2), keepdim=True), (normal(3, 4, 2),))],
    "avg_pool1d": [(lambda x, o=o: F.avg_pool1d(x, **o), (normal(2, 3, 8),)) for o in (dict(kernel_size=3), dict(kernel_size=(3,), stride=2, padding=1, ceil_mode=True), dict(kernel_size=3, padding=1, count_include_pad=False))],
    "avg_pool2d": [(lambda x, o=o: F.avg_pool2d(x, **o), (normal(2, 5, 6),)) for o in (dict(kernel_size=2), dict(kernel_size=(3, 2), stride=(2, 1), padding=1), dict(kernel_size=3, stride=2, padding=1, ceil_mode=True, count_include_pad=False), dict(kernel_size=2, divisor_override=-3))],
    "avg_pool3d": [(lambda x: F.avg_pool3d(x, 2, 1, 1, True, False), (normal(1, 1, 3, 3, 3),)), (lambda x: F.avg_pool3d(x, (2, 1, 2), divisor_override=5), (normal(1, 1, 4, 3, 4),))],
    "adaptive_avg_pool1d": [(lambda x: F.adaptive_avg_pool1d(x, 4), (normal(1, 2, 6),))], "adaptive_avg_pool2d": [(lambda x: F.adaptive_avg_pool2d(x, (4, 3)), (normal(1, 2, 6, 10),))], "adaptive_avg_pool3d": [(lambda x: F.adaptive_avg_pool3d(x, 2), (normal(1, 1, 3, 4, 5),))],
    "batch_norm": [(lambda x, w, b: F.batch_norm(x, torch.arange(3.).double(), torch.arange(1., 4).double(), w, b), (normal(4, 3), normal(3), normal(3)))],
    "glu": [(F.glu, (normal(3, 4),)), (lambda x: F.glu(x, dim=0), (normal(4, 3),)), (lambda x: nn.GLU(1)(x), (normal(2, 6, 2),))],
    "interpolate": [(lambda x, o=o: F.interpolate(x, **o), (normal(2, 3, 4, 5),)) for o in (dict(scale_factor=2), dict(size=(7, 2), mode="nearest"), dict(size=6, mode="nearest-exact"))]}


def test_every_rule_is_tried(): assert set(RULES) == _EACH | _PRODUCTS | _MEANS | _MOVES | {"batch_norm", "glu", "interpolate"}


@pytest.mark.parametrize("name", RULES)
def test_the_way_back_is_the_squared_jacobian(name):
    for f, tensors in RULES[name]:
        jacobians = torch.autograd.functional.jacobian(f, tensors)
        tensors = [t.clone().requires_grad_() for t in tensors]
        with _Squares(): out = f(*tensors)
        h = positive(*out.shape)
        for got, j, t in zip(torch.autograd.grad(out, tensors, h), jacobians, tensors):
            torch.testing.assert_close(got, (h.flatten() @ j.reshape(h.numel(), -1).square()).view(t.shape))


@pytest.mark.parametrize("f", [lambda h, x, m: h.neg_(), lambda h, x, m: h.sub_(x, alpha=3), lambda h, x, m: 1 - h, lambda h, x, m: torch.sub(x, h), lambda h, x, m: h.tanh() - x, lambda h, x, m: (1 - h.sigmoid()) * x])
def test_what_is_taken_away_has_the_curvature_of_what_is_added(f):
    data = normal(6, 3), normal(6, 2)
    one, exact = (obd(written_like(f), data, F.mse_loss, names="b.weight", cross=cross) for cross in (False, True))
    torch.testing.assert_close(one, exact)
    assert obd(written_like(f), data, F.mse_loss)["a.weight"].min() >= 0
