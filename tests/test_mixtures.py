"Mixtures for several tasks: against loops, extremes, who uses what, files, labels that are missing, bad input."
import copy
import itertools
import re

import pytest
import torch
from torch import nn

from schemes import CHECKS, TASKS, TRUNKS, mlp, scalar, setting
from sharetie.gates import AdaTT
from sharetie.mixtures import BATCHABLE, CGC, PLE, Gate, Gated, Level, MMoE, OMoE, alike, draw_gates, gate_means, gate_weights, mixed, together
from sharetie.multitask import Hard, Single, TaskLosses, sharing
from sharetie.results import set_seed
from sharetie.train import fit


def gate(trunk):
    "A function that makes gates for the experts of a kind of trunk, where they do not tell it."
    if not isinstance(trunk[0], nn.Conv2d): return None
    return lambda n: nn.Sequential(nn.Flatten(), Gate(16, n))


def levels(trunk):
    "A trunk cut in two, as experts of two levels."
    return [trunk[:len(trunk) // 2], trunk[len(trunk) // 2:]]


def ple(trunk, heads, axis):
    second = lambda n: nn.Sequential(nn.Flatten(), Gate(64, n))  # noqa: E731
    gates = [gate(trunk), second] if gate(trunk) else None
    return PLE(levels(trunk), heads, own=1, shared=1, gate=gates, redraw=False)


MINE = {"mmoe": lambda trunk, heads, axis: MMoE(trunk, heads, 3, gate(trunk), redraw=False),
        "omoe": lambda trunk, heads, axis: OMoE(trunk, heads, 3, gate(trunk), redraw=False),
        "cgc": lambda trunk, heads, axis: CGC(trunk, heads, {"a": 1, "b": 2, "c": 0}, 2, gate(trunk), redraw=False),
        "ple": ple}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", TRUNKS)
@pytest.mark.parametrize("name", MINE)
def test_schemes(name, kind, check, tmp_path): check(MINE[name], kind, tmp_path)


def expert(out=8, dim=6): return nn.Sequential(nn.Linear(dim, out), nn.Tanh())
def heads(tasks=TASKS, width=8): return {task: nn.Linear(width, 2) for task in tasks}


# Several modules at once

class Own(nn.Module):
    "A part that nobody has declared to be batchable."
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 8)

    def forward(self, x): return self.linear(x).relu() if x.sum() > 0 else self.linear(x)


BUILD = {"linear": lambda: nn.Linear(6, 8), "mlp": lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)),
         "own": Own, "norm": lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", BUILD)
def test_together_is_one_by_one(kind, own):
    "Values and gradients of weights and inputs, in double precision, whatever can be batched."
    set_seed(0)
    modules = [BUILD[kind]().double() for _ in range(3)]
    assert alike(modules) == (kind in ("linear", "mlp"))
    xs = [torch.randn(5, 6, dtype=torch.float64, requires_grad=True) for _ in modules]
    weights = [p for m in modules for p in m.parameters()]
    got = together(modules, xs if own else xs[0], own)
    want = torch.stack([m(x if own else xs[0]) for m, x in zip(modules, xs)])
    torch.testing.assert_close(got, want)
    inputs = weights + (xs if own else xs[:1])
    for a, b in zip(*(torch.autograd.grad(scalar(y), inputs) for y in (got, want))): torch.testing.assert_close(a, b)


def test_together_passes_gradcheck():
    set_seed(0)
    modules, x = [expert().double() for _ in range(2)], torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: together(modules, x), (x, *(p for m in modules for p in m.parameters())))


def test_what_is_not_alike_is_left_to_loops():
    "Hooks are called, other settings are kept, and what was changed afterwards counts."
    a, b = expert(), expert()
    assert alike([a, b])
    seen = []
    handle = b.register_forward_hook(lambda *_: seen.append(1))
    assert not alike([a, b])
    together([a, b], torch.randn(2, 6))
    assert seen == [1]
    handle.remove()
    assert alike([a, b])
    b[1].register_full_backward_hook(lambda *_: None)
    assert not alike([a, b])
    drop = [nn.Sequential(nn.Linear(6, 8), nn.Dropout(p)) for p in (.1, .2)]
    assert not alike(drop)
    drop[1][1].p = .1
    assert alike(drop)
    drop[1].eval()
    assert not alike(drop)
    assert not alike([nn.Linear(6, 8), nn.Linear(6, 8, bias=False)])
    named = nn.Sequential()
    named.add_module("first", nn.Linear(6, 8))
    assert not alike([nn.Sequential(nn.Linear(6, 8)), named])
    pruned = [expert(), expert()]
    nn.utils.parametrizations.orthogonal(pruned[0][0])
    assert not alike(pruned)
    torch.testing.assert_close(together(pruned, torch.ones(1, 6))[0], pruned[0](torch.ones(1, 6)))


