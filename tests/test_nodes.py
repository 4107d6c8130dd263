"Scores of units: brute force against zeros in weights, Taylor terms against differences, planted units, choices."
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sharetie.nodes import Probe, activity, brute_force, by_size, least, onorm, prunable, removal_curve, taylor1, taylor2
from sharetie.results import set_seed
from sharetie.shrinking import remove_units_
from sharetie.ties import Transpose, tie_
from sharetie.tracing import trace_units

CRITERIA = {"brute_force": brute_force, "taylor1": taylor1, "taylor2": taylor2, "onorm": onorm, "activity": activity}


class Residual(nn.Module):
    "One set of units read in three places, one behind a flattening."
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.inner = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1)
        self.outer, self.last, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 3, padding=1), nn.Linear(2 * 9, 3)
    def forward(self, x):
        x = self.norm(self.stem(x)).sigmoid()
        x = x + self.outer(self.inner(x).tanh())
        return self.head(F.avg_pool2d(self.last(x).sigmoid(), 2).flatten(1))


def mlp(): return nn.Sequential(nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 4), nn.Softplus(), nn.Linear(4, 3))


def tied():
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 6))
    tie_(model, ["0.weight", "2.weight"], map=Transpose())
    return model


MODELS = {"mlp": (mlp, (6,), "0"), "residual": (Residual, (1, 6, 6), "stem"), "flattened": (Residual, (1, 6, 6), "last"),
          "tied": (tied, (6,), "0")}


def setting(name, seed=0):
    set_seed(seed)
    make, shape, layer = MODELS[name]
    model, x = make().double(), torch.randn(7, *shape).double()
    return model.eval(), (x, torch.randn_like(model(x))), layer


def scaled(model, layer, k, gain):
    "The model with what reads unit k times a gain, by weights alone; a tied one by hand."
    made = copy.deepcopy(model)
    with torch.no_grad():
        if hasattr(made, "stem"):
            for read, own in ((made.inner, "stem"), (made.last, "stem"), (made.head, "last")):
                if own == layer: read.weight.view(len(read.weight), -1, 9 if read is made.head or read.kernel_size[0] == 3 else 1)[:, k] *= gain
        elif len(made) == 5: made[2].weight[:, k] *= gain
        else: made[1] = nn.Sequential(made[1], Times(k, gain))
    return made


class Times(nn.Module):
    def __init__(self, k, gain):
        super().__init__()
        self.k, self.gain = k, gain
    def forward(self, x): return torch.cat([x[:, :self.k], x[:, self.k:self.k + 1] * self.gain, x[:, self.k + 1:]], 1)


@pytest.mark.parametrize("name", MODELS)
def test_brute_force_and_taylor_against_weights(name):
    model, (x, y), layer = setting(name)
    def loss(gain, k):
        with torch.no_grad(): return F.mse_loss(scaled(model, layer, k, gain)(x), y).item()
    found = {c: CRITERIA[c](model, (x, y), F.mse_loss, layer)[layer] for c in ("brute_force", "taylor1", "taylor2")}
    h = 1e-3
    for k in range(len(found["taylor1"])):
        slope = (loss(1 + h, k) - loss(1 - h, k)) / (2 * h)
        bend = (loss(1 + h, k) - 2 * loss(1, k) + loss(1 - h, k)) / h**2
        np.testing.assert_allclose(found["brute_force"][k], loss(0, k) - loss(1, k), atol=1e-10)
        np.testing.assert_allclose(found["taylor1"][k], -slope, atol=1e-5)
        np.testing.assert_allclose(found["taylor2"][k], bend / 2 - slope, atol=1e-5)


def test_scores_of_coupled_layers_are_one():
    model, data, _ = setting("residual")
    assert prunable(trace_units(model, data[0])) == ["stem", "inner", "last"]
    scores = brute_force(model, data, F.mse_loss, ["stem", "outer", "norm"])
    assert torch.equal(scores["stem"], scores["outer"]) and torch.equal(scores["stem"], scores["norm"])


