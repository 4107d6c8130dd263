"Gates that choose and tasks that hear each other: against loops, identities, extremes, penalties, bad input."
import copy
import math
import pickle

import pytest
import torch
from torch import nn

from schemes import CHECKS, TASKS, TRUNKS, mlp, scalar
from sharetie.balancing import RULES, WITH_TASKS, WITHOUT_TASKS, balancer
from sharetie.gates import AdaTT, DSelectGate, DSelectK, Gate, MMoE, NativeLevel, gate_means, gate_weights, selection_penalty, smooth_step
from sharetie.multitask import Single, TaskLosses, sharing
from sharetie.results import set_seed
from sharetie.train import fit


def flat(trunk, width): return lambda n: nn.Sequential(nn.Flatten(), Gate(width, n))


def adatt(own, shared):
    def build(trunk, heads, axis):
        levels = [trunk[:len(trunk) // 2], trunk[len(trunk) // 2:]]
        gates = [flat(trunk, 16), flat(trunk, 64)] if isinstance(trunk[0], nn.Conv2d) else None
        return AdaTT(levels, heads, own, shared, gates, redraw=False)
    return build


def by_example(trunk, heads, axis):
    if isinstance(trunk[0], nn.Conv2d):  # a gate of one's own, in a common mixture
        return MMoE(trunk, heads, 5, lambda n: nn.Sequential(nn.Flatten(), DSelectGate(n, 2, 16)), redraw=False)
    return DSelectK(trunk, heads, 5, k=2, dim=6, entropy=.1, redraw=False)


MINE = {"dselect-k": lambda trunk, heads, axis: DSelectK(trunk, heads, 4, k=2, entropy=.1, redraw=False),
        "dselect-k, by example": by_example, "adatt-sp": adatt({"a": 1, "b": 2, "c": 1}, 0), "adatt": adatt(1, 2)}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", TRUNKS)
@pytest.mark.parametrize("name", MINE)
def test_schemes(name, kind, check, tmp_path): check(MINE[name], kind, tmp_path)


def expert(out=8, dim=6): return nn.Sequential(nn.Linear(dim, out), nn.Tanh())
def heads(tasks=TASKS): return {task: nn.Linear(8, 2) for task in tasks}


# The smooth step

@pytest.mark.parametrize("width", [.1, 1., 3.])
def test_smooth_step(width):
    "The cubic inside, exactly 0 and 1 outside, odd around the middle, without a corner."
    t = torch.linspace(-2 * width, 2 * width, 401, dtype=torch.float64, requires_grad=True)
    y = smooth_step(t, width)
    inside = t.abs() < width / 2
    cubic = -2 * t**3 / width**3 + 3 * t / (2 * width) + .5
    torch.testing.assert_close(y[inside], cubic[inside])
    assert (y[t <= -width / 2] == 0).all() and (y[t >= width / 2] == 1).all()
    slope, = torch.autograd.grad(y.sum(), t)
    torch.testing.assert_close(slope[inside], (1.5 / width - 6 * t**2 / width**3)[inside])
    assert (slope[~inside] == 0).all()


# Gates

def by_loops(gate, z, a):
    "Weights of one gate, by loops over selectors, experts and bits: z (k, m), a (k)."
    n, m = gate.n, z.shape[1]
    total = torch.zeros(n, dtype=z.dtype)
    for i, share in enumerate(a.softmax(0)):
        for e in range(n):
            weight = torch.ones((), dtype=z.dtype)
            for j in range(m):
                s = smooth_step(z[i, j], gate.width)
                weight = weight * (s if e >> (m - 1 - j) & 1 else 1 - s)
            total[e] = total[e] + share * weight
    return total


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 11])
def test_a_gate_is_its_loops(n):
    "Static and by example, with gradients; k up to the number of experts."
    set_seed(0)
    for k in {1, min(2, n), n}:
        gate = DSelectGate(n, k).double()
        nn.init.uniform_(gate.bits, -.6, .6)
        q = gate(None)
        torch.testing.assert_close(q, by_loops(gate, gate.bits, gate.share))
        assert gate.selectors.shape == (k, n) and (q >= 0).all()
        if n & n - 1 == 0: torch.testing.assert_close(q.sum(), torch.ones((), dtype=q.dtype))
        else: assert q.sum() <= 1 + 1e-12
        weights = [gate.bits, gate.share] if n > 1 else [gate.share]
        for a, b in zip(*(torch.autograd.grad(scalar(y), weights) for y in (q, by_loops(gate, gate.bits, gate.share)))): torch.testing.assert_close(a, b)
        if n == 1: continue
        each, x = DSelectGate(n, k, dim=3).double(), torch.randn(4, 3, dtype=torch.float64)
        nn.init.uniform_(each.bits.weight, -.3, .3)
        want = torch.stack([by_loops(each, each.bits(row).view(k, -1), each.share(row)) for row in x])
        torch.testing.assert_close(each(x), want)
        assert each(x.view(2, 2, 3)).shape == (2, 2, n)


