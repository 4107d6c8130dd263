"What a model stores and uses: against the Jacobian, unshared twins, other tools and published counts."
import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from sharetie import counting
from sharetie.census import Census, Count, census, compare
from sharetie.classics import CLASSICS, LeNet5, connections
from sharetie.counting import RULES, products, rule_for
from sharetie.units import units_of


def used(model, *inputs, **kwargs):
    "Used weights by the first name of a parameter, or by all that a weight is made of; no notes allowed."
    counted = census(model, *inputs, **kwargs)
    assert counted.notes == ()
    return {", ".join(sorted(row.names)) if row.made else row.names[0]: row.used for row in counted}


def incidences(model, x):
    "Pairs of an output and a weight with a derivative that is not zero: a count that knows no rules."
    def run(parameters): return torch.func.functional_call(model, parameters, (x,)).flatten()
    return {n: int((j != 0).sum()) for n, j in torch.func.jacrev(run)(dict(model.named_parameters())).items()}


class Function(nn.Module):
    "A model of named parameters and a function of them and the input."
    def __init__(self, function, **parameters):
        super().__init__()
        self.function = function
        for name, shape in parameters.items(): setattr(self, name, nn.Parameter(torch.rand(shape) + 1))
    def forward(self, *x): return self.function(self, *x)


# Against the Jacobian