def test_dropout_of_experts_is_drawn_for_each():
    set_seed(0)
    for modules in ([nn.Dropout(.5) for _ in range(2)], [nn.Sequential(nn.Dropout(.5), nn.LeakyReLU(), nn.Linear(1, 1)) for _ in range(2)]):
        if len([*modules[0].parameters()]):
            for m in modules: m.load_state_dict({"2.weight": torch.ones(1, 1), "2.bias": torch.zeros(1)})
        y = together(modules, torch.ones(200, 1))
        assert not torch.equal(y[0], y[1]) and set(y.unique().tolist()) == {0., 2.}


def test_own_parts_can_join():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6))

        def forward(self, x): return x * self.weight

    modules = [Scale(), Scale()]
    assert not alike(modules)
    BATCHABLE.add(Scale)
    try:
        assert alike(modules)
        torch.testing.assert_close(together(modules, torch.ones(2, 6)), torch.stack([m(torch.ones(2, 6)) for m in modules]))
    finally: BATCHABLE.discard(Scale)


# Against loops

def by_loops(model, x):
    "Any Gated model, by loops over levels, units and experts, one row at a time."
    answers = {task: [] for task in model.tasks}
    for row in x.split(1):
        z = None
        for l, level in enumerate(model.levels):
            at = (lambda u, z=z: row) if l == 0 else z.__getitem__
            outputs = [e(at(owner)) for e, owner in zip(level.experts, level.owners)]
            new = {}
            for u, heard in level.hears.items():
                q, total = level.weights(row if l == 0 else z, [u])[u], 0
                for j, i in enumerate(heard): total = total + q[..., j:j + 1] * outputs[i]
                new[u] = total
            z = new
        for task in model.tasks: answers[task].append(model.heads[task](z[model.reads(task)]))
    return {task: torch.cat(rows) for task, rows in answers.items()}


MODELS = {"mmoe": lambda: MMoE(expert(), heads(), 4), "omoe": lambda: OMoE(expert(), heads(), 4),
          "cgc": lambda: CGC(expert(), heads(), {"a": 2, "b": 1, "c": 0}, 1),
          "ple": lambda: PLE([expert(5), expert(7, 5), expert(8, 7)], heads(), 2, 1),
          "ple without shared": lambda: PLE([expert(5), expert(8, 5)], heads(), 2, 0)}


@pytest.mark.parametrize("name", MODELS)
def test_models_are_their_loops(name):
    "Outputs and all gradients, in double precision; one example alone; no example."
    set_seed(0)
    model, x = MODELS[name]().double(), torch.randn(4, 6, dtype=torch.float64)
    weights = list(model.parameters())
    got, want = model(x), by_loops(model, x)
    for task in TASKS: torch.testing.assert_close(got[task], want[task])
    grads = [torch.autograd.grad(sum(map(scalar, y.values())), weights, allow_unused=True) for y in (got, want)]
    for a, b in zip(*grads): torch.testing.assert_close(a, b)
    for task, y in model(x[:1]).items(): torch.testing.assert_close(y, want[task][:1])
    for task, y in model(x[:0]).items(): assert y.shape == (0, 2)


@pytest.mark.parametrize("name", MODELS)
def test_a_lost_number_stays_in_its_row(name):
    set_seed(0)
    model, x = MODELS[name](), torch.randn(4, 6)
    before = model(x)
    x[2, 1] = torch.nan
    for task, y in model(x).items():
        assert y[2].isnan().all()
        torch.testing.assert_close(y[[0, 1, 3]], before[task][[0, 1, 3]])


