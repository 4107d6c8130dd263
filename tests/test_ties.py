"""What ties live through (the matrix), and what changes a tied model: groups, shards, functions, replacing, resizing.

Rows are those of the list of what breaks ties in PyTorch; each test of a row shows what goes wrong without our code.
"""
import copy
import json
import pickle
import warnings

import matrix
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, stack_module_state
from torch.nn.utils import prune

import sharetie.ties
from sharetie import groups, surgery
from sharetie.ties import (NO_DECAY, BrokenTie, Transpose, apply_once, check_ties, declared_ties, ensemble, find_ties, functional,
                           param_groups, replace_modules, resize_, share_module_, skeleton, tie_, tie_groups, untie_)


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


# The matrix

def committed():
    "The outcomes in the repository, by column, row and how."
    return json.loads((matrix.MADE / "ties_matrix.json").read_text(encoding="utf-8"))["measured"]


def check_column(name, found):
    "Every cell ends as the book says, and no cell is silent."
    assert found == committed()[name], "run python tests/matrix.py"
    for cells in found.values():
        assert {*cells.values()} <= {*matrix.OUTCOMES}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (name in ("torch.compile", "torch.export")))
                                  for name in matrix.COLUMNS if name not in matrix.DISTRIBUTED])
def test_matrix(name): check_column(name, matrix.outcomes(name))


@pytest.mark.long
def test_matrix_on_two_processes():
    for name, found in matrix.distributed().items(): check_column(name, found)


def test_matrix_has_every_cell():
    assert committed().keys() == matrix.COLUMNS.keys()
    for column in committed().values(): assert column.keys() == matrix.BY_NAME.keys()


def test_matrix_tells_a_broken_tie_from_a_living_one():
    cell = matrix.Cell(matrix.BY_NAME["two names"], False)
    model = cell.make()
    assert cell.alive(model)
    model.heads[0].weight = nn.Parameter(model.heads[0].weight.detach().clone())
    assert not cell.alive(model) and matrix.found(cell, model)
    assert not matrix.Cell(matrix.BY_NAME["pseudo: one memory"], False).alive(matrix.BY_NAME["pseudo: one memory"].tied())


def test_matrix_reports_what_stays_silent(monkeypatch):
    def break_quietly(cell, model):
        model.heads[0].weight = nn.Parameter(model.heads[0].weight.detach().clone())
        model._declared_ties = ()
        return model
    monkeypatch.setitem(matrix.COLUMNS, "quiet", break_quietly)
    with pytest.raises(AssertionError, match="SILENT"): matrix.outcome(matrix.BY_NAME["two names"], "quiet")


@pytest.mark.slow
def test_row_26_inductor_keeps_ties():
    model, x = matrix.Cell(matrix.BY_NAME["two names"], True).make(), matrix.BY_NAME["two names"].input()
    matrix.loss(torch.compile(model), x).backward()
    reference = matrix.Reference(matrix.BY_NAME["two names"], model)
    reference.backward(x)
    reference.compare(model, grad=True)


def test_row_26_a_tie_after_compile_is_seen():
    row = matrix.BY_NAME["two names"]
    model, x = row.untied(), row.input()
    compiled = torch.compile(model, backend="eager")
    before = compiled(x)
    tie_(model, row.ties[0])
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.equal(before, compiled(x))


@pytest.mark.gpu
def test_ties_live_through_a_move_to_the_gpu_and_back():
    for row in matrix.ROWS:
        cell = matrix.Cell(row, True)
        model = cell.make().cuda()
        assert cell.alive(model) and next(model.parameters()).is_cuda
        assert cell.alive(model.cpu())


# Exports

def test_ties_offers_the_names_of_all_its_chapters():
    from sharetie import binding, duplicates, finding, saving
    wanted = {name for module in (binding, duplicates, finding, groups, saving) for name in module.__all__}
    assert wanted | {"apply_once", "replace_modules", "resize_"} == {*sharetie.ties.__all__}
    for name in sharetie.ties.__all__: assert hasattr(sharetie.ties, name), name


# Models

class Words(nn.Module):
    def __init__(self, v=7, d=4, padding=None):
        super().__init__()
        self.tok, self.norm, self.body, self.head = nn.Embedding(v, d, padding_idx=padding), nn.LayerNorm(d), nn.Linear(d, d), nn.Linear(d, v)

    def forward(self, x): return self.head(self.norm(self.body(self.tok(x))).tanh())


def words(**options):
    model = Words(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tie_(model, ["tok.weight", "head.weight"])
    return model


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = self.again = nn.Linear(3, 3)

    def forward(self, x): return self.again(self.first(x).tanh())


class Deep(nn.Module):
    "A layer shared by two submodules."
    def __init__(self):
        super().__init__()
        shared = nn.Linear(3, 3)
        self.a, self.b = nn.Sequential(shared, nn.Tanh()), nn.Sequential(shared)

    def forward(self, x): return self.b(self.a(x))


def coder():
    model = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 6))
    tie_(model, ["0.weight", "2.weight"], map=Transpose())
    return model


def pseudo():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight.data = model[0].weight.data
    return model


X, T = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([[1, 2, 3], [4, 5, 6]])