@pytest.mark.parametrize("c", CRITERIA)
@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left_behind(name, c):
    model, data, layer = setting(name)
    model.train()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    scores = CRITERIA[c](model, data, F.mse_loss, layer)
    assert scores[layer].isfinite().all() and not scores[layer].requires_grad and scores[layer].dtype == torch.float64
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items()) and model.training
    assert all(p.grad is None for p in model.parameters()) and not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("c", CRITERIA)
def test_units_that_are_gone(c):
    "They score infinity, the others as if they had been removed."
    model, data, _ = setting("mlp")
    scores = CRITERIA[c](model, data, F.mse_loss, None, {"0": [1], "2": [3]})
    assert scores["0"][1] == scores["2"][3] == math.inf
    remove_units_(model, {"0": [1], "2": [3]}, data[0])
    if c == "onorm": return  # the mean over readers is over fewer of them
    again = CRITERIA[c](model, data, F.mse_loss)
    torch.testing.assert_close(scores["0"][[0, 2, 3, 4]], again["0"])
    torch.testing.assert_close(scores["2"][:3], again["2"])


def test_onorm_by_hand():
    model, data, _ = setting("mlp")
    plain = onorm(model, data, scaled=False)
    torch.testing.assert_close(plain["0"], model[2].weight.detach().abs().mean(0))
    size = model[1](model[0](data[0])).square().mean(0).sqrt().detach()
    torch.testing.assert_close(onorm(model, data)["0"], plain["0"] * size)
    torch.testing.assert_close(activity(model, data)["0"], size)


def test_onorm_of_channels_by_hand():
    "Positions of a channel and the readers of it count alike, in whatever layout they are read."
    model, (x, y), _ = setting("residual")
    with torch.no_grad():
        h = model.norm(model.stem(x)).sigmoid()
        s = h + model.outer(model.inner(h).tanh())
        flat = F.avg_pool2d(model.last(s).sigmoid(), 2)
    def rms(*values): return (sum(v.square().mean((0, 2, 3)) for v in values) / len(values)).sqrt()
    sizes, plain = activity(model, (x, y)), onorm(model, (x, y), scaled=False)
    torch.testing.assert_close(sizes["stem"], rms(h, s))
    torch.testing.assert_close(sizes["last"], rms(flat))
    torch.testing.assert_close(plain["stem"], (model.inner.weight.abs().mean((0, 2, 3)) + model.last.weight.abs().mean((0, 2, 3))).detach() / 2)
    torch.testing.assert_close(plain["last"], model.head.weight.view(3, 2, 9).abs().mean((0, 2)).detach())


def test_onorm_of_channels_read_in_groups():
    "Channel j of both groups is one unit."
    set_seed(0)
    model, x = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Conv2d(6, 4, 3, groups=2), nn.Conv2d(4, 1, 1)).double(), torch.randn(5, 1, 7, 7).double()
    found = onorm(model, (x, x), layers="0", scaled=False)["0"]
    torch.testing.assert_close(found, model[2].weight.abs().mean((0, 2, 3)).detach().repeat(2))


@pytest.mark.parametrize("factor", [.1, 7.])
def test_rescaling_a_relu_unit_changes_no_score(factor):
    set_seed(0)
    model, data = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).double(), (torch.randn(5, 1, 6, 6).double(), torch.randn(5, 2).double())
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight[1] *= factor
        other[0].bias[1] *= factor
        other[3].weight[:, 16:32] /= factor
    for c in (brute_force, taylor1, taylor2, onorm):
        torch.testing.assert_close(c(model, data, F.mse_loss)["0"], c(other, data, F.mse_loss)["0"])


