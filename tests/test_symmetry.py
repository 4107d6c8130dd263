"Equivariance measured, anti-aliased pooling, and layers whose weights are shared by the orbits of a group."
import itertools
import math
import pickle
from collections import deque
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sharetie.census import census
from sharetie.orbits import Orbit, flips, orbits, share_orbits_, shifts, swaps, turns
from sharetie.symmetry import BlurPool2d, MaxBlurPool2d, equivariance_error
from sharetie.ties import check_ties, declared_ties, find_ties, keep_ties, load_model, save_model, tie_, untie_


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


def roll(x, steps=1): return x.roll(steps, -1)


# --- equivariance_error ---------------------------------------------------------------------------------------------

def test_error_is_the_relative_norm():
    x, w = torch.randn(5, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    expected = ((x.roll(1, -1) @ w) - (x @ w).roll(1, -1)).norm() / (x @ w).norm()
    assert equivariance_error(lambda x: x @ w, roll, roll, x) == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("conv, shape, axes", [
    (nn.Conv1d(3, 4, 5, padding=2, padding_mode="circular"), (2, 3, 11), -1),
    (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 2, 7, 9), (-2, -1)),
    (nn.Conv3d(1, 2, 3, padding=1, padding_mode="circular"), (1, 1, 4, 5, 6), (-3, -2, -1)),
])
def test_circular_convolutions_are_exactly_equivariant(conv, shape, axes):
    def shift(x): return x.roll([2] * len(axes) if isinstance(axes, tuple) else 2, axes)
    assert equivariance_error(conv, shift, shift, torch.randn(shape)) <= 1e-6


def test_zero_padding_is_equivariant_inside_the_border_only():
    conv = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
    x = torch.randn(2, 1, 10, 10)
    def inside(n): return lambda y: y[..., n:-n, n:-n]
    assert equivariance_error(conv, roll, roll, x) > .1
    assert equivariance_error(conv, roll, roll, x, inside(2)) > .01  # two layers, and one pixel that came around
    assert equivariance_error(conv, roll, roll, x, inside(3)) <= 1e-6


def test_strides_keep_their_own_multiples():
    conv, x = nn.Conv2d(1, 2, 4, 2, 1, padding_mode="circular"), torch.randn(2, 1, 8, 8)
    assert equivariance_error(conv, lambda x: roll(x, 2), roll, x) <= 1e-6
    assert equivariance_error(conv, roll, lambda y: y, x) > .1
    assert equivariance_error(conv, roll, roll, x) > .1


def test_zero_output_and_scale():
    x = torch.randn(3, 4)
    assert equivariance_error(torch.zeros_like, roll, roll, x) == 0
    assert equivariance_error(lambda x: x * (x[:, :1] > 9), lambda x: x + 10, roll, x) == math.inf
    tiny = equivariance_error(lambda x: 1e-30 * x.cumsum(-1), roll, roll, x)
    assert tiny == pytest.approx(equivariance_error(lambda x: x.cumsum(-1), roll, roll, x), rel=1e-5)


def test_a_module_is_measured_in_evaluation_mode_and_left_as_it_was():
    model = nn.Sequential(nn.Conv1d(1, 2, 3, padding=1, padding_mode="circular"), nn.BatchNorm1d(2), nn.Dropout())
    model[1].eval()
    before = deepcopy(model.state_dict())
    assert equivariance_error(model, roll, roll, torch.randn(2, 1, 6)) <= 1e-6
    assert [m.training for m in model] == [True, False, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_error_of_complex_half_and_integer_input():
    x = torch.randn(2, 4, dtype=torch.complex64)
    assert equivariance_error(lambda x: 2 * x, roll, roll, x) == 0
    assert equivariance_error(lambda x: x.cumsum(-1), roll, roll, torch.randn(2, 4).bfloat16()) > .1
    table = nn.Embedding(5, 3)
    assert equivariance_error(table, roll, lambda y: y.roll(1, -2), torch.arange(4)[None]) == 0


@pytest.mark.parametrize("change, error, text", [
    (dict(f=3), TypeError, "f: a function of (x)"),
    (dict(transform_in=None), TypeError, "transform_in: a function"),
    (dict(transform_out="roll"), TypeError, "transform_out: a function"),
    (dict(inside=1), TypeError, "inside: a function"),
    (dict(f=lambda: 0), TypeError, "f: a function of (x)"),
    (dict(x=[1., 2.]), TypeError, "x: a tensor"),
    (dict(x=torch.zeros(0, 4)), ValueError, "x: a tensor with at least one element"),
    (dict(x=torch.zeros(2, 4, device="meta")), ValueError, "x: a tensor with values"),
    (dict(f=lambda x: 3), TypeError, "f(x): a floating point tensor"),
    (dict(f=lambda x: x.argmax(-1)), TypeError, "f(x): a floating point tensor"),
    (dict(transform_out=lambda y: y[:, 1:]), ValueError, "f(T x): the shape of T' f(x), (2, 3), is expected, got (2, 4)"),
    (dict(f=lambda x: x / 0), ValueError, "f(x): finite numbers"),
    (dict(x=torch.full((2, 4), torch.nan)), ValueError, "f(x): finite numbers"),
    (dict(inside=lambda y: y[:0]), ValueError, "inside: a tensor with at least one element"),
])
def test_bad_input_of_the_error(change, error, text):
    arguments = dict(f=lambda x: x, transform_in=roll, transform_out=roll, x=torch.ones(2, 4)) | change
    with pytest.raises(error) as raised: equivariance_error(**arguments)
    assert text in str(raised.value)


# --- anti-aliased pooling -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, row", [(1, [1]), (2, [1, 1]), (3, [1, 2, 1]), (4, [1, 3, 3, 1]), (5, [1, 4, 6, 4, 1])])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_blur_is_the_direct_sum(size, row, stride, mode):
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64, requires_grad=True)
    pool = BlurPool2d(size, stride, mode)
    y = pool(x)
    a, b = (size - 1) // 2, size // 2
    padded = np.pad(x.detach().numpy(), [(0, 0), (0, 0), (a, b), (a, b)], {"replicate": "edge", "circular": "wrap"}.get(mode, mode))
    weights = np.outer(row, row) / sum(row) ** 2
    direct = np.zeros((2, 3, 7, 6))
    for i, j in itertools.product(range(size), repeat=2): direct += weights[i, j] * padded[..., i:i + 7, j:j + 6]
    np.testing.assert_allclose(y.detach().numpy(), direct[..., ::stride, ::stride], atol=1e-12)
    assert y.shape == (2, 3, math.ceil(7 / stride), math.ceil(6 / stride))
    assert torch.autograd.gradcheck(pool, x[:1, :2])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_constant_maps_stay_constant(size, mode):
    x = torch.full((1, 2, 8, 9), 3.7)
    for pool in (BlurPool2d(size, padding_mode=mode), MaxBlurPool2d(2, size, padding_mode=mode), MaxBlurPool2d(3, size, 3, mode)):
        torch.testing.assert_close(pool(x), torch.full_like(pool(x), 3.7), rtol=1e-6, atol=0)


