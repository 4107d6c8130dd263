"tie_, untie_ and share_module_: what they make, what they keep, and what they refuse before anything changes."
import copy
import io
import math
import pickle
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from sharetie.finding import Reshape, Scale, Slice, Transpose, find_ties, places
from sharetie.making import Function, _tie_all, declared_ties, tie_
from sharetie.sharing import share_module_, untie_
from sharetie.surgery import apply_once, replace_modules, resize_

PAIR = ["emb.weight", "head.weight"]


class Words(nn.Module):
    def __init__(self, words=6, width=4, **options):
        super().__init__()
        self.emb = nn.Embedding(words, width, **options)
        self.head = nn.Linear(width, words, bias=False)
        self.back = nn.Linear(words, width)
        self.norm = nn.BatchNorm1d(width)
        self.other_norm = nn.BatchNorm1d(width)

    def forward(self, x): return self.head(self.emb(x))


def state(model):
    "All that a model holds, by name: which tensor, of which value, trained or not; and what is declared."
    held = {n: (id(p.tensor), p.tensor.requires_grad, None if p.tensor.is_meta else p.tensor.tolist()) for n, p in places(model).items()}
    return held, declared_ties(model), [type(m) for m in model.modules()]


def flip(w): return w.flip(0)
def broken_map(w): return 1 / 0
def exponential(w): return torch.matrix_exp(w - w.t())


# What tie_ makes

def test_the_first_member_stays_and_all_others_become_it():
    model = Words()
    source, value = model.head.weight, model.head.weight.detach().clone()
    tie = tie_(model, ["head.weight", "emb.weight"])
    assert model.emb.weight is source and torch.equal(source, value)
    assert set(tie.names) == {"head.weight", "emb.weight"} and declared_ties(model)[0].names == ("head.weight", "emb.weight")


def test_patterns_and_names_mix_and_may_overlap():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    assert len(tie_(model, ["2.weight", "*.weight"]).names) == 4
    assert declared_ties(model)[0].names[0] == "2.weight"


def test_ties_that_meet_become_one():
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(4)))
    tie_(model, ["0.weight", "1.weight"])
    tie_(model, ["2.weight", "3.weight"])
    tie_(model, ["3.weight", "1.weight"])
    assert len(list(model.parameters())) == 1 and len(declared_ties(model)) == 1
    assert model[0].weight is model[2].weight, "0 follows 1, though it was not named"


def test_an_undeclared_name_of_a_member_follows():
    model = Words()
    model.extra = nn.Linear(4, 6, bias=False)
    model.extra.weight = model.head.weight
    assert len(tie_(model, PAIR).names) == 3 and model.extra.weight is model.emb.weight


def test_a_tie_that_is_there_already_is_declared():
    model = Words()
    model.head.weight = model.emb.weight
    tie_(model, PAIR)
    tie_(model, PAIR)
    assert [d.names for d in declared_ties(model)] == [tuple(PAIR)]


def test_row_6_tying_a_pseudo_tie_makes_it_true():
    model = Words()
    model.head.weight.data = model.emb.weight.data
    tie_(model, PAIR)
    assert find_ties(model).pseudo == () and model.head.weight is model.emb.weight


def test_row_23_buffers_are_tied():
    model = Words()
    tie = tie_(model, ["norm.running_mean", "other_norm.running_mean"])
    assert tie.kind == "buffer" and model.norm.running_mean is model.other_norm.running_mean
    assert set(model.state_dict()) == set(Words().state_dict())


def test_an_lstm_sees_the_tied_weight():
    model = nn.LSTM(3, 3, num_layers=2)
    tie_(model, ["weight_ih_l0", "weight_ih_l1"])
    x = torch.randn(2, 1, 3)
    before = model(x)[0]
    with torch.no_grad(): model.weight_ih_l0.zero_()
    assert not torch.equal(model(x)[0], before)
    other = nn.LSTM(3, 3, num_layers=2)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x)[0], other(x)[0])


def test_meta_models_are_tied():
    with torch.device("meta"): model = Words()
    tie_(model, PAIR)
    tie_(model, ["emb.weight", "back.weight"], map=Transpose())
    assert model.head.weight is model.emb.weight and model.back.weight.shape == (4, 6) and model.back.weight.is_meta


# Maps

MAPS = {
    "transpose": (nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False), Transpose(), lambda w: w.t()),
    "slice": (nn.Linear(4, 6, bias=False), nn.Linear(4, 2, bias=False), Slice(slice(1, 3)), lambda w: w[1:3]),
    "reshape": (nn.Linear(4, 6, bias=False), nn.Conv2d(4, 6, 1, bias=False), Reshape((6, 4, 1, 1)), lambda w: w[..., None, None]),
    "scale": (nn.Linear(4, 6, bias=False), nn.Embedding(6, 4), Scale(.5), lambda w: w / 2),
    "function": (nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False), flip, flip),
    "chain": (nn.Linear(4, 6, bias=False), nn.Linear(6, 2, bias=False), nn.Sequential(Transpose(), Slice(slice(0, 2))), lambda w: w.t()[:2]),
    "orthogonal": (nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), exponential, exponential),
}


