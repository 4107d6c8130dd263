"""Group convolutions against naive loops, orbits and each other; what they live through; what they refuse."""
import copy
import gc
import io
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sharetie.rotations as rotations
from sharetie.census import census
from sharetie.rotations import (GROUPS, FilterBank, GroupConv2d, GroupPool, P4CNN, Z2CNN, compose, inverse, rotate,
                                turn_image, turn_maps)
from sharetie.orbits import orbits, share_orbits_
from sharetie.symmetry import equivariance_error
from sharetie.ties import tie_

KINDS = list(itertools.product(GROUPS, (True, False)))


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


def maps(group, lifting, channels=3, height=7, batch=2, **options):
    "An input for a layer of that kind."
    return torch.randn(batch, channels, *([] if lifting else [GROUPS[group]]), height, height, **options)


def naive(x, weight, bias, group, stride=1, padding=0):
    "Equations 10 and 11 of Cohen and Welling, element by element and input map by input map."
    table = {s: (lambda f, s=s: torch.rot90(f.flip(-1) if s > 3 else f, s % 4, (-2, -1))) for s in range(8)}
    mark = torch.arange(9).view(3, 3)
    def product(s, t): return next(u for u in range(8) if torch.equal(table[u](mark), table[s](table[t](mark))))
    outs = []
    for s in range(GROUPS[group]):
        if x.ndim == 4: y = F.conv2d(x, table[s](weight), bias, stride, padding)
        else:
            back = next(u for u in range(8) if product(u, s) == 0)
            y = sum(F.conv2d(x[:, :, t], table[s](weight[:, :, product(back, t)]), None, stride, padding) for t in range(x.shape[2]))
            y = y if bias is None else y + bias.view(-1, 1, 1)
        outs.append(y)
    return torch.stack(outs, 2)


# The group

def test_elements_form_a_group():
    image = torch.arange(9).view(3, 3)
    assert len({tuple(turn_image(image, s).flatten().tolist()) for s in range(8)}) == 8
    for s, t, u in itertools.product(range(8), repeat=3):
        assert torch.equal(turn_image(turn_image(image, t), s), turn_image(image, compose(s, t)))
        assert compose(s, compose(t, u)) == compose(compose(s, t), u)
    for s in range(8): assert compose(s, inverse(s)) == compose(inverse(s), s) == 0
    assert all(compose(s, t) < 4 for s, t in itertools.product(range(4), repeat=2))


@pytest.mark.parametrize("group", GROUPS)
def test_turn_maps_is_an_action(group):
    x = maps(group, False)
    assert torch.equal(turn_maps(x, 0), x)
    for s, t in itertools.product(range(GROUPS[group]), repeat=2):
        assert torch.equal(turn_maps(turn_maps(x, t), s), turn_maps(x, compose(s, t)))


def test_turn_image_turns_counterclockwise_and_mirrors_left_to_right():
    image = torch.tensor([[1, 2], [3, 4]])
    assert turn_image(image, 1).tolist() == [[2, 4], [1, 3]]
    assert turn_image(image, 4).tolist() == [[2, 1], [4, 3]]
    assert turn_image(image, 5).tolist() == [[1, 3], [2, 4]]


# The bank

@pytest.mark.parametrize("group, lifting", KINDS)
def test_bank_and_inverse(group, lifting):
    bank, size = FilterBank(2, 3, group, lifting), GROUPS[group]
    weight = torch.randn(5, *bank.filters)
    used = bank(weight).view(5, size, 2, -1, 3, 3)
    for s in range(size):
        one = turn_image(weight[:, :, None], s) if lifting else turn_maps(weight, s)
        assert torch.equal(used[:, s], one)
    torch.testing.assert_close(bank.inverse(bank(weight)), weight)
    member = torch.randn(5 * size, *bank.taken)
    off = member - bank(bank.inverse(member))  # a projection: the rest is orthogonal to every bank
    torch.testing.assert_close((off * bank(weight)).sum(), torch.tensor(0.), atol=1e-4, rtol=0)


