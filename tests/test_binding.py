"check_ties, retie_ and keep_ties: every way that a tie breaks is found, mended or kept; never silent, never by halves."
import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from sharetie.binding import (BrokenTie, Function, Scale, Slice, Transpose, check_ties, declared_ties, equal_values, find_ties,
                              keep_ties, retie_, share_module_, tie_, untie_)
from sharetie.finding import places

PAIR = ["emb.weight", "head.weight"]


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


class Words(nn.Module):
    def __init__(self, words=6, width=4):
        super().__init__()
        self.emb = nn.Embedding(words, width)
        self.head = nn.Linear(width, words, bias=False)
        self.back = nn.Linear(words, width)

    def forward(self, x): return self.back(self.head(self.emb(x)))


def tied(): return tie_(model := Words(), PAIR) and model


def mapped():
    model = tied()
    tie_(model, ["emb.weight", "back.weight"], map=Transpose())
    return model


def fresh(state): return {name: value.clone() for name, value in state.items()}


def held(model):
    "All that a model holds, by name: which tensor and of which value; its classes; what is declared."
    tensors = {n: (id(p.tensor), None if p.tensor.is_meta else repr(p.tensor.tolist())) for n, p in places(model).items()}  # as text, for NaN equals NaN there
    return tensors, [(n, id(m), type(m)) for n, m in model.named_modules()], [d.names for d in declared_ties(model)]


def refuses(model, call, message, error=BrokenTie):
    before = held(model)
    with pytest.raises(error, match=message) as info: call()
    assert held(model) == before, "nothing may change"
    return info.value


X = torch.tensor([1, 2])


# The advice works

def replaced(map, source=None):
    "A mapped tie whose member was replaced."
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2)})
    tie_(model, ["a.weight", "b.weight"], map=map)
    model["b"] = nn.Linear(2, 2)
    if source is not None: model["a"].weight = source
    return model


@pytest.mark.parametrize("map, policies", [(Transpose(), ["first", "mean"]), (torch.tril, ["first"]), (Slice(slice(0, 2)), ["first"])], ids=["transpose", "tril", "slice"])
def test_only_policies_that_mend_are_advised(map, policies):
    for policy in ("first", "mean"):
        model = replaced(map)
        with pytest.raises(BrokenTie) as told: check_ties(model)
        assert (f"'{policy}'" in told.value.broken[0].mend) == (policy in policies)
        if policy in policies: assert check_ties(retie_(model, on_conflict=policy) and model)
        else: refuses(model, lambda: retie_(model, on_conflict=policy), "on_conflict='first'. keeps the first$")


def test_shapes_that_differ_are_not_for_a_policy_to_mend():
    model = tied()
    model.head.weight = nn.Parameter(torch.zeros(5, 4))
    for call in (lambda: check_ties(model), lambda: retie_(model, on_conflict="first")):
        refuses(model, call, "give 'emb.weight' and 'head.weight' shapes that fit, or untie_.model, 'head.weight'.$")


def test_a_source_without_values_is_asked_for_them():
    model = replaced(torch.tril, nn.Parameter(torch.empty(2, 2, device="meta")))
    refuses(model, lambda: retie_(model), "give the source values, then retie_")


# Every way to break a tie is found

def cast_head(state): return {name: value.half() if "head" in name else value.clone() for name, value in state.items()}


BREAKS = {
    "row 2 assign": (lambda m: m.load_state_dict(fresh(m.state_dict()), assign=True), "'head.weight' is another tensor with equal values; retie_.model. mends it"),
    "row 2 own state assigned": (lambda m: m.load_state_dict(m.state_dict(), assign=True), "another tensor with equal values"),
    "row 2 meta": (lambda m: m.to("meta"), "one of them has no values"),
    "row 2 to_empty": (lambda m: m.to("meta").to_empty(device="cpu"), "'head.weight' (is another|differs)"),
    "new Parameter": (lambda m: setattr(m.head, "weight", nn.Parameter(m.head.weight + 1)), "differs by up to 1"),
    "row 22 cast of a state dict": (lambda m: m.load_state_dict(cast_head(m.state_dict()), assign=True), "has dtype torch.float16 and not torch.float32"),
    "row 22 copy of a part": (lambda m: setattr(m, "head", copy.deepcopy(m.head)), "equal values"),
    "row 21 resize": (lambda m: setattr(m, "emb", nn.Embedding(9, 4)), r"has shape \(6, 4\) and not \(9, 4\)"),
    "row 16 weight_norm": (lambda m: parametrizations.weight_norm(m.head), "'head.weight' is computed by _WeightNorm; make 'head.weight' a plain parameter again"),
    "row 16 on the source": (lambda m: parametrizations.weight_norm(m.emb), "'emb.weight' is computed by _WeightNorm"),
    "row 17 prune": (lambda m: prune.l1_unstructured(m.head, "weight", amount=.5), "'head.weight' is a plain tensor now, no parameter"),
    "row 18 replaced": (lambda m: setattr(m, "head", nn.Identity()), "'head.weight' is gone"),
    "source gone": (lambda m: delattr(m, "emb"), "'emb.weight' is gone"),
    "None": (lambda m: setattr(m.head, "weight", None), "'head.weight' is gone"),
    "frozen apart": (lambda m: setattr(m.head, "weight", nn.Parameter(m.emb.weight.detach().clone(), requires_grad=False)), "trained False and not True"),
    "pseudo": (lambda m: setattr(m.head, "weight", nn.Parameter(m.emb.weight.data)), "equal values"),
}