@pytest.fixture(params=MAPS.values(), ids=MAPS)
def mapped(request):
    a, b, map, expected = copy.deepcopy(request.param)
    model = nn.ModuleDict({"a": a, "b": b})
    tie_(model, ["a.weight", "b.weight"], map=map)
    return model, expected


def test_a_mapped_member_follows_its_source(mapped):
    model, expected = mapped
    with torch.no_grad(): model.a.weight.normal_()
    assert torch.allclose(model.b.weight, expected(model.a.weight))
    assert len(list(model.parameters())) == 1


def test_its_gradient_reaches_the_source_once(mapped):
    model, expected = mapped
    model.b.weight.square().sum().backward()
    w = model.a.weight.detach().clone().requires_grad_()
    expected(w).square().sum().backward()
    assert torch.allclose(model.a.weight.grad, w.grad, atol=1e-5)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_mapped_tie_are_whole_and_apart(mapped, how):
    model, expected = mapped
    if how == "deepcopy": other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    with torch.no_grad(): other.a.weight.normal_()
    assert torch.allclose(other.b.weight, expected(other.a.weight)) and torch.allclose(model.b.weight, expected(model.a.weight))
    assert declared_ties(other)[0].map is other.b.parametrizations.weight[0]
    untie_(other, "b.weight")
    assert not parametrize.is_parametrized(other.b) and torch.allclose(model.b.weight, expected(model.a.weight))


def test_tying_a_second_weight_of_a_copy_leaves_the_original():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    tie_(model, ["a.weight", "b.weight"], map=Transpose())
    other = copy.deepcopy(model)
    tie_(other, ["a.bias", "b.bias"], map=Scale(2))
    assert torch.equal(other.b.bias, 2 * other.a.bias) and "bias" in dict(model.b.named_parameters())
    assert model.b(torch.ones(3)).shape == (3,)


def test_row_16_a_right_inverse_does_not_rewrite_the_source():
    class Doubling(nn.Module):
        def forward(self, w): return 2 * w
        def right_inverse(self, w): return w / 2
    plain = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    plain.b.weight, before = plain.a.weight, plain.a.weight.detach().clone()
    parametrize.register_parametrization(plain.b, "weight", Doubling())
    assert not torch.equal(plain.a.weight, before), "PyTorch rewrites the partner"
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    before = model.a.weight.detach().clone()
    tie_(model, ["a.weight", "b.weight"], map=Doubling())
    assert torch.equal(model.a.weight, before) and torch.equal(model.b.weight, 2 * before)
    with pytest.raises(RuntimeError, match="right_inverse"): model.b.weight = before
    assert torch.equal(model.a.weight, before)


def test_a_map_with_weights_of_its_own_trains_them():
    class Plus(nn.Module):
        def __init__(self):
            super().__init__()
            self.delta = nn.Parameter(torch.zeros(3, 3))
        def forward(self, w): return w + self.delta
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    tie_(model, ["a.weight", "b.weight"], map=Plus())
    model.b.weight.sum().backward()
    assert len(list(model.parameters())) == 2 and all(p.grad is not None for p in model.parameters())


def test_one_map_for_several_members_and_two_maps_from_one_source():
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(4)))
    tie_(model, ["0.weight", "1.weight", "2.weight"], map=Transpose())
    tie_(model, ["0.weight", "3.weight"], map=Scale(2))
    assert torch.equal(model[2].weight, model[0].weight.t()) and torch.equal(model[3].weight, 2 * model[0].weight)
    assert [d.names for d in declared_ties(model)] == [("0.weight", "1.weight", "2.weight"), ("0.weight", "3.weight")]


def test_a_mapped_buffer_is_saved_as_before():
    for saved in (True, False):
        model = nn.Module()
        model.register_buffer("a", torch.ones(2))
        model.register_buffer("b", torch.ones(2), persistent=saved)
        tie_(model, ["a", "b"], map=Scale(2.))
        assert [*model.state_dict()] == ["a", "parametrizations.b.original"][:1 + saved]
        untie_(model, "b")
        assert [*model.state_dict()] == ["a", "b"][:1 + saved] and torch.equal(model.b, torch.full((2,), 2.))


def test_mapped_buffers():
    model = Words()
    tie_(model, ["norm.running_mean", "other_norm.running_mean"], map=Scale(3))
    model.norm.running_mean.add_(1)
    assert torch.equal(model.other_norm.running_mean, torch.full((4,), 3.))


# Rows that concern making

def test_row_12_the_source_gives_the_initialization():
    def loss(names, **options):
        torch.manual_seed(0)
        model, body = Words(1000, 256), nn.Sequential(nn.Linear(256, 256), nn.LayerNorm(256))
        x = torch.arange(1000)
        tie_(model, names, **options)
        return F.cross_entropy(model.head(body(model.emb(x))), x.roll(1)).item()
    assert loss(PAIR) > 45, "the embedding's own initialization is too large for a head"
    assert loss(PAIR[::-1]) < math.log(1000) + .5 and loss(PAIR, map=Scale(1 / 16)) < math.log(1000) + 1


