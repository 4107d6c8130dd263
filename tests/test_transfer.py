"What tasks gain from each other: intervals, the matrix of gains, agreement of gradients, the summary figure, bad input."
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as some
from scipy import stats
from torch import nn

from schemes import TASKS, TRUNKS, mlp, scalar
from sharetie.multitask import CrossStitch, Hard, Single, TaskLosses
from sharetie.results import compare, set_seed
from sharetie.sparse import SparseSharing
from sharetie.train import fit
from sharetie.transfer import GradientAgreement, delta_m, delta_m_over, gradient_agreement, paired_interval, transfer_matrix

LOSSES = TaskLosses(dict.fromkeys(TASKS, F.cross_entropy))


def heads(): return {task: nn.Linear(8, 2) for task in TASKS}


def batch(n=6, shape=(6,), seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(n, *shape, generator=draw, dtype=torch.float64), {task: torch.randint(2, (n,), generator=draw) for task in TASKS}


# Intervals

@given(some.lists(some.floats(-100, 100), min_size=2, max_size=12), some.sampled_from([.5, .9, .95, .99]))
def test_the_interval_is_that_of_scipy(numbers, level):
    if np.std(numbers) < 1e-6: return
    found, expected = paired_interval(numbers, level), stats.ttest_1samp(numbers, 0).confidence_interval(level)
    assert found.mean == pytest.approx(np.mean(numbers), abs=1e-9)
    assert [found.low, found.high] == pytest.approx([expected.low, expected.high], rel=1e-7, abs=1e-7)


def test_an_interval_of_what_does_not_vary_has_no_width(): assert paired_interval([2., 2., 2.]) == (2, 2, 2)


# The matrix

def scores(tasks, seed):
    "Errors: `a` gains 1 + seed by `b`, `b` loses 2 by `a`, and `c` is left alone by all."
    own = {"a": 10. + seed ** 2, "b": 5. - seed, "c": 1.}
    if {*tasks} == {"a", "b"}: own |= {"a": own["a"] - 1 - seed, "b": own["b"] + 2}
    return {task: own[task] for task in tasks}


def test_gains_by_hand():
    matrix = transfer_matrix(["a", "b", "c"], scores, range(4), lower=True)
    assert matrix.loc["a", "b"] == pytest.approx(2.5) and matrix.loc["b", "a"] == pytest.approx(-2) and matrix.loc["c", "a"] == 0
    assert all(math.isnan(matrix.loc[t, t]) for t in matrix)
    expected = stats.ttest_1samp([1, 2, 3, 4], 0).confidence_interval(.95)
    assert [matrix.low.loc["a", "b"], matrix.high.loc["a", "b"]] == pytest.approx([expected.low, expected.high])
    assert matrix.certain() == [("a", "b")] and matrix.certain(-1) == [("b", "a")]
    higher = transfer_matrix(["a", "b", "c"], scores, range(4))
    np.testing.assert_allclose(higher, -matrix)


def test_every_group_is_trained_once_per_seed():
    seen = []
    def fitted(tasks, seed):
        seen.append((tuple(tasks), seed))
        return {task: torch.tensor(1.) for task in tasks}
    matrix = transfer_matrix(["a", "b", "c"], fitted, [3, 5])
    assert len(seen) == len({*seen}) == (3 + 3) * 2 and {seed for _, seed in seen} == {3, 5}
    assert len(matrix.runs) == 6 * 2


def test_it_is_drawn():
    matrix = transfer_matrix(["a", "b", "c"], scores, range(4), lower=True)
    shown = {text.get_text() for text in matrix.draw().texts}
    assert {"+2.5*", "-2.0*", "+0.0"} <= shown


BAD = {
    "one task": (dict(tasks=["a"]), ValueError, "tasks: different names, two at least, is expected"),
    "twice": (dict(tasks=["a", "a"]), ValueError, "tasks: different names, two at least, is expected"),
    "text": (dict(tasks="ab"), TypeError, "tasks: a list of names is expected, got 'ab'"),
    "plus": (dict(tasks=["a", "b+c"]), ValueError, "tasks: a task's name without '+' is expected, got 'b+c'"),
    "no function": (dict(fit=3), TypeError, "fit: a function of (tasks, seed) is expected, got 3"),
    "one seed": (dict(seeds=[1]), ValueError, "seeds: two at least, for an interval, is expected"),
    "level": (dict(level=1.), ValueError, "level: a number above 0 and below 1 is expected, got 1.0"),
    "lower": (dict(lower="yes"), TypeError, "lower: True or False is expected, got 'yes'"),
}


@pytest.mark.parametrize("name", BAD)
def test_the_matrix_refuses(name):
    options, error, message = BAD[name]
    with pytest.raises(error) as raised: transfer_matrix(**({"tasks": ["a", "b"], "fit": scores, "seeds": range(2)} | options))
    assert message in str(raised.value)


@pytest.mark.parametrize("result, message", [
    ({"a": 1.}, "a score for each of"), ({"a": math.nan, "b": 1.}, "score of 'a': a finite number is expected, got nan"), (None, "a function to scores by task")])
def test_scores_that_cannot_be_compared(result, message):
    def fitted(tasks, seed): return result if len(tasks) == 2 else {tasks[0]: 1.}
    with pytest.raises(RuntimeError, match=message): transfer_matrix(["a", "b"], fitted, range(2))


# Agreement

def cosines(model, data, names, masks=None):
    "By definition: one gradient after the other, over what both tasks use."
    found, parameters = {}, [dict(model.named_parameters())[name] for name in names]
    rows = {}
    for task, loss in LOSSES(model(data[0]), data[1]).items():
        rows[task] = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))]
    for i, a in enumerate(TASKS):
        for b in TASKS[i + 1:]:
            both = [torch.ones_like(p, dtype=torch.bool) if masks is None else masks[a][name] & masks[b][name] for name, p in zip(names, parameters)]
            u, v = (torch.cat([g[m] for g, m in zip(rows[t], both)]) for t in (a, b))
            found[f"{a} – {b}"] = torch.cosine_similarity(u, v, 0).item()
    return found