@pytest.mark.parametrize("do, message", BREAKS.values(), ids=BREAKS)
def test_a_broken_tie_is_found_and_told(do, message):
    model = tied()
    check_ties(model)
    do(model)
    error = refuses(model, lambda: check_ties(model), message)
    assert error.broken[0].names == tuple(PAIR) and isinstance(error, ValueError)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_row_10_dynamic_quantization_is_found():
    model = tied()
    try: from torch.ao.quantization import quantize_dynamic
    except ImportError: pytest.skip("this torch has no dynamic quantization")
    try: quantized = quantize_dynamic(model, {nn.Linear})
    except (RuntimeError, AttributeError) as error: pytest.skip(f"this machine has no quantized engine: {error}")
    with pytest.raises(BrokenTie, match="head.weight' is gone"): check_ties(quantized)


MAPPED_BREAKS = {
    "parametrization removed": (lambda m: parametrize.remove_parametrizations(m.back, "weight"), "back.weight"),
    "original replaced": (lambda m: setattr(m.back.parametrizations.weight, "original", nn.Parameter(m.emb.weight + 1)), "'back.weight' differs by up to 1"),
    "source replaced": (lambda m: setattr(m.emb, "weight", nn.Parameter(m.emb.weight + 1)), "'back.weight' differs by up to 1"),
    "another map on top": (lambda m: parametrize.register_parametrization(m.back, "weight", Scale(2.)), "'back.weight' is computed by Transpose, Scale"),
    "gone": (lambda m: delattr(m, "back"), "'back.weight' is gone"),
}


@pytest.mark.parametrize("do, message", MAPPED_BREAKS.values(), ids=MAPPED_BREAKS)
def test_a_broken_mapped_tie_is_found(do, message):
    model = mapped()
    do(model)
    with pytest.raises(BrokenTie, match=message): check_ties(model)


def test_a_broken_shared_module_is_found_and_mended():
    model = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(3)))
    share_module_(model, "*")
    model[1] = copy.deepcopy(model[1])
    refuses(model, lambda: check_ties(model), r"other modules than '0' are \['1'\]; retie_")
    retie_(model)
    assert model[1] is model[0]
    del model[2]
    with pytest.raises(BrokenTie, match=r"\['2'\] are gone"): retie_(model)


def test_row_23_buffers_that_parted_are_found():
    model = nn.ModuleList(nn.BatchNorm1d(2) for _ in range(2))
    tie_(model, "*.running_mean")
    model.double()
    refuses(model, lambda: check_ties(model), "'1.running_mean' is another tensor with equal values")
    retie_(model)
    assert model[1].running_mean is model[0].running_mean


def test_all_broken_ties_are_in_one_error_that_pickles():
    model = mapped()
    model.head.weight = nn.Parameter(torch.zeros(6, 4))
    model.back.parametrizations.weight.original = nn.Parameter(torch.zeros(6, 4))
    with pytest.raises(BrokenTie) as info: check_ties(model)
    again = pickle.loads(pickle.dumps(info.value))
    assert len(info.value.broken) == 2 and str(again) == str(info.value) and again.broken == info.value.broken


def test_ties_of_parts_are_checked_through_the_whole():
    model = nn.ModuleDict({"part": tied()})
    assert check_ties(model)["part.head.weight"]
    model.part.head = nn.Linear(4, 6, bias=False)
    with pytest.raises(BrokenTie, match="part.emb.weight = part.head.weight"): check_ties(torch.compile(model, backend="eager")._orig_mod)
    with pytest.raises(BrokenTie, match="_orig_mod.part.emb.weight"): check_ties(torch.compile(model, backend="eager"))


@pytest.mark.parametrize("call", [check_ties, retie_, keep_ties])
def test_what_is_no_module_raises(call):
    with pytest.raises(TypeError, match="model: a module is expected"): call([tied()])


# Row 7: optimizers

def test_row_7_a_tie_made_after_the_optimizer_leaves_an_orphan():
    model = Words()
    optimizer = torch.optim.Adam(model.parameters())
    check_ties(model, optimizer)
    tie_(model, PAIR)
    refuses(model, lambda: check_ties(model, optimizer), r"optimizer: steps 1 tensors that the model does not have, of shapes \[\(6, 4\)\]; make the optimizer anew")


def test_row_7_what_no_optimizer_steps():
    model = tied()
    optimizer = torch.optim.Adam(model.parameters())
    untie_(model, "head.weight")
    error = refuses(model, lambda: check_ties(model, optimizer), "head.weight: trained, but in no optimizer")
    assert error.broken[0].names == ("head.weight",)
    other = torch.optim.Adam([model.head.weight])
    error = refuses(model, lambda: check_ties(model, other), "emb.weight, back.weight, back.bias: trained, but in no optimizer; make the optimizer anew, freeze them")
    assert error.broken[0].names == ("emb.weight", "back.weight", "back.bias")
    many = nn.Sequential(*(nn.Linear(1, 1) for _ in range(10)))
    with pytest.raises(BrokenTie, match="0.weight, 0.bias, 1.weight, 1.bias, 2.weight and 11 more: trained"): check_ties(many, torch.optim.SGD([*many[8].parameters(), *many[9].parameters()], .1))
    check_ties(model, optimizer, complete=False)
    check_ties(model, [optimizer, torch.optim.SGD([model.head.weight], lr=.1)])
    model.head.requires_grad_(False)
    check_ties(model, optimizer)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_row_7_duplicates():
    model = tied()
    both = [model.emb.weight, model.head.weight, *model.back.parameters()]
    refuses(model, lambda: check_ties(model, torch.optim.SGD(both, lr=.1)), "emb.weight = head.weight: is in the optimizer 2 times")
    one = [torch.optim.SGD(model.parameters(), lr=.1) for _ in range(2)]
    refuses(model, lambda: check_ties(model, one), "is in the optimizer 2 times")