def test_mixed_takes_weights_by_example_by_entry_and_for_all():
    set_seed(0)
    y = torch.randn(3, 5, 4, 8)  # experts, examples, entries, features
    for lead in ((), (5,), (5, 4)):
        q = torch.randn(2, *lead, 3)
        want = torch.stack([sum(q[k, ..., i].reshape(*lead, *[1] * (3 - len(lead))) * y[i] for i in range(3)) for k in range(2)])
        torch.testing.assert_close(mixed(q, y), want)
    for shape in ((2, 5, 2), (2, 4, 3), (2, 2)):
        with pytest.raises(ValueError, match="gate: weights"): mixed(torch.randn(shape), y)


# Extremes

class Takes(nn.Module):
    "A gate that takes one expert only."
    def __init__(self, row, n):
        super().__init__()
        self.register_buffer("row", torch.eye(n)[row])

    def forward(self, x): return self.row.expand(len(x), -1)


@pytest.mark.parametrize("make", [MMoE, OMoE])
@pytest.mark.parametrize("kind", TRUNKS)
def test_one_expert_is_hard_sharing(kind, make):
    trunk, shape, head, axis = TRUNKS[kind]
    set_seed(0)
    base, tops = trunk().double(), {task: head().double() for task in TASKS}
    x = torch.randn(4, *shape, dtype=torch.float64)
    one = make(base, copy.deepcopy(tops), 1, gate(base), redraw=False).double()
    hard = Hard(copy.deepcopy(base), tops)
    for task, y in hard(x).items(): torch.testing.assert_close(one(x)[task], y)
    assert not any(p.grad is not None for p in base.parameters())  # the template stays out of it


def test_gates_that_take_one_expert_each_are_single_networks():
    set_seed(0)
    rows = itertools.count()
    model = MMoE(mlp(), heads(), 3, gate=lambda n: Takes(next(rows), n))
    single = Single(mlp(), copy.deepcopy(dict(model.heads)))
    for tower, e in zip(single.towers.values(), model.levels[0].experts): tower.load_state_dict(e.state_dict())
    x = torch.randn(4, 6)
    for task, y in single(x).items(): torch.testing.assert_close(model(x)[task], y)


def test_ple_of_one_level_is_cgc_and_with_shared_experts_alone_hard():
    set_seed(0)
    a = PLE([mlp()], heads(), 2, 1)
    b = CGC(mlp(), heads(), 2, 1)
    b.load_state_dict(a.state_dict())
    x = torch.randn(3, 6)
    for task, y in a(x).items(): assert torch.equal(y, b(x)[task])
    c = PLE([expert(), expert(8, 8)], heads(), 0, 1)
    hard = Hard(nn.Sequential(*(copy.deepcopy(level.experts[0]) for level in c.levels)), dict(c.heads))
    for task, y in hard(x).items(): torch.testing.assert_close(c(x)[task], y)


def test_who_uses_what():
    "CGC keeps own experts apart; PLE's shared gate makes the lower ones common, and the last level's own stay own."
    cgc, two = CGC(expert(), heads(), 1, 1), PLE([expert(), expert(8, 8)], heads(), 1, 1)
    shared = sharing(cgc)["shared"]
    assert [n for n, count in shared.items() if count] == ["levels.0.experts.3.0.weight", "levels.0.experts.3.0.bias"]
    names = {n.rpartition(".")[0] for n, count in sharing(two)["shared"].items() if count}
    assert names == {f"levels.0.experts.{i}.0" for i in range(4)} | {"levels.0.gates.shared.linear", "levels.1.experts.3.0"}
    apart = PLE([expert(), expert(8, 8)], heads(), 1, 0)
    assert sharing(apart).shared == 0


def test_only_what_is_asked_is_computed():
    model = PLE([expert(), expert(8, 8)], heads(), 1, 0)
    called = []
    for l, level in enumerate(model.levels):
        for i, e in enumerate(level.experts): e.register_forward_hook(lambda *_, at=(l, i): called.append(at))
    model({"b": torch.randn(2, 6)})
    assert called == [(0, 1), (1, 1)]


# Around the model

def test_missing_labels_send_no_gradient():
    "Rows without a label of a task move neither its gate nor its own experts."
    set_seed(0)
    model, x = CGC(mlp(), heads(), 1, 1), torch.randn(6, 6)
    y = {task: torch.randn(6, 2) for task in TASKS}
    y["b"] = torch.full((6, 2), torch.nan)
    y["a"][3:] = torch.nan
    losses = TaskLosses(dict.fromkeys(TASKS, nn.functional.mse_loss))
    losses.total(model(x), y).backward()
    gates = model.levels[0].gates
    for p in (gates["b"].linear.weight, model.levels[0].experts[1][0].weight): assert p.grad is None or not p.grad.any()
    kept = gates["a"].linear.weight.grad.clone()
    model.zero_grad()
    half = {"a": y["a"][:3]}
    losses.total({"a": model(x[:3])["a"]}, half).backward()
    torch.testing.assert_close(gates["a"].linear.weight.grad, kept)


