"""What sharing saves and buys (10_cnn): dense sizes against matrices, networks of equal feature maps, moved images, coordinates, bad input."""
import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sharetie.cnn
from sharetie import local, orbits, rotations, symmetry
from sharetie.census import census
from sharetie.classics import CLASSICS, connections
from sharetie.cnn import (Coordinates, GlobalMax, LocallyConnected1d, LocallyConnected2d, as_matrix, dense_sizes,
                          feature_network, translate, unshare)


def test_all_names_of_the_part_are_here():
    for module in (local, symmetry, orbits, rotations):
        for name in module.__all__: assert name in sharetie.cnn.__all__ and getattr(sharetie.cnn, name) is getattr(module, name)
    for name in sharetie.cnn.__all__: assert hasattr(sharetie.cnn, name)


# What it saves

@pytest.mark.parametrize("layer, shape", [
    (nn.Conv2d(2, 4, 3, 2, 1, groups=2), (2, 7, 8)), (nn.Conv2d(2, 4, 3, bias=False), (2, 7, 8)), (nn.Conv1d(3, 2, 3, dilation=2), (3, 9)),
    (nn.ConvTranspose2d(2, 3, 3, 2), (2, 4, 5)), (LocallyConnected2d(2, 3, (7, 8), 3), (2, 7, 8)), (LocallyConnected1d(1, 2, 9, 3, bias=False), (1, 9)),
    (nn.Linear(5, 3), (5,))], ids=str)
def test_dense_is_the_matrix_and_a_bias_for_each_row(layer, shape):
    matrix = as_matrix(layer, None if isinstance(layer, nn.Linear) else shape[1:])
    want = matrix.numel() + (0 if layer.bias is None else len(matrix))
    for images in (1, 3): assert dense_sizes(nn.Sequential(layer), torch.zeros(images, *shape)) == {"0": want}
    assert dense_sizes(layer, torch.zeros(1, *shape)) == {"": want}


def test_dense_sizes_of_le_net():
    build, shape = CLASSICS["LeNet-5"]
    sizes = dense_sizes(build(), torch.zeros(shape))
    pixels = {"c1": 1024, "s2": 6 * 784, "c3": 6 * 196, "s4": 16 * 100, "c5": 400}
    outs = {"c1": 6 * 784, "s2": 6 * 196, "c3": 16 * 100, "s4": 16 * 25, "c5": 120}
    want = {name: outs[name] * (pixels[name] + 1) for name in pixels} | {"f6": 84 * 121, "out": 840}
    assert sizes == want
    with torch.device("meta"): assert dense_sizes(build(), torch.zeros(shape)) == want


@pytest.mark.parametrize("name", CLASSICS)
def test_sharing_saves_in_every_classic_network(name):
    build, shape = CLASSICS[name]
    with torch.device("meta"): dense = sum(dense_sizes(build().eval(), torch.zeros(shape)).values())
    assert connections(name).stored < connections(name).used < dense


def test_a_layer_that_runs_twice_counts_twice_and_nothing_stays():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x): return self.layer(self.layer(x))
    model = Twice()
    assert dense_sizes(model, torch.zeros(2, 4)) == {"layer": 2 * 20}
    assert not model.layer._forward_hooks
    with pytest.raises(RuntimeError): dense_sizes(model, torch.zeros(2, 3))
    assert not model.layer._forward_hooks


# Networks of equal feature maps

@pytest.mark.parametrize("size, strides, maps", [(12, (2, 1), (8, 16)), (28, (2, 2), (8, 16)), (9, (3, 1), (2, 3)), (8, (1, 1), (4, 4))])
def test_feature_networks_have_the_same_maps(size, strides, maps):
    x, shapes, used = torch.rand(2, 1, size, size), {}, {}
    for kind in ("dense", "local", "shared", "pooled"):
        net = feature_network(kind, size, strides, maps, classes=7)
        assert net(x).shape == (2, 7)
        used[kind], shapes[kind] = census(net, x), []
        for layer in net:
            if isinstance(layer, nn.ReLU): layer.register_forward_hook(lambda layer, args, out, kind=kind: shapes[kind].append(tuple(out.shape)))
        net(x)
    assert all(v == shapes["dense"] for v in shapes.values())
    m = size // strides[0] // strides[1]
    assert shapes["dense"][-1] == (2, maps[1], m, m)
    assert used["local"].used == used["shared"].used and used["dense"].stored > used["local"].stored > used["shared"].stored


def test_the_local_network_can_be_the_shared_one():
    shared = feature_network("shared", 12)
    net = feature_network("local", 12)
    net[0], net[2], net[5] = unshare(shared[0], 12), unshare(shared[2], 6), shared[5]
    x = torch.rand(3, 1, 12, 12)
    torch.testing.assert_close(net(x), shared(x))


def test_a_pooled_network_answers_the_same_for_moves_by_its_stride():
    torch.manual_seed(0)
    net, x = feature_network("pooled", 24), torch.zeros(2, 1, 24, 24)
    x[:, :, 10:14, 10:14] = torch.rand(2, 1, 4, 4)
    torch.testing.assert_close(net(translate(x, 2, -2)), net(x))
    assert not torch.allclose(net(translate(x, 1, 0)), net(x), atol=1e-4)


# Images

