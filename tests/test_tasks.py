"Several tasks, one interface: the table of who uses what, inputs by task, labels that are missing, bad input."
import copy
import math

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from schemes import TASKS, mlp, setting
from sharetie.balancing import balancer
from sharetie.results import set_seed
from sharetie.scores import error_rate, evaluate
from sharetie.tasks import (_tied, Hard, Multitask, OwnInputs, Sharing, Single, TaskLosses, checked_trunk, label_counts, missing,
                            pooled, sharing, towers_of)
from sharetie.train import fit
from sharetie.tying import TiePenalty

nan = math.nan


def made(build=Hard, tasks=TASKS):
    set_seed(0)
    return build(mlp(), {task: nn.Linear(8, 2) for task in tasks})


# The model

def test_one_input_runs_the_trunk_once():
    model, calls = made(), []
    model.trunk.register_forward_hook(lambda *_: calls.append(1))
    x, other = torch.ones(2, 6), torch.ones(2, 6)
    model(x); assert len(calls) == 1
    model({"a": x, "c": x}); assert len(calls) == 2
    model({"a": x, "b": other, "c": x}); assert len(calls) == 4


@pytest.mark.parametrize("build", [Hard, Single])
def test_an_unknown_task_is_named(build):
    model = made(build)
    with pytest.raises(ValueError, match="tasks: one of 'a', 'b', 'c' is expected, got 'd'"): model.answer(torch.ones(2, 6), ["d"])
    assert torch.compile(model, backend="eager", fullgraph=True)(torch.ones(2, 6)).keys() == {"a", "b", "c"}
    assert "ModuleDict(" in repr(model) and list(copy.deepcopy(model).heads) == TASKS


def test_a_trunk_may_take_anything():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.layer = nn.Linear(3, 8)
        def forward(self, x): return self.layer(x["left"] + x["right"])
    model = Hard(Two(), {"a": nn.Linear(8, 1), "b": nn.Linear(8, 2)})
    x = {"left": torch.ones(4, 3), "right": torch.zeros(4, 3)}
    assert {t: y.shape[1] for t, y in model({"a": x, "b": x}).items()} == {"a": 1, "b": 2}
    with pytest.raises(ValueError, match="x: one of 'a', 'b' is expected, got 'left'"): model(x)


class Halves(Multitask):
    "A scheme by masks: each task sees its own entries of one vector, and a middle that both see."
    def __init__(self, heads):
        super().__init__(heads)
        self.w = nn.Parameter(torch.ones(6))
        self.masks = {"a": torch.tensor([1, 1, 1, 1, 0, 0]).bool(), "b": torch.tensor([0, 0, 1, 1, 1, 1]).bool()}
    def answer(self, x, tasks): return {t: self.heads[t](x * (self.w * self.masks[t])) for t in tasks}
    def parts(self, task): return [self.heads[task], (self.w, self.masks[task])]


def test_masks_count_entries():
    table = sharing(Halves({"a": nn.Linear(6, 1), "b": nn.Linear(6, 1)}))
    assert table.loc["w", ["stored", "a", "b", "shared"]].tolist() == [6, 4, 4, 2]
    assert table.overlap.values.tolist() == [[11, 2], [2, 11]]
    assert (table.stored, table.shared) == (20, 2)


def test_two_masks_of_one_part_add_up_and_none_covers_all():
    class Twice(Halves):
        def parts(self, task): return [(self.w, self.masks["a"]), (self.w, self.masks["b"])] + ([self.w] if task == "b" else [])
    class Both(Halves):
        def parts(self, task): return [(self.w, self.masks["a"]), (self.w, self.masks["b"])]
    heads = {"a": nn.Identity(), "b": nn.Identity()}
    assert Both(heads).used_by("a")["w"].tolist() == [True] * 6
    assert Twice(heads).used_by("b")["w"] is None


def test_disjoint_masks_share_nothing():
    model = Halves({"a": nn.Identity(), "b": nn.Identity()})
    model.masks["b"] = ~model.masks["a"]
    assert model.shared_parameters() == [] and sharing(model).shared == 0


