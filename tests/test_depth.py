"relax_layers_ and the recursion with halting: what they make, keep, what they refuse."
import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from sharetie.attention import Block
from sharetie.depth import LowRank, UniversalTransformer, low_rank, relax_layers_
from sharetie.layers import share_layers_, unshare_layers_
from sharetie.ties import declared_ties, find_ties
from test_layers import Model, lives_through, other_block, state, words


# Low rank

def test_low_rank_is_the_best_product():
    torch.manual_seed(0)
    m = torch.randn(5, 7, dtype=torch.float64)
    s = torch.linalg.svdvals(m)
    for rank in range(6):
        up, down = low_rank(m, rank)
        assert up.shape == (5, rank) and down.shape == (rank, 7)
        assert math.isclose(((up @ down - m) ** 2).sum(), (s[rank:] ** 2).sum(), abs_tol=1e-12)


@pytest.mark.parametrize("scheme, groups", [("all", None), ("cycle", 3), ("sandwich", None)])
@pytest.mark.parametrize("base", ["mean", "first"])
def test_full_rank_is_the_unshared_function(scheme, groups, base):
    model, x = Model().double(), words()
    y = model(x)
    relax_layers_(model, 8, scheme, groups, base=base)
    torch.testing.assert_close(model(x), y, rtol=1e-9, atol=1e-9)
    assert model.blocks[1].norm1.weight is not model.blocks[0].norm1.weight, "vectors stay own"


def test_rank_zero_is_shared_and_ranks_are_nearer_and_nearer():
    model = Model().double()
    apart = []
    for rank in (0, 1, 2, 4, 8):
        twin = copy.deepcopy(model)
        relax_layers_(twin, rank)
        apart.append(sum((a.attention.q.weight - b.attention.q.weight).square().sum().item() for a, b in zip(model.blocks, twin.blocks)))
    assert apart == sorted(apart, reverse=True) and apart[0] > 1 and apart[-1] < 1e-20
    mean, twin = copy.deepcopy(model), copy.deepcopy(model)
    share_layers_(mean, values="mean")
    relax_layers_(twin, 0)
    assert torch.equal(mean(words()), twin(words()))


def test_equal_layers_begin_with_no_difference_that_still_trains():
    model, x = Model(), words()
    share_layers_(model)
    y = model(x)
    unshare_layers_(model)
    relax_layers_(model, 2)
    torch.testing.assert_close(model(x), y)
    model(x).square().sum().backward()
    change = model.blocks[1].attention.q.parametrizations.weight[0]
    assert change.up.grad.abs().max() > 0


def test_what_is_stored_under_a_rank():
    model = Model()
    free = sum(p.numel() for p in model.blocks.parameters())
    relax_layers_(model, 2)
    matrices = [p for p in Model().blocks[0].parameters() if p.ndim > 1]
    vectors = sum(p.numel() for p in Model().blocks[0].parameters() if p.ndim == 1)
    expected = sum(p.numel() + 6 * 2 * sum(p.shape) for p in matrices) + 6 * vectors
    assert sum(p.numel() for p in model.blocks.parameters()) == expected < free


def test_relaxed_gradients_against_finite_differences():
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(3, 3) for _ in range(2)).double()
    relax_layers_(model, 1)
    named = dict(model.named_parameters())
    def f(x, *values):
        with torch.nn.utils.stateless._reparametrize_module(model, dict(zip(named, values)), tie_weights=True):
            for layer in model: x = layer(x).tanh()
            return x
    torch.autograd.gradcheck(f, (torch.randn(2, 3, dtype=torch.float64, requires_grad=True), *named.values()))


# Through what a model goes

CHANGES = [lambda m: relax_layers_(m, 2), lambda m: relax_layers_(m, 3, "cycle", 2, parts="feedforward")]


@pytest.mark.parametrize("change", CHANGES)
def test_ties_live_through_training_copies_pickles_and_files(change, tmp_path): lives_through(change, tmp_path)


@pytest.mark.long
def test_compiled():
    model = Model(2)
    relax_layers_(model, 2)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(words()), model(words()))


def test_meta_bfloat16_and_autocast():
    with torch.device("meta"): model = Model()
    relax_layers_(model, 2)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model = Model().bfloat16()
    relax_layers_(model, 2)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model(words()).isfinite().all()
    model = Model()
    relax_layers_(model, 2)
    with torch.autocast("cpu", torch.bfloat16): assert model(words()).dtype == torch.bfloat16


def test_frozen_layers_stay_frozen():
    model = Model()
    model.blocks.requires_grad_(False)
    relax_layers_(model, 2)
    assert not any(p.requires_grad for p in model.blocks.parameters())
    unshare_layers_(model)
    assert not any(p.requires_grad for p in model.blocks.parameters())


