"What each step adds to a shared gradient, how long a chain of states is, and the starts that keep it alive."
import copy

import pytest
import torch
from torch import nn

from sharetie.gradients import chain_bound, chain_norms, forget_bias_, gradient_by_step, identity_, orthogonal_, state_jacobians
from sharetie.ties import Transpose, tie_
from sharetie.unrolled import Unrolled

B, N, D, H = 3, 6, 2, 4
CELLS = {"tanh": lambda: nn.RNNCell(D, H), "relu": lambda: nn.RNNCell(D, H, nonlinearity="relu"), "gru": lambda: nn.GRUCell(D, H), "lstm": lambda: nn.LSTMCell(D, H)}


def made(kind, sharing="all", steps=N, **options):
    torch.manual_seed(0)
    return Unrolled(CELLS[kind](), steps, sharing, **options).double()


def inputs(n=N):
    torch.manual_seed(1)
    return torch.randn(B, n, D, dtype=torch.float64)


def loss(outputs, state):
    state = state[0] if isinstance(state, tuple) else state
    return outputs.square().sum() + state.sin().sum()


def same(a, b): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# gradient_by_step

@pytest.mark.parametrize("lengths", [None, [6, 1, 4]], ids=["full", "lengths"])
@pytest.mark.parametrize("kind", CELLS)
def test_terms_sum_to_the_gradient(kind, lengths):
    ours, x = made(kind), inputs()
    terms = gradient_by_step(ours, x, loss, lengths=lengths)
    assert all(p.grad is None for p in ours.parameters()), "nothing is left behind"
    loss(*ours(x, lengths=lengths)).backward()
    for name, p in ours.cells[0].named_parameters():
        assert terms[name].shape == (N, *p.shape)
        same(terms[name].sum(0), p.grad)


@pytest.mark.parametrize("kind", CELLS)
def test_each_term_is_the_gradient_of_a_step_of_its_own(kind):
    ours, x = made(kind), inputs()
    terms, free = gradient_by_step(ours, x, loss), Unrolled(copy.deepcopy(ours.cells[0]), N, "none")
    loss(*free(x)).backward()
    for t, cell in enumerate(free.cells):
        for name, p in cell.named_parameters(): same(terms[name][t], p.grad)


def test_a_term_by_finite_differences():
    "The third step's recurrent weight alone is moved."
    ours, x, eps = made("tanh"), inputs(), 1e-6
    term = gradient_by_step(ours, x, loss)["weight_hh"][2, 1, 3]
    values = []
    for sign in (1, -1):
        free = Unrolled(copy.deepcopy(ours.cells[0]), N, "none")
        with torch.no_grad(): free.cells[2].weight_hh[1, 3] += sign * eps
        values.append(loss(*free(x)).item())
    assert term.item() == pytest.approx((values[0] - values[1]) / (2 * eps), rel=1e-6)


def test_terms_of_blocks():
    ours, x = made("gru", 4), inputs()
    terms = gradient_by_step(ours, x, loss)["weight_ih"]
    loss(*ours(x)).backward()
    same(terms[:4].sum(0), ours.cells[0].weight_ih.grad)
    same(terms[4:].sum(0), ours.cells[4].weight_ih.grad)


def test_terms_beyond_the_end_are_zero():
    terms = gradient_by_step(made("lstm"), inputs(), loss, lengths=[3, 2, 3])
    assert all(not term[3:].any() and term[:3].abs().sum() > 0 for term in terms.values())


def test_frozen_weights_have_no_terms():
    ours = made("gru")
    ours.cells[0].bias_ih.requires_grad_(False)
    assert "bias_ih" not in gradient_by_step(ours, inputs(), loss)


def test_steps_first_and_states():
    ours, first, x = made("gru"), made("gru", batch_first=False), inputs()
    h = torch.ones(B, H, dtype=torch.float64)
    def picky(outputs, state): return (outputs[:, -1] if outputs.shape[0] == B else outputs[-1]).sum()
    for name, term in gradient_by_step(ours, x, picky, h).items(): same(term, gradient_by_step(first, x.transpose(0, 1), picky, h)[name])


@pytest.mark.parametrize("f, error, message", [
    (lambda outputs: outputs.sum(), TypeError, r"loss: a function of \(outputs, state\)"),
    (lambda outputs, state: outputs, ValueError, "what loss gives: a tensor of shape"),
    (lambda outputs, state: 3.0, TypeError, "what loss gives: a floating point tensor is expected, got 3.0"),
    (5, TypeError, "loss: a function")])