# Row 7: optimizers

def test_row_7_each_parameter_once_and_every_name_counts():
    model = words()
    with pytest.raises(ValueError, match=r"tok.weight \(Embedding\) asks for .*0.0.*, and head.weight \(Linear\), the same weight, for .*0.1"):
        param_groups(model, weight_decay=0.1)
    made = param_groups(model, {"head.weight": {"weight_decay": 0.0}, **NO_DECAY}, weight_decay=0.1)
    assert [(g["param_names"], g["weight_decay"]) for g in made] == [
        (["tok.weight"], 0.0), (["norm.weight", "norm.bias", "body.bias", "head.bias"], 0.0), (["body.weight"], 0.1)]
    listed = [p for g in made for p in g["params"]]
    assert len(listed) == len({*listed}) and {*listed} == {*model.parameters()}


def test_row_7_names_outrank_patterns_and_patterns_outrank_types():
    model = words()
    rules = {nn.Linear: {"lr": 1.0}, "*.weight": {"lr": 2.0}, "body.weight": {"lr": 3.0}, nn.Embedding: {"lr": 4.0}}
    rate = {n: g["lr"] for g in param_groups(model, rules, lr=0.5) for n in g["param_names"]}
    assert rate == {"tok.weight": 2.0, "norm.weight": 2.0, "norm.bias": 0.5, "body.weight": 3.0, "body.bias": 1.0, "head.bias": 1.0}


def test_row_7_two_patterns_that_disagree():
    with pytest.raises(ValueError, match="tok.weight .*head.weight"): param_groups(words(), {"tok.*": {"lr": 1.0}, "head.*": {"lr": 2.0}})
    same = param_groups(words(), {"tok.*": {"lr": 1.0}, "head.*": {"lr": 1.0}}, lr=0.1)
    assert "tok.weight" in same[0]["param_names"]


def test_row_7_optimizers_take_the_groups_and_keep_their_names():
    groups = param_groups(words(), {"tok.weight": {"weight_decay": 0.0}, **NO_DECAY}, weight_decay=0.1)
    state = torch.optim.AdamW(groups, lr=0.01).state_dict()
    assert [g["param_names"] for g in state["param_groups"]] == [g["param_names"] for g in groups]


def test_row_7_parametrized_weights_have_the_type_of_their_layer():
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.LayerNorm(3))
    made = param_groups(model, weight_decay=0.1)
    assert [g["weight_decay"] for g in made] == [0.0, 0.1]
    assert made[1]["param_names"] == ["0.parametrizations.weight.original0", "0.parametrizations.weight.original1"]
    named = param_groups(model, {"0.weight": {"lr": 1.0}}, lr=0.1)
    assert len(named[0]["params"]) == 2


def test_row_7_a_transposed_tie_has_one_group():
    model = coder()
    made = param_groups(model, {"2.weight": {"lr": 1.0}}, lr=0.1)
    assert made[0]["params"] == [model[0].weight]


def test_row_7_frozen_parameters_are_left_out():
    model = words()
    model.tok.weight.requires_grad_(False)
    assert "tok.weight" not in [n for g in param_groups(model, {}) for n in g["param_names"]]
    for p in model.parameters(): p.requires_grad_(False)
    with pytest.raises(ValueError, match="trained parameters"): param_groups(model, {})


def test_row_6_an_optimizer_of_a_pseudo_tie_is_refused():
    with pytest.raises(ValueError, match="0.weight and 1.weight are several tensors over one memory"): param_groups(pseudo())


@pytest.mark.parametrize("rules, error, says", [
    ({"tok.wight": {}}, ValueError, "nearest is 'tok.weight'"), ({nn.Conv1d: {}}, ValueError, "Conv1d"),
    ({3: {}}, TypeError, "key"), ({"tok.weight": 0.1}, TypeError, "dictionary of options"), ([("tok.weight", {})], TypeError, "dictionary"),
    ({lambda n, t: True}, TypeError, "rules: a dictionary is expected"), (None, TypeError, "rules: a dictionary is expected"),
    ({lambda name: True: {"lr": 1.0}}, TypeError, r"rules: a function of \(name, tensor\) is expected"), ({"*": {5: 1}}, TypeError, "rules.*: a dictionary of options by name is expected"),
    ({"*": {"params": []}}, ValueError, r"rules\['\*'\]: a dictionary without 'params' and 'param_names' is expected, got {'params': \[\]}"),
    ({"*": {"param_names": []}}, ValueError, "a dictionary without 'params' and 'param_names'")])
def test_param_groups_refuses_bad_rules(rules, error, says):
    with pytest.raises(error, match=says): param_groups(words(), rules)


def test_param_groups_never_writes_into_what_it_is_given():
    mine = {"params": [1]}
    with pytest.raises(ValueError, match="params"): param_groups(words(), {"*": mine})
    with pytest.raises(ValueError, match="default: a dictionary without 'params'"): param_groups(words(), {}, params=[1])
    assert mine == {"params": [1]}
    rules = {"*": {"betas": [0.9, 0.99]}}
    first, = param_groups(words(), rules)
    first["lr"], first["betas"] = 1.0, None
    assert rules == {"*": {"betas": [0.9, 0.99]}}


