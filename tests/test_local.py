"""Locally connected layers, their tie to convolutions and the matrices of both (10_local): against PyTorch, loops and unit impulses, and bad input."""
import copy
import io
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

from sharetie.census import census
from sharetie.local import (Everywhere, LocallyConnected1d, LocallyConnected2d, as_matrix, early_network,
                            sharing_pattern, unshare)
from sharetie.ties import check_ties, find_ties, load_model, save_model, tie_, untie_

CONV = {1: nn.Conv1d, 2: nn.Conv2d}
LOCAL = {1: LocallyConnected1d, 2: LocallyConnected2d}
HOWS = [dict(kernel_size=3), dict(kernel_size=1), dict(kernel_size=3, stride=2), dict(kernel_size=2, padding=1), dict(kernel_size=3, dilation=2),
        dict(kernel_size=3, stride=3, padding=2, dilation=2), dict(kernel_size=2, groups=2), dict(kernel_size=3, groups=2, bias=False),
        dict(kernel_size=4, padding="same"), dict(kernel_size=3, padding="same", dilation=3), dict(kernel_size=3, padding="valid"), dict(kernel_size=7)]
UNEVEN = dict(kernel_size=(3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1), groups=4)
CASES = [(n, how) for n in (1, 2) for how in HOWS] + [(2, UNEVEN)]


def built(n, how, seed=0, dtype=torch.float64):
    "A convolution and images that it fits."
    torch.manual_seed(seed)
    return CONV[n](4, 8, dtype=dtype, **how), torch.randn(3, 4, *((9,), (7, 8))[n - 1], dtype=dtype)


def by_loop(layer, x):
    "A locally connected layer of two axes, output by output."
    (top, bottom), (left, right) = layer.pads
    x = F.pad(x, (left, right, top, bottom))
    (kh, kw), (sh, sw), (dh, dw), g = layer.kernel_size, layer.stride, layer.dilation, layer.groups
    ins, outs = layer.in_channels // g, layer.out_channels // g
    y = x.new_zeros(len(x), layer.out_channels, *layer.positions)
    for r, c, o in itertools.product(*map(range, layer.positions), range(layer.out_channels)):
        window = x[:, o // outs * ins:(o // outs + 1) * ins, r * sh:r * sh + dh * (kh - 1) + 1:dh, c * sw:c * sw + dw * (kw - 1) + 1:dw]
        y[:, o, r, c] = (window * layer.weight[r, c, o]).flatten(1).sum(1) + (0 if layer.bias is None else layer.bias[r, c, o])
    return y


# Values and gradients

@pytest.mark.parametrize("how", [*HOWS, UNEVEN], ids=str)
def test_a_layer_is_a_loop_over_its_outputs(how):
    torch.manual_seed(0)
    layer, x = LocallyConnected2d(4, 8, (7, 8), dtype=torch.float64, **how), torch.randn(2, 4, 7, 8, dtype=torch.float64, requires_grad=True)
    seed = torch.randn_like(layer(x))
    expected = torch.autograd.grad(by_loop(layer, x), [x, *layer.parameters()], seed)
    torch.testing.assert_close(layer(x), by_loop(layer, x))
    for a, b in zip(torch.autograd.grad(layer(x), [x, *layer.parameters()], seed), expected): torch.testing.assert_close(a, b)


@pytest.mark.parametrize("n, how", CASES, ids=str)
def test_unshare_computes_what_the_convolution_does(n, how):
    conv, x = built(n, how)
    local = unshare(conv, x.shape[2:])
    torch.testing.assert_close(local(x), conv(x))
    x.requires_grad_()
    seed = torch.randn_like(conv(x))
    want = torch.autograd.grad(conv(x), [x, *conv.parameters()], seed)
    got = torch.autograd.grad(local(x), [x, *local.parameters()], seed)
    torch.testing.assert_close(got[0], want[0])
    for a, b in zip(got[1:], want[1:]): torch.testing.assert_close(a.sum(tuple(range(n))), b)


@pytest.mark.parametrize("n, how", CASES, ids=str)
def test_one_tie_makes_it_the_convolution(n, how):
    conv, x = built(n, how)
    model = nn.ModuleDict({"conv": conv, "local": LOCAL[n](4, 8, x.shape[2:], dtype=torch.float64, **how)})
    source = copy.deepcopy(conv)
    tie_(model, ["conv.weight", "local.weight"], map=model["local"].everywhere)
    if conv.bias is not None: tie_(model, ["conv.bias", "local.bias"], map=model["local"].everywhere)
    torch.testing.assert_close(model["local"](x), source(x))
    seed = torch.randn_like(source(x))
    got = torch.autograd.grad(model["local"](x), list(conv.parameters()), seed)
    for a, b in zip(got, torch.autograd.grad(source(x), list(source.parameters()), seed)): torch.testing.assert_close(a, b)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in source.parameters())
    check_ties(model)
    untie_(model, "local.weight")
    torch.testing.assert_close(model["local"](x), source(x))
    assert model["local"].weight.is_contiguous() and len(find_ties(model).true) == (conv.bias is not None)


