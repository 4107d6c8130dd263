"The mixture of experts against the loop that defines it: values, gradients, and what must not change them."
import copy
import itertools
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from sharetie.experts import Experts, FeedForward, _at_a_time, _product, _segments
from sharetie.moe import Merged, MoE, SoftMoE, merge_experts, upcycle
from sharetie.routing import (Balanced, ExpertChoice, Hash, NoisyTopK, Router, TopK, drop_overflow, importance_loss, load_balancing_loss, plan_rows, router_z_loss, statistics,
                              update_biases_)
from sharetie.saving import load_model, save_model

DIM, HIDDEN, EXPERTS = 16, 24, 6
ROUTERS = ["topk", "noisy", "balanced", "expert choice"]
KINDS = ["swiglu", "geglu", "reglu", "silu", "gelu", "relu"]
routers = pytest.mark.parametrize("router", ROUTERS)
executions = pytest.mark.parametrize("execution", ["segments", "grouped"])


@pytest.fixture(autouse=True)
def forget_compiled():
    "Each test compiles for itself: PyTorch counts how often a function was compiled."
    yield
    torch.compiler.reset()


def tokens(n=50, dtype=torch.float32, seed=0):
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(k=2, router="topk", seed=1, **options):
    torch.manual_seed(seed)
    return MoE(DIM, options.pop("hidden", HIDDEN), options.pop("num_experts", EXPERTS), k, router=router, **options)


def activation(h, kind):
    "Each kind written out."
    f = {"swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu}.get(kind)
    if f is None: return getattr(F, kind)(h)
    return f(h[..., :h.shape[-1] // 2]) * h[..., h.shape[-1] // 2:]


def network(x, experts, e):
    "What one expert makes of all tokens."
    h = x @ experts.w_in[e].mT + (0 if experts.b_in is None else experts.b_in[e])
    return activation(h, experts.expert) @ experts.w_out[e] + (0 if experts.b_out is None else experts.b_out[e])


def loop(x, routing, experts):
    "The definition: one expert after the other."
    y = torch.zeros_like(x)
    for e in range(routing.num_experts):
        slots = (routing.expert == e) & routing.kept
        out = network(x[routing.token[slots]], experts, e) * routing.weight[slots, None].to(x.dtype)
        y = y.index_add(0, routing.token[slots], out)
    return y


def gradients(f, x, layer):
    "The gradients of the input and of all parameters, for a loss with different weights everywhere."
    x = x.detach().clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    y = f(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)).sum().backward()
    return y.detach(), [x.grad, *(p.grad for p in layer.parameters())]


def same(a, b, **tolerance):
    "Are two lists of tensors alike, None for None or zero?"
    return all((p is None and q is None) or torch.allclose(torch.zeros_like(q) if p is None else p,
                                                          torch.zeros_like(p) if q is None else q, **tolerance) for p, q in zip(a, b, strict=True))


# Against the loop

@executions
@routers
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_the_loop(router, execution, bias):
    layer = make(router=router, execution=execution, bias=bias)
    def slow(x): return loop(x, layer.router(x), layer.experts)
    y, grads = gradients(layer, tokens(), layer)
    expected, slow_grads = gradients(slow, tokens(), layer)
    assert torch.allclose(y, expected, atol=1e-6)
    assert same(grads, slow_grads, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_every_kind_of_expert(kind, bias):
    layer = make(expert=kind, bias=bias, dtype=torch.float64)
    x = tokens(dtype=torch.float64)
    def slow(x): return loop(x, layer.router(x), layer.experts)
    y, grads = gradients(layer, x, layer)
    expected, slow_grads = gradients(slow, x, layer)
    assert torch.allclose(y, expected) and same(grads, slow_grads)


@executions
@pytest.mark.parametrize("drop", ["position", "weight"])
def test_with_capacity_and_padding(execution, drop):
    layer = make(capacity_factor=1., drop=drop, execution=execution)
    mask = torch.arange(50) % 4 != 1
    def fast(x): return layer(x, mask)
    def slow(x): return loop(x, drop_overflow(layer.router(x, mask), 13, drop), layer.experts)
    y, grads = gradients(fast, tokens() + 1, layer)
    expected, slow_grads = gradients(slow, tokens() + 1, layer)
    assert statistics(layer.routing)["dropped"] > 0 and statistics(layer.routing)["padding"] == 13
    assert torch.allclose(y, expected, atol=1e-6) and same(grads, slow_grads, atol=1e-5)
    assert torch.equal(y[~mask], torch.zeros_like(y[~mask]))


@pytest.mark.parametrize("bias", [False, True])
def test_many_rows_per_expert_are_computed_in_parts(bias):
    layer, x = make(num_experts=2, execution="segments", bias=bias, dtype=torch.float64), tokens(1300, torch.float64)
    parts = [rows[1:] for rows in _segments(plan_rows(layer.router(x)).ends, 512)]
    assert [new for *_, new in parts].count(True) == 2 and len(parts) > 4 and all(end - begin <= 512 for begin, end, _ in parts)
    def slow(x): return loop(x, layer.router(x), layer.experts)
    y, grads = gradients(layer, x, layer)
    expected, slow_grads = gradients(slow, x, layer)
    assert torch.allclose(y, expected) and same(grads, slow_grads)
    with torch.no_grad(): assert torch.equal(layer(x), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("emulated", [False, True])
def test_products_of_half_precision(dtype, emulated, monkeypatch):
    monkeypatch.setattr("sharetie.experts._is_emulated", lambda dtype: emulated)
    a, b, c = (torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i, shape in enumerate([(5, 70), (70, 4), (5, 4)]))
    exact, out = a.double() @ b.double(), c.clone()
    for found, wanted in ((_product(a, b), exact), (_product(a, b, out).clone(), exact), (_product(a, b, out, add=True), 2 * exact)):
        assert found.dtype == dtype and torch.allclose(found.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=.02)
    assert torch.equal(out, found)
    layer = make(execution="segments", dtype=dtype)
    assert torch.allclose(layer(tokens(dtype=dtype)), loop(tokens(dtype=dtype), layer.router(tokens(dtype=dtype)), layer.experts), atol=.02)
    y, grads = gradients(layer, tokens(dtype=dtype), layer)
    monkeypatch.setattr("sharetie.experts._is_emulated", lambda dtype: not emulated)
    assert same(grads, gradients(layer, tokens(dtype=dtype), layer)[1], atol=.05, rtol=.05)


def test_gradients_of_half_precision_are_not_rounded_part_by_part():
    layer, x = make(num_experts=2, execution="segments", dtype=torch.bfloat16), tokens(1300, torch.bfloat16)
    assert len([*_segments(plan_rows(layer.router(x)).ends, _at_a_time(x, 2600))]) == 2


@executions
def test_gradients_of_biases_are_summed_in_single_precision(execution):
    layer = make(num_experts=2, execution=execution, bias=True, dtype=torch.bfloat16)
    exact, x = copy.deepcopy(layer).double(), tokens(3000, torch.bfloat16)
    exact.experts.execution = "segments"
    for model, given in ((layer, x), (exact, x.double())): model(given).sum().backward()
    for name in ("b_in", "b_out"):
        found, expected = getattr(layer.experts, name).grad.double(), getattr(exact.experts, name).grad
        assert (found - expected).norm() < .01 * expected.norm()


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"expert": "silu", "bias": True}], ids=str)
def test_grouped_products_where_no_one_may_look_for_full_rows(options, monkeypatch):
    layer, x = make(capacity_factor=1., execution="grouped", **options), tokens()
    x[5] = torch.nan
    def step(): return gradients(lambda x: torch.where(torch.arange(50)[:, None] != 5, layer(x, torch.arange(50) % 4 != 1), 0), x, layer)
    layer.experts.execution = "segments"
    y, grads = step()
    layer.experts.execution = "grouped"
    monkeypatch.setattr("sharetie.experts._is_full", lambda plan: False)
    z, others = step()
    assert torch.allclose(y, z, atol=1e-6) and same(grads, others, atol=1e-5) and all(g.isfinite().all() for g in others)


@pytest.mark.parametrize("kind", ["swiglu", "gelu", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("geglu", "silu"))])
@pytest.mark.parametrize("router", ["topk", "balanced", "expert choice"])
def test_gradcheck_of_the_segments(kind, router, monkeypatch):
    monkeypatch.setattr("sharetie.experts._at_a_time", lambda x, rows: 2)
    torch.manual_seed(0)
    layer = MoE(2, 3, 3, 2, router=router, expert=kind, bias=True, dtype=torch.float64)
    names, parameters = zip(*layer.named_parameters())
    def f(x, *parameters): return torch.func.functional_call(layer, dict(zip(names, parameters)), (x,))
    x = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, (x, *parameters))