@pytest.mark.parametrize("group, lifting", KINDS)
def test_bank_makes_a_tie(group, lifting):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            bank = FilterBank(3, 2, group, lifting)
            self.filter, self.conv = nn.Parameter(torch.randn(4, *bank.filters)), nn.Conv2d(bank.taken[0], 4 * GROUPS[group], 2, bias=False)
            tie_(self, ["filter", "conv.weight"], bank)
    tied, layer, x = Tied(), GroupConv2d(3, 4, 2, group, lifting, bias=False), maps(group, lifting)
    with torch.no_grad(): layer.weight.copy_(tied.filter)
    torch.testing.assert_close(layer(x).flatten(1, 2), tied.conv(x if lifting else x.flatten(1, 2)))
    assert copy.deepcopy(tied).conv.weight.equal(tied.conv.weight)


def test_bank_lives_through_meta_and_to_empty():
    with torch.device("meta"): layer = GroupConv2d(2, 3, 3)
    x = torch.randn(1, 2, 4, 5, 5)
    assert layer(x.to("meta")).shape == (1, 3, 4, 3, 3)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    torch.testing.assert_close(layer(x), naive(x, layer.weight, layer.bias, "p4"), atol=1e-5, rtol=1e-5)
    with torch.device("meta"): other = GroupConv2d(2, 3, 3)
    other.load_state_dict(layer.state_dict(), assign=True)
    assert other(x).equal(layer(x))


# The layer

@pytest.mark.parametrize("group, lifting", KINDS)
@pytest.mark.parametrize("k, stride, padding, height", [(1, 1, 0, 5), (2, 1, 0, 5), (3, 1, 1, 6), (3, 2, 0, 7), (4, 2, 2, 6), (5, 3, 2, 7), (3, 1, 0, 3)])
def test_layer_equals_the_naive_loop(group, lifting, k, stride, padding, height):
    layer = GroupConv2d(3, 2, k, group, lifting, stride, padding, dtype=torch.float64)
    x = maps(group, lifting, height=height, dtype=torch.float64, requires_grad=True)
    weight, bias = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))
    y, expected = layer(x), naive(x, weight, bias, group, stride, padding)
    torch.testing.assert_close(y, expected)
    up = torch.randn_like(y)
    ours = torch.autograd.grad(y, [x, layer.weight, layer.bias], up)
    for a, b in zip(ours, torch.autograd.grad(expected, [x, weight, bias], up)): torch.testing.assert_close(a, b)


@pytest.mark.parametrize("group, lifting", KINDS)
def test_gradients(group, lifting):
    layer = GroupConv2d(1, 1, 2, group, lifting, dtype=torch.float64)
    def f(x, weight, bias): return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)
    inputs = maps(group, lifting, 1, 3, 1, dtype=torch.float64, requires_grad=True), layer.weight, layer.bias
    assert torch.autograd.gradcheck(f, inputs) and torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("group, lifting", KINDS)
def test_forward_mode_and_hessian(group, lifting):
    layer, x = GroupConv2d(1, 1, 2, group, lifting, dtype=torch.float64), maps(group, lifting, 1, 3, 1, dtype=torch.float64)
    bias = layer.bias.detach()
    def f(weight): return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)
    def g(weight): return naive(x, weight, bias, group)
    w, v = layer.weight.detach(), torch.randn_like(layer.weight)
    torch.testing.assert_close(torch.func.jvp(f, (w,), (v,)), torch.func.jvp(g, (w,), (v,)))
    if group == "p4" and lifting:
        torch.testing.assert_close(*(torch.func.hessian(lambda w: h(w).pow(2).sum())(w) for h in (f, g)))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("k, stride, padding", [(2, 1, 0), (3, 1, 1), (4, 1, 2), (5, 1, 0), (3, 2, 0), (2, 3, 1)])