def test_row_16_a_computed_member_is_refused_and_its_originals_can_be_tied():
    model = nn.ModuleDict({"a": parametrizations.weight_norm(nn.Linear(3, 3)), "b": parametrizations.weight_norm(nn.Linear(3, 3))})
    with pytest.raises(ValueError, match="computed by _WeightNorm from .*original0.*tie those"): tie_(model, ["a.weight", "b.weight"])
    for i in (0, 1): tie_(model, [f"{m}.parametrizations.weight.original{i}" for m in "ab"])
    assert torch.equal(model.a.weight, model.b.weight) and len(list(model.parameters())) == 4


def test_row_19_padding_is_warned_of_trained_or_masked():
    x, y = torch.tensor([1, 2]), torch.tensor([3, 4])
    def padding_grad(model):
        F.cross_entropy(model(x), y).backward()
        return model.emb.weight.grad[0]
    plain = Words(padding_idx=0)
    plain.head.weight = plain.emb.weight
    assert padding_grad(plain).abs().max() > 0, "PyTorch trains the row"
    with pytest.warns(UserWarning, match=r"padding_idx is \{'emb.weight': 0\}.*padding='mask'"): tie_(Words(padding_idx=0), PAIR)
    model = Words(padding_idx=0)
    tie_(model, PAIR, padding="mask")
    for own in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert torch.equal(padding_grad(own), torch.zeros(4)) and own(x)[:, 0].eq(-torch.inf).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tie_(Words(padding_idx=0), PAIR, padding="train")


def masked(**options):
    model = Words(padding_idx=0)
    tie_(model, PAIR, padding="mask", **options)
    return model