def test_auto_groups_few_rows_and_the_rest_is_segments():
    layer = make()
    for name in ("segments", "grouped"): assert make(execution=name).experts.execution == name
    assert layer.experts._groups(tokens(), 50) and not layer.experts._groups(tokens(), 5000)
    assert not layer.experts._groups(tokens(dtype=torch.bfloat16), 50)
    many = tokens(1000)
    assert torch.allclose(layer(many)[:20], layer(many[:20]), atol=1e-6)
    with pytest.raises(ValueError, match="did you mean 'grouped'"): make(execution="group")


@pytest.mark.long
def test_the_operator_passes_pytorchs_own_checks():
    layer = make(num_experts=4, dtype=torch.float64, bias=True)
    x = tokens(9, torch.float64)
    routing = layer.requires_grad_(False).router(x)
    e, tensors = layer.experts, (x, routing.weight, *plan_rows(routing))
    arguments = (*tensors, e.w_in, e.b_in, e.w_out, e.b_out, "swiglu")
    for keep in (True, False): torch.library.opcheck(torch.ops.sharetie.experts.default, (*arguments, keep))
    hidden = torch.ops.sharetie.experts(*arguments, True)[1]
    for asked in ([True] * 6, [False, True] * 3):
        torch.library.opcheck(torch.ops.sharetie.experts_backward.default, (torch.ones_like(x), hidden, *arguments, asked))


@executions
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_that_nobody_asks_for_are_not_computed(execution, bias, monkeypatch):
    layer, x, products = make(execution=execution, bias=bias), tokens(), []
    for name in ("mm", "addmm"):  # of torch: a chapter that ran before in this process has defined the operators again
        monkeypatch.setattr(torch, name, lambda *given, product=getattr(torch, name), **options: products.append(1) or product(*given, **options))
    names = [name for name, p in layer.experts.named_parameters()]
    whole, weight = layer.router(x).weight.detach(), plan_rows(layer.router(x))
    def found(asked):
        layer.zero_grad(), products.clear()
        for name, p in layer.experts.named_parameters(): p.requires_grad_(name in asked)
        a, w = x.clone().requires_grad_("x" in asked), whole.clone().requires_grad_("weight" in asked)
        y = layer.experts(a, w, weight)
        forward = len(products)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        return {"x": a.grad, "weight": w.grad, **{name: p.grad for name, p in layer.experts.named_parameters()}}, len(products) - forward
    every, most = found(["x", "weight", *names])
    for n in range(1, len(names) + 2):
        for asked in itertools.combinations(["x", "weight", *names], n):
            some, spent = found(asked)
            assert all(grad is None if name not in asked else torch.equal(grad, every[name]) for name, grad in some.items()), asked
            inward = {"x", "weight", "w_in", "b_in"} & {*asked}
            expected = bool(inward) + len({"x", "w_in", "w_out"} & {*asked})
            if execution == "segments": assert spent == EXPERTS * expected and most == EXPERTS * 4


def test_grouped_products_refuse_what_they_cannot_do_and_auto_does_not_ask():
    for options in ({"dtype": torch.float64}, {}):
        layer = MoE(DIM + (0 if "dtype" in options else 1), HIDDEN, 4, execution="grouped", dtype=options.get("dtype"))
        with pytest.raises(ValueError, match="execution: 'segments' for such widths"): layer(torch.ones(3, layer.experts.dim, dtype=options.get("dtype")))
        layer.experts.execution = "auto"
        assert layer(torch.ones(3, layer.experts.dim, dtype=options.get("dtype"))).shape == (3, layer.experts.dim)


# Special cases

@executions
def test_all_experts_are_the_dense_mixture(execution):
    layer, x = make(k=EXPERTS, execution=execution), tokens()
    weight = (x @ layer.router.gate.weight.mT).softmax(-1)
    expected = sum(weight[:, e, None] * network(x, layer.experts, e) for e in range(EXPERTS))
    assert torch.allclose(layer(x), expected, atol=1e-6)


@executions
@pytest.mark.parametrize("router", ["topk", "balanced"])
def test_one_expert_is_the_dense_network(execution, router):
    layer, x = make(k=1, num_experts=1, router=router, execution=execution), tokens()
    assert torch.allclose(layer(x), network(x, layer.experts, 0), atol=1e-6)
    assert torch.allclose(merge_experts(layer)(x), layer(x), atol=1e-6)


@executions
@routers
@pytest.mark.parametrize("shape", [(0,), (0, 5), (1,), (3, 0), ()])
def test_empty_and_small_batches(execution, router, shape):
    layer = make(router=router, execution=execution)
    y, grads = gradients(layer, torch.ones(*shape, DIM), layer)
    assert y.shape == (*shape, DIM)
    assert all(g is None or g.isfinite().all() for g in grads)


@executions
def test_empty_experts_get_zero_gradients(execution):
    layer = make(k=1, execution=execution, bias=True)
    with torch.no_grad(): layer.router.gate.weight[1:] = layer.router.gate.weight[:1] - 5 * tokens(1).sign()
    y, _ = gradients(layer, tokens(1).expand(8, DIM) * 2, layer)
    used = layer.routing.counts() > 0
    assert used.sum() == 1 and y.isfinite().all()
    for p in layer.experts.parameters():
        assert (p.grad[~used] == 0).all() and (p.grad[used] != 0).any()


def test_shared_experts_are_added():
    layer, x = make(shared_experts=2), tokens()
    assert layer.shared.hidden == 2 * HIDDEN
    assert torch.allclose(layer(x), loop(x, layer.router(x), layer.experts) + layer.shared(x), atol=1e-6)


def test_hash_routing_in_a_layer():
    ids = torch.arange(50).view(5, 10)
    layer = MoE(DIM, HIDDEN, EXPERTS, 2, router=Hash(DIM, EXPERTS, 2, vocabulary=50))
    x = tokens().view(5, 10, DIM)
    y = layer(x, ids=ids)
    assert torch.allclose(y.flatten(0, 1), loop(tokens(), layer.router(tokens(), ids=ids.flatten()), layer.experts), atol=1e-6)
    with pytest.raises(ValueError, match="ids: the ids of 50 tokens"): layer(x)


@pytest.mark.parametrize("shape", [(50,), (5, 10), (5, 2, 5)])
def test_any_leading_axes(shape):
    layer = make()
    assert torch.equal(layer(tokens().view(*shape, DIM)).view(50, DIM), layer(tokens()))
    mask = torch.arange(50) < 30
    assert torch.equal(layer(tokens().view(*shape, DIM), mask.view(shape)).view(50, DIM), layer(tokens(), mask))


def test_input_that_is_not_contiguous():
    layer, x = make(), tokens(100)[::2]
    assert torch.equal(layer(x), layer(x.contiguous()))
    y, grads = gradients(lambda x: layer(x.mT.contiguous().mT), x, layer)
    assert same(grads, gradients(layer, x, layer)[1], atol=1e-6)
    a = torch.randn(4, DIM, requires_grad=True)
    layer(a).sum().backward()  # a gradient that is one number, expanded
    assert a.grad.isfinite().all()


# Conservation

