"A cell unrolled over time: equal to PyTorch's layers where it is shared, tied where it says so, and strict about lengths."
import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from sharetie.census import census
from sharetie.ties import check_ties, find_ties, keep_ties, load_model, save_model, tie_, untie_
from sharetie.unrolled import Unrolled

B, N, D, H = 4, 7, 3, 5
LAYERS = {
    "tanh": (lambda **o: nn.RNNCell(D, H, **o), nn.RNN, {}),
    "relu": (lambda **o: nn.RNNCell(D, H, nonlinearity="relu", **o), nn.RNN, {"nonlinearity": "relu"}),
    "gru": (lambda **o: nn.GRUCell(D, H, **o), nn.GRU, {}),
    "lstm": (lambda **o: nn.LSTMCell(D, H, **o), nn.LSTM, {}),
}
LENGTHS = torch.tensor([3, 7, 1, 5])


class Looped(nn.Module):
    "A cell of PyTorch's in a module of its own, which the fused kernels do not know."
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x, state):
        state = self.cell(x, state)
        return (state[0], state) if isinstance(state, tuple) else state


def pair(kind, seed=0, **options):
    "A cell and PyTorch's layer with the same weights, float64."
    torch.manual_seed(seed)
    make, layer, more = LAYERS[kind]
    cell = make(dtype=torch.float64, **options)
    layer = layer(D, H, batch_first=True, dtype=torch.float64, **more, **options)
    layer.load_state_dict({f"{name}_l0": p for name, p in cell.state_dict().items()})
    return cell, layer


def data(seed=1, b=B, n=N):
    torch.manual_seed(seed)
    return torch.randn(b, n, D, dtype=torch.float64, requires_grad=True)


def first_state(kind, seed=2):
    torch.manual_seed(seed)
    h, c = torch.randn(2, B, H, dtype=torch.float64)
    return (h, c) if kind == "lstm" else h


def plain(layer, x, state, lengths):
    "PyTorch's own layer, packed; final states without the axis of layers."
    hx = None if state is None else tuple(s[None] for s in state) if isinstance(state, tuple) else state[None]
    if lengths is None: out, last = layer(x, hx)
    else:
        out, last = layer(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False), hx)
        out = pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])[0]
    return out, tuple(s[0] for s in last) if isinstance(last, tuple) else last[0]


def gradients(out, state, *inputs):
    state = state if isinstance(state, tuple) else (state,)
    weigh = torch.arange(out.numel(), dtype=out.dtype).view_as(out).sin()
    loss = (weigh * out).sum() + sum((s * s).sum() for s in state)
    return torch.autograd.grad(loss, inputs)


def same(a, b):
    for x, y in zip(a if isinstance(a, tuple) else (a,), b if isinstance(b, tuple) else (b,), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


# Equal to nn.RNN, nn.GRU and nn.LSTM

@pytest.mark.parametrize("looped", [False, True], ids=["fused", "looped"])
@pytest.mark.parametrize("lengths", [None, LENGTHS, torch.tensor([2, 2, 2, 2])], ids=["full", "lengths", "short"])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_shared_is_the_layer(kind, bias, given, lengths, looped):
    cell, layer = pair(kind, bias=bias)
    x, state = data(), first_state(kind) if given else None
    ours = Unrolled(Looped(cell) if looped else cell, N)
    got, expected = ours(x, state, lengths), plain(layer, x, state, lengths)
    same(got[0], expected[0])
    same(got[1], expected[1])
    same(gradients(*got, x, *cell.parameters()), gradients(*expected, x, *layer.parameters()))


@pytest.mark.parametrize("sharing", [1, 2, 3, 7, "none", "all"])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "lengths"])
@pytest.mark.parametrize("kind", LAYERS)
def test_fused_stretches_are_the_loop(kind, lengths, sharing):
    "With cells that differ, the fused kernels of each stretch give what a loop gives."
    ours = Unrolled(pair(kind)[0], N, sharing)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in ours.parameters(): p.normal_()
    loop = Unrolled(Looped(pair(kind)[0]), N, sharing)
    loop.load_state_dict({name.replace("weight", "cell.weight").replace("bias", "cell.bias"): p for name, p in ours.state_dict().items()})
    x, state = data(), first_state(kind)
    got, expected = ours(x, state, lengths), loop(x, state, lengths)
    same(got[0], expected[0])
    same(got[1], expected[1])
    same(gradients(*got, x, *ours.parameters()), gradients(*expected, x, *loop.parameters()))