def test_a_gate_passes_gradcheck():
    gate = DSelectGate(5, 2).double()
    nn.init.uniform_(gate.bits, -.4, .4)
    def f(bits, share): return torch.func.functional_call(gate, {"bits": bits, "share": share}, (None,))
    assert torch.autograd.gradcheck(f, (gate.bits, gate.share))


@pytest.mark.parametrize("n, k", [(8, 1), (8, 3), (6, 2)])
def test_arrived_gates_use_at_most_k(n, k):
    "Every code that a selector can arrive at; those of no expert have weight nowhere."
    for code in range(1 << (n - 1).bit_length()):
        gate = DSelectGate(n, k)
        with torch.no_grad(): gate.bits.copy_((torch.tensor([[code >> j & 1 for j in reversed(range(gate.bits.shape[1]))]]) * 2. - 1).expand(k, -1))
        q = gate(None)
        want = torch.eye(n)[code] if code < n else torch.zeros(n)
        torch.testing.assert_close(q, want)
    set_seed(0)
    gate = DSelectGate(8, k)
    with torch.no_grad(): gate.bits.copy_(torch.randn_like(gate.bits).sign())
    assert 1 <= (gate(None) > 0).sum() <= k and gate(None).sum().item() == pytest.approx(1, abs=1e-6)


def test_gates_start_undecided_and_copies_leave_the_batch_behind():
    gate = DSelectGate(16, 3, dim=6)
    q = gate(torch.randn(10, 6))
    assert (q > .03).all() and (q < .12).all()
    for other in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))): assert other.selectors is None
    assert set(gate.state_dict()) == {"bits.weight", "bits.bias", "share.weight", "share.bias"}
    assert gate.to(torch.float64)(torch.randn(2, 6, dtype=torch.float64)).dtype == torch.float64


# The penalty

def test_penalty_is_entropy_and_reach():
    "By loops, in double precision, for one table and for examples; finite, with its gradient, at the ends."
    set_seed(0)
    for n in (4, 5):
        r = torch.rand(7, 2, n, dtype=torch.float64) / n
        want = 0.
        for row in r:
            for one in row: want += sum(-.3 * p.item() * math.log(p.item()) for p in one) + (.5 / one.sum().item() if n == 5 else 0)
        assert selection_penalty(r, .3, .5).item() == pytest.approx(want / 7, rel=1e-4)
        assert selection_penalty(r[0], .3, .5).item() == pytest.approx(selection_penalty(r[:1], .3, .5).item())
    gate = DSelectGate(5, 2)
    with torch.no_grad(): gate.bits.copy_(torch.tensor([[1., 1, 1], [-1, -1, -1]]))  # the first is where no expert is
    gate(None)
    loss = selection_penalty(gate.selectors, 1.)
    loss.backward()
    assert loss.isfinite() and gate.bits.grad.isfinite().all()


def test_entropy_drives_selectors_to_one_expert_each():
    "Of the penalty alone; and what keeps selectors at numbers that have an expert does."
    for n in (8, 5):
        set_seed(0)
        gate = DSelectGate(n, 2)
        nn.init.uniform_(gate.bits, -.2, .2)
        optimizer = torch.optim.Adam(gate.parameters(), .02)
        for _ in range(150):
            optimizer.zero_grad()
            gate(None)
            selection_penalty(gate.selectors, 1.).backward()
            optimizer.step()
        q = gate(None)
        assert (q > 0).sum() <= 2 and q.sum().item() == pytest.approx(1, abs=1e-5)