@routers
def test_no_token_is_lost_and_weights_are_the_routers(router):
    layer = make(router=router).eval()
    with torch.no_grad():  # each expert gives ones: w_out = 0, bias 1
        layer = make(router=router, bias=True).eval()
        layer.experts.w_out.zero_()
        layer.experts.b_out.fill_(1)
    y = layer(tokens())
    assert torch.allclose(y, layer.routing.table().sum(-1, keepdim=True).expand_as(y), atol=1e-6)
    assert layer.routing.counts().sum() == (102 if router == 'expert choice' else 100) and layer.routing.kept.all()
    if router != "expert choice": assert torch.allclose(y, torch.ones_like(y), atol=1e-6)


def test_kept_weights_are_unchanged_by_dropping():
    layer = make(capacity_factor=1., bias=True)
    with torch.no_grad():
        layer.experts.w_out.zero_()
        layer.experts.b_out.fill_(1)
    y, full = layer(tokens()), layer.router(tokens())
    kept = torch.where(layer.routing.kept, full.weight, 0).view(50, 2).sum(-1, keepdim=True)
    assert not layer.routing.kept.all()
    assert torch.allclose(y, kept.expand_as(y), atol=1e-6)


@pytest.mark.parametrize("router", ["topk", "noisy", "balanced"])
def test_every_slot_is_kept_or_counted_as_left_out(router):
    layer, x, mask = make(router=router, capacity_factor=1.), tokens() + 1, torch.arange(50) % 7 != 2
    x[[11, 20]] = torch.nan
    layer(x, mask)
    found = statistics(layer.routing)
    assert sum(found["tokens"]) + found["dropped"] + 2 * (found["padding"] + found["not finite"]) == 100
    assert found["dropped"] > 0 and found["not finite"] == 2 and found["padding"] == 7
    assert max(found["tokens"]) <= 17  # room for 50 * 2 / 6


# Determinism

@executions
@routers
def test_the_same_bits_on_every_run(execution, router):
    layer = make(router=router, execution=execution)
    first, grads = gradients(layer, tokens(300), layer)
    for _ in range(3):
        y, again = gradients(layer, tokens(300), layer)
        assert torch.equal(first, y)
        assert all(p is q is None or torch.equal(p, q) for p, q in zip(grads, again))


@executions
def test_deterministic_algorithms_are_enough(execution):
    torch.use_deterministic_algorithms(True)
    try: gradients(layer := make(execution=execution), tokens(), layer)
    finally: torch.use_deterministic_algorithms(False)


def test_a_token_does_not_depend_on_its_batch():
    layer = make(dtype=torch.float64)
    x = tokens(dtype=torch.float64)
    assert torch.allclose(layer(x)[7:9], layer(x[7:9]))
    order = torch.randperm(50)
    assert torch.allclose(layer(x)[order], layer(x[order]))


# NaN

@executions
@routers
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_token(execution, router, value):
    layer, x = make(router=router, execution=execution, capacity_factor=None).eval(), tokens()
    x[11, 3] = value
    y = layer(x)
    others = torch.arange(50) != 11
    assert y[11].isnan().all() and y[others].isfinite().all()
    assert statistics(layer.routing)["not finite"] == 1
    assert torch.allclose(y[others], layer(x[others]), atol=1e-6)


def test_nan_takes_no_place_from_others():
    layer, x = make(k=1, capacity_factor=1.).eval(), tokens(1).repeat(6, 1)
    x[0, 0] = torch.nan  # all tokens want one expert, which has room for one
    assert (layer(x)[1] != 0).all() and layer.routing.kept.tolist() == [False, True] + [False] * 4


def test_nan_with_hash_routing():
    layer = MoE(DIM, HIDDEN, EXPERTS, 1, router=Hash(DIM, EXPERTS, 1, vocabulary=50))
    x = tokens()
    x[5, 0] = torch.nan
    y = layer(x, ids=torch.arange(50))
    assert y[5].isnan().all() and y.isnan().any(-1).sum() == 1
    assert statistics(layer.routing)["not finite"] == 1


@executions
@pytest.mark.parametrize("router", [*ROUTERS, "hash", "soft"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e38])
def test_what_stands_in_padding_reaches_no_output_and_no_gradient(router, execution, value):
    x, mask, given = tokens(), torch.arange(50) % 7 != 2, {}
    if router == "hash": given = {"ids": torch.where(mask, torch.arange(50), -1)}
    torch.manual_seed(1)
    layer = SoftMoE(DIM, HIDDEN, 3) if router == "soft" else make(router=router, execution=execution, shared_experts=1, vocabulary=50 if given else None)
    found = []
    for bad in (0., value):
        x[~mask] = bad
        y, grads = gradients(lambda x: torch.where(mask[:, None], layer(x, mask, **given), 0), x, layer)
        assert y.isfinite().all() and all(g is None or g.isfinite().all() for g in grads)
        found.append([y, *grads])
    assert same(*found)
    if router == "soft": return
    assert statistics(layer.routing)["padding"] == (~mask).sum() and statistics(layer.routing)["not finite"] == 0
    if router in ("topk", "noisy", "balanced"): assert router_z_loss(layer.routing).isfinite()


# What PyTorch does with a layer

@pytest.mark.long
@pytest.mark.parametrize("router", ["topk", *(pytest.param(router, marks=pytest.mark.long) for router in ROUTERS[1:])])
def test_compile_without_a_graph_break(router):
    layer = make(router=router, shared_experts=1).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, grads = gradients(layer, tokens(), layer)
    counts = layer.routing.counts()
    z, compiled_grads = gradients(compiled, tokens(), layer)
    assert torch.allclose(y, z, atol=1e-6) and same(grads, compiled_grads, atol=1e-5)
    assert torch.equal(layer.routing.counts(), counts)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compile_of_grouped_products(dtype):
    layer, x = make(execution="grouped", dtype=dtype), tokens(dtype=dtype)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), layer(x), atol=1e-2)
    assert make(execution="grouped", dtype=dtype, device="meta")(x.to("meta")).shape == x.shape


@executions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(execution, dtype):
    layer, x = make(execution=execution), tokens()
    expected = layer(x)
    with torch.autocast("cpu", dtype):
        y, grads = gradients(layer, x, layer)
    assert y.dtype == dtype and grads[1].dtype == torch.float32
    assert torch.allclose(y.float(), expected, atol=3e-2)
    assert same(grads, gradients(layer, x, layer)[1], atol=.1, rtol=.1)
    half = copy.deepcopy(layer).to(dtype)
    assert torch.allclose(half(x.to(dtype)).float(), expected, atol=3e-2)
    with pytest.raises(TypeError, match=f"x: tokens of {dtype}"): half(x)


@routers
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(router, reentrant):
    layer = make(router=router)
    y, grads = gradients(layer, tokens(), layer)
    again, checkpointed = gradients(lambda x: checkpoint(layer, x, use_reentrant=reentrant), tokens(), layer)
    assert torch.equal(y, again)
    assert all(p is q is None or torch.equal(p, q) for p, q in zip(grads, checkpointed))


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_counts_once(reentrant):
    layer, x = make(router="balanced"), tokens().requires_grad_()
    y = checkpoint(layer, x, use_reentrant=reentrant)
    routing = layer.routing
    y.sum().backward()
    assert layer.router.load.sum() == 100 and layer.routing is routing
    assert load_balancing_loss(routing).requires_grad != reentrant