def test_heads_may_share_a_module():
    head = nn.Linear(8, 2)
    model = Hard(mlp(), {"a": head, "b": head, "c": nn.Linear(8, 2)})
    table = sharing(model)
    assert table.loc["heads.a.weight", ["a", "b", "c", "shared"]].tolist() == [16, 16, 0, 16]
    assert "heads.b.weight" not in table.index and len(model.shared_parameters()) == 6


def test_the_table_is_a_frame_that_draws():
    table = sharing(made())
    assert isinstance(table, Sharing) and isinstance(table, pd.DataFrame)
    assert list(table.columns) == ["stored", *TASKS, "shared", "tied"]
    ax = table.draw()
    assert [t.get_text() for t in ax.get_xticklabels()] == TASKS
    assert len(ax.get_yticklabels()) == len(table)
    assert copy.deepcopy(table).equals(table) and table.head(2).tasks == TASKS


def test_one_task_only():
    for build in (Hard, Single):
        model = made(build, ["a"])
        assert list(model(torch.ones(2, 6))) == ["a"] and model.shared_parameters() == []
        assert sharing(model).overlap.loc["a", "a"] == sharing(model).stored


def test_towers_are_copies_or_redrawn():
    trunk = mlp()
    plain, drawn = towers_of(trunk, ["a", "b"]), towers_of(trunk, ["a", "b"], redraw=True)
    for tower in plain.values(): assert all(torch.equal(p, q) and p is not q for p, q in zip(tower.parameters(), trunk.parameters()))
    assert not torch.equal(drawn["a"][0].weight, drawn["b"][0].weight)
    set_seed(0); a = towers_of(mlp(), ["a"], redraw=True)["a"][0].weight
    set_seed(0); b = towers_of(mlp(), ["a"], redraw=True)["a"][0].weight
    assert torch.equal(a, b)


def test_attention_is_redrawn_and_bare_parameters_are_refused():
    tower = towers_of(nn.MultiheadAttention(8, 2), ["a", "b"], redraw=True)
    assert not torch.equal(tower["a"].in_proj_weight, tower["b"].in_proj_weight)
    class Bare(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="redraw: a reset_parameters in trunk '0' is expected, got Bare"):
        towers_of(nn.Sequential(Bare()), ["a"], redraw=True)
    assert towers_of(nn.Sequential(Bare()), ["a"])["a"][0].w.sum() == 3


# Losses

def test_losses_are_means_over_what_is_there():
    set_seed(0)
    outputs = {"c": torch.randn(6, 3), "r": torch.randn(6)}
    labels = {"c": torch.tensor([0, 1, -100, 2, -100, 0]), "r": torch.tensor([nan, 1., 2., nan, nan, 0.])}
    losses = TaskLosses({"c": F.cross_entropy, "r": F.l1_loss}, {"r": 3})
    found = losses(outputs, labels)
    torch.testing.assert_close(found["c"], F.cross_entropy(outputs["c"], labels["c"]))
    torch.testing.assert_close(found["r"], (outputs["r"] - labels["r"]).abs().nanmean())
    torch.testing.assert_close(losses.total(outputs, labels), found["c"] + 3 * found["r"])
    torch.testing.assert_close(losses.of("r")(outputs, labels), found["r"])


def test_gaps_send_no_gradient_and_no_nan():
    y = torch.randn(4, 2, requires_grad=True)
    labels = torch.tensor([[nan, 1.], [1., 1.], [nan, nan], [0., nan]])
    TaskLosses({"a": F.mse_loss})({"a": y}, {"a": labels})["a"].backward()
    assert torch.equal(y.grad != 0, ~labels.isnan())


def test_whole_rows_keep_their_shape():
    seen = []
    def loss(output, y): seen.append((tuple(output.shape), tuple(y.shape))); return (output - y).sum()
    losses = TaskLosses({"a": loss})
    losses({"a": torch.ones(3, 2)}, {"a": torch.tensor([[1., 1], [nan, nan], [0, 0]])})
    losses({"a": torch.ones(3, 2)}, {"a": torch.tensor([[1., 1], [nan, 1], [0, 0]])})
    losses({"a": torch.ones(3, 2)}, {"a": torch.ones(3, 2)})
    assert seen == [((2, 2), (2, 2)), ((5,), (5,)), ((3, 2), (3, 2))]