@settings(max_examples=14, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_convolutions_agree_with_the_jacobian(data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    dims, groups, transposed = draw(1, 3), draw(1, 3), data.draw(st.booleans())
    kind = getattr(nn, f"Conv{'Transpose' * transposed}{dims}d")
    kernel = [draw(1, 2 if dims == 3 else 3) for _ in range(dims)]
    stride = [draw(1, 2) for _ in range(dims)]
    conv = kind(groups * draw(1, 2), groups * draw(1, 2), kernel, stride, groups=groups, dilation=draw(1, 2), bias=data.draw(st.booleans()))
    x = torch.rand(1, conv.in_channels, *(draw(5, 6) if dims < 3 else draw(3, 4) for _ in range(dims))) + 1
    assert used(conv, x) == incidences(conv, x)


@pytest.mark.parametrize("model, x", [
    (nn.Linear(3, 4), torch.rand(1, 3)), (nn.Linear(3, 4), torch.rand(1, 2, 5, 3)), (nn.LayerNorm((2, 3)), torch.rand(1, 4, 2, 3)),
    (nn.GroupNorm(2, 4), torch.rand(1, 4, 3)), (nn.BatchNorm2d(3), torch.rand(1, 3, 2, 2)), (nn.InstanceNorm1d(3, affine=True), torch.rand(1, 3, 4)),
    (nn.RMSNorm(4), torch.rand(1, 3, 4)), (nn.Embedding(6, 3), torch.tensor([[1, 2, 2, 5]])), (nn.EmbeddingBag(6, 3), torch.tensor([[1, 2, 5]])),
    (nn.PReLU(3), -torch.rand(1, 3, 4)), (nn.PReLU(), -torch.rand(1, 3, 4)),
], ids=lambda v: type(v).__name__)
def test_layers_agree_with_the_jacobian(model, x):
    assert used(model, x) == incidences(model.eval(), x)


def test_windows_are_whole_at_padded_borders():
    conv, x = nn.Conv2d(1, 1, 3, padding=1, bias=False), torch.rand(1, 1, 4, 4) + 1
    assert used(conv, x) == {"weight": 9 * 16} and incidences(conv, x) == {"weight": 100}


# Against unshared twins

class Steps(nn.Module):
    def __init__(self, cells):
        super().__init__()
        self.cells = nn.ModuleList(cells)
    def forward(self, x):
        state = None
        for cell, step in zip(self.cells, x.unbind(1)): state = cell(step, state)
        return state


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_steps_use_what_an_unshared_twin_stores(kind):
    cell, x = kind(3, 4), torch.rand(2, 6, 3)
    free = census(Steps([copy.deepcopy(cell) for _ in range(6)]), x)
    assert free.stored == free.used == census(Steps([cell] * 6), x).used


def test_a_convolution_uses_what_a_locally_connected_layer_stores():
    conv, x = nn.Conv2d(2, 3, 2, stride=2), torch.rand(1, 2, 6, 4)
    def local(self, x):
        patches = F.unfold(x, 2, stride=2).transpose(1, 2)  # (b, positions, ins)
        return torch.einsum("bpi,poi->bpo", patches, self.weight) + self.bias
    free = census(Function(local, weight=(6, 3, 8), bias=(6, 3)), x)
    assert free.stored == free.used == census(conv, x).used


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind, gates", [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=["plain", "deep", "no bias"])
def test_recurrent_layers_use_their_weights_at_every_step(kind, gates, options, device):
    with torch.device(device): counted = census(kind(3, 4, batch_first=True, **options), torch.zeros(2, 5, 3))
    assert counted.used == 5 * counted.stored and counted.stored >= gates * (12 + 16) and counted.notes == ()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_other_ways_to_run_an_lstm(device):
    with torch.device(device):
        projected = census(nn.LSTM(3, 4, proj_size=2), torch.zeros(5, 2, 3), batch_axis=1)
        assert projected.used == 5 * projected.stored
        learned = Function(lambda self, x: self.lstm(x, (self.h.expand(1, len(x), 4), self.c.expand(1, len(x), 4))), h=(1, 1, 4), c=(1, 1, 4))
        learned.lstm = nn.LSTM(3, 4, batch_first=True)
        counted = census(learned, torch.zeros(2, 5, 3))
        assert counted["h"].used == counted["c"].used == 4
        assert counted.used == 5 * (counted.stored - 8) + 8


def test_a_packed_sequence_inside_the_model():
    model = Function(lambda self, x: self.gru(nn.utils.rnn.pack_padded_sequence(x, [4] * len(x), batch_first=True)))
    model.gru = nn.GRU(3, 4, batch_first=True)
    counted = census(model, torch.rand(2, 5, 3))
    assert counted.used == 4 * counted.stored


def test_shared_layers_and_what_checkpointing_does_to_them():
    layer, x = nn.Linear(3, 3), torch.rand(2, 3, requires_grad=True)
    plain = census(nn.Sequential(layer, layer, layer), x)
    assert plain.used == 3 * plain.stored and plain["2.bias"].names == ("0.bias", "1.bias", "2.bias")
    for reentrant in (True, False):
        model = Function(lambda self, x: checkpoint(self.layer, checkpoint(self.layer, x, use_reentrant=reentrant), use_reentrant=reentrant))
        model.layer = layer
        assert census(model, x).used == 2 * plain.stored


# The batch

MODELS = {
    "conv": (lambda: nn.Conv1d(2, 3, 3), (2, 7)), "batch norm": (lambda: nn.BatchNorm1d(2), (2, 7)), "linear": (lambda: nn.Linear(7, 2), (2, 7)),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (5, 8)), "gru": (lambda: nn.GRU(8, 4, batch_first=True), (5, 8)),
    "positions": (lambda: Function(lambda self, x: x + self.table[torch.arange(x.shape[1])], table=(9, 8)), (5, 8)),
    "class token": (lambda: Function(lambda self, x: torch.cat([self.token.expand(len(x), 1, 8), x], 1), token=(1, 1, 8)), (5, 8)),
    "state of zeros": (lambda: Function(lambda self, x: torch.zeros(1, 8) @ self.w + x, w=(8, 8)), (8,)),
}


@pytest.mark.parametrize("make, shape", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_count_does_not_depend_on_the_batch(make, shape, device):
    with torch.device(device):
        model = make()
        one, many = (census(model, torch.zeros(b, *shape)) for b in (1, 7))
        assert one == many and one.used > 0
        if "positions" not in make.__code__.co_names: assert one == census(model, torch.zeros(1, *shape), batch_axis=None)


@pytest.mark.parametrize("name", ["conv", "batch norm", "linear", "encoder", "gru"])
def test_a_batch_of_one_example_counts_once_per_example(name):
    make, shape = MODELS[name]
    model = make()
    assert census(model, torch.zeros(3, *shape), batch_axis=None).used == 3 * census(model, torch.zeros(3, *shape)).used


def test_axes_of_several_inputs():
    encoder, x = nn.TransformerEncoderLayer(8, 2, 16), torch.zeros(5, 2, 8)
    mask = torch.zeros(5, 5)
    expected = census(encoder, x, batch_axis=1)
    assert census(encoder, x, mask, batch_axis=(1, None)) == expected
    assert census(encoder, x, batch_axis=(1, None), src_mask=mask) == expected
    assert census(encoder, src=x, batch_axis=-2) == expected


def test_nested_inputs():
    model = Function(lambda self, batch, scale: (batch["a"] + batch["b"][0]) @ self.w * scale, w=(3, 2))
    assert used(model, {"a": torch.zeros(4, 3), "b": [torch.zeros(4, 3)]}, 2.) == {"w": 6}


# The axis of the examples, where a layer says it itself

@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers_say_which_axis_holds_the_examples(kind, batch_first):
    layer, x, h = kind(3, 4, 2, batch_first=batch_first), torch.zeros(5, 3, 3) if not batch_first else torch.zeros(3, 5, 3), torch.zeros(2, 3, 4)
    for state in ((), ((h, h) if kind is nn.LSTM else h,)):
        assert census(layer, x, *state).sharing == 5
    assert census(layer, torch.zeros(5, 3)).sharing == 5, "an example without a batch"
    assert census(layer, torch.zeros(5, 3), hx=tuple([h[:, 0]] * 2) if kind is nn.LSTM else h[:, 0]).sharing == 5
    if kind is nn.GRU: assert census(torch.compile(layer), x).sharing == 5
    assert census(layer, x, batch_axis=None).sharing == 15 and census(layer, x, batch_axis=0).sharing == (5 if batch_first else 3), "what is asked for is done"


@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_says_which_axis_holds_the_examples(batch_first):
    def batch(*shape): return torch.zeros(*shape) if batch_first else torch.zeros(*shape).transpose(0, 1)
    x, padding, allowed = batch(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool), torch.zeros(5, 5, dtype=torch.bool)
    for attention, inputs, masks in [
        (nn.MultiheadAttention(8, 2, batch_first=batch_first), (x, x, x), dict(key_padding_mask=padding, attn_mask=allowed)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first), (x,), dict(src_key_padding_mask=padding, src_mask=allowed)),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first), 1, enable_nested_tensor=False), (x,), dict(mask=allowed)),
        (nn.TransformerDecoderLayer(8, 2, 16, batch_first=batch_first), (x, x), dict(tgt_mask=allowed, memory_key_padding_mask=padding)),
    ]:
        expected = census(attention, *(torch.zeros(5, 8) for _ in inputs))
        for given in (census(attention, *inputs), census(attention, *inputs, **masks)):
            assert [row.used for row in given] == [row.used for row in expected] and expected.sharing == 5 and not given.notes
    model, y = nn.Transformer(8, 2, 1, 1, 16, batch_first=batch_first), batch(3, 4, 8)
    assert census(model, x, y) == census(model, x[:, :1] if not batch_first else x[:1], y[:, :1] if not batch_first else y[:1])


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_mask_per_head_is_cut_with_its_example(batch_first):
    def batch(*shape): return torch.zeros(*shape) if batch_first else torch.zeros(*shape).transpose(0, 1)
    x, mask = batch(3, 5, 8), torch.zeros(6, 5, 5)
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    assert census(attention, x, x, x, attn_mask=mask) == census(attention, x, x, x) and census(attention, x, x, x).sharing == 5
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
    assert census(layer, x, mask) == census(layer, x)
    alone = torch.zeros(5, 8)
    assert census(attention, alone, alone, alone, attn_mask=mask[:2]).used == census(attention, x, x, x).used
    with pytest.raises(ValueError, match=r"attn_mask: 2 rows for each example along axis 0 is expected, got \(5, 5, 5\)"): census(attention, x, x, x, attn_mask=mask[:5])
    with pytest.raises(ValueError, match=r"batch_axis: as many examples in each input.*'attn_mask': 2"): census(attention, x, x, x, attn_mask=mask[:4])


