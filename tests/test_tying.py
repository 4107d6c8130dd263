"The tying penalty: who is tied, the dial, the steps beside the optimizer, and what it refuses."
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from processes import in_two_processes
from sharetie.distances import DISTANCES
from sharetie.tying import StrengthSchedule, TiePenalty, accumulate_grad_, anneal, fisher_diagonal, harden_, proximal_


def mlp(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def loop(a, b): return sum((x - y).pow(2).sum() for x, y in zip(a.parameters(), b.parameters()))


def state(*models): return [p.detach().clone() for m in models for p in m.parameters()]


# The value and who is tied

def test_two_models_equal_the_loop():
    a, b = mlp(0), mlp(1)
    torch.testing.assert_close(TiePenalty(a, b, strength=0.3)(), 0.3 * loop(a, b))


def test_patterns_pairs_of_names_and_per_group_strengths():
    a, b = mlp(0), nn.ModuleDict({"first": nn.Linear(4, 5).double(), "last": nn.Linear(5, 3).double()})
    tie = TiePenalty(a, b, members=[("0.weight", "first.weight"), ("2.bias", "last.bias")], strength={"0.*": 2.0, "*": 3.0})
    expected = 2 * (a[0].weight - b["first"].weight).pow(2).sum() + 3 * (a[2].bias - b["last"].bias).pow(2).sum()
    torch.testing.assert_close(tie(), expected)


@pytest.mark.parametrize("distance", DISTANCES)
def test_three_models_to_their_mean_and_in_pairs(distance):
    models = [mlp(s) for s in range(3)]
    weights = [m[0].weight for m in models]
    def one(x, y): return TiePenalty([(x, y)], distance=distance)()
    pairs = one(weights[0], weights[1]) + one(weights[0], weights[2]) + one(weights[1], weights[2])
    torch.testing.assert_close(TiePenalty(*models, members="0.weight", distance=distance)(), pairs)
    mean = torch.stack(weights).mean(0)
    torch.testing.assert_close(TiePenalty(*models, members="0.weight", distance=distance, toward="mean")(), sum(one(w, mean) for w in weights))


@pytest.mark.parametrize("toward", ["pairs", "mean"])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("count", [2, 3])
def test_gradients_by_finite_differences(distance, toward, count):
    tensors = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(count)]
    def value(*t): return TiePenalty([t], distance=distance, toward=toward, strength=1.7)()
    assert torch.autograd.gradcheck(value, tensors)


def test_a_map_ties_different_shapes():
    a, b = torch.randn(2, 3, dtype=torch.float64, requires_grad=True), torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    tie = TiePenalty({"transpose": (a, b)}, map={"transpose": lambda w: w.T})
    torch.testing.assert_close(tie(), (b - a.T).pow(2).sum())
    assert torch.autograd.gradcheck(lambda a, b: TiePenalty([(a, b)], map=lambda w: w.T)(), (a, b))


def test_a_parameter_under_two_names_counts_once():
    def tied():
        model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
        model["head"].weight = model["embed"].weight
        return model
    a, b = tied(), tied()
    torch.testing.assert_close(TiePenalty(a, b)(), (a["head"].weight - b["head"].weight).pow(2).sum())


def test_the_tie_follows_a_parameter_that_is_replaced():
    a, b = mlp(0), mlp(1)
    tie = TiePenalty(a, b)
    a.load_state_dict({k: torch.zeros_like(v) for k, v in a.state_dict().items()}, assign=True)
    torch.testing.assert_close(tie(), sum(p.pow(2).sum() for p in b.parameters()))
    a.load_state_dict(b.state_dict(), assign=True)
    assert tie().item() == 0


def test_functional_call_reaches_the_penalty():
    model = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
    tie = TiePenalty(model, members=[("0.weight", "1.weight")])
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model
        def forward(self): return tie()
    tied = Tied()
    values = {name: p.detach() for name, p in tied.named_parameters()} | {"model.0.weight": torch.tensor([[3.0, 0]]), "model.1.weight": torch.zeros(1, 2)}
    grad = torch.func.grad(lambda v: torch.func.functional_call(tied, v, ()))(values)
    assert grad["model.0.weight"].tolist() == [[6, 0]]


@pytest.mark.long
@pytest.mark.parametrize("distance", DISTANCES)
def test_compile_gives_the_same_and_follows_the_strength(distance):
    a, b = mlp(0, torch.float32), mlp(1, torch.float32)
    tie = TiePenalty(a, b, distance=distance)
    backend = "aot_eager" if distance == "squared_l2" else "eager"  # the one that traces backward, too, for one of them
    compiled = torch.compile(lambda: tie(), backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(), tie())
    tie.strength = 5.0
    torch.testing.assert_close(compiled(), tie())
    got, expected = (torch.autograd.grad(f(), list(a.parameters())) for f in (compiled, tie))
    for x, y in zip(got, expected): torch.testing.assert_close(x, y)


def test_autocast_and_half_precision():
    a, b = mlp(0, torch.bfloat16), mlp(1, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16): value = TiePenalty(a, b)()
    value.backward()
    assert value.dtype == torch.float32 and a[0].weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(value, loop(a.float(), b.float()))