def test_row_7_assign_leaves_orphans():
    model = keep_ties(tied())
    optimizer = torch.optim.SGD(model.parameters(), lr=.1)
    model.load_state_dict(fresh(model.state_dict()))
    check_ties(model, optimizer)
    model.load_state_dict(fresh(model.state_dict()), assign=True)
    refuses(model, lambda: check_ties(model, optimizer), "steps 3 tensors that the model does not have")


def test_row_6_a_pseudo_tie_is_stepped_twice():
    model = Words()
    model.head.weight.data = model.emb.weight.data
    check_ties(model)
    refuses(model, lambda: check_ties(model, torch.optim.Adam(model.parameters())), r"2 Parameters over one memory \(same\), each stepped")
    refuses(model, lambda: check_ties(model, pseudo=True), r"several tensors over one memory \(same\); retie_")
    retie_(model)
    check_ties(model, torch.optim.Adam(model.parameters()), pseudo=True)


@pytest.mark.parametrize("wrong", [3, "adam", [torch.ones(2)]])
def test_what_is_no_optimizer_raises(wrong):
    with pytest.raises(TypeError, match="optimizer: an optimizer of torch is expected"): check_ties(tied(), wrong)


# retie_

MENDED = ["row 2 assign", "row 2 own state assigned", "row 2 meta", "row 22 copy of a part", "pseudo"]


@pytest.mark.parametrize("name", MENDED)
def test_equal_values_are_mended(name):
    model = tied()
    source, value = model.emb.weight, model.emb.weight.detach().clone()
    BREAKS[name][0](model)
    ties = retie_(model)
    assert ties["head.weight"].names == tuple(PAIR) and model.head.weight is model.emb.weight
    if name != "row 2 meta": assert torch.equal(model.emb.weight, value)
    if name in ("row 22 copy of a part", "pseudo"): assert model.emb.weight is source, "the source's Parameter stays"


@pytest.mark.parametrize("name", ["new Parameter", "row 22 cast of a state dict", "frozen apart"])
def test_a_conflict_needs_a_policy(name):
    model = tied()
    BREAKS[name][0](model)
    refuses(model, lambda: retie_(model), "on_conflict='first'")
    first, other = model.emb.weight.detach().clone(), model.head.weight.detach().float()
    mean = copy.deepcopy(model)
    retie_(model, "first")
    assert torch.equal(model.head.weight, first) and model.head.weight is model.emb.weight and model.emb.weight.requires_grad
    retie_(mean, "mean")
    assert torch.allclose(mean.head.weight, (first + other) / 2)


@pytest.mark.parametrize("name", ["row 21 resize", "row 16 weight_norm", "row 16 on the source", "row 17 prune", "row 18 replaced", "source gone"])
@pytest.mark.parametrize("policy", ["error", "first", "mean"])
def test_what_cannot_be_mended_raises(name, policy):
    model = tied()
    BREAKS[name][0](model)
    refuses(model, lambda: retie_(model, policy), "emb.weight = head.weight: ")


def test_row_17_removing_a_pruned_side_zeroes_the_partner():
    model = tied()
    prune.l1_unstructured(model.head, "weight", amount=.5)
    with pytest.raises(BrokenTie): check_ties(model)
    prune.remove(model.head, "weight")
    assert (model.emb.weight == 0).sum() == 12, "PyTorch pruned the embedding too"
    assert model.head.weight is model.emb.weight and check_ties(model)


def test_whole_or_nothing():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.LSTM(3, 3), "d": nn.LSTM(3, 3)})
    tie_(model, ["c.weight_hh_l0", "d.weight_hh_l0"])
    tie_(model, ["a.weight", "b.weight"], map=Transpose())
    tie_(model, ["a.bias", "b.bias"])
    model.d = copy.deepcopy(model.d)
    parametrize.remove_parametrizations(model.b, "weight")
    model.b.weight = nn.Parameter(model.a.weight.detach().t().clone())
    model.b.bias = nn.Parameter(torch.full((3,), 7.))
    flat = list(model.d._flat_weights)
    refuses(model, lambda: retie_(model), "'b.bias' differs")
    assert all(a is b for a, b in zip(model.d._flat_weights, flat)) and not parametrize.is_parametrized(model.b)
    retie_(model, "first")
    assert torch.equal(model.b.weight, model.a.weight.t()) and model.d._flat_weights[1] is model.c.weight_hh_l0


def test_several_ties_are_mended_with_all_names():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    tie_(model, "*.weight")
    model[2].weight = nn.Parameter(model[0].weight.detach().clone())
    model[3].weight = model[2].weight
    model.extra = nn.Linear(2, 2)
    model.extra.weight = model[2].weight
    retie_(model)
    assert model[3].weight is model[0].weight is model[2].weight is model.extra.weight


def test_mean_of_three():
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    tie_(model, "*.weight")
    for i in (1, 2): model[i].weight = nn.Parameter(model[0].weight + 3 * i)
    value = model[0].weight.detach().clone()
    retie_(model, "mean")
    assert torch.allclose(model[2].weight, value + 3) and model[1].weight is model[0].weight


def weights(*values):
    "Linears of one number each, on two levels: those of `part`, and the last one beside it."
    layers = [nn.Linear(1, 1, bias=False) for _ in values]
    for layer, value in zip(layers, values): nn.init.constant_(layer.weight, value)
    return nn.ModuleDict({"part": nn.ModuleList(layers[:-1]), "more": layers[-1]})


def tear(model, *values):
    for layer, value in zip([*model.part, model.more], values): layer.weight = nn.Parameter(torch.full((1, 1), float(value)))
    return model


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("first", ["more", "part"])
def test_one_mean_over_declarations_on_two_levels(at, first):
    model = weights(0, 0, 0)
    tie_(model.part, ["0.weight", "1.weight"])
    names = [f"part.{at}.weight", "more.weight"]
    tie_(model, names if first == "part" else names[::-1])
    tear(model, 1, 4, 10)
    retie_(model, "mean")
    assert model.more.weight is model.part[0].weight is model.part[1].weight and model.more.weight.item() == 5