def test_row_19_the_mask_is_put_on_once_and_goes_with_the_tie():
    x = torch.tensor([1, 2])
    model = masked()
    tie_(model, PAIR, padding="mask")
    assert len(model.head._forward_hooks) == 1
    for how in (lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        for name in PAIR:
            own = how(masked())
            untie_(own, name)
            assert not own.head._forward_hooks and own(x).isfinite().all()
    for name in PAIR[1:]:
        own = masked(map=Scale(2.))
        assert own(x)[:, 0].eq(-torch.inf).all()
        untie_(own, name)
        assert not own.head._forward_hooks and own(x).isfinite().all()


def test_row_19_the_mask_stays_while_an_embedding_is_tied():
    model = masked()
    model.twin = nn.Linear(4, 6, bias=False)
    with pytest.warns(UserWarning, match="padding_idx"): tie_(model, [*PAIR, "twin.weight"])
    untie_(model, "twin.weight")
    assert len(model.head._forward_hooks) == 1 and not model.twin._forward_hooks
    tie_(model, PAIR, padding="train")
    assert not model.head._forward_hooks, "the row is trained, it was said"


def test_row_19_max_norm_and_sparse_are_warned_of():
    with pytest.warns(UserWarning, match="max_norm of emb.weight"): tie_(Words(max_norm=1.), PAIR)
    with pytest.warns(UserWarning, match="sparse=True of emb.weight"): tie_(Words(sparse=True), PAIR)


def test_row_19_two_embeddings_with_one_padding_row_are_fine():
    model = nn.ModuleList(nn.Embedding(4, 2, padding_idx=1) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tie_(model, "*.weight")
    model = nn.ModuleList(nn.Embedding(4, 2, padding_idx=i) for i in range(2))
    with pytest.warns(UserWarning, match="padding_idx"): tie_(model, "*.weight")


@pytest.mark.long
def test_row_26_a_compiled_model_takes_up_ties():
    model, x = Words(), torch.tensor([1, 2])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(x)
    tie_(model, PAIR)
    assert torch.equal(compiled(x), F.linear(model.emb(x), model.emb.weight))
    untie_(model, "head.weight")
    with torch.no_grad(): model.head.weight.zero_()
    assert compiled(x).abs().max() == 0
    tie_(model, PAIR, map=Scale(2.))
    assert torch.allclose(compiled(x), 2 * F.linear(model.emb(x), model.emb.weight))


def test_one_step_equals_that_of_summed_gradients():
    for optimizer in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        model, x = Words(), torch.tensor([1, 2])
        tie_(model, PAIR)
        tie_(model, ["emb.weight", "back.weight"], map=Transpose())
        w = model.emb.weight.detach().clone().requires_grad_()
        def loss(a, b, c): return F.linear(F.linear(a[x], b), c).square().sum()
        steps = optimizer([model.emb.weight], lr=.1), optimizer([w], lr=.1)
        for step, args in zip(steps, ((model.emb.weight, model.head.weight, model.back.weight), (w, w, w.t()))):
            loss(*args).backward()
            step.step()
        assert torch.allclose(model.emb.weight, w, atol=1e-6)


# What tie_ refuses

def as_is(model): pass


REFUSED = {
    "no module": (None, PAIR, {}, TypeError, "model: a module is expected"),
    "no such name": (as_is, ["emb.wieght", "head.weight"], {}, ValueError, "members: 'emb.wieght' matches none.*nearest is 'emb.weight'"),
    "a pattern for nothing": (as_is, ["layers.*.weight"], {}, ValueError, r"members: 'layers\.\*\.weight' matches none"),
    "one member": (as_is, ["emb.weight"], {}, ValueError, "members: two names or more are expected, got .*emb.weight"),
    "no member": (as_is, [], {}, ValueError, "members: two names or more"),
    "no names": (as_is, 3, {}, TypeError, "members: a list of names or patterns is expected, got 3"),
    "a tensor": (as_is, torch.ones(2), {}, TypeError, "members: a list of names or patterns is expected, got Tensor"),
    "tensors": (as_is, [torch.ones(2)], {}, TypeError, "members: a name or pattern"),
    "itself": (as_is, ["emb.weight", "emb.weight"], {}, ValueError, "members: 'emb.weight' is named twice"),
    "two shapes": (as_is, ["emb.weight", "norm.weight"], {}, ValueError, r"'emb.weight' has shape \(6, 4\), 'norm.weight' has shape \(4,\); a map"),
    "a transpose": (as_is, ["emb.weight", "back.weight"], {}, ValueError, r"map=Transpose\(\) ties them"),
    "two types": (lambda m: m.head.double(), PAIR, {}, ValueError, "dtype torch.float32, 'head.weight' has dtype torch.float64"),
    "two devices": (lambda m: m.head.to("meta"), PAIR, {}, ValueError, "device cpu, 'head.weight' has device meta"),
    "no map": (as_is, PAIR, {"map": 3}, TypeError, "map: a function of the source"),
    "a class as map": (as_is, PAIR, {"map": Transpose}, TypeError, r"map: a function of the source, or a module such as Transpose\(\), is expected, got Transpose"),
    "a map that raises": (as_is, PAIR, {"map": broken_map}, ValueError, r"map: one that fits 'emb.weight' \(Parameter of float32, shape \(6, 4\)\) is expected, got Function\(broken_map\), which raises ZeroDivisionError"),
    "a slice beyond the end": (as_is, PAIR, {"map": Slice(10)}, ValueError, r"map: one that fits .* got Slice\(\[10\]\), which raises IndexError"),
    "a map that takes nothing": (as_is, PAIR, {"map": lambda: 3}, ValueError, "map: one that fits .* which raises TypeError"),
    "a map that writes": (as_is, PAIR, {"map": lambda w: w.mul_(2)}, ValueError, r"map: a function that does not write to the source is expected, got Function"),
    "a map of no axis": (as_is, PAIR, {"map": Transpose(0, 2, 1)}, ValueError, "map: one that fits"),
    "trained as text": (as_is, PAIR, {"trained": "yes"}, TypeError, "trained: True, False or None is expected, got 'yes'"),
    "trained as number": (as_is, PAIR, {"trained": 1}, TypeError, "trained: True, False or None is expected, got 1"),
    "trained buffers": (as_is, ["norm.running_mean", "other_norm.running_mean"], {"trained": True}, ValueError, "trained: None for buffers is expected, got True"),
    "a map to another shape": (as_is, PAIR, {"map": Transpose()}, ValueError, r"'emb.weight' has shape \(4, 6\) after Transpose\(\)"),
    "a map to another type": (as_is, PAIR, {"map": torch.Tensor.double}, ValueError, "dtype torch.float64 after Function"),
    "a map to no tensor": (as_is, PAIR, {"map": torch.Tensor.tolist}, TypeError, "map: a function from 'emb.weight' to a tensor is expected, got list"),
    "a Parameter and a buffer": (as_is, ["norm.weight", "norm.running_mean"], {}, ValueError, "Parameters and buffers cannot be tied"),
    "frozen and trained": (lambda m: m.emb.weight.requires_grad_(False), PAIR, {}, ValueError, "frozen and trained ones, .*'emb.weight': 'frozen'.*trained=True or trained=False decides"),
    "mapped to itself": (lambda m: tie_(m, PAIR), PAIR, {"map": Scale(2.)}, ValueError, r"are one tensor, which cannot be Scale\(2.0\) of itself"),
    "a mapped source": (lambda m: tie_(m, PAIR, map=Scale(2.)), ["head.weight", "emb.weight"], {}, ValueError, "computed from 'emb.weight' by Scale.*chain or a cycle"),
    "a mapped member again": (lambda m: tie_(m, PAIR, map=Scale(2.)), PAIR, {"map": Scale(2.)}, ValueError, "computed from 'emb.weight' by Scale"),
    "a cycle through a map": (lambda m: tie_(m, ["emb.weight", "back.weight"], map=Transpose()), ["head.weight", "emb.weight"], {"map": Scale(2.)}, ValueError, "a chain or a cycle of ties"),
    "a member with another name": (lambda m: (m.register_module("twin", nn.Linear(4, 6)), setattr(m.twin, "weight", m.head.weight)), PAIR, {"map": Scale(2.)}, ValueError, "is tied to .*twin.weight.*name them as members too"),
    "padding without": (as_is, PAIR, {"padding": "mask"}, ValueError, "padding='mask': a tie of embeddings with one padding_idx"),
    "padding to train without": (as_is, PAIR, {"padding": "train"}, ValueError, "padding='train': a tie of an embedding with padding_idx is expected, got \\['emb.weight', 'head.weight'\\]"),
    "padding to train of no embedding": (as_is, ["norm.weight", "other_norm.weight"], {"padding": "train"}, ValueError, "padding='train': a tie of an embedding"),
    "padding through a transpose": (lambda m: (setattr(m, "emb", nn.Embedding(4, 6, padding_idx=0))), PAIR, {"map": Transpose(), "padding": "mask"}, ValueError, r"padding='mask': no map, or Scale, is expected, got Transpose\(\)"),
    "padding misspelt": (as_is, PAIR, {"padding": "masked"}, ValueError, "padding: one of .*did you mean 'mask'"),
}


@pytest.mark.parametrize("prepare, members, options, error, message", REFUSED.values(), ids=REFUSED)
def test_tie_refuses_before_anything_changes(prepare, members, options, error, message):
    model = Words()
    if prepare is None:
        with pytest.raises(error, match=message): tie_([model], members)
        return
    prepare(model)
    before = state(model)
    with pytest.raises(error, match=message): tie_(model, members, **options)
    assert state(model) == before


class Stubborn(nn.Linear):
    "A layer that lets nobody set its weight once it is made."
    def __setattr__(self, name, value):
        if name == "weight" and "weight" in self._parameters: raise RuntimeError("weight is mine")
        super().__setattr__(name, value)


def test_tie_is_whole_or_nothing_where_an_owner_refuses():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": Stubborn(3, 3)})
    before = state(model)
    with pytest.raises(RuntimeError, match="weight is mine"): tie_(model, ["a.weight", "b.weight", "c.weight"], trained=False)
    assert state(model) == before


def test_lazy_modules_are_named():
    def lazy(*names):
        model = Words()
        for name in names: model.register_module(name, nn.LazyLinear(6, bias=False))
        return model
    says = "lazy.weight: a tensor with a shape is expected, got one of a lazy module; call the model once first"
    for names, options in ((["emb.weight", "lazy.weight"], {}), (["lazy.weight", "emb.weight"], {}), (["lazy.weight", "l.weight"], {"map": Scale(2.)})):
        with pytest.raises(ValueError, match=says): tie_(lazy("lazy", "l"), names, **options)
    model = lazy("lazy", "l")
    model.l.weight = model.lazy.weight
    with pytest.raises(ValueError, match=says): untie_(model, "lazy.weight")
    model.lazy(torch.ones(1, 4))
    untie_(model, "lazy.weight")
    assert tie_(model, ["emb.weight", "lazy.weight"])


@pytest.mark.parametrize("trained", [True, False])
def test_trained_decides_between_frozen_and_trained(trained):
    model = Words()
    model.emb.weight.requires_grad_(False)
    tie_(model, PAIR, trained=trained)
    assert model.head.weight is model.emb.weight and model.emb.weight.requires_grad is trained


def test_warnings_point_at_the_callers_line():
    with pytest.warns(UserWarning, match="padding_idx") as told: tie_(Words(padding_idx=0), PAIR)
    assert [w.filename for w in told] == [__file__]


def test_rnn_members_cannot_be_computed():
    model = nn.LSTM(3, 3, num_layers=2)
    with pytest.raises(ValueError, match="LSTM, which reads its weights from a list"): tie_(model, ["weight_ih_l0", "weight_ih_l1"], map=Scale(2.))


def test_wrapped_models_are_refused(one_process):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    ddp, fsdp = nn.parallel.DistributedDataParallel(Words()), Words()
    fully_shard(fsdp, mesh=init_device_mesh("cpu", (1,)))
    for model, prefix in ((ddp, "module."), (fsdp, "")):
        with pytest.raises(ValueError, match="model: one that is not wrapped yet is expected"): tie_(model, [prefix + name for name in PAIR])
        with pytest.raises(ValueError, match="not wrapped yet"): untie_(model, prefix + "head.weight")
        with pytest.raises(ValueError, match="not wrapped yet"): share_module_(model, [prefix + "norm", prefix + "other_norm"])


@pytest.mark.long
def test_what_a_wrapper_holds_is_refused_while_it_lives(one_process):
    model = Words()
    ddp = nn.parallel.DistributedDataParallel(model)
    before = {name: p.tensor for name, p in places(model).items()}
    for call in (lambda: tie_(model, PAIR), lambda: tie_(ddp.module, PAIR), lambda: share_module_(model, ["norm", "other_norm"])):
        with pytest.raises(ValueError, match="model: one that is not wrapped yet is expected, got what DistributedDataParallel holds"): call()
    assert all(places(model)[name].tensor is t for name, t in before.items())
    del ddp
    assert tie_(model, PAIR).names == tuple(PAIR)


@pytest.mark.long
def test_a_part_of_what_a_wrapper_holds_is_refused(one_process):
    net = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    ddp = nn.parallel.DistributedDataParallel(net)
    with pytest.raises(ValueError, match="got what DistributedDataParallel holds"): tie_(ddp.module[0], ["0.weight", "1.weight"])
    assert net[0][0].weight is not net[0][1].weight


def test_a_wrapper_of_another_kind_is_not_taken_for_one(one_process):
    model, other = Words(), nn.Module()
    other.module, other.reducer = model, "mean"
    assert tie_(model, PAIR).names == tuple(PAIR)


# Many groups at once

def test_many_groups_are_tied_as_one_by_one():
    def build():
        torch.manual_seed(0)
        model = nn.ModuleList([nn.ModuleList(nn.Linear(3, 3) for _ in range(6)) for _ in range(2)])
        model.append(model[0][0])  # a module under two names
        model[1][5].bias = model[0][5].bias
        return model
    groups = [([f"0.{i}.weight", f"1.{i}.weight"], Transpose() if i % 3 == 1 else None, None if i else False) for i in range(6)]
    groups += [(["0.0.bias", "1.0.bias"],), (["0.5.bias", "0.4.bias"],), (["1.3.weight", "1.5.weight"], None), (["0.2.weight", "0.3.weight"], None)]
    together, apart = build(), build()
    names = _tie_all(together, groups)
    for members, *rest in groups: tie_(apart, members, *rest)
    assert names == [members[0] for members, *_ in groups]
    assert find_ties(together) == find_ties(apart) and [d[0::2] for d in declared_ties(together)] == [d[0::2] for d in declared_ties(apart)]
    assert all(torch.equal(a, b) for a, b in zip(together.state_dict().values(), apart.state_dict().values()))
    assert [p.requires_grad for p in together.parameters()] == [p.requires_grad for p in apart.parameters()]


@pytest.mark.parametrize("bad, message", [
    ((["1.weight", "2.weight"], Transpose()), "'1.weight' is computed"), ((["2.weight", "1.weight"],), "'1.weight' is computed"),
    ((["2.weight", "0.weight"], Transpose()), "'0.weight' is tied to .'1.parametrizations.weight.original'.; a chain or a cycle")])
def test_later_groups_see_what_earlier_ones_made(bad, message):
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    with pytest.raises(ValueError, match=message): _tie_all(model, [(["0.weight", "1.weight"], Transpose()), bad])


# untie_

def test_untie_gives_one_name_a_copy():
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    tie_(model, "*.weight")
    value = model[1].weight.detach().clone()
    untie_(model, "1.weight")
    assert torch.equal(model[1].weight, value) and model[1].weight is not model[0].weight and model[2].weight is model[0].weight
    assert declared_ties(model)[0].names == ("0.weight", "2.weight")


def test_untie_the_source_leaves_an_heir():
    model = Words()
    tie_(model, PAIR)
    tie_(model, ["emb.weight", "back.weight"], map=Transpose())
    untie_(model, "emb.weight")
    assert [d.names for d in declared_ties(model)] == [("head.weight", "back.weight")]
    assert torch.equal(model.back.weight, model.head.weight.t()) and model.emb.weight is not model.head.weight


def test_untie_a_mapped_member_and_a_mapped_buffer():
    model = Words()
    tie_(model, ["emb.weight", "back.weight"], map=Transpose())
    tie_(model, ["norm.running_var", "other_norm.running_var"], map=Scale(2.))
    untie_(model, "back.weight")
    untie_(model, "other_norm.running_var")
    assert isinstance(model.back.weight, nn.Parameter) and torch.equal(model.back.weight, model.emb.weight.t())
    assert type(model.back) is nn.Linear and "running_var" in model.other_norm._buffers and declared_ties(model) == ()
    assert set(model.state_dict()) == set(Words().state_dict())


def test_untie_a_pseudo_tie_gives_memory_of_its_own():
    model = Words()
    model.back.weight = nn.Parameter(model.emb.weight.t())
    untie_(model, "back.weight")
    assert find_ties(model) == ()


def test_untie_knows_ties_that_a_part_declared():
    model = nn.ModuleDict({"part": Words()})
    tie_(model.part, PAIR)
    assert declared_ties(model)[0].names == ("part.emb.weight", "part.head.weight")
    untie_(model, "part.head.weight")
    assert declared_ties(model) == () and find_ties(model) == ()


UNTIED = {
    "nothing tied": (lambda m: None, "head.weight", "is tied to nothing"),
    "no such name": (lambda m: None, "heed.weight", "nearest is 'head.weight'"),
    "a pattern for several": (lambda m: tie_(m, PAIR), "*.weight", "matches"),
    "the source of a map": (lambda m: tie_(m, PAIR, map=Scale(2.)), "emb.weight", "is the source of .*untie_ those members"),
    "computed by others": (lambda m: parametrizations.weight_norm(m.head), "head.weight", "computed by _WeightNorm"),
    "inside a shared module": (lambda m: share_module_(m, ["norm", "other_norm"]), "norm.weight", "untie_ the module"),
    "a module of one name": (lambda m: None, "head", "name: a shared module is expected"),
}


@pytest.mark.parametrize("prepare, name, message", UNTIED.values(), ids=UNTIED)
def test_untie_refuses_before_anything_changes(prepare, name, message):
    model = Words()
    prepare(model)
    before = state(model)
    with pytest.raises(ValueError, match=message): untie_(model, name)
    assert state(model) == before


# share_module_

def tower(n=3): return nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.Dropout(.1), nn.BatchNorm1d(3)) for _ in range(n)))