def test_outputs_end_with_their_sequence():
    ours = Unrolled(pair("lstm")[0], N)
    x = data()
    out, (h, c) = ours(x, lengths=LENGTHS.tolist())
    for i, length in enumerate(LENGTHS):
        alone, (one_h, one_c) = ours(x[i:i + 1, :length])
        same((out[i, :length], h[i], c[i]), (alone[0], one_h[0], one_c[0]))
        assert not out[i, length:].any()


def test_padding_gets_no_gradient_and_may_hold_anything():
    ours, x = Unrolled(pair("gru")[0], N), data()
    with torch.no_grad(): x[2, 1:] = torch.nan
    out, h = ours(x, lengths=LENGTHS)
    assert out.isfinite().all() and h.isfinite().all()
    grad, = torch.autograd.grad(out.sum() + h.sum(), x)
    assert not grad[2, 1:].any() and grad[1].abs().min() > 0


def test_looped_padding_may_hold_anything_in_the_forward_pass():
    ours, x = Unrolled(Looped(pair("gru")[0]), N), data().detach()
    x[2, 1:] = torch.nan
    out, h = ours(x, lengths=LENGTHS)
    assert out.isfinite().all() and h.isfinite().all()


@pytest.mark.parametrize("kind", LAYERS)
def test_steps_first(kind):
    cell, layer = pair(kind)
    x = data()
    a, s = Unrolled(cell, N)(x)
    b, t = Unrolled(cell, N, batch_first=False)(x.transpose(0, 1))
    same(a, b.transpose(0, 1))
    same(s, t)


def test_state_goes_on_where_it_ended():
    ours, x = Unrolled(pair("lstm")[0], N), data()
    whole_run = ours(x)
    first, state = ours(x[:, :4])
    second, state = ours(x[:, 4:], state)
    same(whole_run[0], torch.cat([first, second], 1))
    same(whole_run[1], state)


def test_gradcheck_with_lengths():
    ours = Unrolled(pair("tanh")[0], 3, "none")
    x = data(b=2, n=3)
    names = [name for name, _ in ours.named_parameters()]
    def f(x, *values):
        out, h = torch.func.functional_call(ours, dict(zip(names, values)), (x,), {"lengths": [3, 2]})
        return out, h
    assert torch.autograd.gradcheck(f, (x, *ours.parameters()))


# Own cells

class Residual(nn.Module):
    "Another width of outputs than of states, and a dictionary of states."
    def __init__(self):
        super().__init__()
        self.mix, self.read = nn.Linear(D, H, dtype=torch.float64), nn.Linear(H, 2, dtype=torch.float64)

    def forward(self, x, state=None):
        h = self.mix(x) if state is None else state["h"] + self.mix(x)
        seen = torch.ones(len(x)) if state is None else state["seen"][0] + 1
        return self.read(h), {"h": h, "seen": [seen]}


@pytest.mark.parametrize("sharing", ["all", 2, "none"])
def test_own_cell(sharing):
    ours, x = Unrolled(Residual(), N, sharing), data()
    out, state = ours(x, lengths=LENGTHS)
    assert out.shape == (B, N, 2) and state["seen"][0].tolist() == LENGTHS.tolist()
    sums = torch.stack([x[i, :n].sum(0) for i, n in enumerate(LENGTHS)])
    first = ours.cells[0]
    same(state["h"], sums @ first.mix.weight.T + LENGTHS[:, None] * first.mix.bias)


def test_own_cell_of_words():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.cell = nn.Embedding(9, D), nn.GRUCell(D, H)
        def forward(self, x, state): return self.cell(self.embedding(x), state)
    out, h = Unrolled(Words(), 4)(torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]), lengths=[4, 2])
    assert out.shape == (2, 4, H) and torch.equal(out[1, 1], h[1]) and not out[1, 2:].any()


def test_subclass_hook_and_parametrization():
    "What may do something else at each step is looped; a parametrized weight is used as it is computed."
    class Noted(nn.GRUCell):
        def forward(self, x, state): return super().forward(x, state) + 1
    x, calls = torch.randn(2, 4, D), []
    assert Unrolled(Noted(D, H), 4)(x)[0].min() > 0
    cell = nn.LSTMCell(D, H)
    ours = Unrolled(cell, 4)
    before = ours(x)[0]
    cell.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(ours(x)[0], before)
    assert len(calls) == 4
    normed = nn.LSTMCell(D, H)
    normed.load_state_dict(cell.state_dict())
    nn.utils.parametrizations.weight_norm(normed, "weight_hh")
    ours = Unrolled(normed, 4)
    torch.testing.assert_close(ours(x)[0], before)
    ours(x)[0].sum().backward()
    assert all(p.grad is not None for p in ours.parameters())