def test_meta_and_devices():
    with torch.device("meta"): a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    assert TiePenalty(a, b)().device.type == "meta"
    with pytest.raises(ValueError, match=r"models\[0\].weight has device meta, models\[1\].weight has device cpu"): TiePenalty(a, nn.Linear(2, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("distance", DISTANCES)
def test_cuda_equals_cpu(distance):
    a, b = mlp(0), mlp(1)
    expected = TiePenalty(a, b, distance=distance)()
    torch.testing.assert_close(TiePenalty(a.cuda(), b.cuda(), distance=distance)().cpu(), expected)
    accumulate_grad_(TiePenalty(a, b, distance=distance))
    assert a[0].weight.grad.is_cuda


# The gradient in one pass

@pytest.mark.parametrize("toward", ["pairs", "mean"])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("count", [2, 3])
def test_accumulated_gradients_equal_autograd(distance, toward, count):
    models = [mlp(s) for s in range(count)]
    tie = TiePenalty(*models, distance=distance, toward=toward, strength={"*.weight": 2.0, "*": 0.5})
    for p in tie.parameters(): p.grad = torch.ones_like(p)
    expected = torch.autograd.grad(3 * tie(), tie.parameters())
    torch.testing.assert_close(accumulate_grad_(tie, scale=3), tie().detach())
    for p, grad in zip(tie.parameters(), expected): torch.testing.assert_close(p.grad, 1 + grad)


def test_accumulating_through_a_map_and_with_a_frozen_side():
    a, b = nn.Parameter(torch.randn(2, 3)), torch.randn(3, 2)
    accumulate_grad_(TiePenalty([(a, b)], map=lambda w: w.T))
    torch.testing.assert_close(a.grad, 2 * (a - b.T).detach())
    c = nn.Parameter(torch.randn(3, 2))
    accumulate_grad_(TiePenalty([(c, b)]))
    torch.testing.assert_close(c.grad, 2 * (c - b).detach())
    assert b.grad is None


def test_the_mean_of_half_precision_keeps_its_digits():
    w = [nn.Parameter(torch.tensor([v], dtype=torch.bfloat16)) for v in (1, 1, 1 + 2 ** -7)]
    tie = TiePenalty([w])
    value = tie()
    value.backward()
    assert value.item() == pytest.approx(2 * 2 ** -14, rel=1e-6)
    assert [p.grad.item() for p in w] == pytest.approx([-2 ** -6, -2 ** -6, 2 ** -5], rel=1e-2)
    assert accumulate_grad_(tie).item() == value.item()


# Proximal steps

def assert_minimum(tie, start, step_size):
    "The members are at the minimum of eq-tying-prox, which is convex: no small step in any direction makes it smaller."
    moving = [(t, s) for t, s in zip(tie.parameters(), start) if t.requires_grad]
    def objective(): return sum(0.5 * (t - s).pow(2).sum() for t, s in moving) + step_size * tie()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        least = objective()
        for i in range(60):
            steps = [10.0 ** -(2 + i % 3) * torch.randn(t.shape, generator=g, dtype=t.dtype) for t, _ in moving]
            for (t, _), step in zip(moving, steps): t.add_(step)
            assert objective() >= least - 1e-12
            for (t, _), step in zip(moving, steps): t.sub_(step)


@pytest.mark.parametrize("toward", ["pairs", "mean"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("distance", DISTANCES[:4])
def test_the_proximal_step_of_a_pair_is_the_minimum(distance, frozen, toward):
    def pair():
        x, y = nn.Parameter(torch.tensor([1.5, -0.6, 0.3], dtype=torch.float64)), torch.tensor([-1.0, 0.2, 0.25], dtype=torch.float64)
        return TiePenalty([(x, y if frozen else nn.Parameter(y))], distance=distance, toward=toward, strength=0.8, delta=0.7)
    tie = pair()
    start = [t.detach().clone() for t in tie.parameters()]
    proximal_(tie, step_size=0.5)
    assert any((t - s).abs().max() > 0.05 for t, s in zip(tie.parameters(), start))
    assert_minimum(tie, start, 0.5)


@pytest.mark.parametrize("toward", ["pairs", "mean"])
def test_the_proximal_step_of_four_is_the_minimum(toward):
    g = torch.Generator().manual_seed(0)
    start = torch.randn(4, 3, generator=g, dtype=torch.float64)
    tie = TiePenalty([tuple(nn.Parameter(row.clone()) for row in start)], toward=toward, strength=0.4)
    proximal_(tie, step_size=0.5)
    assert_minimum(tie, start, 0.5)


def test_an_endless_strength_meets_in_the_mean_and_zero_does_nothing():
    a, b = mlp(0), mlp(1)
    before = state(a, b)
    proximal_(TiePenalty(a, b, strength=0.0), 1.0)
    assert all(torch.equal(x, y) for x, y in zip(before, state(a, b)))
    proximal_(TiePenalty(a, b, strength=1e12), 1.0)
    half = len(before) // 2
    for x, y, p, q in zip(before[:half], before[half:], a.parameters(), b.parameters()):
        torch.testing.assert_close(p.detach(), (x + y) / 2)
        torch.testing.assert_close(q, p)


def test_refused_proximal_steps_move_nothing():
    models = [mlp(s) for s in range(3)]
    before = state(*models)
    models[2][0].weight.requires_grad_(False)
    x = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.zeros(3, 2))
    for tie, step, message in [(TiePenalty(*models, distance="l1"), 0.1, "3 members and distance 'l1'"), (TiePenalty(*models), 0.1, r"models\[2\].0.weight.*frozen"),
                               (TiePenalty(*models, distance="cosine"), 0.1, "no closed proximal step"), (TiePenalty([x], map=lambda w: w.T), 0.1, "through a map"),
                               (TiePenalty(*models), -0.1, "step_size: .* got -0.1"), (TiePenalty(*models), math.nan, "step_size")]:
        with pytest.raises(ValueError, match=message): proximal_(tie, step)
    assert all(torch.equal(x, y) for x, y in zip(before, state(*models)))


@pytest.mark.parametrize("distance", ["squared_l2", "l1"])
def test_proximal_steps_refuse_tensors_in_two_groups_and_views(distance):
    a, b, c = (nn.Parameter(torch.tensor([v])) for v in (0.0, 3.0, 9.0))
    with pytest.raises(ValueError, match=r"groups\[1\]\[0\] is in the group 'groups\[0\]' too"):
        proximal_(TiePenalty([(a, b), (b, c)], distance=distance), 0.5)
    w = nn.Parameter(torch.tensor([[0.0, 4.0], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="proximal_: a group of leaves"):
        proximal_(TiePenalty([(w, w.T)], distance=distance), 0.25)
    assert [a.item(), b.item(), c.item()] == [0, 3, 9] and w.tolist() == [[0, 4], [0, 0]]


# Schedules

@pytest.mark.parametrize("shape, middle", [("geometric", 1.0), ("linear", 5.05), ("cosine", 5.05)])
def test_schedules_start_pass_the_middle_and_end(shape, middle):
    tie = TiePenalty([(torch.ones(1), torch.zeros(1))], strength=2.0)
    schedule = anneal(tie, start=0.1, end=10.0, steps=4, shape=shape)
    seen = [tie()]
    for _ in range(5):
        schedule.step()
        seen.append(tie())
    assert [round(seen[i].item(), 5) for i in (0, 2, 4, 5)] == [0.2, 2 * middle, 20, 20]


def test_a_schedule_goes_on_from_its_state():
    ties = [TiePenalty([(torch.ones(1), torch.zeros(1))]) for _ in range(2)]
    first, second = (anneal(tie, start=1, end=16, steps=4) for tie in ties)
    for _ in range(3): first.step()
    second.load_state_dict(first.state_dict())
    assert ties[0].strength == ties[1].strength == {"groups[0]": 8.0}
    for bad in ({"other": 1.0}, {"groups[0]": -1.0}):
        with pytest.raises(ValueError, match="groups"): second.load_state_dict({"base": bad, "done": 1})
    assert second.state_dict() == first.state_dict() and ties[1].strength == {"groups[0]": 8.0}


def test_a_schedule_is_a_callback_of_any_factor():
    tie = TiePenalty([(torch.ones(1), torch.zeros(1))], strength=3.0)
    schedule = StrengthSchedule(tie, lambda part: 1 + part, steps=2)
    schedule(7)
    assert tie.strength == {"groups[0]": 4.5}
    for factor, error in ((-1.0, ValueError), (math.nan, ValueError), (10**400, ValueError), (None, TypeError), ("2", TypeError), (True, TypeError), (torch.zeros(2), TypeError)):
        with pytest.raises(error, match="^factor: a "): StrengthSchedule(tie, lambda part: factor, steps=2)
    assert tie.strength == {"groups[0]": 4.5}


def test_a_resumed_run_goes_on_with_its_schedule(tmp_path):
    from sharetie.train import fit
    x, y = torch.randn(16, 4), torch.randn(16, 3)
    def run(epochs, path):
        a, b = mlp(0, torch.float32), mlp(1, torch.float32)
        tie = TiePenalty(a, b)
        fit(a, (x, y), F.mse_loss, penalty=tie, after_step=anneal(tie, 0.1, 10, steps=6), epochs=epochs, checkpoint=path, progress=False)
        return a
    run(3, tmp_path / "part.pt")
    resumed, whole = run(6, tmp_path / "part.pt"), run(6, None)
    for p, q in zip(resumed.parameters(), whole.parameters()): assert torch.equal(p, q)


def test_sparse_gradients_and_computed_members():
    a, b = nn.Embedding(5, 3, sparse=True), nn.Embedding(5, 3)
    tie = TiePenalty(a, b)
    a(torch.tensor([1])).sum().backward()
    expected = a.weight.grad.to_dense() + 2 * (a.weight - b.weight).detach()
    accumulate_grad_(tie)
    torch.testing.assert_close(a.weight.grad, expected)
    linear, other = nn.Linear(3, 2), nn.Linear(3, 2)
    tie = TiePenalty(linear, other)
    nn.utils.parametrizations.weight_norm(linear)
    before = state(other)
    for refused in (lambda: proximal_(tie, 0.1), lambda: accumulate_grad_(tie), lambda: harden_(tie)):
        with pytest.raises(ValueError, match=r"models\[0\].weight"): refused()
    assert all(torch.equal(x, y) for x, y in zip(before, state(other)))


def test_groups_on_two_devices_are_refused_when_made():
    with pytest.raises(ValueError, match=r"one device .*\['cpu', 'meta'\]"):
        TiePenalty({"a": (torch.ones(1), torch.ones(1)), "b": (torch.ones(1, device="meta"), torch.ones(1, device="meta"))})


@pytest.mark.parametrize("options, message", [
    (dict(start=0, end=1, steps=3), "numbers above 0"), (dict(start=-1, end=1, steps=3), "start"), (dict(start=1, end=math.inf, steps=3), "end"),
    (dict(start=1, end=2, steps=0), "steps"), (dict(start=1, end=2, steps=1.5), "steps"), (dict(start=1, end=2, steps=True), "steps"), (dict(start=1, end=2, steps=None), "steps"), (dict(start=None, end=2, steps=3), "start"),
    (dict(start=1, end="2", steps=3), "end"), (dict(start=math.nan, end=2, steps=3), "start"), (dict(start=1, end=2, steps=3, shape=None), "shape"), (dict(start=1, end=2, steps=3, shape="square"), "shape"),
])
def test_bad_schedules_leave_the_strength(options, message):
    tie = TiePenalty([(torch.ones(1), torch.zeros(1))], strength=2.0)
    with pytest.raises((ValueError, TypeError), match=f"^{message}|{message} is expected"): anneal(tie, **options)
    assert tie.strength == {"groups[0]": 2.0}


# From tied to shared

def test_harden_by_mean_shares_trains_and_reports():
    a, b = mlp(0), mlp(1)
    before = state(a, b)
    report = harden_(TiePenalty(a, b))
    assert all(p is q for p, q in zip(a.parameters(), b.parameters()))
    torch.testing.assert_close(a[0].weight.detach(), (before[0] + before[4]) / 2)
    assert [m.name for m in report[:2]] == ["models[0].0.weight", "models[1].0.weight"]
    assert report[0].distance == pytest.approx(((before[0] - before[4]) / 2).norm().item())
    assert report[0].relative == pytest.approx(report[0].distance / before[0].norm().item())
    optimizer = torch.optim.SGD(nn.ModuleList([a, b]).parameters(), lr=0.1)
    (a(torch.ones(1, 4).double()).sum() + b(torch.ones(1, 4).double()).sum()).backward()
    optimizer.step()
    assert len(list(nn.ModuleList([a, b]).parameters())) == 4 and torch.equal(a[2].bias, b[2].bias)


@pytest.mark.parametrize("map", [None, lambda w: w.T])
def test_harden_ties_many_groups_or_none(map):
    def pair(): return nn.ModuleList(nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(12))) for _ in range(2))
    model = pair()
    before = [p for p in model.parameters()]
    harden_(TiePenalty(model, members=[(f"0.{i}.weight", f"1.{i}.weight") for i in range(12)], map=map), to="first")
    made = [torch.equal(model[1][i].weight, model[0][i].weight if map is None else model[0][i].weight.T) for i in range(12)]
    assert all(made) and [*model.parameters()] == before[:12]
    model = pair()
    tie = TiePenalty(model, members=[(f"0.{i}.weight", f"1.{i}.weight") for i in range(12)], map=map)
    for i in (3, 11): model[1][i].weight.data = model[1][i].weight.data.double()
    before, flags = [*model.parameters()], [p.requires_grad for p in model.parameters()]
    with pytest.raises((ValueError, TypeError)): harden_(tie, to="first")
    assert [*model.parameters()] == before and [p.requires_grad for p in before] == flags


def test_harden_to_the_first_within_one_model():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    first = model[0].weight.detach().clone()
    report = harden_(TiePenalty(model, members=["*.weight"]), to="first")
    assert model[2].weight is model[0].weight and torch.equal(model[2].weight, first)
    assert report[0].distance == 0 and report[1].distance > 0


def test_harden_replaces_every_name_of_a_weight():
    def tied():
        model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
        model["head"].weight = model["embed"].weight
        return model
    for members in (None, "embed.weight"):
        a, b = tied(), tied()
        harden_(TiePenalty(a, b, members=members))
        assert len({id(m[name].weight) for m in (a, b) for name in m}) == 1


def test_harden_follows_the_order_of_the_names():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    kept, old = model[1].weight, model[1].weight.detach().clone()
    harden_(TiePenalty(model, members=[["1.weight", "*.weight"]]), to="first")
    assert all(layer.weight is kept for layer in model) and torch.equal(kept, old)


def test_harden_refuses_a_weight_in_two_groups():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    tie = TiePenalty(model, members=[["0.weight", "1.weight"], ["1.weight", "2.weight"]])
    before = state(model)
    with pytest.raises(ValueError, match="1.weight is in the group '0.weight' too"): harden_(tie)
    assert all(torch.equal(x, y) for x, y in zip(before, state(model)))


def test_harden_by_fisher_is_the_weighted_mean_and_the_mean_where_nobody_cares():
    a, b = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        a.weight.copy_(torch.tensor([[0.0, 0.0]]))
        b.weight.copy_(torch.tensor([[4.0, 6.0]]))
    fisher = [{"weight": torch.tensor([[1.0, 0.0]])}, {"weight": torch.tensor([[3.0, 0.0]])}]
    harden_(TiePenalty(a, b), to="fisher", fisher=fisher)
    assert b.weight.tolist() == [[3, 3]]


@pytest.mark.parametrize("call, message", [
    (lambda tie: harden_(tie, to="median"), "to: .* got 'median'"),
    (lambda tie: harden_(tie, to="fisher"), "fisher: given with"),
    (lambda tie: harden_(tie, fisher=[{}, {}]), "fisher: given with"),
    (lambda tie: harden_(tie, to="fisher", fisher=[{}]), "has no entry '0.weight'"),
    (lambda tie: harden_(tie, to="fisher", fisher=[{n: torch.ones(1) for n in ("0.weight", "0.bias", "2.weight", "2.bias")}] * 2), "of shape"),
    (lambda tie: harden_(tie, to="fisher", fisher={"0.weight": torch.ones(5, 4)}), "one dictionary per model"),
    (lambda tie: harden_(tie, to="fisher", fisher=[{n: torch.full_like(p, math.inf) for n, p in mlp().named_parameters()}] * 2), "finite numbers"),
    (lambda tie: harden_(tie, to="fisher", fisher=[{n: p.detach().square() for n, p in mlp().named_parameters()}]), r"a dictionary for models\[1\]"),
    (lambda tie: harden_(TiePenalty([(torch.ones(1), torch.zeros(1))])), "bare tensors"),
])
def test_refused_hardening_changes_nothing(call, message):
    a, b = mlp(0), mlp(1)
    before, owners = state(a, b), [*a.parameters(), *b.parameters()]
    with pytest.raises(ValueError, match=message): call(TiePenalty(a, b))
    assert all(torch.equal(x, y) for x, y in zip(before, state(a, b)))
    assert all(p is q for p, q in zip(owners, [*a.parameters(), *b.parameters()]))


def transposed():
    model = nn.ModuleList([nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)])
    return model, TiePenalty(model, members=[("0.weight", "1.weight")], map=lambda w: w.T)


def test_harden_through_a_map_makes_the_member_what_the_map_says():
    model, tie = transposed()
    source, member = model[0].weight, model[1].weight.detach().clone()
    report = harden_(tie, to="first")
    assert model[0].weight is source and [*model.parameters()] == [source]
    assert torch.equal(model[1].weight, source.T)
    assert [m.distance for m in report] == pytest.approx([0, (member - source.T).norm().item()])
    model[1](torch.ones(3)).sum().backward()
    torch.testing.assert_close(source.grad, torch.ones(3, 2))


def test_harden_through_a_map_needs_a_root_and_the_first_value():
    model, tie = transposed()
    before = [*model.parameters()]
    with pytest.raises(ValueError, match="to: 'first' for 0.weight, which has a map with no way back, is expected, got 'mean'"): harden_(tie)
    two = TiePenalty(model[0], model[1], members=[("weight", "weight")], map=lambda w: w.T)
    with pytest.raises(ValueError, match="model: the module that holds the members of"): harden_(two, to="first")
    with pytest.raises(ValueError, match="model: the module that holds the members of weight, which has a map, is expected, got Linear"): harden_(two, to="first", model=model[0])
    assert all(p is q for p, q in zip(before, model.parameters()))
    harden_(two, to="first", model=model)
    assert torch.equal(model[1].weight, model[0].weight.T)


def test_fisher_diagonal_equals_the_loop_over_examples_and_labels():
    model, x = mlp(0), torch.randn(7, 4, dtype=torch.float64)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for example in x:
        for c in range(3):
            log_p = F.log_softmax(model(example[None]), -1)[0, c]
            for (name, _), grad in zip(model.named_parameters(), torch.autograd.grad(log_p, list(model.parameters()))):
                expected[name] += log_p.exp().detach() * grad ** 2 / len(x)
    for chunk in (2, np.int64(2), 64):
        for name, value in fisher_diagonal(model, x, chunk).items(): torch.testing.assert_close(value, expected[name])


def test_fisher_diagonal_refuses_no_examples_and_no_chunk():
    with pytest.raises(ValueError, match="x: at least one"): fisher_diagonal(mlp(), torch.zeros(0, 4))
    for chunk in (0, 1.5):
        with pytest.raises((ValueError, TypeError), match="chunk: a whole number"): fisher_diagonal(mlp(), torch.zeros(2, 4), chunk)
    for x in (torch.zeros(2, 9), torch.zeros(2, 4).long()):
        with pytest.raises(ValueError, match="^x: examples that the model takes are expected, got shape"): fisher_diagonal(mlp(), x)


@pytest.mark.parametrize("fisher, error, message", [
    ([None, None], TypeError, r"^fisher\[0\]: a dictionary of tensors is expected, got None"), ([{"weight": 1.0}, {"weight": 1.0}], TypeError, r"^fisher of models\[0\].weight: a floating point tensor"),
    ([{"weight": torch.ones(2)}] * 2, ValueError, r"^fisher of models\[0\].weight: a tensor of shape \(1, 2\) is expected, got \(2,\)"), ([{"weight": torch.ones(1, 2).long()}] * 2, TypeError, "^fisher of"),
    ([{"weight": torch.tensor([[1.0, math.nan]])}] * 2, ValueError, "^fisher of"), ([{"weight": torch.ones(1, 2)}], ValueError, r"^fisher: a dictionary for models\[1\] too")])
def test_a_fisher_diagonal_of_another_form_changes_nothing(fisher, error, message):
    a, b = (nn.Linear(2, 1, bias=False) for _ in range(2))
    before = a.weight.detach().clone(), b.weight.detach().clone()
    with pytest.raises(error, match=message): harden_(TiePenalty(a, b), to="fisher", fisher=fisher)
    assert torch.equal(a.weight, before[0]) and torch.equal(b.weight, before[1]) and a.weight is not b.weight


# What it refuses at construction

SAME = nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize("make, error, message", [
    (lambda: TiePenalty(), TypeError, "got nothing"),
    (lambda: TiePenalty(3), TypeError, "got int"),
    (lambda: TiePenalty([]), ValueError, "nothing to tie"),
    (lambda: TiePenalty([()]), ValueError, "two members or more"),
    (lambda: TiePenalty([(torch.zeros(2),)]), ValueError, "two members or more"),
    (lambda: TiePenalty([torch.zeros(2), torch.zeros(2)]), TypeError, "a tuple of tensors is expected, got Tensor"),
    (lambda: TiePenalty([(torch.zeros(2), 3)]), TypeError, "a tuple of tensors"),
    (lambda: TiePenalty([(torch.zeros(2), torch.zeros(3))]), ValueError, r"\(2,\).*\(3,\); a map"),
    (lambda: TiePenalty([(torch.zeros(2), torch.zeros(2, dtype=torch.int64))]), TypeError, r"groups\[0\]\[1\] is torch.int64"),
    (lambda: TiePenalty([(torch.zeros(2), torch.zeros(2).double())]), ValueError, "torch.float32.*torch.float64"),
    (lambda: TiePenalty([(torch.zeros(2), torch.zeros(2, device="meta"))]), ValueError, "cpu.*meta"),
    (lambda: TiePenalty([(SAME, SAME)]), ValueError, r"same tensor is on both sides, as groups\[0\]\[0\] and groups\[0\]\[1\]"),
    (lambda: TiePenalty(mlp(), mlp(), strength=-1), ValueError, "strength of 0.weight: .* got -1"),
    (lambda: TiePenalty(mlp(), mlp(), strength=math.nan), ValueError, "strength of 0.weight: .* got nan"),
    (lambda: TiePenalty(mlp(), mlp(), strength=math.inf), ValueError, "got inf"),
    (lambda: TiePenalty(mlp(), mlp(), strength="1"), TypeError, "strength of 0.weight: a number is expected, got '1'"),
    (lambda: TiePenalty(mlp(), mlp(), strength={"*.weight": 1}), ValueError, r"fits \['0.bias', '2.bias'\]"),
    (lambda: TiePenalty(mlp(), mlp(), strength={"*": 1, "head": 2}), ValueError, "strength: 'head' matches none of 4 names"),
    (lambda: TiePenalty(mlp(), mlp(), members="*.wieght"), ValueError, "'.*wieght' matches none .* nearest is '.*weight'"),
    (lambda: TiePenalty(mlp(), mlp(), members=[]), ValueError, "nothing to tie"),
    (lambda: TiePenalty(mlp(), mlp(), members=[("0.weight",)]), ValueError, "names 1 parameters for 2 models"),
    (lambda: TiePenalty(mlp(), mlp(), members=[3]), TypeError, "members"),
    (lambda: TiePenalty(mlp(), mlp(), members=3), TypeError, "members: .* got 3"),
    (lambda: TiePenalty(mlp(), mlp(), members={"0.weight": "2.weight"}), TypeError, "members: .* got {'0.weight'"),
    (lambda: TiePenalty(mlp(), mlp(), members=[("*.weight", "*.weight")]), ValueError, r"models\[0\]: '\*.weight' matches 2 of 4 names"),
    (lambda: TiePenalty(mlp(), mlp(), members=[("0.weight", "0.weight"), ("0.weight", "2.weight")]), ValueError, "two groups are called '0.weight'"),
    (lambda: TiePenalty(mlp(), members=[["0.weight", "2.weight"], ["0.weight", "0.bias"]]), ValueError, "two groups are called '0.weight'"),
    (lambda: TiePenalty(mlp(), nn.Linear(4, 5).double()), ValueError, r"different names: only models\[0\] has .*0.bias.*only models\[1\] has .*bias"),
    (lambda: TiePenalty(mlp(), members=["0.weight"]), ValueError, "two members or more, got \\['0.weight'\\]"),
    (lambda: TiePenalty(mlp()), ValueError, "members: which weights"),
    (lambda: TiePenalty([(torch.zeros(2), torch.ones(2))], members="*"), ValueError, "members: names need models"),
    (lambda: TiePenalty(mlp(), mlp(), distance="l2"), ValueError, "distance: one of .* got 'l2'"),
    (lambda: TiePenalty(mlp(), mlp(), toward="median"), ValueError, "toward"),
    (lambda: TiePenalty(mlp(), mlp(), delta=0), ValueError, "delta"),
    (lambda: TiePenalty(mlp(), mlp(), distance=np.zeros(2)), ValueError, "^distance: one of"), (lambda: TiePenalty(mlp(), mlp(), toward=np.zeros(2)), ValueError, "^toward: 'pairs' or 'mean'"),
    (lambda: anneal(TiePenalty(mlp(), mlp()), 1, 2, 3, shape=np.zeros(2)), ValueError, "^shape: one of"), (lambda: harden_(TiePenalty(mlp(), mlp()), to=np.zeros(2)), ValueError, "^to: 'mean', 'first' or 'fisher'"),
    (lambda: accumulate_grad_(TiePenalty(mlp(), mlp()), compiled="no"), TypeError, "^compiled: True or False"),
    (lambda: TiePenalty([(torch.zeros(2, 3), torch.zeros(3, 2))], map=lambda w: w.sum()), ValueError, r"shape \(\) after its map, .* shape \(3, 2\)"),
    (lambda: TiePenalty([(torch.zeros(2), torch.zeros(2))], map=lambda w: 3), TypeError, "into a int"),
    (lambda: TiePenalty([(torch.zeros(2), torch.zeros(2))], map=3), TypeError, "a function .* is expected, got 3"),
])
def test_bad_input_raises_at_construction(make, error, message):
    with pytest.raises(error, match=message): make()


def test_a_bad_strength_leaves_the_old_one():
    tie = TiePenalty(mlp(), mlp(1), strength=2.0)
    for bad in (-1.0, math.nan, {"0.weight": 1.0}):
        with pytest.raises(ValueError, match="strength"): tie.strength = bad
    with pytest.raises(TypeError): tie.strength["0.weight"] = 3.0
    assert set(tie.strength.values()) == {2.0}


def test_a_bare_tensor_that_is_no_leaf_is_refused_by_the_one_pass():
    x = torch.ones(2, requires_grad=True) * 2
    with pytest.raises(ValueError, match="leaves"): accumulate_grad_(TiePenalty([(x, torch.zeros(2))]))


def test_copies_of_a_model_are_tied_to_their_source():
    source = mlp(0)
    tuned = copy.deepcopy(source)
    for p in source.parameters(): p.requires_grad_(False)
    tie = TiePenalty(tuned, source, strength=0.1)
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
    (tuned(torch.ones(2, 4).double()).pow(2).sum() + tie()).backward()
    optimizer.step()
    assert 0 < loop(tuned, source) and all(p.grad is None for p in source.parameters())


# What a review found

def test_a_map_is_not_autocast():
    a, b, turn = nn.Linear(3, 3), nn.Linear(3, 3), torch.randn(3, 3)
    tie = TiePenalty([(a.weight, b.weight)], map=lambda w: w @ turn)
    with torch.autocast("cpu", dtype=torch.bfloat16): cast = tie()
    torch.testing.assert_close(cast, tie(), rtol=0, atol=0)


def test_added_gradients_through_a_map_are_not_autocast():
    a, b, turn = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False), torch.randn(64, 64)
    tie = TiePenalty(a, b, map=lambda w: w @ turn)
    accumulate_grad_(tie)
    expected, a.weight.grad = a.weight.grad, None
    with torch.autocast("cpu", dtype=torch.bfloat16): accumulate_grad_(tie)
    assert torch.equal(a.weight.grad, expected)


@pytest.mark.parametrize("distance", DISTANCES[:4])
def test_proximal_steps_of_half_precision_are_computed_in_single(distance):
    torch.manual_seed(0)
    x, y = (nn.Parameter((.02 * torch.randn(64, 64)).bfloat16()) for _ in range(2))
    a, b = (nn.Parameter(p.detach().float()) for p in (x, y))
    half, single = (TiePenalty([pair], distance=distance, delta=.01) for pair in ((x, y), (a, b)))
    proximal_(half, 1e-3), proximal_(single, 1e-3)
    assert torch.equal(x, a.bfloat16()) and torch.equal(y, b.bfloat16())


def test_proximal_steps_of_three_in_half_precision_are_computed_in_single():
    torch.manual_seed(0)
    ps = [nn.Parameter((.02 * torch.randn(64, 64)).bfloat16()) for _ in range(3)]
    qs = [nn.Parameter(p.detach().float()) for p in ps]
    proximal_(TiePenalty([ps]), 10.0), proximal_(TiePenalty([qs]), 10.0)
    assert all(torch.equal(p, q.bfloat16()) for p, q in zip(ps, qs))


@pytest.mark.parametrize("options, calls", [({}, 0), ({"toward": "mean"}, 1), ({"distance": "cosine"}, 1)])
def test_hooks_are_called_where_autograd_walks(options, calls):
    a, b, seen = mlp(0), mlp(1), []
    a[0].weight.register_hook(seen.append)
    accumulate_grad_(TiePenalty(a, b, **options))
    assert len(seen) == calls


def test_gradients_are_added_on_meta():
    a, b = (nn.Linear(3, 3, device="meta") for _ in range(2))
    accumulate_grad_(TiePenalty(a, b))
    assert a.weight.grad.device.type == "meta"


def test_a_strength_by_either_name_of_a_shared_weight():
    def words():
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
        model[1].weight = model[0].weight
        return model
    for strength in ({"1.*": 2.0, "*": 2.0}, {"1.weight": 2.0}, {"0.*": 2.0}):
        tie = TiePenalty(words(), words(), strength=strength)
        tie.strength = dict(tie.strength)
        assert tie.strength == {"0.weight": 2.0}
    assert anneal(tie, 0.1, 1.0, 10).penalty.strength == {"0.weight": 0.2}
    with pytest.raises(ValueError, match="^strength: 0.weight and 1.weight are one group, got 1.0 and 2.0"):
        TiePenalty(words(), words(), strength={"1.*": 2.0, "*": 1.0})


@pytest.mark.parametrize("distance", DISTANCES[:3])
def test_a_gradient_with_a_graph_towards_the_mean_is_the_same(distance):
    models = [mlp(seed) for seed in range(3)]
    tie = TiePenalty(*models, distance=distance, toward="mean")
    plain = torch.autograd.grad(tie(), tie.parameters())
    torch.testing.assert_close(torch.autograd.grad(tie(), tie.parameters(), create_graph=True), plain)


def test_hardening_large_half_precision_weights():
    weights = nn.ModuleList([nn.Linear(2, 1, bias=False).half() for _ in range(2)])
    for layer, value in zip(weights, (60000.0, 50016.0)): nn.init.constant_(layer.weight, value)
    report = harden_(TiePenalty(*weights))
    assert weights[1].weight.unique().tolist() == [55008]
    assert report[0].relative == pytest.approx(4992 / 60000) and "moved by" in repr(report[0])


def test_a_pair_named_twice_in_turned_order_counts_once():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    once, twice = TiePenalty(model, members=[("0.weight", "1.weight")]), TiePenalty(model, members=[("0.weight", "1.weight"), ("1.weight", "0.weight")])
    torch.testing.assert_close(once(), twice())


def test_views_of_one_memory_are_one_tensor():
    w = nn.Parameter(torch.ones(4))
    for other in (w.detach(), w[:], w.view(4)):
        with pytest.raises(ValueError, match="same tensor is on both sides"): TiePenalty([(w, other)])
    assert TiePenalty([(w[:2], w[2:])])().item() == 0  # two halves are two tensors


def test_hardening_part_of_a_model_follows_its_other_ties():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc, self.dec, self.head = nn.Embedding(5, 3), nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.dec.weight
    net = Net()
    harden_(TiePenalty(net.enc, net.dec), model=net)
    assert net.head.weight is net.dec.weight is net.enc.weight
    with pytest.raises(TypeError, match="model: a module is expected"): harden_(TiePenalty(net.enc, nn.Embedding(5, 3)), model=3)


def test_fisher_diagonal_leaves_a_reused_layer_its_parameters():
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    held = list(map(id, model.parameters()))
    assert set(fisher_diagonal(model, torch.rand(4, 3))) == {"0.weight", "0.bias"} and list(map(id, model.parameters())) == held


def test_fisher_diagonal_takes_evaluation_mode_and_gives_the_mode_back():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).train()
    x = torch.randn(5, 4)
    first, second = fisher_diagonal(model, x), fisher_diagonal(model, x)
    assert all(torch.equal(first[name], second[name]) for name in first) and model.training and model[2].training
    with pytest.raises(ValueError, match=r"output has shape \(b, classes\) is expected, got \(1, 2, 3\)"): fisher_diagonal(nn.Linear(4, 3), torch.randn(5, 2, 4)[:, :, :])