def test_param_groups_without_a_decay_says_what_the_other_name_gets():
    with pytest.raises(ValueError, match=r"tok.weight \(Embedding\) asks for {'weight_decay': 0.0}, and head.weight \(Linear\), the same weight, for the optimizer's own options; a rule for one name decides"):
        param_groups(words())


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=5), st.lists(st.booleans(), min_size=6, max_size=6))
@settings(deadline=None, max_examples=30)
def test_param_groups_lists_every_trained_parameter_once(pairs, trained):
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(6)))
    for layer, fine in zip(model, trained): layer.weight.requires_grad_(fine)
    for a, b in pairs: model[b].weight = model[a].weight
    listed = [p for g in param_groups(model, {"0.*": {"lr": 1.0}, "*.bias": {"lr": 1.0}, "0.weight": {"lr": 1.0}, "*": {"lr": 1.0}}) for p in g["params"]]
    assert len(listed) == len({*listed}) and {*listed} == {p for p in model.parameters() if p.requires_grad}


# Row 5: shards

@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_row_5_fsdp2_takes_the_groups_and_nothing_smaller(one_process):
    model = words()
    with pytest.raises(ValueError, match="shared"):
        for part in (model.tok, model.head, model): fully_shard(part)
        model(T)
    model = words()
    for group in tie_groups(model): fully_shard([*group.values()])
    fully_shard(model)(T).sum().backward()
    assert model.tok.weight is model.head.weight and check_ties(model)


def test_row_5_groups_merge_the_units_that_share():
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(5)), "out": nn.Linear(2, 2)})
    tie_(model, ["blocks.0.0.weight", "blocks.3.1.weight"])
    tie_(model, ["blocks.3.0.weight", "blocks.4.0.weight"])
    tie_(model, ["blocks.2.0.weight", "out.weight"])
    names = [[*group] for group in tie_groups(model, "blocks.?")]
    assert names == [["blocks.0", "blocks.3", "blocks.4"], ["blocks.1"], ["blocks.2", "out"]]
    assert [[*group] for group in tie_groups(model, nn.Sequential)] == names
    assert [[*group] for group in tie_groups(model)] == [["blocks.0.0", "blocks.3.1"], ["blocks.2.0", "out"], ["blocks.3.0", "blocks.4.0"]]
    assert tie_groups(model)[0]["blocks.0.0"] is model["blocks"][0][0]


def test_row_5_a_tie_inside_one_unit_or_one_module_needs_no_group():
    assert tie_groups(Twice()) == []
    assert [[*group] for group in tie_groups(Deep(), ("a", "b"))] == [["a", "b"]], "a layer of two units joins them"
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    tie_(model, ["0.0.weight", "0.1.weight"])
    assert [[*group] for group in tie_groups(model, "0")] == [["0"]]


def test_row_5_a_group_with_the_root_is_the_root():
    model = nn.Linear(3, 3)
    model.inner = nn.Linear(3, 3)
    model.inner.weight = model.weight
    assert [[*group] for group in tie_groups(model)] == [[""]]


def test_row_5_parametrized_layers_are_named_by_the_layer():
    assert [[*group] for group in tie_groups(coder())] == [["0", "2"]]


def test_tie_groups_refuses_bad_input():
    with pytest.raises(ValueError, match="they begin with .'tok'"): tie_groups(words(), "blocks.?")
    with pytest.raises(ValueError, match="one memory"): tie_groups(pseudo())
    with pytest.raises(TypeError, match="module"): tie_groups([words()])


# Row 9: functions and ensembles

def test_row_9_functional_call_damages_and_functional_does_not():
    damaged = Twice()
    functional_call(damaged, {name: p * 2 for name, p in damaged.named_parameters()}, X)
    assert not isinstance(damaged.first.weight, nn.Parameter), "PyTorch mended this: shorten the chapter"
    for model in (Twice(), Deep(), words(), coder()):
        call, params = functional(model)
        before, x = {name: (p, p.clone()) for name, p in params.items()}, T if isinstance(model, Words) else X if not isinstance(model, nn.Sequential) else torch.randn(2, 6)
        out = call({name: p * 2 for name, p in params.items()}, x)
        with torch.no_grad():
            for p in model.parameters(): p *= 2
        torch.testing.assert_close(out, model(x))
        for name, p in model.named_parameters(): assert p is before[name][0] and isinstance(p, nn.Parameter)


def test_row_9_gradients_are_sums_over_uses():
    model = words()
    call, params = functional(model)
    grads = torch.func.grad(lambda values: call(values, T).logsumexp(-1).sum())(params)
    model(T).logsumexp(-1).sum().backward()
    assert grads.keys() == dict(model.named_parameters()).keys()
    torch.testing.assert_close(grads, {name: p.grad for name, p in model.named_parameters()})


def test_row_9_jacobians_and_compile():
    model = Twice()
    call, params = functional(model)
    jacobian = torch.func.jacrev(lambda w: call({"again.weight": w}, X[0]))(params["first.weight"])
    numeric = torch.autograd.functional.jacobian(lambda w: call({"first.weight": w}, X[0]), params["first.weight"])
    torch.testing.assert_close(jacobian, numeric)
    compiled = torch.compile(lambda values, x: call(values, x), backend="eager")
    torch.testing.assert_close(compiled(params, X), model(X))