def test_translate_is_a_loop_over_pixels():
    x = torch.arange(24.).view(2, 1, 3, 4)
    for down, right in itertools.product(range(-4, 5), range(-5, 6)):
        want = torch.zeros_like(x)
        for r, c in itertools.product(range(3), range(4)):
            if 0 <= r + down < 3 and 0 <= c + right < 4: want[..., r + down, c + right] = x[..., r, c]
        assert torch.equal(translate(x, down, right), want), (down, right)
    assert torch.equal(translate(x[0, 0], 1, 1), translate(x, 1, 1)[0, 0])
    assert translate(x.long(), 1, 0).dtype == torch.int64


def test_coordinates():
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    y = Coordinates()(x)
    assert y.shape == (2, 5, 4, 5) and y.dtype == x.dtype and torch.equal(y[:, :3], x)
    for i, j in itertools.product(range(4), range(5)):
        torch.testing.assert_close(y[0, 3:, i, j], torch.tensor([2 * i / 3 - 1, 2 * j / 4 - 1], dtype=torch.float64))
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert Coordinates()(torch.empty(2, 1, 3, 3, device="meta")).is_meta
    compiled = torch.compile(Coordinates(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), Coordinates()(x))
    assert not list(copy.deepcopy(Coordinates()).parameters())


def test_global_max():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(GlobalMax()(x), F.adaptive_max_pool2d(x, 1).flatten(1))


# Bad input

@pytest.mark.parametrize("call, error, message", [
    (lambda: dense_sizes(3), TypeError, "model: a module is expected, got int"),
    (lambda: dense_sizes(nn.ReLU(), torch.zeros(1)), ValueError, "model: a model with layers of _ConvNd"),
    (lambda: feature_network("convolutional", 12), ValueError, "kind: one of 'dense', 'local', 'shared', 'pooled'"),
    (lambda: feature_network("local", 9), ValueError, "size: a multiple of the stride 2 is expected, got 9"),
    (lambda: feature_network("local", 12.0), TypeError, "size"), (lambda: feature_network("dense", 0), ValueError, "size"),
    (lambda: feature_network("dense", 12, strides=(0, 1)), ValueError, "strides"), (lambda: feature_network("dense", 12, strides=2), TypeError, "strides"),
    (lambda: feature_network("dense", 12, maps=(8,)), ValueError, "maps: two whole numbers"),
    (lambda: feature_network("dense", 12, maps=(8, 0)), ValueError, "maps"), (lambda: feature_network("dense", 12, classes=0), ValueError, "classes"),
    (lambda: translate([[1]], 0, 0), TypeError, "x: a tensor"), (lambda: translate(torch.zeros(3), 0, 0), ValueError, "x: a tensor of at least 2 axes"),
    (lambda: translate(torch.zeros(3, 3), 0.5, 0), TypeError, "down: a whole number"), (lambda: translate(torch.zeros(3, 3), 0, None), TypeError, "right"),
    (lambda: Coordinates()(torch.zeros(1, 3, 3)), ValueError, "x: a tensor of 4 axes"), (lambda: Coordinates()(torch.zeros(1, 1, 3, 3).long()), TypeError, "floating"),
    (lambda: Coordinates()(None), TypeError, "x"),
])
def test_bad_calls(call, error, message):
    with pytest.raises(error, match=message): call()


def test_dense_sizes_of_group_convolutions_and_tied_biases():
    lift = rotations.GroupConv2d(1, 2, 3, lifting=True)
    assert dense_sizes(nn.Sequential(lift), torch.zeros(2, 1, 5, 5)) == {"0": 25 * 72 + 72}
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = dense_sizes(model, torch.zeros(2, 4))
    orbits.share_orbits_(model[1], orbits.shifts(4))
    assert dense_sizes(model, torch.zeros(2, 4)) == before == {"0": 20, "1": 20}


def test_dense_sizes_leave_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout())
    before = copy.deepcopy(model.state_dict())
    dense_sizes(model, torch.rand(2, 1, 5, 5))
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("call, error, message", [
    (lambda: dense_sizes(nn.Conv2d(1, 2, 3), torch.zeros(1, 5, 5)), ValueError, "inputs: a batch for the layer is expected"),
    (lambda: dense_sizes(nn.Linear(4, 2), torch.zeros(4)), ValueError, "inputs: a batch"),
    (lambda: dense_sizes(nn.Sequential(nn.Linear(4, 2)), torch.zeros(0, 4)), ValueError, "inputs: a batch for 0 is expected"),
    (lambda: dense_sizes(LocallyConnected2d(1, 2, 5, 3), torch.zeros(1, 5, 5)), ValueError, "inputs: a batch"),
    (lambda: dense_sizes(nn.Linear(4, 2), torch.zeros(1, 4), layers=nn.Linear), TypeError, "layers: a tuple of classes"),
    (lambda: dense_sizes(nn.Linear(4, 2), torch.zeros(1, 4), layers=[nn.Linear]), TypeError, "layers: a tuple of classes"),
    (lambda: dense_sizes(nn.Linear(4, 2), torch.zeros(1, 4), layers=()), ValueError, "layers: at least one class"),
    (lambda: dense_sizes(nn.LazyLinear(2), torch.zeros(1, 4)), ValueError, "model: a model that has its weights"),
    (lambda: GlobalMax()(torch.zeros(2, 3)), ValueError, "x: a tensor of at least 3 axes"),
    (lambda: GlobalMax()(torch.zeros(2, 3, 0, 4)), ValueError, r"with positions, is expected, got \(2, 3, 0, 4\)"),
])
def test_dense_sizes_and_maxima_refuse(call, error, message):
    with pytest.raises(error, match=message): call()