@pytest.mark.parametrize("rank", [0, 2])
def test_unsharing_writes_the_products_out(rank):
    model, x = Model(), words()
    names = [n for n, _ in model.named_parameters()]
    relax_layers_(model, rank)
    y, types = model(x), [type(m) for m in Model().modules()]
    unshare_layers_(model)
    torch.testing.assert_close(model(x), y)
    assert not find_ties(model) and not declared_ties(model)
    assert sorted(n for n, _ in model.named_parameters()) == sorted(names)
    assert [type(m) for m in model.modules()] == types


# Recursion with halting

def by_position(model, x):
    "The same by plain numbers, position by position, written from the definition of the paper."
    batch, n, dim = x.shape
    states = [x]
    halted = [[None] * n for _ in range(batch)]
    weights = [[[] for _ in range(n)] for _ in range(batch)]
    for t in range(model.steps):
        h = states[-1] if model.signal is None else states[-1] + model.signal(states[-1], t)
        new, now = model.block(h), [list(row) for row in states[-1]]
        for b in range(batch):
            for i in range(n):
                if halted[b][i] is not None: continue
                now[b][i] = new[b, i]
                p = torch.sigmoid(model.halt.weight[0] @ new[b, i] + model.halt.bias[0])
                so_far = sum(weights[b][i])
                if so_far + p >= model.threshold or t == model.steps - 1:
                    weights[b][i].append(1 - so_far)
                    halted[b][i] = t + 1
                else: weights[b][i].append(p)
        states.append(torch.stack([torch.stack(row) for row in now]))
    out = torch.stack([torch.stack([sum(w * states[t + 1][b, i] for t, w in enumerate(weights[b][i])) for i in range(n)]) for b in range(batch)])
    cost = torch.stack([torch.stack([halted[b][i] + torch.as_tensor(weights[b][i][-1], dtype=x.dtype) for i in range(n)]) for b in range(batch)])
    return out, cost, torch.tensor(halted)


def universal(steps=6, bias=0.0, threshold=0.99, signal=None):
    torch.manual_seed(0)
    model = UniversalTransformer(Block(4, 2, 8), 4, steps, threshold, signal).double()
    with torch.no_grad():
        model.halt.weight *= 3
        model.halt.bias.fill_(bias)
    return model, torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("bias", [-9.0, -1.0, 0.0, 1.0, 9.0])
@pytest.mark.parametrize("steps", [1, 2, 6])
@pytest.mark.parametrize("signal", [None, lambda x, step: torch.full_like(x, 0.1 * step)])
def test_recursion_against_a_loop_over_positions(bias, steps, signal):
    model, x = universal(steps, bias, signal=signal)
    got, want = model(x), by_position(model, x)
    for a, b in zip(got, want): torch.testing.assert_close(a, b)
    params = [x, *model.parameters()]
    for a, b in zip(got[:2], want[:2]):
        nothing = 0 * sum(p.sum() for p in params)
        grads = [torch.autograd.grad(t.square().sum() + nothing, params, retain_graph=True) for t in (a, b)]
        for g, w in zip(*grads): torch.testing.assert_close(g, w)


def test_recursion_stops_early_and_late():
    model, x = universal(bias=50.0)
    with torch.no_grad(): model.halt.weight.zero_()
    calls = []
    model.block.register_forward_hook(lambda *_: calls.append(1))
    output, cost, steps = model(x)
    assert len(calls) == 1 and (steps == 1).all() and torch.allclose(cost, torch.tensor(2.0).double())
    torch.testing.assert_close(output, model.block(x))
    with torch.no_grad(): model.halt.bias.fill_(-50.0)
    output, cost, steps = model(x)
    state = x
    for _ in range(6): state = model.block(state)
    assert (steps == 6).all() and torch.allclose(cost, torch.tensor(7.0).double())
    torch.testing.assert_close(output, state)


def test_recursion_gradcheck_and_causality():
    model, x = universal(3, -1.0)
    torch.autograd.gradcheck(lambda x: model(x)[:2], (x[:1, :3].detach().requires_grad_(),))
    later = x.detach().clone()
    later[:, 3:] += 1
    for a, b in zip(model(x), model(later)): torch.testing.assert_close(a[:, :3], b[:, :3])


@pytest.mark.long
def test_recursion_compiles_copies_and_runs_on_meta():
    model, x = universal(3)
    for a, b in zip(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x)): torch.testing.assert_close(a, b)
    twin = UniversalTransformer(Block(4, 2, 8), 4, 3).double()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x).output, copy.deepcopy(model)(x).output)
    assert model.to("meta")(x.to("meta")).output.shape == x.shape
    model, x = universal(3)
    with torch.autocast("cpu", torch.bfloat16): assert model.float()(x.float()).output.isfinite().all()