def test_the_first_over_two_levels_is_that_of_the_whole():
    model = weights(0, 0, 0)
    tie_(model.part, ["0.weight", "1.weight"])
    tie_(model, ["more.weight", "part.1.weight"])
    retie_(tear(model, 1, 4, 10), "first")
    assert model.part[0].weight is model.part[1].weight is model.more.weight and model.more.weight.item() == 10


def test_one_mean_through_maps_and_shared_modules():
    model = weights(0, 0, 0, 0)
    tie_(model.part, ["0.weight", "1.weight"])
    tie_(model, ["part.1.weight", "more.weight"], map=Scale(2.))
    share_module_(model, ["part.0", "part.2"])
    model.part[2] = nn.Linear(1, 1, bias=False)
    parametrize.remove_parametrizations(model.more, "weight")
    tear(model, 1, 2, 3, 20)
    retie_(model, "mean")
    assert model.part[0] is model.part[2] and model.part[1].weight is model.part[0].weight
    assert model.part[0].weight.item() == 4 and model.more.weight.item() == 8, "(1 + 2 + 3 + 20/2) / 4"


def test_a_place_with_two_names_counts_once_in_a_mean():
    model = weights(0, 0, 0)
    tie_(model.part, ["0.weight", "1.weight"])
    model.twin = model.part
    tie_(model, ["twin.1.weight", "more.weight"])
    retie_(tear(model, 1, 4, 10), "mean")
    assert model.more.weight.item() == 5 and check_ties(model)


def test_the_mean_leaves_whole_numbers_that_agree():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    share_module_(model, "*")
    model[1] = copy.deepcopy(model[1])
    nn.init.constant_(model[1].weight, 3)
    retie_(model, "mean")
    assert model[1] is model[0] and (model[0].weight == 2).all()
    model[1] = copy.deepcopy(model[1])
    model[1].num_batches_tracked += 1
    refuses(model, lambda: retie_(model, "mean"), "on_conflict: 'error' or 'first' for torch.int64", ValueError)


def test_a_module_that_differs_is_told():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    share_module_(model, "*")
    model[1] = nn.Linear(2, 2)
    refuses(model, lambda: check_ties(model), "other modules than '0' are .'1'.; retie_.model, on_conflict='first'. keeps the first's values, 'mean' takes the mean")
    model[1] = nn.Linear(2, 3)
    refuses(model, lambda: retie_(model, "first"), "'0' and '1' differ in settings.*; put a module like the first there")


def test_lazy_members_that_parted_are_told():
    model = nn.Sequential(nn.LazyLinear(2), nn.LazyLinear(2))
    share_module_(model, "*")
    model[1] = nn.LazyLinear(2)
    with pytest.raises(BrokenTie, match="other modules than '0' are .'1'.; retie_.model. puts the first there"): check_ties(model)
    retie_(model)
    assert model[0] is model[1]
    keep = nn.ModuleDict({"a": nn.LazyLinear(2, bias=False), "b": nn.LazyLinear(2, bias=False)})
    keep.b.weight = keep.a.weight
    keep_ties(keep)
    keep.b.weight = nn.LazyLinear(2).weight
    with pytest.raises(BrokenTie, match="'b.weight' is another tensor, and has no shape yet"): check_ties(keep)
    retie_(keep, "mean")
    assert keep.a.weight is keep.b.weight
    keep.b = nn.Linear(3, 2, bias=False)
    with pytest.raises(BrokenTie, match="has shape .2, 3. and not None"): retie_(keep, "mean")


def test_a_map_that_does_not_fit_any_more_is_told():
    model = nn.ModuleDict({"a": nn.Linear(2, 4, bias=False), "b": nn.Linear(2, 2, bias=False)})
    tie_(model, ["a.weight", "b.weight"], map=Slice(slice(0, 2), slice(0, 2)))
    parametrize.remove_parametrizations(model.b, "weight")
    model.a.weight = nn.Parameter(torch.ones(3))
    for call in (check_ties, retie_, lambda m: retie_(m, "first")):
        refuses(model, lambda: call(model), r"'b.weight' cannot be Slice.* of what is there now")


def test_a_member_with_values_fills_a_source_without():
    model = tied()
    value = model.head.weight.detach().clone()
    model.emb.to("meta")
    assert model.emb.weight.is_meta and not model.head.weight.is_meta
    retie_(model)
    assert model.emb.weight is model.head.weight and torch.equal(model.emb.weight, value)


def test_a_mapped_member_is_bound_again():
    model = mapped()
    value = model.back.weight.detach().clone()
    parametrize.remove_parametrizations(model.back, "weight", leave_parametrized=False)
    model.back.weight = nn.Parameter(value.clone())
    retie_(model)
    assert torch.equal(model.back.weight, model.emb.weight.t()) and len(list(model.parameters())) == 2
    untie_(model, "back.weight")
    tie_(model, ["emb.weight", "back.weight"], map=Transpose())
    parametrize.remove_parametrizations(model.back, "weight", leave_parametrized=False)
    model.back.weight = nn.Parameter(value + 2)
    refuses(model, lambda: retie_(model), "'back.weight' differs by up to 2")
    retie_(model, "mean")
    assert torch.allclose(model.back.weight, value + 2 / 3, atol=1e-6), "of three members one was moved by 2"
    assert torch.allclose(model.head.weight, value.t() + 2 / 3, atol=1e-6)


