"Balancing tasks: every method against whole vectors, its memory, missing tasks, accumulation, mixed precision, processes, bad input."
import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from processes import in_two_processes
from schemes import mlp
from sharetie.adaptive import AdaptiveHard
from sharetie.aggregation import aligned, cagrad, imtl, mgda, nash, pcgrad, upgrad
from sharetie.balancing import (DynamicAverage, Equal, FAMO, FromGram, GradNorm, GradVac, Prioritization, RULES,
                                RandomWeights, Uncertainty, WITH_TASKS, WITHOUT_TASKS, balancer, two_losses)
from sharetie.multitask import Single
from sharetie.results import set_seed
from sharetie.ties import load_model, save_model

TASKS = ["a", "b", "c"]


class Net(nn.Module):
    def __init__(self, tasks=TASKS):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))
        self.heads = nn.ModuleDict({t: nn.Linear(4, 1) for t in tasks})

    def forward(self, x):
        z = self.trunk(x)
        return z, {t: head(z) for t, head in self.heads.items()}


def setting(seed=0, n=6, dtype=torch.float64):
    generator = set_seed(seed)
    net = Net().to(dtype)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64).to(dtype)
    return net, x


def losses_of(net, x, tasks=TASKS):
    z, outputs = net(x)
    return z, {t: (outputs[t] - 2 * i - x[:, :1]).square().mean() + .1 for i, t in enumerate(TASKS) if t in tasks}


def every(name, **options): return balancer(name, TASKS, **options)


NAMES = [*WITHOUT_TASKS, *WITH_TASKS, *RULES]


@pytest.fixture(params=NAMES)
def name(request): return request.param


def flat(tensors): return torch.cat([t.flatten() for t in tensors])


def jacobian(losses, parameters):
    return torch.stack([flat(torch.autograd.grad(loss, parameters, retain_graph=True)) for loss in losses.values()])


# Every method

def test_every_parameter_gets_a_finite_gradient(name):
    net, x = setting()
    z, losses = losses_of(net, x)
    used = every(name).backward(losses, net.trunk)
    assert used.shape == (3,)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_shared_parameters_get_the_combination_and_heads_their_own(rule):
    net, x = setting()
    z, losses = losses_of(net, x)
    J, own = jacobian(losses, list(net.trunk.parameters())), {t: torch.autograd.grad(losses[t], list(net.heads[t].parameters()), retain_graph=True) for t in TASKS}
    a = FromGram(rule).backward(losses, net.trunk)
    torch.testing.assert_close(a, rule(J @ J.T), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(flat(p.grad for p in net.trunk.parameters()), J.T @ rule(J @ J.T), rtol=1e-6, atol=1e-9)
    for t in TASKS:
        for p, g in zip(net.heads[t].parameters(), own[t]): torch.testing.assert_close(p.grad, g)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_representation_form(rule):
    net, x = setting()
    z, losses = losses_of(net, x)
    dz = torch.stack([torch.autograd.grad(loss, z, retain_graph=True)[0].flatten() for loss in losses.values()])
    step = (dz.T @ rule(dz @ dz.T)).view_as(z)
    expected = torch.autograd.grad(z, list(net.trunk.parameters()), step, retain_graph=True)
    own = torch.autograd.grad(losses["b"], list(net.heads["b"].parameters()), retain_graph=True)
    FromGram(rule).backward(losses, net.trunk, representation=z)
    for p, g in zip(net.trunk.parameters(), expected): torch.testing.assert_close(p.grad, g, rtol=1e-6, atol=1e-9)
    for p, g in zip(net.heads["b"].parameters(), own): torch.testing.assert_close(p.grad, g)


@pytest.mark.parametrize("representation", [False, True])
def test_gradients_accumulate(name, representation):
    if name in ("random", "graddrop"): pytest.skip("draws anew at each call")
    net, x = setting()
    def add(method):
        z, losses = losses_of(net, x)
        method.backward(losses, net.trunk, representation=z if representation else None)
    add(every(name))
    once = [p.grad.clone() for p in net.parameters()]
    add(every(name))
    for p, g in zip(net.parameters(), once): torch.testing.assert_close(p.grad, 2 * g, rtol=1e-6, atol=1e-8)


def test_a_task_may_be_missing_from_a_batch(name):
    net, x = setting()
    z, losses = losses_of(net, x, ["a", "c"])
    assert every(name).backward(losses, net.trunk).shape == (2,)
    assert net.heads["b"].weight.grad is None and net.heads["c"].weight.grad is not None


def test_one_task_is_its_own_gradient_up_to_a_factor(name):
    net, x = setting()
    z, losses = losses_of(net, x, ["b"])
    (g,) = jacobian(losses, list(net.trunk.parameters()))
    every(name).backward(losses, net.trunk)
    d = flat(p.grad for p in net.trunk.parameters())
    assert torch.cosine_similarity(d, g, 0) > 1 - 1e-6


def test_no_graph_or_gradient_of_others_is_left(name):
    net, x = setting()
    bystander = nn.Parameter(torch.ones(3))
    z, losses = losses_of(net, x)
    every(name).backward(losses, net.trunk)
    assert bystander.grad is None and all(not p.grad.requires_grad for p in net.parameters())


def test_parts_of_the_trunk_that_a_task_does_not_use():
    net, x = setting()
    side = nn.Linear(5, 1).double()
    z, losses = losses_of(net, x)
    losses["a"] = losses["a"] + side(x).square().mean()
    shared = [*net.trunk.parameters(), *side.parameters()]
    J = torch.stack([flat(torch.zeros_like(p) if g is None else g for p, g in zip(shared, torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True))) for loss in losses.values()])
    FromGram(upgrad).backward(losses, shared)
    torch.testing.assert_close(flat(p.grad for p in shared), J.T @ upgrad(J @ J.T))


