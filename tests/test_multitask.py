"Ways to share between tasks: every scheme on every trunk, their extremes, what they store, bad input."
import copy

import pytest
import torch
from torch import nn

from schemes import CHECKS, SCHEMES, TASKS, TRUNKS, Recurrent, conv, labels_for, mlp, setting
from sharetie.multitask import CrossStitch, Hard, Single, Sluice, Soft, TaskLosses, Transfer, sharing, stages_of
from sharetie.results import set_seed
from sharetie.ties import find_ties, load_model, save_model
from sharetie.train import fit
from sharetie.tying import harden_


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", TRUNKS)
@pytest.mark.parametrize("name", SCHEMES)
def test_schemes(name, kind, check, tmp_path): check(SCHEMES[name], kind, tmp_path)


# Extremes

def same(a, b, x, exact=False):
    "Do two models answer the same, and send the same gradients to the heads?"
    ya, yb = a(x), b(x)
    assert list(ya) == list(yb)
    for task in ya:
        torch.testing.assert_close(ya[task], yb[task], **({"rtol": 0, "atol": 0} if exact else {}))
        grads = [torch.autograd.grad(y[task].square().sum(), list(m.heads[task].parameters()), retain_graph=True) for m, y in ((a, ya), (b, yb))]
        for g, w in zip(*grads): torch.testing.assert_close(g, w)


EQUAL = {  # name: (scheme, the scheme that it is, at this setting)
    "single with equal towers is hard": (lambda t, h, a: Single(t, h), "hard"),
    "soft with equal towers is hard": (lambda t, h, a: Soft(t, h), "hard"),
    "cross-stitch with identity is single": (lambda t, h, a: CrossStitch(t, h, own=1.), "single"),
    "uniform cross-stitch of equal towers is hard": (lambda t, h, a: CrossStitch(t, h, own=1 / 3), "hard"),
    "any rows that sum to 1 keep equal towers": (lambda t, h, a: CrossStitch(t, h, own=.7), "hard"),
    "sluice with identity and last is single": (lambda t, h, a: Sluice(t, h, own=1., last=1., axis=a), "single"),
    "sluice with identity, no skips is single": (lambda t, h, a: Sluice(t, h, own=1., skip=False, axis=a), "single"),
    "transfer, all shared is hard": (lambda t, h, a: Transfer(t, h, frozen=0), "hard"),
    "transfer, frozen answers as hard": (lambda t, h, a: Transfer(t, h), "hard"),
    "transfer, none shared is single": (lambda t, h, a: Transfer(t, h, shared=0), "single"),
    "transfer, one shared": (lambda t, h, a: Transfer(t, h, shared=1), "hard")}


@pytest.mark.parametrize("kind", TRUNKS)
@pytest.mark.parametrize("name", EQUAL)
def test_equal_at_the_extremes(name, kind):
    build, other = EQUAL[name]
    def parts():
        set_seed(0)
        make, shape, head, axis = TRUNKS[kind]
        return make().double(), {task: head().double() for task in TASKS}, axis
    a, b = build(*parts()), {"hard": Hard, "single": Single}[other](*parts()[:2])
    x = torch.randn(4, *TRUNKS[kind][1], dtype=torch.float64)
    same(a.eval(), b.eval(), x)


def trained(model, seed=0, epochs=4):
    set_seed(seed)
    x = torch.randn(12, 6, dtype=torch.float64)
    y = {task: torch.randn(12, 2, dtype=torch.float64) for task in model.tasks}
    losses = TaskLosses({task: nn.functional.mse_loss for task in model.tasks})
    fit(model, (x, y), losses.total, optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=.05),
        penalty=model.penalty, epochs=epochs, progress=False)
    return model, x


def pair(*builds):
    "Models of different schemes on the same trunk and heads, trained on the same data."
    made = []
    for build in builds:
        set_seed(1)
        made.append(trained(build(mlp().double(), {task: nn.Linear(8, 2).double() for task in TASKS}, 1)))
    return [model for model, _ in made], made[0][1]


def test_soft_without_strength_trains_like_single():
    (soft, single), x = pair(lambda t, h, a: Soft(t, h, strength=0.), lambda t, h, a: Single(t, h))
    same(soft, single, x, exact=True)


def test_cross_stitch_that_stays_the_identity_trains_like_single():
    def frozen(t, h, a):
        model = CrossStitch(t, h, own=1.)
        model.mixing.requires_grad_(False)
        return model
    (stitched, single), x = pair(frozen, lambda t, h, a: Single(t, h))
    same(stitched, single, x)


