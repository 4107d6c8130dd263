"Subnetworks of one network: masks that hold, what overlaps, the search, tasks in turn, bad input."
import copy

import pandas as pd
import pytest
import torch
from torch import nn

from schemes import CHECKS, TASKS, TRUNKS, Recurrent, mlp, scalar, setting
from sharetie.multitask import Hard, Single, Soft, TaskLosses, sharing
from sharetie.results import set_seed
from sharetie.sparse import InTurn, SparseSharing, Subnetworks, draw_overlap, kept, overlap, pruned, subnetworks
from sharetie.ties import load_model, save_model
from sharetie.train import fit


def random_masks(trunk, seed=0, density=.7, every=False):
    "Masks by task, of the matrices or of every parameter, that leave no unit without a way in and out."
    draw = torch.Generator().manual_seed(seed)
    masks = {}
    for task in TASKS:
        masks[task] = {n: torch.rand(p.shape, generator=draw) < density for n, p in trunk.named_parameters() if every or p.ndim > 1}
        for name, m in masks[task].items():
            if m.ndim > 1: m.view(len(m), -1).fill_diagonal_(True, wrap=True)
    return masks


MINE = {"sparse": lambda trunk, heads, axis: SparseSharing(trunk, heads, random_masks(trunk)),
        "sparse, whole": lambda trunk, heads, axis: SparseSharing(trunk, heads),
        "sparse, one task pruned": lambda trunk, heads, axis: SparseSharing(trunk, heads, {"b": random_masks(trunk)["b"]})}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", TRUNKS)
@pytest.mark.parametrize("name", MINE)
def test_schemes(name, kind, check, tmp_path): check(MINE[name], kind, tmp_path)


def heads(): return {task: nn.Linear(8, 2) for task in TASKS}


def thirds(trunk):
    "Masks of all parameters that have nothing in common, in random places."
    draw = torch.Generator().manual_seed(3)
    places = {n: torch.randint(3, p.shape, generator=draw) for n, p in trunk.named_parameters()}
    return {task: {n: t == k for n, t in places.items()} for k, task in enumerate(TASKS)}


@pytest.mark.parametrize("kind", TRUNKS)
def test_nothing_masked_is_hard_sharing(kind):
    "Outputs, gradients and counts."
    set_seed(0)
    trunk, shape, head, axis = TRUNKS[kind]
    base, tops = trunk().double(), {task: head().double() for task in TASKS}
    a, b = Hard(base, tops), SparseSharing(copy.deepcopy(base), copy.deepcopy(tops))
    x = torch.rand(4, *shape, dtype=torch.float64)
    for task in TASKS: torch.testing.assert_close(a(x)[task], b(x)[task], rtol=0, atol=0)
    for model in (a, b): sum(map(scalar, model(x).values())).backward()
    for (n, p), (m, q) in zip(a.named_parameters(), b.named_parameters()):
        assert n == m
        torch.testing.assert_close(p.grad, q.grad)
    assert sharing(a).equals(sharing(b)) and kept(b) == sharing(a).stored
    assert (overlap(b) == 1).all().all()


def test_disjoint_masks_share_nothing():
    "No entry, no gradient, and training one task leaves the others' outputs as they are."
    base = mlp()
    model = SparseSharing(base, heads(), thirds(base))
    assert sharing(model).shared == 0 and model.shared_parameters() == []
    assert overlap(model).values.tolist() == torch.eye(3).tolist()
    assert kept(model) == sharing(model).stored
    x = torch.rand(4, 6)
    before = {task: y.detach() for task, y in model(x).items()}
    optimizer = torch.optim.Adam(model.parameters(), .1)
    for _ in range(3):
        optimizer.zero_grad()
        scalar(model({"a": x})["a"]).backward()
        optimizer.step()
    assert not torch.equal(model(x)["a"], before["a"])
    for task in ("b", "c"): assert torch.equal(model(x)[task], before[task])


@pytest.mark.parametrize("kind", TRUNKS)
def test_outputs_are_those_of_masked_copies(kind):
    "An independent reference: a copy of the trunk with zeros written into it."
    model, x = setting(MINE["sparse"], kind)
    for task in TASKS:
        own, masks = copy.deepcopy(model.trunk), model.masks_of(task)
        with torch.no_grad():
            for n, p in own.named_parameters(): p.mul_(masks[n])
        torch.testing.assert_close(model(x)[task], model.heads[task](own(x)))


def test_gradcheck():
    model, x = setting(MINE["sparse"])
    assert torch.autograd.gradcheck(lambda x: tuple(model(x).values()), x[:2].requires_grad_())


