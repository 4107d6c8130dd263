"What find_ties finds: true ties, pseudo-ties, and nothing else; in models of every kind, without a crash."
import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sharetie.finding import Place, Reshape, Scale, Slice, Ties, Transpose, find_ties, module_paths, places, view_map


def model_of(**tensors):
    "A module that holds tensors: Parameters as parameters, others as buffers."
    model = nn.Module()
    for name, t in tensors.items():
        model.register_parameter(name, t) if isinstance(t, nn.Parameter) else model.register_buffer(name, t)
    return model


def parameter(*shape, **options): return nn.Parameter(torch.randn(*shape, **options))


# Places and paths

def test_places_list_every_name_once_in_order():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2, bias=False))
    assert list(places(model)) == ["0.weight", "0.bias", "0.running_mean", "0.running_var", "0.num_batches_tracked", "1.weight"]
    place = places(model)["1.weight"]
    assert place == Place("1.weight", model[1], "weight", "parameter", model[1].weight)


def test_a_shared_module_is_listed_under_each_path():
    part = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": part, "b": nn.Sequential(part)})
    assert [path for path, module in module_paths(model) if module is part] == ["a", "b.0"]
    assert set(places(model)) == {"a.weight", "a.bias", "b.0.weight", "b.0.bias"}


def test_a_module_inside_itself_is_entered_once():
    model = nn.Sequential(nn.Sequential(nn.Linear(1, 1)))
    model[0].append(model)
    assert [path for path, _ in module_paths(model)] == ["", "0", "0.0"]
    assert find_ties(model) == ()


@pytest.mark.parametrize("call", [find_ties, places, module_paths])
@pytest.mark.parametrize("wrong", [None, 3, [nn.Linear(1, 1)], nn.Linear])
def test_what_is_no_module_raises(call, wrong):
    with pytest.raises(TypeError, match="model: a module is expected"): call(wrong)


# True ties

def test_one_parameter_under_three_names_across_parts():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Sequential(nn.Linear(3, 3)), "c": nn.Embedding(3, 3)})
    model.b[0].weight = model.c.weight = model.a.weight
    tie, = find_ties(model)
    assert tie.names == ("a.weight", "b.0.weight", "c.weight")
    assert (tie.kind, tie.how, tie.shape, tie.dtype, tie.numel, tie.steps, tie.nbytes) == ("parameter", "tensor", (3, 3), torch.float32, 9, 1, 36)
    assert tie.true and not tie.pseudo and not tie.stepped_twice


def test_a_shared_module_is_one_tie_per_tensor():
    part = nn.BatchNorm1d(4)
    ties = find_ties(nn.Sequential(part, nn.ReLU(), part))
    assert [tie.how for tie in ties] == ["module"] * 5 and ties["0.running_mean"].kind == "buffer"


def test_row_23_shared_buffers_are_ties():
    shared = torch.ones(3)
    model = nn.ModuleDict({"a": model_of(mask=shared), "b": model_of(mask=shared)})
    assert find_ties(model)["b.mask"].names == ("a.mask", "b.mask")
    model.double()
    assert find_ties(model) == (), "PyTorch split them"


def test_a_frozen_tie_is_stepped_by_nobody():
    w = parameter(2).requires_grad_(False)
    assert find_ties(model_of(a=w, b=w))[0].steps == 0


def test_a_parameter_that_is_also_a_buffer():
    model = model_of(a=parameter(2))
    model.register_buffer("b", model.a)
    assert find_ties(model)[0].kind == "parameter" and find_ties(model)[0].names == ("a", "b")


def test_none_is_no_tensor_and_no_tie():
    model = nn.Linear(2, 2, bias=False)
    model.register_buffer("x", None)
    assert list(places(model)) == ["weight"] and find_ties(model) == ()


# Row 6: pseudo-ties

PSEUDO = {
    "Parameter(w.t())": (lambda w: nn.Parameter(w.t()), "transpose"),
    "Parameter(w)": (lambda w: nn.Parameter(w), "same"),
    "Parameter(w.data)": (lambda w: nn.Parameter(w.data), "same"),
    "Embedding(_weight=w)": (lambda w: nn.Embedding(4, 6, _weight=w.detach()).weight, "same"),
    "rows": (lambda w: nn.Parameter(w[1:3]), "slice"),
    "columns": (lambda w: nn.Parameter(w[:, 2:]), "slice"),
    "one row": (lambda w: nn.Parameter(w[1]), "slice"),
    "every other column": (lambda w: nn.Parameter(w[:, ::2]), "slice"),
    "flat": (lambda w: nn.Parameter(w.view(-1)), "reshape"),
    "bits": (lambda w: nn.Parameter(w.data.view(torch.float16)), "overlap"),
    "slice of transpose": (lambda w: nn.Parameter(w.t()[1:3, 1:]), "overlap"),
}