def test_transfer_trains_like_the_two_ends():
    (all_shared, hard), x = pair(lambda t, h, a: Transfer(t, h, frozen=0), lambda t, h, a: Hard(t, h))
    same(all_shared, hard, x)
    (none, single), x = pair(lambda t, h, a: Transfer(t, h, shared=0), lambda t, h, a: Single(t, h))
    same(none, single, x)


def test_a_strong_tie_comes_near_hard_sharing():
    far = []
    for strength in (0., .1, 1.):
        model, _ = trained(setting(lambda t, h, a: Soft(t, h, strength=strength, redraw=True))[0], epochs=30)
        far.append(sum(model.penalty.distances().values()))
    assert far[0] > 2 * far[1] > 4 * far[2]


def test_hardened_soft_sharing_is_hard(tmp_path):
    soft, x = setting(lambda t, h, a: Soft(t, h, strength=.1, redraw=True))
    mean = {name: torch.stack([tower.get_parameter(name) for tower in soft.towers.values()]).mean(0)
            for name, _ in soft.towers["a"].named_parameters()}
    harden_(soft.penalty, model=soft)
    hard = Hard(mlp().double(), soft.heads)
    hard.trunk.load_state_dict(mean)
    same(soft, hard, x)
    assert (sharing(soft).stored, sharing(soft).shared) == (sharing(hard).stored, sharing(hard).shared)
    assert {p.data_ptr() for p in soft.shared_parameters()} == {p.data_ptr() for p in soft.towers["c"].parameters()}
    save_model(soft, tmp_path / "soft.safetensors")
    other, _ = setting(lambda t, h, a: Soft(t, h, strength=.1, redraw=True), seed=3)
    harden_(other.penalty, model=other)
    load_model(other, tmp_path / "soft.safetensors")
    same(soft, other, x, exact=True)
    assert len(find_ties(soft).true) == 4


# Soft

def test_soft_has_a_strength_per_layer():
    soft, _ = setting(lambda t, h, a: Soft(t, h, strength={"0.*": 2., "2.*": 0.}))
    table = sharing(soft)
    assert (table.loc[["towers.a.0.weight", "towers.b.0.bias"], "tied"] == 2.).all()
    assert (table.loc[["towers.a.2.weight", "heads.a.weight"], "tied"] == 0.).all()
    towers = list(soft.towers.values())
    pairs = [(0, 1), (0, 2), (1, 2)]
    by_hand = sum((towers[i].get_parameter(n) - towers[j].get_parameter(n)).square().sum()
                  for i, j in pairs for n in ("0.weight", "0.bias"))
    torch.testing.assert_close(soft.penalty(), 2 * by_hand)


def test_soft_of_one_task_has_no_penalty():
    model, x = setting(lambda t, h, a: Soft(t, h), tasks=["a"])
    assert model.penalty is None and list(model(x)) == ["a"]
    assert sharing(model).shared == 0


def test_soft_can_have_other_distances():
    soft, _ = setting(lambda t, h, a: Soft(t, h, strength=1., distance="l1", redraw=True))
    a, b, c = (torch.cat([p.flatten() for p in tower.parameters()]) for tower in soft.towers.values())
    torch.testing.assert_close(soft.penalty(), (a - b).abs().sum() + (a - c).abs().sum() + (b - c).abs().sum())


# Cross-stitch and sluice

def test_cross_stitch_by_hand():
    model, x = setting(SCHEMES["cross-stitch"], tasks=["a", "b"])
    z = {task: x for task in "ab"}
    for stage, A in zip(((0, 1), (2, 3)), model.mixing):
        for i in stage: z = {task: model.towers[task][i](z[task]) for task in "ab"}
        z = {task: row[0] * z["a"] + row[1] * z["b"] for task, row in zip("ab", A)}
    for task, y in model(x).items(): torch.testing.assert_close(y, model.heads[task](z[task]))


@pytest.mark.parametrize("kind", TRUNKS)
def test_sluice_by_hand(kind):
    model, x = setting(SCHEMES["sluice"], kind, tasks=["a", "b"])
    dim = model.axis
    z, seen = {task: x for task in "ab"}, []
    for stage, A in zip(model.stages, model.mixing):
        for i in stage: z = {task: model.towers[task][i](z[task]) for task in "ab"}
        halves = [half for task in "ab" for half in z[task].chunk(2, dim)]
        mixed = [sum(A[r, c] * halves[c] for c in range(4)) for r in range(4)]
        z = {"a": torch.cat(mixed[:2], dim), "b": torch.cat(mixed[2:], dim)}
        seen.append(z)
    for k, task in enumerate("ab"):
        h = sum(beta * stage[task] for beta, stage in zip(model.skips[k], seen))
        torch.testing.assert_close(model(x)[task], model.heads[task](h))


