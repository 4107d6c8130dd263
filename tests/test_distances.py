"Distances between weights: the fast road against PyTorch's own losses, in every type, layout and mode."
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from sharetie import distances
from sharetie.distances import DISTANCES, _add_compiled, _add_lists, _add_pieces, _plain_sums, add_slopes_, can_add_slopes, pair_distances, shrink

SUMS = ("squared_l2", "l1", "huber")
SHAPES = [(2, 3), (), (0,), (7,), (1 << 10) + 5, (33, 100)]  # empty, scalar, one and several pieces and buckets


@pytest.fixture(params=[-1, 8, 1 << 14], ids=["all long", "short and long", "all short"])
def small_pieces(request, monkeypatch):
    "Pieces and buckets of 1,024 elements, so that small tensors have several; up to so many elements go in lists."
    monkeypatch.setattr(distances, "_SHORT", request.param)
    monkeypatch.setattr(distances, "_CHUNK", 1 << 10)
    monkeypatch.setattr(distances, "_BUCKET", 1 << 10)


def tensors(dtype=torch.float64, requires_grad=True, shapes=SHAPES):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_(requires_grad) for shape in shapes]


def pairs(dtype=torch.float64):
    x = tensors(dtype)
    return x, [(t.detach() + 0.7 * torch.randn(t.shape, generator=torch.Generator().manual_seed(1)).to(dtype)).requires_grad_() for t in x]


@pytest.mark.parametrize("distance", SUMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_value_and_gradient_equal_the_plain_losses(distance, dtype, small_pieces):
    x, y = pairs(dtype)
    assert len(list(distances._buckets(x, y, 1 << 10))) == 2 and len(list(distances._pieces(x[-1], y[-1]))) == 4
    ours, plain = pair_distances(x, y, distance, 0.5), _plain_sums(distance, 0.5, x, y)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    factors = torch.arange(1, len(x) + 1, dtype=ours.dtype)
    got, expected = (torch.autograd.grad((s * factors).sum(), [*x, *y]) for s in (ours, plain))
    for a, b in zip(got, expected):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b)


def test_large_sums_keep_their_digits_in_half_precision():
    ones = torch.ones(100_003, dtype=torch.float16)
    assert pair_distances([ones], [torch.zeros_like(ones)]).item() == 100_003


@pytest.mark.parametrize("distance", DISTANCES)
def test_types_may_differ_from_pair_to_pair(distance):
    fine = 1 + 1e-9 * torch.arange(1.0, 5, dtype=torch.float64)
    x, y = [torch.zeros(9), fine.clone().requires_grad_()], [torch.ones(9), torch.ones(4, dtype=torch.float64)]
    both, alone = pair_distances(x, y, distance), pair_distances(x[1:], y[1:], distance)
    assert both.dtype == torch.float64
    torch.testing.assert_close(both[1:], alone, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(both[1], x[1])[0], torch.autograd.grad(alone[0], x[1])[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_frozen_side_gets_no_gradient(distance):
    x, y = torch.randn(5, requires_grad=True), torch.randn(5)
    pair_distances([x], [y], distance).sum().backward()
    assert x.grad is not None and y.grad is None


@pytest.mark.parametrize("distance", DISTANCES)
def test_layouts_that_are_not_contiguous(distance):
    x, y = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), torch.randn(6, 4, dtype=torch.float64)
    by_view = torch.autograd.grad(pair_distances([x.T], [y], distance).sum(), x)[0]
    by_copy = torch.autograd.grad(pair_distances([x.T.contiguous()], [y], distance).sum(), x)[0]
    torch.testing.assert_close(by_view, by_copy)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("short", [-1, 1 << 14])
def test_finite_differences_agree(distance, short, monkeypatch):
    monkeypatch.setattr(distances, "_SHORT", short)
    x, y = torch.randn(3, dtype=torch.float64, requires_grad=True), torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: pair_distances([a], [b], distance, 0.5), (x, y))
    assert torch.autograd.gradgradcheck(lambda a, b: pair_distances([a], [b], distance, 0.5), (x, y))


@pytest.mark.parametrize("distance", SUMS)
@pytest.mark.parametrize("short", [-1, 1 << 14])
def test_a_gradient_with_a_graph_is_the_same_where_members_depend_on_each_other(distance, short, monkeypatch):
    monkeypatch.setattr(distances, "_SHORT", short)
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    value = pair_distances([w, 2 * w], [w.square(), w.mean().expand(5).contiguous()], distance, 0.5).sum()
    plain, = torch.autograd.grad(value, w, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(value, w, create_graph=True)[0], plain)
    def rebuilt(w): return pair_distances([w, 2 * w], [w.square(), w.mean().expand(5).contiguous()], distance, 0.5).sum()
    assert torch.autograd.gradcheck(rebuilt, w) and torch.autograd.gradgradcheck(rebuilt, w)