# Ties

@pytest.mark.parametrize("sharing, distinct", [("all", 1), (3, 3), (2, 4), (7, 1), (1, 7), ("none", 7)])
def test_ties_and_counts(sharing, distinct):
    ours = Unrolled(nn.GRUCell(D, H), N, sharing)
    per_cell = sum(p.numel() for p in nn.GRUCell(D, H).parameters())
    assert len(set(ours.cells)) == distinct
    assert sum(p.numel() for p in ours.parameters()) == distinct * per_cell
    counted = census(ours, torch.randn(1, N, D))
    assert (counted.stored, counted.used, counted.notes) == (distinct * per_cell, N * per_cell, ())
    names = sorted(len(tie.names) for tie in find_ties(ours).true if tie.names[0].endswith("weight_hh"))
    sizes = [sum(cell is other for other in ours.cells) for cell in dict.fromkeys(ours.cells)]
    assert names == sorted(s for s in sizes if s > 1)
    check_ties(ours)


def test_census_of_a_fused_layer_agrees():
    x = torch.randn(1, N, D)
    assert census(Unrolled(nn.LSTMCell(D, H), N), x).used == census(nn.LSTM(D, H, batch_first=True), x).used


def test_all_start_alike_and_are_their_own():
    ours = Unrolled(cell := nn.RNNCell(D, H), 4, 2)
    assert ours.cells[0] is cell and ours.cells[1] is cell and ours.cells[2] is not cell
    assert torch.equal(ours.cells[2].weight_hh, cell.weight_hh)
    ours(torch.randn(2, 4, D))[0].sum().backward()
    torch.optim.SGD(ours.parameters(), 1.).step()
    assert not torch.equal(ours.cells[2].weight_hh, cell.weight_hh)


def test_untie_and_retie():
    ours = Unrolled(nn.GRUCell(D, H), 4)
    x = torch.randn(2, 4, D)
    before = ours(x)[0]
    untie_(ours, "cells.2")
    torch.testing.assert_close(ours(x)[0], before)
    with torch.no_grad(): ours.cells[2].bias_hh.add_(1)
    after = ours(x)[0]
    torch.testing.assert_close(after[:, :2], before[:, :2])
    assert not torch.allclose(after[:, 2], before[:, 2])
    with pytest.raises(ValueError, match="at most 4 steps.*got 5"): ours(torch.randn(2, 5, D))


def test_parts_of_cells_can_be_tied():
    ours = Unrolled(nn.GRUCell(D, H), 3, "none")
    tie_(ours, "cells.*.weight_hh")
    assert len(list(ours.parameters())) == 1 + 3 * 3
    ours(torch.randn(2, 3, D))[0].sum().backward()


# Saved, copied, moved

@pytest.mark.parametrize("sharing, distinct", [("all", 1), (2, 2), ("none", 4)])
def test_state_dict_has_each_cell_once(sharing, distinct):
    ours = nn.Sequential(Unrolled(nn.LSTMCell(D, H), 4, sharing))
    state = ours.state_dict()
    assert len(state) == 4 * distinct and list(state)[0] == "0.cells.0.weight_ih"
    other = nn.Sequential(Unrolled(nn.LSTMCell(D, H), 4, sharing))
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    for a, b in zip(ours.parameters(), other.parameters(), strict=True): assert torch.equal(a, b)
    check_ties(other)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other.load_state_dict(torch.load(file), assign=True)
    check_ties(other)
    assert len(list(other.parameters())) == 4 * distinct


def test_state_dict_reaches_other_lengths():
    short, long = Unrolled(nn.GRUCell(D, H), 3), Unrolled(nn.GRUCell(D, H), 9)
    long.load_state_dict(short.state_dict())
    x = torch.randn(2, 9, D)
    torch.testing.assert_close(long(x)[0], short(x)[0])


def test_state_dict_with_prefix_in_any_form():
    ours = Unrolled(nn.GRUCell(D, H), 3)
    assert list(ours.state_dict(prefix="a.")) == [f"a.cells.0.{name}" for name in ours.cells[0].state_dict()]
    with pytest.warns(FutureWarning): assert len(ours.state_dict({}, "b.")) == 4