def test_it_trains_as_the_convolution_does():
    conv, x = built(2, dict(kernel_size=3, padding=1))
    model = nn.ModuleDict({"conv": copy.deepcopy(conv), "local": LocallyConnected2d(4, 8, (7, 8), 3, padding=1, dtype=torch.float64)})
    for name in ("weight", "bias"): tie_(model, [f"conv.{name}", f"local.{name}"], map=model["local"].everywhere)
    for layer, parameters in ((conv, conv.parameters()), (model["local"], model.parameters())):
        optimizer = torch.optim.Adam(parameters, 0.01)
        for _ in range(5):
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(model["conv"].weight, conv.weight)
    torch.testing.assert_close(model["local"](x), conv(x))


@pytest.mark.parametrize("n", [1, 2])
def test_gradcheck(n):
    torch.manual_seed(0)
    layer = LOCAL[n](2, 2, 5, 2, 2, 1, 2, groups=2, dtype=torch.float64)
    x = torch.randn(2, 2, *[5] * n, dtype=torch.float64, requires_grad=True)
    def run(x, *values): return functional_call(layer, dict(zip(dict(layer.named_parameters()), values)), (x,))
    inputs = (x, *(p.detach().requires_grad_() for p in layer.parameters()))
    assert torch.autograd.gradcheck(run, inputs) and torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("n, how", [(1, dict(kernel_size=3, stride=2, padding=1)), (2, dict(kernel_size=2, dilation=2, bias=False)), (2, UNEVEN)])
def test_forward_mode(n, how):
    torch.manual_seed(0)
    size = ((5,), (5, 4))[n - 1]
    layer = LOCAL[n](4, 4, size, dtype=torch.float64, **how)
    x, values = torch.randn(2, 4, *size, dtype=torch.float64), dict(layer.named_parameters())
    for f, at in ((layer, x), (lambda w: functional_call(layer, values | {"weight": w}, x), layer.weight.detach())):
        torch.testing.assert_close(jacfwd(f)(at), jacrev(f)(at))
        direction = torch.randn_like(at)
        value, change = jvp(f, (at,), (direction,))
        torch.testing.assert_close(value, f(at))
        torch.testing.assert_close(change, torch.einsum("...k,k->...", jacrev(f)(at).flatten(value.ndim), direction.flatten()))
        total = lambda at: f(at).pow(2).sum()  # forward over backward: the transpose has a forward mode as well
        torch.testing.assert_close(jvp(grad(total), (at,), (direction,))[1],
                                   torch.einsum("i,ik->k", direction.flatten(), torch.autograd.functional.hessian(total, at).reshape(at.numel(), -1)).view(at.shape))