@pytest.mark.parametrize("kind", TRUNKS)
def test_sluice_penalty_by_hand(kind):
    model, _ = setting(SCHEMES["sluice"], kind)
    total = 0
    for tower in model.towers.values():
        if kind == "lstm":
            for layer in tower:
                for gate in layer.weight_hh_l0.chunk(4): total += (gate[:4] @ gate[4:].T).square().sum()
        else:
            for stage in model.stages:
                w = [p for i in stage for p in tower[i].parameters() if p.ndim > 1][-1].flatten(1)
                top, bottom = w.chunk(2)
                total += (top @ bottom.T).square().sum()
    torch.testing.assert_close(model.penalty(), .1 * total)
    grad = torch.autograd.grad(model.penalty(), list(model.parameters()), allow_unused=True)
    assert any(g is not None and g.any() for g in grad)


def test_orthogonality_falls_in_training():
    before = setting(lambda t, h, a: Sluice(t, h, orthogonal=1.))[0]
    after, _ = trained(copy.deepcopy(before), epochs=40)
    assert after.penalty() < before.penalty() / 2


def test_one_subspace_is_a_cross_stitch_and_has_no_penalty():
    a, x = setting(lambda t, h, axis: Sluice(t, h, subspaces=1, skip=False, orthogonal=1.), noisy=False)
    b, _ = setting(lambda t, h, axis: CrossStitch(t, h), noisy=False)
    same(a, b, x)
    assert a.penalty().item() == 0 and a.mixing[0].shape == b.mixing[0].shape == (3, 3)


def test_one_task_is_mixed_with_nothing():
    for name in ("cross-stitch", "sluice"):
        model, x = setting(SCHEMES[name], tasks=["a"], noisy=False)
        z = model.towers["a"](x)
        assert sharing(model).shared == 0
        torch.testing.assert_close(model.mixing[0].diagonal().mean().item(), 1. if name == "cross-stitch" else .9, rtol=1e-6, atol=0)
        if name == "cross-stitch": torch.testing.assert_close(model(x)["a"], model.heads["a"](z))


def test_mixing_starts_with_rows_that_sum_to_one():
    for name in ("cross-stitch", "sluice"):
        model, _ = setting(SCHEMES[name], noisy=False)
        for A in model.mixing:
            torch.testing.assert_close(A.sum(1), torch.ones(len(A), dtype=A.dtype), rtol=1e-6, atol=0)
            torch.testing.assert_close(A.diagonal(), torch.full((len(A),), .9, dtype=A.dtype), rtol=1e-6, atol=0)
        if name == "sluice": torch.testing.assert_close(model.skips, torch.full((3, 2), .5, dtype=A.dtype))
    assert not any(a is b for a, b in zip(model.mixing, list(model.mixing)[1:]))


def test_stages():
    relu, flat = nn.ReLU(), nn.Flatten()
    def l(): return nn.Linear(4, 4)
    cases = [([l(), relu, l()], [[0, 1], [2]]), ([flat, l(), relu, l(), relu, relu], [[0, 1, 2], [3, 4, 5]]),
             ([nn.Sequential(l(), relu, l()), relu], [[0, 1]]), ([l(), nn.BatchNorm1d(4)], [[0], [1]])]
    for parts, expected in cases: assert [list(stage) for stage in stages_of(nn.Sequential(*parts))] == expected


def test_one_matrix_shared_by_two_stages_is_still_counted_once():
    layer = nn.Linear(6, 6)
    model = CrossStitch(nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh()), {t: nn.Linear(6, 1) for t in "ab"})
    assert model.towers["a"][0] is model.towers["a"][2] and len(model.stages) == 2
    assert sharing(model).stored == 2 * 42 + 2 * 4 + 2 * 7


# Transfer

def test_transfer_copies_and_freezes():
    trunk = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Dropout(.5))
    before = copy.deepcopy(trunk.state_dict())
    model = Transfer(trunk, {t: nn.Linear(8, 2) for t in "ab"}, shared=3, frozen=2)
    kept = copy.deepcopy(model.trunk[:3].state_dict())
    for mode in (True, False, True):
        model.train(mode)
        assert not model.trunk[1].training and model.trunk[4].training == mode
    y = {t: torch.randn(16, 2) for t in "ab"}
    losses = TaskLosses({t: nn.functional.mse_loss for t in "ab"})
    fit(model, (torch.randn(16, 6), y), losses.total, epochs=3, progress=False)
    assert all(torch.equal(p, kept[name]) for name, p in model.trunk[:3].state_dict().items())
    assert not torch.equal(model.trunk[3].weight, before["3.weight"])
    assert all(torch.equal(p, before[name]) and trunk.state_dict()[name].equal(p) for name, p in trunk.state_dict().items())
    assert all(p.requires_grad for p in trunk.parameters())


