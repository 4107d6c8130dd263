"Sharing that adapts: agreement of gradients, trees, ties that follow, changes at a price; extremes and bad input."
import copy

import pytest
import torch
from torch import nn

from schemes import CHECKS, TASKS, TRUNKS, mlp, scalar, setting
from sharetie.adaptive import TAPS, AdaptiveHard, AdaptiveSoft, Agreement, branch_, draw_tree
from sharetie.multitask import Hard, Single, Soft, TaskLosses, sharing
from sharetie.results import set_seed
from sharetie.sparse import kept
from sharetie.ties import load_model, save_model
from sharetie.train import fit

APART = [["a"], ["b"], ["c"]]


def tree(stages, *rows): return [[TASKS]] * (stages - len(rows)) + [*rows]


def stages(trunk): return sum(any(True for _ in part.parameters()) for part in trunk)


MINE = {"hard, one trunk": lambda trunk, heads, axis: AdaptiveHard(trunk, heads),
        "hard, a tree": lambda trunk, heads, axis: AdaptiveHard(trunk, heads, tree(stages(trunk), [["a", "c"], ["b"]])),
        "hard, apart": lambda trunk, heads, axis: AdaptiveHard(trunk, heads, [APART] * stages(trunk)),
        "soft": lambda trunk, heads, axis: AdaptiveSoft(trunk, heads, strength=.1, redraw=True),
        "taps": lambda trunk, heads, axis: TAPS(trunk, heads),
        "taps, joint": lambda trunk, heads, axis: TAPS(trunk, heads, frozen=False, threshold=.1, start=.12)}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", TRUNKS)
@pytest.mark.parametrize("name", MINE)
def test_schemes(name, kind, check, tmp_path): check(MINE[name], kind, tmp_path)


def heads(tasks=TASKS): return {task: nn.Linear(8, 2) for task in tasks}
def losses(tasks=TASKS): return TaskLosses(dict.fromkeys(tasks, nn.functional.mse_loss))
def batch(n=10, tasks=TASKS): return torch.randn(n, 6), {task: torch.randn(n, 2) for task in tasks}


def measured(model, value, memory=.9):
    "An agreement that was set by hand: one number, or a function of place and two tasks."
    agreement, tasks = Agreement(model, losses(model.tasks), memory), model.tasks
    f = value if callable(value) else lambda place, a, b: value
    agreement.means = {p: torch.tensor([[float(f(p, a, b)) for b in tasks] for a in tasks]) for p in model.places()}
    return agreement


# Agreement

@pytest.mark.parametrize("make", [AdaptiveHard, AdaptiveSoft])
def test_agreement_is_the_cosine_of_gradients(make):
    "Against gradients one by one, and the running mean of two batches."
    set_seed(0)
    model = make(mlp(), heads())
    agreement, cosines = Agreement(model, losses(), memory=.75), []
    for _ in range(2):
        x, y = batch()
        total = agreement(model(x), y)
        torch.testing.assert_close(total, losses().total(model(x), y))
        total.backward()  # the graph is still there
        cosines.append({})
        for place, own in model.places().items():
            rows = [torch.cat([g.flatten() for g in torch.autograd.grad(losses().of(t)(model(x), y), own[t])]) for t in TASKS]
            cosines[-1][place] = torch.stack([torch.stack([torch.cosine_similarity(a, b, 0) for b in rows]) for a in rows])
    assert list(agreement.means) == list(model.places()) and len(agreement.means) == 2
    for place, mean in agreement.means.items():
        torch.testing.assert_close(mean, .75 * cosines[0][place] + .25 * cosines[1][place], atol=1e-5, rtol=1e-5)
    table = agreement.table()
    assert list(table.index) == list(agreement.means) and list(table.columns) == ["a – b", "a – c", "b – c"]
    assert table.loc[place, "a – c"] == mean[0, 2].item()


def test_agreement_of_equal_and_opposite_tasks():
    set_seed(0)
    head = nn.Linear(8, 2)
    model = AdaptiveHard(mlp(), {"a": head, "b": copy.deepcopy(head), "c": copy.deepcopy(head)})
    f = {"a": lambda o, y: o.sum(), "b": lambda o, y: 3 * o.sum(), "c": lambda o, y: -o.sum()}
    agreement = Agreement(model, TaskLosses(f))
    agreement(*(lambda x, y: (model(x), y))(*batch()))
    for mean in agreement.means.values(): torch.testing.assert_close(mean, torch.tensor([[1., 1, -1], [1, 1, -1], [-1, -1, 1]]))