def test_one_image_empty_batches_and_other_memory_orders():
    conv, x = built(2, dict(kernel_size=3, padding=1))
    local = unshare(conv, (7, 8))
    torch.testing.assert_close(local(x[0]), conv(x)[0])
    assert local(x[:0]).shape == (0, 8, 7, 8)
    local(x[:0]).sum().backward()
    assert not local.weight.grad.any()
    for other in (x.to(memory_format=torch.channels_last), x.flip(0).flip(0), x.transpose(2, 3).contiguous().transpose(2, 3)):
        torch.testing.assert_close(local(other), conv(x))
    assert local(x).is_contiguous()


def test_channels_last_memory_of_odd_shapes():
    for shape in ((1, 4, 7, 8), (3, 1, 7, 8), (3, 4, 1, 8), (3, 4, 7, 1)):
        conv, x = nn.Conv2d(shape[1], 2, 1, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
        for pad in (0, 1):
            conv.padding = (pad, pad)
            y = unshare(conv, shape[2:])(x.to(memory_format=torch.channels_last))
            torch.testing.assert_close(y, conv(x))


# What PyTorch does with layers

@pytest.mark.long
@pytest.mark.parametrize("tied", [False, True])
def test_compile_in_one_graph(tied):
    conv, x = built(2, dict(kernel_size=3, padding=1, groups=2), dtype=torch.float32)
    model = nn.ModuleDict({"conv": conv, "local": unshare(conv, (7, 8))})
    if tied: tie_(model, ["conv.weight", "local.weight"], map=model["local"].everywhere)
    local = model["local"]
    compiled = torch.compile(local, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), local(x))
    parameters = [p for p in model.parameters() if p is not conv.bias]
    got = torch.autograd.grad(compiled(x).square().sum(), parameters, allow_unused=True)
    for a, b in zip(got, torch.autograd.grad(local(x).square().sum(), parameters, allow_unused=True)):
        assert (a is None) == (b is None)
        if a is not None: torch.testing.assert_close(a, b)


def test_autocast():
    conv, x = built(2, dict(kernel_size=3), dtype=torch.float32)
    local = unshare(conv, (7, 8))
    with torch.autocast("cpu", torch.bfloat16): low, want = local(x), conv(x)
    assert low.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(low, want, atol=0.05, rtol=0.05)
    low.float().sum().backward()
    assert local.weight.grad.dtype == torch.float32
    assert unshare(conv, (7, 8)).double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("n", [1, 2])
def test_meta_device(n):
    layer = LOCAL[n](4, 6, 9, 3, padding=1, device="meta", dtype=torch.bfloat16)
    out = layer(torch.empty(2, 4, *[9] * n, device="meta", dtype=torch.bfloat16))
    assert out.is_meta and out.shape == (2, 6, *[9] * n) and out.dtype == torch.bfloat16
    fresh = layer.to_empty(device="cpu")
    fresh.reset_parameters()
    assert fresh.weight.isfinite().all()


def test_meta_device_in_float32_and_patterns_under_meta():
    layer = LocallyConnected2d(1, 2, 6, 3, device="meta")
    assert layer(torch.empty(2, 1, 6, 6, device="meta")).shape == (2, 2, 4, 4)
    for own in (LocallyConnected2d(1, 2, 6, 3), nn.Conv2d(1, 2, 3), nn.Linear(4, 3)):
        size = None if isinstance(own, nn.Linear) else 6
        want, matrix = sharing_pattern(own, size), as_matrix(own, size)
        with torch.device("meta"): assert torch.equal(sharing_pattern(own, size), want) and torch.equal(as_matrix(own, size), matrix)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64, torch.bfloat16])
def test_images_of_another_dtype(dtype):
    layer, x = LocallyConnected2d(1, 2, 6, 3), torch.ones(2, 1, 6, 6).to(dtype)
    with pytest.raises(TypeError, match="x: the weight's type torch.float32 is expected, got torch"): layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        if dtype == torch.bfloat16: assert layer(x).dtype == dtype
        else:
            with pytest.raises(TypeError, match="x: the weight's type"): layer(x)