class WordModel(nn.Module):
    "Time first, and its state passed in, as in PyTorch's word_language_model."
    def __init__(self, layers=2):
        super().__init__()
        self.table, self.rnn, self.head = nn.Embedding(9, 4), nn.GRU(4, 4, layers), nn.Linear(4, 9)

    def forward(self, words, state):
        out, state = self.rnn(self.table(words), state)
        return self.head(out), state


def test_a_state_that_is_passed_in_tells_of_the_second_axis():
    model, words, hint = WordModel(), torch.zeros(5, 3, dtype=torch.long), "a layer of this model is not batch_first and takes time first, so its examples may be in batch_axis=1"
    with pytest.raises(ValueError, match=rf"got \{{'inputs\[0\]': 5, 'inputs\[1\]': 2\}}; {hint}$"): census(model, words, torch.zeros(2, 3, 4))
    with pytest.raises(RuntimeError) as told: census(model, words[:2], torch.zeros(2, 3, 4))
    assert hint in told.value.__notes__[0], "as many steps as layers"
    counted = census(model, words, torch.zeros(2, 3, 4), batch_axis=1)
    assert counted.layers()["rnn"].sharing == 5 and counted.used == census(model, words[:, :1], torch.zeros(2, 1, 4), batch_axis=1).used


def test_a_layer_inside_that_takes_axis_0_for_time_is_asked_about():
    inner, x = nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 4)), torch.zeros(5, 2, 3)
    for given in (x, x[:, :1], x[:1]):
        with pytest.raises(ValueError, match=r"^batch_axis: a number is expected, got 'auto': '1' \(LSTM\) is not batch_first and takes axis 0 for time, it seems; give 1, or 0 to count so$"): census(inner, given)
    assert census(inner, x, batch_axis=1).layers()["1"].sharing == 5 and census(inner, x, batch_axis=0).layers()["1"].sharing == 2
    turned = Function(lambda self, x: self.lstm(x.transpose(0, 1)))
    turned.lstm = nn.LSTM(3, 4)
    assert census(turned, x).sharing == 2, "the model turns its examples by itself"
    one_step = Function(lambda self, x: self.lstm(x[None]))  # one step of a policy, say
    one_step.lstm = nn.LSTM(3, 4)
    for training in (False, True): assert census(one_step, torch.zeros(5, 3), training=training).sharing == 1
    attend = Function(lambda self, x: self.attention(x, x, x))
    attend.attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(ValueError, match="^batch_axis: .*'attention' .MultiheadAttention. is not batch_first"): census(attend, torch.zeros(5, 2, 8))
    assert census(attend, torch.zeros(5, 2, 8), batch_axis=1).sharing == 5
    assert not attend.attention._forward_pre_hooks and not inner[1]._forward_pre_hooks


def test_looking_at_the_order_leaves_no_trace():
    model = Function(lambda self, x: self.lstm(self.norm(x)[None]))
    model.norm, model.lstm = nn.BatchNorm1d(3), nn.LSTM(3, 4)
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    census(model, torch.rand(1, 3, generator=torch.Generator()), training=False)
    model.norm = nn.Dropout(.5)
    census(model, torch.rand(4, 3, generator=torch.Generator()), training=True)
    model.norm = nn.Identity()
    assert torch.equal(random, torch.get_rng_state()) and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# Complex numbers

def test_a_complex_number_counts_as_two():
    "As in the code of Fourier neural operators, whose paper's counts are so: real and imaginary parts are numbers."
    x, w = torch.rand(2, 5, 4, dtype=torch.complex64), torch.rand(4, 3, dtype=torch.complex64)
    def stored_and_used(function, **tensors):
        model = Function(function)
        for name, tensor in tensors.items(): setattr(model, name, nn.Parameter(tensor))
        counted = census(model, x)
        assert counted.notes == ()
        return counted.stored, counted.used, counted.bytes
    assert stored_and_used(lambda self, x: x @ self.w, w=w) == (24, 5 * 24, 96)
    assert stored_and_used(lambda self, x: x @ torch.view_as_complex(self.w), w=torch.view_as_real(w)) == (24, 5 * 24, 96)
    assert stored_and_used(lambda self, x: x.real @ self.w.real + x.imag @ self.w.imag, w=w) == (24, 5 * 24, 96)
    assert stored_and_used(lambda self, x: x.real @ self.w.real, w=w) == (24, 5 * 12, 96), "half of them"
    assert stored_and_used(lambda self, x: x @ torch.complex(self.a, self.b), a=w.real.clone(), b=w.imag.clone()) == (24, 5 * 24, 96)
    assert stored_and_used(lambda self, x: x @ self.w, w=w.to(torch.complex128).to(torch.complex64).mT.contiguous().mT) == (24, 5 * 24, 96)


def test_complex_views_of_one_memory_and_complex_factors():
    w = torch.rand(4, 3, dtype=torch.complex64)
    for views in ((w, torch.view_as_real(w)), (torch.view_as_real(w), w)):
        assert [(unit.stored, unit.bytes) for unit in units_of(nn.ParameterList(views))] == [(24, 96)]
    model = Function(lambda self, x: x)
    model.register_buffer("fixed", torch.rand(4, 4, dtype=torch.complex64))
    model.function = lambda self, x: x @ self.fixed
    assert census(model, torch.rand(2, 4, dtype=torch.complex64)).notes == ("aten::mm multiplies by fixed, which is no parameter",)


def _sparse(self, x): return torch.sparse.mm((x.to_sparse() * 2.).to_dense().to_sparse().coalesce().t().coalesce(), self.w)


def _blank_of_the_data(self, x):
    buffer = x.new_zeros(len(x), x.shape[1] + 1, x.shape[2])
    buffer[:, 1:] = x
    return buffer @ self.w + torch.zeros_like(x[:, :1]) @ self.w