def test_shared_modules_are_one():
    model, x = tower(), torch.randn(4, 3)
    ties = share_module_(model, "?")
    assert model[1] is model[0] is model[2] and [tie.how for tie in ties] == ["module"] * 7
    assert declared_ties(model)[0] == (("0", "1", "2"), None, "module")
    model.eval()
    assert torch.equal(model(x), model[0](model[0](model[0](x))))


def test_aliases_of_a_module_that_goes_follow():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["c"] = model["b"]
    share_module_(model, ["a", "b"])
    assert model["c"] is model["a"]


def test_untie_a_shared_module():
    model = tower()
    share_module_(model, "?")
    untie_(model, "1")
    assert model[2] is model[0] is not model[1] and declared_ties(model)[0].names == ("0", "2")
    assert all(torch.equal(a, b) for a, b in zip(model[0].state_dict().values(), model[1].state_dict().values()))
    untie_(model, "2")
    assert declared_ties(model) == () and find_ties(model) == ()


def test_untie_a_shared_module_keeps_ties_with_the_outside():
    model = nn.ModuleDict({"emb": nn.Embedding(3, 3), "a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    share_module_(model, ["a", "b"])
    tie_(model, ["emb.weight", "a.weight"])
    untie_(model, "b")
    assert model.b.weight is model.a.weight is model.emb.weight and model.b.bias is not model.a.bias
    mapped = nn.ModuleDict({"emb": nn.Embedding(3, 3), "a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    share_module_(mapped, ["a", "b"])
    tie_(mapped, ["emb.weight", "a.weight"], map=Transpose())
    untie_(mapped, "b")
    with torch.no_grad(): mapped.emb.weight.normal_()
    assert torch.equal(mapped.b.weight, mapped.emb.weight.t()) and torch.equal(mapped.a.weight, mapped.emb.weight.t())


def numbered():
    model = tower(2)
    for i in range(2): model[i].layer_idx = i
    return model


def test_plain_attributes_differ_only_if_that_is_allowed():
    with pytest.raises(ValueError, match="'0' and '1' differ in layer_idx: 0 and 1"): share_module_(numbered(), "?")
    model = numbered()
    share_module_(model, "?", ignore=["layer_idx"])
    assert model[1].layer_idx == 0


def changed(change):
    model = tower()
    change(model)
    return model


SHARED = {
    "no such module": (lambda m: None, ["0", "7"], "patterns: '7' matches none"),
    "one module": (lambda m: None, ["0"], "patterns: two names or more"),
    "itself": (lambda m: None, ["0", "0"], "patterns: '0' is named twice"),
    "one in another": (lambda m: None, ["0", "0.0"], "patterns: '0' contains '0.0'"),
    "another in one": (lambda m: None, ["0.0", "0"], "patterns: '0' contains '0.0'"),
    "two classes": (lambda m: m[1].__setitem__(1, nn.ReLU()), "?", "differ in class of '1': Dropout and ReLU"),
    "two settings": (lambda m: setattr(m[1][1], "p", .5), "?", "differ in settings of '1'"),
    "more parts": (lambda m: m[1].append(nn.ReLU()), "?", "differ in parts"),
    "two shapes": (lambda m: setattr(m[2][0], "weight", nn.Parameter(torch.ones(5, 3))), "?", "'0' and '2' differ in 0.weight.*3, 3.*5, 3"),
    "two types": (lambda m: m[1].double(), "?", "differ in 0.weight"),
    "frozen and trained": (lambda m: m[1].requires_grad_(False), "?", "differ in 0.weight.*trained"),
    "hooks": (lambda m: m[1][0].register_forward_hook(print), "?", "differ in _forward_hooks of '0'"),
    "train and eval": (lambda m: m[1].eval(), "?", "differ in training"),
    "a tie that would stay behind": (lambda m: m.register_parameter("out", m[1][0].weight), "?", "'1.0.weight' is tied to 'out'"),
}


@pytest.mark.parametrize("change, patterns, message", SHARED.values(), ids=SHARED)
def test_share_refuses_before_anything_changes(change, patterns, message):
    model = changed(change)
    before = state(model)
    with pytest.raises(ValueError, match=message): share_module_(model, patterns)
    assert state(model) == before


# Declarations

def test_declarations_are_copied_and_pickled_with_the_model():
    model = nn.ModuleDict({"part": Words()})
    tie_(model.part, PAIR)
    tie_(model, ["part.emb.weight", "part.back.weight"], map=Transpose())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [d.names for d in declared_ties(other)] == [("part.emb.weight", "part.back.weight"), ("part.emb.weight", "part.head.weight")]
    with pytest.raises(TypeError, match="model: a module"): declared_ties(3)


def test_functions_as_maps_print_their_name_and_pickle():
    assert repr(Function(flip)) == "Function(flip)"
    assert torch.equal(pickle.loads(pickle.dumps(Function(flip)))(torch.arange(3)), torch.tensor([2, 1, 0]))


@pytest.mark.parametrize("way", ["twice", "by new Parameter"])
def test_row_4_two_wrong_merges_of_an_adapter_and_the_right_one(way):
    from sharetie.binding import BrokenTie, check_ties
    model, delta = Words(), torch.ones(6, 4)
    tie_(model, PAIR)
    value = model.emb.weight.detach().clone()
    with torch.no_grad():
        if way == "twice":
            for name in PAIR: model.get_parameter(name).add_(delta)
            assert torch.allclose(model.head.weight, value + 2 * delta), "one weight, so it is added twice"
            model.emb.weight.copy_(value)
        else:
            model.head.weight = nn.Parameter(model.head.weight + delta)
            with pytest.raises(BrokenTie, match="differs by up to 1"): check_ties(model)
            tie_(model, PAIR)
        model.get_parameter(declared_ties(model)[0].names[0]).add_(delta)
    assert torch.allclose(model.head.weight, value + delta) and check_ties(model)


def test_surgery_refuses_wrapped_models(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    ddp, fsdp = nn.parallel.DistributedDataParallel(Words()), Words()
    fully_shard(fsdp, mesh=init_device_mesh("cpu", (1,)))
    for model, prefix in ((ddp, "module."), (fsdp, "")):
        before = {name: p.tensor for name, p in places(model).items()}
        for call in (lambda: resize_(model, prefix + "head.weight", 9), lambda: apply_once(model, torch.zeros_like),
                     lambda: replace_modules(model, prefix + "head", lambda old: nn.Linear(4, 6))):
            with pytest.raises(ValueError, match="model: one that is not wrapped yet is expected"): call()
        assert all(places(model)[name].tensor is t for name, t in before.items())
        apply_once(model, lambda module: None, to="modules")


def compiled(layer): return torch.compile(layer, backend="eager")


def test_what_a_compile_wrapper_runs_is_not_changed_behind_it():
    def net(): return nn.Sequential(compiled(nn.Linear(4, 4)), compiled(nn.Linear(4, 4)))
    both, one = net(), compiled(nn.Linear(4, 4))
    shared = nn.Sequential(one, compiled(one._orig_mod))
    for call in (lambda: share_module_(both, ["0._orig_mod", "1._orig_mod"]), lambda: untie_(shared, "1._orig_mod"),
                 lambda: replace_modules(both, nn.Linear, lambda old: nn.Linear(4, 4)),
                 lambda: replace_modules(both, "0._orig_mod", lambda old: nn.Linear(4, 4))):
        before = [*both.modules()], [*shared.modules()]
        with pytest.raises(ValueError, match="modules that are not compiled are expected, got '[01]._orig_mod'"): call()
        assert ([*both.modules()], [*shared.modules()]) == before
    share_module_(both, ["0", "1"])
    assert both[0] is both[1]
    replace_modules(both, "1", lambda old: nn.Identity())
    assert torch.equal(both(torch.ones(2, 4)), torch.ones(2, 4))


def test_a_layer_without_length_is_replaced():
    class Empty(nn.Linear):
        def __len__(self): return 0
    model = nn.Sequential(nn.Linear(3, 3), Empty(3, 3))
    assert type(replace_modules(model, "1", lambda old: nn.Tanh())[1]) is nn.Tanh


@pytest.mark.parametrize("setting", [(F.silu, torch.tanh), ([1], [2, 3]), ({"a": 1}, {"a": 2}), (torch.float16, torch.float32),
                                     (torch.ones(2), torch.zeros(2)), (lambda x: x, lambda x: -x), (partial(F.gelu, approximate="tanh"), partial(F.gelu))])
def test_modules_with_other_settings_are_not_shared(setting):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    for layer, value in zip(model, setting): layer.how = value
    with pytest.raises(ValueError, match="'0' and '1' differ in how"): share_module_(model, ["0", "1"])
    share_module_(model, ["0", "1"], ignore=["how"])


def test_modules_with_equal_settings_are_shared():
    def scaled(factor): return lambda x: x * factor
    model = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16, activation=F.silu) for _ in range(2)))
    for layer in model: layer.settings = {"list": [1, (2, torch.ones(3))], "run": scaled(2), "part": partial(scaled, 3), "kind": nn.ReLU}
    share_module_(model, ["0", "1"])
    others = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for layer, factor in zip(others, (2, 3)): layer.run = scaled(factor)
    with pytest.raises(ValueError, match="differ in run"): share_module_(others, ["0", "1"])


def test_names_that_only_the_leaver_joined_stay_declared():
    model = nn.ModuleDict({"x": nn.ModuleDict({"e": nn.Linear(3, 3), "h": nn.Linear(3, 3)}), "y": nn.Linear(3, 3)})
    tie_(model["x"], ["e.weight", "h.weight"])
    tie_(model, ["x.e.weight", "y.weight"])
    untie_(model, "x.e.weight")
    assert [set(d.names) for d in declared_ties(model)] == [{"x.h.weight", "y.weight"}]


def test_a_map_of_inference_tensors_is_refused():
    with torch.inference_mode(): model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    with pytest.raises(ValueError, match="members: tensors that autograd can follow .* got \"'a.weight', made in inference mode"): tie_(model, ["a.weight", "b.weight"], map=Scale(2.))
    assert tie_(model, ["a.weight", "b.weight"]).names == ("a.weight", "b.weight")