@pytest.mark.parametrize("short", [-1, 1 << 14])
def test_roads_of_autograd_that_look_at_saved_tensors_or_batches(short, monkeypatch):
    monkeypatch.setattr(distances, "_SHORT", short)
    x, y = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    def f(x): return pair_distances([x, 2 * x], [y, y], "huber", 0.5)
    slope, = torch.autograd.grad(f(x).sum(), x)
    torch.testing.assert_close(torch.autograd.grad(checkpoint(f, x, use_reentrant=False).sum(), x)[0], slope)
    torch.testing.assert_close(torch.autograd.functional.jacobian(f, x, vectorize=True), torch.autograd.functional.jacobian(f, x))
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x.detach(), torch.ones_like(x)))).tangent
    torch.testing.assert_close(tangent.sum(), slope.sum())


def test_the_default_device_changes_nothing():
    x, y = [torch.randn(40_000), torch.randn(3)], [torch.randn(40_000), torch.randn(3)]
    with torch.device("meta"): found = pair_distances(x, y)
    assert torch.equal(found, pair_distances(x, y))


@pytest.mark.parametrize("distance", DISTANCES)
def test_function_transforms(distance):
    y = torch.randn(4, dtype=torch.float64)
    def f(x): return pair_distances([x], [y], distance).sum()
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(torch.func.grad(f)(x.detach()), torch.autograd.grad(f(x), x)[0])
    assert torch.func.hessian(f)(x.detach()).shape == (4, 4)
    many = torch.stack([x.detach(), 2 * x.detach()])
    torch.testing.assert_close(torch.func.vmap(f)(many), torch.stack([f(row) for row in many]))


@pytest.mark.parametrize("distance", DISTANCES)
def test_autocast_changes_nothing(distance):
    x, y = torch.randn(999), torch.randn(999)
    with torch.autocast("cpu", dtype=torch.bfloat16): cast = pair_distances([x], [y], distance)
    torch.testing.assert_close(cast, pair_distances([x], [y], distance), rtol=0, atol=0)


def test_backward_sees_weights_changed_in_place():
    x, y = torch.randn(3, requires_grad=True), torch.randn(3)
    value = pair_distances([x], [y]).sum()
    with torch.no_grad(): x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"): value.backward()


def test_one_pass_adds_to_gradients_that_are_there(small_pieces):
    x, y = pairs()
    for t in x: t.grad = torch.ones_like(t)
    expected = torch.autograd.grad(2 * _plain_sums("squared_l2", 1.0, x, y).sum(), x)
    add_slopes_(x, y, [2.0] * len(x))
    for t, grad in zip(x, expected): torch.testing.assert_close(t.grad, grad + 1)


def test_an_interruption_leaves_no_gradient_half_written(monkeypatch):
    x, y = (torch.randn(40_000, requires_grad=True) for _ in range(2))
    def interrupted(*_): raise KeyboardInterrupt
    monkeypatch.setattr(distances, "_difference", interrupted)
    with pytest.raises(KeyboardInterrupt): add_slopes_([x], [y], [1.0])
    assert x.grad is None and y.grad is None