def test_the_mean_through_a_map_without_inverse_is_refused():
    model = nn.ModuleDict({"a": nn.Linear(2, 4, bias=False), "b": nn.Linear(2, 2, bias=False)})
    tie_(model, ["a.weight", "b.weight"], map=Slice(slice(0, 2)))
    parametrize.remove_parametrizations(model.b, "weight", leave_parametrized=False)
    model.b.weight = nn.Parameter(model.a.weight[:2] + 1)
    refuses(model, lambda: retie_(model, "mean"), "differs by up to 1")
    retie_(model, "first")
    assert torch.equal(model.b.weight, model.a.weight[:2])


def test_modules_with_other_values_need_a_policy():
    def parted():
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        share_module_(model, "*")
        model[1] = nn.Linear(2, 2)
        return model
    model = parted()
    refuses(model, lambda: retie_(model), "other modules")
    a, b = (m.weight.detach().clone() for m in model)
    retie_(model, "mean")
    assert model[1] is model[0] and torch.allclose(model[0].weight, (a + b) / 2)
    model[1] = nn.Linear(2, 2, bias=False)
    refuses(model, lambda: retie_(model, "first"), "other modules")


# Row 6: views become true ties

def view(make):
    def build():
        model = nn.Module()
        model.w = nn.Parameter(torch.randn(4, 6))
        model.v = nn.Parameter(make(model.w.detach()))
        return model
    return build


VIEWS = {"same": lambda w: w, "transpose": torch.t, "rows": lambda w: w[1:3], "a column": lambda w: w[:, 2],
         "flat": lambda w: w.view(-1), "steps": lambda w: w[::2, ::3]}


@pytest.mark.parametrize("make", VIEWS.values(), ids=[f"row 6 {name}" for name in VIEWS])
def test_views_become_true_ties(make):
    model = view(make)()
    value = model.v.detach().clone()
    retie_(model)
    assert torch.equal(model.v, value) and len(list(model.parameters())) == 1 and find_ties(model).pseudo == ()
    with torch.no_grad(): model.w.normal_()
    assert torch.equal(model.v, make(model.w)) and len(declared_ties(model)) == 1
    other = copy.deepcopy(model)
    assert check_ties(other.double()) and torch.equal(other.v, make(other.w))


def test_row_6_the_tie_steps_once():
    model = view(torch.t)()
    retie_(model)
    before = model.w.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=.1)
    (model.w.sum() + model.v.sum()).backward()
    optimizer.step()
    assert torch.allclose(before - model.w, torch.full((4, 6), .1), atol=1e-5), "and not by .2"


def test_buffers_over_one_memory_are_tied():
    model = nn.Module()
    model.register_buffer("a", torch.arange(6.))
    model.register_buffer("b", model.a[:3])
    retie_(model)
    assert torch.equal(model.b, torch.arange(3.)) and "b" not in model._buffers
    assert check_ties(keep_ties(model).double()) and torch.equal(model.b, torch.arange(3.).double())


def crossed():
    w = torch.zeros(10)
    return nn.ParameterList([nn.Parameter(w[:6]), nn.Parameter(w[4:])])


def half_frozen():
    model = view(torch.t)()
    model.v.requires_grad_(False)
    return model


def with_buffer():
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(4))
    model.register_buffer("b", model.w.detach()[:2])
    return model


def in_lstm():
    model = nn.LSTM(3, 3, num_layers=2)
    model.weight_ih_l1 = nn.Parameter(model.weight_ih_l0.detach().as_strided((12, 3), (1, 12)))
    return model


@pytest.mark.parametrize("make, message", [(crossed, "cannot be made of one source; untie_"), (half_frozen, "frozen and trained"),
                                           (with_buffer, "Parameters and buffers"), (in_lstm, "cannot be made of one source")])
def test_views_that_cannot_be_ties_raise_and_can_be_untied(make, message):
    model = make()
    tie = find_ties(model).pseudo[0]
    refuses(model, lambda: retie_(model), message)
    refuses(model, lambda: keep_ties(model), "several tensors over one memory")
    untie_(model, tie.names[-1])
    assert find_ties(model) == () and keep_ties(model) is model


@pytest.mark.parametrize("call", [retie_, keep_ties])
def test_a_policy_that_is_none_raises(call):
    with pytest.raises(ValueError, match="on_conflict: one of 'error', 'first', 'mean' is expected, got 'last'"): call(tied(), on_conflict="last")


def test_row_6_after_a_load_that_shares_memory():
    model = mapped()
    model.load_state_dict(model.state_dict(), assign=True)
    assert len(find_ties(model).pseudo) == 1
    retie_(model)
    assert find_ties(model).pseudo == () and check_ties(model)["back.weight"]


# keep_ties

LIVES = {
    "row 2 to_empty": lambda m: m.to("meta").to_empty(device="cpu"),
    "row 2 meta": lambda m: m.to("meta"),
    "row 2 assign": lambda m: m.load_state_dict(fresh(m.state_dict()), assign=True),
    "row 2 assign its own": lambda m: m.load_state_dict(m.state_dict(), assign=True),
    "load": lambda m: m.load_state_dict(fresh(m.state_dict())),
    "half": lambda m: m.half(), "double": lambda m: m.double(), "to": lambda m: m.to(torch.bfloat16),
    "deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "deepcopy and meta": lambda m: copy.deepcopy(m).to("meta"), "pickle and assign": lambda m: LIVES["row 2 assign"](pickle.loads(pickle.dumps(m))),
    "whole": lambda m: nn.Sequential(m).to("meta")[0],
    "in DDP's place": lambda m: nn.ModuleDict({"module": m}).load_state_dict({f"module.{k}": v for k, v in fresh(m.state_dict()).items()}, assign=True),
    "requires_grad_": lambda m: m.requires_grad_(False), "share_memory": lambda m: m.share_memory(),
    "compile": lambda m: torch.compile(m, backend="eager").to("meta"),
    "EMA": lambda m: torch.optim.swa_utils.AveragedModel(m).module,
}
MODELS = {"identity": tied, "mapped": mapped}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("do", LIVES.values(), ids=LIVES)
def test_kept_ties_survive(make, do):
    model = keep_ties(make())
    result = do(model)
    for own in (model, result) if isinstance(result, nn.Module) else (model,):
        check_ties(own)
        assert len({id(p) for n, p in own.named_parameters(remove_duplicate=False) if p.shape == (6, 4)}) == 1