def test_dead_units_come_first():
    set_seed(0)
    model, data = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)), (torch.randn(20, 3), torch.randn(20, 2))
    with torch.no_grad():
        model[2].weight[:, 4] = 0
        model[0].bias[2] = -1e4
    for c in (by_size(brute_force), by_size(taylor1), by_size(taylor2), onorm):
        assert set(least(c(model, data, F.mse_loss), 1 / 3)["0"]) == {2, 4}


@pytest.mark.parametrize("part", [0, .3, .5, 1.])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_least_against_sorting(part, scope):
    draw = torch.Generator().manual_seed(1)
    scores = {"a": torch.rand(7, generator=draw), "b": torch.rand(5, generator=draw), "c": torch.rand(1, generator=draw)}
    gone = least(scores, part, scope)
    assert all(len(units) < len(scores[name]) for name, units in gone.items())
    rest = {name: [v for i, v in enumerate(scores[name].tolist()) if i not in units] for name, units in gone.items()}
    went = {name: scores[name][units].tolist() for name, units in gone.items()}
    if scope == "layer":
        for name in scores:
            assert len(went[name]) == min(int(part * len(scores[name])), len(scores[name]) - 1)
            assert not went[name] or max(went[name]) <= min(rest[name])
    elif part < .5: assert max(sum(went.values(), [0.])) <= min(v for values in rest.values() for v in values if len(values) > 1)


def test_removal_curve_against_plain_loops():
    model, (x, y), _ = setting("mlp")
    curve = removal_curve(model, (x, y), F.mse_loss, brute_force)
    left, gone, losses = {"0": {*range(5)}, "2": {*range(4)}}, [], []

    def loss(units):
        made = copy.deepcopy(model)
        with torch.no_grad():
            for name, k in units: made[int(name) + 2].weight[:, k] = 0
            return F.mse_loss(made(x), y).item()

    while any(len(own) > 1 for own in left.values()):
        costs = {(name, k): loss([*gone, (name, k)]) for name, own in left.items() if len(own) > 1 for k in own}
        best = min(costs, key=costs.get)
        gone.append(best)
        left[best[0]].remove(best[1])
        losses.append(costs[best])
    assert [*zip(curve["layer"], curve["unit"])][1:] == gone
    np.testing.assert_allclose(curve["loss"], [loss([]), *losses], atol=1e-10)
    once = removal_curve(model, (x, y), F.mse_loss, brute_force, again=False)
    scores = brute_force(model, (x, y), F.mse_loss)
    first = [scores[name][k].item() for name, k in zip(once["layer"][1:4], once["unit"][1:4])]
    assert first == sorted(first) and len(once) == 8


@pytest.mark.parametrize("change, error, message", [
    ({"data": torch.ones(3)}, TypeError, "data: a pair"), ({"data": (torch.ones(0, 6), torch.ones(0, 3))}, ValueError, "at least one example"),
    ({"loss": 3}, TypeError, "loss"), ({"loss": lambda y: y}, TypeError, "loss: a function of .output, y."),
    ({"layers": ["00"]}, ValueError, "'00'; did you mean"), ({"layers": []}, ValueError, "at least one name"),
    ({"layers": ["4"]}, ValueError, "'4' cannot be pruned because of the model puts them out"),
    ({"data": (torch.ones(2, 7), torch.ones(2, 3))}, ValueError, "data: what the model can take"), ({"data": (torch.ones(3, 6), torch.ones(3, 2))}, ValueError, "data: what the model can take"),
    ({"without": {"0": [9]}}, ValueError, "from 0 to 4"), ({"model": "x"}, TypeError, "a module")])
def test_bad_input(change, error, message):
    model, data, _ = setting("mlp")
    arguments = {"model": model, "data": data, "loss": F.mse_loss} | change
    with pytest.raises(error, match=message): brute_force(**arguments)