def test_agreement_waits_for_both_labels():
    "A pair is measured where both tasks have a loss; without gradients nothing is; zero gradients are no direction."
    set_seed(0)
    model = AdaptiveHard(mlp(), heads())
    agreement = Agreement(model, losses())
    x, y = batch()
    with torch.no_grad(): agreement(model(x), y)
    assert agreement.means == {}
    agreement(model(x), y | {"c": torch.full((10, 2), float("nan"))})
    for mean in agreement.means.values():
        assert mean[:2, :2].isfinite().all() and mean[2].isnan().all() and mean[:, 2].isnan().all()
    first = {place: mean.clone() for place, mean in agreement.means.items()}
    agreement(model(x), {t: y[t] for t in "bc"})
    for place, mean in agreement.means.items():
        assert mean[1, 2].isfinite() and mean[0, 2].isnan() and mean[0, 1] == first[place][0, 1]
    zero = Agreement(model, TaskLosses({"a": lambda o, y: 0 * o.sum(), "b": lambda o, y: o.sum()}))
    zero(model(x), {t: y[t] for t in "ab"})
    assert all(mean[0, 1].isnan() for mean in zero.means.values())


def test_frozen_weights_are_no_place():
    model = AdaptiveHard(mlp(), heads())
    model.nodes[0].requires_grad_(False)
    agreement = Agreement(model, losses())
    x, y = batch()
    agreement(model(x), y).backward()
    assert list(agreement.means) == ["1.a+b+c"]


# Adaptive hard sharing

@pytest.mark.parametrize("kind", TRUNKS)
def test_one_trunk_is_hard_and_apart_is_single(kind):
    "Outputs, gradients and counts."
    set_seed(0)
    trunk, shape, head, axis = TRUNKS[kind]
    base, tops = trunk().double(), {task: head().double() for task in TASKS}
    x, n = torch.rand(4, *shape, dtype=torch.float64), stages(base)
    for other, own in ((Hard, None), (Single, [APART] * n)):
        a, b = other(copy.deepcopy(base), copy.deepcopy(tops)), AdaptiveHard(copy.deepcopy(base), copy.deepcopy(tops), own)
        for task in TASKS: assert torch.equal(a(x)[task], b(x)[task])
        for model in (a, b): sum(map(scalar, model(x).values())).backward()
        grads = [sorted(p.grad.double().norm().item() for p in m.parameters()) for m in (a, b)]
        assert grads[0] == pytest.approx(grads[1])
        assert (sharing(a).stored, sharing(a).shared) == (sharing(b).stored, sharing(b).shared)
        assert kept(a) == kept(b)


def test_thresholds_at_their_ends():
    "Never at a threshold above 1, always at 0, whatever was measured."
    for value in (-1., 0., 1.):
        model = AdaptiveHard(mlp(), heads())
        assert branch_(model, measured(model, value), 1.001) == [[TASKS]] * 2
        assert branch_(model, measured(model, value), 0) == [APART] * 2
        assert model.places() == {}
        assert branch_(model, Agreement(model, losses()), 0) == [APART] * 2  # nothing left to measure


def test_where_conflict_is_there_is_a_branch():
    "The second stage parts b; parting the first parts all above; the copies start alike and then go their ways."
    set_seed(0)
    model = AdaptiveHard(mlp(), heads())
    x, y = batch()
    before = model(x)
    second = measured(model, lambda place, a, b: -1 if place[0] == "1" and "b" in (a, b) and a != b else .5)
    nodes = [model.nodes[0]["a+b+c"], model.nodes[1]["a+b+c"]]
    assert branch_(model, second, .6) == [[TASKS], [["a", "c"], ["b"]]] == model.tree
    assert model.nodes[0]["a+b+c"] is nodes[0] and model.nodes[1]["a+c"] is nodes[1] and model.nodes[1]["b"] is not nodes[1]
    for task in TASKS: assert torch.equal(model(x)[task], before[task])
    model(x)["b"].sum().backward()
    assert nodes[1][0].weight.grad is None and nodes[0][0].weight.grad.any() and model.nodes[1]["b"][0].weight.grad.any()
    first = measured(model, lambda place, a, b: -1 if place[0] == "0" and "a" in (a, b) and a != b else .5)
    assert branch_(model, first, .6) == [[["a"], ["b", "c"]], [["a"], ["c"], ["b"]]]
    for task in TASKS: assert torch.equal(model(x)[task], before[task])