@pytest.mark.parametrize("make, shape", [*MODELS.values(), (lambda: Function(_blank_of_the_data, w=(8, 8)), (5, 8)), (LeNet5, (1, 32, 32)),
                                         (lambda: nn.LSTM(8, 4, batch_first=True), (5, 8))])
@pytest.mark.parametrize("training", [False, True])
def test_the_short_way_for_data_alone_changes_no_count(make, shape, training, monkeypatch):
    torch.manual_seed(0)
    model, x = make(), torch.rand(2, *shape)
    short, facts = census(model, x, training=training), counting._facts
    monkeypatch.setattr(counting, "_facts", lambda func: facts(func)._replace(quiet=False))
    long = census(model, x, training=training)
    assert short == long and short.notes == long.notes and short.used > 0


def test_data_without_a_storage_is_data():
    "Sparse tensors have no storage to be known by; what is made of them is data still."
    counted = census(Function(_sparse, w=(2, 3)), torch.rand(2, 4), batch_axis=None)
    assert counted.notes == ("aten::_sparse_addmm takes weights, and no rule counts it: w",)


# Maps

def test_maps_of_one_parameter():
    x = torch.rand(2, 5, 4)
    assert used(Function(lambda self, x: x @ self.w.t(), w=(3, 4)), x) == {"w": 5 * 12}
    assert used(Function(lambda self, x: x @ self.w[1:].t().contiguous(), w=(3, 4)), x) == {"w": 5 * 8}
    assert used(Function(lambda self, x: x.double() @ self.w.double(), w=(4, 3)), x) == {"w": 5 * 12}
    assert used(Function(lambda self, x: x @ self.w.view(4, 6).chunk(2, 1)[0], w=(24,)), x) == {"w": 5 * 12}
    assert used(Function(lambda self, x: x @ torch.fake_quantize_per_tensor_affine(self.w, .1, 0, -8, 7), w=(4, 3)), x) == {"w": 5 * 12}
    assert used(Function(lambda self, x: x @ self.w.repeat(1, 3), w=(4, 1)), x) == {"w": 5 * 12}
    assert used(Function(lambda self, x: F.conv1d(x.mT, F.pad(self.w, (1, 1)).expand(1, 4, 3)), w=(1, 1, 1)), x) == {"w": 3 * 12}
    assert used(Function(lambda self, x: x * self.w.softmax(0)[1], w=(3,)), x) == {"w": 20}


def test_a_toeplitz_matrix_counts_its_entries():
    def toeplitz(self, x):
        n, k = x.shape[-1], len(self.w)
        matrix = torch.zeros(n, n)
        for i in range(k): matrix = matrix + self.w[i] * torch.eye(n).roll(i, 1)
        return x @ matrix
    assert used(Function(toeplitz, w=(3,)), torch.rand(2, 8)) == {"w": 64}


def test_maps_of_several_parameters():
    x = torch.rand(2, 5, 4)
    assert used(Function(lambda self, x: x @ (self.a @ self.b), a=(4, 2), b=(2, 3)), x) == {"a": 0, "b": 0, "a, b": 60}
    assert used(Function(lambda self, x: x @ self.a @ self.b, a=(4, 2), b=(2, 3)), x) == {"a": 40, "b": 30}
    assert used(Function(lambda self, x: x @ (self.w + self.a @ self.b), w=(4, 3), a=(4, 2), b=(2, 3)), x) == {"w": 0, "a": 0, "b": 0, "a, b, w": 60}
    assert used(Function(lambda self, x: x @ torch.cat([self.a, self.b], 1), a=(4, 2), b=(4, 3)), x) == {"a": 40, "b": 60}
    assert used(Function(lambda self, x: x @ torch.cat([self.a, self.b], 1)[:, :3], a=(4, 2), b=(4, 3)), x) == {"a": 0, "b": 0, "a, b": 60}
    assert used(Function(lambda self, x: x + torch.cat([self.a, torch.zeros(3)]), a=(1,)), x) == {"a": 5}


@pytest.mark.parametrize("how, parts", [("weight_norm", 2), ("spectral_norm", 1), ("orthogonal", 1)])
def test_parametrizations_use_what_the_plain_layer_uses(how, parts):
    plain, x = nn.Linear(4, 4), torch.rand(2, 3, 4)
    counted = census(getattr(nn.utils.parametrizations, how)(copy.deepcopy(plain)), x)
    assert counted.used == census(plain, x).used and sum(row.made for row in counted) == parts - 1 and counted.unused == ()
    assert {row.layer for row in counted} == {""}


def test_functional_calls_and_ensembles():
    def call(self, x): return torch.func.functional_call(self.base, {"weight": self.w}, (x,))
    model = Function(call, w=(4, 3))
    model.base = nn.Linear(3, 4)
    assert used(model, torch.rand(2, 5, 3)) == {"w": 60, "base.weight": 0, "base.bias": 20}
    assert census(model, torch.rand(2, 5, 3)).unused == ("base.weight",)

    def ensemble(self, x): return torch.vmap(lambda w, b: torch.func.functional_call(self.base, {"weight": w, "bias": b}, (x,)))(self.w, self.b)
    model = Function(ensemble, w=(6, 4, 3), b=(6, 4))
    model.base = nn.Linear(3, 4)
    assert used(model, torch.rand(2, 3)) == {"w": 72, "b": 24, "base.weight": 0, "base.bias": 0}


def test_ways_to_run_that_change_nothing():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Conv1d(2, 2, 3), nn.LayerNorm(2)), torch.rand(4, 2, 3)
    expected = census(model, x).total
    assert census(torch.compile(copy.deepcopy(model)), x).total == expected
    assert census(torch.jit.trace(copy.deepcopy(model).eval(), x), x).total == expected
    with torch.autocast("cpu"): assert census(model, x).total[1:4] == expected[1:4]
    with torch.inference_mode(): assert census(nn.Sequential(nn.Linear(3, 4), nn.Conv1d(2, 2, 3), nn.LayerNorm(2)), x).total == expected
    assert census(copy.deepcopy(model).to("meta"), x.to("meta")).total == expected
    assert census(model, x, training=True).total == expected
    assert census(copy.deepcopy(model).bfloat16(), x.bfloat16()).bytes == expected.bytes // 2