@pytest.mark.parametrize("name", ["row 2 to_empty", "row 2 meta", "row 2 assign", "row 2 assign its own"])
def test_row_2_they_do_not_survive_without(name):
    model = tied()
    LIVES[name](model)
    with pytest.raises(BrokenTie): check_ties(model)


def test_row_23_shared_buffers_and_modules_are_kept():
    model = nn.ModuleDict({"a": nn.BatchNorm1d(2), "b": nn.BatchNorm1d(2), "c": nn.Linear(2, 2)})
    model["d"] = model["c"]
    model.b.running_mean = model.a.running_mean
    keep_ties(model)
    assert [d.names for d in declared_ties(model)] == [("a.running_mean", "b.running_mean"), ("c.weight", "d.weight"), ("c.bias", "d.bias")]
    check_ties(model.double())
    check_ties(model.to("meta").to_empty(device="cpu"))
    assert model.b.running_mean is model.a.running_mean and model.d is model.c


def test_found_ties_are_declared_once():
    model = mapped()
    share = nn.ModuleDict({"m": model, "a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    share_module_(share, ["a", "b"])
    keep_ties(keep_ties(share))
    assert [d.names for d in declared_ties(share)] == [("a", "b"), ("m.emb.weight", "m.head.weight"), ("m.emb.weight", "m.back.weight")]


def test_non_persistent_buffers_are_not_asked_of_a_state_dict():
    model = nn.Module()
    model.register_buffer("a", torch.ones(2))
    model.register_buffer("b", model.a, persistent=False)
    keep_ties(model)
    model.load_state_dict({"a": torch.zeros(2)}, assign=True)
    assert model.b is model.a and torch.equal(model.b, torch.zeros(2))


def test_an_lstm_keeps_its_ties():
    model = keep_ties(tie_(m := nn.LSTM(3, 3, num_layers=2), ["weight_hh_l0", "weight_hh_l1"]) and m)
    model.load_state_dict(fresh(model.state_dict()), assign=True)
    model.double()
    x = torch.randn(2, 1, 3, dtype=torch.float64)
    before = model(x)[0]
    with torch.no_grad(): model.weight_hh_l0.zero_()
    assert model.weight_hh_l1 is model.weight_hh_l0 and not torch.equal(before, model(x)[0])


# Rows 1 and 3: state dicts

def untied_state(model):
    return {"emb.weight": model.emb.weight.detach().clone(), "head.weight": model.head.weight.detach().clone(),
            "back.weight": model.back.weight.detach().clone(), "back.bias": model.back.bias.detach().clone()}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("missing", [[], ["emb.weight"], ["head.weight"], ["back.weight"], ["emb.weight", "head.weight"], ["head.weight", "back.weight"]])
def test_row_1_a_state_dict_that_lacks_names_loads(missing, assign):
    source, model = mapped(), keep_ties(mapped())
    state = {k: v for k, v in untied_state(source).items() if k not in missing}
    assert model.load_state_dict(state, assign=assign) == ([], [])
    assert torch.equal(model(X), source(X)) and check_ties(model)


def test_what_is_missing_altogether_is_said():
    model = keep_ties(tied())
    state = {k: v for k, v in model.state_dict().items() if k not in PAIR}
    with pytest.raises(RuntimeError, match='Missing key.*"emb.weight", "head.weight"'): model.load_state_dict(state)
    assert model.load_state_dict(state, strict=False).missing_keys == PAIR


@pytest.mark.parametrize("assign", [False, True])
def test_row_3_two_values_for_one_tie_do_not_load(assign):
    plain = tied()
    torn = fresh(plain.state_dict())
    torn["head.weight"] += 1
    refuses(plain, lambda: plain.load_state_dict(torn, assign=assign), "one value for the tie of 'emb.weight' and 'head.weight' is expected, got two", ValueError)
    undeclared = Words()
    undeclared.head.weight = undeclared.emb.weight
    undeclared.load_state_dict(torn)
    assert torch.equal(undeclared.emb.weight, torn["head.weight"]), "PyTorch takes the last name's"
    model = keep_ties(tied())
    torn["back.bias"] += 1
    refuses(model, lambda: model.load_state_dict(torn, assign=assign), "in the state dict, beside 'emb.weight', 'head.weight' differs by up to 1; keep_ties.model, on_conflict")
    keep_ties(model, "first").load_state_dict(torn, assign=assign)
    assert torch.equal(model.head.weight, torn["emb.weight"])
    keep_ties(model, "mean").load_state_dict(torn, assign=assign)
    assert torch.allclose(model.emb.weight, torn["emb.weight"] + .5) and check_ties(model)


def test_row_3_nan_is_one_value_and_types_are_compared_in_the_models():
    model = keep_ties(tied())
    state = fresh(model.state_dict())
    state["emb.weight"][0] = torch.nan
    state["head.weight"] = state["emb.weight"].double()
    model.load_state_dict(state)
    assert model.emb.weight[0].isnan().all()


def test_row_3_shapes_that_differ():
    model = keep_ties(tied(), "first")
    state = fresh(model.state_dict()) | {"head.weight": torch.zeros(7, 4)}
    refuses(model, lambda: model.load_state_dict(state), "a tie has one shape")
    state = fresh(model.state_dict()) | dict.fromkeys(PAIR, torch.zeros(7, 4))
    with pytest.raises(RuntimeError, match="size mismatch"): model.load_state_dict(state)
    check_ties(model)


def test_row_3_a_mapped_members_value_is_checked():
    model = keep_ties(mapped())
    state = untied_state(model)
    state["back.weight"] += 1
    refuses(model, lambda: model.load_state_dict(state), "'back.weight' is not what the map makes of the source")
    keep_ties(model, "mean").load_state_dict(state)
    assert torch.allclose(model.emb.weight, state["emb.weight"] + .5, atol=1e-6)
    narrow = nn.ModuleDict({"a": nn.Linear(2, 4, bias=False), "b": nn.Linear(2, 2, bias=False)})
    tie_(narrow, ["a.weight", "b.weight"], map=Slice(slice(0, 2)))
    keep_ties(narrow)
    refuses(narrow, lambda: narrow.load_state_dict({"b.weight": torch.ones(2, 2)}), "is there without the source")
    narrow.load_state_dict({"a.weight": torch.ones(4, 2), "b.weight": torch.ones(2, 2)})
    assert torch.equal(narrow.b.weight, torch.ones(2, 2))


def test_row_3_a_prefix_before_the_names():
    model = nn.ModuleDict({"part": keep_ties(mapped())})
    state = {f"part.{k}": v for k, v in untied_state(model.part).items()}
    model.load_state_dict(state, assign=True)
    state["part.head.weight"] = state["part.head.weight"] + 1
    with pytest.raises(BrokenTie, match="'part.head.weight' differs"): model.load_state_dict(state)
    check_ties(model)


@pytest.mark.parametrize("keep", [lambda m: m, keep_ties, lambda m: keep_ties(m, "first")], ids=["declared", "kept", "by a policy"])
def test_row_3_a_whole_with_a_tie_asks_its_parts_before_anything_is_loaded(keep):
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "part": keep(tied()), "b": nn.Linear(2, 2)})
    tie_(model, ["a.bias", "b.bias"])
    state = {name: value + 1 for name, value in model.state_dict().items()}
    state["part.head.weight"] = state["part.head.weight"] + 1
    if getattr(model.part.__dict__.get("_apply"), "on_conflict", "error") == "error":
        refuses(model, lambda: model.load_state_dict(state), "part.head.weight", ValueError)
    else:
        model.load_state_dict(state)
        assert torch.equal(model.part.head.weight, state["part.emb.weight"])
    state["b.bias"] = state["b.bias"] + 1
    refuses(model, lambda: model.load_state_dict(state), "a.bias|part.head", ValueError)