def test_a_chain_of_pairs_keeps_tasks_together():
    model = AdaptiveHard(mlp(), heads())
    chain = measured(model, lambda place, a, b: -1 if {a, b} == {"a", "c"} else 1)
    assert branch_(model, chain, .5) == [[TASKS]] * 2


@pytest.mark.parametrize("make", [lambda ps: torch.optim.SGD(ps, .1, momentum=.9), lambda ps: torch.optim.Adam(ps, .01)])
def test_the_optimizer_goes_on(make):
    "A branched model whose tasks all see the same gradients steps as the copies of an unbranched one would."
    set_seed(0)
    model = AdaptiveHard(mlp(), heads())
    x, y = batch()
    optimizer = make([{"params": model.nodes.parameters()}, {"params": model.heads.parameters(), "lr": .001}])
    agreement = Agreement(model, losses())
    agreement(model(x), y).backward()
    optimizer.step()
    old = model.nodes[1]["a+b+c"][0].weight
    state = {k: v.clone() for k, v in optimizer.state[old].items() if isinstance(v, torch.Tensor)}
    branch_(model, agreement, 0, optimizer)
    inside = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert all(id(p) in inside for p in model.parameters())
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    for node in model.nodes[1].values():
        assert inside[id(node[0].weight)] is optimizer.param_groups[0]
        for key, value in state.items(): assert torch.equal(optimizer.state[node[0].weight][key], value)
    a, b = model.nodes[1]["a"][0].weight, model.nodes[1]["b"][0].weight
    for key, value in optimizer.state[a].items(): assert not isinstance(value, torch.Tensor) or value is not optimizer.state[b][key]
    optimizer.zero_grad()
    for p in model.parameters(): p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(a, b) and not torch.equal(a, torch.zeros_like(a))
    load = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(v, load[k]) for k, v in model.state_dict().items())


def test_a_branched_model_comes_back(tmp_path):
    "From a file, into a model made with its tree; into another tree it is refused."
    model = AdaptiveHard(mlp(), heads())
    branch_(model, measured(model, lambda place, a, b: -1 if "b" in (a, b) and a != b else 1), .5)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p))
    save_model(model, tmp_path / "m.safetensors")
    fresh, x = AdaptiveHard(mlp(), heads(), tree=model.tree), batch()[0]
    load_model(fresh, tmp_path / "m.safetensors")
    for task in TASKS: assert torch.equal(model(x)[task], fresh(x)[task])
    with pytest.raises(RuntimeError, match="a\\+b\\+c"): AdaptiveHard(mlp(), heads()).load_state_dict(model.state_dict())


def test_each_node_runs_once():
    "Tasks of one group share the forward pass, not only the weights."
    model, calls = AdaptiveHard(mlp(), heads(), tree(2, [["a", "c"], ["b"]])), []
    for stage in model.nodes:
        for node in stage.values(): node.register_forward_hook(lambda *a: calls.append(1))
    model(torch.rand(2, 6))
    assert len(calls) == 3
    model({"b": torch.rand(2, 6)})
    assert len(calls) == 5


def test_tree_drawn():
    ax = draw_tree(AdaptiveHard(mlp(), heads(), tree(2, [["a", "c"], ["b"]])))
    assert [t.get_text() for t in ax.get_yticklabels()] == ["input", "stage 0", "stage 1", "head"]
    at = dict(zip(TASKS, ax.get_xticks()))
    assert abs(at["a"] - at["c"]) == 1  # those that share stand side by side


# Adaptive soft sharing

@pytest.mark.parametrize("distance", ["squared_l2", "l1"])
def test_full_agreement_is_soft_and_conflict_is_single(distance):
    set_seed(0)
    base, tops = mlp(), heads()
    a, b = Soft(base, tops, strength=.3, distance=distance, redraw=True), AdaptiveSoft(base, tops, strength=.3, distance=distance)
    b.load_state_dict(a.state_dict(), strict=False)
    torch.testing.assert_close(a.penalty(), b.penalty())
    b.follow_(measured(b, 1.))
    torch.testing.assert_close(a.penalty(), b.penalty())
    for model in (a, b): model.penalty().backward()
    for p, q in zip(a.towers.parameters(), b.towers.parameters()): torch.testing.assert_close(p.grad, q.grad)
    for value in (0., -.7):
        b.follow_(measured(b, value))
        assert b.penalty() == 0