def test_row_9_an_error_in_the_call_leaves_the_model():
    model = Twice()
    weight = model.first.weight
    with pytest.raises(RuntimeError): functional(model)[0]({"first.weight": torch.zeros(3, 3)}, X[:, :2])
    assert model.first.weight is weight and model.again is model.first


def test_row_9_the_meta_recipe_is_wrong_and_ensemble_is_right():
    models = [words() for _ in range(3)]
    right = torch.stack([model(T) for model in models])
    base = copy.deepcopy(models[0]).to("meta")
    try: wrong = torch.vmap(lambda p, b: functional_call(base, (p, b), (T,)))(*stack_module_state(models))
    except (RuntimeError, NotImplementedError): wrong = torch.zeros_like(right)
    assert not torch.allclose(wrong, right)
    call, params, buffers = ensemble(models)
    torch.testing.assert_close(torch.vmap(lambda p, b: call({**p, **b}, T))(params, buffers), right)
    assert params.keys() == dict(models[0].named_parameters()).keys() and all(p.requires_grad for p in params.values())


def test_row_9_an_ensemble_trains_as_its_models_do():
    models = [words() for _ in range(2)]
    call, params, _ = ensemble(models)
    torch.vmap(lambda p: call(p, T).logsumexp(-1).sum())(params).sum().backward()
    for i, model in enumerate(models):
        model(T).logsumexp(-1).sum().backward()
        for name, p in model.named_parameters(): torch.testing.assert_close(params[name].grad[i], p.grad)


def test_row_9_ensembles_of_models_with_buffers():
    models = [nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval() for _ in range(2)]
    for model in models: model[1].running_mean.normal_()
    call, params, buffers = ensemble(models)
    torch.testing.assert_close(torch.vmap(lambda p, b: call({**p, **b}, X))(params, buffers), torch.stack([m(X) for m in models]))


def test_skeletons_have_ties_and_no_memory():
    for model in (words(), coder(), Deep()):
        bare = skeleton(model)
        assert all(p.is_meta for p in bare.parameters())
        assert [tie.names for tie in find_ties(bare)] == [tie.names for tie in find_ties(model)]
        assert declared_ties(bare) and check_ties(bare) if declared_ties(model) else True
        assert not any(p.is_meta for p in model.parameters())


def test_functional_refuses_bad_input():
    call, params = functional(words())
    with pytest.raises(ValueError, match="nearest is 'tok.weight'"): call({"tok.wieght": params["tok.weight"]}, T)
    with pytest.raises(ValueError, match="one weight, got two values"): call({"tok.weight": torch.zeros(7, 4), "head.weight": torch.ones(7, 4)}, T)
    with pytest.raises(ValueError, match="one memory"): functional(pseudo())
    for wrong in (5, None, [1], "tok.weight", torch.ones(2)):
        with pytest.raises(TypeError, match="values: a dictionary of tensors by name is expected, got"): call(wrong, T)
    for name in ("tok.weight", "head.weight", "norm.weight"):
        with pytest.raises(ValueError, match=rf"values\['{name}'\]: a tensor of shape .* is expected, got \(3,\)"): call({name: torch.ones(3)}, T)
    with pytest.raises(TypeError, match=r"values\['tok.weight'\]: a tensor is expected, got 3"): call({"tok.weight": 3}, T)
    with pytest.raises(TypeError, match="values: a name"): call({5: params["tok.weight"]}, T)
    with pytest.raises(TypeError, match="module"): functional(3)


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok, self.head = nn.Embedding(7, 4), nn.LazyLinear(7, bias=False)

    def forward(self, x): return self.head(self.tok(x))


@pytest.mark.parametrize("call", [functional, skeleton, lambda m: ensemble([m]), lambda m: apply_once(m, lambda t: t * 2), lambda m: resize_(m, "head.weight", 9),
                                  lambda m: resize_(m, "tok.weight", 9)], ids=["functional", "skeleton", "ensemble", "apply_once", "resize_", "resize_ another"])
def test_lazy_modules_are_named(call):
    model = Lazy()
    with pytest.raises(ValueError, match="head.weight: a tensor with a shape is expected, got one of a lazy module; call the model once first"): call(model)
    assert param_groups(model, {}) and tie_groups(model) == [] and apply_once(model, lambda m: None, to="modules") is model
    model(T)
    call(model)


@pytest.mark.parametrize("others, says", [
    ([], "at least one"), ([Words()], "ties"), ([nn.Linear(2, 2)], "type"), ([words().eval()], "mode"), ([words(v=8)], "shapes")])
def test_ensemble_refuses_models_that_differ(others, says):
    with pytest.raises(ValueError, match=says): ensemble([words(), *others] if others else [])


# Row 18: replacing modules

def same_linear(old):
    new = nn.Linear(old.in_features, old.out_features, old.bias is not None)
    new.load_state_dict(old.state_dict())
    return new


