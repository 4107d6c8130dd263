"""Members of chapter 04_members: what patterns take, what follows a weight, and what cannot be tied."""
import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from sharetie.members import Member, check_group, group_members, members_of, per_group


def stack(n=3): return nn.Sequential(*(nn.Linear(4, 4) for _ in range(n)))
def bare(*tensors): return [Member(f"w{i}", None, t) for i, t in enumerate(tensors)]
def found(tied, members=None): return {label: [m.name for m in group] for label, group in group_members(tied, members).items()}


# ---- a weight by its place

def test_members_of_lists_every_name_with_its_place():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2, bias=False)))
    members = members_of(model, "m.", 3)
    assert list(members) == ["0.weight", "0.bias", "1.0.weight"]
    assert members["1.0.weight"].name == "m.1.0.weight" and members["1.0.weight"].key == (3, "1.0.weight")
    assert members["1.0.weight"].owner is model[1][0] and members["1.0.weight"].tensor is model[1][0].weight


@pytest.mark.parametrize("change", [
    lambda model: model.double(), lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
    lambda model: setattr(model[0], "weight", nn.Parameter(torch.ones(4, 4))),
    lambda model: nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Softplus()),
], ids=["cast", "load", "replace", "parametrize"])
def test_a_member_follows_its_weight(change):
    model = stack(1)
    member = members_of(model)["0.weight"]
    change(model)
    assert member.tensor is model[0].weight or torch.equal(member.tensor, model[0].weight)


def test_a_parameter_of_the_model_itself():
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(2))
    assert members_of(model)["scale"].tensor is model.scale


# ---- groups

def test_groups_across_models():
    a, b, c = stack(), stack(), stack()
    assert found((a, b), "*.bias") == {f"{i}.bias": [f"models[0].{i}.bias", f"models[1].{i}.bias"] for i in range(3)}
    assert found((a, b, c), ["0.weight"]) == {"0.weight": [f"models[{i}].0.weight" for i in range(3)]}
    assert found((a, b), [("0.weight", "2.weight")]) == {"0.weight": ["models[0].0.weight", "models[1].2.weight"]}
    assert found((a, b), [("0.w*", "2.w*")]) == found((a, b), [("0.weight", "2.weight")])
    assert list(found((a, b))) == [name for name, _ in a.named_parameters()]


def test_groups_within_a_model():
    model = stack()
    assert found((model,), ["*.weight"]) == {"*.weight": ["0.weight", "1.weight", "2.weight"]}
    assert found((model,), [["0.weight", "2.weight"]]) == {"0.weight": ["0.weight", "2.weight"]}
    assert found((model,), {"ends": ("[02].bias",), "all": "*.weight"}) == {"ends": ["0.bias", "2.bias"], "all": ["0.weight", "1.weight", "2.weight"]}


def test_a_weight_with_two_names_is_in_a_group_once():
    model = stack(2)
    model[1].weight = model[0].weight
    assert found((model,), ["*.weight"]) == {"*.weight": ["0.weight"]}


def test_groups_of_tensors():
    x, y = torch.zeros(2), torch.ones(2)
    assert found(([(x, y), [y, x]],)) == {"groups[0]": ["groups[0][0]", "groups[0][1]"], "groups[1]": ["groups[1][0]", "groups[1][1]"]}
    assert found(({"ends": (x, y)},)) == {"ends": ["ends[0]", "ends[1]"]} and found(([],)) == {}


@pytest.mark.parametrize("tied, members, error, message", [
    (None, None, TypeError, "^tied: .* got NoneType"), (stack(), None, TypeError, "^tied: .* got Sequential"), (3, None, TypeError, "^tied: "),
    ((), None, TypeError, "got nothing"), ((3,), None, TypeError, "got int"), ((None, None), None, TypeError, "got NoneType, NoneType"),
    ((stack(), 3), None, TypeError, "got Sequential, int"), ((torch.zeros(2),), None, TypeError, "got Tensor"),
    (([torch.zeros(2)],), None, TypeError, r"^groups\[0\]: a tuple of tensors is expected, got Tensor"),
    (([(torch.zeros(2), 3)],), None, TypeError, r"^groups\[0\]: "), ((["ab"],), None, TypeError, r"^groups\[0\]: "), (("ab",), None, TypeError, r"^groups\[0\]: "),
    (([(torch.zeros(2), torch.ones(2))],), "*", ValueError, "^members: names need models, not bare tensors; got '\\*'"),
    ((stack(),), None, ValueError, "^members: which weights are tied"), ((stack(),), ["*.wieght"], ValueError, "nearest is"),
    ((stack(), nn.Linear(4, 4)), None, ValueError, "different names"), ((stack(), nn.Linear(4, 4)), "0.bias", ValueError, r"members, models\[1\]: '0.bias' matches none"),
    ((stack(), stack()), [("0.weight",)], ValueError, "names 1 parameters for 2 models"), ((stack(), stack()), [("0.*", "0.*")], ValueError, "matches 2 of 6"),
    ((stack(), stack()), [("0.bias", "0.bias"), ("0.bias", "1.bias")], ValueError, "two groups are called '0.bias'"),
    *(((stack(), stack()), bad, TypeError, "^members") for bad in (3, [None], [()], "", [""], torch.tensor(1.0), torch.zeros(2), {"0.bias": "1.bias"}, [("0.bias", 3)], True)),
    ((stack(),), {"a": None}, TypeError, "^members: "), ((stack(),), [[3]], TypeError, "^members: "),
])
def test_groups_that_cannot_be(tied, members, error, message):
    with pytest.raises(error, match=message): group_members(tied, members)