def test_row_3_without_one_a_part_is_asked_when_its_turn_comes():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "part": tied()})
    state = {name: value + 1 for name, value in model.state_dict().items()}
    state["part.head.weight"] = state["part.head.weight"] + 1
    part = copy.deepcopy(model.part.state_dict())
    with pytest.raises(ValueError, match="one value for the tie"): model.load_state_dict(state)
    assert torch.equal(model.a.weight, state["a.weight"]) and torch.equal(model.part.emb.weight, part["emb.weight"]), "as keep_ties says"


def test_a_broken_model_does_not_load():
    model = keep_ties(tied())
    model.head.weight = nn.Parameter(torch.zeros(6, 4))
    refuses(model, lambda: model.load_state_dict(untied_state(Words())), "'head.weight' differs")
    model.to(torch.float64)
    with pytest.raises(BrokenTie): check_ties(model)
    assert model.head.weight.abs().max() == 0, "a broken tie is not mended in passing"


def test_what_cannot_be_kept_is_found():
    model = keep_ties(tied())
    for do in (lambda: model.head.load_state_dict(fresh(model.head.state_dict()), assign=True), lambda: model.head.to("meta")):
        do()
        with pytest.raises(BrokenTie): check_ties(model)
        retie_(model)


def test_keeping_needs_ties_that_hold():
    model = tied()
    model.head.weight = nn.Parameter(torch.zeros(6, 4))
    refuses(model, lambda: keep_ties(model), "'head.weight' differs")


def test_a_copy_keeps_its_own_ties():
    model = keep_ties(mapped())
    other = copy.deepcopy(model)
    other.to("meta")
    assert not model.emb.weight.is_meta and check_ties(other) and check_ties(model)
    with pytest.raises(BrokenTie): other.load_state_dict({**untied_state(mapped()), "head.weight": torch.zeros(6, 4)})