def test_row_18_every_alias_is_replaced_once_and_ties_stay():
    for model, x in ((Deep(), X), (words(), T)):
        seen, before = [], model(x)
        names = [tie.names for tie in find_ties(model)]
        replace_modules(model, nn.Linear, lambda old: seen.append(old) or same_linear(old))
        assert len(seen) == len({*seen}) and not any(m in seen for m in model.modules())
        torch.testing.assert_close(model(x), before)
        assert [tie.names for tie in find_ties(model)] == names


def test_row_18_a_loop_misses_the_alias():
    model = Deep()
    for name, module in [*model.named_modules()]:
        if isinstance(module, nn.Linear): model.set_submodule(name, same_linear(module))
    assert model.a[0] is not model.b[0]


def test_row_18_one_name_replaces_the_module_under_all():
    model = replace_modules(Deep(), "b.0", same_linear)
    assert model.a[0] is model.b[0]


def test_row_18_a_tie_that_would_break_is_refused_and_nothing_changes():
    model = words()
    head, weight = model.head, model.tok.weight
    for make in (lambda old: nn.Linear(4, 7), lambda old: nn.Linear(4, 8), lambda old: nn.Identity()):
        with pytest.raises(ValueError, match="keeps the tie of tok.weight and head.weight"): replace_modules(model, "head", make)
        assert model.head is head and head.weight is weight
    replace_modules(model, "head", lambda old: nn.Linear(4, 7), on_conflict="first")
    assert model.head is not head and model.head.weight is weight and check_ties(model)
    replace_modules(model, "head", lambda old: nn.Linear(4, 7), on_conflict="untie")
    assert model.head.weight is not weight and not declared_ties(model) and not find_ties(model)


def test_row_18_declared_ties_follow_to_new_names():
    class Wrapped(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x): return self.base(x)
    model = replace_modules(words(), "head", Wrapped)
    assert declared_ties(model)[0].names == ("tok.weight", "head.base.weight")
    check_ties(model)
    twice = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    share_module_(twice, ["0", "1"])
    check_ties(replace_modules(twice, nn.Linear, Wrapped))
    mapped = replace_modules(coder(), "2", Wrapped)
    assert declared_ties(mapped)[0].names == ("0.weight", "2.base.weight") and check_ties(mapped)


def mapped_three():
    "An embedding, a head that is it, and two layers that are its transpose."
    model = nn.ModuleDict({"tok": nn.Embedding(7, 4), "head": nn.Linear(4, 7), "a": nn.Linear(7, 4), "b": nn.Linear(7, 4)})
    tie_(model, ["tok.weight", "head.weight"])
    tie_(model, ["tok.weight", "a.weight", "b.weight"], map=Transpose())
    return model


def test_row_18_members_of_a_source_that_is_untied_follow_its_heir():
    model = replace_modules(mapped_three(), "tok", lambda old: nn.Embedding(7, 4), on_conflict="untie")
    assert [d.names for d in declared_ties(model)] == [("head.weight", "a.weight", "b.weight")] and check_ties(model)
    with torch.no_grad(): model.head.weight.fill_(3)
    assert (model.a.weight == 3).all() and not (model.tok.weight == 3).any()
    part = nn.ModuleDict({"part": mapped_three(), "out": nn.Linear(4, 7)})
    tie_(part, ["part.head.weight", "out.weight"])
    replace_modules(part, ("part.tok", "part.head"), lambda old: type(old)(*old.weight.shape[::1 if isinstance(old, nn.Embedding) else -1]), on_conflict="untie")
    assert [d.names for d in declared_ties(part)] == [("out.weight", "part.a.weight", "part.b.weight")] and check_ties(part)


def test_row_18_the_only_source_of_members_is_not_untied():
    model = mapped_three()
    untie_(model, "head.weight")
    tok, names = model.tok, [d.names for d in declared_ties(model)]
    with pytest.raises(ValueError, match=r"tok.weight is the source of \['a.weight', 'b.weight'\]; untie_ those members first"):
        replace_modules(model, "tok", lambda old: nn.Embedding(7, 4), on_conflict="untie")
    assert model.tok is tok and [d.names for d in declared_ties(model)] == names and check_ties(model)
    replace_modules(model, "a", lambda old: nn.Linear(7, 4), on_conflict="untie")
    assert [d.names for d in declared_ties(model)] == [("tok.weight", "b.weight")] and check_ties(model)
    both = replace_modules(model, ("tok", "b"), lambda old: type(old)(7, 4), on_conflict="untie")
    assert not declared_ties(both) and not find_ties(both)


def test_row_18_declarations_inside_of_a_replaced_module_are_kept():
    model = nn.ModuleDict({"block": words(), "out": nn.Linear(7, 7)})
    new = copy.deepcopy(model.block)
    new.__dict__.pop("_declared_ties")
    replace_modules(model, "block", lambda old: new)
    assert [d.names for d in declared_ties(model)] == [("block.tok.weight", "block.head.weight")]
    model.block.head.weight = nn.Parameter(model.block.head.weight.detach() + 1)
    with pytest.raises(BrokenTie): check_ties(model)