# Attention, look-ups, experts

@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("training", [False, True])
def test_attention_and_encoders(device, training):
    with torch.device(device):
        attention = census(nn.MultiheadAttention(8, 2, batch_first=True), *[torch.zeros(3, 5, 8)] * 3, training=training)
        assert attention.used == 5 * attention.stored == 5 * 4 * 72 and attention.notes == ()
        extra = census(nn.MultiheadAttention(8, 2, add_bias_kv=True, batch_first=True), *[torch.zeros(3, 5, 8)] * 3)
        assert extra.used == attention.used + 16
        encoder = census(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False), torch.zeros(3, 5, 8), training=training)
        assert encoder.used == 5 * encoder.stored


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_learned_biases_memories_and_queries_of_attention(device):
    def attend(self, x):
        memory = self.memory.expand(len(x), 2, 4, 8)
        return F.scaled_dot_product_attention(x, torch.cat([x, memory], 2), torch.cat([x, memory], 2), attn_mask=self.bias.expand(len(x), 2, 5, 9))
    with torch.device(device):
        counted = used(Function(attend, memory=(2, 4, 8), bias=(2, 5, 9)), torch.zeros(3, 2, 5, 8))
        queries = used(Function(lambda self, x: F.scaled_dot_product_attention(self.q.expand(len(x), 2, 3, 8), x, x), q=(2, 3, 8)), torch.zeros(3, 2, 5, 8))
    assert counted == {"memory": 2 * 64, "bias": 90} and queries == {"q": 48 * 5}


def test_look_ups_and_writes():
    words = torch.tensor([[1, 2, 2]])
    assert used(nn.Embedding(9, 4, padding_idx=2), words) == {"weight": 12}
    assert used(Function(lambda self, i: self.w[i], w=(9, 4)), words) == {"w": 12}
    assert used(Function(lambda self, i: self.w.gather(0, i.mT.expand(3, 4)), w=(9, 4)), words) == {"w": 12}
    assert used(nn.EmbeddingBag(9, 4, mode="max"), words) == {"weight": 12}
    def masked(self, x):
        x, mask = x.clone(), torch.tensor([[True, False, True, False, False]])
        x[mask.expand(len(x), 5)] = self.token
        return x
    assert used(Function(masked, token=(4,)), torch.zeros(3, 5, 4)) == {"token": 8}


def test_bilinear_and_prototypes():
    assert used(nn.Bilinear(3, 4, 5), torch.zeros(2, 3), torch.zeros(2, 4)) == {"weight": 60, "bias": 5}
    assert used(Function(lambda self, x: torch.cdist(x, self.p), p=(7, 3)), torch.zeros(2, 5, 3)) == {"p": 5 * 21}
    assert used(Function(lambda self, x: torch.einsum("bnd,hde->bhne", x, self.w), w=(2, 4, 3)), torch.zeros(3, 5, 4)) == {"w": 5 * 24}
    assert used(Function(lambda self, x: torch.matmul(x, self.w), w=(2, 4, 3)), torch.zeros(3, 2, 5, 4)) == {"w": 5 * 24}


def test_experts_in_groups_count_like_a_loop():
    def route(self, x):
        x = x.flatten(0, 1)
        expert = (x[:, 0] > 0).int()
        return x[expert.argsort()], torch.bincount(expert, minlength=2).cumsum(0).int(), expert
    def grouped(self, x):
        x, ends, _ = route(self, x)
        return F.grouped_mm(x, self.w, offs=ends)
    def loop(self, x):
        x, _, expert = route(self, x)
        return [x[expert == e] @ self.w[e] for e in (0, 1)]
    x = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    counts = [used(Function(f, w=(2, 8, 16)).bfloat16(), x) for f in (grouped, loop)]
    assert counts[0] == counts[1] == {"w": 6 * 8 * 16}


# What is stored

def test_tools_disagree_and_the_census_counts_memory():
    "Row 8 of the reference table of ties: 44 real parameters, 88 reported."
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
            self.head.weight = self.embed.weight
        def forward(self, i): return self.head(self.embed(i))
    model, words = Tied(), torch.zeros(2, 5, dtype=torch.long)
    assert sum(p.numel() for m in model.modules() for p in m.parameters(recurse=False)) == 88
    counted = census(model, words)
    assert (counted.stored, counted.used, counted.bytes) == (44, 5 * 4 + 5 * 44, 176)
    assert counted["head.weight"] == counted["embed.weight"] and len(counted) == 1
    model.head.weight = nn.Parameter(model.embed.weight.data)  # a pseudo-tie, which model.parameters() counts twice
    assert sum(p.numel() for p in model.parameters()) == 88 and census(model, words).total == counted.total


def test_views_over_one_storage_and_disjoint_parts_of_one():
    whole = torch.rand(20)
    def linear(self, x): return F.linear(x, self.a.t(), self.b) * self.scale
    model = Function(linear)
    model.a, model.b = nn.Parameter(whole[:12].view(4, 3)), nn.Parameter(whole[12:15])
    model.scale = nn.Parameter(torch.ones(1).expand(3))
    counted = census(model, torch.rand(2, 4))
    assert [(row.names[0], row.stored, row.used) for row in counted] == [("a", 12, 12), ("b", 3, 3), ("scale", 1, 3)]
    model.c = nn.Parameter(whole[10:14])  # overlaps both
    assert census(model, torch.rand(2, 4)).stored == 15 + 1


@pytest.mark.parametrize("frozen", [False, True])
def test_trainable(frozen):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).requires_grad_(not frozen)
    model[1].bias.requires_grad_(True)
    assert census(model, torch.rand(1, 3)).total.trainable == (2 if frozen else 26)


