"Units of a model, from one forward pass: what hangs together, what is held, what stays untouched."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from sharetie.ties import Transpose, tie_
from sharetie.masks import magnitude, prune_
from sharetie.tracing import Numbers, trace_units
from tied import functional


def same(graph, *names): return len({tuple(graph.layers[name].tolist()) for name in names}) == 1


def count(graph, name): return len(set(graph.layers[name].tolist()))


def held(graph, name): return all(u in graph.fixed for u in graph.layers[name])


def test_unions_are_transitive_and_reasons_stay():
    numbers = Numbers()
    a, b, c = (numbers.new(3) for _ in range(3))
    numbers.join(a, b, why="x")
    numbers.join(b, c[::-1], why="y")
    classes = numbers.classes()
    assert classes[a].tolist() == classes[b].tolist() == classes[c[::-1]].tolist() and len(set(classes)) == 3
    assert numbers.join(None, a, why="here") is a and "here" in numbers.fixed[0][1]


@pytest.mark.parametrize("hidden", [1, 2, 7])
@pytest.mark.parametrize("inputs, outputs", [(1, 1), (3, 1), (1, 4), (5, 2)])
def test_layers_of_every_width(inputs, outputs, hidden):
    "Axes of length one are no units of others."
    model = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, 6), nn.Tanh(), nn.Linear(6, outputs))
    graph = trace_units(model, torch.randn(2, inputs))
    assert count(graph, "2") == 6 and count(graph, "0") == hidden and not held(graph, "2") and held(graph, "4")
    assert not set(graph.layers["0"].tolist()) & set(graph.layers["2"].tolist())
    assert np.array_equal(graph.axes["4.weight"][1], graph.layers["2"])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("side", [1, 3])
def test_flattened_channels(batch, side):
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * side**2, 3))
    graph = trace_units(model, torch.randn(batch, 2, side, side))
    assert np.array_equal(graph.axes["3.weight"][1], np.repeat(graph.layers["0"], side**2)) and not held(graph, "0")


@pytest.mark.parametrize("groups, ins, outs", [(1, 8, 6), (2, 4, 3), (4, 2, 2)])
def test_groups(groups, ins, outs):
    "Index j of all groups is one unit."
    model = nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU(), nn.Conv1d(8, outs * groups, 3, groups=groups), nn.Conv1d(outs * groups, 2, 1))
    graph = trace_units(model, torch.randn(1, 3, 5))
    assert (count(graph, "0"), count(graph, "2")) == (ins, outs)


@pytest.mark.parametrize("times", [1, 3])
def test_depthwise(times):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4 * times, 3, groups=4), nn.ReLU(), nn.Conv2d(4 * times, 2, 1))
    graph = trace_units(model, torch.randn(1, 3, 5, 5))
    assert np.array_equal(graph.layers["1"], np.repeat(graph.layers["0"], times)) and "1" not in graph.readers


def test_transposed_convolution_and_upsampling():
    model = nn.Sequential(nn.ConvTranspose2d(3, 6, 2), nn.Upsample(scale_factor=2), nn.ReLU(), nn.ConvTranspose2d(6, 2, 2))
    graph = trace_units(model, torch.randn(1, 3, 4, 4))
    assert count(graph, "0") == 6 and not held(graph, "0") and np.array_equal(graph.axes["3.weight"][0], graph.layers["0"])


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.InstanceNorm2d(4), nn.GroupNorm(2, 4)])
def test_normalizations(norm):
    graph = trace_units(nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Conv2d(4, 2, 1)), torch.randn(1, 3, 4, 4))
    if isinstance(norm, nn.BatchNorm2d): assert np.array_equal(graph.axes["1.running_mean"][0], graph.layers["0"]) and not held(graph, "0")
    if isinstance(norm, nn.GroupNorm): assert count(graph, "0") == 2 and graph.layers["0"][0] in graph.mixed


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.RMSNorm(4), nn.RMSNorm(4, elementwise_affine=False)])
def test_a_norm_over_units_mixes_them(norm):
    "On any device: an RMS norm is one function, whatever it is made of."
    graph = trace_units(nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 2)), torch.randn(2, 3))
    assert not held(graph, "0") and all("norm in '1'" in graph.mixed[u] for u in graph.layers["0"])
    if isinstance(norm.weight, nn.Parameter): assert same(graph, "0", "1") and np.array_equal(graph.axes["1.weight"][0], graph.layers["0"])
    graph = trace_units(nn.Sequential(norm, nn.Linear(4, 2)), torch.randn(2, 4))
    if isinstance(norm.weight, nn.Parameter): assert "where they meet what has no units" in graph.fixed[graph.axes["0.weight"][0][0]]


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_padding_along_positions_holds_no_channels(mode):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1, padding_mode=mode))
    assert not held(trace_units(model, torch.randn(1, 3, 5, 5)), "0")