@pytest.mark.long
def test_what_a_compiled_layer_computes_again_counts_once():
    layer, x = make(router="balanced"), tokens().requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for n in (1, 2):
        checkpoint(compiled, x, use_reentrant=False).sum().backward()
        assert layer.router.load.sum() == 100 * n and torch.equal(layer.routing.counts(), layer.router.load.long() // n)


def test_a_refused_call_changes_nothing():
    layer, x = make(router="balanced"), tokens()
    layer(x)
    routing, load = layer.routing, layer.router.load.clone()
    refused = [lambda: layer(x.double()), lambda: layer(x, torch.ones(49, dtype=bool)), lambda: layer(x[:, :3])]
    layer.experts.execution = "grouped"
    for call in [*refused, lambda: layer.double()(x.double())]:
        with pytest.raises((TypeError, ValueError)): call()
        assert layer.routing is routing and torch.equal(layer.router.load, load)


def test_half_precision_leaves_the_bias_and_the_load_exact():
    layer = make(router="balanced", num_experts=4)
    layer.router.bias.copy_(torch.tensor([1.001, -1.001, .3, .1]))
    for cast in (nn.Module.bfloat16, nn.Module.half, nn.Module.double, lambda m: m.to(torch.bfloat16), lambda m: m.to("meta", torch.half)):
        other = cast(copy.deepcopy(layer))
        assert other.router.gate.weight.dtype != torch.float32
        for name in ("bias", "load"):
            buffer = getattr(other.router, name)
            assert buffer.dtype == torch.float32 and buffer.is_meta == other.router.gate.weight.is_meta
        if not buffer.is_meta: assert torch.equal(other.router.bias, layer.router.bias)
    layer.bfloat16()
    for _ in range(1000): layer.router.observe(torch.tensor([2, 1, 1, 0]))
    assert layer.router.load.tolist() == [2000, 1000, 1000, 0]
    before = layer.router.bias.clone()
    layer.router.update_()
    assert torch.equal(layer.router.bias, before + torch.tensor([-1e-3, 0, 0, 1e-3]))
    empty = make(router="balanced", device="meta").to_empty(device="cpu")
    assert empty.router.bias.dtype == torch.float32 and not empty.router.bias.is_meta
    assert layer(tokens(dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.long
def test_compile_with_a_capacity_and_any_number_of_tokens():
    layer = make(capacity_factor=1.).eval()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (50, 31): assert torch.allclose(compiled(tokens(n)), layer(tokens(n)), atol=1e-6)


@routers
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_token_that_is_not_finite_leaves_the_gradient_if_its_loss_is_left_out(router, value):
    layer, x, rest = make(router=router, shared_experts=1), tokens(), torch.arange(50) != 7
    x[7] = value
    torch.where(rest[:, None], layer(x), 0).square().sum().backward()
    assert statistics(layer.routing)["not finite"] == 1
    assert layer.router.gate.weight.grad.any() and all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_token_that_is_not_finite_leaves_the_gradients_of_a_soft_mixture(value):
    torch.manual_seed(0)
    layer, x, rest = SoftMoE(DIM, HIDDEN, 3, 2), tokens(10)[None], torch.arange(10) != 7
    x[0, 7] = value
    x.requires_grad_()
    y = layer(x)
    torch.where(rest[:, None], y, 0).square().sum().backward()
    assert y[0, 7].isnan().all() and torch.equal(layer.bad[0], ~rest) and copy.deepcopy(layer).bad is None
    assert all(g.isfinite().all() and g.any() for g in (x.grad, *(p.grad for p in layer.parameters())))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["mask", "ids", "soft"])
def test_masks_and_ids_in_a_graph_for_any_length(kind):
    layer = SoftMoE(DIM, HIDDEN, 3) if kind == "soft" else make(router=Hash(DIM, EXPERTS, 2, vocabulary=50) if kind == "ids" else "topk")
    def beside(x): return {"ids": torch.arange(len(x)) % 50} if kind == "ids" else {"mask": torch.arange(len(x)) % 3 > 0}
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (12, 20, 31):
        x = tokens(n)
        assert torch.allclose(compiled(x, **beside(x)), layer(x, **beside(x)), atol=1e-5)


@pytest.mark.long
def test_losses_inside_of_a_compiled_graph():
    layer = make()
    def step(x): return layer(x).square().mean() + load_balancing_loss(layer.routing) + importance_loss(layer.routing)
    assert torch.allclose(torch.compile(step, fullgraph=True, backend="aot_eager")(tokens()), step(tokens()))


def test_losses_of_the_last_batch_train_the_router():
    layer = make()
    layer(tokens())
    load_balancing_loss(layer.routing).backward()
    assert layer.router.gate.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in layer.experts.parameters())


def test_copies_and_pickles_after_a_batch():
    layer = make(shared_experts=1)
    y = layer(tokens())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.routing is None and torch.equal(other(tokens()), y)
    assert layer.routing is not None


def test_state_dict():
    layer, other = make(router="balanced"), make(router="balanced", seed=2)
    layer.router.bias.fill_(.5)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(tokens()), other(tokens()))
    assert set(layer.state_dict()) == {"router.gate.weight", "router.bias", "experts.w_in", "experts.w_out"}


def test_a_layer_that_was_built_on_meta_counts_from_zero(monkeypatch):
    empty = torch.empty_like
    def filled(like, **options):
        made = empty(like, **options)
        return made.fill_(7) if made.is_floating_point() and not made.is_meta else made
    source, layer = make(router="balanced"), make(router="balanced", device="meta")
    source.router.bias.fill_(.5)
    monkeypatch.setattr(torch, "empty_like", filled)
    layer.to_empty(device="cpu")
    monkeypatch.undo()
    assert layer.router.load.tolist() == [7.] * EXPERTS  # whatever was in memory
    layer.load_state_dict(source.state_dict())
    assert layer.router.load.tolist() == [0.] * EXPERTS and torch.equal(layer(tokens()), source(tokens()))
    assigned = make(router="balanced", device="meta")
    assigned.load_state_dict(source.state_dict(), assign=True)
    assigned(tokens()), update_biases_(assigned)
    layer.router.reset_parameters()
    assert not layer.router.bias.any() and not layer.router.load.any()


@pytest.mark.parametrize("strict", [False, True])
def test_a_state_of_other_sizes_is_refused_before_anything_is_copied(strict):
    torch.manual_seed(0)
    layers = [lambda n, hidden=HIDDEN: make(num_experts=n, hidden=hidden, shared_experts=1), lambda n, hidden=HIDDEN: SoftMoE(DIM, hidden, n)]
    for build in layers:
        for other, sizes in ((build(4), r"\(6|6\).*\(4|4\)"), (build(6, HIDDEN + 1), "48|24.*50|25")):
            layer = build(6)
            before = copy.deepcopy(layer.state_dict())
            with pytest.raises(ValueError, match=sizes): layer.load_state_dict(other.state_dict(), strict=strict)
            assert all(torch.equal(before[name], p) for name, p in layer.state_dict().items())


def test_a_file_of_another_number_of_experts(tmp_path):
    save_model(make(), tmp_path / "six.safetensors")
    other = make(num_experts=5, seed=2)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"shape \(5, 16\) is expected, got \(6, 16\)"): load_model(other, tmp_path / "six.safetensors")
    assert all(torch.equal(before[name], p) for name, p in other.state_dict().items())
    same_size = make(seed=2)
    load_model(same_size, tmp_path / "six.safetensors")
    assert torch.equal(same_size(tokens()), make()(tokens()))


@routers
def test_meta_device(router):
    layer = make(router=router, device="meta", shared_experts=1)
    assert layer(tokens().to("meta")).shape == (50, DIM)
    assert all(p.is_meta for p in layer.parameters())


def test_frozen_experts_and_frozen_router():
    layer = make()
    layer.experts.requires_grad_(False)
    y, grads = gradients(layer, tokens(), layer)
    assert grads[1] is not None and grads[2] is None and grads[3] is None
    layer.experts.requires_grad_(True)
    layer.router.requires_grad_(False)
    _, grads = gradients(layer, tokens(), layer)
    assert grads[1] is None and grads[2] is not None


def test_observed_loads_move_the_bias_in_training_only():
    layer = make(router="balanced")
    layer.eval()(tokens())
    assert layer.router.load.sum() == 0
    layer.train()(tokens())
    assert torch.equal(layer.router.load.long(), layer.routing.counts())
    assert update_biases_(nn.Sequential(layer)) == 1
    assert layer.router.load.sum() == 0 and layer.router.bias.abs().max() > 0


def test_the_bias_moves_by_what_was_chosen_before_dropping():
    router = Balanced(DIM, 4, 1, rate=.5)
    with torch.no_grad(): router.gate.weight.copy_(9 * torch.eye(4, DIM))
    layer = MoE(DIM, HIDDEN, 4, 1, router=router, capacity_factor=1.)
    layer(torch.eye(DIM)[torch.tensor([0, 1, 2, 3]).repeat_interleave(torch.tensor([40, 22, 20, 18]))])
    assert layer.routing.counts().tolist() == [25, 22, 20, 18] and router.load.tolist() == [40, 22, 20, 18]
    router.update_()
    assert router.bias.tolist() == [-.5, .5, .5, .5]