def test_sparse_parameters_and_lazy_ones():
    model = Function(lambda self, x: x + self.w.to_dense())
    model.w = nn.Parameter(torch.eye(3).to_sparse())
    assert len(units_of(model)) == 1
    with pytest.raises(ValueError, match="model: a model whose parameters have shapes .run it once. is expected, got 'weight'"): units_of(nn.LazyLinear(3))


# What cannot be counted is said

def noted(function, *inputs, **parameters): return census(Function(function, **parameters), *inputs).notes


def test_notes():
    x = torch.rand(2, 3)
    assert noted(lambda self, x: x * self.w.item(), x, w=(1,)) == ("aten::_local_scalar_dense reads a number: w",)
    assert noted(lambda self, x: torch.linalg.solve_triangular(self.w, x.mT, upper=True), x, w=(3, 3)) == ("aten::linalg_solve_triangular takes weights, and no rule counts it: w",)
    model = Function(lambda self, x: x @ self.fixed)
    model.register_buffer("fixed", torch.eye(3))
    assert census(model, x).notes == ("aten::mm multiplies by fixed, which is no parameter",)
    def beside(self, x):
        both = x.new_zeros(2, 3)
        both[0] = self.w
        both[1:] = x
        return both
    assert noted(beside, x, w=(3,)) == ("aten::copy_ writes data beside weights: w",)
    old = torch.rand(3, 3)
    assert noted(lambda self, x: x @ old @ old, x) == ("aten::mm multiplies by a tensor of shape (3, 3), which is no parameter (2 times)",)


def test_packed_weights_are_noted():
    packed = torch.ao.nn.quantized.dynamic.Linear(3, 4)
    assert census(packed, torch.rand(2, 3)).notes == ("quantized::linear_dynamic takes packed weights",)


def test_higher_order_operations_are_noted():
    from torch.nn.attention.flex_attention import flex_attention
    notes = noted(lambda self, x: flex_attention(x, x, x, score_mod=lambda s, b, h, i, j: s + self.w[h]), torch.rand(2, 2, 4, 8), w=(2,))
    assert notes == ("flex_attention runs operations that are not seen",)


def test_a_rule_of_ones_own(monkeypatch):
    monkeypatch.setitem(RULES, "aten::linalg_solve_triangular", products(lambda a, out: a["self"].numel() * out.shape[-1], "self"))
    assert used(Function(lambda self, x: torch.linalg.solve_triangular(self.w, x.mT, upper=True), w=(3, 3)), torch.rand(1, 3)) == {"w": 9}


def test_every_rule_names_an_operation_of_torch():
    for name in RULES:
        packet = getattr(torch.ops.aten, name.removeprefix("aten::"), None)
        assert packet is not None and rule_for(getattr(packet, packet.overloads()[0])) is RULES[name], name


# No trace

def test_nothing_is_left_behind():
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=.1), nn.Linear(4, 4), nn.BatchNorm1d(3), nn.Dropout(.5), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))
    model[2].eval()
    words, before = torch.zeros(2, 3, dtype=torch.long), {k: v.clone() for k, v in model.state_dict().items()}
    random, fast, modes = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled(), [m.training for m in model.modules()]
    for training in (False, True): census(model, words, training=training)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state()) and torch.backends.mha.get_fastpath_enabled() == fast
    assert [m.training for m in model.modules()] == modes and all(p.grad is None for p in model.parameters())


def test_nothing_is_left_behind_after_an_error():
    def fail(self, x):
        self.norm(x)
        raise RuntimeError("no")
    model = Function(fail)
    model.norm, model.gru = nn.BatchNorm1d(3), nn.GRU(3, 3)
    with pytest.raises(RuntimeError, match="^no(\n|$)"): census(model, torch.rand(2, 3, 4), training=True)
    assert model.training and model.norm.num_batches_tracked == 0 and model.norm.running_mean.eq(0).all()
    assert torch.backends.mha.get_fastpath_enabled() and not model.gru._forward_pre_hooks


def test_inputs_are_not_written():
    x = torch.tensor([[-1., 2.]])
    census(Function(lambda self, x: x.relu_()), x)
    census(Function(lambda self, x: x.relu_()), x, batch_axis=None)
    assert x.tolist() == [[-1, 2]]


# Bad input