def test_autocast_and_training():
    set_seed(0)
    model, x = MMoE(mlp(), heads(), 4), torch.randn(16, 6)
    with torch.autocast("cpu", torch.bfloat16): low = model(x)
    for task, y in model(x).items():
        assert low[task].dtype == torch.bfloat16
        torch.testing.assert_close(low[task].float(), y, atol=.05, rtol=.05)
    y = {task: torch.randn(16, 2) for task in TASKS}
    losses = TaskLosses(dict.fromkeys(TASKS, nn.functional.mse_loss))
    history = fit(model, (x, y), losses.total, epochs=3, amp=torch.bfloat16, progress=False)
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]


@pytest.mark.long
def test_compiled_with_gradients():
    "One graph, forward and back; `check_compiled` has the other models."
    set_seed(0)
    model, x = MODELS["mmoe"](), torch.randn(4, 6)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, want = compiled(x), model(x)
    for task, y in want.items(): torch.testing.assert_close(got[task], y)
    grads = [torch.autograd.grad(sum(map(scalar, y.values())), list(model.parameters())) for y in (want, got)]
    for a, b in zip(*grads): torch.testing.assert_close(a, b)


def test_experts_start_apart_and_the_template_stays():
    set_seed(0)
    base = mlp()
    before = copy.deepcopy(base.state_dict())
    model = MMoE(base, heads(), 3)
    starts = [e[0].weight for e in model.levels[0].experts]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(starts, 2))
    with torch.no_grad(): model.levels[0].experts[0][0].weight.zero_()
    assert all(torch.equal(p, before[name]) for name, p in base.state_dict().items())
    same = MMoE(base, heads(), 2, redraw=False).levels[0].experts
    assert torch.equal(same[0][0].weight, same[1][0].weight) and same[0][0].weight is not same[1][0].weight


def test_device_and_dtype_of_gates_are_those_of_experts():
    model = MMoE(expert().double(), heads(), 2)
    assert model.levels[0].gates["a"].linear.weight.dtype == torch.float64
    meta = MMoE(expert().to("meta"), {t: h.to("meta") for t, h in heads().items()}, 2, redraw=False)
    assert meta(torch.empty(3, 6, device="meta"))["a"].shape == (3, 2)


def test_what_gates_say():
    set_seed(0)
    model, x = PLE([expert(), expert(8, 8)], heads(), {"a": 1, "b": 2, "c": 0}, 1), torch.randn(50, 6)
    table = gate_means(model, x)
    assert list(table.columns) == ["a 0", "b 0", "b 1", "shared 0"] and list(table.index) == [*TASKS, "shared"]
    said = gate_weights(model, x)
    torch.testing.assert_close(torch.tensor(table.loc["b", ["b 0", "b 1", "shared 0"]].tolist()), said[0]["b"].mean(0))
    assert table.loc["c"].notna().sum() == 1 and table.loc["c", "shared 0"] == 1
    assert list(gate_means(model, x, 1).index) == TASKS
    assert draw_gates(model, x).get_xlabel() == "expert"
    sequence = MMoE(expert(), heads(), 2)
    assert gate_means(sequence, torch.randn(4, 3, 6)).sum(axis=1).tolist() == pytest.approx([1.] * 3)


# Bad input

class Fixed(nn.Module):
    "A part that has no function to draw its weights anew."
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))


def test_other_numbers_of_experts_are_refused_and_nothing_is_loaded():
    few, many = MMoE(mlp(), heads(), 2), MMoE(mlp(), heads(), 3)
    before = copy.deepcopy(many.state_dict())
    for strict in (True, False):
        with pytest.raises(ValueError, match="one of 3 experts in level 0 is expected, got 2"): many.load_state_dict(few.state_dict(), strict=strict)
    assert all(torch.equal(v, before[k]) for k, v in many.state_dict().items())