def test_transfer_takes_any_module_as_one_stage():
    lstm = Recurrent(6, 8, batch_first=True)
    x = torch.randn(2, 3, 6)
    for shared, own in ((None, 0), (0, 2)):
        model = Transfer(lstm, {t: nn.Linear(8, 2) for t in "ab"}, shared=shared)
        torch.testing.assert_close(model(x)["a"], model.heads["a"](lstm(x)))
        assert sum(len(list(t.parameters())) for t in model.towers.values()) == 4 * own
    with pytest.raises(ValueError, match="shared: a whole number from 0 to 1 is expected, got 2"): Transfer(lstm, {"a": nn.Linear(8, 2)}, shared=2)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_a_tree_shares_the_first_stage(kind):
    model, x = setting(lambda t, h, a: Transfer(t, h, shared=1, frozen=0), kind)
    table = sharing(model)
    first, second = (sum(p.numel() for p in stage.parameters()) for stage in (model.trunk, model.towers["a"]))
    assert table.shared == first and first and second
    assert table.stored == first + 3 * second + sum(p.numel() for p in model.heads.parameters())


# All

@pytest.mark.parametrize("name", SCHEMES)
def test_autocast_and_moves(name):
    model, x = setting(SCHEMES[name])
    assert model.float()(x.float())["a"].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16): low = model(x.float())["a"]
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), model(x.float())["a"], rtol=.1, atol=.1)
    on_meta = model.to("meta")
    assert on_meta(x.float().to("meta"))["b"].shape == (5, 2)
    assert sharing(on_meta).stored == sum(p.numel() for p in on_meta.parameters())


@pytest.mark.parametrize("name", SCHEMES)
def test_double_inputs_have_right_gradients(name):
    model, x = setting(SCHEMES[name])
    assert torch.autograd.gradcheck(lambda x: tuple(model(x).values()), (x[:2].requires_grad_(),))


@pytest.mark.parametrize("name", SCHEMES)
def test_batch_of_one_and_of_none(name):
    model, x = setting(SCHEMES[name], "conv")
    assert model(x[:1])["a"].shape == (1, 2) and model(x[:0])["a"].shape == (0, 2)


def test_redrawn_towers_differ():
    for build in (lambda t, h, a: Soft(t, h, redraw=True), lambda t, h, a: CrossStitch(t, h, redraw=True), lambda t, h, a: Sluice(t, h, axis=a, redraw=True)):
        model, _ = setting(build, "transformer", noisy=False)
        a, b, _ = model.towers.values()
        assert not torch.equal(a[0].weight, b[0].weight) and not torch.equal(a[1].self_attn.in_proj_weight, b[1].self_attn.in_proj_weight)


def test_training_lowers_what_is_not_balanced_twice():
    model, x = trained(setting(SCHEMES["soft"])[0])
    assert model.penalty().isfinite() and all(y.isfinite().all() for y in model(x).values())


def across():
    "Two stages on one matrix."
    trunk = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    trunk[2].weight = trunk[0].weight
    return trunk


# Bad input