X = torch.zeros(4, 3)
BAD = {
    "no module": (lambda: census(3, X), TypeError, "model: a module is expected, got int"),
    "training": (lambda: census(nn.Linear(3, 2), X, training=1), TypeError, "training: True or False is expected, got 1"),
    "axis text": (lambda: census(nn.Linear(3, 2), X, batch_axis="0"), TypeError, "batch_axis: a whole number, None, a tuple of them, or 'auto' is expected, got '0'"),
    "no inputs": (lambda: census(nn.Linear(3, 2)), TypeError, r"^inputs: what forward\(input\) takes is expected, got nothing: missing a required argument: 'input'$"),
    "too many inputs": (lambda: census(nn.Linear(3, 2), X, X, scale=2), TypeError, r"^inputs: what forward\(input\) takes is expected, got 2 inputs and scale: too many positional arguments$"),
    "other inputs": (lambda: census(nn.Linear(3, 2), x=X), TypeError, r"^inputs: what forward\(input\) takes is expected, got x: missing"),
    "axis bool": (lambda: census(nn.Linear(3, 2), X, batch_axis=True), TypeError, "batch_axis: a whole number"),
    "axis out": (lambda: census(nn.Linear(3, 2), X, batch_axis=2), ValueError, r"batch_axis: an axis of inputs\[0\] \(2 axes\) is expected, got 2"),
    "axes": (lambda: census(nn.Linear(3, 2), X, batch_axis=(0, 0)), ValueError, r"batch_axis: one axis for each of 1 inputs is expected, got \(0, 0\)"),
    "sizes": (lambda: census(nn.Bilinear(3, 3, 2), X, X[:2]), ValueError, r"batch_axis: as many examples in each input .* is expected, got \{'inputs\[0\]': 4, 'inputs\[1\]': 2\}"),
    "empty": (lambda: census(nn.Linear(3, 2), X[:0]), ValueError, r"inputs: at least one example is expected, got \{'inputs\[0\]': 0\}"),
    "kind": (lambda: census(nn.Linear(3, 2), {1: object()}), TypeError, r"inputs\[0\]\[1\]: a tensor, number, text, .* is expected, got object"),
    "packed": (lambda: census(nn.GRU(3, 2), nn.utils.rnn.pack_sequence([X])), TypeError, r"inputs\[0\]: a tensor, .* is expected, got PackedSequence"),
    "sparse": (lambda: census(nn.Linear(3, 2), X.to_sparse()), TypeError, r"inputs\[0\]: a plain \(strided\) tensor, or batch_axis=None is expected, got torch.sparse_coo"),
    "meta": (lambda: census(nn.Linear(3, 2, device="meta"), X), ValueError, r"inputs\[0\]: a tensor on the model's device, meta is expected, got 'cpu'"),
    "row": (lambda: census(nn.Linear(3, 2), X)["wieght"], ValueError, "parameter: 'wieght' matches none of 2 names; the nearest is 'weight'"),
    "depth": (lambda: census(nn.Linear(3, 2), X).layers(0), ValueError, "depth: a whole number of at least 1 is expected, got 0"),
    "compare nothing": (lambda: compare(), ValueError, r"models: at least one is expected, got \(\)"),
    "compare kind": (lambda: compare(3), TypeError, "models: modules, or what census returns is expected, got int"),
    "compare inputs": (lambda: compare(nn.Linear(3, 2), inputs=X), TypeError, "inputs: a tuple, one entry for each input is expected, got Tensor"),
    "compare names": (lambda: compare(nn.Linear(3, 2), inputs=(X,), names=["a", "b"]), ValueError, r"names: 1 different names is expected, got \['a', 'b'\]"),
    "compare names kind": (lambda: compare(nn.Linear(3, 2), inputs=(X,), names=3), TypeError, "^names: a list of text is expected, got 3$"),
    "compare names text": (lambda: compare(nn.Linear(3, 2), nn.Linear(3, 2), inputs=(X,), names="ab"), TypeError, "^names: a list of text is expected, got 'ab'$"),
    "compare names numbers": (lambda: compare(nn.Linear(3, 2), inputs=(X,), names=[3]), TypeError, r"^names: a list of text is expected, got \[3\]$"),
    "compare no inputs": (lambda: compare(nn.Linear(3, 2)), TypeError, r"^inputs: what forward\(input\) takes is expected, got nothing"),
    "plot": (lambda: census(nn.Linear(3, 2), X).plot(3), TypeError, "^ax: axes of matplotlib is expected, got 3$"),
    "plot figure": (lambda: Census().plot("figure"), TypeError, "^ax: axes of matplotlib is expected, got 'figure'$"),
    "network": (lambda: connections("LeNet5"), ValueError, "network: one of 'LeNet-5', .* is expected, got 'LeNet5'; did you mean 'LeNet-5'"),
}


@pytest.mark.parametrize("call, error, message", BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message): call()


# Tables

def test_tables():
    counted = census(nn.Sequential(nn.Linear(3, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))), X)
    assert "made of 1.parametrizations.weight.original0, 1.parametrizations.weight.original1" in repr(counted)
    assert repr(counted).splitlines()[-1].split() == ["total", "40", "4", "36", "0.9", "160"]
    html = counted._repr_html_()
    assert html.startswith("<table><thead><tr><th>parameter</th>") and html.count("<tr>") == len(counted) + 2
    frame = counted.frame()
    assert frame.loc["0.weight", "used"] == 12 and frame["stored"].sum() == 40
    assert [row.names[0] for row in counted.layers()] == ["0", "1"] and counted.layers().used == counted.used
    assert pickle.loads(pickle.dumps(counted)) == counted and copy.deepcopy(counted).model == "Sequential"
    long = Census([Count((f"w{i}",), 1, 1, 1, 4) for i in range(50)])
    assert "… and 10 more" in repr(long) and len(long.frame()) == 50
    assert "&lt;b&gt;" in Census([Count(("<b>",), 1, 1, 1, 4)])._repr_html_()
    assert Census().stored == 0 and "total" in repr(Census())


def test_compare_numbers_models_of_one_class():
    both = compare(nn.Linear(3, 2), nn.Linear(3, 4), inputs=(X,))
    assert [row.names[0] for row in both] == ["Linear 1", "Linear 2"] and both["Linear 2"].stored == 16 and "total" not in repr(both)


def test_plot():
    import matplotlib.pyplot as plt
    ax = census(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), X).plot()
    assert ax.get_xscale() == "log" and ax.get_xlabel() == "weights" and [t.get_text() for t in ax.get_yticklabels()] == ["0", "1"]
    assert compare(nn.Linear(3, 2), inputs=(X,)).plot().get_ylabel() == "model"
    Census().plot()
    plt.close("all")


@pytest.mark.parametrize("layers", [14, 15, 60])
def test_a_plot_of_many_layers_names_the_largest_and_says_so(layers):
    import matplotlib.pyplot as plt
    rows = Census([Count((f"{i}.weight",), 1 + i % 7, 1, 10 + i % 7, 4) for i in range(layers)]).layers()
    ax = rows.plot()
    named = [t.get_text() for t in ax.get_yticklabels()]
    assert len(ax.lines[-1].get_xdata()) == layers, "all layers are drawn"
    if layers == 14: assert named == [str(i) for i in range(14)] and ax.get_ylabel() == "layer"
    else:
        assert ax.get_ylabel() == f"layer ({len(named)} of {layers} named)" and 5 <= len(named) <= 14
        assert "6" in named, "one that uses the most"
    ax.figure.canvas.draw()
    boxes = sorted((label.get_window_extent() for label in ax.get_yticklabels()), key=lambda box: box.y0)
    assert all(a.y1 <= b.y0 + 1 for a, b in zip(boxes, boxes[1:])), "no two names overlap"
    plt.close("all")