def test_strengths_by_layer_and_pair():
    "One tie at a time against the distance by hand, in the penalty and in the table of ties."
    set_seed(0)
    model = AdaptiveSoft(mlp(), heads(), strength=2., redraw=True)
    for l, layer in enumerate(model.layers):
        for k, (s, t) in enumerate(model.pairs):
            model.follow_(measured(model, lambda place, a, b: .25 * (place == layer and {a, b} == {s, t})))
            expected = torch.zeros(2, 3, dtype=torch.float64)
            expected[l, k] = .5
            assert torch.equal(model.held.strengths, expected)
            pairs = zip(model.towers[s].get_submodule(layer).parameters(), model.towers[t].get_submodule(layer).parameters())
            torch.testing.assert_close(model.penalty(), .5 * sum((p - q).square().sum() for p, q in pairs))
            assert {λ for g, λ in model.penalty.strength.items() if g.startswith(f"{layer}.") and g.endswith(f"{s}–{t}")} == {.5}
            assert sum(λ > 0 for λ in model.penalty.strength.values()) == 2


def test_what_was_not_measured_stays():
    model = AdaptiveSoft(mlp(), heads(), strength=1.)
    agreement = measured(model, lambda place, a, b: float("nan") if "c" in (a, b) else .5)
    del agreement.means["2"]
    assert model.follow_(agreement).tolist() == [[.5, 1, 1], [1, 1, 1]]


def test_strengths_survive(tmp_path):
    "In files, copies and state dicts, where the penalty uses them at once."
    set_seed(0)
    model = AdaptiveSoft(mlp(), heads(), strength=1., redraw=True)
    model.follow_(measured(model, lambda place, a, b: .5 if a == b or "a" in (a, b) else .1))
    save_model(model, tmp_path / "m.safetensors")
    for way in ("file", "state dict", "copy"):
        other = copy.deepcopy(model) if way == "copy" else AdaptiveSoft(mlp(), heads(), strength=1.)
        if way == "file": load_model(other, tmp_path / "m.safetensors")
        if way == "state dict": other.load_state_dict(model.state_dict())
        torch.testing.assert_close(other.penalty(), model.penalty())
        assert other.penalty() > 0
        with torch.no_grad(): other.held.strengths.zero_()
        assert other.penalty() == 0 and model.penalty() > 0


def test_ties_follow_in_training():
    "Two equal tasks stay tied, and the one with opposite labels comes loose."
    set_seed(0)
    model = AdaptiveSoft(mlp(), heads(), strength=.01)
    with torch.no_grad():
        for task in "bc":
            for p, q in zip(model.heads[task].parameters(), model.heads["a"].parameters()): p.copy_(q)
    x = torch.randn(20, 6)
    y = 3 * torch.randn(20, 2)
    agreement = Agreement(model, losses())
    fit(model, (x, {"a": y, "b": y, "c": -y}), agreement, penalty=model.penalty, epochs=5,
        after_step=lambda step: model.follow_(agreement), progress=False)
    ab, ac, bc = model.held.strengths.T.tolist()
    assert min(ab) > .0099 and max(ac + bc) < .005


# TAPS

def filled(model, score, seed=0):
    "Changes that are not zero, and one score for all."
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for own in model.changes.values():
            for p in own.values(): p.copy_(.1 * torch.randn(p.shape, generator=draw))
        model.scores.fill_(score)
    return model


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("kind", TRUNKS)
def test_all_off_is_hard(kind, frozen):
    set_seed(0)
    trunk, shape, head, axis = TRUNKS[kind]
    base, tops = trunk().double(), {task: head().double() for task in TASKS}
    a, b = Hard(copy.deepcopy(base), copy.deepcopy(tops)), filled(TAPS(base, tops, frozen=frozen), .0999)
    x = torch.rand(4, *shape, dtype=torch.float64)
    for task in TASKS: assert torch.equal(a(x)[task], b(x)[task])
    for model in (a, b): sum(map(scalar, model(x).values())).backward()
    for (n, p), q in zip(a.trunk.named_parameters(), b.trunk.parameters()):
        assert q.requires_grad != frozen
        if frozen: assert q.grad is None
        else: torch.testing.assert_close(p.grad, q.grad)
    assert all(base_p.requires_grad for base_p in base.parameters())  # the caller's trunk is as it was
    assert kept(b) == kept(a) + b.scores.numel()