def test_masks_survive():
    "Training, copies, state dicts, files, moves and casts, into a model that had none."
    base = mlp()
    model = SparseSharing(base, heads(), random_masks(base))
    masks = {task: {n: m.clone() for n, m in model.masks_of(task).items()} for task in TASKS}
    x = torch.rand(6, 6)
    losses = TaskLosses(dict.fromkeys(TASKS, nn.functional.mse_loss))
    fit(model, (x, {task: torch.rand(6, 2) for task in TASKS}), losses.total, epochs=3, progress=False)
    fresh = SparseSharing(mlp(), heads())
    fresh.load_state_dict(model.state_dict())
    for other in (model, fresh, copy.deepcopy(model), copy.deepcopy(model).double().half()):
        for task in TASKS:
            for n, m in other.masks_of(task).items(): assert m.dtype == torch.bool and torch.equal(m, masks[task].get(n, torch.ones_like(m)))
    meta = copy.deepcopy(model).to("meta")
    assert meta(x.to("meta"))["a"].shape == (6, 2)


def test_file_into_a_model_without_masks(tmp_path):
    base = mlp()
    model, fresh = SparseSharing(base, heads(), random_masks(base)), SparseSharing(mlp(), heads())
    save_model(model, tmp_path / "m.safetensors")
    load_model(fresh, tmp_path / "m.safetensors")
    x = torch.rand(3, 6)
    for task in TASKS: assert torch.equal(model(x)[task], fresh(x)[task])
    assert overlap(fresh).equals(overlap(model))


def test_what_is_masked_is_inert():
    "Not even NaN or infinity outside of a mask is heard, forward or backward."
    base = mlp()
    model = SparseSharing(base, heads(), random_masks(base))
    x = torch.rand(3, 6)
    before, mask = model(x)["a"].detach(), model.masks_of("a")["0.weight"]
    with torch.no_grad(): base[0].weight[~mask] = float("nan")
    y = model(x)["a"]
    assert torch.equal(y, before)
    y.sum().backward()
    assert torch.isfinite(base[0].weight.grad).all()


def test_running_means_are_a_tasks_own():
    "In training each task follows what its own subnetwork puts out; in evaluation it uses that."
    set_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
    masks = {task: {"0.weight": torch.rand(8, 6) < .5} for task in TASKS}
    model = SparseSharing(base, heads(), masks)
    x = torch.randn(50, 6)
    for _ in range(200): model({"a": x, "b": x})
    model.eval()
    own = {task: getattr(model.running[task], "1/running_mean") for task in TASKS}
    for task in ("a", "b"):
        with torch.no_grad(): z = x @ torch.where(masks[task]["0.weight"], base[0].weight, 0.).T + base[0].bias
        torch.testing.assert_close(own[task], z.mean(0), rtol=0, atol=1e-5)
    assert own["c"].eq(0).all() and base[1].running_mean.eq(0).all()
    assert getattr(model.running["a"], "1/num_batches_tracked") == 200
    other = SparseSharing(copy.deepcopy(base), heads(), masks).eval()
    other.load_state_dict(model.state_dict())
    for task in TASKS: assert torch.equal(other(x)[task], model(x)[task])


def test_tied_weights_within_a_trunk():
    "One parameter under two names has one mask, at both places."
    layer = nn.Linear(6, 6)
    base = nn.Sequential(layer, nn.Tanh(), layer)
    mask = torch.rand(6, 6) < .5
    model = SparseSharing(base, {"a": nn.Identity()}, {"a": {"0.weight": mask}})
    w = torch.where(mask, layer.weight, 0.)
    x = torch.rand(2, 6)
    torch.testing.assert_close(model(x)["a"], torch.tanh(x @ w.T + layer.bias) @ w.T + layer.bias)


def test_autocast():
    model, x = setting(MINE["sparse"])
    model, x = model.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16): y = model(x)["a"]
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), model(x)["a"], rtol=.05, atol=.05)


def test_overlap_and_kept_by_hand():
    base = nn.Linear(2, 2)
    a, b = torch.tensor([[1, 1], [0, 0]]).bool(), torch.tensor([[1, 0], [1, 0]]).bool()
    model = SparseSharing(base, {"a": nn.Identity(), "b": nn.Identity()}, {"a": {"weight": a}, "b": {"weight": b}})
    assert overlap(model).values.tolist() == [[1, 1 / 3], [1 / 3, 1]]
    assert list(overlap(model).columns) == list(overlap(model).index) == ["a", "b"]
    assert kept(model) == 3 + 2 and sharing(model).shared == 1 + 2 and sharing(model).stored == 6
    nothing = {"weight": torch.zeros(2, 2).bool()}
    assert overlap(SparseSharing(base, {"a": nn.Identity()}, {"a": nothing})).values.tolist() == [[0]]
    assert draw_overlap(model).get_xlabel() == "task"