def test_max_blur_is_max_then_blur():
    x = torch.randn(2, 3, 8, 8)
    dense = F.max_pool2d(F.pad(x, (0, 1, 0, 1), "circular"), 2, 1)
    torch.testing.assert_close(MaxBlurPool2d(2, 5, 2, "circular")(x), BlurPool2d(5, 2, "circular")(dense))
    torch.testing.assert_close(MaxBlurPool2d(2, 1, 2, "circular")(x), F.max_pool2d(x, 2))
    assert torch.equal(MaxBlurPool2d(3, 1, 1)(x)[..., 1:-1, 1:-1], F.max_pool2d(x, 3, 1))


def test_a_larger_blur_is_nearer_to_equivariance():
    x = torch.rand(8, 1, 16, 16)
    def half(y):  # half a pixel to the right, by the Fourier series of a row
        k = torch.fft.fftfreq(y.shape[-1]) * y.shape[-1]
        return torch.fft.ifft(torch.fft.fft(y) * torch.exp(-1j * math.pi * k / y.shape[-1])).real
    errors = [equivariance_error(MaxBlurPool2d(2, size, 2, "circular"), roll, half, x) for size in (1, 2, 3, 5, 7)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 4 * errors[-1]
    for size in (1, 3): assert equivariance_error(MaxBlurPool2d(2, size, 2, "circular"), lambda x: roll(x, 2), roll, x) <= 1e-6


@pytest.mark.parametrize("module", [BlurPool2d(3), MaxBlurPool2d(2, 4)])
def test_pools_elsewhere(module):
    x = torch.randn(2, 3, 8, 8)
    y = module(x)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), y)
    assert deepcopy(module).to("meta")(x.to("meta")).shape == y.shape
    assert torch.equal(deepcopy(module)(x), y) and torch.equal(pickle.loads(pickle.dumps(module))(x), y)
    assert module.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16): assert module.float()(x).shape == y.shape
    assert not list(module.parameters())


@pytest.mark.parametrize("call, error, text", [
    (lambda: BlurPool2d(0), ValueError, "size: a whole number of at least 1 is expected, got 0"),
    (lambda: BlurPool2d(2.), TypeError, "size: a whole number"),
    (lambda: BlurPool2d(3, 0), ValueError, "stride: a whole number of at least 1"),
    (lambda: BlurPool2d(3, 2, "zeros"), ValueError, "padding_mode: one of 'reflect'"),
    (lambda: MaxBlurPool2d(0), ValueError, "window: a whole number of at least 1"),
    (lambda: MaxBlurPool2d(2, True), TypeError, "size: a whole number"),
    (lambda: BlurPool2d()(torch.zeros(3, 8, 8)), ValueError, "x: a tensor of 4 axes is expected, got (3, 8, 8)"),
    (lambda: BlurPool2d()(torch.zeros(1, 1, 8, 8, dtype=torch.int64)), TypeError, "x: a floating point tensor"),
    (lambda: BlurPool2d()(None), TypeError, "x: a floating point tensor"),
    (lambda: BlurPool2d()(torch.zeros(1, 0, 8, 8)), ValueError, "x: maps of at least one channel is expected, got (1, 0, 8, 8)"),
    (lambda: BlurPool2d(5)(torch.zeros(1, 1, 8, 2)), ValueError, "at least 3×3 pixels for a window of 5"),
    (lambda: BlurPool2d(7, 2, "circular")(torch.zeros(1, 1, 2, 8)), ValueError, "got (1, 1, 2, 8)"),
    (lambda: MaxBlurPool2d(4)(torch.zeros(1, 1, 2, 2)), ValueError, "at least 3×3 pixels for a window of 4 (reflect)"),
    (lambda: BlurPool2d(3, 2, "replicate")(torch.zeros(1, 1, 0, 2)), ValueError, "at least 1×1 pixels"),
])
def test_bad_input_of_pools(call, error, text):
    with pytest.raises(error) as raised: call()
    assert text in str(raised.value)


# --- orbits ---------------------------------------------------------------------------------------------------------