def test_row_19_the_mask_of_a_replaced_head_is_put_on_the_new_one():
    def masked():
        model = Words(padding=0)
        tie_(model, ["tok.weight", "head.weight"], padding="mask")
        return model
    model = replace_modules(masked(), "head", same_linear)
    assert model(T)[..., 0].eq(-torch.inf).all() and len(model.head._forward_hooks) == 1
    untie_(model, "head.weight")
    assert model(T).isfinite().all()
    for name in ("head", "tok"):
        model = replace_modules(masked(), name, lambda old: nn.Linear(4, 7) if name == "head" else nn.Embedding(7, 4), on_conflict="untie")
        assert model(T).isfinite().all()


def test_row_18_new_modules_get_the_mode_of_the_old():
    model = words().eval()
    assert not replace_modules(model, "body", same_linear).body.training


def test_row_18_what_is_inside_a_replaced_module_goes_with_it():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    seen = []
    replace_modules(model, ("0", nn.Linear), lambda old: seen.append(old) or nn.Identity())
    assert [type(m).__name__ for m in seen] == ["Sequential", "Linear"]


@pytest.mark.parametrize("which, make, error, says", [
    ("haed", same_linear, ValueError, "nearest is 'head'"), (nn.Conv1d, same_linear, ValueError, "Conv1d"), (3, same_linear, TypeError, "which"),
    ((), same_linear, ValueError, "which"), ("head", lambda old: None, TypeError, "make"), ("head", 3, TypeError, "make"), ("head", lambda: 3, TypeError, "make")])
def test_replace_modules_refuses_bad_input(which, make, error, says):
    model = words()
    head = model.head
    with pytest.raises(error, match=says): replace_modules(model, which, make)
    assert model.head is head
    with pytest.raises(ValueError, match="on_conflict"): replace_modules(model, "head", same_linear, on_conflict="last")
    with pytest.raises(ValueError, match="one memory"): replace_modules(pseudo(), "0", same_linear)


# Row 24: something done once

def test_row_24_apply_runs_once_per_name_and_apply_once_per_tensor():
    twice, once = words(), words()
    start = [copy.deepcopy(m.tok.weight) for m in (twice, once)]
    twice._apply(lambda t: t * 2)
    apply_once(once, lambda t: t * 2)
    assert torch.equal(twice.tok.weight, start[0] * 4), "PyTorch mended this: shorten the chapter"
    assert torch.equal(once.tok.weight, start[1] * 2)


def test_row_24_parameters_gradients_and_ties_follow():
    model = words()
    model(T).sum().backward()
    before, grad = [*model.parameters()], model.tok.weight.grad.clone()
    apply_once(model, lambda t: t.double())
    assert all(a is b for a, b in zip(before, model.parameters())) and check_ties(model)
    assert model.tok.weight.grad.dtype == torch.float64 and torch.equal(model.tok.weight.grad, grad.double())
    apply_once(model, lambda t: t.to("meta"))
    assert model.tok.weight is model.head.weight and model.tok.weight.is_meta and check_ties(model)


def test_row_24_in_place_functions_and_mapped_members():
    model = coder()
    before = model[2].weight.detach().clone()
    apply_once(model, lambda t: (t.mul_(3), None)[1])
    torch.testing.assert_close(model[2].weight.detach(), before * 3)
    assert check_ties(model)


def test_row_24_modules_once():
    calls = []
    apply_once(Deep(), calls.append, to="modules")
    assert len(calls) == len({*calls}) == 5
    again = []
    Deep().apply(again.append)
    assert len(again) == 6


def test_row_23_shared_buffers_stay_shared():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    model[1].running_mean = model[0].running_mean
    split = copy.deepcopy(model).double()
    assert split[1].running_mean is not split[0].running_mean
    apply_once(model, lambda t: t.double())
    assert model[1].running_mean is model[0].running_mean and model[1].running_mean.dtype == torch.float64


def test_row_24_buffers_and_parameters_apart():
    model = nn.BatchNorm1d(2)
    for to, count in (("parameters", 2), ("buffers", 3), ("tensors", 5)):
        seen = []
        apply_once(model, lambda t: (seen.append(t), None)[1], to=to)
        assert len(seen) == count, to


def test_apply_once_refuses_bad_input():
    model = words()
    before = copy.deepcopy(model.state_dict())
    made = iter([torch.zeros(7, 4), 3])
    with pytest.raises(TypeError, match=r"fn\(norm.weight\)"): apply_once(model, lambda t: next(made, 3))
    torch.testing.assert_close(model.state_dict(), before)
    with pytest.raises(ValueError, match="'tensors'"): apply_once(model, lambda t: t, to="weights")
    with pytest.raises(ValueError, match="one memory"): apply_once(pseudo(), lambda t: t)
    with pytest.raises(TypeError, match="fn"): apply_once(model, 3)


# Row 21: resizing

def test_row_21_a_vocabulary_grows_on_both_sides():
    for name in ("tok.weight", "head.weight"):
        model = words()
        old = model.tok.weight.detach().clone()
        assert resize_(model, name, 9) is model
        assert model.tok.weight is model.head.weight and check_ties(model)
        assert (model.tok.num_embeddings, model.head.out_features, len(model.head.bias)) == (9, 9, 9)
        assert torch.equal(model.tok.weight[:7], old)
        torch.testing.assert_close(model.tok.weight[7:], old.mean(0).expand(2, 4))
        assert model(torch.tensor([[8]])).shape == (1, 1, 9)