@pytest.mark.parametrize("kind", TRUNKS)
def test_cosines_by_definition(kind):
    set_seed(0)
    trunk, shape, head, _ = TRUNKS[kind]
    model = Hard(trunk().double(), {task: head().double() for task in TASKS}).eval()
    draw = torch.Generator().manual_seed(1)
    x = torch.rand(4, *shape, dtype=torch.float64, generator=draw)
    targets = {task: torch.rand(out.shape, generator=draw, dtype=torch.float64) for task, out in model(x).items()}
    losses = TaskLosses(dict.fromkeys(TASKS, F.mse_loss))
    before = copy.deepcopy(model.state_dict())
    table = gradient_agreement(model, losses, (x, targets))
    shared = [p for name, p in model.trunk.named_parameters()]
    own = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, shared, retain_graph=True)]) for loss in losses(model(x), targets).values()]
    expected = [torch.cosine_similarity(own[i], own[j], 0).item() for i in range(len(TASKS)) for j in range(i + 1, len(TASKS))]
    assert table.loc["all"].tolist() == pytest.approx(expected, abs=1e-6)
    assert all(p.grad is None for p in model.parameters()) and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_masks_count_over_what_both_tasks_use():
    set_seed(0)
    trunk, draw = mlp().double(), torch.Generator().manual_seed(2)
    masks = {task: {name: torch.rand(p.shape, generator=draw) < .6 for name, p in trunk.named_parameters()} for task in TASKS}
    model, data = SparseSharing(trunk, {t: h.double() for t, h in heads().items()}, masks), batch()
    names = [name for name, _ in model.named_parameters() if name.startswith("trunk")]
    by_hand = cosines(model, data, names, {t: {f"trunk.{name}": m for name, m in own.items()} for t, own in masks.items()})
    table = gradient_agreement(model, LOSSES, data)
    assert table.loc["all"].to_dict() == pytest.approx(by_hand, abs=1e-6)


def test_layers_and_tasks_without_labels():
    set_seed(0)
    model, (x, y) = Hard(mlp().double(), {t: h.double() for t, h in heads().items()}), batch()
    table = gradient_agreement(model, LOSSES, (x, y), layers=True)
    assert list(table.index) == list(dict.fromkeys(n.rpartition(".")[0] for n, _ in model.named_parameters() if n.startswith("trunk")))
    gone = {task: labels if task != TASKS[0] else torch.full_like(labels, -100) for task, labels in y.items()}
    table = gradient_agreement(model, LOSSES, (x, gone))
    assert table.loc["all", [c for c in table if c.startswith(TASKS[0])]].isna().all()
    assert table.loc["all", [c for c in table if TASKS[0] not in c.split(" – ")]].notna().all()