def test_kept_of_other_schemes():
    assert kept(Hard(mlp(), heads())) == sharing(Hard(mlp(), heads())).stored
    assert kept(Single(mlp(), heads())) == sharing(Single(mlp(), heads())).stored


def test_pruned_takes_the_smallest_of_all_matrices():
    "Against a sort over everything; biases never, ties by place, nothing comes back."
    set_seed(0)
    base = mlp()
    with torch.no_grad(): base[2].weight.mul_(3)
    masks, sizes = {}, torch.cat([base[i].weight.detach().abs().flatten() for i in (0, 2)])
    for n in (112, 50, 7, 0):
        masks = pruned(base, masks, n)
        assert list(masks) == ["0.weight", "2.weight"]
        flat = torch.cat([m.flatten() for m in masks.values()])
        expected = torch.zeros(112, dtype=torch.bool)
        expected[sizes.argsort(descending=True)[:n]] = True
        assert torch.equal(flat, expected)
    with torch.no_grad(): base[0].weight.fill_(1.), base[2].weight.fill_(1.)
    assert pruned(base, {}, 3)["0.weight"].sum() == 3
    own = {"0.weight": torch.arange(48).view(8, 6) < 5}
    small = pruned(base, own, 6)
    assert small["0.weight"].sum() == 5 and small["2.weight"].sum() == 1 and own["0.weight"].sum() == 5


def test_only_some_matrices_are_pruned():
    "Those that are named; the others stay whole for every task."
    set_seed(0)
    base, tops = mlp(), heads()
    masks = pruned(base, {}, 10, "2*")
    assert list(masks) == ["2.weight"] and masks["2.weight"].sum() == 10
    search = subnetworks(base, tops, lambda model, task: None, lambda model, task: 0., keep=.25, rounds=2, names=["2.weight"])
    model = SparseSharing(base, tops, search.best(.25))
    for task in TASKS:
        own = model.masks_of(task)
        assert own["0.weight"].all() and own["2.weight"].sum() == 64 // 4
    assert search.scores.index.tolist() == [1., .5, .25]
    with pytest.raises(ValueError, match="names: '3.weight' matches none of 2 names"): pruned(base, {}, 3, "3.weight")
    with pytest.raises(TypeError, match="names: a list of names or patterns is expected, got 2"): pruned(base, {}, 3, 2)
    with pytest.raises(ValueError, match="names: a name or pattern at least is expected"): pruned(base, {}, 3, [])


def test_search():
    "Sizes, nested masks, the start and the heads untouched, the trainer sees one task from the start each time."
    set_seed(0)
    base, tops = mlp(), heads()
    state = copy.deepcopy([base.state_dict(), *(h.state_dict() for h in tops.values())])
    seen = []

    def train(model, task):
        assert model.tasks == [task] and all(torch.equal(p, q) for p, q in zip(model.trunk.parameters(), base.parameters()))
        seen.append((task, kept(model)))
        with torch.no_grad():
            for p in model.parameters(): p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(task))))

    found = subnetworks(base, tops, train, lambda model, task: -kept(model), keep=.25, rounds=2)
    assert [task for task, _ in seen] == [t for t in TASKS for _ in range(3)]
    rest = 16 + 18  # biases and a head
    assert [n - rest for _, n in seen[:3]] == [112, 56, 28]
    assert list(found.scores.index) == [1, .5, .25] and list(found.scores.columns) == TASKS
    assert found.scores["a"].tolist() == [-112 - rest, -56 - rest, -28 - rest]
    for t in TASKS:
        for large, small in zip(found.masks[t], found.masks[t][1:]): assert all(not (small[n] & ~large[n]).any() for n in large)
        assert found.best()[t] is found.masks[t][2]
    for before, part in zip(state, [base, *tops.values()]):
        assert all(torch.equal(v, before[k]) for k, v in part.state_dict().items())


def test_best_is_chosen_by_score_then_size():
    scores = pd.DataFrame({"a": [.5, .9, .9, .1], "b": [.9, .1, .1, .1]}, index=[1., .5, .25, .125])
    found = Subnetworks({t: [f"{t}{r}" for r in range(4)] for t in "ab"}, scores)
    assert found.best() == {"a": "a2", "b": "b0"}
    assert found.best(.5) == {"a": "a2", "b": "b3"} and found.best(.2) == {"a": "a3", "b": "b3"}
    for bad in (.1, 0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="at_most"): found.best(bad)