def test_recursion_bad():
    block = Block(4, 2, 8)
    with pytest.raises(TypeError, match="block: a module"): UniversalTransformer(len, 4, 3)
    with pytest.raises(ValueError, match="steps: .* at least 1 is expected, got 0"): UniversalTransformer(block, 4, 0)
    for bad in (0, 1.5, math.nan):
        with pytest.raises(ValueError, match="threshold"): UniversalTransformer(block, 4, 3, bad)
    with pytest.raises(TypeError, match="signal"): UniversalTransformer(block, 4, 3, signal=lambda x: x)
    model = UniversalTransformer(block, 4, 3)
    for bad in (torch.randn(2, 3, 5), torch.randn(3, 4)):
        with pytest.raises(ValueError, match="x: a tensor of"): model(bad)
    with pytest.raises(TypeError, match="x"): model(torch.ones(2, 3, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"block: .*\(2, 3, 4\) is expected, got \(2, 3, 5\)"):
        UniversalTransformer(nn.Linear(4, 5), 4, 3)(torch.randn(2, 3, 4))
    with pytest.raises(TypeError, match="block: one that returns a tensor is expected, got tuple"):
        UniversalTransformer(nn.GRU(4, 4, batch_first=True), 4, 3)(torch.randn(2, 3, 4))
    with pytest.raises(TypeError, match="x: torch.float32, as the weights are, is expected, got torch.float64"): model(torch.randn(2, 3, 4).double())
    with pytest.raises(TypeError, match="x: torch.float32, as the weights are, is expected, got torch.float64"):
        UniversalTransformer(nn.Identity(), 4, 3)(torch.randn(2, 3, 4).double())


@pytest.mark.parametrize("made, error, words", [(torch.zeros(3, 3), ValueError, r"signal: one that stretches to the shape \(2, 3, 4\) is expected, got \(3, 3\)"),
                                                (torch.zeros(5, 2, 3, 4), ValueError, "signal"), (None, TypeError, "signal: one that returns a tensor")])
def test_signals_that_do_not_fit(made, error, words):
    model = UniversalTransformer(Block(4, 2, 8), 4, 3, signal=lambda x, step: made)
    with pytest.raises(error, match=words): model(torch.randn(2, 3, 4))


def test_factors_that_do_not_fit():
    with pytest.raises(ValueError, match=r"down: a tensor of shape \(2, any\) is expected, got \(3, 4\)"): LowRank(torch.zeros(3, 2), torch.zeros(3, 4))
    with pytest.raises(TypeError, match="up: a floating point tensor"): LowRank("a", torch.zeros(3, 4))
    with pytest.raises(TypeError, match="trained: True or False"): LowRank(torch.zeros(3, 2), torch.zeros(2, 4), 1)


# What is refused, with the model as it was

BAD = [
    (relax_layers_, {"rank": 9}, None, ValueError, r"at most 8, the rank of 'blocks.0.attention.q.weight' of \(8, 8\), is expected, got 9"),
    (relax_layers_, {"rank": -1}, None, ValueError, "rank: .* got -1"),
    (relax_layers_, {"rank": 1.0}, None, TypeError, "rank"),
    (relax_layers_, {"rank": 2, "parts": "norm1"}, None, ValueError, "parts: at least one matrix in a block is expected, got 'norm1'"),
    (relax_layers_, {"rank": 2, "base": "last"}, None, ValueError, "base: .*'last'"),
    (relax_layers_, {"rank": 2, "scheme": "sequence", "groups": 5}, None, ValueError, "6 layers .* got 5"),
    (relax_layers_, {"rank": 2}, share_layers_, ValueError, "layers that share nothing"),
    (relax_layers_, {"rank": 2}, lambda m: relax_layers_(m, 1), ValueError, "share nothing|nothing is computed"),
    (relax_layers_, {"rank": 2}, lambda m: m.blocks[3].attention.q.weight.data.fill_(math.nan), ValueError, "blocks.3.attention.q.weight: finite"),
    (relax_layers_, {"rank": 2}, other_block(hidden=32), ValueError, "blocks of one form"),
    (relax_layers_, {"rank": 2}, lambda m: [weight_norm(block.attention.q) for block in m.blocks], ValueError, "nothing is computed from"),
    (share_layers_, {}, lambda m: relax_layers_(m, 2), ValueError, "belongs to relaxed layers"),
]


@pytest.mark.parametrize("call, options, change, error, words", BAD)
def test_refused(call, options, change, error, words):
    model = Model()
    if change: change(model)
    before = repr(state(model))
    with pytest.raises(error, match=words): call(model, **options)
    assert repr(state(model)) == before


@pytest.mark.parametrize("bad", [None, [Block(8, 2), Block(8, 2)], "model", torch.ones(2)])
def test_no_module(bad):
    with pytest.raises(TypeError, match="model: a module"): relax_layers_(bad, 1)


def test_recurrent_weights_cannot_be_computed():
    model = nn.ModuleList(nn.GRU(3, 3) for _ in range(2))
    with pytest.raises(ValueError, match="nn.RNNBase"): relax_layers_(model, 1)