def test_bad_scores():
    for scores, part, scope, error, message in [
        ({"a": torch.tensor([math.nan, 1.])}, .5, "layer", ValueError, "1 of 2 that are NaN"), ({}, .5, "layer", TypeError, "scores"),
        ({"a": torch.ones(2)}, 1.5, "layer", ValueError, "from 0 to 1"), ({"a": torch.ones(2)}, .5, "all", ValueError, "scope"),
        ({"a": [1., 2.]}, .5, "layer", TypeError, "tensor"), ({"a": torch.ones(0)}, .5, "layer", ValueError, "at least one element")]:
        with pytest.raises(error, match=message): least(scores, part, scope)
    with pytest.raises(TypeError, match="criterion"): by_size(3)


def test_models_with_nothing_to_prune():
    with pytest.raises(ValueError, match="a layer whose units can all be removed"): brute_force(nn.Linear(3, 2), (torch.ones(2, 3), torch.ones(2, 2)), F.mse_loss)
    class Loose(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.w = nn.Linear(3, 4), nn.Parameter(torch.ones(4, 2))
        def forward(self, x): return self.a(x) @ self.w
    with pytest.raises(ValueError, match="because of mm"): brute_force(Loose(), (torch.ones(2, 3), torch.ones(2, 2)), F.mse_loss, "a")


def chain():
    "A linear layer and a convolution, each called twice in a chain: what goes in and what comes out are the same units."
    line, conv = nn.Linear(6, 6), nn.Conv2d(4, 4, 3, padding=1)
    return {"0": nn.Sequential(nn.Linear(5, 6), line, nn.Tanh(), line, nn.Sigmoid(), nn.Linear(6, 3)).double(),
            "1": nn.Sequential(nn.Unflatten(1, (1, 5, 1)), nn.Conv2d(1, 4, 1), nn.Sigmoid(), conv, nn.Tanh(), conv, nn.Flatten(), nn.Linear(20, 3)).double()}


@pytest.mark.parametrize("layer", ["0", "1"])
@pytest.mark.parametrize("c", CRITERIA)
def test_a_module_that_is_called_twice_in_a_chain(c, layer):
    set_seed(0)
    model, x = chain()[layer], torch.randn(9, 5).double()
    data = x, torch.randn(9, 3).double()
    scores = CRITERIA[c](model, data, F.mse_loss)
    assert [*scores] == [layer] and scores[layer].isfinite().all()
    with torch.no_grad(): start = F.mse_loss(model(x), data[1])
    if c in ("taylor1", "taylor2"):
        probe, step = Probe(model, data, F.mse_loss), 1e-4
        moves = step * torch.eye(len(scores[layer])).double()
        low, now, high = ([probe.run(probe.start + by * move).item() for move in moves] for by in (-1, 0, 1))
        low, now, high = map(np.array, (low, now, high))
        wanted = (low - high) / (2 * step) + (c == "taylor2") * (high - 2 * now + low) / step ** 2 / 2
        np.testing.assert_allclose(scores[layer], wanted, atol=1e-6)
    if c == "activity":
        reads, name = [], {"0": ("1", "5"), "1": ("3", "7")}[layer]
        hooks = [model.get_submodule(n).register_forward_pre_hook(lambda m, i, n=n: reads.append((n, i[0].detach()))) for n in name]
        model(x)
        for hook in hooks: hook.remove()
        sizes = [torch.cat([r.view(len(x), len(scores[layer]), -1) for n, r in reads if n == own]).square().mean((0, 2)) for own in name]
        torch.testing.assert_close(scores[layer], (sum(sizes) / 2 if layer == "0" else (sizes[0] + 5 * sizes[1]) / 6).sqrt())
    if c != "brute_force": return
    for k in range(len(scores[layer])):
        less = copy.deepcopy(model)
        remove_units_(less, {layer: [k]}, x)
        with torch.no_grad(): np.testing.assert_allclose(scores[layer][k], F.mse_loss(less(x), data[1]) - start, atol=1e-10)


def test_a_module_that_reads_other_units_in_another_call_is_refused():
    "No product with one weight joins them."
    class Twofold(nn.Linear):
        def forward(self, x): return 2 * x

    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.twice, self.c, self.d = nn.Linear(3, 4), nn.Linear(3, 4), Twofold(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        def forward(self, x): return self.c(self.twice(self.a(x))) + self.d(self.twice(self.b(x)))

    with pytest.raises(ValueError, match="because of several calls of 'twice'"): brute_force(Apart(), (torch.ones(2, 3), torch.ones(2, 2)), F.mse_loss, "a")


def test_probe_of_no_gain():
    model, (x, y), _ = setting("residual")
    probe = Probe(model, (x, y), F.mse_loss)
    torch.testing.assert_close(probe.run(probe.start), F.mse_loss(model(x), y))


class Gated(nn.Module):
    "A gate of two halves: each of the four units has two rows of one layer."
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(4, 2)
    def forward(self, x): return self.b(F.glu(self.a(x)))


class Twice(nn.Module):
    "A layer that reads the same units in two calls, of which the second hears nothing."
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 6, bias=False), nn.Linear(6, 2)
    def forward(self, x): return self.b(self.a(x).tanh()) - self.b(self.a(0 * x).tanh())


def test_removal_curve_counts_units_and_not_rows():
    set_seed(0)
    model, data = Gated(), (torch.randn(9, 3), torch.randn(9, 2))
    curve = removal_curve(model, data, F.mse_loss, brute_force)
    assert curve["part"].tolist() == [0, .25, .5, .75] and len({i % 4 for i in curve["unit"][1:]}) == 3
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for loss, i in zip(curve["loss"][1:], curve["unit"][1:]):
            masked.b.weight[:, i % 4] = 0
            np.testing.assert_allclose(loss, F.mse_loss(masked(data[0]), data[1]), rtol=1e-5)


def test_sizes_are_those_of_all_calls():
    set_seed(0)
    model, x = Twice().double(), torch.randn(9, 3).double()
    seen = torch.cat([model.a(x).tanh(), model.a(0 * x).tanh()]).detach()
    torch.testing.assert_close(activity(model, (x, x))["a"], seen.square().mean(0).sqrt())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sizes_in_half_precision(dtype):
    "Squares of 500 overflow in one kind, counts of a thousand positions stop at 256 in the other."
    set_seed(0)
    model, x = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 32 * 32, 2)), 500 * torch.rand(4, 1, 32, 32)
    for c in (onorm, activity):
        wanted, got = c(model.float(), (x, x))["0"], c(model.to(dtype), (x.to(dtype), x))["0"]
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted, rtol=.05, atol=.05)