def test_other_numbers_of_a_task_s_own_experts_are_refused_and_nothing_is_loaded():
    for build in (lambda own: CGC(expert(), heads(), own), lambda own: PLE([expert(), expert(8, 8)], heads(), own), lambda own: AdaTT([expert()], heads(), own)):
        one, other = build({"a": 2, "b": 3, "c": 2}), build({"a": 3, "b": 2, "c": 2})
        before, kind = copy.deepcopy(other.state_dict()), "native.a" if isinstance(one, AdaTT) else "gates.a.linear.weight"
        for part, state, name in ((other, one.state_dict(), "levels"), (nn.ModuleList([other]), nn.ModuleList([one]).state_dict(), "0.levels")):
            sizes = [tuple(state[f"{name}.0.{kind}"].shape), tuple(before[f"levels.0.{kind}"].shape)]
            message = f"{name}.0.{kind}: a tensor of shape {sizes[1]}, as 'a' has it, is expected, got {sizes[0]}"
            with pytest.raises(ValueError, match=re.escape(message)): part.load_state_dict(state)
        assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_a_head_that_does_not_fit_is_named():
    narrow = {"a": nn.Linear(8, 1), "b": nn.Sequential(nn.ReLU(), nn.Linear(9, 1)), "c": nn.LazyLinear(1)}
    for model in (MMoE(expert(), narrow), CGC(expert(), narrow), AdaTT([expert()], narrow)):
        with pytest.raises(ValueError, match=r"heads\['b'\]: an input of 9 features on axis -1 is expected, got \(4, 8\)"): model(torch.ones(4, 6))
    assert MMoE(expert(), {"c": narrow["c"]})(torch.ones(4, 6))["c"].shape == (4, 1)  # a lazy one takes what comes
    class Broken(nn.Module):
        def forward(self, x): raise RuntimeError("of its own")
    with pytest.raises(RuntimeError, match="of its own"): MMoE(expert(), {"a": Broken()})(torch.ones(4, 6))


BUILDERS = {"mmoe": MMoE, "omoe": OMoE, "cgc": CGC, "ple": lambda e, h: PLE([e, expert(8, 8)], h)}


@pytest.mark.parametrize("name", BUILDERS)
def test_inputs_that_do_not_fit_say_so(name):
    model = BUILDERS[name](expert(), heads())
    for bad in (torch.ones(4, 5), torch.ones(6, 4), torch.tensor(1.), torch.ones(4, 6, 1)):
        for x in (bad, {"b": bad}):
            with pytest.raises(ValueError, match=r"x: an input of 6 features on axis -1 is expected, got \("): model(x)
    for bad in (torch.ones(4, 6, dtype=int), torch.ones(4, 6).bfloat16(), torch.ones(4, 6).tolist()):
        with pytest.raises(TypeError, match="x: (a floating point tensor|inputs of torch.float32, as the weights are,) is expected, got"): model(bad)
    with pytest.raises(ValueError, match="x: an input of 6 features"): gate_weights(model, torch.ones(4, 5))


def test_levels_that_do_not_chain_say_so():
    model = PLE([expert(), expert(8, 5)], heads())
    with pytest.raises(ValueError, match=r"'a' of the level before: an input of 5 features on axis -1 is expected, got \(4, 8\)"): model(torch.ones(4, 6))


@pytest.mark.parametrize("make", [MMoE, OMoE, CGC])
def test_gates_flatten_where_experts_do(make):
    set_seed(0)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
    model, plain, x = make(flat, heads()).double(), make(flat[1], heads()).double(), torch.randn(4, 3, 4, dtype=torch.float64)
    for p, q in zip(plain.parameters(), model.parameters(), strict=True): p.data.copy_(q)
    for task, y in model(x).items(): torch.testing.assert_close(y, plain(x.flatten(1))[task])
    with pytest.raises(ValueError, match=r"x: an input of 12 features on axis -1 after flattening is expected, got \(4, 3, 5\)"): model(torch.ones(4, 3, 5))
    with pytest.raises(ValueError, match="x: a batch to flatten is expected"): model(torch.ones(12))


def test_experts_of_unknown_form_take_what_they_take():
    class Halves(nn.Module):
        def forward(self, x): return x.unflatten(-1, (2, -1)).sum(-2)

    experts = [nn.Sequential(Halves(), nn.Linear(3, 8)), nn.Sequential(nn.Embedding(5, 8)), Own()]
    for e, x in zip(experts, (torch.ones(4, 6), torch.arange(4), torch.ones(4, 6))):
        model = MMoE(e, heads(), 2, gate=lambda n: Takes(0, n), redraw=False)
        assert model(x)["a"].shape == (4, 2)
    conv = MMoE(nn.Conv1d(3, 8, 1), heads(), 2, gate=lambda n: Takes(0, n))
    with pytest.raises(ValueError, match=r"x: an input of 3 features on axis -2 is expected, got \(4, 5, 3\)"): conv(torch.ones(4, 5, 3))