@pytest.mark.parametrize("make, how", PSEUDO.values(), ids=[f"row 6 {name}" for name in PSEUDO])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_pseudo_ties_are_found_and_flagged(make, how, device):
    w = nn.Parameter(torch.empty(4, 6, device=device))
    model = model_of(a=w, b=make(w))
    ties = find_ties(model)
    assert [t.kind for t in ties] == ["view"] and ties[0].how == how
    assert ties[0].stepped_twice and ties[0].steps == 2 and set(ties[0].names) == {"a", "b"}


def test_row_6_data_assigned():
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model.b.weight.data = model.a.weight.data
    assert len(list(model.parameters())) == 2, "PyTorch counts two"
    assert find_ties(model)["b.weight"].how == "same"


def test_the_widest_is_the_source_whatever_comes_first():
    w = parameter(6, 4)
    tie, = find_ties(model_of(a=nn.Parameter(w[:2]), b=w, c=nn.Parameter(w[2:])))
    assert tie.names == ("b", "a", "c") and tie.how == "slice" and tie.steps == 3


def test_several_kinds_of_views_are_mixed():
    w = parameter(3, 3)
    assert find_ties(model_of(a=w, b=nn.Parameter(w.t()), c=nn.Parameter(w[0])))[0].how == "mixed"


def test_a_frozen_view_is_not_stepped_twice():
    w = parameter(3)
    tie, = find_ties(model_of(a=w, b=nn.Parameter(w.data, requires_grad=False)))
    assert tie.pseudo and tie.steps == 1 and not tie.stepped_twice


def test_buffers_over_one_memory():
    w = torch.ones(4)
    tie, = find_ties(model_of(a=w, b=w[1:]))
    assert tie.kind == "view" and tie.steps == 0


def test_two_storages_over_the_memory_of_one_array():
    array = np.ones(8, dtype=np.float32)
    a, b = torch.from_numpy(array), torch.from_numpy(array[2:])
    assert a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr()
    assert find_ties(model_of(a=nn.Parameter(a), b=nn.Parameter(b)))[0].how == "slice"


def test_true_and_pseudo_together():
    w = parameter(2, 3)
    ties = find_ties(model_of(a=w, b=w, c=nn.Parameter(w.t())))
    assert [t.names for t in ties.true] == [("a", "b")] and [t.names for t in ties.pseudo] == [("a", "b", "c")]


# What is no tie

W = torch.zeros(6, 6)
APART = {
    "columns 0 and 1": (W[:, 0], W[:, 1]), "blocks of columns": (W[:, :3], W[:, 3:]), "rows": (W[:3], W[3:]),
    "even and odd": (W.view(-1)[::2], W.view(-1)[1::2]), "a column and its neighbours": (W[:, [0]][:, 0], W[:, 1:]),
    "diagonal and the one above": (W.diagonal(), W.diagonal(1)), "corner blocks": (W[:2, :2], W[2:, 2:]),
    "chessboard": (W[::2, ::2], W[1::2, 1::2]), "transposed halves": (W.t()[:3], W[:, 3:]),
    "copies": (W, W.clone()), "empty": (torch.ones(0), torch.ones(0)), "empty slices of one": (W[:0], W[:0]),
    "empty and full": (W[2:2], W), "meta": (torch.empty(2, device="meta"), torch.empty(2, device="meta")),
    "meta columns": (W.to("meta")[:, 0], W.to("meta")[:, 1]), "meta and real": (W, W.to("meta")),
}


@pytest.mark.parametrize("a, b", APART.values(), ids=APART)
def test_what_does_not_overlap_is_no_tie(a, b):
    assert find_ties(model_of(a=nn.Parameter(a), b=nn.Parameter(b))) == ()


def test_columns_of_one_meta_matrix_are_apart():
    w = torch.empty(4, 4, device="meta")
    assert find_ties(model_of(a=w[:, 0], b=w[:, 1])) == () and len(find_ties(model_of(a=w[:, :2], b=w[:, 1]))) == 1


def test_a_flattened_lstm_has_no_ties():
    model = nn.LSTM(4, 5, num_layers=2, bidirectional=True)
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    at = 0
    for p in model.parameters():
        p.data = flat[at:at + p.numel()].view_as(p)
        at += p.numel()
    assert find_ties(model) == ()