def test_bad_losses(f, error, message):
    with pytest.raises(error, match=message): gradient_by_step(made("gru"), inputs(), f)


def test_bad_models_and_inputs():
    with pytest.raises(TypeError, match="unrolled: an Unrolled is expected, got GRU"): gradient_by_step(nn.GRU(D, H), inputs(), loss)
    with pytest.raises(ValueError, match="at most 3 steps .*got 6"): gradient_by_step(made("gru", "none", 3), inputs(), loss)
    with pytest.raises(ValueError, match="lengths: .* got 7"): gradient_by_step(made("gru"), inputs(), loss, lengths=[7, 1, 1])
    frozen = made("gru").requires_grad_(False)
    with pytest.raises(ValueError, match="a parameter that trains"): gradient_by_step(frozen, inputs(), loss)


# The chain of states

@pytest.mark.parametrize("kind", CELLS)
def test_jacobians_by_autograd(kind):
    ours, x = made(kind), inputs()
    factors = state_jacobians(ours, x)
    width = 2 * H if kind == "lstm" else H
    assert factors.shape == (N - 1, B, width, width) and not factors.requires_grad
    def flat(state): return torch.cat(state, 1) if kind == "lstm" else state
    for t in (1, 4):
        _, state = ours(x[:, :t])
        def next_state(s): return flat(ours(x[1:2, t:t + 1], s.split(H, 1) if kind == "lstm" else s)[1])
        expected = torch.autograd.functional.jacobian(next_state, flat(state)[1:2].detach())
        same(factors[t - 1, 1], expected[0, :, 0])


def test_norms_of_the_chain():
    factors = state_jacobians(made("tanh"), inputs())
    norms = chain_norms(factors)
    assert norms.shape == (N, B)
    same(norms[0], torch.ones(B, dtype=torch.float64))
    expected = torch.linalg.multi_dot([*factors[:, 2].flip(0)])
    same(norms[-1, 2], torch.linalg.matrix_norm(expected, 2))
    same(norms[2, 0], torch.linalg.matrix_norm(factors[-1, 0] @ factors[-2, 0], 2))


@pytest.mark.parametrize("kind", ["tanh", "relu"])
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_bound_holds(kind, scale):
    ours = made(kind)
    with torch.no_grad(): ours.cells[0].weight_hh.mul_(scale)
    norms = chain_norms(state_jacobians(ours, inputs(30)))
    assert (norms <= chain_bound(ours.cells[0].weight_hh, 29)[:, None] * (1 + 1e-9)).all()


def test_bound_is_reached_by_a_linear_start():
    "At the origin the slopes of tanh are 1, and an orthogonal matrix has equality."
    cell = orthogonal_(nn.RNNCell(D, H, bias=False)).double()
    with torch.no_grad(): cell.weight_hh.mul_(1.5)
    norms = chain_norms(state_jacobians(Unrolled(cell, N), torch.zeros(1, N, D, dtype=torch.float64)))[:, 0]
    torch.testing.assert_close(norms, chain_bound(cell.weight_hh, N - 1), rtol=1e-6, atol=0)
    torch.testing.assert_close(chain_bound(cell.weight_hh, 3, 0.25), torch.tensor([1.0, .375, .375 ** 2, .375 ** 3]).double(), rtol=1e-6, atol=0)


def test_the_eigenvalue_is_no_bound():
    weight = torch.tensor([[0.5, 9.0], [0.0, 0.5]], dtype=torch.float64)
    bound = chain_bound(weight, 1)
    assert torch.linalg.eigvals(weight).abs().max() < 1 < torch.linalg.matrix_norm(weight, 2) == bound[1]


def test_jacobians_of_own_cells():
    class Two(nn.Module):
        def forward(self, x, state):
            a, b = state or (torch.zeros_like(x), torch.zeros_like(x))
            return x, (0.5 * a + b, b + x)
    factors = state_jacobians(Unrolled(Two(), 3), torch.ones(1, 3, 1))
    assert factors[0, 0].tolist() == [[0.5, 1.0], [0.0, 1.0]]
    class Named(nn.Module):
        def forward(self, x, state): return x, {"h": x}
    class Deep(nn.Module):
        def forward(self, x, state): return x, x[..., None]
    for cell in (Named(), Deep()):
        with pytest.raises(TypeError, match=r"state: a tensor \(b, h\)"): state_jacobians(Unrolled(cell, 3), torch.ones(1, 3, 1))