def test_tags_of_words():
    out, y = torch.randn(2, 4, 5), torch.tensor([[1, 2, -100, -100], [0, 4, 3, -100]])
    found = TaskLosses({"a": F.cross_entropy})({"a": out}, {"a": y})["a"]
    torch.testing.assert_close(found, F.cross_entropy(out.flatten(0, 1), y.flatten()))
    complete = TaskLosses({"a": F.cross_entropy})({"a": out}, {"a": y.clamp(min=0)})["a"]
    torch.testing.assert_close(complete, F.cross_entropy(out.flatten(0, 1), y.clamp(min=0).flatten()))


def test_classes_on_the_second_axis_stay_there():
    out, y = torch.randn(3, 5, 4), torch.tensor([[1, 2, -100, 0], [-100] * 4, [0, 4, 3, 1]])
    found = TaskLosses({"a": F.cross_entropy})({"a": out}, {"a": y})["a"]
    torch.testing.assert_close(found, F.cross_entropy(out, y))


def test_truth_values_are_always_there():
    y = torch.tensor([True, False])
    assert not missing(y).any()
    found = TaskLosses({"a": lambda o, y: F.binary_cross_entropy_with_logits(o, y.float())})({"a": torch.zeros(2)}, {"a": y})
    torch.testing.assert_close(found["a"], torch.tensor(math.log(2)))


def test_tasks_without_labels_sit_out():
    model, x = setting(lambda t, h, a: Hard(t, h))
    losses = TaskLosses({t: F.mse_loss for t in TASKS})
    outputs = model(x)
    labels = {"a": torch.zeros_like(outputs["a"]), "b": torch.full_like(outputs["b"], nan)}
    found = losses(outputs, labels)
    assert list(found) == ["a"]
    losses.total(outputs, labels).backward()
    assert all(p.grad is None for t in "bc" for p in model.heads[t].parameters())
    model.zero_grad()
    outputs = model(x)
    balancer("pcgrad").backward(losses(outputs, labels), model.shared_parameters())
    assert model.trunk[0].weight.grad.any() and model.heads["b"].weight.grad is None


def test_nan_in_one_task_is_named_by_the_balancer():
    model, x = setting(lambda t, h, a: Hard(t, h))
    losses = TaskLosses({t: F.mse_loss for t in TASKS})
    outputs = model(x)
    outputs["b"] = outputs["b"] * nan
    labels = {t: torch.zeros_like(y) for t, y in outputs.items()}
    with pytest.raises(ValueError, match=r"got nan in \['b'\]"): balancer("nash").backward(losses(outputs, labels), model.shared_parameters())
    outputs = model(x) | {"b": outputs["b"]}
    balancer("nash", on_nan="skip").backward(losses(outputs, labels), model.shared_parameters())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("rest", [(3,), (3, 3)])
def test_classes_on_either_axis_where_both_fit(rest):
    "Three classes of sequences of three and of pictures of 3 × 3."
    y = torch.randint(0, 3, (4, *rest), generator=set_seed(0))
    y[0] = -100
    y[1].flatten()[0] = -100
    second = torch.randn(4, 3, *rest)
    expected = F.cross_entropy(second, y)
    def losses(axis): return TaskLosses({"a": F.cross_entropy}, class_axis=axis)
    with pytest.raises(ValueError, match=r"class_axis: 1 or -1 where both can be the classes of outputs\['a'\]"): losses(None)({"a": second}, {"a": y})
    torch.testing.assert_close(losses(1)({"a": second}, {"a": y})["a"], expected)
    torch.testing.assert_close(losses(-1)({"a": second.movedim(1, -1)}, {"a": y})["a"], expected)