def test_model_penalty_is_that_of_all_tasks():
    "Static gates need no batch; by-example gates take the last one, and every task's (not that of the last task alone)."
    set_seed(0)
    model, x = DSelectK(mlp(), heads(), 5, k=2, entropy=.2), torch.randn(6, 6)
    gates = model.levels[0].gates
    want = sum(selection_penalty(gate.selectors, .2) for gate in gates.values() if gate(None) is not None)
    torch.testing.assert_close(model.penalty(), want)
    each = DSelectK(mlp(), heads(), 5, k=2, dim=6, entropy=.2)
    with pytest.raises(RuntimeError, match="penalty: send a batch"): each.penalty()
    each({task: x + i for i, task in enumerate(TASKS)})
    want = 0
    for i, gate in enumerate(each.levels[0].gates.values()):
        alone = copy.deepcopy(gate)
        alone(x + i)
        want = want + selection_penalty(alone.selectors, .2)
    torch.testing.assert_close(each.penalty(), want)
    each.penalty().backward()
    assert all(gate.bits.weight.grad.any() for gate in each.levels[0].gates.values())
    with pytest.raises(RuntimeError): copy.deepcopy(each).penalty()


@pytest.mark.parametrize("name", [*WITHOUT_TASKS, *WITH_TASKS, *RULES])
def test_a_balancer_adds_the_penalty_of_gates_that_go_by_examples(name):
    set_seed(0)
    x, found = torch.randn(20, 6), []
    net = DSelectK(expert(), heads(), 5, k=2, dim=6, entropy=.1)
    for penalty in (None, net.penalty):
        net.zero_grad()
        torch.manual_seed(1)
        losses = {task: y.square().mean() for task, y in net(x).items()}
        own = torch.autograd.grad(net.penalty(), [*net.parameters()], retain_graph=True, allow_unused=True)
        balancer(name, TASKS).backward(losses, net, penalty=penalty)
        found.append([p.grad for p in net.parameters()])
    assert any(g is not None and g.any() for g in own)
    for without, g, p in zip(found[0], own, found[1]): torch.testing.assert_close(p, without if g is None else without + g)


@pytest.mark.long
def test_training_chooses():
    "With `fit`, whole, and within a step: k weights at most remain, and the answers are those of the chosen experts."
    set_seed(0)
    x = torch.randn(64, 6)
    y = {task: x[:, [i, i + 1]].sin() for i, task in enumerate(TASKS)}
    model = DSelectK(expert(), heads(), 8, k=2, entropy=.1)
    losses = TaskLosses(dict.fromkeys(TASKS, nn.functional.mse_loss))
    fit(model, (x, y), losses.total, penalty=model.penalty, optimizer=torch.optim.Adam(model.parameters(), .02), epochs=120, progress=False)
    table = gate_means(model, x)
    assert ((table > 0).sum(axis=1) <= 2).all() and table.sum(axis=1).tolist() == pytest.approx([1.] * 3, abs=1e-5)


# AdaTT

def by_hand(model, x):
    "AdaTT by loops: gates over all experts, and native experts once more."
    z = None
    for l, level in enumerate(model.levels):
        at = {owner: x if l == 0 else z[owner] for owner in [*level.owners, *level.hears]}
        outputs, new = [e(at[owner]) for e, owner in zip(level.experts, level.owners)], {}
        for u in level.hears:
            q = level.gates[u](at[u])
            new[u] = sum(q[:, [i]] * y for i, y in enumerate(outputs))
            own = [y for y, owner in zip(outputs, level.owners) if owner == u]
            v = level.native[u] if len(own) > 1 else torch.ones(1, dtype=x.dtype)
            new[u] = new[u] + sum(w * y for w, y in zip(v, own))
        z = new
    return {task: model.heads[task](z[task]) for task in model.tasks}