@pytest.mark.parametrize("c", CRITERIA)
def test_units_that_are_gone_elsewhere(c):
    "In layers that are not looked at."
    model, data, _ = setting("mlp")
    scores = CRITERIA[c](model, data, F.mse_loss, "0", {"2": [3]})
    assert [*scores] == ["0"]
    torch.testing.assert_close(scores["0"], CRITERIA[c](model, data, F.mse_loss, None, {"2": [3]})["0"])


def test_gone_units_do_not_stand_for_those_that_stay():
    assert least({"a": torch.tensor([1., 2., math.inf])}, 1.) == {"a": [0]}
    assert least({"a": torch.full((3,), math.inf), "b": torch.tensor([2., 1.])}, 1., "global") == {"a": [], "b": [1]}


@pytest.mark.parametrize("part, n", [(.29, 29), (.57, 57), (.58, 58), (1 / 3, 33)])
def test_parts_are_counted_as_they_are_written(part, n): assert len(least({"a": torch.arange(100.)}, part)["a"]) == n


def test_a_curve_of_no_numbers():
    model, (x, y), _ = setting("mlp")
    with pytest.raises(ValueError, match="5 of 5 that are NaN"): removal_curve(model, (x * math.nan, y), F.mse_loss, brute_force)


def test_a_layer_that_reads_by_keyword_is_refused():
    class Keyword(Gated):
        def forward(self, x): return self.b(input=F.glu(self.a(x)))
    with pytest.raises(ValueError, match="cannot be pruned because of addmm in 'b'"): brute_force(Keyword(), (torch.ones(2, 3), torch.ones(2, 2)), F.mse_loss, "a")
    with pytest.raises(ValueError, match="units that no layer reads"):
        class Unread(Gated):
            def forward(self, x): return self.b(x[:, :1].repeat(1, 4) + 0 * self.a(x)[:, :0].sum())
        brute_force(Unread(), (torch.ones(2, 3), torch.ones(2, 2)), F.mse_loss, "a")