def test_bad_chains():
    with pytest.raises(ValueError, match="two steps or more is expected, got 1"): state_jacobians(made("gru"), inputs(1))
    with pytest.raises(TypeError, match="an Unrolled"): state_jacobians(nn.GRU(D, H), inputs())
    with pytest.raises(ValueError, match="square matrices"): chain_norms(torch.zeros(2, 1, 3, 4))
    with pytest.raises(ValueError, match="4 axes"): chain_norms(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="a square matrix"): chain_bound(torch.zeros(3, 4), 2)
    with pytest.raises(ValueError, match="steps: .* got -1"): chain_bound(torch.eye(2), -1)
    with pytest.raises(ValueError, match="slope: .* got 0"): chain_bound(torch.eye(2), 1, 0)
    with pytest.raises(ValueError, match="weight: finite"): chain_bound(torch.full((2, 2), torch.nan), 1)


# Starts

@pytest.mark.parametrize("module", [nn.LSTMCell(D, H), nn.LSTM(D, H, 2, bidirectional=True), nn.LSTM(D, H, proj_size=2)])
def test_forget_bias(module):
    module = copy.deepcopy(module)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    assert forget_bias_(module, 2) is module
    sums = {}
    for name, p in module.named_parameters():
        if "bias" in name:
            sums.setdefault(name.replace("_ih", "").replace("_hh", ""), []).append(p[H:2 * H].detach())
            p = torch.cat([p[:H], p[2 * H:]])
            before[name] = torch.cat([before[name][:H], before[name][2 * H:]])
        assert torch.equal(p, before[name])
    assert all(torch.equal(a + b, torch.full((H,), 2.0)) for a, b in sums.values())


def test_forget_bias_opens_the_gate():
    cell = forget_bias_(nn.LSTMCell(D, H), 100.)
    with torch.no_grad():
        for p in (cell.weight_ih, cell.weight_hh): p.zero_()
    c = torch.randn(1, H)
    _, (h, new) = Unrolled(cell, 1)(torch.zeros(1, 1, D), (torch.zeros(1, H), c))
    gates = (cell.bias_ih + cell.bias_hh).view(4, H)
    torch.testing.assert_close(new, c + gates[0].sigmoid() * gates[2].tanh())


@pytest.mark.parametrize("module", [nn.RNNCell(D, H), nn.GRUCell(D, H), nn.LSTM(D, H, 2, bidirectional=True), Unrolled(nn.GRUCell(D, H), 3, "none")])
def test_orthogonal(module):
    module = copy.deepcopy(module)
    torch.manual_seed(0)
    assert orthogonal_(module, 0.5) is module
    found = 0
    for name, p in module.named_parameters():
        for gate in p.split(H) if "weight_hh" in name else ():
            torch.testing.assert_close(gate @ gate.T, 0.25 * torch.eye(H))
            found += 1
    assert found


def test_identity():
    layer = identity_(nn.RNN(D, H, 2, nonlinearity="relu"), 2.0)
    assert torch.equal(layer.weight_hh_l1, 2 * torch.eye(H)) and not layer.bias_ih_l0.any() and not layer.bias_hh_l1.any()
    assert layer.weight_ih_l0.abs().sum() > 0


def test_starts_are_drawn_by_the_seed():
    made = []
    for _ in range(2):
        torch.manual_seed(7)
        made.append(orthogonal_(nn.GRUCell(D, H)).weight_hh)
    assert torch.equal(*made)


@pytest.mark.parametrize("start, module, error, message", [
    (forget_bias_, nn.GRUCell(D, H), ValueError, "one with LSTM cells or layers is expected, got 'GRUCell'"),
    (forget_bias_, nn.LSTMCell(D, H, bias=False), ValueError, "with biases"),
    (forget_bias_, None, TypeError, "module: a module is expected, got NoneType"),
    (orthogonal_, nn.Linear(2, 2), ValueError, "one with recurrent cells or layers"),
    (identity_, nn.Sequential(nn.RNNCell(D, H), nn.LSTMCell(D, H)), ValueError, r"without gates, is expected, got \['LSTMCell'\]"),
    (identity_, nn.Linear(2, 2), ValueError, "one with recurrent cells")])