@pytest.mark.parametrize("kind", TRUNKS)
def test_all_on_is_single(kind):
    "Outputs of towers that have the changes added, and the gradients that these get."
    set_seed(0)
    trunk, shape, head, axis = TRUNKS[kind]
    base, tops = trunk().double(), {task: head().double() for task in TASKS}
    b, a = filled(TAPS(base, tops), .1), Single(base, copy.deepcopy(tops))
    with torch.no_grad():
        for task in TASKS:
            for p, d in zip(a.towers[task].parameters(), b.changes[task].values()): p.add_(d)
    x = torch.rand(4, *shape, dtype=torch.float64)
    for task in TASKS: torch.testing.assert_close(a(x)[task], b(x)[task])
    for model in (a, b): sum(map(scalar, model(x).values())).backward()
    for task in TASKS:
        for p, d in zip(a.towers[task].parameters(), b.changes[task].values()): torch.testing.assert_close(p.grad, d.grad)


@pytest.mark.parametrize("score", [.05, .3])
def test_scores_have_a_straight_through_gradient(score):
    "The inner product of the change with the gradient for the weights used; above and below the threshold alike."
    set_seed(0)
    model = filled(TAPS(mlp(), heads(), frozen=False), score).double()
    x = torch.rand(4, 6, dtype=torch.float64)
    scalar(model(x)["b"]).backward()
    own = copy.deepcopy(model.trunk)
    own.requires_grad_(True)
    with torch.no_grad():
        for p, w in zip(own.parameters(), model.weights_of("b").values()): p.copy_(w)
    grads = dict(zip([n for n, _ in own.named_parameters()], torch.autograd.grad(scalar(model.heads["b"](own(x))), list(own.parameters()))))
    for l, layer in enumerate(model.layers):
        expected = sum((grads[n] * model.changes["b"][n.replace(".", "/")]).sum() for n in grads if n.rpartition(".")[0] == layer)
        torch.testing.assert_close(model.scores.grad[1, l], expected)
    assert model.scores.grad[0].eq(0).all() and model.scores.grad[2].eq(0).all()
    for d in model.changes["b"].values(): assert bool(d.grad.any()) == (score > .1)


def test_the_price_of_changes():
    "Its value, its gradient, and that it takes layers back to the trunk."
    model = TAPS(mlp(), heads(), price=.6)
    torch.testing.assert_close(model.penalty(), torch.tensor(.6 * 3 * .15))
    model.penalty().backward()
    torch.testing.assert_close(model.scores.grad, torch.full((3, 2), .3))
    assert TAPS(mlp(), heads(), price=0).penalty() == 0
    x, y = batch()
    assert model.on().all().all() and list(model.on().columns) == TASKS and list(model.on().index) == ["0", "2"]
    fit(model, (x, y), losses().total, penalty=lambda: 1e3 * model.penalty(), epochs=60, progress=False)
    assert not model.on().any().any()


def test_frozen_trunk_stays_and_running_means_are_own():
    set_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
    model = TAPS(base, heads())
    before = copy.deepcopy(model.trunk.state_dict())
    x, y = batch(30)
    fit(model, (x, y), losses().total, penalty=model.penalty, epochs=5, progress=False)
    for k, v in model.trunk.state_dict().items(): assert torch.equal(v, before[k])
    assert model.layers == ["0", "1"] and model.changes["a"]["1/weight"].any()
    means = [getattr(model.running[task], "1/running_mean") for task in TASKS]
    assert all(m.any() for m in means) and not torch.equal(means[0], means[1])


def test_autocast_and_meta():
    for model in (TAPS(mlp(), heads()), AdaptiveHard(mlp(), heads()), AdaptiveSoft(mlp(), heads())):
        x = torch.rand(3, 6)
        with torch.autocast("cpu", torch.bfloat16): y = model(x)["a"]
        torch.testing.assert_close(y.float(), model(x)["a"], rtol=.05, atol=.05)
        assert copy.deepcopy(model).to("meta")(x.to("meta"))["b"].shape == (3, 2)


# Bad input