@pytest.mark.parametrize("pad, value, free", [((1, 1), 0, True), ((), None, True), ((1, 1), 2., False), ((0, 0, 0, 1), 0., False)])
def test_padding_of_channels_holds_them(pad, value, free):
    model = functional(lambda m, x: m.b(F.pad(m.a(x), pad, value=value)[:, :4]), a=nn.Conv1d(3, 4, 1), b=nn.Conv1d(4, 2, 1))
    graph = trace_units(model, torch.randn(1, 3, 5))
    assert held(graph, "a") != free and (free or graph.table().loc["a", "because of"] == "pad")


def test_a_view_that_splits_a_layer_names_it():
    split = functional(lambda m, x: m.b(m.a(x).relu().view(-1, 2, 2).sum(1)), a=nn.Linear(3, 4), b=nn.Linear(2, 2))
    assert trace_units(split, torch.randn(2, 3)).table().loc["a", "because of"] == "the view that splits the features of 'a'"
    taken = functional(lambda m, x: m.a(x).relu()[:, :1], a=nn.Linear(3, 4))
    assert "splits" not in " ".join(trace_units(taken, torch.randn(2, 3)).table()["because of"])


def test_gates_slices_and_halves():
    model = functional(lambda m, x: m.c(F.glu(m.a(x))), a=nn.Linear(3, 8), c=nn.Linear(4, 2))
    graph = trace_units(model, torch.randn(2, 3))
    assert np.array_equal(graph.layers["a"][:4], graph.layers["a"][4:]) and not held(graph, "a")
    swiglu = functional(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x)), a=nn.Linear(3, 5), b=nn.Linear(3, 5), c=nn.Linear(5, 2))
    assert same(trace_units(swiglu, torch.randn(2, 3)), "a", "b")
    chunked = functional(lambda m, x: m.c(torch.mul(*m.a(x).chunk(2, -1))), a=nn.Linear(3, 8), c=nn.Linear(4, 2))
    graph = trace_units(chunked, torch.randn(2, 3))
    assert np.array_equal(graph.layers["a"][:4], graph.layers["a"][4:])


def test_concatenation_with_the_input_holds_nothing_else():
    model = functional(lambda m, x: m.b(torch.cat([x, m.a(x)], 1)), a=nn.Linear(3, 4), b=nn.Linear(7, 2))
    graph = trace_units(model, torch.randn(2, 3))
    assert not held(graph, "a") and np.array_equal(graph.axes["b.weight"][1][3:], graph.layers["a"])


@pytest.mark.parametrize("f, why", [
    (lambda h: h.softmax(-1), "softmax"), (lambda h: h.sort(-1)[0], "sort"), (lambda h: h / h.sum(-1, keepdim=True), "sum"),
    (lambda h: h.roll(1, -1), "roll"), (lambda h: h.view(-1, 2, 2).transpose(1, 2).reshape(-1, 4), "view"),
    (lambda h: h + torch.ones(4), "no units"), (lambda h: h.cumsum(-1), "cumsum"), (lambda h: h[:, [0, 2, 1, 3]], "index")])
def test_what_mixes_units_holds_them(f, why):
    model = functional(lambda m, x: m.b(f(m.a(x))), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    graph = trace_units(model, torch.randn(2, 3))
    assert held(graph, "a") and why in graph.table().loc["a", "because of"]


def test_views_of_parameters():
    "A weight used as it is and transposed, by hand and by a declared tie; a mask as a buffer."
    model = functional(lambda m, x: (x @ m.w.T).tanh() @ m.w, w=nn.Parameter(torch.randn(4, 6)))
    graph = trace_units(model, torch.randn(2, 6))
    assert not any(u in graph.fixed for u in graph.axes["w"][0]) and all(u in graph.fixed for u in graph.axes["w"][1])
    auto = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 6))
    tie_(auto, ["0.weight", "2.weight"], map=Transpose())
    graph = trace_units(auto, torch.randn(2, 6))
    assert np.array_equal(graph.axes["0.weight"][0], graph.layers["0"]) and held(graph, "2") and not held(graph, "0")
    pruned = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    prune.l1_unstructured(pruned[0], "weight", .5)
    graph = trace_units(pruned, torch.randn(2, 3))
    assert np.array_equal(graph.axes["0.weight_mask"][0], graph.layers["0"]) and not held(graph, "0")