def test_large_parameters_are_multiplied_in_pieces(monkeypatch):
    import sharetie.balancing as balancing
    net, x = setting()
    z, losses = losses_of(net, x)
    whole = balancing._gram([[p.detach() for p in net.trunk.parameters()]] * 2)
    monkeypatch.setattr(balancing, "PIECE", 4)
    torch.testing.assert_close(balancing._gram([[p.detach() for p in net.trunk.parameters()]] * 2), whole)


def test_gradients_that_are_not_there_have_inner_products_of_zero():
    from sharetie.balancing import _gram
    assert torch.equal(_gram([[None, None]] * 2), torch.zeros(2, 2, dtype=torch.float64))
    assert torch.equal(_gram([[None], [torch.ones(3)]]), torch.tensor([[0., 0.], [0., 3.]], dtype=torch.float64))


# Memory

@pytest.mark.parametrize("name", WITH_TASKS)
def test_what_is_remembered_is_in_the_state(name):
    net, x = setting()
    method = every(name)
    for _ in range(3):
        z, losses = losses_of(net, x)
        method.backward(losses, net.trunk)
        if name == "famo": method.update(losses_of(net, x)[1])
        if name == "dynamic_average": method.period()
        if name == "prioritization": method.observe({"a": .5, "b": .7, "c": .9})
    if name == "uncertainty": method.log_variance.data.add_(.5)
    fresh = every(name)
    fresh.load_state_dict(method.state_dict())
    grads = []
    for m in (method, fresh):
        net.zero_grad()
        z, losses = losses_of(net, x)
        m.backward(losses, net.trunk)
        grads.append(flat(p.grad for p in net.trunk.parameters()))
    torch.testing.assert_close(*grads)


def step_of(method, name, net, x):
    "The shared gradient of one step, with all that a method wants to be told."
    net.zero_grad()
    method.backward(losses_of(net, x)[1], net.trunk)
    if name == "famo": method.update({t: loss.detach() * (i + 1) / 3 for i, (t, loss) in enumerate(losses_of(net, x)[1].items())})
    if name == "dynamic_average": method.period()
    if name == "prioritization": method.observe({"a": .5, "b": .7, "c": .9})
    return flat(p.grad for p in net.trunk.parameters())