@pytest.mark.parametrize("state", [None, {}, {"base": {"groups[0]": 1.0}}, {"base": {"groups[0]": 1.0}, "done": -4}, {"base": {"groups[0]": 1.0}, "done": "x"}, {"base": 3, "done": 1}, {"base": {"groups[0]": "x"}, "done": 1}, {"base": {"groups[0]": None}, "done": 1}])
def test_a_schedule_refuses_a_state_that_is_none(state):
    tie = TiePenalty([(torch.ones(1), torch.zeros(1))])
    schedule = anneal(tie, 1, 4, steps=2)
    with pytest.raises((ValueError, TypeError), match="^state"): schedule.load_state_dict(state)
    assert tie.strength == {"groups[0]": 1.0}


@pytest.mark.parametrize("call", [accumulate_grad_, lambda p: proximal_(p, 0.1), harden_, lambda p: anneal(p, 1, 2, 3)])
def test_anything_but_a_penalty_is_refused(call):
    with pytest.raises(TypeError, match="penalty: a TiePenalty is expected, got NoneType"): call(None)


def sharded():
    "One process of FSDP2: every distance, its gradient and a proximal step equal the unsharded ones."
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh("cpu", (2,))
    for distance in DISTANCES:
        plain, models = [mlp(0), mlp(1)], [mlp(0), mlp(1)]
        for model in models: fully_shard(model, mesh=mesh)
        ours, whole = TiePenalty(*models, distance=distance), TiePenalty(*plain, distance=distance)
        torch.testing.assert_close(ours(), whole())
        accumulate_grad_(ours)
        accumulate_grad_(whole)
        for p, q in zip(models[0].parameters(), plain[0].parameters()): torch.testing.assert_close(p.grad.full_tensor(), q.grad)
        if distance == "squared_l2":
            proximal_(ours, 0.1)
            proximal_(whole, 0.1)
            for p, q in zip(models[1].parameters(), plain[1].parameters()): torch.testing.assert_close(p.full_tensor(), q)