def test_many_columns_of_one_matrix():
    w = torch.zeros(60, 60)
    assert find_ties(nn.ParameterList(nn.Parameter(w[:, i]) for i in range(60))) == ()


@settings(max_examples=200, deadline=None)
@given(*[st.tuples(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 23)), min_size=0, max_size=4), st.integers(0, 60))] * 2)
def test_overlap_is_that_of_the_addresses(first, second):
    "Two random strided views are a tie if, and only if, an address is in both."
    numbers = torch.arange(400)
    a, b = (numbers.as_strided([n for n, _ in axes], [s for _, s in axes], offset) for axes, offset in (first, second))
    expected = not set(a.flatten().tolist()).isdisjoint(b.flatten().tolist())
    assert (len(find_ties(model_of(a=a, b=b))) == 1) == expected


def test_overlap_of_different_types_is_in_bytes():
    raw = torch.zeros(32, dtype=torch.uint8)
    def found(a, b): return len(find_ties(model_of(a=a, b=b))) == 1
    floats = raw.view(torch.float32)
    assert found(floats[1:], raw[7:8]) and not found(floats[2:], raw[:8]) and found(raw[3:4], floats[0:1])
    assert not found(raw.view(2, 16)[:, 4:8], floats.view(2, 4)[:, 0])


def test_a_search_that_takes_too_long_says_that_they_meet():
    from sharetie.views import _STEPS, _meet
    steps = [_STEPS + 1]
    assert _meet(1, ((7, 9), (5, 9)), ((11, 9), (3, 9)), steps)


def test_tensors_whose_memory_was_released_are_apart():
    a, b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    both = model_of(a=a, b=b, c=nn.Parameter(a[2:]))
    for p in (a, b): p.untyped_storage().resize_(0)
    names = [(tie.names, tie.how) for tie in find_ties(both)]  # a released tensor cannot be printed
    assert names == [(("a", "c"), "overlap")]


def random_model(rng, device):
    "Views of two memories and tensors of their own, under random names, in modules that may be held twice."
    memory = [torch.arange(60, dtype=torch.float32, device=device) for _ in range(2)]
    def view():
        shape, stride = rng.integers(1, 4, 2).tolist(), rng.integers(0, 7, 2).tolist()
        return memory[rng.integers(2)].as_strided(shape, stride, int(rng.integers(30)))
    tensors = [view() if rng.random() < .6 else torch.empty(rng.integers(3), device=device) for _ in range(8)]
    tensors = [nn.Parameter(t) if rng.random() < .7 else t for t in tensors]
    def part(depth=2):
        module = nn.Module()
        for name in "abc"[:rng.integers(4)]:
            t = tensors[rng.integers(8)]
            if isinstance(t, nn.Parameter): module.register_parameter(name, t)
            else: module.register_buffer(name, None if rng.random() < .2 else t)
        parts = [part(depth - 1) for _ in range(rng.integers(3))] if depth else []
        for name, child in zip("xyz", parts + parts[:1] if rng.random() < .5 else parts): module.add_module(name, child)
        return module
    return part()


def addresses(tensor):
    "The storage and place of every byte of a tensor."
    size = tensor.element_size()
    numbers = torch.arange(200).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return {(tensor.untyped_storage()._cdata, n * size + b) for n in numbers.flatten().tolist() for b in range(size)}


def by_definition(model):
    "The names of true ties, and of pseudo-ties, found without any of our code."
    def names(module, prefix=""):
        for own in (module._parameters, module._buffers): yield from ((prefix + n, t) for n, t in own.items() if t is not None)
        for name, child in module._modules.items(): yield from names(child, f"{prefix}{name}.")
    held, groups = {}, []
    for name, t in names(model): held.setdefault(id(t), (t, []))[1].append(name)
    for t, own in held.values():
        mine, memory = {id(t)}, addresses(t)
        touched = [g for g in groups if not g[1].isdisjoint(memory)]
        groups = [g for g in groups if g not in touched] + [({*mine, *(i for g in touched for i in g[0])}, memory.union(*(g[1] for g in touched)))]
    true = {tuple(own) for _, own in held.values() if len(own) > 1}
    return true, {frozenset(n for i in ids for n in held[i][1]) for ids, _ in groups if len(ids) > 1}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("seed", range(60))