class Reader(nn.Module):
    "Two stacked transformer layers, whose attention is fused."
    def __init__(self):
        super().__init__()
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 6, dropout=0., batch_first=True), 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)
    def forward(self, x): return self.head(self.body(x))


@pytest.mark.parametrize("criterion", [taylor1, taylor2])
def test_taylor_through_attention_against_differences(criterion):
    set_seed(0)
    model, data = Reader().double(), (torch.randn(4, 5, 8).double(), torch.randn(4, 5, 3).double())
    name, step = "body.layers.0.linear1", 1e-4
    probe, scores = Probe(model, data, F.mse_loss, name), criterion(model, data, F.mse_loss, name)
    def at(k, by):
        gains = probe.start.clone()
        gains[k] += by
        model.eval()
        return probe.run(gains).item()
    for k in range(6):
        slope, bend = (at(k, step) - at(k, -step)) / (2 * step), (at(k, step) + at(k, -step) - 2 * at(k, 0)) / step ** 2
        assert math.isclose(scores[name][k], bend / 2 * (criterion is taylor2) - slope, rel_tol=1e-4, abs_tol=1e-6)


class Double(torch.autograd.Function):
    "Twice a number, of which there is no derivative."
    @staticmethod
    def forward(ctx, x): return 2 * x

    @staticmethod
    def backward(ctx, grad): raise NotImplementedError("it has none")


class Square(torch.autograd.Function):
    "A square that can be derived once."
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad): return grad * Double.apply(*ctx.saved_tensors)


def test_a_model_that_cannot_be_derived_twice():
    model, data = mlp(), (torch.ones(2, 6), torch.ones(2, 3))
    def loss(z, y): return Square.apply(z - y).sum()
    taylor1(model, data, loss)
    with pytest.raises(ValueError, match="model: one that can be derived twice"): taylor2(model, data, loss)


@pytest.mark.parametrize("criterion", ["taylor1", None, lambda model: 0])
def test_a_curve_needs_a_criterion(criterion):
    with pytest.raises(TypeError, match="criterion: a function of"): removal_curve(mlp(), (torch.ones(2, 6), torch.ones(2, 3)), F.mse_loss, criterion)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", MODELS)
def test_examples_come_some_at_a_time_to_the_same_end(name, criterion):
    model, data, layer = setting(name)
    scores = CRITERIA[criterion](model, data, F.mse_loss, layer)[layer]
    for size in (1, 3): torch.testing.assert_close(CRITERIA[criterion](model, data, F.mse_loss, layer, batch_size=size)[layer], scores)
    if name == "mlp" and criterion != "brute_force":
        tables = [removal_curve(model, data, F.mse_loss, by_size(CRITERIA[criterion]), batch_size=size) for size in (None, 2)]
        assert tables[0]["unit"].equals(tables[1]["unit"]) and np.allclose(tables[0]["loss"], tables[1]["loss"])


@pytest.mark.parametrize("criterion", [brute_force, taylor1, taylor2])
def test_a_loss_is_one_number_and_a_batch_one_example_or_more(criterion):
    model, data, _ = setting("mlp")
    with pytest.raises(ValueError, match="loss: a function to one number"): criterion(model, data, lambda output, y: (output - y).square())
    with pytest.raises(ValueError, match="batch_size: "): criterion(model, data, F.mse_loss, batch_size=0)