def per_axis(generator, shape):
    "Plain lists, one per axis."
    if isinstance(generator[0], int) or getattr(generator, "ndim", 0) == 1: generator = [generator] * len(shape)
    return [list(range(n)) if p is None else [int(i) for i in p] for p, n in zip(generator, shape)]


def brute_force(generators, shape):
    "Orbits by breadth-first search over entries, numbered as they appear."
    generators, labels = [per_axis(g, shape) for g in generators], {}
    for start in itertools.product(*map(range, shape)):
        if start in labels: continue
        label, queue = len(set(labels.values())), deque([start])
        while queue:
            entry = queue.popleft()
            if entry in labels: continue
            labels[entry] = label
            queue += [tuple(p[i] for p, i in zip(g, entry)) for g in generators]
    return torch.tensor([labels[e] for e in itertools.product(*map(range, shape))]).view(shape)


def group(generators, shape):
    "Every element of the group, by closure."
    generators = [tuple(map(tuple, per_axis(g, shape))) for g in generators]
    found, queue = set(), deque([tuple(tuple(range(n)) for n in shape)])
    while queue:
        element = queue.popleft()
        if element in found: continue
        found.add(element)
        queue += [tuple(tuple(p[i] for i in q) for p, q in zip(g, element)) for g in generators]
    return found


GROUPS = {
    "shifts": (shifts(6), (6, 6)), "all": (swaps(5), (5, 5)), "torus": (shifts(3, 4), (12, 12)),
    "square": (turns(3) + flips(3), (9, 9)), "turns of taps": ([(None, None, p) for p in turns(3)], (2, 3, 9)),
    "rows and columns": ([(p, None, p, None) for p in swaps(3)] + [(None, p, None, p) for p in swaps(4)], (3, 4, 3, 4)),
    "sets of vectors": ([(p, None, p, None) for p in swaps(3)], (3, 2, 3, 2)),
    "invariant": ([(None, p) for p in swaps(4)], (2, 4)), "identity": ([(None, None)], (3, 2)),
    "graphs": (swaps(4), (4, 4, 4, 4)), "one axis": ([[1, 0, 2]], (3,)), "two lengths": ([([1, 0], [1, 2, 0])], (2, 3)),
}


@pytest.mark.parametrize("name", GROUPS)
def test_orbits_are_those_of_a_search(name):
    generators, shape = GROUPS[name]
    assert torch.equal(orbits(generators, shape), brute_force(generators, shape))


@pytest.mark.parametrize("name", GROUPS)
def test_the_number_of_orbits_is_burnsides(name):
    generators, shape = GROUPS[name]
    elements = group(generators, shape)
    fixed = sum(math.prod(sum(i == j for i, j in enumerate(p)) for p in element) for element in elements)
    assert fixed % len(elements) == 0
    assert int(orbits(generators, shape).max()) + 1 == fixed // len(elements)


@pytest.mark.parametrize("seed", range(20))
def test_random_generators(seed):
    generator = torch.Generator().manual_seed(seed)
    shape = tuple(torch.randint(1, 6, (1 + seed % 4,), generator=generator).tolist())
    generators = [tuple(None if torch.rand(1, generator=generator) < .3 else torch.randperm(n, generator=generator)
                        for n in shape) for _ in range(1 + seed % 3)]
    assert torch.equal(orbits(generators, shape), brute_force(generators, shape))


def test_long_cycles_and_long_chains_end():
    n = 3000
    assert torch.equal(orbits(shifts(n), (n,)), torch.zeros(n, dtype=torch.int64))
    neighbors = [list(range(n)) for _ in range(2)]  # swaps of neighbors, odd and even: one orbit through all
    for g, first in zip(neighbors, (0, 1)):
        for i in range(first, n - 1, 2): g[i], g[i + 1] = i + 1, i
    assert int(orbits(neighbors, (n,)).max()) == 0


def test_scipy_agrees():
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components
    p, n = torch.randperm(40), 1600
    to = (p[:, None] * 40 + p).flatten()
    graph = coo_matrix((np.ones(n), (np.arange(n), to.numpy())), shape=(n, n))
    count, labels = connected_components(graph, directed=False)
    assert torch.equal(orbits([p], (40, 40)).flatten(), torch.from_numpy(labels).long()) and count > 40


def bell(n): return 1 if n == 0 else sum(math.comb(n - 1, k) * bell(k) for k in range(n))


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_permutations_of_nodes_give_bell_numbers(order):
    assert int(orbits(swaps(5), (5,) * order).max()) + 1 == bell(order)


def test_forms_of_generators():
    expected = orbits([[1, 2, 0]], (3, 3))
    for same in (torch.tensor([[1, 2, 0]]), [(1, 2, 0)], [np.array([1, 2, 0])], [torch.tensor([1, 2, 0], dtype=torch.int32)],
                 [([1, 2, 0], [1, 2, 0])], [torch.tensor([[1, 2, 0], [1, 2, 0]])], iter([[1, 2, 0]]), ((1, 2, 0) for _ in "a"),
                 [[np.array([1, 2, 0]), torch.tensor([1, 2, 0])]], [[2, 0, 1]]):
        assert torch.equal(orbits(same, (3, 3)), expected)
    assert torch.equal(orbits([[1, 2, 0]], torch.Size([3, 3])), expected) and expected.dtype == torch.int64
    assert torch.equal(orbits([range(3)], [3]), torch.arange(3))
    with torch.device("meta"): assert torch.equal(orbits([[1, 2, 0]], (3, 3)), expected)
    assert len(shifts(2, 3)) == 2 and [len(f(3)) for f in (swaps, turns, flips)] == [2, 1, 1]
    for p in (*shifts(4, 5), *swaps(1), *swaps(2), *turns(4), *flips(4)): assert torch.equal(p.sort().values, torch.arange(len(p)))