def test_strict_loading_still_names_what_is_missing():
    ours = Unrolled(nn.GRUCell(D, H), 3)
    state = ours.state_dict()
    del state["cells.0.bias_hh"]
    with pytest.raises(RuntimeError, match="cells.0.bias_hh"): ours.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Unexpected"): ours.load_state_dict(ours.state_dict() | {"cells.9.bias_hh": torch.zeros(1)})


@pytest.mark.parametrize("sharing", ["all", 2, "none"])
def test_save_and_load_model(sharing, tmp_path):
    ours, other = (Unrolled(nn.LSTMCell(D, H), 4, sharing) for _ in range(2))
    save_model(ours, tmp_path / "m.safetensors")
    load_model(other, tmp_path / "m.safetensors")
    x = torch.randn(2, 4, D)
    torch.testing.assert_close(other(x)[0], ours(x)[0])
    check_ties(other)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(how):
    ours = Unrolled(nn.LSTMCell(D, H), 4, 2)
    other = how(ours)
    assert len(list(other.parameters())) == 8 and other.cells[0] is other.cells[1] is not other.cells[2]
    assert not {*map(id, ours.parameters())} & {*map(id, other.parameters())}
    check_ties(other)
    x = torch.randn(2, 4, D)
    torch.testing.assert_close(other(x), ours(x))
    other.load_state_dict(ours.state_dict())


def test_casts_and_meta():
    ours = Unrolled(nn.GRUCell(D, H), 4)
    keep_ties(ours)
    assert ours.double()(torch.randn(2, 4, D, dtype=torch.float64))[0].dtype == torch.float64
    with torch.device("meta"): meta = Unrolled(nn.LSTMCell(D, H), 4)
    for lengths in (None, [2, 4]): assert meta(torch.zeros(2, 4, D, device="meta"), lengths=lengths)[0].shape == (2, 4, H)
    meta.to_empty(device="cpu")
    assert len(list(meta.parameters())) == 4


@pytest.mark.parametrize("kind", LAYERS)
def test_autocast(kind):
    cell = LAYERS[kind][0]()
    ours, looped, x = Unrolled(cell, 4), Unrolled(Looped(cell), 4), torch.randn(2, 4, D)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = ours(x, lengths=[4, 2])[0], looped(x, lengths=[4, 2])[0]
    torch.testing.assert_close(out.float(), expected.float(), atol=0.05, rtol=0.05)


@pytest.mark.long
@pytest.mark.parametrize("kind, sharing", [("tanh", "none"), ("lstm", "all")])
def test_compiles_whole(kind, sharing):
    torch.compiler.reset()
    ours, x = Unrolled(LAYERS[kind][0](), 2, sharing), torch.randn(2, 2, D)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), ours(x))
    compiled(x)[0].sum().backward()
    assert all(p.grad is not None for p in ours.parameters())


def test_evaluation_mode_trains_too():
    ours = Unrolled(nn.LSTMCell(D, H), 4).eval()
    ours(torch.randn(2, 4, D))[0].sum().backward()
    with torch.no_grad(): assert not ours(torch.randn(2, 4, D))[0].requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "lengths"])
@pytest.mark.parametrize("kind", LAYERS)
def test_on_the_gpu(kind, lengths):
    cell, layer = pair(kind)
    ours, layer, x = Unrolled(cell, N).cuda(), layer.cuda(), data().detach().cuda().requires_grad_()
    got, expected = ours(x, lengths=lengths), plain(layer, x, None, lengths)
    same(got[0], expected[0])
    same(got[1], expected[1])
    state = got[1] if isinstance(got[1], tuple) else (got[1],)
    (got[0].square().sum() + sum(s.sum() for s in state)).backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters())


# Bad input

BAD_MODELS = [
    (dict(cell=nn.LSTM(D, H)), TypeError, "cell: a module of one step"),
    (dict(cell=nn.LSTMCell), TypeError, "cell: a module of one step"),
    (dict(cell=nn.Linear(D, H)), TypeError, r"cell: a function of \(x, state\) is expected"),
    (dict(cell=lambda x, s: x), TypeError, "cell: a module"),
    (dict(steps=0), ValueError, "steps: a whole number of at least 1 is expected, got 0"),
    (dict(steps=2.0), TypeError, "steps: a whole number is expected, got 2.0"),
    (dict(sharing="some"), ValueError, "sharing: one of 'all', 'none' is expected, got 'some'"),
    (dict(sharing=0), ValueError, "sharing: a whole number from 1 to 4 is expected, got 0"),
    (dict(sharing=-2), ValueError, "sharing: a whole number from 1 to 4 is expected, got -2"),
    (dict(sharing=5), ValueError, "sharing: a whole number from 1 to 4 is expected, got 5"),
    (dict(sharing=2.0), TypeError, "sharing: .* got 2.0"),
    (dict(sharing=None), TypeError, "sharing: .* got None"),
    (dict(sharing=True), TypeError, "sharing: .* got True"),
    (dict(batch_first=1), TypeError, "batch_first: True or False is expected, got 1"),
]