def total(out, y): return F.mse_loss(out, y, reduction="sum")
def weighed(out, y): return (y * (out - y).square()).sum() / y.sum()


@pytest.mark.parametrize("loss", [total, weighed])
@pytest.mark.parametrize("criterion", ["brute_force", "taylor1", "taylor2"])
def test_a_loss_in_parts_is_a_mean(criterion, loss):
    model, (x, y), _ = setting("mlp")
    data = x, y.abs()
    assert CRITERIA[criterion](model, data, loss)["0"].isfinite().all()  # all at once, any loss
    for run in (CRITERIA[criterion], lambda *args, **options: removal_curve(*args, onorm, **options)):
        with pytest.raises(ValueError, match="loss: a mean over examples is expected, got .* for examples of .* on average"): run(model, data, loss, batch_size=4)
    for free in (onorm, activity): assert free(model, data, loss, batch_size=4)["0"].isfinite().all()


def test_losses_of_outputs_of_any_form_and_in_half_precision():
    "Parts of outputs in a dictionary are joined, and numbers for a whole batch averaged; half precision is rounded."
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()
        def forward(self, x):
            z = self.body(x)
            return {"z": [z, z + 1], "size": z.square().mean(), "name": "two"}

    set_seed(0)
    model, data = Two(), (torch.randn(7, 6), torch.randn(7, 3))
    def loss(out, y): return F.mse_loss(out["z"][0], y) + F.mse_loss(out["z"][1], y) + out["size"]
    torch.testing.assert_close(brute_force(model, data, loss, batch_size=3), brute_force(model, data, loss))
    for dtype in (torch.float16, torch.bfloat16):
        half, own = mlp().to(dtype), tuple(t.to(dtype) for t in data)
        assert brute_force(half, own, F.mse_loss, batch_size=1)["0"].isfinite().all()
        with pytest.raises(ValueError, match="loss: a mean"): brute_force(half, own, total, batch_size=1)


@pytest.mark.long
@pytest.mark.parametrize("criterion", ["brute_force", "taylor1", "taylor2"])
def test_scores_in_half_precision_are_no_few_numbers(criterion):
    "The loss is taken in 32 bits, and what batches give is added in them."
    set_seed(0)
    model, x, y = nn.Sequential(nn.Linear(9, 24), nn.Tanh(), nn.Linear(24, 3)), torch.randn(200, 9), torch.randint(3, (200,))
    model, x = model.bfloat16().float(), x.bfloat16().float()
    wanted, half = CRITERIA[criterion](model, (x, y), F.cross_entropy)["0"], copy.deepcopy(model).bfloat16()
    for size in (None, 1):
        got = CRITERIA[criterion](half, (x.bfloat16(), y), F.cross_entropy, batch_size=size)["0"]
        assert got.dtype == torch.float32 and len(got.unique()) == 24
        torch.testing.assert_close(got, wanted, rtol=.1, atol=2e-3)


def test_a_loss_of_half_precision_is_taken_as_it_is():
    set_seed(0)
    model, x, weight = nn.Sequential(nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 3)).bfloat16(), torch.randn(20, 9).bfloat16(), torch.ones(3).bfloat16()
    def loss(output, y): return F.cross_entropy(output, y, weight)
    assert brute_force(model, (x, torch.randint(3, (20,))), loss)["0"].dtype == torch.bfloat16

def test_sizes_of_units_of_half_precision_are_not_rounded_alike():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 256), nn.ReLU(), nn.Linear(256, 3)).bfloat16(), torch.randn(40, 6).bfloat16()
    for criterion in (onorm, activity):
        scores = criterion(model, (x, torch.zeros(40).long()))["0"]
        assert scores.dtype == torch.float32 and len(scores.unique()) > 250