def test_the_generators_do_what_they_say():
    x = torch.randn(4, 4)
    assert torch.equal(x.flatten()[turns(4)[0]].view(4, 4), x.rot90())
    assert torch.equal(x.flatten()[flips(4)[0]].view(4, 4), x.flip(1))
    assert torch.equal(x.flatten()[shifts(4, 4)[0]].view(4, 4), x.roll(-1, 0))
    assert torch.equal(x.flatten()[shifts(4, 4)[1]].view(4, 4), x.roll(-1, 1))
    assert len(group(swaps(4), (4,))) == 24 and len(group(turns(3) + flips(3), (9,))) == 8 and len(group(shifts(3, 4), (12,))) == 12


BAD = [
    (([], (3,)), ValueError, "generators: at least one is expected, got []"),
    ((None, (3,)), TypeError, "generators: a list of permutations"),
    (("abc", (3,)), TypeError, "generators: a list of permutations"),
    (([3], (3,)), TypeError, "generators[0]: a permutation, or a tuple"),
    ((torch.tensor([1, 2, 0]), (3,)), TypeError, "generators[0]: a permutation, or a tuple"),
    ((torch.tensor(1), (3,)), TypeError, "generators: a list of permutations"),
    (([[]], (3,)), ValueError, "generators[0]: one permutation (or None) for each of 1 axes is expected, got 0"),
    (([[0, 1]], (3,)), ValueError, "generators[0]: a permutation of 3 indices, as many as the axis has, is expected, got 2"),
    (([[0, 1, 1]], (3,)), ValueError, "generators[0]: a permutation of 0 to 2 is expected, got [0, 1, 1]"),
    (([[0, 1, 3]], (3,)), ValueError, "got [0, 1, 3]"),
    (([[0, 1, -1]], (3,)), ValueError, "got [0, 1, -1]"),
    (([[0, 1, 2.]], (3,)), TypeError, "generators[0]: a whole number is expected, got 2.0"),
    (([[0., 1., 2.]], (3,)), TypeError, "generators[0]"),
    (([[True, False]], (2,)), TypeError, "generators[0]"),
    (([torch.tensor([0., 1.])], (2,)), TypeError, "generators[0]: a tensor of whole numbers"),
    (([torch.tensor([0., torch.nan])], (2,)), TypeError, "generators[0]: a tensor of whole numbers"),
    (([torch.zeros(2, dtype=torch.long, device="meta")], (2,)), ValueError, "generators[0]: a tensor with values"),
    (([([0, 1],)], (2, 2)), ValueError, "generators[0]: one permutation (or None) for each of 2 axes is expected, got 1"),
    (([([0, 1], [0, 1], [0, 1])], (2, 2)), ValueError, "for each of 2 axes is expected, got 3"),
    (([([0, 1], [0, 1])], (2, 3)), ValueError, "generators[0][1]: a permutation of 3 indices"),
    (([[1, 0]], (2, 3)), ValueError, "generators[0]: a permutation of 3 indices"),
    (([[1, 0], [0, 0]], (2,)), ValueError, "generators[1]: a permutation of 0 to 1"),
    (([None], (2,)), TypeError, "generators[0]: a permutation, or a tuple"),
    (([[1, 0]], ()), ValueError, "shape: at least one axis"),
    (([[1, 0]], 2), TypeError, "shape: the length of each axis"),
    (([[1, 0]], (0,)), ValueError, "shape[0]: a whole number of at least 1 is expected, got 0"),
    (([[1, 0]], (2.,)), TypeError, "shape[0]: a whole number"),
    (([[1, 0]], torch.zeros(2)), TypeError, "shape: the length of each axis"),
]


@pytest.mark.parametrize("arguments, error, text", BAD)
def test_bad_generators(arguments, error, text):
    with pytest.raises(error) as raised: orbits(*arguments)
    assert text in str(raised.value)


@pytest.mark.parametrize("call", [lambda: shifts(), lambda: shifts(3, 0), lambda: swaps(0), lambda: turns(0), lambda: flips(-1)])
def test_sizes_of_groups(call):
    with pytest.raises(ValueError, match="expected, got"): call()


def test_types_of_sizes():
    for f in (shifts, swaps, turns, flips):
        with pytest.raises(TypeError, match="a whole number"): f(2.)


# --- share_orbits_: special cases, in value and gradient ------------------------------------------------------------

def equal_layers(layer, x, other, parameters, to_free):
    "Same output; and the gradient of `layer`'s free values is what `to_free` makes of that of the other's parameters."
    y, z = layer(x), other(x)
    torch.testing.assert_close(y, z)
    up = torch.randn_like(y)
    (y * up).sum().backward()
    grads = torch.autograd.grad((z * up).sum(), parameters)
    torch.testing.assert_close(to_free(*grads), [p.grad for p in layer.parameters()])


