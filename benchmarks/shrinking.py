"""Networks with half of their units removed by `remove_units_`, against the dense ones: time and file size.

The limit of time is the share of multiplications and additions that is left, as PyTorch counts them: a quarter for
layers between two that shrink, a half at the ends. A masked network, with zeros where units were, takes the time of
the dense one, and is timed beside it. The limit of size is the share of the parameters that is left.
"""
import copy
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from _measure import keep, machine, medians
from sharetie.saving import save_model
from sharetie.shrinking import remove_units_
from sharetie.tracing import trace_units


class Residual(nn.Module):
    "Two convolutions with norms, added to their input."
    def __init__(self, width, inner):
        super().__init__()
        self.a, self.n, self.b, self.m = nn.Conv2d(width, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner), nn.Conv2d(inner, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x): return (x + self.m(self.b(self.n(self.a(x)).relu()))).relu()


def networks():
    "By name: a network, an input."
    sizes = [784, 1024, 1024, 1024]
    mlp = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.ReLU())]
    vgg = [m for a, b in ((3, 64), (64, 64), (64, 128), (128, 128)) for m in (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())]
    res = [nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), *(Residual(64, 128) for _ in range(4))]
    block = nn.TransformerEncoderLayer(256, 4, 2048, batch_first=True)
    return {"linear, 784-1024-1024-1024-10, 256 rows": (nn.Sequential(*mlp, nn.Linear(1024, 10)), torch.randn(256, 784)),
            "convolutions, 64-64-128-128, 8 images of 32²": (nn.Sequential(*vgg, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(2048, 10)), torch.randn(8, 3, 32, 32)),
            "residual, 4 blocks of 64-128-64, 8 images of 32²": (nn.Sequential(*res, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)), torch.randn(8, 3, 32, 32)),
            "transformer layer, hidden units of 2048, 4 × 64 tokens": (block, torch.randn(4, 64, 256))}


def halves(model, x):
    "Half of the units of every layer that can lose some, each unit once."
    graph, seen, gone = trace_units(model, x[:2]), set(), {}
    for name, own in graph.layers.items():
        free = [u for u in dict.fromkeys(own.tolist()) if u not in graph.fixed and u not in graph.mixed]
        if len(free) < len(set(own.tolist())) or seen & set(free): continue
        seen |= set(free)
        gone[name] = [i for i, u in enumerate(own.tolist()) if u in set(free[: len(free) // 2])]
    return gone


def operations(model, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad(): model(x)
    return counter.get_total_flops()


def size(model, folder):
    save_model(model, Path(folder) / "m.safetensors")
    return (Path(folder) / "m.safetensors").stat().st_size


def units(device=torch.device("cpu")):
    "Write pruning_units: dense, masked and shrunk networks."
    torch.backends.mha.set_fastpath_enabled(False)  # the counter of operations sees no fused kernels
    rows = []
    for name, (model, x) in networks().items():
        torch.manual_seed(0)
        model, x = model.to(device).eval(), x.to(device)
        small, masked = copy.deepcopy(model), copy.deepcopy(model)
        gone = halves(model, x)
        remove_units_(small, gone, x[:2])
        graph = trace_units(model, x[:2])
        numbers = {int(graph.layers[layer][i]) for layer, units in gone.items() for i in units}
        tensors = dict(masked.named_parameters())
        with torch.no_grad():
            for tensor, axes in graph.axes.items():
                for axis, own in enumerate(axes):
                    if tensor in tensors: tensors[tensor].index_fill_(axis, torch.tensor([i for i, u in enumerate(own) if u in numbers], dtype=torch.long, device=device), 0)
            torch.testing.assert_close(small(x), masked(x), rtol=1e-3, atol=1e-3)

        def forward(net):
            def run():
                with torch.no_grad(): net(x)
            return run
        def backward(net):
            def run(): torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
            return run
        nets = {"dense": model, "masked": masked, "small": small}
        fast = medians({key: forward(net) for key, net in nets.items()}, device)
        both = medians({key: backward(net) for key, net in nets.items()}, device)
        left, count = operations(small, x) / operations(model, x), lambda net: sum(p.numel() for p in net.parameters())
        with tempfile.TemporaryDirectory() as folder: files = size(small, folder) / size(model, folder)
        rows.append({"": name, "dense (ms)": 1e3 * fast["dense"], "dense / small": fast["dense"] / fast["small"], "masked / small": fast["masked"] / fast["small"],
                     "with backward": both["dense"] / both["small"], "limit: operations": 1 / left, "small / limit": fast["small"] / fast["dense"] / left,
                     "file: dense / small": 1 / files, "limit: parameters": count(model) / count(small)})
    torch.backends.mha.set_fastpath_enabled(True)
    keep(f"pruning_units_{device.type}", rows, limit="the share of operations that is left; for files, of parameters", runs=20, machine=machine(device))


if __name__ == "__main__":
    for name in ["cpu"] + ["cuda"] * torch.cuda.is_available(): units(torch.device(name))
    if not torch.cuda.is_available(): print("no CUDA device: the GPU ratios were not measured")