BAD = {
    "an LSTM between stages": (lambda: CrossStitch(nn.Sequential(nn.LSTM(6, 8)), {"a": nn.Linear(8, 1)})(torch.ones(2, 3, 6)), TypeError, r"trunk\[0\]: a stage that puts out a tensor is expected, got tuple"),
    "no Sequential": (lambda: CrossStitch(nn.Linear(6, 8), {"a": nn.Linear(8, 1)}), TypeError, "trunk: an nn.Sequential, between whose stages tasks can meet, is expected, got Linear"),
    "no weights": (lambda: Sluice(nn.Sequential(nn.ReLU()), {"a": nn.Linear(8, 1)}), ValueError, "an nn.Sequential with weights"),
    "own above 1": (lambda: CrossStitch(mlp(), {"a": nn.Linear(8, 1)}, own=1.5), ValueError, "own: a finite number from 0 to 1 is expected, got 1.5"),
    "own is NaN": (lambda: Sluice(mlp(), {"a": nn.Linear(8, 1)}, own=float("nan")), ValueError, "own: a finite number"),
    "last below 0": (lambda: Sluice(mlp(), {"a": nn.Linear(8, 1)}, last=-1), ValueError, "last: a finite number from 0 to 1"),
    "no subspaces": (lambda: Sluice(mlp(), {"a": nn.Linear(8, 1)}, subspaces=0), ValueError, "subspaces: a whole number of at least 1"),
    "axis of the examples": (lambda: Sluice(mlp(), {"a": nn.Linear(8, 1)}, axis=0), ValueError, r"axis: an axis of features \(0 is that of the examples\) is expected, got 0"),
    "axis beyond": (lambda: Sluice(mlp(), {"a": nn.Linear(8, 1)}, axis=2)(torch.ones(2, 6)), ValueError, r"axis: an axis of features in outputs of shape \(2, 8\) is expected, got 2"),
    "axis of the examples from behind": (lambda: Sluice(mlp(), {"a": nn.Linear(8, 1)}, axis=-2)(torch.ones(2, 6)), ValueError, r"axis: an axis of features in outputs of shape \(2, 8\)"),
    "a tie across": (lambda: Transfer(across(), {"a": nn.Linear(8, 1)}, shared=1), ValueError, r"no Parameter in two stages .*'0.weight', '2.weight'"),
    "three subspaces": (lambda: Sluice(mlp(), {"a": nn.Linear(8, 1)}, subspaces=3)(torch.ones(2, 6)), ValueError, "subspaces: a divisor of the 8 features of a stage is expected, got 3"),
    "three subspaces of rows": (lambda: Sluice(mlp(), {"a": nn.Linear(8, 1)}, subspaces=3, orthogonal=1.).penalty(), ValueError, "divisor of a matrix' 8 rows"),
    "stages of two shapes": (lambda: Sluice(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 8)), {"a": nn.Linear(8, 1)})(torch.ones(2, 6)), ValueError, r"trunk: stages of one shape \(or skip=False\) is expected, got \[\(2, 4\), \(2, 8\)\]"),
    "skip is text": (lambda: Sluice(mlp(), {"a": nn.Linear(8, 1)}, skip="all"), TypeError, "skip: True or False"),
    "orthogonal below 0": (lambda: Sluice(mlp(), {"a": nn.Linear(8, 1)}, orthogonal=-1), ValueError, "orthogonal"),
    "negative strength": (lambda: Soft(mlp(), {t: nn.Linear(8, 1) for t in "ab"}, strength=-1), ValueError, "strength of 0.weight"),
    "strength by wrong name": (lambda: Soft(mlp(), {t: nn.Linear(8, 1) for t in "ab"}, strength={"layer*": 1}), ValueError, r"strength: 'layer\*' matches none of 4 names"),
    "unknown distance": (lambda: Soft(mlp(), {t: nn.Linear(8, 1) for t in "ab"}, distance="l2"), ValueError, "distance: one of"),
    "more stages than there are": (lambda: Transfer(conv(), {"a": nn.Linear(8, 1)}, shared=3), ValueError, "shared: a whole number from 0 to 2"),
    "more frozen than shared": (lambda: Transfer(conv(), {"a": nn.Linear(8, 1)}, shared=1, frozen=2), ValueError, "frozen: a whole number from 0 to 1"),
    "a lazy trunk": (lambda: Transfer(nn.LazyLinear(3), {"a": nn.Linear(3, 1)}), ValueError, "trunk: a module with values"),
    "a function for a trunk": (lambda: Soft(torch.tanh, {"a": nn.Linear(3, 1)}), TypeError, "trunk: a module is expected"),
    "no heads": (lambda: CrossStitch(mlp(), {}), ValueError, "heads: at least one task"),
    "heads in a list": (lambda: Sluice(mlp(), [nn.Linear(8, 1)]), TypeError, "heads: a dictionary of modules by task")}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message): call()


@pytest.mark.parametrize("name", SCHEMES)
def test_unknown_tasks(name):
    model, x = setting(SCHEMES[name])
    for call in (lambda: model({"a": x, "z": x}), lambda: model.used_by("z")):
        with pytest.raises(ValueError, match="one of 'a', 'b', 'c' is expected, got 'z'"): call()
    with pytest.raises(ValueError, match=r"x: an input for one of \['a', 'b', 'c'\]"): model({})


def test_labels_have_the_shape_of_outputs():
    model, x = setting(SCHEMES["hard"])
    assert {task: tuple(y.shape) for task, y in labels_for(model(x)).items()} == dict.fromkeys(TASKS, (5, 2))


def test_ties_within_a_part_stay():
    heads = {t: nn.Linear(8, 1) for t in "ab"}
    for shared in (0, 2):
        model = Transfer(across(), heads, shared=shared)
        for trunk in [model.trunk] if shared else model.towers.values(): assert trunk[2].weight is trunk[0].weight