def test_classes_on_an_axis_that_does_not_fit():
    y, last = torch.zeros(4, 5, dtype=torch.long), torch.randn(4, 5, 3)
    fine = TaskLosses({"a": F.cross_entropy})({"a": last}, {"a": y})["a"]
    torch.testing.assert_close(TaskLosses({"a": F.cross_entropy}, class_axis=-1)({"a": last}, {"a": y})["a"], fine)
    torch.testing.assert_close(TaskLosses({"a": F.cross_entropy})({"a": last.mT}, {"a": y})["a"], fine)
    with pytest.raises(ValueError, match=r"outputs\['a'\]: classes on axis 1 beside labels of shape \(4, 5\)"):
        TaskLosses({"a": F.cross_entropy}, class_axis=1)({"a": last}, {"a": y})
    for axis in (0, 2, True, "last"):
        with pytest.raises(ValueError, match="class_axis: 1, -1 or None"): TaskLosses({"a": F.cross_entropy}, class_axis=axis)
    one = torch.zeros(4, dtype=torch.long)
    for axis in (None, 1, -1): TaskLosses({"a": F.cross_entropy}, class_axis=axis)({"a": torch.randn(4, 3)}, {"a": one})


def test_evaluate_by_task():
    model, x = setting(lambda t, h, a: Hard(t, h))
    y = {t: model(x)[t].argmax(1) for t in TASKS}
    y["b"] = torch.tensor([-100, -100, 1, 1, 0])
    wrong = TaskLosses({t: error_rate for t in TASKS})
    scores = evaluate(model, (x, y), {t: wrong.of(t) for t in TASKS})
    right = model(x)["b"][2:].argmax(1) == y["b"][2:]
    assert scores["a"] == scores["c"] == 0 and scores["b"] == pytest.approx(1 - right.double().mean().item())


BAD_LOSSES = {
    "no dictionary": (lambda: TaskLosses([F.mse_loss]), TypeError, "losses: a dictionary by task"),
    "nothing": (lambda: TaskLosses({}), ValueError, "losses: at least one task"),
    "no function": (lambda: TaskLosses({"a": 1}), TypeError, r"losses\['a'\]: a function"),
    "unknown weight": (lambda: TaskLosses({"abc": F.mse_loss}, {"abd": 1}), ValueError, "weights: one of 'abc' is expected, got 'abd'; did you mean 'abc'"),
    "negative weight": (lambda: TaskLosses({"a": F.mse_loss}, {"a": -1}), ValueError, r"weights\['a'\]"),
    "NaN weight": (lambda: TaskLosses({"a": F.mse_loss}, {"a": nan}), ValueError, r"weights\['a'\]"),
    "unknown labels": (lambda: call({"b": torch.ones(2)}), ValueError, "labels: one of 'a' is expected, got 'b'"),
    "no output": (lambda: TaskLosses({"a": F.mse_loss, "b": F.mse_loss})({"a": torch.ones(2)}, {"b": torch.ones(2)}), ValueError, r"outputs: one of 'b', which has labels, is expected, got \['a'\]"),
    "a tensor of outputs": (lambda: TaskLosses({"a": F.mse_loss})(torch.ones(2), {"a": torch.ones(2)}), TypeError, "outputs: a dictionary by task is expected, got Tensor"),
    "no label": (lambda: call({"a": torch.full((2,), nan)}), ValueError, r"labels: a label for at least one of \['a'\] is expected"),
    "no labels": (lambda: call({}), ValueError, "labels: a label for at least one of"),
    "column and row": (lambda: call({"a": torch.ones(2)}, torch.ones(2, 1)), ValueError, r"labels\['a'\]: the shape of the outputs, \(2, 1\), is expected, got \(2,\)"),
    "too few": (lambda: call({"a": torch.ones(3)}), ValueError, r"labels\['a'\]: a label for each row of outputs of shape \(2,\) is expected, got \(3,\)"),
    "labels in a list": (lambda: call({"a": [1, 2]}), TypeError, r"labels\['a'\]: a tensor"),
    "output in a tuple": (lambda: call({"a": torch.ones(2)}, (torch.ones(2),)), TypeError, r"outputs\['a'\]: a tensor is expected, got tuple"),
    "not a scalar": (lambda: TaskLosses({"a": lambda o, y: o - y})({"a": torch.ones(2)}, {"a": torch.ones(2)}), ValueError, r"losses\['a'\]: a function to a scalar tensor is expected, got \(2,\)"),
    "a float": (lambda: TaskLosses({"a": lambda o, y: 0.})({"a": torch.ones(2)}, {"a": torch.ones(2)}), ValueError, r"losses\['a'\]: a function to a scalar tensor is expected, got float"),
    "of another task": (lambda: TaskLosses({"a": F.mse_loss}).of("b"), ValueError, "task: one of 'a'"),
    "never labeled": (lambda: label_counts({"a": torch.ones(2), "b": torch.full((2,), -100)}), ValueError, r"a label for every task is expected, got \"none for \['b'\]\""),
    "never anything": (lambda: label_counts({}), ValueError, "labels: a label for every task")}