def test_bad_starts(start, module, error, message):
    before = copy.deepcopy(module.state_dict()) if module is not None else {}
    with pytest.raises(error, match=message): start(module)
    if module is not None: assert all(torch.equal(a, b) for a, b in zip(before.values(), module.state_dict().values()))


def test_bad_numbers():
    for start, error in ((forget_bias_, ValueError), (identity_, ValueError), (orthogonal_, ValueError)):
        with pytest.raises(error, match="finite"): start(nn.RNN(D, H) if start is identity_ else nn.LSTM(D, H), float("nan"))
    with pytest.raises(ValueError, match="above 0"): orthogonal_(nn.RNN(D, H), 0)
    with pytest.raises(TypeError): forget_bias_(nn.LSTM(D, H), "1")


@pytest.mark.parametrize("sharing", ["all", "none", 3])
@pytest.mark.parametrize("kind", CELLS)
def test_terms_with_padding_of_any_kind(kind, sharing):
    lengths, x = torch.tensor([2, 6, 4]), inputs()
    padding = torch.arange(N) >= lengths[:, None]
    zero, bad = x.masked_fill(padding[..., None], 0), x.masked_fill(padding[..., None], torch.nan)
    expected = gradient_by_step(made(kind, sharing), zero, loss, lengths=lengths)
    for name, term in gradient_by_step(made(kind, sharing), bad, loss, lengths=lengths).items():
        assert term.isfinite().all()
        same(term, expected[name])


def test_terms_without_grad_mode():
    expected = gradient_by_step(made("gru"), inputs(), loss)
    with torch.no_grad(): terms = gradient_by_step(made("gru"), inputs(), loss)
    for name, term in terms.items(): same(term, expected[name])


@pytest.mark.parametrize("f", [lambda outputs, state: torch.tensor(1.), lambda outputs, state: outputs.detach().sum()])
def test_a_constant_loss(f):
    with pytest.raises(ValueError, match="^loss: one that depends on the outputs or the state is expected"):
        gradient_by_step(made("gru"), inputs(), f)


def test_starts_refuse_computed_weights_and_change_nothing():
    cells = nn.ModuleDict({"a": nn.RNNCell(3, 4), "b": nn.RNNCell(3, 4)})
    tie_(cells, ["a.weight_hh", "b.weight_hh"], map=Transpose())
    normed = nn.ModuleList([nn.RNN(3, 4), nn.utils.parametrizations.weight_norm(nn.RNNCell(3, 4), "weight_hh")])
    gates = nn.ModuleList([nn.LSTMCell(3, 4), nn.LSTMCell(3, 4)])
    nn.utils.parametrize.register_parametrization(gates[1], "bias_ih", nn.Identity())
    for module, start, name in ((cells, identity_, "weight_hh"), (cells, orthogonal_, "weight_hh"), (normed, orthogonal_, "weight_hh"), (gates, forget_bias_, "bias_ih")):
        before = {key: value.clone() for key, value in module.state_dict().items()}
        with pytest.raises(ValueError, match=f"module: cells with weights of their own is expected, got .*{name}"): start(module)
        assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_orthogonal_in_half_precision():
    layers = nn.ModuleList([nn.LSTM(3, 4), nn.LSTM(3, 4).bfloat16()])
    orthogonal_(layers)
    for gate in layers[1].weight_hh_l0.float().split(4): assert torch.allclose(gate @ gate.T, torch.eye(4), atol=3e-2)


def test_chain_norms_of_an_explosion_are_infinite():
    unrolled = Unrolled(nn.RNNCell(3, 4, nonlinearity="relu"), 120)
    identity_(unrolled, 3.)
    norms = chain_norms(state_jacobians(unrolled, torch.ones(2, 120, 3)))
    assert torch.allclose(norms[:10], 3. ** torch.arange(10)[:, None].expand(10, 2)) and norms[-1].isinf().all()
    factors = torch.eye(2).repeat(3, 1, 1, 1)
    factors[0, 0, 0, 0] = torch.nan
    assert chain_norms(factors).isnan().sum() == 1 and chain_norms(factors.bfloat16()).dtype == torch.bfloat16