@pytest.mark.parametrize("way", ["file", "assignment", "copy", "meta"])
@pytest.mark.parametrize("name", WITH_TASKS)
def test_a_method_goes_on_where_it_was(tmp_path, name, way):
    net, x = setting()
    method, fresh = every(name), every(name)
    for _ in range(3): step_of(method, name, net, x)
    if way == "file":
        save_model(nn.ModuleDict({"net": net, "method": method}), tmp_path / "both.safetensors")
        load_model(nn.ModuleDict({"net": Net().double(), "method": fresh}), tmp_path / "both.safetensors")
    elif way == "assignment": fresh.load_state_dict(copy.deepcopy(method.state_dict()), assign=True)
    elif way == "copy": fresh = copy.deepcopy(method)
    else: fresh.to_empty(device="cpu").load_state_dict(method.state_dict())
    for _ in range(3): torch.testing.assert_close(step_of(method, name, net, x), step_of(fresh, name, net, x), rtol=0, atol=0)


def test_gradnorm_moves_towards_equal_lengths():
    p = nn.Parameter(torch.tensor([1., 1.]))
    method = GradNorm(["a", "b"], alpha=0, lr=.05)
    for _ in range(400): a = method.backward({"a": 100 * p[0] + 1, "b": p[1] + 1}, [p])
    assert a[1] / a[0] == pytest.approx(100, rel=.1) and a.sum() == pytest.approx(2)


def test_gradvac_follows_what_it_meets():
    p = nn.Parameter(torch.ones(2))
    method = GradVac(["a", "b"], rate=.5)
    method.backward({"a": p[0], "b": p.sum()}, [p])
    torch.testing.assert_close(method.target, torch.tensor([[0, .5 ** 1.5], [.5 ** 1.5, 0]], dtype=torch.float64))


def test_random_weights_have_the_number_of_tasks_as_their_sum():
    net, x = setting()
    z, losses = losses_of(net, x)
    assert RandomWeights(set_seed(0)).backward(losses, net.trunk).sum() == pytest.approx(3)


def test_an_optimizer_that_holds_the_logits_does_not_move_them_again():
    p = nn.Parameter(torch.tensor([1., 1.]))
    found = []
    for held in (False, True):
        method = GradNorm(["a", "b"], alpha=0)
        optimizer = torch.optim.Adam([p, *method.parameters()] if held else [p], .1)
        for _ in range(3):
            method.backward({"a": 100 * p[0].square() + 1, "b": p[1].square() + 1}, [p])
            p.grad = None
            optimizer.step()
        found.append(method.logits.values.detach())
    assert torch.equal(*found)


def test_the_state_of_other_tasks_is_refused_whole(name):
    method, other = every(name), balancer(name, ["b", "a", "c"])
    before = copy.deepcopy(other.state_dict())
    if name == "uncertainty": method.log_variance.data.add_(1.)
    for model, state in ((other, method.state_dict()), (nn.ModuleList([other]), nn.ModuleList([method]).state_dict())):
        with pytest.raises(ValueError, match=r"state: that of \['b', 'a', 'c'\] is expected, got \['a', 'b', 'c'\]"): model.load_state_dict(state)
    if name == "uncertainty": assert torch.equal(other.log_variance, before["log_variance"])
    every(name).load_state_dict(method.state_dict())


def famo():
    p = nn.Parameter(torch.ones(3))
    method = FAMO(TASKS, on_nan="skip")
    return p, method, {t: p[i].square() + i + 1. for i, t in enumerate(TASKS)}


def test_famo_takes_losses_in_any_order_and_those_that_sat_out():
    found = []
    for names in (["a", "b"], ["b", "c", "a"]):
        p, method, losses = famo()
        method.backward(losses | {"c": losses["c"] * math.nan}, [p])
        after = {"a": losses["a"] / 2, "b": losses["b"], "c": losses["c"] * math.nan}
        method.update({t: after[t] for t in names})
        found.append(method.logits.values.detach())
    assert torch.equal(*found) and found[0][0] < 0 < found[0][1]