def test_row_21_the_optimizer_goes_on():
    model = words()
    adam = torch.optim.Adam(model.parameters())
    model(T).sum().backward()
    adam.step()
    resize_(model, "tok.weight", 9, optimizer=adam)
    assert adam.state[model.tok.weight]["exp_avg"].shape == (9, 4) and not adam.state[model.tok.weight]["exp_avg"][7:].any()
    assert model.tok.weight.grad is None
    model(T).sum().backward()
    adam.step()
    check_ties(model, adam)
    resize_(model, "tok.weight", 7, optimizer=adam)
    model(T).sum().backward()
    adam.step()


def test_row_21_an_optimizer_that_is_not_told_raises_at_its_next_step():
    model = words()
    adam = torch.optim.Adam(model.parameters())
    model(T).sum().backward()
    adam.step()
    resize_(model, "tok.weight", 9)
    model(T).sum().backward()
    with pytest.raises(RuntimeError, match="size"): adam.step()


def test_row_21_through_a_transpose_and_a_bias_of_two_layers():
    model = resize_(coder(), "2.weight", 8)
    assert (model[0].in_features, model[2].out_features, len(model[2].bias)) == (8, 8, 8)
    assert model(torch.zeros(1, 8)).shape == (1, 8) and check_ties(model)
    resize_(model, "0.weight", 5)
    assert (model[0].out_features, model[2].in_features) == (5, 5) and model(torch.zeros(1, 8)).shape == (1, 8)
    pair = nn.ModuleList([nn.Linear(2, 3), nn.Linear(4, 3)])
    tie_(pair, ["0.bias", "1.bias"])
    resize_(pair, "0.weight", 5)
    assert pair[1].out_features == 5 and pair[1].weight.shape == (5, 4) and check_ties(pair)


@pytest.mark.parametrize("fill, expected", [("zeros", 0.0), (lambda rows: nn.init.constant_(rows, 3.0), 3.0)])
def test_row_21_how_new_rows_start(fill, expected):
    model = resize_(words(), "tok.weight", 9, fill=fill)
    assert (model.tok.weight[7:] == expected).all() and not model.head.bias[7:].any()


def test_row_21_a_shared_layer_is_resized_once():
    model = resize_(Twice(), "again.weight", 5)
    assert model.first.weight.shape == (5, 3) and model.first.out_features == 5


def test_row_21_rules_for_other_layers():
    model = nn.Sequential(nn.Conv1d(2, 3, 1))
    resize_(model, "0.weight", 4, rules={(nn.Conv1d, "weight", 0): ("out_channels", ("bias", 0))})
    assert model(torch.zeros(1, 2, 5)).shape == (1, 4, 5) and model[0].out_channels == 4


@pytest.mark.parametrize("model, name, size, options, error, says", [
    (words(), "haed.weight", 9, {}, ValueError, "nearest is 'head.weight'"), (words(), "*.weight", 9, {}, ValueError, "one is expected"),
    (words(), "tok.weight", 0, {}, ValueError, "size"), (words(), "tok.weight", 9.5, {}, TypeError, "size"), (words(), "tok.weight", 9, {"axis": 2}, ValueError, "axis"),
    (words(), "tok.weight", 9, {"fill": "ones"}, ValueError, "fill"), (words(padding=6), "tok.weight", 6, {}, ValueError, "padding_idx=6"),
    (words(), "tok.weight", 9, {"fill": 5}, ValueError, "fill: 'mean', 'zeros' or a function"), (words(), "tok.weight", 9, {"fill": torch.ones(2)}, ValueError, "fill: 'mean'"),
    (words(), "tok.weight", 9, {"fill": lambda: 3}, TypeError, r"fill: a function of \(rows\) is expected"),
    (words(), "tok.weight", 9, {"fill": torch.ones_like}, ValueError, "fill: a function that fills its tensor in place is expected, got <built-in method ones_like"),
    (words(), "tok.weight", 9, {"optimizer": "adam"}, TypeError, "optimizer: an optimizer of torch is expected, got 'adam'"),
    (words(), "tok.weight", 9, {"optimizer": [torch.optim.Adam(words().parameters())]}, TypeError, "optimizer: an optimizer of torch is expected, got \\["),
    (words(), "tok.weight", 9, {"rules": 5}, TypeError, "rules: a dictionary is expected, got 5"), (words(), "tok.weight", 9, {"rules": {5: 6}}, TypeError, r"rules: {\(type, weight, axis\): \(its size's name, .* is expected, got {5: 6}"),
    (words(), "tok.weight", 9, {"rules": {(nn.Linear, "weight", 0): 5}}, TypeError, "rules: {.*its size's name, .* is expected, got {"),
    (words(), "tok.weight", 9, {"rules": {(nn.Linear, "weight", 0): ("out_features", "bias")}}, TypeError, "rules: {.*its size's name"),
    (nn.Sequential(nn.Conv1d(2, 3, 1)), "0.weight", 4, {}, ValueError, "Conv1d"), (pseudo(), "0.weight", 4, {}, ValueError, "one memory"),
    (words(), "tok.weight", 9, {"optimizer": torch.optim.Adam(words().parameters())}, ValueError, "one that holds tok.weight"),
    (nn.Sequential(torch.nn.utils.parametrizations.orthogonal(nn.Linear(3, 3))), "0.weight", 5, {}, ValueError, "rules|size")])