def call(labels, output=None): return TaskLosses({"a": F.mse_loss})({"a": torch.ones(2) if output is None else output}, labels)


@pytest.mark.parametrize("name", BAD_LOSSES)
def test_bad_losses(name):
    f, error, message = BAD_LOSSES[name]
    with pytest.raises(error, match=message): f()


# Data

def test_pooled_keeps_every_example():
    data = {"a": (torch.ones(2, 3), torch.tensor([0, 1])), "b": (2 * torch.ones(1, 3), torch.tensor([[.5, 1.]]))}
    x, y = pooled(data)
    assert x[:, 0].tolist() == [1, 1, 2] and y["a"].tolist() == [0, 1, -100]
    assert y["b"].isnan().tolist() == [[True, True], [True, True], [False, False]]
    assert label_counts(y) == {"a": 2, "b": 2}


def test_pooled_data_train_each_head_on_its_own():
    x = {t: torch.randn(4, 6, generator=set_seed(i)) for i, t in enumerate("ab")}
    data = pooled({t: (x[t], torch.zeros(4, 2)) for t in "ab"})
    model = made(tasks=["a", "b"])
    losses = TaskLosses({t: F.mse_loss for t in "ab"})
    apart = losses(model(x), {t: torch.zeros(4, 2) for t in "ab"})
    for task, loss in losses(model(data.x), data.y).items(): torch.testing.assert_close(loss, apart[task])
    assert len(fit(model, data, losses.total, batch_size=3, epochs=2, progress=False)) == 2


def test_own_inputs_go_through_a_loader_and_fit():
    data = {"a": (torch.randn(5, 6), torch.zeros(5, 2)), "b": (torch.randn(2, 6), torch.ones(2, 2))}
    own = OwnInputs(data)
    assert len(own) == 5 and torch.equal(own[3][0]["b"], data["b"][0][1]) and torch.equal(own[-1][0]["a"], data["a"][0][4])
    loader = DataLoader(own, 2, shuffle=True)
    x, y = next(iter(loader))
    assert {t: tuple(v.shape) for t, v in x.items()} == {"a": (2, 6), "b": (2, 6)} and list(y) == ["a", "b"]
    model = made(tasks=["a", "b", "c"])
    losses = TaskLosses({t: F.mse_loss for t in "abc"})
    runs = [fit(copy.deepcopy(model), loader, losses.total, epochs=3, progress=False)["train_loss"].tolist() for _ in range(2)]
    assert runs[0] == runs[1] and runs[0][-1] < runs[0][0]
    with pytest.raises(IndexError): own[5]
    with pytest.raises(TypeError, match="i: a whole number is expected, got slice"): own[0:2]


