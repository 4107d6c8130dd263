"""`GroupConv2d` over p4 and p4m against escnn at equal outputs, and against the convolution that both end in.

escnn is a peer, not a dependency. It runs without its compiled parts, in a folder of its own:

    python -m pip install --no-deps --target PEERS escnn joblib pymanopt autograd lie_learn numpy==1.26.4
    PYTHONPATH=PEERS python benchmarks/cnn_groups.py

(lie_learn's wheel was built for that NumPy, so it goes into the folder too.) Where escnn is not installed, the
tables say "absent". Its layers span fewer filters than ours, since it leaves out high frequencies. So its filters
are copied into our layer, and both must give the same output.

The limit is `F.conv2d` with a ready bank: in inference without, in a training step with the gradients of input,
bank and bias. It is what `GroupConv2d.as_conv2d` gives, and no layer that ends in this convolution can be faster,
so "escnn / limit" bounds "escnn / this". What a layer takes beyond it is the price of the tie. For inference escnn
is in evaluation mode, where it keeps its expanded filters unseen; ours are compared with the weight first. Every
candidate frees its gradients before a step.
"""
import itertools
import warnings

import numpy as np
import torch
import torch.nn.functional as F

from _measure import extra_memory, keep, machine, medians
from sharetie.rotations import GROUPS, GroupConv2d

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from escnn import gspaces, nn as peer_nn
        from escnn.group import _numerical
    # recent versions of scikit-learn refuse the np.matrix that escnn's construction of p4m hands to it
    _svd = _numerical.randomized_svd
    _numerical.randomized_svd = lambda a, **options: _svd(np.asarray(a), **options)
except ImportError:
    peer_nn = None

SIZES = [("p4", 10, 24, 64), ("p4", 10, 6, 64), ("p4", 32, 14, 8), ("p4", 64, 7, 1),
         ("p4m", 8, 14, 16), ("p4m", 16, 7, 8), ("p4m", 32, 7, 1)]


def peer_layer(group, channels):
    "escnn's 3×3 convolution between regular fields, and the type of its input."
    space = gspaces.rot2dOnR2(4) if group == "p4" else gspaces.flipRot2dOnR2(4)
    fields = peer_nn.FieldType(space, channels * [space.regular_repr])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peer_nn.R2Conv(fields, fields, kernel_size=3, padding=1), fields


def orders(group):
    "Orders of the elements in which another library may have them: other senses of turns, other mirrors."
    rotations = [[sign * i % 4 for i in range(4)] for sign in (1, -1)]
    if group == "p4": return rotations
    mirrored = [[4 + (sign * i + shift) % 4 for i in range(4)] for sign in (1, -1) for shift in range(4)]
    return [a + b for a, b in itertools.product(rotations, mirrored)]


def copy_filters(ours, filters, bias):
    "Give our layer the filters of another; return the order of the elements that makes them one bank."
    size, channels = ours.size, ours.out_channels
    split = filters.detach().view(channels, size, channels, size, 3, 3)
    for order in orders(ours.group):
        bank = split[:, order][:, :, :, order].reshape(channels * size, channels * size, 3, 3)
        weight = ours.bank.inverse(bank)
        if (ours.bank(weight) - bank).abs().max() < 1e-5 * bank.abs().max():
            with torch.no_grad():
                ours.weight.copy_(weight)
                ours.bias.copy_(bias.detach()[::size])
            return order
    raise AssertionError("escnn's filters are no bank of ours")


def candidates(group, channels, height, batch, device):
    "{name: function of an input} for inference and for training, with the inputs and parameters of each."
    torch.manual_seed(0)
    size = GROUPS[group]
    ours = GroupConv2d(channels, channels, 3, group, padding=1).to(device)
    x = torch.randn(batch, channels, size, height, height, device=device)
    if peer_nn is not None:
        peer, fields = peer_layer(group, channels)
        order = copy_filters(ours, *(t.detach() for t in peer.expand_parameters()))
        peer, back = peer.to(device), torch.tensor(order).argsort()
        def theirs(x): return peer(peer_nn.GeometricTensor(x, fields)).tensor
        expected = theirs(x[:, :, back].flatten(1, 2)).unflatten(1, (channels, size))[:, :, order]
        torch.testing.assert_close(ours(x), expected, atol=1e-4, rtol=1e-4)
    bank = ours.bank(ours.weight).detach().requires_grad_()
    bias = ours.bias.detach().repeat_interleave(size).requires_grad_()
    flat = x.flatten(1, 2)
    found = {"ours": (ours, x, list(ours.parameters())),
             "limit": (lambda x: F.conv2d(x, bank, bias, padding=1), flat, [bank, bias])}
    if peer_nn is not None: found["escnn"] = theirs, flat, list(peer.parameters())
    def mode(training):
        ours.train(training)
        if peer_nn is not None: peer.train(training)
    return found, mode


def inference(function, x):
    def run():
        with torch.no_grad(): return function(x)
    return run


def step(function, x, parameters):
    "Forward and backward, to the parameters and to the input."
    x = x.clone().requires_grad_()
    up = torch.randn_like(function(x))
    def run():
        for p in (x, *parameters): p.grad = None
        function(x).backward(up)
    return run


def rows(device):
    for group, channels, height, batch in SIZES:
        found, mode = candidates(group, channels, height, batch, device)
        for what in ("inference", "training step"):
            mode(what == "training step")
            runs = {name: inference(f, x) if what == "inference" else step(f, x, parameters)
                    for name, (f, x, parameters) in found.items()}
            times = medians(runs, device, runs=30)
            memory = {name: extra_memory(run, device) for name, run in runs.items()}
            yield {"": f"{group}, {channels} channels, {height}×{height}, batch {batch}: {what}", "ms": 1e3 * times["ours"],
                   "escnn / this": times["escnn"] / times["ours"] if "escnn" in times else "absent",
                   "escnn / limit": times["escnn"] / times["limit"] if "escnn" in times else "absent",
                   "this / limit": times["ours"] / times["limit"],
                   "memory of this / escnn": memory["ours"] / memory["escnn"] if "escnn" in memory else "absent",
                   "memory of this / limit": memory["ours"] / memory["limit"]}


def main(device):
    peer = "absent" if peer_nn is None else __import__("importlib.metadata").metadata.version("escnn")
    keep(f"cnn_groups_{device.type}", list(rows(device)), escnn=peer, filters="3×3, padding 1", runs=30, machine=machine(device))


if __name__ == "__main__":
    for name in ["cpu"] + ["cuda"] * torch.cuda.is_available(): main(torch.device(name))
    if not torch.cuda.is_available(): print("no CUDA device: the GPU ratios were not measured")