def test_equivariant_to_1e_5_for_every_element(group, k, stride, padding):
    net = nn.Sequential(GroupConv2d(3, 4, k, group, True, stride, padding), nn.ReLU(), GroupConv2d(4, 3, k, group, padding=padding))
    x = torch.randn(2, 3, 15, 15)
    with torch.no_grad(): net(x)
    for s in range(GROUPS[group]):
        for f in (net, net[0]):
            assert equivariance_error(f, lambda x: turn_image(x, s), lambda y: turn_maps(y, s), x) < 1e-5
    assert equivariance_error(net, lambda x: turn_image(x, 1), lambda y: turn_image(y, 1), x) > .1  # the order counts


def test_a_plain_convolution_is_not_equivariant():
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Unflatten(1, (1, 4)))
    assert equivariance_error(conv, lambda x: turn_image(x, 1), lambda y: turn_maps(y, 1), torch.randn(2, 3, 6, 6)) > .1


@pytest.mark.parametrize("group", GROUPS)
def test_layer_is_a_dense_layer_shared_on_orbits(group):
    size, h = GROUPS[group], 3
    n = size * h * h
    cells = torch.arange(n).view(1, 1, size, h, h)
    moves = [turn_maps(cells, s).flatten() for s in ([1] if group == "p4" else [1, 4])]
    moves += [cells.roll(1, -1).flatten(), cells.roll(1, -2).flatten()]
    labels = orbits(moves, (n, n))
    layer = GroupConv2d(1, 1, 3, group, dtype=torch.float64)
    dense = nn.Linear(n, n, dtype=torch.float64)
    share_orbits_(dense, moves)
    assert dense.free_weight.numel() == layer.weight.numel() == int(labels.max()) + 1
    assert dense.free_bias.numel() == 1
    def torus(x): return layer(F.pad(x.flatten(1, 2), [1] * 4, "circular").unflatten(1, (1, size)))
    marked = copy.deepcopy(layer)
    with torch.no_grad(): marked.weight.copy_(torch.arange(1., 1 + layer.weight.numel()).view_as(layer.weight)); marked.bias.zero_()
    layer, kept = marked, layer
    with torch.no_grad(): matrix = torus(torch.eye(n, dtype=torch.float64).view(n, 1, size, h, h)).view(n, n).T.round().long() - 1
    layer = kept
    assert len({*zip(labels.flatten().tolist(), matrix.flatten().tolist())}) == layer.weight.numel()
    with torch.no_grad():
        layer.weight.view(-1)[matrix.flatten()] = dense.weight.flatten()
        layer.bias.copy_(dense.free_bias)
    x = torch.randn(2, 1, size, h, h, dtype=torch.float64, requires_grad=True)
    y, expected = torus(x).flatten(1), dense(x.flatten(1))
    torch.testing.assert_close(y, expected)
    up = torch.randn_like(y)
    ours = torch.autograd.grad(y, [x, layer.weight, layer.bias], up)
    theirs = torch.autograd.grad(expected, [x, dense.free_weight, dense.free_bias], up)
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1].view(-1)[matrix.flatten()], theirs[1][labels.flatten()])
    torch.testing.assert_close(ours[2], theirs[2])