# ---- what can be tied

W = torch.zeros(2, 3)


@pytest.mark.parametrize("tensors, map, error, message", [
    ([], None, ValueError, r"^g: a tie needs two members or more, got \[\]"), ([W], None, ValueError, r"two members or more, got \['w0'\]"),
    ([W, W], None, ValueError, "the same tensor is on both sides, as w0 and w1"), ([W, W.detach()], None, ValueError, "same tensor"), ([W, W[:]], None, ValueError, "same tensor"),
    ([W, W + 1, W], None, ValueError, "as w0 and w2"), ([W.long(), W.long() + 1], None, TypeError, "w0 is torch.int64; floating point"),
    ([W, W.bool()], None, TypeError, "w1 is torch.bool"), ([W, W.to_sparse()], None, TypeError, "w1 is torch.sparse_coo; a dense tensor is expected"), ([W, W.cfloat()], None, TypeError, "w1 is torch.complex64"),
    ([W, W.half()], None, ValueError, "w0 has dtype torch.float32, w1 has dtype torch.float16"), ([W, W.to("meta")], None, ValueError, "w0 has device cpu, w1 has device meta"),
    ([W, W.T.clone()], None, ValueError, r"w0 has shape \(2, 3\), w1 has shape \(3, 2\); a map"), ([W, W[0, 0]], None, ValueError, r"w1 has shape \(\)"),
    ([W, W + 1], 3, TypeError, "^map of g: a function of w0 is expected, got 3"), ([W, W + 1], lambda t: [t], TypeError, "^map of g: it turns w0 into a list"),
    ([W, W + 1], lambda t: t @ t, ValueError, r"^map of g: it fails on w0 of shape \(2, 3\): mat1"), ([W, W + 1], lambda: 0, ValueError, "^map of g: it fails"),
    ([W, W + 1], torch.t, ValueError, r"w0 has shape \(3, 2\) after its map, w1 has shape \(2, 3\)$"), ([W, W + 1], torch.Tensor.double, ValueError, "dtype torch.float64 after its map"),
])
def test_groups_that_cannot_be_tied(tensors, map, error, message):
    with pytest.raises(error, match=message): check_group("g", bare(*tensors), map)


@pytest.mark.parametrize("members", [None, 3, "ab", [W, W], {"a": W}, (m for m in bare(W, W + 1))], ids=lambda v: type(v).__name__)
def test_no_members(members):
    with pytest.raises(TypeError, match="^g: a list of members is expected, got"): check_group("g", members)


def test_lazy_weights_are_refused_until_they_have_values():
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyLinear(3))
    with pytest.raises(ValueError, match="0.weight has no values yet; send a batch through its model"): check_group("g", group_members((model,), ["*.weight"])["*.weight"])
    model(torch.zeros(1, 3))
    check_group("g", group_members((model,), ["*.weight"])["*.weight"])


@pytest.mark.parametrize("tensors", [
    (W, W + 1), (W[:1], W[1:]), (torch.zeros(0, 3), torch.zeros(0, 3)), (W[:0], W[:0]), (torch.zeros(()), torch.ones(())),
    (torch.zeros(3, 3), torch.zeros(3, 3).T), (W * math.nan, W), (W.to("meta"), (W + 1).to("meta")),
], ids=lambda tensors: " ".join(str(tuple(t.shape)) for t in tensors))
def test_groups_that_can_be_tied(tensors): check_group("g", bare(*tensors))


def test_a_weight_and_its_own_transposed_can_be_tied():
    w = torch.randn(3, 3)
    check_group("g", bare(w, w.T))


# ---- one value per group

def test_per_group():
    groups = ["a.weight", "a.bias", "b.weight"]
    assert per_group(2, groups, "λ") == per_group(2, iter(groups), "λ") == dict.fromkeys(groups, 2)
    assert per_group({"a.*": 1, "*": 2}, iter(groups), "λ") == {"a.weight": 1, "a.bias": 1, "b.weight": 2}
    assert per_group({"*": 2, "a.*": 1}, groups, "λ") == dict.fromkeys(groups, 2)
    assert per_group({"a.*": 1}, groups, "map", required=False) == {"a.weight": 1, "a.bias": 1, "b.weight": None}
    assert per_group(None, [], "map") == {}


@pytest.mark.parametrize("value, groups, error, message", [
    ({"c.*": 1}, ["a", "b"], ValueError, r"^λ: 'c.\*' matches none of 2 names"), ({"a": 1}, ["a", "b"], ValueError, r"^λ: no pattern of \['a'\] fits \['b'\]; add one"),
    ({}, ["a"], ValueError, "^λ: no pattern"), ({3: 1}, ["a"], TypeError, "^λ: a name or pattern"), (1, None, TypeError, "^groups: "), ({"*": 1}, None, TypeError, "^groups: "),
    (1, "abc", TypeError, "^groups: .* got 'abc'"), (1, 3, TypeError, "^groups: "), ({"*": 1}, [np.nan], TypeError, "^names: a list of text"),
])
def test_values_that_fit_no_group(value, groups, error, message):
    with pytest.raises(error, match=message): per_group(value, groups, "λ")