@pytest.mark.long
def test_two_processes_of_fsdp2_equal_one(tmp_path):
    in_two_processes(sharded, tmp_path)


# What a second review found

def test_members_that_are_alike_no_more_are_named():
    a, b = mlp(0, torch.float32), mlp(1, torch.float32)
    tie = TiePenalty(a, b)
    a[2].double()
    before = state(a, b)
    message = r"^2.weight: models\[0\].2.weight has dtype torch.float64, models\[1\].2.weight has dtype torch.float32$"
    for use in (tie, tie.distances, lambda: accumulate_grad_(tie), lambda: proximal_(tie, .1), lambda: harden_(tie), lambda: harden_(tie, to="first")):
        with pytest.raises(ValueError, match=message): use()
    assert all(torch.equal(x, y) for x, y in zip(before, state(a, b))) and a[0].weight is not b[0].weight and a[0].weight.grad is None
    a[2].float().weight = nn.Parameter(torch.zeros(3, 6))
    with pytest.raises(ValueError, match=r"^2.weight: models\[0\].2.weight has shape \(3, 6\), models\[1\].2.weight has shape \(3, 5\); a map"): tie()
    model, turned = transposed()
    model[1].weight = nn.Parameter(torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"^0.weight: 0.weight has shape \(2, 3\) after its map, 1.weight has shape \(5, 3\)$"): turned()
    tie = TiePenalty(mlp(0), mlp(1))
    for member in tie.groups["2.bias"]: member.owner.to("meta")
    with pytest.raises(ValueError, match=r"^groups: one device for all is expected, got cpu for 0.weight and meta for 2.weight$"): tie()