@pytest.mark.parametrize("group, lifting", KINDS)
def test_layer_is_a_convolution_shared_on_orbits(group, lifting):
    size = GROUPS[group]
    def moved(channels, s, size=size): return turn_maps(torch.arange(size * channels).view(1, channels, size, 1, 1), s).flatten()
    taps = torch.arange(9).view(3, 3)
    elements = [1] if group == "p4" else [1, 4]
    conv = nn.Conv2d(3 if lifting else 3 * size, 2 * size, 3)
    share_orbits_(conv, [(moved(2, s), None if lifting else moved(3, s), turn_image(taps, s).flatten()) for s in elements])
    layer, x = GroupConv2d(3, 2, 3, group, lifting), maps(group, lifting)
    assert (conv.free_weight.numel(), conv.free_bias.numel()) == (layer.weight.numel(), 2)
    with torch.no_grad():
        layer.weight.copy_(layer.bank.inverse(conv.weight))
        layer.bias.copy_(conv.free_bias)
    torch.testing.assert_close(layer(x).flatten(1, 2), conv(x if lifting else x.flatten(1, 2)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("group, lifting", KINDS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_census(group, lifting, mode):
    layer, x = GroupConv2d(3, 5, 3, group, lifting, bias=False).eval(), maps(group, lifting, height=3)
    with mode():
        layer(x)  # the bank may be kept now, and must not hide the weight
        found = census(layer, x)
    assert found.stored == layer.weight.numel() and found.used == GROUPS[group] * found.stored


@pytest.mark.parametrize("group, lifting", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_as_conv2d(group, lifting, bias):
    layer, x = GroupConv2d(3, 2, 3, group, lifting, 2, 1, bias, dtype=torch.float64), maps(group, lifting, dtype=torch.float64)
    plain = layer.as_conv2d()
    y = layer(x).flatten(1, 2).detach()
    torch.testing.assert_close(plain(x if lifting else x.flatten(1, 2)), y)
    with torch.no_grad(): layer.weight.zero_()
    torch.testing.assert_close(plain(x if lifting else x.flatten(1, 2)), y)  # untied


def test_one_call_of_conv2d(monkeypatch):
    calls, real = [], F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *a, **k: calls.append(1) or real(*a, **k))
    GroupConv2d(3, 5, 3, "p4m")(maps("p4m", False))
    assert len(calls) == 1


def test_initialization_is_that_of_a_convolution():
    layer = GroupConv2d(8, 64, 3)
    bound = (8 * 4 * 9) ** -.5
    assert layer.weight.abs().max() <= bound and layer.weight.std().item() == pytest.approx(bound / 3 ** .5, rel=.02)
    assert layer.bias.abs().max() <= bound


# What keeps equivariance

@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("how", ["max", "mean"])
def test_pool_norm_and_max_pool(group, how):
    net = nn.Sequential(GroupConv2d(2, 3, 3, group, True), nn.BatchNorm3d(3), nn.ReLU(), nn.MaxPool3d((1, 2, 2)),
                        GroupConv2d(3, 4, 2, group), GroupPool(how))
    x = torch.randn(3, 2, 8, 8)
    for _ in range(3): net.train()(x)
    for s in range(GROUPS[group]):
        assert equivariance_error(net, lambda x: turn_image(x, s), lambda y: turn_image(y, s), x) < 1e-5
    train = [net.train()(turn_image(x, s)) for s in (0, 1)]  # with the batch's own means, too
    torch.testing.assert_close(train[1], turn_image(train[0], 1), atol=1e-5, rtol=1e-5)


def test_pool_values():
    x = torch.randn(2, 3, 4, 5, 5)
    assert GroupPool()(x).equal(x.max(2).values) and GroupPool("mean")(x).equal(x.mean(2))


@pytest.mark.parametrize("group", GROUPS)
def test_networks(group):
    net, x = P4CNN(channels=4, group=group), torch.randn(2, 1, 28, 28)
    assert net(x).shape == Z2CNN()(x).shape == (2, 10)
    for s in range(GROUPS[group]): assert equivariance_error(net, lambda x: turn_image(x, s), lambda y: y, x) < 1e-5


def test_budget_of_the_paper():
    count = {net: sum(p.numel() for p in net().parameters() if p.ndim > 1) for net in (Z2CNN, P4CNN)}
    assert list(count.values()) == [21_380, 24_490]
    assert sum(m.p > 0 for m in Z2CNN().modules() if isinstance(m, nn.Dropout)) == 5


def test_rotate():
    x = torch.rand(8, 1, 9, 9)
    exact = rotate(x, torch.arange(8) * 90.)
    for i in range(8): torch.testing.assert_close(exact[i], turn_image(x[i], i % 4), atol=1e-4, rtol=0)
    smooth = torch.exp(-((torch.arange(29.) - 14) ** 2 / 40))
    round_ = (smooth[:, None] * smooth)[None, None]
    torch.testing.assert_close(rotate(round_, torch.tensor([33.])), round_, atol=1e-2, rtol=0)


# The kept bank

def expected(layer, x):
    "What a layer must give, in a way that keeps nothing."
    with torch.enable_grad(): return layer(x).detach()


def test_bank_is_kept_in_inference_and_made_once():
    layer, x = GroupConv2d(2, 3, 3), torch.randn(1, 2, 4, 5, 5)
    made = []
    layer.bank.register_forward_hook(lambda *a: made.append(1))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(): a, b = layer(x), layer(x)
        assert a.equal(b)
    assert len(made) == 1
    layer(x)
    assert len(made) == 2 and layer not in rotations._BANKS


CHANGES = {
    "in place": lambda l: l.weight.mul_(2),
    "through data": lambda l: l.weight.data.mul_(2),
    "one entry": lambda l: l.weight.data.view(-1)[-1].add_(1),
    "through numpy": lambda l: l.weight.detach().numpy().__imul__(2),
    "another data": lambda l: setattr(l.weight, "data", torch.randn_like(l.weight)),
    "another Parameter": lambda l: setattr(l, "weight", nn.Parameter(torch.randn_like(l.weight))),
    "state dict": lambda l: l.load_state_dict({k: torch.randn_like(v) for k, v in l.state_dict().items()}),
    "state dict, assigned": lambda l: l.load_state_dict({k: torch.randn_like(v) for k, v in l.state_dict().items()}, assign=True),
    "bias": lambda l: l.bias.mul_(2),
    "no bias": lambda l: setattr(l, "bias", None),
    "NaN": lambda l: l.weight.data.fill_(float("nan")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_kept_bank_follows_every_change(change):
    layer, x = GroupConv2d(2, 3, 3).eval(), torch.randn(1, 2, 4, 5, 5)
    with torch.no_grad():
        before = layer(x)
        change(layer)
        after = layer(x)
    torch.testing.assert_close(after, expected(layer, x), equal_nan=True)
    assert not after.equal(before)


def test_kept_bank_follows_the_type():
    layer, x = GroupConv2d(2, 3, 3).eval(), torch.randn(1, 2, 4, 5, 5)
    with torch.no_grad():
        layer.weight.zero_()  # the same bits in every type
        layer(x)
        assert layer.double()(x.double()).dtype == torch.float64
        layer.weight.fill_(1.)
        layer(x.double())
        assert layer.half()(x.half()).dtype == torch.float16
        assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_kept_bank_belongs_to_one_layer_only():
    layer, x = GroupConv2d(2, 3, 3).eval(), torch.randn(1, 2, 4, 5, 5)
    with torch.no_grad():
        layer(x)
        twin = copy.deepcopy(layer)
        twin.weight.mul_(2)
        assert not twin(x).equal(layer(x))
        torch.testing.assert_close(twin(x), expected(twin, x))
        again = pickle.loads(pickle.dumps(layer))
        assert again(x).equal(layer(x))
        layers = [layer, twin, again]
        for one in layers: one(x)
    assert all(one in rotations._BANKS for one in layers)
    del layer, twin, again, one, layers
    gc.collect()
    assert not rotations._BANKS


def test_kept_bank_and_function_transforms():
    layer, x = GroupConv2d(2, 3, 3).eval(), torch.randn(1, 2, 4, 5, 5)
    weights = torch.randn(4, *layer.weight.shape)
    with torch.no_grad():
        layer(x)
        many = torch.vmap(lambda w: torch.func.functional_call(layer, {"weight": w}, x))(weights)
        torch.testing.assert_close(torch.vmap(lambda x: layer(x[None])[0])(x.expand(3, -1, -1, -1, -1)), layer(x).expand(3, -1, -1, -1, -1))
    for w, y in zip(weights, many):
        layer.weight.data.copy_(w)
        torch.testing.assert_close(expected(layer, x), y, atol=1e-5, rtol=1e-5)


# What the layer lives through

def test_state_dict_round_trip():
    layer, x = GroupConv2d(2, 3, 3, "p4m", padding=1), torch.randn(1, 2, 8, 5, 5)
    assert list(layer.state_dict()) == ["weight", "bias"]
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = GroupConv2d(2, 3, 3, "p4m", padding=1)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other(x).equal(layer(x))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_compile(mode):
    net = nn.Sequential(GroupConv2d(2, 3, 3, lifting=True), nn.ReLU(), GroupConv2d(3, 2, 3), GroupPool())
    x = torch.randn(2, 2, 8, 8)
    fast = torch.compile(net, fullgraph=True, backend="eager")
    with mode():
        torch.testing.assert_close(fast(x), net(x))
        with torch.no_grad(): net[0].weight.mul_(2)
        torch.testing.assert_close(fast(x), net(x))


def test_export():
    layer, x = GroupConv2d(2, 3, 3).eval(), torch.randn(1, 2, 4, 5, 5)
    with torch.no_grad(): layer(x)
    program = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(program(x), layer(x))


def test_autocast():
    layer, x = GroupConv2d(2, 3, 3), torch.randn(1, 2, 4, 5, 5)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), torch.autocast("cpu", torch.bfloat16): y = layer(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), layer(x), atol=.05, rtol=.05)


def test_memory_format_and_views():
    layer, x = GroupConv2d(2, 3, 3, lifting=True), torch.randn(3, 2, 6, 6)
    y = layer(x)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), y)
    torch.testing.assert_close(copy.deepcopy(layer).to(memory_format=torch.channels_last)(x), y)
    with torch.no_grad(): torch.testing.assert_close(copy.deepcopy(layer).to(memory_format=torch.channels_last)(x), y)


def last_maps(group, lifting, **options):
    "Maps whose channels lie last in memory."
    x = maps(group, lifting, **options)
    return (x if lifting else x.flatten(1, 2)).contiguous(memory_format=torch.channels_last).view(x.shape)


@pytest.mark.parametrize("group, lifting", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_channels_last_in_and_out(group, lifting, dtype):
    layer = GroupConv2d(3, 2, 3, group, lifting, padding=1, dtype=dtype)
    x = last_maps(group, lifting, dtype=dtype)
    results = []
    for z in (x.detach().clone(), x.contiguous()):
        y = layer(z.requires_grad_())
        results.append([y, *torch.autograd.grad(y.square().sum(), [z, layer.weight, layer.bias])])
    for a, b in zip(*results): torch.testing.assert_close(a, b, atol=1e-3 if dtype == torch.float32 else 1e-9, rtol=1e-4)
    if dtype == torch.float32:
        assert results[0][0].flatten(1, 2).is_contiguous(memory_format=torch.channels_last)
        assert results[0][0].flatten(1, 2).data_ptr() == results[0][0].data_ptr()  # a view, no copy
    assert results[1][0].is_contiguous()
    with torch.no_grad():
        for z in (x, x.contiguous(), x): torch.testing.assert_close(layer(z), results[0][0])


def test_bank_with_channels_last():
    bank = FilterBank(3, 3, "p4m")
    weight = torch.randn(2, *bank.filters, dtype=torch.float64, requires_grad=True)
    assert bank(weight, True).equal(bank(weight)) and bank(weight).is_contiguous()
    assert bank(weight, True).is_contiguous(memory_format=torch.channels_last)
    up = torch.randn_like(bank(weight))
    torch.testing.assert_close(*(torch.autograd.grad(bank(weight, last), weight, up) for last in (True, False)))
    small = FilterBank(1, 2, lifting=True)
    x = torch.randn(1, *small.filters, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: small(w, True), x, check_forward_ad=True) and torch.autograd.gradgradcheck(lambda w: small(w, True), x)


def test_channels_last_and_function_transforms():
    layer, x = GroupConv2d(3, 2, 3), last_maps("p4", False)
    def f(weight): return torch.func.functional_call(layer, {"weight": weight}, x)
    weights = torch.randn(4, *layer.weight.shape)
    torch.testing.assert_close(torch.func.vmap(f)(weights), torch.stack([f(w) for w in weights]), atol=1e-4, rtol=1e-4)
    w, v = weights[0], weights[1]
    torch.testing.assert_close(torch.func.jvp(f, (w,), (v,))[1], f(v) - f(torch.zeros_like(v)), atol=1e-4, rtol=1e-4)


def test_empty_batch():
    layer = GroupConv2d(2, 3, 3)
    y = layer(torch.zeros(0, 2, 4, 5, 5))
    assert y.shape == (0, 3, 4, 3, 3)
    y.sum().backward()
    assert layer.weight.grad.eq(0).all()


def test_training_step_learns():
    net = nn.Sequential(GroupConv2d(1, 4, 3, lifting=True), nn.ReLU(), GroupConv2d(4, 1, 3), GroupPool(), nn.Flatten())
    x, y = torch.randn(16, 1, 5, 5), torch.randn(16, 1)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.mse_loss(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < .5 * losses[0]


def test_repr():
    assert repr(GroupConv2d(2, 3, 5, "p4m", lifting=True, stride=2, bias=False)).startswith(
        "GroupConv2d(\n  2, 3, 5, 'p4m', lifting=True, stride=2, bias=False")


# Bad input

@pytest.mark.parametrize("options, error, words", [
    (dict(in_channels=0), ValueError, "in_channels: a whole number of at least 1 is expected, got 0"),
    (dict(in_channels=1.5), TypeError, "in_channels: a whole number"),
    (dict(out_channels=-1), ValueError, "out_channels"),
    (dict(out_channels=True), TypeError, "out_channels"),
    (dict(kernel_size=0), ValueError, "kernel_size"),
    (dict(kernel_size=(3, 3)), TypeError, "kernel_size"),
    (dict(group="p6"), ValueError, "group: one of 'p4', 'p4m' is expected, got 'p6'"),
    (dict(group=4), TypeError, "group"),
    (dict(lifting=1), TypeError, "lifting: True or False is expected, got 1"),
    (dict(stride=0), ValueError, "stride"),
    (dict(padding=-1), ValueError, "padding"),
    (dict(padding="same"), TypeError, "padding"),
    (dict(bias=None), TypeError, "bias"),
])
def test_bad_arguments(options, error, words):
    with pytest.raises(error) as caught: GroupConv2d(**{"in_channels": 2, "out_channels": 3, "kernel_size": 3, **options})
    assert words in str(caught.value)


@pytest.mark.parametrize("x, error, words", [
    (torch.zeros(1, 2, 4, 5, 6), ValueError, "got (5, 6)"),
    (torch.zeros(1, 3, 4, 5, 5), ValueError, "x: a tensor of 2 channels is expected, got 3"),
    (torch.zeros(1, 2, 8, 5, 5), ValueError, "x: an axis 2 of 4 elements, as p4 has, is expected, got 8"),
    (torch.zeros(1, 2, 5, 5), ValueError, "5 axes"),
    (torch.zeros(1, 2, 4, 2, 2), ValueError, "at least kernel_size=3, with padding, is expected, got 2"),
    (torch.zeros(1, 2, 4, 6, 6), ValueError, "height + 2 · padding - kernel_size = 3 is expected, got 2"),
    (torch.zeros(1, 2, 4, 5, 5, dtype=torch.float64), TypeError, "torch.float32"),
    (torch.zeros(1, 2, 4, 5, 5, dtype=torch.long), TypeError, "floating"),
    ([1.], TypeError, "x: a floating point tensor"),
])
def test_bad_input(x, error, words):
    layer = GroupConv2d(2, 3, 3, stride=2)
    with pytest.raises(error) as caught: layer(x)
    assert words in str(caught.value)


@pytest.mark.parametrize("call, error, words", [
    (lambda: turn_image(torch.zeros(2, 3), 1), ValueError, "got (2, 3)"),
    (lambda: turn_image(torch.zeros(3), 1), ValueError, "height and width"),
    (lambda: turn_image(torch.zeros(3, 3), 8), ValueError, "from 0 to 7"),
    (lambda: turn_image(torch.zeros(3, 3), 1.), TypeError, "element"),
    (lambda: turn_image([[1]], 1), TypeError, "x"),
    (lambda: turn_maps(torch.zeros(1, 1, 4, 3, 3), 4), ValueError, "from 0 to 3"),
    (lambda: turn_maps(torch.zeros(1, 1, 5, 3, 3), 1), ValueError, "4 or 8 elements is expected, got 5"),
    (lambda: turn_maps(torch.zeros(1, 1, 4, 3, 2), 1), ValueError, "got (3, 2)"),
    (lambda: turn_maps(torch.zeros(4, 3, 3), 1), ValueError, "5 axes"),
    (lambda: compose(8, 0), ValueError, "s: "),
    (lambda: compose(0, -1), ValueError, "t: "),
    (lambda: inverse("r"), TypeError, "s: "),
    (lambda: GroupPool("sum"), ValueError, "reduction"),
    (lambda: GroupPool()(torch.zeros(1, 2, 4, 4)), ValueError, "5 axes"),
    (lambda: GroupPool()(torch.zeros(1, 2, 3, 4, 4)), ValueError, "4 or 8"),
    (lambda: FilterBank(1, 3, "P4"), ValueError, "did you mean 'p4'?"),
    (lambda: rotate(torch.zeros(2, 1, 4, 4), torch.zeros(3)), ValueError, "shape (2)"),
    (lambda: rotate(torch.zeros(2, 1, 4, 5), torch.zeros(2)), ValueError, "got (4, 5)"),
    (lambda: rotate(torch.zeros(2, 1, 4, 4), torch.tensor([0., float("nan")])), ValueError, "NaN"),
    (lambda: rotate(torch.zeros(2, 1, 4, 4), 30.), TypeError, "degrees"),
    (lambda: rotate(torch.zeros(0, 1, 4, 4), torch.zeros(0)), ValueError, "images: a tensor with at least one element is expected, got (0, 1, 4, 4)"),
    (lambda: rotate(torch.zeros(2, 1, 4, 4), torch.zeros(2, device="meta")), ValueError, "degrees: a tensor on cpu, as the images,"),
    *((lambda net=net, p=p: net(2, p), error, "dropout: a ") for net in (Z2CNN, P4CNN) for p, error in ((2., ValueError), (-.1, ValueError), ("a", TypeError))),
    (lambda: Z2CNN(channels=0), ValueError, "channels"),
    (lambda: P4CNN(group="p2"), ValueError, "group"),
])
def test_bad_calls(call, error, words):
    with pytest.raises(error) as caught: call()
    assert words in str(caught.value)


def test_filter_banks_refuse_other_sizes():
    bank = FilterBank(2, 3, lifting=True)
    for shape in ((3, 2, 3, 3), (3, 2, 1, 3, 3)):
        made = bank(torch.ones(shape))
        assert made.shape == (12, 2, 3, 3) and torch.equal(bank.inverse(made), torch.ones(3, 2, 3, 3))
    for wrong in (torch.ones(3, 4, 3, 3), torch.ones(3, 2, 2, 2), torch.tensor(1.)):
        with pytest.raises(ValueError, match="source: a tensor of filters with 18 weights each is expected"): bank(wrong)
    for wrong in (torch.ones(10, 2, 3, 3), torch.ones(12, 2, 2, 2)):
        with pytest.raises(ValueError, match="member: a tensor of filters with 18 weights each, as many as a multiple of 4,"): bank.inverse(wrong)


def test_angles_of_another_type_and_integer_layers():
    x = torch.rand(2, 1, 5, 5)
    turned = rotate(x, torch.tensor([30., 60.], dtype=torch.float64))
    torch.testing.assert_close(turned, rotate(x, torch.tensor([30., 60.])))
    with pytest.raises(TypeError, match="dtype: a floating point type is expected, got torch.int64"): GroupConv2d(1, 1, 3, dtype=torch.int64)


@pytest.mark.parametrize("network", [P4CNN, Z2CNN])
@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 1, 14, 14), (1, 28, 28)])
def test_digits_of_another_size_are_refused(network, shape):
    with pytest.raises(ValueError, match=r"x: images \(b, 1, 28, 28\)"): network(2)(torch.zeros(shape))


def test_what_was_frozen_stays_so():
    assert not any(p.requires_grad for p in GroupConv2d(2, 3, 3, "p4").requires_grad_(False).as_conv2d().parameters())
