"""`GroupConv2d` over p4 and p4m against escnn at equal outputs, and against the convolution that both end in.

escnn is a peer, not a dependency. It runs without its compiled parts, in a folder of its own:

    python -m pip install --no-deps --target PEERS escnn joblib pymanopt autograd lie_learn numpy==1.26.4
    PYTHONPATH=PEERS python benchmarks/cnn_groups.py

(lie_learn's wheel was built for that NumPy, so it goes into the folder too.) Where escnn is not installed, the
tables say "absent". Its layers span fewer filters than ours, since it leaves out high frequencies. So its filters
are copied into our layer, and both must give the same output.

Every candidate runs on maps as they usually lie in memory, and with their channels last; "best" is the faster of its
two. The limit is a convolution with a ready bank, as `GroupConv2d.as_conv2d` gives it: in inference what one ships, in
a training step with the gradients of input, bank and bias. Both layers end in this convolution, and none can be
faster, so "escnn / limit" bounds "escnn / this": where it is below 1.5, no layer that calls `F.conv2d` is 1.5 times as
fast as escnn. What a layer takes beyond the limit is the price of the tie: to make the bank, and to sum its gradient.
Channels last are faster for the convolution alone; a network also has norms and pooling over 5 axes, which are slower
then (CPU time of a training step of `P4CNN`: 1.1 times with 8 images, 1.3 times with 64), so our layer follows its input and converts nothing.

For inference escnn is in evaluation mode, where it keeps its expanded filters unseen; ours are compared with the
weight first. Every candidate frees its gradients before a step.
"""
import copy
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
RUNS = 40


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
    "{name: (function of maps, maps, the same with channels last, its module)}."
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
    plain, flat = ours.as_conv2d().to(device), x.flatten(1, 2)
    last = flat.to(memory_format=torch.channels_last)
    found = {"this": (ours, x, last.view(x.shape), ours), "limit": (plain, flat, last, plain)}
    if peer_nn is not None: found["escnn"] = theirs, flat, last, peer
    return found


def layouts(found):
    "{(name, layout): (function, input, parameters)}; our layer keeps a bank for each, the limit's lies as its input does."
    for name, (function, x, last, module) in found.items():
        yield (name, "usual"), (function, x, list(module.parameters()))
        if name != "escnn": function = module = copy.deepcopy(module)
        if name == "limit": module.to(memory_format=torch.channels_last)
        yield (name, "last"), (function, last, list(module.parameters()))


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


def ratios(values):
    "What the table shows of {(name, layout): seconds}."
    best = {name: min(values[name, layout] for layout in ("usual", "last")) for name in {name for name, _ in values}}
    found = {"best ms": 1e3 * best["this"]}
    if peer_nn is None: return found | {"escnn / this": "absent", "this / limit": best["this"] / best["limit"]}
    found["escnn / this"] = values["escnn", "usual"] / values["this", "usual"]
    found["escnn / this, channels last"] = values["escnn", "last"] / values["this", "last"]
    found["best escnn / best this"] = best["escnn"] / best["this"]
    found["escnn / limit"] = values["escnn", "usual"] / values["limit", "usual"]
    found["best escnn / best limit"] = best["escnn"] / best["limit"]
    return found | {"best this / best limit": best["this"] / best["limit"]}


def rows(device):
    for group, channels, height, batch in SIZES:
        found = candidates(group, channels, height, batch, device)
        for what in ("inference", "training step"):
            for *_, module in found.values(): module.train(what == "training step")
            runs = {key: inference(f, x) if what == "inference" else step(f, x, parameters)
                    for key, (f, x, parameters) in layouts(found)}
            row = {"": f"{group}, {channels} channels, {height}×{height}, batch {batch}: {what}"}
            row |= ratios(medians(runs, device, runs=RUNS))
            memory = {key: extra_memory(run, device) for key, run in runs.items()}
            if peer_nn is not None: row["memory of this / escnn"] = memory["this", "usual"] / memory["escnn", "usual"]
            yield row | {"memory of this / limit": memory["this", "usual"] / memory["limit", "usual"]}


def main(device):
    peer = "absent" if peer_nn is None else __import__("importlib.metadata").metadata.version("escnn")
    keep(f"cnn_groups_{device.type}", list(rows(device)), escnn=peer, filters="3×3, padding 1", runs=RUNS, machine=machine(device))


if __name__ == "__main__":
    for name in ["cpu"] + ["cuda"] * torch.cuda.is_available(): main(torch.device(name))
    if not torch.cuda.is_available(): print("no CUDA device: the GPU ratios were not measured")