BAD_DATA = {
    "a pair": (lambda f: f((torch.ones(2), torch.ones(2))), TypeError, r"data: a dictionary of pairs \(x, y\) by task"),
    "nothing": (lambda f: f({}), ValueError, "data: at least one task"),
    "one tensor": (lambda f: f({"a": torch.ones(2)}), TypeError, r"data\['a'\]: a pair of tensors"),
    "no axis": (lambda f: f({"a": (torch.ones(()), torch.ones(()))}), TypeError, r"data\['a'\]: a pair of tensors"),
    "other lengths": (lambda f: f({"a": (torch.ones(2), torch.ones(3))}), ValueError, r"data\['a'\]: as many labels as inputs is expected, got \(2, 3\)"),
    "no examples": (lambda f: f({"a": (torch.ones(0), torch.ones(0))}), ValueError, r"data\['a'\]: as many labels as inputs")}


@pytest.mark.parametrize("f", [pooled, OwnInputs])
@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(name, f):
    call, error, message = BAD_DATA[name]
    with pytest.raises(error, match=message): call(f)


def test_bad_pools():
    x, y = torch.ones(2, 3), torch.ones(2)
    with pytest.raises(ValueError, match="data: inputs of one shape and type is expected"): pooled({"a": (x, y), "b": (x[:, :2], y)})
    with pytest.raises(ValueError, match="inputs of one shape and type"): pooled({"a": (x, y), "b": (x.double(), y)})
    with pytest.raises(TypeError, match="labels that can be missing"): pooled({"a": (x, y > 0)})
    with pytest.raises(TypeError, match="whole numbers with a sign"): pooled({"a": (x, y.byte())})
    assert pooled({"a": (x, y.char()), "b": (x, y)}).y["a"].tolist() == [1, 1, -100, -100]


# Bad models

BAD_MODELS = {
    "a list of heads": (lambda: Hard(mlp(), [nn.Linear(8, 1)]), TypeError, "heads: a dictionary of modules by task"),
    "no heads": (lambda: Single(mlp(), {}), ValueError, "heads: at least one task"),
    "a function": (lambda: Hard(mlp(), {"a": torch.tanh}), TypeError, r"heads\['a'\]: a module is expected"),
    "a number for a name": (lambda: Hard(mlp(), {1: nn.Linear(8, 1)}), TypeError, "heads: text for a task's name is expected, got 1"),
    "a dot": (lambda: Hard(mlp(), {"a.b": nn.Linear(8, 1)}), ValueError, "heads: a task's name without dots"),
    "an attribute": (lambda: Hard(mlp(), {"items": nn.Linear(8, 1)}), ValueError, "heads: a task's name"),
    "a column": (lambda: Hard(mlp(), {"stored": nn.Linear(8, 1)}), ValueError, "heads: a task's name"),
    "no name": (lambda: Hard(mlp(), {"": nn.Linear(8, 1)}), ValueError, "heads: a task's name"),
    "a trunk that is a function": (lambda: Hard(torch.tanh, {"a": nn.Linear(8, 1)}), TypeError, "trunk: a module is expected"),
    "a lazy trunk": (lambda: Single(nn.LazyLinear(8), {"a": nn.Linear(8, 1)}), ValueError, r"trunk: a module with values \(send a batch through it first\) is expected"),
    "a class": (lambda: checked_trunk(nn.Linear), TypeError, "trunk: a module is expected"),
    "redraw is a number": (lambda: Single(mlp(), {"a": nn.Linear(8, 1)}, redraw=1), TypeError, "redraw: True or False"),
    "a table of another model": (lambda: sharing(nn.Linear(2, 2)), TypeError, "model: a Multitask model is expected, got Linear"),
    "task that is no text": (lambda: made().used_by(0), TypeError, "task: one of 'a', 'b', 'c'"),
    "input for nobody": (lambda: made()({}), ValueError, "x: an input for one of")}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models(name):
    f, error, message = BAD_MODELS[name]
    with pytest.raises(error, match=message): f()


def test_of_several_ties_of_a_weight_the_strongest_is_shown():
    a, b, c = (nn.Parameter(torch.full((2,), float(i))) for i in range(3))
    penalty = TiePenalty([[a, b], [b, c]], strength={"groups[0]": .3, "groups[1]": 0.})
    assert _tied(penalty) == {id(a): .3, id(b): .3, id(c): 0}