@pytest.mark.long
def test_a_pickle_keeps_in_a_fresh_process_whatever_hooks_come_after(tmp_path):
    torch.save(keep_ties(mapped()), tmp_path / "model.pt")
    code = f"""
import torch, sys
sys.path[:0] = {sys.path!r}
from sharetie.binding import check_ties
model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)
model.register_load_state_dict_pre_hook(lambda *_: None)
model.register_load_state_dict_post_hook(lambda *_: None)
model.load_state_dict({{k: v.clone() for k, v in model.state_dict().items()}}, assign=True)
check_ties(model.to("meta"))
print("kept")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "kept\n", done.stderr


def test_swapping_tensors_is_fine_too():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model = keep_ties(mapped())
        for do in ("row 2 to_empty", "row 2 assign", "half"): check_ties(LIVES[do](model) and model)
    finally: torch.__future__.set_swap_module_params_on_conversion(False)


def test_row_26_kept_models_compile_and_export():
    model = keep_ties(mapped())
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(X), model(X))
    exported = torch.export.export(model, (X,))
    assert torch.equal(exported.module()(X), model(X))


def test_row_5_fsdp2_keeps_ties(one_process):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    with torch.device("meta"): model = mapped()
    fully_shard(keep_ties(model), mesh=init_device_mesh("cpu", (1,)))
    model.to_empty(device="cpu")
    check_ties(model)
    source = mapped()
    state = {k: torch.distributed.tensor.distribute_tensor(v, model.emb.weight.device_mesh, model.emb.weight.placements) for k, v in source.state_dict().items()}
    model.load_state_dict(state, assign=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=.1)
    assert torch.allclose(model(X), source(X))
    model(X).sum().backward()
    source(X).sum().backward()
    optimizer.step()
    check_ties(model, optimizer)
    assert torch.allclose(model.emb.weight.full_tensor(), source.emb.weight - .1 * source.emb.weight.grad, atol=1e-6)
    torn = dict(model.state_dict()) | {"head.weight": model.head.weight.detach() + 1}
    with pytest.raises(BrokenTie, match="differs by up to 1"): model.load_state_dict(torn)


def test_equal_values():
    nan = torch.tensor([1., torch.nan])
    assert equal_values(nan, nan.clone()) and equal_values(torch.ones(0), torch.ones(0)) and not equal_values(nan, torch.ones(2))
    assert equal_values(torch.tensor([True]), torch.tensor([True])) and not equal_values(torch.tensor([1j]), torch.tensor([2j]))


def test_all_names_of_the_part_come_from_here():
    import sharetie.binding as binding
    public = {"Declared", "declared_ties", "tie_", "untie_", "share_module_", "check_ties", "BrokenTie", "retie_", "keep_ties", "Transpose"}
    assert public <= set(binding.__all__) and all(hasattr(binding, name) for name in binding.__all__)
    assert isinstance(Function(torch.t), nn.Module)


def test_names_that_begin_alike_are_not_confused_by_untie():
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("layer10", "layer1", "layer2")})
    share_module_(model, ["layer10", "layer1", "layer2"])
    untie_(model, "layer1")
    assert [d.names for d in declared_ties(model)] == [("layer10", "layer2")] and check_ties(model)


def test_a_part_of_a_shared_module_is_not_untied_alone():
    model = nn.ModuleDict({name: nn.Sequential(nn.Linear(2, 2)) for name in "ab"})
    share_module_(model, ["a", "b"])
    refuses(model, lambda: untie_(model, "a.0"), "'a.0' is inside of 'a', which is shared with", ValueError)


def test_whole_numbers_have_no_mean():
    model = nn.Module()
    model.register_buffer("a", torch.tensor([1, 2]))
    model.register_buffer("b", torch.tensor([1, 2]))
    tie_(model, ["a", "b"])
    model.b = torch.tensor([2, 3])
    refuses(model, lambda: retie_(model, "mean"), "on_conflict: 'error' or 'first' for torch.int64 is expected, got 'mean'", ValueError)


def test_what_is_no_tensor_is_left_to_pytorch():
    model = keep_ties(tied())
    with pytest.raises(RuntimeError, match="expected torch.Tensor or Tensor-like object"): model.load_state_dict(model.state_dict() | {"head.weight": 3})


def test_a_wrong_shape_is_told_as_one():
    model = tied()
    with pytest.raises(RuntimeError, match="size mismatch for head.weight"): model.load_state_dict(model.state_dict() | {"head.weight": torch.ones(3)})


def test_a_tie_that_cannot_be_mended_leaves_buffers_as_persistent_as_they_were():
    def holder(value):
        module = nn.Module()
        module.register_buffer("w", torch.full((2, 2), value), persistent=False)
        return module
    model = nn.ModuleDict({"a": holder(0.), "b": holder(0.), "c": nn.Linear(2, 2, bias=False), "d": nn.Linear(2, 2, bias=False)})
    tie_(model, ["a.w", "b.w"], map=Transpose())
    tie_(model, ["c.weight", "d.weight"])
    model["b"], model["d"].weight = holder(1.), nn.Parameter(torch.zeros(3, 2))
    before = list(model.state_dict())
    with pytest.raises(BrokenTie): retie_(model, on_conflict="first")
    assert list(model.state_dict()) == before


class Speaker(nn.Module):
    "Embedding, two like layers and a head."
    def __init__(self):
        super().__init__()
        self.emb, self.first, self.second = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)

    def forward(self, x): return self.head(self.second(self.first(self.emb(x))))


def test_ties_made_through_the_wrapper_of_compile_are_those_of_the_model():
    model, at = torch.compile(inner := Speaker(), backend="eager"), "_orig_mod."
    before = model(torch.arange(6))
    tie_(model, [f"{at}emb.weight", f"{at}head.weight"])
    share_module_(model, [f"{at}first", f"{at}second"])
    assert [d.names for d in declared_ties(inner)] == [("emb.weight", "head.weight"), ("first", "second")]
    assert [d.names for d in declared_ties(model)] == [tuple(at + n for n in d.names) for d in declared_ties(inner)]
    assert len(check_ties(model)) == len(check_ties(inner)) == 3
    after = model(torch.arange(6))
    assert not torch.equal(before, after) and torch.equal(after, inner(torch.arange(6)))
    untie_(model, f"{at}second")
    untie_(model, f"{at}head.weight")
    assert not declared_ties(model) and not find_ties(model)


def test_ties_of_a_compiled_model_are_kept_and_mended():
    model, at = torch.compile(Speaker(), backend="eager"), "_orig_mod."
    tie_(model, [f"{at}first.weight", f"{at}second.weight"], map=Transpose())
    model.get_submodule(f"{at}head").weight = model.get_submodule(f"{at}emb").weight
    assert keep_ties(model) is model and len(declared_ties(model)) == 2
    model.to(torch.float64)
    model.load_state_dict(model.state_dict())
    assert len(check_ties(copy.deepcopy(model))) == len(check_ties(model)) == 2
    model.get_submodule(f"{at}head").weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    with pytest.raises(BrokenTie, match=f"{at}emb.weight = {at}head.weight"): check_ties(model)
    assert len(retie_(model, on_conflict="first")) == 2