@pytest.mark.parametrize("make, error, match", [
    (lambda: MMoE(mlp(), heads(), 0), ValueError, "num_experts: a whole number of at least 1 is expected, got 0"),
    (lambda: MMoE(mlp(), heads(), 2.), TypeError, "num_experts: a whole number"),
    (lambda: MMoE("mlp", heads()), TypeError, "expert: a module is expected, got str"),
    (lambda: MMoE(nn.LazyLinear(3), heads()), ValueError, "a module with values"),
    (lambda: MMoE(mlp(), {}), ValueError, "heads: at least one task"),
    (lambda: MMoE(mlp(), heads(), gate=3), TypeError, "gate: a function of"),
    (lambda: MMoE(mlp(), heads(), gate=lambda n: None), TypeError, "gate: a function to a module is expected"),
    (lambda: MMoE(nn.Conv2d(1, 2, 3), heads()), ValueError, "gate: a function of the number of experts"),
    (lambda: MMoE(Fixed(), heads(), gate=lambda n: Gate(6, n)), ValueError, "redraw: a reset_parameters"),
    (lambda: MMoE(mlp(), heads(), redraw=1), TypeError, "redraw: True or False"),
    (lambda: CGC(mlp(), heads(), 0, 0), ValueError, "own . shared: an expert for 'a' at least"),
    (lambda: CGC(mlp(), heads(), -1, 1), ValueError, "own: a whole number of at least 0"),
    (lambda: CGC(mlp(), heads(), {"a": 1}, 1), ValueError, "own: a number for each"),
    (lambda: CGC(mlp(), heads(), 1, -1), ValueError, "shared: a whole number"),
    (lambda: PLE(mlp()[0], heads()), TypeError, "experts: a list of modules"),
    (lambda: PLE([], heads()), ValueError, "experts: a module for one level"),
    (lambda: PLE([expert(), expert(8, 8)], heads(), gate=[None]), ValueError, "gate: one for each of 2 levels is expected, got 1"),
    (lambda: Gate(0, 3), ValueError, "dim: a whole number"),
    (lambda: together([], torch.ones(1, 6)), TypeError, "modules: a list of modules"),
    (lambda: together([mlp(), 3], torch.ones(1, 6)), TypeError, "modules: a list of modules"),
    (lambda: together([mlp(), mlp()], [torch.ones(1, 6)], own=True), ValueError, "x: an input for each of 2 modules is expected, got 1"),
    (lambda: Level(expert(), ["a"], {"a": [0], "b": []}), ValueError, "hears..b..: numbers of some of 1 experts"),
    (lambda: Level(expert(), ["a"], {"a": [1]}), ValueError, "hears..a..: numbers of some"),
    (lambda: Gate(3, 0), ValueError, "n: a whole number"),
    (lambda: gate_means(Hard(mlp(), heads()), torch.ones(1, 6)), TypeError, "model: a Gated model"),
    (lambda: gate_means(MMoE(mlp(), heads()), torch.ones(1, 6), 1), ValueError, "level: a whole number from 0 to 0"),
    (lambda: MMoE(mlp(), heads())({"d": torch.ones(1, 6)}), ValueError, "x: one of"),
    (lambda: MMoE(mlp(), heads(), gate=lambda n: Gate(6, n + 1))(torch.ones(1, 6)), ValueError, "gate: weights"),
])
def test_bad_input(make, error, match):
    with pytest.raises(error, match=match): make()


def test_levels_can_be_put_together_by_hand():
    "A scheme of one's own: a ring, where each task hears its own expert and the next one's."
    ring = Gated(heads(), lambda tasks: [Level(expert(), tasks, {t: [i, (i + 1) % 3] for i, t in enumerate(tasks)})])
    x = torch.randn(3, 6)
    for task, y in by_loops(ring, x).items(): torch.testing.assert_close(ring(x)[task], y)
    assert (sharing(ring).filter(like="experts", axis=0)["shared"] > 0).all()