@pytest.mark.parametrize("options, error, message", BAD_MODELS)
def test_bad_models(options, error, message):
    with pytest.raises(error, match=message): Unrolled(**{"cell": nn.GRUCell(D, H), "steps": 4} | options)


X = torch.zeros(2, 4, D)
BAD_CALLS = [
    (dict(x=None), TypeError, "x: a tensor is expected, got None"),
    (dict(x=torch.zeros(2, 5, D)), ValueError, r"x: at most 4 steps \(sharing='none'.*got 5"),
    (dict(x=torch.zeros(2, 4, D + 1)), ValueError, rf"x: a tensor of shape \(any, any, {D}\) is expected, got \(2, 4, {D + 1}\)"),
    (dict(x=torch.zeros(4, D)), ValueError, "x: a tensor of shape"),
    (dict(x=torch.zeros(2, 0, D)), ValueError, "at least one sequence of one step"),
    (dict(x=torch.zeros(0, 4, D)), ValueError, "at least one sequence of one step"),
    (dict(x=torch.zeros(2, 4, D, dtype=int)), TypeError, "x: a floating point tensor"),
    (dict(x=X.double()), TypeError, "x: torch.float32, as the cell's weights are, is expected, got torch.float64"),
    (dict(x=X.to("meta")), ValueError, "x: a tensor on cpu.*got 'meta'"),
    (dict(lengths=[4, 5]), ValueError, "lengths: whole numbers from 1 to 4, the steps of x, is expected, got 5"),
    (dict(lengths=[4, 0]), ValueError, "got 0"),
    (dict(lengths=torch.tensor([4, -1])), ValueError, "got -1"),
    (dict(lengths=[4., 2.]), TypeError, "lengths: a whole number is expected, got 4.0"),
    (dict(lengths=torch.tensor([4., 2.])), TypeError, "lengths: a tensor of whole numbers"),
    (dict(lengths=torch.tensor([True, True])), TypeError, "lengths: a tensor of whole numbers"),
    (dict(lengths=[4]), ValueError, r"lengths: one for each of 2 sequences, of shape \(2,\), is expected, got \(1,\)"),
    (dict(lengths=[4, 4, 4]), ValueError, r"got \(3,\)"),
    (dict(lengths=[]), ValueError, r"got \(0,\)"),
    (dict(lengths=3), TypeError, "lengths: a tensor"),
    (dict(lengths=torch.ones(2, dtype=int, device="meta")), ValueError, "lengths: a tensor with values"),
    (dict(state=torch.zeros(2, H + 1)), ValueError, rf"state: a tensor of shape \(2, {H}\) is expected, got \(2, {H + 1}\)"),
    (dict(state=torch.zeros(3, H)), ValueError, rf"got \(3, {H}\)"),
    (dict(state=torch.zeros(2, H).double()), TypeError, "state: torch.float32"),
    (dict(state=(torch.zeros(2, H), torch.zeros(2, H))), TypeError, "state: a floating point tensor"),
]


@pytest.mark.parametrize("options, error, message", BAD_CALLS)
def test_bad_calls(options, error, message):
    ours = Unrolled(nn.GRUCell(D, H), 4, "none")
    with pytest.raises(error, match=message): ours(**{"x": X} | options)


def test_bad_states_of_an_lstm():
    ours = Unrolled(nn.LSTMCell(D, H), 4)
    for state in (torch.zeros(2, H), (torch.zeros(2, H),)):
        with pytest.raises(TypeError, match=r"state: a pair \(h, c\) is expected"): ours(X, state)


def test_a_cell_that_returns_something_else():
    class Three(nn.Module):
        def forward(self, x, state): return x, x, x
    with pytest.raises(TypeError, match=r"one that returns a tensor, or \(output, state\)"): Unrolled(Three(), 4)(X)