def test_ties_of_random_models_are_those_of_the_definition(seed, device):
    model = random_model(np.random.default_rng(seed), device)
    ties, (true, pseudo) = find_ties(model), by_definition(model)
    assert {tie.names for tie in ties.true} == true and {frozenset(tie.names) for tie in ties.pseudo} == pseudo
    assert len(ties) == len(true) + len(pseudo)


# Tensors that are no plain ones

def test_dtensors_of_one_mesh(one_process):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor
    mesh = init_device_mesh("cpu", (1,))
    a = nn.Parameter(distribute_tensor(torch.randn(4, 2), mesh, [Replicate()]))
    b = nn.Parameter(distribute_tensor(torch.randn(4, 2), mesh, [Replicate()]))
    assert find_ties(model_of(a=a, b=b)) == ()
    assert find_ties(model_of(a=a, b=a))[0].names == ("a", "b")
    assert find_ties(model_of(a=a, b=nn.Parameter(a.detach())))[0].pseudo


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
def test_uninitialized_sparse_and_nested_tensors():
    lazy = nn.LazyLinear(3)
    model = nn.ModuleDict({"a": lazy, "b": nn.LazyLinear(3)})
    model.b.weight = lazy.weight
    assert find_ties(model)["a.weight"].shape is None and "?" in repr(find_ties(model))
    assert find_ties(model_of(a=torch.eye(3).to_sparse(), b=torch.eye(3).to_sparse(), c=torch.eye(3).to_sparse_csr())) == ()
    sparse = torch.eye(3).to_sparse()
    assert find_ties(model_of(a=sparse, b=sparse))[0].names == ("a", "b")
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
        assert find_ties(model_of(a=nested, b=nested))[0].names == ("a", "b")


def test_row_16_the_originals_of_parametrizations_are_looked_at():
    a, b = (nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)) for _ in range(2))
    b.parametrizations.weight.original1 = a.parametrizations.weight.original1
    tie, = find_ties(nn.ModuleList([a, b]))
    assert tie.names == ("0.parametrizations.weight.original1", "1.parametrizations.weight.original1") and tie.how == "map"
    assert find_ties(nn.ModuleList([a, b])).of("1.weight") == ()


def test_compiled_and_copied_models():
    w = parameter(3)
    model = model_of(a=w, b=w)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))): assert find_ties(other) == find_ties(model)
    assert find_ties(torch.compile(model, backend="eager"))[0].names == ("_orig_mod.a", "_orig_mod.b")


# Maps

MAPS = {
    "transpose": (Transpose(), lambda w: w.t()), "axes": (Transpose(1, 0), lambda w: w.t()),
    "reshape": (Reshape((3, 8), (4, 6)), lambda w: w.reshape(3, 8)), "any size": (Reshape((-1,), (4, 6)), lambda w: w.reshape(-1)),
    "scale": (Scale(-.5), lambda w: w * -.5), "slice": (Slice(slice(1, 3), 2), lambda w: w[1:3, 2]),
    "chain": (nn.Sequential(Transpose(), Slice(slice(0, 2))), lambda w: w.t()[:2]),
}


@pytest.mark.parametrize("map, expected", MAPS.values(), ids=MAPS)
def test_maps_do_what_they_say_and_survive_copies(map, expected):
    w = torch.randn(4, 6)
    for own in (map, copy.deepcopy(map), pickle.loads(pickle.dumps(map))): assert torch.equal(own(w), expected(w))
    if hasattr(map, "inverse"): assert torch.allclose(map.inverse(map(w)), w)


@pytest.mark.parametrize("make, message", [
    (lambda: Transpose(0, 2), "axes: every axis once"), (lambda: Scale(0), "factor: a finite number"),
    (lambda: Scale(float("nan")), "factor: a finite number"), (lambda: Slice(), "index: a whole number or a forward slice per axis is expected"),
    (lambda: Slice(True), "index: a whole number"), (lambda: Slice(slice(0, 4, -1)), "index: a whole number or a forward slice"), (lambda: Slice(slice("a")), "index: a whole number"),
    (lambda: Scale("a"), "^factor: a number is expected, got 'a'$"), (lambda: Scale(True), "^factor: a number is expected, got True$"), (lambda: Scale(None), "^factor: a number"),
    (lambda: Scale(torch.ones(2)), "^factor: a number"), (lambda: Reshape(5), "^shape: a list of whole numbers is expected, got 5$"), (lambda: Reshape("ab"), "^shape: a list of whole numbers"),
    (lambda: Reshape((-1, -1)), r"^shape: -1 at most once is expected, got \(-1, -1\)$"), (lambda: Reshape((-2,)), "^shape: a whole number of at least -1"),
    (lambda: Reshape((4,), source=5), "^source: a list of whole numbers"), (lambda: Transpose([1, 0]), "^axes: a whole number is expected"), (lambda: Transpose("a", 1), "^axes: a whole number"), (lambda: Reshape((4,)).inverse(torch.ones(4)), "source: the source's shape"),
])
def test_bad_maps_raise(make, message):
    with pytest.raises((ValueError, TypeError), match=message): make()