def test_hardening_declares_the_tie():
    from sharetie.ties import check_ties, declared_ties, find_ties
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    harden_(TiePenalty(model, members={"weights": "*.weight", "biases": ["0.bias", "2.bias"]}))
    assert {d.names for d in declared_ties(model)} == {("0.weight", "1.weight", "2.weight"), ("0.bias", "2.bias")}
    assert len(check_ties(model)) == 2
    model[1].weight = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="'1.weight' differs"): check_ties(model)


def test_hardening_two_models_declares_the_tie_on_what_holds_them():
    from sharetie.ties import check_ties, declared_ties
    both = nn.ModuleDict({"a": mlp(0), "b": mlp(1), "head": nn.Linear(3, 2)})
    harden_(TiePenalty(both["a"], both["b"]), model=both)
    assert {d.names for d in declared_ties(both)} == {(f"a.{name}", f"b.{name}") for name in ("0.weight", "0.bias", "2.weight", "2.bias")}
    assert len(check_ties(both)) == 4 and not declared_ties(both["a"])
    apart = mlp(0), mlp(1)
    harden_(TiePenalty(*apart))
    assert not any(map(declared_ties, apart)) and apart[0][0].weight is apart[1][0].weight, "nothing holds both, so nothing can say so"
    part = nn.ModuleList([mlp(0)])
    other = mlp(1)
    harden_(TiePenalty(part[0], other), model=part)
    assert not declared_ties(part) and part[0][0].weight is other[0].weight