def test_nothing_is_counted_for_a_router_that_takes_no_note(monkeypatch):
    asked = []
    monkeypatch.setattr("sharetie.routing.Routing.counts", lambda *given, **options: asked.append(1))
    for router in ("topk", "noisy", "expert choice"): make(router=router)(tokens())
    assert not asked


def test_no_gradient_needs_no_hidden_layer():
    layer = make()
    with torch.no_grad(): y = layer(tokens())
    assert torch.allclose(y, layer(tokens())) and not y.requires_grad


@executions
def test_functional_transform(execution):
    layer, x = make(execution=execution), tokens()
    parameters = dict(layer.named_parameters())
    def loss(parameters): return torch.func.functional_call(layer, parameters, (x,)).square().sum()
    found = torch.autograd.grad(loss(parameters), parameters.values())
    assert same(torch.func.grad(loss)(parameters).values(), found, atol=1e-5)  # as a graph, for second derivatives


@executions
def test_second_derivatives_are_those_of_the_loop(execution):
    layer, x = make(execution=execution, bias=True, capacity_factor=1.), tokens(200)
    x[3] = torch.nan
    def curvature(f):
        given, rest = x.clone().requires_grad_(), torch.arange(200) != 3
        slopes, = torch.autograd.grad(torch.where(rest[:, None], f(given), 0).tanh().sum(), given, create_graph=True)
        return torch.autograd.grad(slopes.square().sum(), [given, *layer.parameters()])
    def slow(x): return loop(x, layer.router(x)._replace(kept=kept), layer.experts)
    found, kept = curvature(layer), layer.routing.kept
    expected = curvature(slow)
    assert same(found[1:], expected[1:], atol=1e-4) and all(g.abs().sum() > 0 for g in found[1:])
    assert torch.allclose(found[0], expected[0], atol=1e-5)


@executions
def test_products_with_the_second_derivative(execution):
    layer, x, v = make(execution=execution, bias=True), tokens(20), tokens(20, seed=4)
    def f(x): return layer(x).tanh().sum()
    given = x.clone().requires_grad_()
    slopes, = torch.autograd.grad(f(given), given, create_graph=True)
    expected, = torch.autograd.grad((slopes * v).sum(), given)
    assert torch.allclose(torch.autograd.functional.hvp(f, x, v)[1], expected, atol=1e-5)


def test_second_derivatives_of_segments_by_differences():
    torch.manual_seed(0)
    layer = MoE(2, 3, 3, 2, expert="swiglu", bias=True, dtype=torch.float64, execution="segments")
    names, parameters = zip(*layer.named_parameters())
    def f(x, *parameters): return torch.func.functional_call(layer, dict(zip(names, parameters)), (x,))
    assert torch.autograd.gradgradcheck(f, (torch.randn(5, 2, dtype=torch.float64, requires_grad=True), *parameters))


@pytest.mark.parametrize("drop", ["position", "weight"])
def test_padding_gives_no_room(drop):
    layer, x = make(capacity_factor=1., drop=drop).eval(), tokens(40)
    y, dropped = layer(x), statistics(layer.routing)["dropped"]
    padded = layer(torch.cat([x, tokens(160, seed=1)]), torch.arange(200) < 40)
    assert dropped > 0 and statistics(layer.routing)["dropped"] == dropped and torch.allclose(padded[:40], y, atol=1e-6)
    x[:12] = torch.nan
    assert torch.equal(layer(x)[12:], layer(x, torch.ones(40, dtype=torch.bool))[12:])


def test_under_autocast_double_precision_stays():
    layer, x = make(shared_experts=1, dtype=torch.float64), tokens(dtype=torch.float64)
    y = layer(x)
    with torch.autocast("cpu", torch.bfloat16): assert torch.equal(layer(x), y)


@pytest.mark.parametrize("make", [
    lambda device: SoftMoE(DIM, HIDDEN, 3, 2, device=device), lambda device: NoisyTopK(DIM, EXPERTS, 2, device=device),
    lambda device: Hash(DIM, EXPERTS, 2, vocabulary=50, device=device)], ids=["soft", "noisy", "hash"])
def test_begun_on_no_device(make):
    torch.manual_seed(0)
    made, late = make("cpu"), make("meta").to_empty(device="cpu")
    for p in (*late.parameters(), *late.buffers()): p.detach().fill_(7)
    for part in late.modules():
        if hasattr(part, "reset_parameters"): part.reset_parameters()
    for name, own in late.state_dict().items():
        expected = made.state_dict()[name]
        assert torch.equal(own, expected) or own.std() > 0 and (own != 7).all()
    assert not isinstance(late, NoisyTopK) or not late.spread.weight.any()


def test_noise_that_is_not_finite_is_reported():
    router = NoisyTopK(DIM, EXPERTS, 2)
    with torch.no_grad(): router.spread.weight.fill_(3e38)
    routing = router(tokens())
    assert routing.bad.any() and torch.equal(routing.weight.isnan(), routing.bad[routing.token])


def test_merged_twice_with_fewer_choices():
    layer = merge_experts(merge_experts(make(3, num_experts=8), 6), 4, top_k=2)
    assert layer.router.top_k == 2 and layer.router.router.num_experts == 8 and layer(tokens()).isfinite().all()
    with pytest.raises(ValueError, match="top_k: None for one expert alone is expected, got 1"): merge_experts(layer, 1, top_k=1)
    with pytest.raises(TypeError, match="cluster: numbers of experts is expected, got None"): Merged(layer.router, None)


def test_the_part_of_a_rank_says_so():
    layer, state = make(), make().state_dict() | {"experts._extra_state": torch.tensor([0, 2, 6])}
    for name in ("experts.w_in", "experts.w_out"): state[name] = state[name][:3]
    with pytest.raises(ValueError, match=r"experts.w_in: a tensor of shape \(6, 48, 16\) is expected, got 'those of one rank, 0 to 2 of 6'"):
        layer.load_state_dict(state)


def test_what_is_frozen_stays_frozen_in_copies():
    dense = FeedForward(DIM, HIDDEN, bias=True)
    dense.up.requires_grad_(False)
    learned = {name: p.requires_grad for name, p in upcycle(dense, 3).experts.named_parameters()}
    assert learned == {"w_in": False, "b_in": False, "w_out": True, "b_out": True}


# Bad input

def test_bad_input_says_both_values():
    for k in (0, 7):
        with pytest.raises(ValueError, match=rf"top_k: from 1 to num_experts = 6 is expected, got {k}"): make(k)
    for factor in (.5, 0, torch.nan):
        with pytest.raises(ValueError, match="capacity_factor: a finite number of at least 1 is expected, got"): make(capacity_factor=factor)
    with pytest.raises(ValueError, match=r"x: tokens of width 16 is expected, got \(50, 15\)"): make()(tokens()[:, :15])
    with pytest.raises(TypeError, match="x: a floating point tensor is expected, got Tensor of int64"): make()(tokens().long())
    with pytest.raises(TypeError, match="x: a floating point tensor"): make()([1., 2.])
    with pytest.raises(ValueError, match="did you mean 'balanced'"): make(router="balance")
    with pytest.raises(ValueError, match="did you mean 'swiglu'"): make(expert="swigl")
    with pytest.raises(TypeError, match="router: one of"): make(router=3)
    with pytest.raises(ValueError, match=r"router: one of {.*'num_experts': 6.*} is expected, got {.*'num_experts': 5"): make(router=TopK(DIM, 5, 2))
    with pytest.raises(ValueError, match="shared_experts"): make(shared_experts=-1)
    with pytest.raises(ValueError, match="hidden"): MoE(DIM, 0, 4)
    with pytest.raises(ValueError, match="mask: a tensor of shape"): make()(tokens(), torch.ones(49, dtype=bool))
    with pytest.raises(ValueError, match="groups: a divisor of num_experts = 6"): Balanced(DIM, 6, groups=4)
    for bad in (torch.tensor(1.), tokens()[:, :0]):
        with pytest.raises(ValueError, match="x: tokens of width 16 is expected, got"): make()(bad)