def test_shared_reads_on_and_blocks_do_not():
    assert Unrolled(nn.GRUCell(D, H), 2)(torch.zeros(2, 9, D))[0].shape == (2, 9, H)
    for sharing, steps in (("none", 1), (2, 2), (4, 8)):
        with pytest.raises(ValueError, match=f"at most {steps} steps .*got 9"):
            Unrolled(nn.GRUCell(D, H), steps, sharing)(torch.zeros(2, 9, D))


def test_many_steps_are_made_in_time_that_can_be_waited_for():
    ours = Unrolled(nn.RNNCell(D, H), 500)
    assert len(find_ties(ours).true) == 4 and len(ours.state_dict()) == 4


# Padding of any kind, in the loop

def weight_grads(make, x, lengths, sharing):
    "Gradients by the weights and by x of a network of this cell."
    ours, x = Unrolled(make(), N, sharing), x.clone().requires_grad_()
    out, state = ours(x, lengths=lengths)
    h = state[0] if isinstance(state, tuple) else state
    return torch.autograd.grad(out.square().sum() + h.sum(), [*ours.parameters(), x], allow_unused=True)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.parametrize("looped, sharing", [(True, "all"), (True, 3), (False, 3), (False, "none")])
def test_padding_does_not_reach_the_gradients(kind, looped, sharing, bad):
    zero, x, padding = data().detach(), data().detach(), torch.arange(N) >= LENGTHS[:, None]
    zero[padding], x[padding] = 0., bad
    def make(): return Looped(pair(kind)[0]) if looped else pair(kind)[0]
    ours, expected = (weight_grads(make, v, LENGTHS, sharing) for v in (x, zero))
    for a, b in zip(ours, expected):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b)
    assert not ours[-1][padding].any()


class Holds(nn.Module):
    "A cell whose state is what a function makes of the state before."
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x, state): return x, self.make(x, state)


@pytest.mark.parametrize("make", [
    lambda x, s: None, lambda x, s: (x, None), lambda x, s: (x, 3), lambda x, s: {"h": x, "n": 1},
    lambda x, s: x.sum(), lambda x, s: x.sum(0), lambda x, s: x if s is None else torch.cat([s, x], 1),
    lambda x, s: [x] if s is None else [*s, x], lambda x, s: x if s is None else (x,),
    lambda x, s: {"a": x} if s is None else {"b": x},
])
def test_a_state_that_cannot_be_masked(make):
    ours, x = Unrolled(Holds(make), 3), torch.randn(2, 3, 5)
    ours(x)
    with pytest.raises(TypeError, match="^cell: one whose state is tensors, with the batch first"):
        ours(x, lengths=[1, 3])


@pytest.mark.long
@pytest.mark.parametrize("kind, sharing, looped", [("tanh", "none", False), ("lstm", "all", False), ("gru", 2, True)])
def test_compiles_whole_with_lengths(kind, sharing, looped):
    torch.compiler.reset()
    cell, x = LAYERS[kind][0](), torch.randn(3, 3, D)
    ours, lengths = Unrolled(Looped(cell) if looped else cell, 3, sharing), torch.tensor([2, 3, 1])
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for lengths in (lengths, lengths.flip(0)):
        torch.testing.assert_close(compiled(x, lengths=lengths), ours(x, lengths=lengths))


@pytest.mark.long
@pytest.mark.parametrize("bad", [0, 4, -1])
@pytest.mark.parametrize("sharing, looped", [("all", False), (2, True)])
def test_a_compiled_network_refuses_lengths_that_do_not_fit(bad, sharing, looped):
    torch.compiler.reset()
    cell = nn.GRUCell(D, H)
    compiled = torch.compile(Unrolled(Looped(cell) if looped else cell, 3, sharing), fullgraph=True, backend="aot_eager")
    assert compiled(torch.randn(3, 3, D), lengths=torch.tensor([2, 3, 1]))[0].shape == (3, 3, H)
    with pytest.raises(RuntimeError, match="lengths: whole numbers from 1 to the steps of x are expected"):
        compiled(torch.randn(3, 3, D), lengths=torch.tensor([2, bad, 1]))


def test_untied_cells_say_why_they_do_not_read_on():
    ours = Unrolled(nn.GRUCell(D, H), 6)
    untie_(ours, "cells.3")
    with pytest.raises(ValueError, match="at most 6 steps .its cells are no longer one.* got 7"): ours(torch.randn(1, 7, D))


def test_census_with_lengths():
    counted = census(Unrolled(nn.GRUCell(D, H), 8), torch.randn(3, 8, D), None, torch.tensor([3, 8, 8]))
    assert counted.stored == sum(p.numel() for p in nn.GRUCell(D, H).parameters())