def test_bad_trees_and_branches():
    for bad, error, match in [
            ("ab", TypeError, "tree: a list of groups"), ([[TASKS]], ValueError, "groups for each of 2 stages"),
            ([[TASKS], [["a", "b"]]], ValueError, r"tree\[1\]: each of"), ([[TASKS], [["a", "b"], ["b", "c"]]], ValueError, r"tree\[1\]"),
            ([[TASKS], [["a", "b", "d"], ["c"]]], ValueError, r"tree\[1\]"), ([APART, [TASKS]], ValueError, "groups within those of the stage before"),
            ([[TASKS], [TASKS, []]], ValueError, r"tree\[1\]"), ([[TASKS], [["a", "b", 3]]], ValueError, r"tree\[1\]"),
            ([[TASKS], TASKS], TypeError, r"tree\[1\]: a list of lists of tasks"), ([1, 2], TypeError, r"tree\[0\]")]:
        with pytest.raises(error, match=match): AdaptiveHard(mlp(), heads(), bad)
    parted = AdaptiveHard(mlp(), heads(), tree(2, [["a", "c"], ["b"]]))
    with pytest.raises(ValueError, match=r"tree\[1\]: groups within \[\['a', 'c'\], \['b'\]\]"): parted.grow_(tree(2))
    with pytest.raises(TypeError, match="optimizer"): branch_(parted, measured(parted, 0.), 0, "adam")
    assert parted.tree == tree(2, [["a", "c"], ["b"]])
    with pytest.raises(TypeError, match="model: an AdaptiveHard"): branch_(Hard(mlp(), heads()), measured(parted, 0.), .5)
    with pytest.raises(ValueError, match="without '\\+'"): AdaptiveHard(mlp(), heads(["a+b"]))
    tied = mlp()
    tied[2].bias = tied[0].bias
    with pytest.raises(ValueError, match=r"trunk: no Parameter in two stages .*\['0.bias', '2.bias'\]"): AdaptiveHard(tied, heads())
    with pytest.raises(TypeError, match="trunk: an nn.Sequential"): AdaptiveHard(nn.Linear(6, 8), heads())
    model, other = AdaptiveHard(mlp(), heads()), AdaptiveHard(mlp(), heads())
    for value, error in ((-1, ValueError), (float("nan"), ValueError), ("all", TypeError)):
        with pytest.raises(error, match="threshold"): branch_(model, measured(model, 0.), value)
    with pytest.raises(TypeError, match="agreement: an Agreement"): branch_(model, {}, .5)
    with pytest.raises(ValueError, match="that of another"): branch_(model, measured(other, 0.), .5)
    with pytest.raises(ValueError, match=r"gradients of all of \['a', 'b', 'c'\] at '0.a\+b\+c'"): branch_(model, Agreement(model, losses()), .5)
    half = measured(model, lambda place, a, b: float("nan") if place[0] == "1" and "c" in (a, b) else 0.)
    with pytest.raises(ValueError, match="at '1.a"): branch_(model, half, 0)
    assert model.tree == [[TASKS]] * 2
    with pytest.raises(TypeError, match="an AdaptiveHard model"): draw_tree(Hard(mlp(), heads()))


def test_bad_agreement_soft_and_taps():
    model = AdaptiveSoft(mlp(), heads())
    for bad in (mlp(), Hard(mlp(), heads()), None):
        with pytest.raises(TypeError, match="model: a Multitask model with places"): Agreement(bad, losses())
    with pytest.raises(TypeError, match="losses"): Agreement(model, nn.functional.mse_loss)
    with pytest.raises(ValueError, match="memory"): Agreement(model, losses(), 1.5)
    with pytest.raises(TypeError, match="agreement"): model.follow_(None)
    with pytest.raises(ValueError, match="that of another"): model.follow_(measured(AdaptiveSoft(mlp(), heads()), 1.))
    with pytest.raises(ValueError, match="two tasks at least"): AdaptiveSoft(mlp(), heads(["a"]))
    for bad, error in ((-1, ValueError), (float("inf"), ValueError), ("1", TypeError)):
        with pytest.raises(error, match="strength"): AdaptiveSoft(mlp(), heads(), bad)
        with pytest.raises(error, match="price"): TAPS(mlp(), heads(), price=bad)
    for name in ("threshold", "start"):
        with pytest.raises(ValueError, match=name): TAPS(mlp(), heads(), **{name: float("nan")})
    with pytest.raises(TypeError, match="frozen"): TAPS(mlp(), heads(), frozen=1)
    with pytest.raises(ValueError, match="trunk: a module with weights"): TAPS(nn.Tanh(), heads())
    with pytest.raises(TypeError, match="trunk: a module"): TAPS(None, heads())