class Bare(Router):
    "A router without the sizes of one."
    def __init__(self): nn.Module.__init__(self)
    def route(self, x, mask, ids): return None


@pytest.mark.parametrize("make", [MoE, SoftMoE, Experts, lambda dim, hidden, n, **options: FeedForward(dim, hidden, **options)])
def test_types_of_weights_and_switches(make):
    for dtype in (torch.int64, torch.complex64, torch.bool, "float32"):
        with pytest.raises(TypeError, match="dtype: a floating point type or None is expected"): make(8, 16, 4, dtype=dtype)
    for bias in ("no", 1, None):
        with pytest.raises(TypeError, match=f"bias: True or False is expected, got {bias!r}"): make(8, 16, 4, bias=bias)


def test_routers_by_name_and_those_that_are_none():
    torch.manual_seed(0)
    x, ids = tokens(), torch.arange(50) % 9
    layer = make(router="hash", vocabulary=9)
    assert torch.equal(layer(x, ids=ids), layer(x, ids=ids.int())) and layer.router.experts.shape == (9, 2)
    with pytest.raises(ValueError, match="vocabulary: the number of different ids, for router 'hash', is expected, got None"): make(router="hash")
    with pytest.raises(ValueError, match="vocabulary: None for a router other than 'hash' is expected, got 9"): make(vocabulary=9)
    with pytest.raises(ValueError, match="router: 'soft' is a layer of its own, SoftMoE"): make(router="soft")
    with pytest.raises(ValueError, match="router: one of {'dim': 16.* is expected, got {'dim': None"): make(router=Bare())
    with pytest.raises(TypeError, match="router: one of 'topk', .* or a Router"): make(router=nn.Linear(3, 3))


@pytest.mark.parametrize("soft", [False, True])
def test_masks_and_ids_have_an_entry_for_each_token(soft):
    torch.manual_seed(0)
    layer, x = SoftMoE(DIM, HIDDEN, 3) if soft else make(), tokens(15).view(3, 5, DIM)
    names = ["mask"] if soft else ["mask", "ids"]
    for name in names:
        dtype = torch.bool if name == "mask" else torch.long
        for shape in ((5, 3), (15,), (3, 5, 1), (3,)):
            with pytest.raises(ValueError, match=rf"{name}: a tensor of shape \(3, 5\) is expected, got \({shape[0]}, ?"): layer(x, **{name: torch.ones(shape, dtype=dtype)})
        with pytest.raises(TypeError, match=f"{name}: a tensor"): layer(x, **{name: [True] * 15})
    for dtype in (torch.long, torch.float32):
        with pytest.raises(TypeError, match="mask: booleans"): layer(x, torch.ones(3, 5, dtype=dtype))
    if not soft:
        with pytest.raises(TypeError, match="ids: a tensor of whole numbers"): layer(x, ids=torch.ones(3, 5))


def test_a_soft_mixture_takes_tokens_of_its_own_type():
    layer = SoftMoE(DIM, HIDDEN, 3)
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(TypeError, match=f"x: tokens of torch.float32, as the experts are, is expected, got {dtype}"): layer(tokens(5, dtype))


# Soft mixtures

def soft_by_hand(x, layer):
    "The definition, slot by slot."
    e, p = layer.experts, layer.slots
    logits = F.normalize(x, dim=-1) @ (layer.scale * F.normalize(layer.phi, dim=0))
    slots = logits.softmax(0).mT @ x
    out = torch.stack([network(slots[s:s + 1], e, s // p)[0] for s in range(len(slots))])
    return logits.softmax(-1) @ out


@pytest.mark.parametrize("bias", [False, True])
def test_soft_mixture_is_its_definition(bias):
    torch.manual_seed(0)
    layer = SoftMoE(DIM, HIDDEN, 3, slots=2, bias=bias, dtype=torch.float64)
    x = tokens(dtype=torch.float64).view(5, 10, DIM)
    y = layer(x)
    for i in range(5): assert torch.allclose(y[i], soft_by_hand(x[i], layer))
    order = torch.randperm(10)
    assert torch.allclose(layer(x[:, order]), y[:, order])
    assert torch.allclose(layer(x[0]), y[0])
    assert torch.autograd.gradcheck(lambda x: layer(x), x[:1, :4].clone().requires_grad_())


def test_soft_mixture_keeps_nan_and_padding_to_themselves():
    torch.manual_seed(0)
    layer, x = SoftMoE(DIM, HIDDEN, 3, slots=2), tokens().view(5, 10, DIM)
    x[1, 4, 2] = torch.nan
    y = layer(x)
    assert y[1, 4].isnan().all() and y.isnan().any(-1).sum() == 1
    rest = [t for t in range(10) if t != 4]
    assert torch.allclose(y[1, rest], layer(x[1, rest]), atol=1e-6)
    mask = torch.arange(10).expand(5, 10) < 7
    assert torch.allclose(layer(x, mask)[2, :7], layer(x[2, :7]), atol=1e-6)
    assert layer(x, torch.zeros(5, 10, dtype=bool))[0].isfinite().all()


@pytest.mark.long
def test_soft_mixture_half_compile_and_errors():
    torch.manual_seed(0)
    layer, x = SoftMoE(DIM, HIDDEN, 3, slots=2), tokens().view(5, 10, DIM)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), layer(x), atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16): half = layer(x)
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), layer(x), atol=.05)
    assert torch.allclose(copy.deepcopy(layer).bfloat16()(x.bfloat16()).float(), layer(x), atol=.05)
    half, x[0, 0], mask = copy.deepcopy(layer).half(), 0, torch.arange(10).expand(5, 10) < 7
    y = half(x.half(), mask)
    y.float().square().sum().backward()
    assert torch.allclose(y.float(), layer(x, mask), atol=.05) and half.phi.grad.isfinite().all()
    assert layer(x[:, :0]).shape == (5, 0, DIM)
    with pytest.raises(ValueError, match="x: sequences of tokens of width 16"): layer(x[..., :3])
    with pytest.raises(TypeError, match="x: a floating point tensor"): layer(x.long())
    with pytest.raises(ValueError, match="slots"): SoftMoE(DIM, HIDDEN, 3, slots=0)


# From one to many and back