def test_what_a_model_raises_says_what_it_was_given():
    with pytest.raises(RuntimeError) as caught: census(nn.Linear(3, 2), torch.zeros(3))
    assert caught.value.__notes__ == ["census gave the model one example, cut along batch_axis; with batch_axis=None the inputs are one example as they are"]


# Published counts

def test_lenet5_layer_by_layer():
    "LeCun et al. 1998, section II.B: (trainable parameters, connections)."
    printed = {"c1": (156, 122_304), "s2": (12, 5_880), "c3": (1_516, 151_600), "s4": (32, 2_000), "c5": (48_120, 48_120), "f6": (10_164, 10_164)}
    lenet = connections("LeNet-5")
    assert {layer: (lenet[layer].trainable, lenet[layer].used) for layer in printed} == printed
    assert (lenet.total.trainable, lenet.used) == (60_000, 340_908)


@pytest.mark.parametrize("network, stored", [
    ("AlexNet", 60_965_224),     # Krizhevsky et al. 2012: 60 million, two groups
    ("VGG-16", 138_357_544),     # Simonyan and Zisserman 2015, table 2: 138 million
    ("ResNet-50", 25_557_032),   # torchvision's documentation
    ("GoogLeNet", 6_998_552),    # Szegedy et al. 2015, table 1: 6.8 million without biases
])
def test_parameters_of_classic_networks(network, stored): assert connections(network).stored == stored


def test_classic_networks_run():
    for name, (build, shape) in CLASSICS.items():
        with torch.device("meta"): out = build().eval()(torch.zeros(2, *shape[1:]))
        assert out.shape == (2, 10 if name == "LeNet-5" else 1000)


def test_the_edge_detector():
    "Goodfellow et al. 2016, section 9.2, figure 9.6."
    with torch.device("meta"):
        edges = census(nn.Conv2d(1, 1, (1, 2), bias=False), torch.zeros(1, 1, 280, 320))
        dense = census(nn.Linear(320 * 280, 319 * 280, bias=False), torch.zeros(1, 320 * 280))
    assert (edges.used, edges.used + 319 * 280, dense.stored) == (178_640, 267_960, 320 * 280 * 319 * 280)


@pytest.fixture(scope="module")
def transformers(): return pytest.importorskip("transformers", reason="transformers is not installed: its own models are not counted")


@pytest.mark.long
def test_bert_and_albert(transformers):
    "Devlin et al. 2019: 110M; Lan et al. 2020, table 1: 12M; one block that runs twelve times."
    with torch.device("meta"):
        words = torch.zeros(2, 16, dtype=torch.long)
        bert = census(transformers.BertModel(transformers.BertConfig()), words)
        albert = census(transformers.AlbertModel(transformers.AlbertConfig(hidden_size=768, num_attention_heads=12, intermediate_size=3072)), words)
    assert (bert.stored, albert.stored) == (109_482_240, 11_683_584) and bert.notes == albert.notes == ()
    block = albert.layers(depth=3)["encoder.albert_layer_groups.0"]
    assert block.stored == 7_087_872 and block.used == 12 * 16 * 7_087_872
    assert sum(row.used for row in bert if row.names[0].startswith("encoder.layer.")) == block.used


@pytest.mark.long
def test_gpt2_small(transformers):
    "The released model: 124,439,808 with tied embeddings."
    with torch.device("meta"):
        gpt2 = census(transformers.GPT2LMHeadModel(transformers.GPT2Config()), torch.zeros(2, 16, dtype=torch.long))
    assert gpt2.stored == 124_439_808 and gpt2["lm_head.weight"].names == ("transformer.wte.weight", "lm_head.weight")
    assert gpt2["lm_head.weight"].used == 16 * 768 + 16 * 768 * 50257 and gpt2.notes == ()


def test_t5_uses_its_position_biases_in_every_layer(transformers):
    with torch.device("meta"):
        words = torch.zeros(1, 16, dtype=torch.long)
        t5 = census(transformers.T5ForConditionalGeneration(transformers.T5Config()), input_ids=words, decoder_input_ids=words)
    assert t5["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].used == 6 * 8 * 16 * 16


LARGE = """
import sys, torch, torch.nn.functional as F
from torch import nn
from sharetie.census import census

class Block(nn.Module):
    def __init__(self, d=8192, kv=1024, hidden=28672):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(d) for _ in range(2))
        self.q, self.k, self.v, self.o, self.gate, self.up, self.down = (nn.Linear(i, o, bias=False) for i, o in
            ((d, d), (d, kv), (d, kv), (d, d), (d, hidden), (d, hidden), (hidden, d)))
    def forward(self, x):
        y = self.norms[0](x)
        q, k, v = (f(y).unflatten(-1, (-1, 128)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))

with torch.device("meta"):
    model = nn.Sequential(nn.Embedding(32000, 8192), *(Block() for _ in range(80)), nn.RMSNorm(8192), nn.Linear(8192, 32000, bias=False))
    counted = census(model, torch.zeros(1, 4096, dtype=torch.long))
assert counted.stored == 68_976_648_192 and counted.used == 4096 * (counted.stored - 32000 * 8192 + 8192), counted.total
assert not {"pandas", "matplotlib", "scipy", "sklearn"} & sys.modules.keys(), "the core needs torch alone"
print(next((line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")), 0))
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_seventy_billion_parameters_in_less_than_a_gigabyte_with_torch_alone():
    "Touvron et al. 2023, Llama 2 70B, in a process of its own, which imports nothing but torch."
    run = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert 1e5 < int(run.stdout) < 1e6, "kilobytes"


class BatchFirstInside(nn.LSTM):
    "Takes examples first and turns them, which nobody can see from outside."
    def forward(self, x): return super().forward(x.transpose(0, 1))


def test_layers_with_a_forward_of_their_own_are_not_asked_for_their_axis():
    x = torch.randn(2, 7, 4)
    with pytest.raises(ValueError, match="batch_axis: a number is expected"): census(BatchFirstInside(4, 3), x)
    assert census(BatchFirstInside(4, 3), x, batch_axis=0).used == 7 * sum(p.numel() for p in nn.LSTM(4, 3).parameters())