def test_a_record_over_training():
    set_seed(0)
    model, data = Hard(mlp().double(), {t: h.double() for t, h in heads().items()}), batch(12)
    seen = GradientAgreement(model, LOSSES, batch(), every=3)
    with pytest.raises(ValueError, match="a call with a multiple of 3 before"): seen.table()
    fit(model, data, LOSSES.total, epochs=9, after_step=seen, progress=False)
    assert list(seen.table().index.unique("step")) == [3, 6, 9]
    assert len(seen.draw().lines) == len(TASKS) * (len(TASKS) - 1) // 2 + 1
    now = gradient_agreement(model, LOSSES, batch())
    np.testing.assert_allclose(seen.table().loc[9], now)


@pytest.mark.parametrize("model, losses, data, error, message", [
    (nn.Linear(2, 2), LOSSES, batch(), TypeError, "model: a Multitask model is expected"),
    ("hard", {}, batch(), TypeError, "losses: TaskLosses is expected"),
    ("hard", LOSSES, 3, TypeError, "data: a pair of inputs and labels by task is expected"),
    ("single", LOSSES, batch(), ValueError, "model: one with a parameter that trains and serves two tasks is expected, got Single"),
])
def test_agreement_refuses(model, losses, data, error, message):
    if isinstance(model, str): model = {"hard": Hard, "single": Single}[model](mlp().double(), {t: h.double() for t, h in heads().items()})
    for call in (gradient_agreement, GradientAgreement):
        with pytest.raises(error, match=message): call(model, losses, data)


def test_mixing_matrices_are_shared():
    model = CrossStitch(mlp().double(), {t: h.double() for t, h in heads().items()})
    table = gradient_agreement(model, LOSSES, batch(), layers=True)
    assert any("mixing" in name for name in table.index) and table.notna().any().any()


# The summary figure

def test_delta_m_by_hand():
    scores = {"seg": {"iou": 44.}, "depth": {"error": 9., "accuracy": .6}}
    single = {"depth": {"accuracy": .5, "error": 10.}, "seg": {"iou": 40.}}
    assert delta_m(scores, single, ["error"]) == pytest.approx((10 + (10 + 20) / 2) / 2)
    assert delta_m(single, single, True) == 0
    assert delta_m({"a": -4.}, {"a": -5.}) == pytest.approx(20), "scores below zero, as likelihoods are, keep their direction"


def test_delta_m_over_seeds():
    def single(seed): return {"a": 10. + seed, "b": 20.}
    def better(seed): return {"a": 10. + seed - 1 - seed, "b": 22.}
    table = delta_m_over(compare({"single": single, "better": better}, range(3), progress=False), ["a", "b"], lower=["a"])
    gains = [(100 * (1 + s) / 11 + 10) / 2 for s in range(3)]
    assert table.loc["better"].tolist() == pytest.approx(list(paired_interval(gains)))


@pytest.mark.parametrize("scores, single, lower, error, message", [
    ({"a": 1.}, {"b": 1.}, (), ValueError, "single: scores of ['a'] is expected, got ['b']"),
    ({"a": 1.}, {"a": 0.}, (), ValueError, "single['a']: a score other than zero is expected, got 0.0"),
    ({"a": 1.}, {"a": 2.}, ["error"], ValueError, "lower: one of 'a' is expected, got 'error'"),
    ({"a": math.nan}, {"a": 2.}, (), ValueError, "scores['a']: a finite number is expected, got nan"),
    ({}, {}, (), ValueError, "scores: at least one task is expected, got 'none'"),
    ([1.], [1.], (), TypeError, "scores: a dictionary by task is expected"),
    ({"a": 1.}, {"a": 2.}, "a", TypeError, "lower: True, False, or names of scores is expected, got 'a'"),
])
def test_delta_m_refuses(scores, single, lower, error, message):
    with pytest.raises(error) as raised: delta_m(scores, single, lower)
    assert message in str(raised.value)