class Gated(nn.Module):
    "A feed-forward part with the names that LLaMA models have."
    def __init__(self, function=F.silu):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(DIM, HIDDEN, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(HIDDEN, DIM, bias=False), function

    def forward(self, x): return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def sequential(function, bias=True): return nn.Sequential(nn.Linear(DIM, HIDDEN, bias=bias), function, nn.Linear(HIDDEN, DIM, bias=bias))


DENSE = {"swiglu": lambda: FeedForward(DIM, HIDDEN), "relu, bias": lambda: FeedForward(DIM, HIDDEN, "relu", bias=True), "llama": Gated,
         "sequential gelu": lambda: sequential(nn.GELU()), "sequential relu": lambda: sequential(nn.ReLU(), bias=False)}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("router", ["topk", "balanced", "noisy"])
def test_upcycled_is_the_dense_network_and_merged_again_too(name, router):
    torch.manual_seed(0)
    dense, x = DENSE[name](), tokens()
    layer = upcycle(dense, 5, 2, router=router)
    assert torch.allclose(layer(x), dense(x), atol=1e-6)
    merged = merge_experts(layer)
    assert isinstance(merged, FeedForward) and torch.allclose(merged(x), dense(x), atol=1e-6)
    fewer = merge_experts(layer, 3)
    assert fewer.experts.num_experts == 3 and torch.allclose(fewer(x), dense(x), atol=1e-6)
    layer.experts.w_in.data.zero_()
    assert not torch.allclose(layer(x), dense(x), atol=1e-3)  # it has weights of its own


@pytest.mark.long
def test_upcycling_with_noise_and_with_the_mlp_of_a_llama():
    torch.manual_seed(0)
    dense = FeedForward(DIM, HIDDEN)
    layer = upcycle(dense, 4, noise=.1)
    assert not torch.equal(layer.experts.w_in[0], layer.experts.w_in[1])
    spread = (layer.experts.w_in[0] - dense.up.weight).std() / dense.up.weight.std()
    assert .08 < spread < .12
    assert all(p.isfinite().all() for p in upcycle(FeedForward(1, 1, "relu", bias=True), 1, 1, noise=.1).parameters())
    llama = pytest.importorskip("transformers.models.llama")
    mlp = llama.modeling_llama.LlamaMLP(llama.LlamaConfig(hidden_size=DIM, intermediate_size=HIDDEN, num_attention_heads=2))
    assert torch.allclose(upcycle(mlp, 3)(tokens()), mlp(tokens()), atol=1e-6)


def test_what_cannot_be_upcycled():
    for bad in (nn.Linear(3, 3), 3, nn.Sequential(nn.Linear(3, 3), nn.ReLU())):
        with pytest.raises(TypeError, match="dense: a FeedForward"): upcycle(bad, 4)
    with pytest.raises(ValueError, match="dense: a network with silu, gelu or relu"): upcycle(sequential(nn.Tanh()), 4)
    with pytest.raises(ValueError, match="noise"): upcycle(FeedForward(3, 3), 4, noise=-1)
    for function in (nn.ReLU6(), nn.GELU("tanh"), nn.Linear(HIDDEN, HIDDEN), F.relu6, None):
        with pytest.raises(ValueError, match="dense: a network with silu, gelu or relu is expected, got"): upcycle(Gated(function), 4)
    with pytest.raises(ValueError, match="dense: a network with silu"): upcycle(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), 4)
    for a, b, c, d in ((1, 8, 8, 6), (4, 8, 8, 6), (8, 8, 8, 1), (4, 8, 7, 4)):
        with pytest.raises(ValueError, match=rf"dense: maps \[.*\] from an expert's tokens to its hidden units and back is expected, got \[\({a}, {b}\), \({c}, {d}\)\]"):
            upcycle(nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(c, d)), 4)
    with pytest.raises(ValueError, match="dense: biases in all maps or in none"): upcycle(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4, bias=False)), 4)
    for options in ({"expert": "relu"}, {"bias": True}, {"hidden": 3}):
        with pytest.raises(ValueError, match=rf"options: no option that the dense network tells is expected, got \['{[*options][0]}'\]"): upcycle(FeedForward(3, 3), 4, **options)


@pytest.mark.parametrize("bias", [False, True])
def test_shared_experts_of_an_upcycled_network_add_nothing_at_first(bias):
    dense = FeedForward(DIM, HIDDEN, bias=bias)
    layer = upcycle(dense, 4, shared_experts=1)
    assert torch.allclose(layer(tokens()), dense(tokens()), atol=1e-6)
    layer(tokens()).square().sum().backward()
    assert layer.shared.down.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("function", [F.silu, F.gelu, F.relu, nn.SiLU(), nn.GELU(), nn.ReLU(), nn.ReLU(inplace=True)])
def test_functions_are_known_by_what_they_are(function):
    dense = Gated(function)
    assert torch.allclose(upcycle(dense, 4)(9 * tokens()), dense(9 * tokens()), atol=1e-4)


def test_functions_of_transformers():
    activations = pytest.importorskip("transformers.activations")
    for name in ("silu", "gelu", "relu"):
        dense = Gated(activations.ACT2FN[name])
        assert torch.allclose(upcycle(dense, 4)(tokens()), dense(tokens()), atol=1e-5)
    with pytest.raises(ValueError, match="dense: a network with silu"): upcycle(Gated(activations.ACT2FN["gelu_new"]), 4)


def test_merging_is_the_average_weighted_by_usage():
    layer = make(bias=True)
    usage = torch.tensor([4., 0, 1, 0, 3, 0])
    merged = merge_experts(layer, usage=usage)
    expected = (layer.experts.w_in * (usage / 8)[:, None, None]).sum(0)
    assert torch.allclose(merged.up.weight, expected, atol=1e-6)
    assert torch.allclose(merged.down.bias, (layer.experts.b_out * (usage / 8)[:, None]).sum(0), atol=1e-6)
    layer(tokens())
    assert torch.equal(merge_experts(layer).up.weight, merge_experts(layer, usage=layer.routing.counts()).up.weight)


def test_clusters_join_the_experts_that_are_alike():
    layer = make(k=1)
    with torch.no_grad():
        for e in (3, 4, 5):
            for p in layer.experts.parameters(): p[e] = p[e - 3]
            layer.router.gate.weight[e] = layer.router.gate.weight[e - 3]
    merged, x = merge_experts(layer, 3, usage=[1] * 6), tokens()
    assert torch.allclose(merged(x), layer(x), atol=1e-6)
    same_number = merge_experts(layer, 6)
    assert torch.allclose(same_number(x), layer(x), atol=1e-6)


@routers
def test_merging_to_the_same_number_changes_nothing(router):
    layer = make(router=router, shared_experts=1, bias=True).eval()
    if router == "balanced": layer.router.bias.copy_(torch.linspace(-.3, .3, EXPERTS))
    merged = merge_experts(layer, EXPERTS)
    assert torch.allclose(merged(tokens()), layer(tokens()), atol=1e-6)
    assert type(merged.router) is type(layer.router) and merged.router.gate.out_features == EXPERTS
    assert not any(p is q for p in merged.parameters() for q in layer.parameters())
    plain = MoE(DIM, HIDDEN, EXPERTS, 1, router=Balanced(DIM, EXPERTS, 1, renormalize=False)).eval()
    assert torch.allclose(merge_experts(plain, EXPERTS)(tokens()), plain(tokens()), atol=1e-6)
    assert merge_experts(layer, 3).router(tokens()).counts().shape == (3,)


def twins(layer):
    "A layer whose experts 3 to 5 are those of 0 to 2, with rows of the router that differ, and a bias that counts where there is one."
    with torch.no_grad():
        for p in layer.experts.parameters(): p[3:] = p[:3]
        if hasattr(layer.router, "bias"): layer.router.bias.copy_(torch.linspace(-.3, .3, EXPERTS))
    return layer


ALIKE = {**{name: lambda k, name=name: make(k, name) for name in ROUTERS},
         "not renormalized": lambda k: make(k, TopK(DIM, EXPERTS, k, renormalize=False)),
         "groups": lambda k: make(k, Balanced(DIM, EXPERTS, k, groups=2, renormalize=False)),
         "few groups": lambda k: make(k, Balanced(DIM, EXPERTS, k, groups=2, top_groups=1 if k < 4 else 2)),
         "hash": lambda k: make(k, "hash", vocabulary=50)}


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ALIKE)
def test_merging_experts_that_are_equal_changes_nothing(name, k):
    layer, x, ids, mask = twins(ALIKE[name](k)), tokens(), torch.arange(50), torch.arange(50) % 7 != 3
    x[20, 3], x[10, 1] = torch.nan, torch.nan
    merged = merge_experts(layer, 3, usage=[1, 2, 3, 4, 5, 6])
    assert merged.router.cluster.tolist() == [0, 1, 2, 0, 1, 2] and merged.experts.num_experts == 3
    for one in (layer, merged): one.zero_grad(), torch.manual_seed(5), one(x, mask, ids)[mask].nan_to_num().square().sum().backward()
    torch.manual_seed(5)
    y = layer(x, mask, ids)
    torch.manual_seed(5)
    z = merged(x, mask, ids)
    assert torch.allclose(y, z, atol=1e-6, equal_nan=True) and z[20].isnan().all()
    rows, found = layer.routing, merged.routing
    assert torch.allclose(rows.table().unflatten(1, (2, 3)).sum(1), found.table(), atol=1e-6)
    assert torch.equal((rows.table() > 0).unflatten(1, (2, 3)).any(1), found.table() > 0)  # each once
    assert found.counts().sum() == (found.table() > 0).sum() and torch.equal(found.counts(), found.counts(kept=False))
    said = statistics(found)
    assert said["dropped"] == 0 and said["not finite"] == 1 and said["padding"] == (~mask).sum()  # 10 is padding, 20 is not
    if hasattr(layer.router, "gate"):
        assert torch.allclose(layer.router.gate.weight.grad, merged.router.router.gate.weight.grad, atol=1e-5)
        assert torch.allclose(router_z_loss(rows), router_z_loss(found)) and found.probs.shape == (50, 3)