def test_reused_module_and_two_names():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(3, 4), layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(4, 2))
    graph = trace_units(model, torch.randn(2, 3))
    assert same(graph, "0", "1") and len([name for name in graph.axes if name.endswith("weight")]) == 3


def test_transformer_heads_are_held_and_hidden_units_free():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    graph = trace_units(model, torch.randn(1, 3, 8))
    assert not held(graph, "linear1") and count(graph, "linear1") == 16
    assert all(u in graph.fixed for u in graph.axes["self_attn.in_proj_weight"][0])
    assert torch.backends.mha.get_fastpath_enabled()


def test_recurrent_units_are_held():
    model = functional(lambda m, x: m.b(m.a(x)[0]), a=nn.LSTM(3, 4), b=nn.Linear(4, 2))
    graph = trace_units(model, torch.randn(5, 1, 3))
    assert all(u in graph.fixed for u in graph.axes["a.weight_hh_l0"][1])


def test_the_model_stays_as_it_was():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(16, 2)).train()
    state, draw = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    trace_units(model, torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items()) and model.training and model[2].training
    assert torch.equal(draw, torch.get_rng_state()) and not model._forward_hooks


def test_bad_input():
    with pytest.raises(TypeError, match="model: a module"): trace_units("model", torch.ones(1))
    with pytest.raises(ValueError, match="inputs"): trace_units(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="scripted"): trace_units(torch.compile(nn.Linear(2, 2)), torch.ones(1, 2))
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = nn.Parameter(model[0].weight.detach().T)
    with pytest.raises(ValueError, match="over one memory"): trace_units(model, torch.ones(1, 2))


def test_failing_forward_leaves_no_hooks():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(3, 2)).train()
    for _ in range(2):
        with pytest.raises(ValueError, match="inputs: what the model can take is expected: .*shapes"): trace_units(model, torch.ones(1, 2))
    assert model.training and torch.is_grad_enabled() and torch.backends.mha.get_fastpath_enabled()


def test_device_free_trace():
    "On the meta device no numbers are computed."
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to("meta")
    assert count(trace_units(model, torch.ones(1, 3, device="meta")), "0") == 4


@pytest.mark.parametrize("act", [nn.Hardswish(), nn.Hardswish(inplace=True), nn.Mish(inplace=True), nn.Threshold(.1, .2, inplace=True), nn.LogSigmoid()])
def test_activations_that_pytorch_does_not_call_pointwise(act):
    graph = trace_units(nn.Sequential(nn.Linear(3, 4), act, nn.Linear(4, 2)), torch.randn(2, 3))
    assert not held(graph, "0") and np.array_equal(graph.axes["2.weight"][1], graph.layers["0"])


def test_a_layer_called_by_keyword_reads_unseen():
    "Its input cannot be caught, so what it reads is not said to be read by layers alone."
    model = functional(lambda m, x: m.b(input=m.a(x)), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    graph = trace_units(model, torch.randn(2, 3))
    assert not held(graph, "a") and all(u in graph.loose for u in graph.layers["a"]) and "b" not in graph.readers


def test_layers_keep_their_names_where_positions_are_learned():
    "A table of positions gives units to the axis of positions, and a layer's own are those of its last axis."
    model = functional(lambda m, x: m.b(m.a(x + m.place).relu()), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    model.place = nn.Parameter(torch.randn(1, 3, 4))
    graph = trace_units(model, torch.randn(2, 3, 4))
    assert count(graph, "a") == 6 and not held(graph, "a") and np.array_equal(graph.axes["a.weight"][0], graph.layers["a"])


def test_no_examples():
    with pytest.raises(ValueError, match="inputs: at least one example is expected, got .0, 3."): trace_units(nn.Linear(3, 2), torch.ones(0, 3))


@pytest.mark.parametrize("x", [torch.zeros(2, 1), torch.zeros(2, 5, 8, 8), torch.zeros(2, 3, 8, 8).long(), torch.zeros(())])
def test_inputs_that_the_model_cannot_take(x):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    with pytest.raises(ValueError, match="inputs: what the model can take is expected: "): trace_units(model, x)


def test_masked_layers_keep_their_names():
    for make in (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), lambda: nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))):
        model = make()
        x = torch.ones(2, 4) if isinstance(model[0], nn.Linear) else torch.ones(2, 4).long()
        names = list(trace_units(model, x).layers)
        assert list(trace_units(prune_(model, magnitude(model), .5), x).layers) == names


def test_inputs_of_another_kind_are_named():
    with pytest.raises(ValueError, match="inputs: what the model can take is expected"): trace_units(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), {"a": [0]})