@pytest.mark.parametrize("losses, words, error", [
    (3, "losses: a dictionary", TypeError), ({"a": 1., "b": 1., "c": 1.}, r"losses\['a'\]: a floating point tensor", TypeError),
    ({"a": None}, r"losses\['a'\]: a floating point tensor", TypeError), ({"d": torch.ones(())}, "losses: one of 'a', 'b', 'c'", ValueError),
    ({"a": torch.ones(())}, r"losses: those of \['a', 'b', 'c'\]", ValueError), ({t: torch.tensor(math.inf) for t in TASKS}, "got none in", ValueError)])
def test_famo_refuses_other_losses_and_moves_nothing(losses, words, error):
    p, method, good = famo()
    method.backward(good, [p])
    with pytest.raises(error, match=words): method.update(losses)
    assert (method.logits.values == 0).all()
    method.update(good | {"b": good["b"] * math.nan, "a": good["a"] / 2})  # b is left out
    assert method.logits.values.isfinite().all() and method.logits.values[0] < 0
    p, method, good = famo()
    method.on_nan = "raise"
    method.backward(good, [p])
    with pytest.raises(ValueError, match=r"got nan in \['b'\]"): method.update(good | {"b": good["b"] * math.nan})
    assert (method.logits.values == 0).all()


# Gradients that depend on each other

def reference(J, rule):
    "The step of a rule in whole vectors of double precision."
    J = J.double()
    return J.T @ rule(J @ J.T)


@pytest.mark.parametrize("rule", [imtl, aligned, nash], ids=["imtl", "aligned", "nash"])
@pytest.mark.parametrize("seed", range(6))
def test_dependent_gradients_in_single_precision(rule, seed):
    generator = set_seed(seed)
    u, v = torch.randn(2, 300, generator=generator)
    rows = torch.stack([u, v, u + .5 * v])
    p = nn.Parameter(torch.ones(300))
    FromGram(rule).backward({t: row @ p for t, row in zip(TASKS, rows)}, [p])
    expected = reference(torch.stack([u.double(), v.double(), u.double() + .5 * v.double()]), rule)
    torch.testing.assert_close(p.grad.double(), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("seed", range(6))
def test_dependent_gradients_against_torchjd(seed):
    "Aligned-MTL alone: of IMTL-G it has another pseudo-inverse where gradients depend on each other."
    jd = pytest.importorskip("torchjd.aggregation")
    generator = set_seed(seed)
    u, v = torch.randn(2, 300, generator=generator)
    rows = torch.stack([u, v, u + .5 * v])
    p = nn.Parameter(torch.ones(300))
    FromGram(aligned).backward({t: row @ p for t, row in zip(TASKS, rows)}, [p])
    wanted = jd.AlignedMTL()(torch.stack([u.double(), v.double(), u.double() + .5 * v.double()]))
    torch.testing.assert_close(p.grad.double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_loss_and_the_sum_that_holds_it():
    net, x = setting(dtype=torch.float32)
    z, losses = losses_of(net, x, ["a", "b"])
    losses["total"] = losses["a"] + losses["b"]
    J = jacobian(losses, list(net.trunk.parameters())).double()
    J[2] = J[0] + J[1]
    balancer("imtl").backward(losses, net.trunk)
    torch.testing.assert_close(flat(p.grad for p in net.trunk.parameters()).double(), reference(J, imtl), rtol=1e-3, atol=1e-4)


# Models of several tasks

@pytest.mark.parametrize("tree, alone", [([["a", "c"], ["b"]], ["b"]), ([["a"], ["b"], ["c"]], TASKS)])
def test_tasks_that_share_nothing_get_their_own_gradient(name, tree, alone):
    set_seed(0)
    model = AdaptiveHard(mlp(), {t: nn.Linear(8, 1) for t in TASKS}, [tree] * 2).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    def losses(): return {t: (out - 2 * i).square().mean() for i, (t, out) in enumerate(model(x).items())}
    found = losses()
    own = {t: torch.autograd.grad(found[t], [p for part in model.parts(t) for p in part.parameters()], retain_graph=True) for t in alone}
    used = every(name).backward(found, model)
    for t in alone:
        assert used[TASKS.index(t)] == 1
        for p, g in zip((p for part in model.parts(t) for p in part.parameters()), own[t]): torch.testing.assert_close(p.grad, g)
    if alone == TASKS or name in ("random", "graddrop"): return
    together, shared = [p.grad.clone() for p in model.nodes[0]["a+c"].parameters()], model.shared_parameters()
    model.zero_grad()
    found = losses()
    every(name).backward({t: found[t] for t in "ac"}, shared)
    for p, g in zip(model.nodes[0]["a+c"].parameters(), together): torch.testing.assert_close(p.grad, g)


def test_a_model_without_anything_shared_and_a_loss_of_another(name):
    model, x = Single(mlp(), {t: nn.Linear(8, 1) for t in TASKS}), torch.randn(4, 6)
    losses = {t: out.square().mean() for t, out in model(x).items()}
    refused(every(name), losses | {"b": nn.Parameter(torch.ones(())) * 2}, model, r"losses\['b'\]: a loss that depends on shared", net=model)
    every(name).backward(losses, model)
    assert all(p.grad is not None for p in model.parameters())


# Compiled parts

def test_a_compiled_trunk_after_a_plain_backward_pass_is_a_clear_error():
    net, x = setting(dtype=torch.float32)
    trunk = torch.compile(net.trunk, backend="aot_eager")
    def losses():
        z = trunk(x)
        return z, {t: head(z).square().mean() for t, head in net.heads.items()}
    sum(losses()[1].values()).backward()
    net.zero_grad()
    refused(balancer("nash"), losses()[1], net.trunk, "losses: a graph that allows several backward passes .*donated_buffer = False", net=net)
    z, found = losses()
    balancer("nash").backward(found, net.trunk, representation=z)


# Mixed precision

@pytest.mark.parametrize("form", ["exact", "representation"])
@pytest.mark.parametrize("name", ["equal", "nash", "mgda", "gradnorm"])
def test_a_scaler_leaves_scaled_gradients_of_the_same_step(name, form):
    steps = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.)):
        net, x = setting(dtype=torch.float32)
        z, losses = losses_of(net, x)
        every(name).backward(losses, net.trunk, representation=z if form == "representation" else None, scaler=scaler)
        steps.append(flat(p.grad for p in net.parameters()) / (1 if scaler is None else 1024))
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-5)