def test_layers_without_a_weight_yet_and_integer_types():
    for call in (sharing_pattern, as_matrix, unshare):
        with pytest.raises(ValueError, match="a layer with a weight is expected, got LazyConv2d"): call(nn.LazyConv2d(2, 3), 6)
    with pytest.raises(ValueError, match="layer: a layer with a weight is expected, got LazyLinear"): sharing_pattern(nn.LazyLinear(2))
    with pytest.raises(TypeError, match="dtype: a floating point type is expected, got torch.int64"): LocallyConnected1d(1, 1, 4, 3, dtype=torch.int64)


def test_copies_pickles_and_state_dicts():
    layer, x = LocallyConnected2d(2, 3, 6, 3, stride=2), torch.randn(2, 2, 6, 6)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))): assert torch.equal(other(x), layer(x))
    other = LocallyConnected2d(2, 3, 6, 3, stride=2)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x)) and list(layer.state_dict()) == ["weight", "bias"]


def test_a_tied_layer_is_saved_once(tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        model = nn.ModuleDict({"conv": nn.Conv2d(1, 2, 3), "local": LocallyConnected2d(1, 2, 12, 3, bias=False)})
        tie_(model, ["conv.weight", "local.weight"], map=model["local"].everywhere)
        return model
    model, other, x = build(0), build(1), torch.randn(1, 1, 12, 12)
    save_model(model, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_size < 100 * 2 * 9 * 4 / 4
    load_model(other, tmp_path / "model.safetensors")
    assert torch.equal(other["local"](x), model["local"](x))
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(again["local"](x), model["local"](x))
    assert find_ties(again).true["conv.weight"]


def test_gradients_per_example():
    layer, x = LocallyConnected2d(2, 3, 6, 3, padding=1), torch.randn(4, 2, 6, 6)
    values = dict(layer.named_parameters())
    def loss(values, x): return functional_call(layer, values, (x,)).square().sum()
    found = vmap(grad(loss), (None, 0))(values, x)
    for i in range(4):
        layer.zero_grad()
        loss(values, x[i]).backward()
        torch.testing.assert_close(found["weight"][i], layer.weight.grad)


def test_the_first_weights_are_those_of_a_convolution():
    torch.manual_seed(0)
    layer, conv = LocallyConnected2d(4, 8, 12, 3, groups=2), nn.Conv2d(4, 8, 3, groups=2)
    assert layer.weight.abs().max() <= (2 * 9) ** -0.5 and layer.bias.abs().max() <= (2 * 9) ** -0.5
    assert layer.weight.std().item() == pytest.approx(conv.weight.std().item(), rel=0.1)


# Counted

def test_census():
    x = torch.zeros(1, 1, 32, 32)
    layer = LocallyConnected2d(1, 6, 32, 5)
    assert (census(layer, x).stored, census(layer, x).used, census(layer, x).notes) == (122_304, 122_304, ())
    model = nn.ModuleDict({"conv": nn.Conv2d(1, 6, 5), "local": layer})
    for name in ("weight", "bias"): tie_(model, [f"conv.{name}", f"local.{name}"], map=layer.everywhere)
    found = census(model["local"], x)
    assert (found.stored, found.used, found.notes) == (156, 122_304, ())


@pytest.mark.parametrize("how", [dict(), dict(groups=2), dict(bias=False, stride=2), dict(padding=2)], ids=str)
def test_census_agrees_with_the_convolution(how):
    conv, x = nn.Conv2d(4, 8, 3, **how), torch.zeros(3, 4, 9, 7)
    local, want = unshare(conv, (9, 7)), census(conv, x)
    own = census(local, x)
    assert own.used == own.stored == want.used == sum(p.numel() for p in local.parameters())
    model = nn.ModuleDict({"conv": conv, "local": local})
    for name, _ in conv.named_parameters(): tie_(model, [f"conv.{name}", f"local.{name}"], map=local.everywhere)
    tied = census(local, x)
    assert (tied.stored, tied.used, tied.notes) == (want.stored, want.used, ())


def test_the_networks_of_1989():
    printed = {"Net-1": (2570, 2570), "Net-2": (3214, 3214), "Net-3": (1226, 1226), "Net-4": (2266, 1132), "Net-5": (5194, 1060)}
    for name, counts in printed.items():
        net = early_network(name)
        found = census(net, torch.zeros(1, 1, 16, 16))
        assert (found.used, found.stored) == counts
        assert net(torch.zeros(2, 1, 16, 16)).shape == (2, 10)
        check_ties(net)
    with pytest.raises(ValueError, match="did you mean 'Net-5'"): early_network("net-5")


# Matrices

MATRIX = [(nn.Conv1d(2, 4, 3, padding=1), 7), (nn.Conv1d(2, 4, 3, 2, 3, 2, 2), 9), (nn.Conv1d(2, 2, 4, padding="same", dilation=2), 9),
          (nn.Conv1d(2, 4, 3, padding=2, padding_mode="circular"), 6), (nn.Conv1d(2, 2, 3, padding="same", padding_mode="circular", dilation=2), 6),
          (nn.Conv2d(2, 4, (3, 2), (2, 1), (1, 2), (1, 2), 2), (5, 6)), (nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), (4, 5)),
          (nn.Conv3d(2, 2, 2, (1, 2, 1), 1), (3, 2, 4)), (nn.ConvTranspose1d(4, 2, 3, 2, 1, 1, 2), 5), (nn.ConvTranspose1d(2, 2, 2, 3), 4),
          (nn.ConvTranspose2d(4, 6, (3, 2), 2, (1, 0), (0, 1), 2, dilation=(1, 3)), (4, 3)), (nn.ConvTranspose3d(1, 2, 2, 2), (2, 3, 2)),
          (LocallyConnected1d(4, 6, 9, 3, 2, 2, 2, 2), None), (LocallyConnected2d(2, 3, (5, 6), 3, padding="same"), (5, 6)), (nn.Linear(5, 3), None)]


@pytest.mark.parametrize("layer, size", MATRIX, ids=lambda v: None if isinstance(v, (int, tuple)) else repr(v))
def test_the_matrix_answers_unit_impulses(layer, size):
    layer = copy.deepcopy(layer).double()
    channels = getattr(layer, "in_channels", None)
    full = (channels, *((size,) if isinstance(size, int) else size or layer.input_size)) if channels else (layer.in_features,)
    x = torch.eye(torch.Size(full).numel(), dtype=torch.float64).view(-1, *full)
    want = (layer(x) - layer(torch.zeros_like(x))).flatten(1).T
    matrix, pattern = as_matrix(layer, size), sharing_pattern(layer, size)
    torch.testing.assert_close(matrix, want)
    assert pattern.shape == matrix.shape and pattern.dtype == torch.int64
    assert torch.equal(matrix[pattern >= 0], layer.weight.flatten()[pattern[pattern >= 0]])
    assert not matrix[pattern < 0].any()


def test_gradients_of_a_matrix_are_those_of_the_layer():
    conv, x = built(2, dict(kernel_size=3, stride=2, groups=2, bias=False))
    seed = torch.randn_like(conv(x))
    want, = torch.autograd.grad(conv(x), conv.weight, seed)
    got, = torch.autograd.grad(x.flatten(1) @ as_matrix(conv, (7, 8)).T, conv.weight, seed.flatten(1))
    torch.testing.assert_close(got, want)


def test_patterns():
    assert sharing_pattern(nn.Conv1d(1, 1, 3), 4).tolist() == [[0, 1, 2, -1], [-1, 0, 1, 2]]
    assert sharing_pattern(LocallyConnected1d(1, 1, 4, 3)).tolist() == [[0, 1, 2, -1], [-1, 3, 4, 5]]
    assert sharing_pattern(nn.ConvTranspose1d(1, 1, 2, stride=2), 2).tolist() == [[0, -1], [1, -1], [-1, 0], [-1, 1]]
    used = sharing_pattern(nn.Conv2d(1, 6, 5), 32)
    assert (used >= 0).sum() == 122_304 - 28 * 28 * 6 and len(used.unique()) == 151
    assert sharing_pattern(LocallyConnected2d(2, 4, 5, 3, groups=2)).max() == 3 * 3 * 4 * 9 - 1
    strided = sharing_pattern(nn.Conv1d(1, 1, 3, stride=2, padding=1), 5)
    assert strided.tolist() == [[1, 2, -1, -1, -1], [-1, 0, 1, 2, -1], [-1, -1, -1, 0, 1]]


def test_matrix_of_a_tied_layer():
    model = nn.ModuleDict({"conv": nn.Conv1d(1, 2, 3), "local": LocallyConnected1d(1, 2, 6, 3)})
    tie_(model, ["conv.weight", "local.weight"], map=Everywhere(4))
    torch.testing.assert_close(as_matrix(model["local"]), as_matrix(model["conv"], 6))


# Bad input

@pytest.mark.parametrize("changes, error, message", [
    (dict(input_size=2), ValueError, r"input_size: with padding, at least the kernel's extent \(3, 3\) is expected, got \(2, 2\)"),
    (dict(input_size=4, dilation=2), ValueError, r"extent \(5, 5\) is expected, got \(4, 4\)"),
    (dict(groups=3), ValueError, "in_channels: a multiple of groups=3 is expected, got 4"),
    (dict(out_channels=5, groups=2), ValueError, "out_channels: a multiple of groups=2 is expected, got 5"),
    (dict(in_channels=0), ValueError, "in_channels: a whole number of at least 1 is expected, got 0"),
    (dict(out_channels=2.0), TypeError, "out_channels: a whole number is expected, got 2.0"),
    (dict(groups=0), ValueError, "groups"), (dict(groups="2"), TypeError, "groups"),
    (dict(kernel_size=0), ValueError, "kernel_size"), (dict(kernel_size=(3, 3, 3)), ValueError, "kernel_size: a whole number, or 2 of them"),
    (dict(stride=0), ValueError, "stride"), (dict(dilation=-1), ValueError, "dilation"), (dict(padding=-1), ValueError, "padding"),
    (dict(padding="sane"), ValueError, "did you mean 'same'"), (dict(padding="same", stride=2), ValueError, r"needs stride 1, is expected, got \(2, 2\)"),
    (dict(padding=float("nan")), TypeError, "padding"), (dict(input_size=None), TypeError, "input_size"), (dict(bias=1), TypeError, "bias"),
    (dict(input_size=()), ValueError, "input_size"), (dict(kernel_size=True), TypeError, "kernel_size"),
], ids=str)
def test_bad_layers(changes, error, message):
    with pytest.raises(error, match=message): LocallyConnected2d(**dict(in_channels=4, out_channels=6, input_size=8, kernel_size=3) | changes)


@pytest.mark.parametrize("x, error, message", [
    (torch.zeros(2, 4, 8, 9), ValueError, r"x: the size \(8, 8\) that the layer was built for is expected, got \(8, 9\)"),
    (torch.zeros(2, 3, 8, 8), ValueError, "x: a tensor of 4 channels is expected, got 3"), (torch.zeros(4, 8), ValueError, "x: a tensor of 3 or 4 axes"),
    (torch.zeros(1, 2, 4, 8, 8), ValueError, "x: a tensor of 3 or 4 axes"), ([[0.0]], TypeError, "x: a tensor is expected"),
    (torch.zeros(8, 8, 4, 2), ValueError, "channels"), (None, TypeError, "x")], ids=lambda v: str(getattr(v, "shape", "")))
def test_bad_images(x, error, message):
    with pytest.raises(error, match=message): LocallyConnected2d(4, 6, 8, 3)(x)


@pytest.mark.parametrize("call, error, message", [
    (lambda: unshare(nn.Linear(2, 2), 3), TypeError, "conv: a Conv1d or Conv2d is expected, got Linear"),
    (lambda: unshare(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), 5), ValueError, "padding_mode='zeros'"),
    (lambda: unshare(nn.Conv2d(1, 1, 3), 2), ValueError, "input_size"), (lambda: unshare(nn.Conv2d(1, 1, 3), (4, 4, 4)), ValueError, "input_size"),
    (lambda: unshare(nn.ConvTranspose2d(1, 1, 3), 5), TypeError, "conv"),
    (lambda: sharing_pattern(nn.ReLU(), 3), TypeError, "layer: a convolution, locally connected or Linear layer is expected, got ReLU"),
    (lambda: sharing_pattern(nn.Conv2d(1, 1, 3)), ValueError, "input_size: a whole number, or 2 of them"),
    (lambda: sharing_pattern(nn.Conv2d(1, 1, 3), 2), ValueError, r"extent \(3, 3\) is expected, got \(2, 2\)"),
    (lambda: sharing_pattern(nn.Conv1d(1, 1, 3, padding=1, padding_mode="reflect"), 4), ValueError, "padding_mode"),
    (lambda: sharing_pattern(nn.Conv1d(1, 1, 3, padding=2, padding_mode="circular"), 2), ValueError, "around a circle"),
    (lambda: sharing_pattern(LocallyConnected1d(1, 1, 6, 3), 7), ValueError, r"the size \(6,\) that the layer was built for is expected, got \(7,\)"),
    (lambda: as_matrix(nn.Linear(3, 2), 4), ValueError, "input_size: 3, as the layer has inputs, is expected, got 4"),
    (lambda: as_matrix(nn.Conv1d(1, 1, 3), 4.5), TypeError, "input_size"), (lambda: as_matrix(nn.Conv1d(1, 1, 3), "4"), TypeError, "input_size"),
    (lambda: as_matrix(nn.ConvTranspose1d(1, 1, 1, padding=3), 2), ValueError, "input_size: a size with outputs"),
    (lambda: Everywhere(0), ValueError, "positions"), (lambda: Everywhere(), ValueError, "positions: the length of at least one axis"), (lambda: Everywhere(2.5), TypeError, "positions"),
    (lambda: early_network(4), TypeError, "name"),
])
def test_bad_calls(call, error, message):
    with pytest.raises(error, match=message): call()


def test_a_map_for_other_positions_is_refused_before_anything_changes():
    model = nn.ModuleDict({"conv": nn.Conv2d(1, 2, 3), "local": LocallyConnected2d(1, 2, 8, 3)})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="shape"): tie_(model, ["conv.weight", "local.weight"], map=Everywhere(5, 6))
    assert list(model.state_dict()) == list(before) and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.gpu
@pytest.mark.parametrize("n, how", CASES, ids=str)
def test_gpu(n, how):
    conv, x = built(n, how)
    local = unshare(conv, x.shape[2:]).cuda()
    conv, x = conv.cuda(), x.cuda().requires_grad_()
    torch.testing.assert_close(local(x), conv(x))
    seed = torch.randn_like(conv(x))
    torch.testing.assert_close(torch.autograd.grad(local(x), x, seed), torch.autograd.grad(conv(x), x, seed))


def test_what_was_frozen_stays_so_unshared():
    conv = nn.Conv2d(2, 3, 3)
    conv.weight.requires_grad_(False)
    local = unshare(conv, 5)
    assert not local.weight.requires_grad and local.bias.requires_grad