@pytest.mark.parametrize("to", ["mean", "first"])
def test_hardening_drops_the_gradients_of_before(to):
    a, b = mlp(0), mlp(1)
    for p in (*a.parameters(), *b.parameters()): p.grad = torch.ones_like(p)
    harden_(TiePenalty(a, b, members=["*.weight"]), to=to)
    assert a[0].weight.grad is None and b[2].weight.grad is None and a[0].bias.grad is not None
    model, tie = transposed()
    model[0].weight.grad = torch.ones(3, 2)
    harden_(tie, to="first")
    assert model[0].weight.grad is None


def test_hardening_trains_what_any_member_trained_and_gives_the_flag_back_when_refused():
    a, b = mlp(0), mlp(1)
    a.requires_grad_(False)
    b[0].requires_grad_(True), b[2].requires_grad_(False)
    harden_(TiePenalty(a, b))
    assert [p.requires_grad for p in a.parameters()] == [True, True, False, False]
    a, b = mlp(0), mlp(1)
    a[0].requires_grad_(False)
    b[2] = nn.utils.parametrizations.weight_norm(nn.Linear(5, 3).double())
    tie = TiePenalty(a, b, members=["0.weight"])
    holder = nn.Sequential(nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel))
    nn.Module.__init__(holder[0])
    holder[0].module = nn.ModuleList([a, b])
    with pytest.raises(ValueError, match="^model: one that is not wrapped yet is expected"): harden_(tie, model=holder)
    assert not a[0].weight.requires_grad and a[0].weight is not b[0].weight and b[0].weight.requires_grad