def test_an_overflow_reaches_the_scaler():
    net, x = setting(dtype=torch.float32)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.)
    scaler = torch.amp.GradScaler("cpu", init_scale=2. ** 120)
    before = copy.deepcopy(net.state_dict())
    z, losses = losses_of(net, 1e4 * x)
    FromGram(nash).backward(losses, net.trunk, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2. ** 120
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


# Processes

def two_steps(name, form, extra):
    "The gradients after two steps on this process's half of the batch."
    net, x = setting(n=8)
    method = every(name, group=dist.group.WORLD)
    for _ in range(2):
        z, losses = losses_of(net, x.chunk(2)[dist.get_rank()])
        method.backward(losses, net.trunk, representation=z if form == "representation" else None, penalty=penalty_of(net, x, z) if extra else None)
    return flat(p.grad for p in net.parameters()).numpy()


@pytest.mark.long
@pytest.mark.parametrize("name, form, extra", [("nash", "exact", False), ("pcgrad", "representation", False), ("mgda", "exact", True), ("nash", "representation", True)])
def test_two_processes_take_the_step_of_one(tmp_path, name, form, extra):
    found = in_two_processes(two_steps, tmp_path, name, form, extra)
    net, x = setting(n=8)
    method = every(name)
    for _ in range(2):
        z, losses = losses_of(net, x)
        method.backward(losses, net.trunk, representation=z if form == "representation" else None, penalty=penalty_of(net, x, z) if extra else None)
    expected = flat(p.grad for p in net.parameters())
    for grads in found: torch.testing.assert_close(torch.from_numpy(grads), expected, rtol=1e-6, atol=1e-9)


# A penalty beside the losses

def penalty_of(net, x, z):
    "Of weights of both parts, of the batch's graph, and of a head that no loss of two tasks reaches."
    return lambda: 2 * z.square().mean() + net.trunk[0].weight.square().sum() + sum(head.weight.square().sum() for head in net.heads.values())


@pytest.mark.parametrize("form", ["exact", "representation"])
@pytest.mark.parametrize("scale", [None, 1024.])
def test_the_gradient_of_a_penalty_is_added_once(name, form, scale):
    found = []
    for added in (False, True):
        net, x = setting()
        for p in net.parameters(): p.grad = torch.ones_like(p)  # of a batch before
        z, losses = losses_of(net, x, ["a", "c"])
        penalty = penalty_of(net, x, z)
        own = torch.autograd.grad(penalty(), [*net.parameters()], retain_graph=True, allow_unused=True)
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        options = {"generator": set_seed(3)} if name in ("random", "graddrop") else {}
        torch.manual_seed(3)
        a = every(name, **options).backward(losses, net.trunk, z if form == "representation" else None, scaler, penalty if added else None)
        found.append((a, [p.grad for p in net.parameters()]))
    torch.testing.assert_close(found[0][0], found[1][0], equal_nan=True)  # weights are of the losses alone
    for without, g, p in zip(found[0][1], own, found[1][1]):
        torch.testing.assert_close(p, without if g is None else without + (scale or 1) * g, rtol=1e-6, atol=1e-9)


def test_a_penalty_that_shares_the_graph_comes_too_late_afterwards(name):
    net, x = setting()
    z, losses = losses_of(net, x)
    every(name).backward(losses, net.trunk, penalty=penalty_of(net, x, z))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"): penalty_of(net, x, z)().backward()


def test_a_penalty_without_a_gradient_adds_nothing():
    found = []
    for penalty in (None, lambda: torch.zeros(())):
        net, x = setting()
        FromGram(nash).backward(losses_of(net, x)[1], net.trunk, penalty=penalty)
        found.append(flat(p.grad for p in net.parameters()))
    assert torch.equal(*found)


def test_a_penalty_is_added_once_where_a_task_sits_out():
    found = []
    for tasks in (TASKS, ["a", "c"]):
        net, x = setting()
        z, losses = losses_of(net, x, tasks)
        if "b" in tasks: losses["b"] = losses["b"] + (0 * net.trunk[2].bias).abs().sqrt().sum()  # finite, with a gradient of NaN
        FromGram(nash, on_nan="skip").backward(losses, net.trunk, penalty=penalty_of(net, x, z))
        found.append(flat(p.grad for p in net.parameters() if p is not net.heads["b"].bias))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("penalty, words, error", [
    (3., "penalty: a function of nothing is expected, got 3.0", TypeError), (torch.ones(()), "penalty: a function of nothing", TypeError),
    (lambda x: x, r"penalty: a function of nothing is expected, got <lambda>\(x\)", TypeError), (lambda: 1., "penalty: a floating point tensor is expected, got 1.0", TypeError),
    (lambda: torch.ones(2), r"penalty: a function to a scalar is expected, got \(2,\)", ValueError), (lambda: torch.tensor(math.nan), "penalty: finite numbers are expected", ValueError)])
def test_a_penalty_is_a_function_to_a_finite_number(penalty, words, error):
    for name in ("equal", "nash"):
        net, x = setting()
        refused(every(name), losses_of(net, x)[1], net.trunk, words, error, net, penalty=penalty)


# Bad input: an error before any gradient is touched

def refused(method, losses, shared, words, error=ValueError, net=None, **options):
    with pytest.raises(error, match=words): method.backward(losses, shared, **options)
    if net is not None: assert all(p.grad is None for p in net.parameters())


def test_bad_losses(name):
    net, x = setting()
    z, losses = losses_of(net, x)
    method = every(name)
    refused(method, [*losses.values()], net.trunk, "losses: a dictionary", TypeError, net)
    refused(method, {}, net.trunk, "losses: at least one task", net=net)
    refused(method, losses | {"b": 1.}, net.trunk, r"losses\['b'\]: a floating point tensor", TypeError, net)
    refused(method, losses | {"b": net(x)[1]["b"]}, net.trunk, r"losses\['b'\]: a scalar is expected, got \(6, 1\)", net=net)
    refused(method, losses | {"b": torch.tensor(1.)}, net.trunk, r"losses\['b'\]: a loss with a gradient", net=net)
    refused(method, losses | {"b": losses["b"] * math.nan}, net.trunk, r"finite numbers are expected, got nan in \['b'\]", net=net)
    alone = nn.Parameter(torch.ones(()))
    refused(method, losses | {"b": alone * 2}, net.trunk, r"losses\['b'\]: a loss that depends on shared parameters", net=net)
    refused(method, losses, net.trunk, r"losses\['a'\]: a loss that depends on the representation", net=net, representation=torch.ones(1, requires_grad=True) * 2)
    refused(method, losses, [], "shared: at least one Parameter", net=net)
    refused(method, losses, net.trunk[0].weight, "shared: a module or a list", TypeError, net)


def test_a_task_with_nan_may_sit_out(name):
    method = every(name, on_nan="skip")
    net, x = setting()
    z, losses = losses_of(net, x)
    assert method.backward(losses | {"b": losses["b"] * math.nan}, net.trunk).shape == (2,)
    assert net.heads["b"].weight.grad is None
    refused(method, {"b": losses["b"] * math.nan}, net.trunk, r"got none in \['b'\]")


def test_unknown_tasks(name):
    net, x = setting()
    z, losses = losses_of(net, x)
    refused(balancer(name, ["a", "b"]), losses, net.trunk, "losses: one of 'a', 'b' is expected, got 'c'")
    with pytest.raises(ValueError, match="tasks: different names"): balancer(name, ["a", "a"])
    if name in WITH_TASKS:
        with pytest.raises(ValueError, match="tasks: different names"): balancer(name)
    with pytest.raises(TypeError, match="tasks: the names"): balancer(name, "abc")


GRADIENT = [n for n in NAMES if n in ("graddrop", "gradvac", "gradnorm", *RULES)]


@pytest.mark.parametrize("form", ["exact", "representation"])
@pytest.mark.parametrize("name", GRADIENT)
def test_a_finite_loss_with_a_gradient_of_nan(name, form):
    net, x = setting()
    def losses():
        z, found = losses_of(net, x)
        return z, found | {"b": found["b"] + (z.sum() * 0).abs().sqrt()}
    z, bad = losses()
    z = z if form == "representation" else None
    refused(every(name), bad, net.trunk, r"finite gradients are expected, got NaN or infinity in \['b'\]", net=net, representation=z)
    if name == "graddrop": return
    z, bad = losses()
    rep = z if form == "representation" else None
    assert every(name, on_nan="skip").backward(bad, net.trunk, representation=rep).shape == (2,)
    found = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    z, good = losses_of(net, x, ["a", "c"])
    rep = z if form == "representation" else None
    every(name).backward(good, net.trunk, representation=rep)
    for p, g in zip(net.parameters(), found):
        assert (p.grad is None) == (g is None) and (g is None or torch.equal(p.grad, g))


def test_all_gradients_of_nan():
    net, x = setting()
    z, losses = losses_of(net, x, ["a"])
    losses["a"] = losses["a"] + (z.sum() * 0).abs().sqrt()
    refused(balancer("nash", on_nan="skip"), losses, net.trunk, r"finite gradients .*\['a'\]", net=net)


def test_gradnorm_refuses_a_first_loss_of_zero():
    net, x = setting()
    z, losses = losses_of(net, x)
    method = GradNorm(TASKS)
    refused(method, losses | {"b": losses["b"] * 0}, net.trunk, r"losses\['b'\]: a first loss above 0 is expected, got 0.0", net=net)
    assert method.first.isnan().all() and (method.logits.values == 0).all()
    method.backward(losses_of(net, x)[1], net.trunk)
    method.backward(losses_of(net, x)[1] | {"b": 0 * losses_of(net, x)[1]["b"]}, net.trunk)
    assert method.logits.values.isfinite().all()


def test_options_reach_the_rule():
    gram = torch.tensor([[1., -.5, .2], [-.5, 2., -.8], [.2, -.8, 1.]])
    torch.testing.assert_close(balancer("cagrad", c=.2).coefficients(gram, {}), cagrad(gram, .2))
    torch.testing.assert_close(balancer("pcgrad", generator=set_seed(0)).coefficients(gram, {}), pcgrad(gram, set_seed(0)))
    with pytest.raises(ValueError, match="c: a finite number"): balancer("cagrad", c=-1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'd'"): balancer("nash", d=1)
    for name in ("pcgrad", "random", "graddrop"):
        with pytest.raises(TypeError, match="generator: a torch.Generator or None is expected, got 3"): balancer(name, generator=3)
    with pytest.raises(TypeError, match="generator"): GradVac(TASKS, generator=3)


@pytest.mark.parametrize("rule, error", [(lambda gram: [1., 1., 1.], TypeError), (lambda gram: torch.ones(2), ValueError),
                                         (lambda gram: torch.full((3,), math.nan), ValueError), (lambda gram: None, TypeError)])
def test_the_answer_of_a_rule_is_checked(rule, error):
    net, x = setting()
    refused(FromGram(rule), losses_of(net, x)[1], net.trunk, "what the rule gives", error, net)


@pytest.mark.parametrize("group", ["world", 3, object(), dist.GroupMember.NON_GROUP_MEMBER])
def test_what_is_no_group_is_refused_before_it_is_asked(group):
    for make in (lambda: FromGram(mgda, group=group), lambda: GradNorm(TASKS, group=group), lambda: balancer("graddrop", group=group)):
        with pytest.raises(TypeError, match="group: a process group or None is expected"): make()


def test_names_that_are_none(name):
    with pytest.raises(TypeError, match="tasks: the names of the tasks is expected"): balancer(name, [1, 2])
    for regression in ("ab", 3):
        with pytest.raises(TypeError, match="regression: a list of names is expected"): Uncertainty(["a", "ab"], regression)


def test_points_of_the_plane_have_two_numbers():
    for x in (torch.zeros(3), torch.zeros(()), torch.zeros(2, 1)):
        with pytest.raises(ValueError, match="x: points of two numbers is expected"): two_losses(x)


def test_a_representation_is_a_tensor(name):
    net, x = setting()
    z, losses = losses_of(net, x)
    refused(every(name), losses, net.trunk, "representation: a floating point tensor", TypeError, net, representation=(z,))


def test_sparse_gradients_are_named():
    net = nn.ModuleDict({"words": nn.Embedding(5, 3, sparse=True), "a": nn.Linear(3, 1), "b": nn.Linear(3, 1)})
    z = net["words"](torch.tensor([1, 2]))
    losses = {t: net[t](z).square().mean() for t in "ab"}
    refused(balancer("nash"), losses, net["words"], r"shared.weight: a Parameter with dense gradients", net=net)
    refused(balancer("nash"), losses, [net["words"].weight], r"shared, of shape \(5, 3\): a Parameter with dense", net=net)


def test_other_bad_input():
    net, x = setting()
    z, losses = losses_of(net, x)
    with pytest.raises(ValueError, match="did you mean 'pcgrad'"): balancer("pcgrd")
    with pytest.raises(ValueError, match="on_nan: one of"): Equal("ignore")
    with pytest.raises(TypeError, match="rule: a function"): FromGram("nash")
    with pytest.raises(ValueError, match="temperature"): DynamicAverage(TASKS, temperature=0)
    with pytest.raises(ValueError, match="alpha"): GradNorm(TASKS, alpha=-1)
    with pytest.raises(ValueError, match="regression: one of"): Uncertainty(TASKS, ["d"])
    with pytest.raises(ValueError, match=r"figures\['a'\]"): Prioritization(TASKS).observe({"a": 1.5})
    with pytest.raises(TypeError, match="figures: a dictionary"): Prioritization(TASKS).observe(3)
    refused(Equal(), losses, net.trunk, "scaler: a torch.amp.GradScaler", TypeError, net, scaler=3)
    for name in ("scale_invariant", "geometric"):
        refused(balancer(name), losses | {"b": -losses["b"]}, net.trunk, r"losses\['b'\]: a positive loss", net=net)
    refused(FAMO(TASKS, least=5.), losses, net.trunk, "a positive loss", net=net)