OPTIMIZERS = {"sgd": lambda ps: torch.optim.SGD(ps, .1), "momentum": lambda ps: torch.optim.SGD(ps, .1, momentum=.9, weight_decay=.1),
              "adam": lambda ps: torch.optim.Adam(ps, .01), "adamw": lambda ps: torch.optim.AdamW(ps, .01, amsgrad=True)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scheme", ["sparse", "single", "soft"])
def test_a_step_in_turn_moves_only_what_the_task_uses(scheme, optimizer):
    "Weights and the optimizer's numbers, entry by entry; the used ones move as without."
    set_seed(0)
    base = mlp()
    model = {"sparse": lambda: SparseSharing(base, heads(), random_masks(base)), "single": lambda: Single(base, heads()),
             "soft": lambda: Soft(base, heads())}[scheme]()
    losses = TaskLosses(dict.fromkeys(TASKS, nn.functional.mse_loss))
    make = OPTIMIZERS[optimizer]
    optimizer = make(model.parameters())
    for p in model.parameters(): p.grad = torch.rand_like(p)
    optimizer.step()  # momentum everywhere
    loss = InTurn(model, optimizer, losses)
    for task in TASKS * 2:
        optimizer.zero_grad(set_to_none=False)
        loss(model({task: torch.rand(4, 6)}), {task: torch.rand(4, 2)}).backward()
        twin = copy.deepcopy(model)
        other = make(twin.parameters())
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for p, q in zip(model.parameters(), twin.parameters()): q.grad = p.grad.clone()
        before = {n: (p.detach().clone(), copy.deepcopy(optimizer.state.get(p, {}))) for n, p in model.named_parameters()}
        optimizer.step()
        other.step()
        used = model.used_by(task)
        for (n, p), q in zip(model.named_parameters(), twin.parameters()):
            mask = used.get(n, torch.zeros_like(p, dtype=torch.bool))
            mask = torch.ones_like(p, dtype=torch.bool) if mask is None else mask
            old, state = before[n]
            assert torch.equal(p[~mask], old[~mask]) and torch.equal(p[mask], q[mask]) and (not mask.any() or not torch.equal(p[mask], old[mask]))
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.shape == p.shape:
                    assert torch.equal(optimizer.state[p][key][~mask], value[~mask])
                    assert torch.equal(optimizer.state[p][key][mask], other.state[q][key][mask])
    loss.remove()
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


ALL_OPTIMIZERS = OPTIMIZERS | {"rmsprop": lambda ps: torch.optim.RMSprop(ps, .01, momentum=.5, centered=True, weight_decay=.1),
                               "adadelta": lambda ps: torch.optim.Adadelta(ps, weight_decay=.1), "adamax": lambda ps: torch.optim.Adamax(ps, weight_decay=.1),
                               "adagrad": lambda ps: torch.optim.Adagrad(ps, .01, weight_decay=.1), "nadam": lambda ps: torch.optim.NAdam(ps, weight_decay=.1)}


@pytest.mark.parametrize("optimizer", ALL_OPTIMIZERS)
def test_state_that_the_first_step_makes_is_zero_for_what_stays(optimizer):
    "Weight decay would put momentum on weights of other tasks."
    set_seed(0)
    base = mlp()
    model = SparseSharing(base, heads(), thirds(base))
    optimizer = ALL_OPTIMIZERS[optimizer](model.parameters())
    loss = InTurn(model, optimizer, TaskLosses(dict.fromkeys(TASKS, nn.functional.mse_loss)))
    loss(model({"a": torch.rand(4, 6)}), {"a": torch.rand(4, 2)}).backward()
    for p in model.parameters(): p.grad = torch.rand_like(p)
    used = model.used_by("a")
    optimizer.step()
    for n, p in model.named_parameters():
        if used.get(n) is None: continue
        for key, t in optimizer.state[p].items():
            if isinstance(t, torch.Tensor) and t.shape == p.shape: assert (t[~used[n]] == 0).all() and (t[used[n]] != 0).any(), key


def test_in_turn_counts_all_tasks_since_the_last_step():
    set_seed(0)
    base = mlp()
    model = SparseSharing(base, heads(), thirds(base))
    losses = TaskLosses(dict.fromkeys(TASKS, nn.functional.mse_loss))
    optimizer = torch.optim.SGD(model.parameters(), .1)
    loss = InTurn(model, optimizer, losses)
    x, y = torch.rand(4, 6), torch.rand(4, 2)
    for tasks, expected in ((["a", "b"], ["a", "b"]), (["c"], ["c"])):
        optimizer.zero_grad()
        before = {task: t.detach() for task, t in model(x).items()}
        for task in tasks: loss(model({task: x}), {task: y}).backward()
        with torch.no_grad(): loss(model(x), dict.fromkeys(TASKS, y))  # looks, and counts for nothing
        assert loss.tasks == expected
        optimizer.step()
        for task in TASKS: assert torch.equal(model(x)[task], before[task]) == (task not in tasks)


def test_in_turn_counts_tasks_that_had_a_loss():
    "A task whose labels are all missing in a batch is left as it is, and weights count."
    set_seed(0)
    base = mlp()
    model = SparseSharing(base, heads(), thirds(base))
    losses = TaskLosses(dict.fromkeys(TASKS, nn.functional.mse_loss), weights={"a": 2.})
    optimizer = torch.optim.SGD(model.parameters(), .1, momentum=.9)
    loss = InTurn(model, optimizer, losses)
    x, y = torch.rand(4, 6), {"a": torch.rand(4, 2), "b": torch.full((4, 2), float("nan"))}
    value = loss(model(x), y)
    torch.testing.assert_close(value, losses.total(model(x), y))
    assert loss.tasks == ["a"]
    before = {task: t.detach() for task, t in model(x).items()}
    value.backward()
    optimizer.step()
    assert not torch.equal(model(x)["a"], before["a"])
    for task in "bc": assert torch.equal(model(x)[task], before[task])


def test_bad_input():
    base, ones = mlp(), torch.ones(8, 6, dtype=torch.bool)
    def make(masks): return SparseSharing(base, heads(), masks)
    for error, match, masks in [
            (TypeError, "masks: a dictionary", [ones]), (ValueError, "masks: one of 'a', 'b', 'c' is expected, got 'd'", {"d": {}}),
            (TypeError, r"masks\['a'\]: a dictionary", {"a": ones}), (ValueError, "did you mean '0.weight'", {"a": {"0.weights": ones}}),
            (ValueError, r"masks\['a'\]\['0.weight'\]: a tensor of shape \(8, 6\) is expected", {"a": {"0.weight": ones.T}}),
            (TypeError, "a tensor of bool is expected", {"a": {"0.weight": ones.float()}}),
            (TypeError, "a tensor is expected", {"a": {"0.weight": [[1]]}})]:
        with pytest.raises(error, match=match): make(masks)
    with pytest.raises(TypeError, match="trunk: a module"): SparseSharing(None, heads())
    with pytest.raises(ValueError, match="a module with values"): SparseSharing(nn.LazyLinear(8), heads())
    model = make(None)
    with pytest.raises(ValueError, match="task: one of"): model.masks_of("d")
    for f in (overlap, draw_overlap):
        with pytest.raises(TypeError, match="a SparseSharing model"): f(Hard(base, heads()))
    with pytest.raises(TypeError, match="a Multitask model"): kept(base)
    with pytest.raises(ValueError, match="a matrix of weights"): overlap(SparseSharing(nn.LayerNorm(8), heads()))


def test_bad_input_to_the_search():
    base = mlp()
    for n in (-1, 113):
        with pytest.raises(ValueError, match="n: a whole number from 0 to 112"): pruned(base, {}, n)
    with pytest.raises(TypeError, match="n: a whole number"): pruned(base, {}, .5)
    def nothing(model, task): return 0
    fine = {"trunk": base, "heads": heads(), "train": nothing, "score": nothing, "keep": .5, "rounds": 1}
    for name, value, error in [("train", 1, TypeError), ("train", lambda m: 0, TypeError), ("score", None, TypeError), ("keep", 2, ValueError),
                               ("keep", "all", TypeError), ("rounds", 0, ValueError), ("rounds", 1.5, TypeError), ("heads", {}, ValueError), ("heads", 5, TypeError),
                               ("trunk", nn.Tanh(), ValueError), ("trunk", 3, TypeError)]:
        with pytest.raises(error, match=name): subnetworks(**fine | {name: value})
    with pytest.raises(ValueError, match="score of 'a': a finite number"): subnetworks(**fine | {"score": lambda m, t: float("nan")})
    losses, model = TaskLosses({"a": nn.functional.mse_loss}), SparseSharing(base, heads())
    optimizer = torch.optim.SGD(model.parameters(), .1)
    with pytest.raises(TypeError, match="model: a Multitask"): InTurn(base, optimizer, losses)
    with pytest.raises(TypeError, match="optimizer"): InTurn(model, None, losses)
    with pytest.raises(TypeError, match="losses"): InTurn(model, optimizer, nn.functional.mse_loss)