@pytest.mark.parametrize("own, shared", [(1, 0), (2, 0), ({"a": 1, "b": 3, "c": 2}, 0), (1, 1), (2, 3)])
def test_adatt_is_its_loops(own, shared):
    "Outputs and all gradients, in double precision; one example; none."
    set_seed(0)
    model = AdaTT([expert(5), expert(7, 5), expert(8, 7)], heads(), own, shared).double()
    x, weights = torch.randn(4, 6, dtype=torch.float64), list(model.parameters())
    got, want = model(x), by_hand(model, x)
    for task in TASKS: torch.testing.assert_close(got[task], want[task])
    for a, b in zip(*(torch.autograd.grad(sum(map(scalar, y.values())), weights) for y in (got, want))): torch.testing.assert_close(a, b)
    for task, y in model(x[:1]).items(): torch.testing.assert_close(y, want[task][:1])
    for task, y in model(x[:0]).items(): assert y.shape == (0, 2)


class Nothing(nn.Module):
    "A gate that hears nobody."
    def __init__(self, n):
        super().__init__()
        self.n = n

    def forward(self, x): return x.new_zeros(*x.shape[:-1], self.n)


def test_without_gates_tasks_are_towers_of_their_own():
    "One own expert: towers. Several: their sums by the native weights. Nothing is shared in what it computes."
    set_seed(0)
    model, x = AdaTT([expert(), expert(8, 8)], heads(), gate=Nothing), torch.randn(4, 6)
    single = Single(nn.Sequential(expert(), expert(8, 8)), dict(model.heads))
    for i, tower in enumerate(single.towers.values()):
        for stage, level in zip(tower, model.levels): stage.load_state_dict(level.experts[i].state_dict())
    for task, y in single(x).items(): torch.testing.assert_close(model(x)[task], y)
    several = AdaTT([expert()], heads(), own=3, gate=Nothing)
    level = several.levels[0]
    for k, task in enumerate(TASKS):
        z = sum(level.native[task][j] * level.experts[3 * k + j](x) for j in range(3))
        torch.testing.assert_close(several(x)[task], several.heads[task](z))
        grads = torch.autograd.grad(several(x)[task].sum(), [e[0].weight for e in level.experts], materialize_grads=True)
        assert [g.any().item() for g in grads] == [i // 3 == k for i in range(9)]


def test_native_weights():
    "They start within the root of one over their number, and one alone is no weight but 1."
    set_seed(0)
    model = AdaTT([expert(), expert(8, 8)], heads(), {"a": 1, "b": 4, "c": 2}, shared=2)
    assert [sorted(level.native) for level in model.levels] == [["b", "c", "shared"], ["b", "c"]]
    for level in model.levels:
        for v in level.native.values(): assert v.abs().max() <= len(v) ** -.5
    q = gate_weights(model, torch.randn(3, 6))[0]["a"]
    torch.testing.assert_close(q.sum(-1), torch.full((3,), 2.))
    assert sharing(model).loc["levels.0.native.shared", "shared"] == 2
    level = NativeLevel(expert(), ["a", "b", "b"], ["a", "b"])
    like = torch.zeros(3)
    assert level.own("a", like).tolist() == [1, 0, 0] and level.own("b", like)[0] == 0


@pytest.mark.parametrize("name", ["dselect-k, by example", "adatt"])
def test_autocast(name):
    set_seed(0)
    model, x = MINE[name](mlp(), heads(), 1), torch.randn(16, 6)
    with torch.autocast("cpu", torch.bfloat16): low = model(x)
    for task, y in model(x).items():
        assert low[task].dtype == torch.bfloat16
        torch.testing.assert_close(low[task].float(), y, atol=.05, rtol=.05)


@pytest.mark.parametrize("make, error, match", [
    (lambda: smooth_step(torch.ones(1), 0), ValueError, "width: a finite number above 0"),
    (lambda: smooth_step(torch.ones(1), "a"), TypeError, "width: a number is expected, got 'a'"),
    (lambda: smooth_step([1.]), TypeError, r"t: a floating point tensor is expected, got \[1.0\]"),
    (lambda: DSelectK(mlp(), heads(), dim=7)(torch.ones(4, 6)), ValueError, r"x: an input of 7 features on axis -1 is expected, got \(4, 6\)"),
    (lambda: DSelectGate(4, 2, 3)([1., 2., 3.]), TypeError, "x: a floating point tensor"),
    (lambda: DSelectGate(0), ValueError, "n: a whole number of at least 1"),
    (lambda: DSelectGate(4, 0), ValueError, "k: a whole number from 1 to 4 is expected, got 0"),
    (lambda: DSelectGate(4, 5), ValueError, "k: a whole number from 1 to 4 is expected, got 5"),
    (lambda: DSelectGate(4, 2, 0), ValueError, "dim: a whole number"),
    (lambda: DSelectGate(4, 2, width=0), ValueError, "width: a finite number"),
    (lambda: DSelectK(mlp(), heads(), 4, k=5), ValueError, "k: a whole number from 1 to 4 is expected, got 5"),
    (lambda: DSelectK(mlp(), heads(), entropy=-1), ValueError, "entropy: a finite number"),
    (lambda: DSelectK(mlp(), heads(), dim="6"), TypeError, "dim: a whole number"),
    (lambda: DSelectK(None, heads()), TypeError, "expert: a module is expected"),
    (lambda: AdaTT([expert()], heads(), 0, 2), ValueError, "own: an expert for 'a' at least"),
    (lambda: AdaTT(expert(), heads()), TypeError, "experts: a list of modules"),
    (lambda: AdaTT([expert()], heads(), shared=-1), ValueError, "shared: a whole number"),
    (lambda: AdaTT([expert()] * 2, heads(), gate=[None] * 3), ValueError, "gate: one for each of 2 levels is expected, got 3"),
    (lambda: selection_penalty(torch.ones(3)), ValueError, "selectors: a tensor of .*, k, n. is expected"),
    (lambda: selection_penalty(torch.ones(2, 3, dtype=torch.long)), TypeError, "selectors: a floating point tensor"),
    (lambda: selection_penalty(torch.ones(2, 3), -1.), ValueError, "entropy: a finite number"),
])
def test_bad_input(make, error, match):
    with pytest.raises(error, match=match): make()


def test_no_examples_have_no_penalty():
    for n in (4, 5): assert selection_penalty(torch.ones(0, 2, n), 1.).item() == 0


SCHEMES = {"dselect-k": lambda e, f: DSelectK(e, heads(), 4), "dselect-k, by example": lambda e, f: DSelectK(e, heads(), 4, dim=6),
           "adatt": lambda e, f: AdaTT([e, f], heads(), shared=1), "adatt without gates": lambda e, f: AdaTT([e, f], heads(), gate=Nothing)}


@pytest.mark.parametrize("name", SCHEMES)
def test_inputs_that_do_not_fit_say_so(name):
    model = SCHEMES[name](expert(), expert(8, 8))
    for bad in (torch.ones(4, 5), torch.ones(6, 4), torch.tensor(1.)):
        with pytest.raises(ValueError, match=r"x: an input of 6 features on axis -1 is expected, got"): model(bad)
    for bad in (torch.ones(4, 6, dtype=int), torch.ones(4, 6).bfloat16(), torch.ones(4, 6).tolist()):
        with pytest.raises(TypeError, match="x: (a floating point tensor|inputs of torch.float32, as the weights are,) is expected, got"): model(bad)
    if name.startswith("adatt"):
        with pytest.raises(ValueError, match=r"'a' of the level before: an input of 5 features on axis -1 is expected, got \(4, 8\)"):
            SCHEMES[name](expert(), expert(8, 5))(torch.ones(4, 6))


def test_one_conv_expert_needs_a_gate_that_fits():
    trunk = TRUNKS["conv"][0]()
    with pytest.raises(ValueError, match="gate: a function of the number of experts"): AdaTT([trunk], heads())
    static = DSelectK(trunk, {t: nn.Sequential(nn.Flatten(), nn.Linear(64, 2)) for t in TASKS}, 4)  # a static gate fits all
    assert static(torch.randn(2, 1, 4, 4))["a"].shape == (2, 2)


def test_a_gate_that_was_built_on_meta_knows_its_experts():
    source, gate, x = DSelectGate(5, 2, dim=4), DSelectGate(5, 2, dim=4, device="meta").to_empty(device="cpu"), torch.randn(3, 4)
    gate.load_state_dict(source.state_dict())
    assert torch.equal(gate(x), source(x)) and not [*source.buffers()]