CUBE = torch.arange(24.).reshape(2, 3, 4)
VIEWS = {
    "itself": CUBE.view(2, 3, 4), "axes": CUBE.permute(2, 0, 1), "reversed": CUBE.permute(2, 1, 0), "shape": CUBE.view(6, 4),
    "slice": CUBE[:, 1:], "steps": CUBE[..., ::3], "index": CUBE[1], "last": CUBE[..., -1], "one": CUBE[1, 2, 3], "inner": CUBE[:, 1, 1:3],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_view_map_finds_the_map(view, device):
    if device == "cpu": assert torch.equal(view_map(CUBE, view)(CUBE), view)
    else:
        source = CUBE.to("meta")
        map = view_map(source, source.as_strided(view.shape, view.stride(), view.storage_offset()))
        assert torch.equal(map(CUBE), view)


def test_view_map_finds_none_for_what_is_none():
    for other in (CUBE.clone(), CUBE.view(torch.int32), CUBE[:, 1:].permute(2, 0, 1), torch.zeros(0)):
        assert view_map(CUBE, other) is None
    assert view_map(CUBE[:, 1:], CUBE) is None


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_view_map_gives_any_slice_back(draw):
    shape = draw.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    source = torch.arange(float(np.prod(shape))).reshape(shape)
    index = tuple(draw.draw(st.integers(0, n - 1)) if draw.draw(st.booleans()) else
                  slice(draw.draw(st.integers(0, n - 1)), None, draw.draw(st.integers(1, 3))) for n in shape)
    map = view_map(source, source[index])
    assert map is not None and torch.equal(map(source), source[index])


# The table

def test_ties_are_a_tuple_that_is_asked_by_name():
    w, v = parameter(2, 2), parameter(3)
    ties = find_ties(model_of(a=w, b=w, c=v, dee=v))
    assert isinstance(ties, tuple) and isinstance(ties[:1], Ties) and ties[1] is ties["dee"] and len(ties) == 2
    assert "a" in ties and "x" not in ties and ties[0] in ties
    with pytest.raises(KeyError, match="'dees' is in no tie; the nearest name is 'dee'"): ties["dees"]
    with pytest.raises(KeyError, match="'xyz' is in no tie\"$"): ties["xyz"]
    with pytest.raises(KeyError, match="'e' is in no tie"): find_ties(nn.Linear(1, 1))["e"]


def test_ties_print_as_tables():
    w = parameter(2, 3)
    ties = find_ties(model_of(**{"a<b": w, "c": nn.Parameter(w.t())}))
    assert repr(ties).splitlines()[1].split() == "view transpose a<b = c 2×3 float32 stepped 2 times".split()
    assert ties._repr_html_().startswith("<table>") and "a&lt;b = c" in ties._repr_html_()
    assert repr(find_ties(nn.Linear(1, 1))) == "no ties" and find_ties(nn.Linear(1, 1))._repr_html_() is None
    frame = ties.frame()
    assert frame.loc[0, "names"] == ("a<b", "c") and list(frame.columns) == ["kind", "how", "names", "shape", "dtype", "numel", "steps"]
    assert len(find_ties(nn.Linear(1, 1)).frame()) == 0


def test_ties_are_pickled():
    w = parameter(2)
    ties = find_ties(model_of(a=w, b=w))
    assert pickle.loads(pickle.dumps(ties)) == ties == copy.deepcopy(ties)


def test_finding_reads_no_value_and_changes_nothing():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).to("meta")
    before = {name: id(p.tensor) for name, p in places(model).items()}
    find_ties(model)
    assert {name: id(p.tensor) for name, p in places(model).items()} == before


def test_ties_of_a_scripted_model():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    assert [tie.names for tie in find_ties(torch.jit.script(model))] == [("0.weight", "1.weight")]


def test_sparse_and_nested_tensors_over_one_memory():
    sparse = torch.eye(3).to_sparse()
    (tie,) = find_ties(model_of(a=sparse, b=sparse.detach()))
    assert tie.names == ("a", "b") and tie.how == "overlap"
    ragged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    assert find_ties(model_of(a=ragged, b=ragged.values())) == ()