@pytest.mark.parametrize("router", ["topk", "expert choice"])
def test_a_merged_layer_is_a_layer_like_others(router, tmp_path):
    layer, x = merge_experts(make(3, router, bias=True, shared_experts=1), 3), tokens()
    other = merge_experts(make(3, router, bias=True, shared_experts=1, seed=2), 3)
    other.load_state_dict(layer.state_dict())
    for again in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))): assert torch.equal(again(x), layer(x))
    save_model(layer, tmp_path / "merged.safetensors")
    built = MoE(DIM, HIDDEN, 3, 3, 1, Merged(make(3, router).router, [0, 1, 2, 2, 1, 0]), bias=True)
    load_model(built, tmp_path / "merged.safetensors")
    assert torch.equal(built(x), layer(x)) and layer(x[:0]).shape == (0, DIM)
    assert all(g.abs().sum() > 0 for g in gradients(layer, x, layer)[1])
    assert load_balancing_loss(layer.routing).requires_grad and layer.routing.counts().shape == (3,)
    twice = merge_experts(layer, 2)
    assert twice.router.router.gate.out_features == EXPERTS and twice(x).isfinite().all()
    limited = merge_experts(make(3, router, capacity_factor=1.), 3)
    limited(x)
    assert limited.routing.counts().max() <= 50


@pytest.mark.long
@pytest.mark.parametrize("router", ["topk", "expert choice"])
def test_a_merged_layer_compiles_whole(router):
    layer, x = merge_experts(make(3, router, bias=True, shared_experts=1), 3), tokens()
    y, grads = gradients(layer, x, layer)
    z, others = gradients(torch.compile(layer, fullgraph=True, backend="aot_eager"), x, layer)
    assert torch.allclose(y, z, atol=1e-6) and same(grads, others, atol=1e-5)


def test_merged_experts_are_balanced_as_such():
    layer = MoE(DIM, HIDDEN, 3, 2, router=Merged(Balanced(DIM, EXPERTS, 2, rate=.5), [0, 1, 1, 1, 2, 2]))
    layer(tokens())
    counts = layer.routing.counts()
    assert update_biases_(layer) == 1 and len({*counts.tolist()}) > 1
    assert torch.equal(layer.router.router.bias, .5 * (counts.float().mean() - counts).sign()[layer.router.cluster])


def test_merging_keeps_what_is_frozen_and_takes_fewer_rows():
    layer = make(3, shared_experts=1, bias=True)
    layer.experts.w_in.requires_grad_(False), layer.router.requires_grad_(False), layer.shared.requires_grad_(False)
    merged, x = merge_experts(layer, 3, top_k=1), tokens()
    frozen = [name for name, p in merged.named_parameters() if not p.requires_grad]
    assert [name.split(".")[0] for name in frozen] == ["router", "experts", *["shared"] * 4] and merged.router.router.top_k == 1
    assert merged.router(x).counts().sum() == 50
    dense = merge_experts(make(bias=True).requires_grad_(False))
    assert not any(p.requires_grad for p in dense.parameters())
    words = merge_experts(make(3, "hash", vocabulary=50), 3, top_k=2)
    words(x, ids=torch.arange(50))
    assert torch.allclose(words.routing.table().sum(1), torch.ones(50))


def test_what_cannot_be_merged():
    with pytest.raises(TypeError, match="layer: a MoE"): merge_experts(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="num_experts: a whole number from 1 to 6 is expected, got 7"): merge_experts(make(), 7)
    with pytest.raises(ValueError, match=r"usage: a tensor of shape \(6\)"): merge_experts(make(), usage=[1, 2])
    with pytest.raises(ValueError, match="usage"): merge_experts(make(), usage=[0] * 6)
    with pytest.raises(ValueError, match="at least 2 for a layer with shared experts"): merge_experts(make(shared_experts=1))
    for k in (0, 3, -1):
        with pytest.raises(ValueError, match=f"top_k: a whole number from 1 to 2 is expected, got {k}"): merge_experts(make(), 4, top_k=k)
    with pytest.raises(TypeError, match="top_k: a whole number is expected, got 'a'"): merge_experts(make(), 2, top_k="a")
    for usage in ("abc", [1, 2, 3, 4, 5, "a"], 3j):
        with pytest.raises(TypeError, match="usage: 6 counts is expected"): merge_experts(make(), usage=usage)
    for cluster in ([0, 1], [0, 0, 0, 0, 0, 2], [1] * 6):
        with pytest.raises(ValueError, match="cluster: numbers of 6 experts, from 0 without a gap, is expected"): Merged(TopK(DIM, EXPERTS), cluster)
    with pytest.raises(TypeError, match="router: a Router"): Merged(nn.Linear(2, 2), [0])
    assert Merged(TopK(DIM, 3), torch.tensor([0, 1, 1])).cluster.tolist() == [0, 1, 1]
    layer = make()
    layer(tokens(0))
    assert torch.allclose(merge_experts(layer).up.weight, layer.experts.w_in.mean(0), atol=1e-6)
    fewer = merge_experts(make(shared_experts=1), 2)
    assert fewer.shared is not None and fewer(tokens()).shape == (50, DIM)


def test_experts_alone():
    torch.manual_seed(0)
    experts, router = Experts(DIM, HIDDEN, 4), ExpertChoice(DIM, 4)
    routing = router(tokens())
    assert torch.allclose(experts(tokens(), routing.weight, plan_rows(routing)), loop(tokens(), routing, experts), atol=1e-6)
    assert experts.w_in.abs().max() <= DIM ** -.5 and experts.w_out.abs().max() <= HIDDEN ** -.5


@pytest.mark.long
def test_the_operators_may_be_defined_again_while_layers_of_before_go_on(tmp_path):
    "A second definition, as by a notebook, frees the first: layers must call the operator by name, never hold it."
    script = tmp_path / "twice.py"
    script.write_text("""
import torch
import sharetie.experts, sharetie.moe

source = open(sharetie.experts.__file__, encoding="utf-8").read()
again, called = {"__name__": "again", "__package__": "sharetie"}, []
exec(compile(source, "again", "exec"), again)
segments = again["_segments"]
again["_segments"] = lambda *ends: called.append(1) or segments(*ends)
layer = sharetie.moe.MoE(16, 8, 4, 2, execution="segments")
layer(torch.randn(32, 16)).square().sum().backward()
with torch.no_grad(): layer(torch.randn(32, 16))
assert len(called) == 3, called
""")
    subprocess.run([sys.executable, script], check=True, capture_output=True)


# On a GPU

@pytest.mark.gpu
@executions
@pytest.mark.parametrize("router", ["topk", "balanced", "expert choice"])
def test_gpu_equals_cpu(router, execution):
    here = make(router=router, execution=execution).eval()
    there, mask = copy.deepcopy(here).cuda(), torch.arange(50) % 7 > 0
    y, grads = gradients(lambda x: here(x, mask), tokens(), here)
    z, others = gradients(lambda x: there(x, mask.cuda()).cpu(), tokens().cuda(), there)
    assert torch.allclose(y, z, atol=1e-5) and same(grads, [None if g is None else g.cpu() for g in others], atol=1e-4)


@pytest.mark.gpu
@executions
def test_gpu_gives_the_same_bits_twice_and_compiles(execution):
    layer, x = make(execution=execution, dtype=torch.bfloat16).cuda(), tokens(dtype=torch.bfloat16).cuda()
    once, again, compiled = (gradients(f, x, layer) for f in (layer, layer, torch.compile(layer, fullgraph=True)))
    for other, equal in ((again, torch.equal), (compiled, lambda a, b: torch.allclose(a, b, atol=2e-2, rtol=2e-2))):
        assert equal(once[0], other[0]) and all(map(equal, *([g for g in grads if g is not None] for grads in (once[1], other[1]))))