def test_a_factor_that_no_slope_can_hold_changes_nothing():
    x, y = ([torch.ones(3, requires_grad=True), torch.ones(40_000, requires_grad=True)] for _ in range(2))
    for factor in (1e39, 2e38, 10**40):
        with pytest.raises(ValueError, match=r"^factors: \d+e\+\d\d is beyond"): add_slopes_(x, y, [1.0, factor])
    assert all(t.grad is None for t in (*x, *y))


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this PyTorch has no grad_dtype")
def test_gradients_of_another_type_go_the_road_of_autograd():
    x, y = (torch.ones(4, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    x.grad_dtype = torch.float32
    assert not can_add_slopes([x], [y], "l1") and not can_add_slopes([2 * y], [y], "l1")


def test_factors_of_other_kinds_of_numbers():
    x, y = ([torch.ones(3, requires_grad=True), torch.zeros(40_000, requires_grad=True)] for _ in range(2))
    with torch.no_grad(): x[1].add_(1)
    add_slopes_(x, y, [Fraction(1, 2), np.float32(.5)])
    assert (x[0].grad == 0).all() and (x[1].grad == 1).all()


def walked(walk, kind, dtype, grads, device="cpu"):
    "Distances and gradients of one walk over a few shapes, some of them odd."
    torch.manual_seed(1)
    x = [torch.randn(shape, dtype=dtype, device=device).requires_grad_() for shape in ((3, 4), (1,), (5000,), (0,), ())]
    y = [torch.randn_like(t).requires_grad_(grads != "frozen") for t in x]
    for t in (*x, *y):
        if grads == "kept" and t.requires_grad: t.grad = torch.ones_like(t)
    with torch.no_grad(): distances = walk(kind, 0.5, x, y, [1.0, 2.0, 3.0, 4.0, 5.0])
    return distances, [t.grad for t in (*x, *y)]


@pytest.mark.parametrize("grads", ["fresh", "kept", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["squared_l2", "l1", "huber"])
def test_all_walks_agree(kind, dtype, grads):
    by_pieces = walked(_add_pieces, kind, dtype, grads)
    torch.testing.assert_close(walked(_add_lists, kind, dtype, grads), by_pieces)


@pytest.mark.long
def test_the_compiled_walk_agrees():
    torch.testing.assert_close(walked(_add_compiled, "squared_l2", torch.float32, "kept"), walked(_add_pieces, "squared_l2", torch.float32, "kept"))


@pytest.mark.gpu
@pytest.mark.parametrize("walk", [_add_pieces, _add_lists, _add_compiled])
def test_walks_on_cuda_equal_those_on_the_cpu(walk):
    for kind in ("squared_l2", "l1", "huber"):
        torch.testing.assert_close(walked(walk, kind, torch.float64, "fresh", "cuda")[0].cpu(), walked(_add_pieces, kind, torch.float64, "fresh", "cuda")[0].cpu())


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_tensor_in_several_pairs_gets_every_slope(compiled):
    a, b, c = (torch.randn(5000, requires_grad=True) for _ in range(3))
    values = pair_distances([a, a, b], [b, c, c])
    expected = torch.autograd.grad(values.sum(), (a, b, c))
    torch.testing.assert_close(add_slopes_([a, a, b], [b, c, c], [1.0, 1.0, 1.0], compiled=compiled), values.detach())
    for t, grad in zip((a, b, c), expected): torch.testing.assert_close(t.grad, grad)


@pytest.mark.parametrize("call, message", [
    (lambda x: pair_distances(x, x, "manhattan"), "distance: one of .* got 'manhattan'"),
    (lambda x: pair_distances(x, x, "huber", 0.0), "delta: a finite number above 0 is expected, got 0.0"),
    (lambda x: pair_distances(x, x, "huber", float("nan")), "delta"),
    (lambda x: pair_distances([], []), "got 0 and 0"),
    (lambda x: pair_distances(x, x + x), "got 1 and 2"),
    (lambda x: pair_distances(x, [torch.zeros(4)]), r"x\[0\] has shape \(3,\), y\[0\] has shape \(4,\)"),
    (lambda x: add_slopes_(x, [torch.zeros(3)], [1.0], "cosine"), "one pass needs"),
    (lambda x: add_slopes_(x, [torch.zeros(3)], [1.0, 2.0]), "factors: 1 finite numbers are expected"),
    (lambda x: shrink(x[0], -1.0), "t: a finite number of at least 0 is expected, got -1.0"),
    (lambda x: shrink(x[0], 1.0, "cosine"), "has a closed form, got 'cosine'"),
])
def test_bad_input_names_what_came(call, message):
    x = [torch.zeros(3, requires_grad=True)]
    with pytest.raises(ValueError, match=message): call(x)
    assert x[0].grad is None


X = [torch.zeros(3)]


@pytest.mark.parametrize("call", [pair_distances, lambda *a: add_slopes_(*a, [1.0]), lambda *a: can_add_slopes(*a, "l1")], ids=["pair_distances", "add_slopes_", "can_add_slopes"])
@pytest.mark.parametrize("bad", [None, 3, "x", torch.zeros(1, 3), [None], [1.0], [[1.0]], [np.zeros(3)], {"a": X[0]}, (t for t in X)], ids=lambda v: type(v).__name__)
def test_lists_of_something_else(call, bad):
    with pytest.raises(TypeError, match="^x: a list of tensors is expected, got"): call(bad, X)
    with pytest.raises(TypeError, match="^y: a list of tensors is expected, got"): call(X, bad)


@pytest.mark.parametrize("call, error, message", [
    (lambda: pair_distances(X, X, None), ValueError, "^distance: "), (lambda: pair_distances(X, X, ["l1"]), ValueError, "^distance: "), (lambda: pair_distances(X, X, "huber", None), TypeError, "^delta: a number"),
    (lambda: pair_distances(X, X, "huber", True), TypeError, "^delta: "), (lambda: pair_distances(X, X, "huber", math.nan), ValueError, "^delta: "), (lambda: pair_distances(X, [torch.zeros(3, device="meta")]), ValueError, r"^x\[0\] is on cpu, y\[0\] on meta"),
    (lambda: pair_distances(X * 2, [torch.zeros(3), torch.zeros(3, dtype=torch.int64)]), TypeError, r"^x\[1\] is torch.float32, y\[1\] is torch.int64"), (lambda: add_slopes_(X, X, None), TypeError, "^factors: a list of numbers"),
    *((lambda d=d: pair_distances(X, [torch.eye(3).to_sparse()[0]], d), TypeError, r"^x\[0\] is torch.strided, y\[0\] is torch.sparse_coo; dense tensors are expected") for d in DISTANCES),
    *((lambda d=d: shrink(torch.eye(3).to_sparse(), 1.0, d), TypeError, "^d: a dense tensor is expected, got torch.sparse_coo") for d in DISTANCES[:4]),
    *((lambda d=d: can_add_slopes(X, X, d), ValueError, "^distance: one of") for d in (None, "l2", ["l1"], np.zeros(2), torch.zeros(2))), (lambda: add_slopes_(X, X, [10**400]), ValueError, "^factors: "),
    *((lambda c=c: add_slopes_(X, X, [1.0], compiled=c), TypeError, "^compiled: True or False is expected") for c in (None, 1, "no", torch.zeros(2))),
    (lambda: add_slopes_(X, X, [None]), ValueError, "^factors: 1 finite numbers"), (lambda: add_slopes_(X, X, [math.nan]), ValueError, "^factors: "), (lambda: shrink(None, 1.0), TypeError, "^d: a floating point tensor is expected, got None"),
    (lambda: shrink([1.0], 1.0), TypeError, "^d: "), (lambda: shrink(torch.ones(2).long(), 1.0), TypeError, "^d: "), (lambda: shrink(X[0], None), TypeError, "^t: a number"), (lambda: shrink(X[0], "1"), TypeError, "^t: "), (lambda: shrink(X[0], True), TypeError, "^t: "),
    (lambda: shrink(X[0], math.nan), ValueError, "^t: a finite number of at least 0"), (lambda: shrink(X[0], 1.0, "huber", 0), ValueError, "^delta: "), (lambda: shrink(X[0], 1.0, None), ValueError, "^distance: "),
])
def test_arguments_of_another_kind(call, error, message):
    with pytest.raises(error, match=message): call()


@pytest.mark.parametrize("distance", DISTANCES)
def test_empty_tensors_are_no_distance_apart(distance):
    x, y = torch.zeros(0, 3, requires_grad=True), torch.zeros(0, 3)
    value = pair_distances([x], [y], distance)
    assert value.tolist() == [0]
    value.sum().backward()
    assert x.grad.shape == (0, 3)


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_nan_weight_shows(distance):
    assert pair_distances([torch.tensor([1.0, math.nan])], [torch.ones(2)], distance).isnan().all()


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=2), st.floats(0, 4), st.sampled_from(DISTANCES[:4]))
def test_shrink_is_the_minimum_that_a_general_solver_finds(d, t, distance):
    d = torch.tensor(d, dtype=torch.float64)
    def objective(v):
        v = torch.as_tensor(v)
        return (0.5 * (v - d).pow(2).sum() + t * pair_distances([v], [torch.zeros_like(v)], distance)[0]).item()
    solved = min((minimize(objective, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13}) for start in (d.numpy(), [0.0, 0.0])), key=lambda r: r.fun)
    assert objective(shrink(d, t, distance)) <= solved.fun + 1e-9


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=6), st.lists(st.floats(-100, 100), min_size=1, max_size=6), st.sampled_from(DISTANCES))
def test_distances_are_symmetric_and_zero_on_equal_tensors(a, b, distance):
    n = min(len(a), len(b))
    x, y = (torch.tensor(v[:n], dtype=torch.float64) for v in (a, b))
    forth, back = pair_distances([x], [y], distance), pair_distances([y], [x], distance)
    torch.testing.assert_close(forth, back)
    assert forth >= -1e-12
    assert pair_distances([x], [x.clone()], distance).abs() < 1e-12