def test_resize_refuses_and_changes_nothing(model, name, size, options, error, says):
    before = {n: (p, p.shape) for n, p in model.named_parameters()}
    with pytest.raises(error, match=says): resize_(model, name, size, **options)
    assert {n: (p, p.shape) for n, p in model.named_parameters()} == before


# Recipes: rows 4, 10, 12, 17, 19

class LoRA(nn.Module):
    def __init__(self, base, r=2):
        super().__init__()
        self.base, (rows, cols) = base, base.weight.shape
        self.a, self.b = nn.Parameter(torch.randn(r, cols)), nn.Parameter(torch.randn(rows, r))

    def forward(self, x): return self.base(x) + x @ self.a.T @ self.b.T


@torch.no_grad()
def merge(model):
    model.head.base.weight += model.head.b @ model.head.a
    return replace_modules(model, "head", lambda adapter: adapter.base)


def test_row_4_an_adapter_of_one_side_is_merged_after_untying():
    adapted = replace_modules(words(), "head", LoRA)
    check_ties(adapted)
    before = adapted(T)
    assert not torch.allclose(merge(copy.deepcopy(adapted))(T), before)
    untie_(adapted, "head.base.weight")
    torch.testing.assert_close(merge(adapted)(T), before)
    assert not find_ties(adapted)


def test_row_10_shared_codes_are_stored_once():
    tied, untied, linear_only = words(), Words(), words()
    for model in (tied, untied): replace_modules(model, (nn.Linear, nn.Embedding), matrix.coder())
    assert tied.head.codes is tied.tok.codes and check_ties(tied)
    assert declared_ties(tied)[0].names == ("tok.codes", "head.codes")
    with pytest.raises(ValueError, match="tok.weight and head.weight"): replace_modules(linear_only, nn.Linear, matrix.coder())
    assert linear_only.head.weight is linear_only.tok.weight


def test_row_12_the_source_decides_the_initialization():
    model = Words()
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    tie_(model, ["head.weight", "tok.weight"])
    assert torch.equal(model.tok.weight, values["head.weight"])


def test_row_17_a_mask_of_the_tie_prunes_both_sides_alike():
    one_side = words()
    prune.l1_unstructured(one_side.head, "weight", 0.5)
    assert (one_side.tok.weight != 0).all()
    prune.remove(one_side.head, "weight")
    assert (one_side.tok.weight == 0).any(), "PyTorch mended this: shorten the chapter"
    model = words()
    mask = model.tok.weight.abs() > model.tok.weight.abs().median()
    for layer in (model.tok, model.head): prune.custom_from_mask(layer, "weight", mask)
    before = model(T)
    with pytest.raises(BrokenTie, match="head.weight"): check_ties(model)
    for layer in (model.tok, model.head): prune.remove(layer, "weight")
    assert torch.equal(model(T), before) and check_ties(model)


def test_row_19_the_padding_row_gets_no_gradient_where_its_logit_is_masked():
    def gradient(padding):
        model = Words(padding=0)
        tie_(model, ["tok.weight", "head.weight"], padding=padding)
        nn.functional.cross_entropy(model(T).flatten(0, 1), T.flatten()).backward()
        return model.tok.weight.grad[0].abs().max()
    assert gradient("train") > 0 and gradient("mask") == 0


# Other libraries

def test_row_7_and_21_with_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    with pytest.raises(ValueError, match="transformer.wte.weight .*lm_head.weight"): param_groups(model, weight_decay=0.1)
    made = param_groups(model, {"lm_head.weight": {"weight_decay": 0.0}, **NO_DECAY}, weight_decay=0.1)
    assert sum(len(g["params"]) for g in made) == len([*model.parameters()])
    assert [*tie_groups(model)[0]] == ["transformer.wte", "lm_head"]
    resize_(model, "lm_head.weight", 13)
    assert model(torch.tensor([[12]])).logits.shape == (1, 1, 13) and model.lm_head.weight is model.transformer.wte.weight


# Sites

def test_sites_of_shared_and_parametrized_layers():
    found = surgery.sites(Deep())
    assert [site.names for site in found] == [("a.0.weight", "b.0.weight"), ("a.0.bias", "b.0.bias")]
    mapped = surgery.by_tensor(surgery.sites(coder()))[0]
    assert [site.labels for site in mapped] == [("0.weight",), ("2.weight",)] and mapped[1].layer.in_features == 3
    root = torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    assert {site.labels for site in surgery.sites(root)} == {("bias",), ("weight",)}


def test_changed_models_can_be_pickled():
    model = pickle.loads(pickle.dumps(resize_(replace_modules(words(), "body", same_linear), "tok.weight", 9)))
    assert model.tok.weight is model.head.weight and check_ties(model)