@pytest.mark.parametrize("bias", [True, False])
def test_cyclic_shifts_make_a_circular_convolution(bias):
    n = 7
    layer = nn.Linear(n, n, bias=bias, dtype=torch.float64)
    share_orbits_(layer, shifts(n))
    conv = nn.Conv1d(1, 1, n, padding=n // 2, padding_mode="circular", bias=bias, dtype=torch.float64)
    # row n // 2 of the circulant matrix is the filter
    with torch.no_grad():
        conv.weight.copy_(layer.weight[n // 2])
        if bias: conv.bias.copy_(layer.free_bias)
    if not bias: assert layer.bias is None and not hasattr(layer, "free_bias")
    at = orbits(shifts(n), (n, n))[n // 2]
    def to_free(weight, *bias): return [torch.zeros(n, dtype=torch.float64).index_add(0, at, weight.flatten()), *bias]
    equal_layers(layer, torch.randn(4, n, dtype=torch.float64), lambda x: conv(x[:, None])[:, 0], list(conv.parameters()), to_free)


def test_channels_and_a_small_filter():
    n, ins, outs, taps = 8, 2, 3, 3
    layer = nn.Linear(ins * n, outs * n, dtype=torch.float64)
    near = (torch.arange(n)[:, None] - torch.arange(n) + 1) % n < taps  # position j is a tap of position i
    keep = near[None, :, None].expand(outs, n, ins, n).reshape(outs * n, ins * n)
    share_orbits_(layer, [(None, p, None, p) for p in shifts(n)], (outs, n, ins, n), keep)
    assert layer.free_weight.shape == (outs * ins * taps,) and layer.free_bias.shape == (outs,)
    conv = nn.Conv1d(ins, outs, taps, padding=1, padding_mode="circular", dtype=torch.float64)
    index = layer.parametrizations.weight[0].index(layer.weight).view(outs, n, ins, n)[:, 1, :, :3].long()
    with torch.no_grad():
        conv.weight.copy_(layer.free_weight[index])
        conv.bias.copy_(layer.free_bias)
    def to_free(weight, bias): return [torch.zeros_like(layer.free_weight).index_add(0, index.flatten(), weight.flatten()), bias]
    equal_layers(layer, torch.randn(4, ins * n, dtype=torch.float64), lambda x: conv(x.view(4, ins, n)).flatten(1),
                 list(conv.parameters()), to_free)


def test_torus():
    h, w = 3, 5
    layer = nn.Linear(h * w, h * w, dtype=torch.float64)
    share_orbits_(layer, shifts(h, w))
    assert (len(layer.free_weight), len(layer.free_bias)) == (h * w, 1)
    conv = nn.Conv2d(1, 1, (h, w), padding=(1, 2), padding_mode="circular", dtype=torch.float64)
    middle = w + 2  # the flattened position (1, 2), whose row of the matrix is the filter
    at = orbits(shifts(h, w), (h * w, h * w))[middle]
    with torch.no_grad():
        conv.weight.copy_(layer.weight[middle].view(1, 1, h, w))
        conv.bias.copy_(layer.free_bias)
    def to_free(weight, bias): return [torch.zeros(h * w, dtype=torch.float64).index_add(0, at, weight.flatten()), bias]
    equal_layers(layer, torch.randn(4, h * w, dtype=torch.float64), lambda x: conv(x.view(4, 1, h, w)).flatten(1),
                 list(conv.parameters()), to_free)


def test_deep_sets():
    n = 6
    layer = nn.Linear(n, n, dtype=torch.float64)
    share_orbits_(layer, swaps(n))
    assert (len(layer.free_weight), len(layer.free_bias)) == (2, 1)
    on, off = layer.free_weight.detach()
    a, b, c = ((on - off).requires_grad_(), (n * off).requires_grad_(), layer.free_bias.detach().clone().requires_grad_())
    def to_free(a, b, c): return [torch.stack([a, n * b - a]), c]  # a = on - off, b = n * off
    equal_layers(layer, torch.randn(4, n, dtype=torch.float64), lambda x: a * x + b * x.mean(-1, keepdim=True) + c, (a, b, c), to_free)
    for p in torch.randperm(n), torch.randperm(n):
        assert equivariance_error(layer, lambda x: x[:, p], lambda x: x[:, p], torch.randn(3, n).double()) <= 1e-12


def test_sets_of_vectors():
    n, ins, outs = 5, 3, 2
    layer = nn.Linear(n * ins, n * outs, dtype=torch.float64)
    share_orbits_(layer, [(p, None, p, None) for p in swaps(n)], (n, outs, n, ins))
    assert (len(layer.free_weight), len(layer.free_bias)) == (2 * ins * outs, outs)
    blocks = layer.weight.detach().view(n, outs, n, ins)
    own, other = (blocks[0, :, j].clone().requires_grad_() for j in (0, 1))
    bias = layer.free_bias.detach().clone().requires_grad_()
    def direct(x):
        x = x.view(-1, n, ins)
        return (x @ (own - other).T + x.sum(1, keepdim=True) @ other.T + bias).flatten(1)
    at = orbits([(p, None, p, None) for p in swaps(n)], (n, outs, n, ins))
    def to_free(own, other, bias):
        zero = torch.zeros_like(layer.free_weight)
        return [zero.index_add(0, at[0, :, 0].flatten(), own.flatten()).index_add(0, at[0, :, 1].flatten(), other.flatten()), bias]
    equal_layers(layer, torch.randn(4, n * ins, dtype=torch.float64), direct, (own, other, bias), to_free)


def circulant(c): return torch.stack([c.roll(i) for i in range(len(c))])


def test_circulant_matrices():
    layer = nn.Linear(5, 5, bias=False)
    share_orbits_(layer, shifts(5))
    with torch.no_grad(): layer.free_weight.copy_(torch.arange(5.))
    assert torch.equal(layer.weight, circulant(torch.arange(5.)))
    x = torch.randn(3, 5)
    product = torch.fft.ifft(torch.fft.fft(x) * torch.fft.fft(torch.arange(5.)).conj()).real
    torch.testing.assert_close(layer(x), product)


@pytest.mark.parametrize("generators, free, turns_along, mirrors_along", [
    (turns(3), 3, True, True), (turns(3) + flips(3), 3, True, True), (flips(3), 6, False, True), (turns(5), 7, True, False)])
def test_a_filter_tied_under_rotations(generators, free, turns_along, mirrors_along):
    size = math.isqrt(len(generators[0]))
    conv = nn.Conv2d(2, 4, size, padding=size // 2)
    ties = share_orbits_(conv, [(None, None, p) for p in generators])
    assert len(conv.free_weight) == 8 * free and len(conv.free_bias) == 4 and len(ties) == 2
    x = torch.randn(2, 2, 9, 9)
    def turn(x): return x.rot90(1, (-2, -1))
    def mirror(x): return x.flip(-1)
    for f, along in ((turn, turns_along), (mirror, mirrors_along)):
        error = equivariance_error(conv, f, f, x)
        assert error <= 1e-6 if along else error > .05


def test_the_edges_of_a_turning_filter():
    conv = nn.Conv2d(1, 1, 3, bias=False)
    share_orbits_(conv, [(None, None, p) for p in turns(3)])
    corner, edge, center = conv.free_weight.detach().clone().requires_grad_().unbind()
    rows = [[corner, edge, corner], [edge, center, edge], [corner, edge, corner]]
    assert torch.equal(conv.weight[0, 0], torch.stack([torch.stack(row) for row in rows]))
    conv.weight.sum().backward()
    assert conv.free_weight.grad.tolist() == [4, 4, 1]


@pytest.mark.parametrize("generators, shape, layer", [
    (shifts(6), None, nn.Linear(6, 6)), (turns(3) + flips(3), None, nn.Linear(9, 9)),
    ([(p, None) for p in swaps(4)], None, nn.Linear(3, 4)), ([(None, p) for p in swaps(3)], None, nn.Linear(3, 4)),
    ([(torch.tensor([1, 2, 0]), torch.tensor([1, 0]))], None, nn.Linear(2, 3)),
    ([(p, p, None) for p in swaps(3)], None, nn.Conv1d(3, 3, 5)), ([(None, None, p) for p in flips(3)], None, nn.Conv2d(2, 2, 3)),
    ([(None, None, p) for p in shifts(2, 3, 2)], None, nn.Conv3d(1, 2, (2, 3, 2))),
    ([(torch.tensor([1, 0]), None, torch.tensor([1, 0]), None)], (2, 3, 2, 9), nn.Conv2d(4, 6, 3, groups=2, bias=False))])
def test_gradients_are_sums_over_orbits(generators, shape, layer):
    before = layer.weight.detach().clone()
    share_orbits_(layer, generators, shape)
    shape = shape or (*before.shape[:2], math.prod(before.shape[2:]))[:before.ndim]
    labels = orbits(generators, shape).flatten()
    mean = torch.zeros(int(labels.max()) + 1).index_add(0, labels, before.flatten()) / labels.bincount()
    torch.testing.assert_close(layer.free_weight.detach(), mean)
    assert torch.equal(layer.weight.flatten(), layer.free_weight[labels])
    up = torch.randn_like(before)
    (layer.weight * up).sum().backward()
    torch.testing.assert_close(layer.free_weight.grad, torch.zeros_like(mean).index_add(0, labels, up.flatten()))


# --- share_orbits_: as a tie ----------------------------------------------------------------------------------------

def shared(n=5, **options):
    layer = nn.Linear(n, n)
    share_orbits_(layer, shifts(n), **options)
    return layer


def test_the_first_entry_can_stay():
    layer, plain = nn.Linear(5, 5), None
    plain = deepcopy(layer)
    share_orbits_(layer, shifts(5), initial="first")
    assert torch.equal(layer.free_weight, plain.weight[0]) and torch.equal(layer.free_bias, plain.bias[:1])


def test_keep_leaves_zeros():
    keep = torch.eye(5, dtype=torch.bool) | torch.eye(5, dtype=torch.bool).roll(1, 1)
    layer = shared(keep=keep)
    assert layer.free_weight.shape == (2,) and torch.equal(layer.weight != 0, keep)
    layer.weight.sum().backward()
    assert layer.free_weight.grad.tolist() == [5, 5]


def test_ties_hold_and_are_counted():
    model = nn.Sequential(shared(), nn.ReLU(), nn.Linear(5, 2))
    assert len(check_ties(model)) == 2 and len(declared_ties(model)) == 2
    assert [n for n, _ in model[0].named_parameters()] == ["free_weight", "free_bias"]
    total = census(model, torch.randn(3, 5)).total
    assert total.stored == 5 + 1 + 12 and total.used == 25 + 5 + 12
    optimizer = torch.optim.Adam(model.parameters())
    check_ties(model, optimizer)
    model(torch.randn(3, 5)).sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, circulant(model[0].free_weight))
    del model[0].free_weight
    model[0].free_weight = nn.Parameter(torch.zeros(5))
    with pytest.raises(ValueError, match="free_weight"): check_ties(model)


def test_saved_and_loaded(tmp_path):
    model, twin = nn.Sequential(shared()), nn.Sequential(shared())
    save_model(model, tmp_path / "model.safetensors")
    assert not torch.equal(model[0].weight, twin[0].weight)
    load_model(twin, tmp_path / "model.safetensors")
    assert torch.equal(model[0].weight, twin[0].weight) and torch.equal(model[0].bias, twin[0].bias)
    from safetensors import safe_open
    with safe_open(tmp_path / "model.safetensors", "pt") as file: assert sorted(file.keys()) == ["0.free_bias", "0.free_weight"]
    with torch.device("meta"): empty = nn.Sequential(shared())
    load_model(empty, tmp_path / "model.safetensors")
    assert torch.equal(model[0].weight, empty[0].weight)
    with pytest.raises(ValueError): load_model(nn.Sequential(nn.Linear(5, 5)), tmp_path / "model.safetensors")


def test_state_dict_round_trip_and_a_plain_checkpoint():
    layer, twin, plain = shared(), shared(), nn.Linear(5, 5)
    assert twin.load_state_dict(layer.state_dict()).missing_keys == []
    assert torch.equal(layer.weight, twin.weight)
    with pytest.raises(RuntimeError, match="weight"): twin.load_state_dict(plain.state_dict())
    keep_ties(twin)
    twin.load_state_dict(plain.state_dict())
    torch.testing.assert_close(twin.weight.detach(), circulant(torch.stack([plain.weight.diagonal(i).sum() + plain.weight.diagonal(i - 5).sum()
                                                                   for i in range(5)]).detach() / 5))


@pytest.mark.parametrize("keep", [None, torch.eye(5, dtype=torch.bool)])
def test_copies(keep):
    layer, x = shared(keep=keep), torch.randn(2, 5)
    for copy in (deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copy(x), layer(x))
        check_ties(copy)
        with torch.no_grad(): copy.free_weight.fill_(1)
        assert not torch.equal(copy.weight, layer.weight)


@pytest.mark.parametrize("keep", [None, torch.eye(5, dtype=torch.bool)])
def test_devices_and_types(keep):
    layer = keep_ties(shared(keep=keep))
    state = deepcopy(layer.state_dict())
    assert layer.to("meta").weight.shape == (5, 5) and layer.weight.is_meta
    layer.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(layer.free_weight, state["free_weight"]) and torch.equal(layer.weight[1, 1], layer.free_weight[0])
    assert layer.half().weight.dtype == torch.float16 and layer.double().weight.dtype == torch.float64
    check_ties(layer)
    with torch.device("meta"): there = shared(keep=keep)
    assert there.weight.is_meta and there.free_weight.is_meta
    there.load_state_dict(state, assign=True)
    assert torch.equal(there.free_weight, state["free_weight"]) and not there.weight.is_meta
    assert torch.equal(there.weight[1, 1], there.free_weight[0])


def test_half_precision_means():
    layer = nn.Linear(300, 300, dtype=torch.bfloat16)
    mean = torch.stack([layer.weight.double().diagonal().mean(), (layer.weight.double().sum() - layer.weight.double().trace()) / 300 / 299])
    share_orbits_(layer, swaps(300))
    torch.testing.assert_close(layer.free_weight.detach().double(), mean.detach(), rtol=.01, atol=1e-8)


@pytest.mark.long
@pytest.mark.parametrize("make", [lambda: shared(), lambda: shared(keep=torch.eye(5, dtype=torch.bool))])
def test_compile_and_autocast(make):
    layer, x = make(), torch.randn(2, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    grad, layer.free_weight.grad = layer.free_weight.grad, None
    layer(x).sum().backward()
    torch.testing.assert_close(grad, layer.free_weight.grad)
    with torch.autocast("cpu", torch.bfloat16): assert layer(x).dtype == torch.bfloat16


def test_functional_calls_and_gradcheck():
    orbit = Orbit(torch.tensor([[0, 1, -1], [1, 0, 2]]))
    assert torch.autograd.gradcheck(orbit, torch.randn(3, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradgradcheck(orbit, torch.randn(3, dtype=torch.float64, requires_grad=True))
    layer, x = shared(), torch.randn(5)
    parameters = {k: v.detach() for k, v in layer.named_parameters()}
    def f(p): return torch.func.functional_call(layer, p, x)
    assert torch.func.jacrev(f)(parameters)["free_weight"].shape == (5, 5)


def test_inverse_is_the_least_squares_projection():
    orbit, member = Orbit(torch.tensor([[0, 1, -1], [1, 0, 0]])), torch.randn(2, 3, dtype=torch.float64)
    design = torch.stack([orbit(e).flatten() for e in torch.eye(2, dtype=torch.float64)], 1)
    torch.testing.assert_close(orbit.inverse(member), torch.linalg.lstsq(design, member.flatten()[:, None]).solution[:, 0])
    values = torch.randn(2)
    torch.testing.assert_close(orbit.inverse(orbit(values)), values)
    assert Orbit(torch.zeros(2, 2, dtype=torch.long)).inverse(torch.ones(2, 2, dtype=torch.complex64)).tolist() == [1]


def test_frozen_weights_stay_frozen():
    layer = nn.Linear(4, 4)
    layer.weight.requires_grad_(False)
    share_orbits_(layer, shifts(4))
    assert not layer.free_weight.requires_grad and layer.free_bias.requires_grad


def test_ties_can_go_on():
    model = nn.Sequential(shared(), shared())
    tie_(model, ["0.free_weight", "1.free_weight"])
    assert torch.equal(model[0].weight, model[1].weight)
    check_ties(model)
    untie_(model[1], "weight")
    with torch.no_grad(): model[1].weight.add_(torch.randn(5, 5))
    assert not torch.equal(model[0].weight, model[1].weight)


def weight_normed():
    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))


def taken():
    layer = nn.Linear(4, 4)
    layer.free_bias = 3
    return layer


@pytest.mark.parametrize("make, options, error, text", [
    (lambda: nn.ReLU(), {}, TypeError, "layer: nn.Linear, nn.Conv1d, nn.Conv2d or nn.Conv3d is expected, got ReLU"),
    (lambda: nn.ConvTranspose1d(4, 4, 1), {}, TypeError, "layer: nn.Linear"),
    (lambda: None, {}, TypeError, "layer: nn.Linear"),
    (weight_normed, {}, ValueError, "layer: a weight that is a plain Parameter"),
    (lambda: shared(4), {}, ValueError, "layer: a weight that is a plain Parameter"),
    (lambda: nn.LazyLinear(4), {}, ValueError, "got UninitializedParameter"),
    (taken, {}, ValueError, "layer: no attribute free_bias"),
    (lambda: nn.Linear(4, 4), dict(generators=[]), ValueError, "generators: at least one"),
    (lambda: nn.Linear(4, 4), dict(generators=shifts(3)), ValueError, "generators[0]: a permutation of 4 indices"),
    (lambda: nn.Linear(3, 4), {}, ValueError, "generators[0]: a permutation of 3 indices"),
    (lambda: nn.Conv2d(1, 1, 3), dict(generators=[(p, p) for p in shifts(1)]), ValueError, "for each of 3 axes is expected, got 2"),
    (lambda: nn.Linear(4, 4), dict(shape=(4, 5)), ValueError, "shape: 16 entries, as the weight (4, 4) has, is expected, got (4, 5)"),
    (lambda: nn.Linear(4, 4), dict(shape=(2, 8), generators=[(None, shifts(8)[0])]), ValueError, "product is the 4 outputs are expected, got (2, 8)"),
    (lambda: nn.Linear(4, 4), dict(keep=torch.ones(4, 3, dtype=torch.bool)), ValueError, "keep: a tensor of shape (4, 4)"),
    (lambda: nn.Linear(4, 4), dict(keep=torch.ones(4, 4)), TypeError, "keep: a tensor of bool"),
    (lambda: nn.Linear(4, 4), dict(keep=torch.zeros(4, 4, dtype=torch.bool)), ValueError, "keep: at least one orbit"),
    (lambda: nn.Linear(4, 4), dict(keep=torch.ones(4, 4).tril() > 0), ValueError, "keep: whole orbits are expected, got only parts of 3 of 4"),
    (lambda: nn.Linear(4, 4), dict(keep=torch.ones(4, 4, dtype=torch.bool, device="meta")), ValueError, "keep: a tensor with values"),
    (lambda: nn.Linear(4, 4), dict(initial="sum"), ValueError, "initial: one of 'mean', 'first'"),
    (lambda: nn.Linear(4, 4), dict(initial=None), TypeError, "initial: one of"),
])
def test_bad_input_of_sharing_changes_nothing(make, options, error, text):
    layer = make()
    before = dict(layer.__dict__, names=[*layer.state_dict()]) if layer is not None else None
    with pytest.raises(error) as raised: share_orbits_(layer, **({"generators": shifts(4)} | options))
    assert text in str(raised.value)
    if layer is not None: assert [*layer.state_dict()] == before["names"] and before["_modules"] is layer._modules


@pytest.mark.parametrize("labels, error", [
    (torch.tensor([0, 2]), ValueError), (torch.tensor([-1, -1]), ValueError), (torch.tensor([-2, 0]), ValueError),
    (torch.tensor([1, 2]), ValueError), (torch.tensor([0.]), TypeError), ([0, 1], TypeError),
    (torch.zeros(0, dtype=torch.long), ValueError), (torch.tensor([True]), TypeError),
    (torch.zeros(2, dtype=torch.long, device="meta"), ValueError)])
def test_labels(labels, error):
    with pytest.raises(error, match="labels"): Orbit(labels)


def test_orbits_refuse_other_sizes():
    map = Orbit(torch.tensor([[0, 1], [1, 0]]))
    for wrong in (torch.zeros(3), torch.zeros(1), torch.zeros(1, 2)):
        with pytest.raises(ValueError, match=r"source: a tensor of shape \(2,\) is expected"): map(wrong)
    with pytest.raises(ValueError, match=r"member: a tensor of shape \(2, 2\) is expected"): map.inverse(torch.zeros(5))


def test_generators_keep_groups_together():
    p = torch.tensor([2, 3, 0, 1])  # swaps the two groups
    conv = nn.Conv1d(4, 4, 1, groups=2)
    share_orbits_(conv, [(p, None, None)])
    x, swap = torch.randn(3, 4, 5), lambda x: x[:, p]
    assert equivariance_error(conv, swap, swap, x) <= 1e-6
    conv = nn.Conv1d(4, 4, 1, groups=2)
    names = list(conv.state_dict())
    with pytest.raises(ValueError, match=r"generators\[1\]: outputs of each of 2 groups to one group"):
        share_orbits_(conv, [(p, None, None), (torch.tensor([1, 2, 3, 0]), None, None)])
    assert list(conv.state_dict()) == names


def test_wide_blurs_and_a_transformation_that_returns_nothing():
    assert abs(BlurPool2d(2000).kernel.sum().item() - 1) < 1e-3
    with pytest.raises(TypeError, match="transform_in: a function that returns a tensor is expected, got None"):
        equivariance_error(nn.Identity(), lambda x: None, lambda x: x, torch.ones(1, 2))


def test_orbits_of_nan_are_refused():
    layer = nn.Linear(4, 4)
    with torch.no_grad(): layer.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="weight: finite numbers are expected"): share_orbits_(layer, shifts(4))
    assert set(dict(layer.named_parameters())) == {"weight", "bias"}
