"""One step of several tasks: `balancer(name).backward` against TorchJD, LibMTL and the limit.

TorchJD and LibMTL are peers, not dependencies. They run from a folder of their own:

    python -m pip install --no-deps --target PEERS torchjd LibMTL==1.1.5 qpsolvers quadprog cvxpy clarabel scs osqp qdldl
    PYTHONPATH=PEERS python benchmarks/balancing.py

Where one is not installed, the tables say "absent". LibMTL's package asks for torchvision when it is imported, so
its methods are imported from under it. Every candidate runs the forward pass of trunk and heads, and leaves
gradients in the trunk and in the heads; gradients are freed before each step.

Exact form: the limit is one backward pass for each task. Representation form: the limit is one backward pass of
the sum of the losses.
"""
import importlib.metadata
import importlib.util
import sys
import types
import warnings
from pathlib import Path

import torch
from torch import nn

from _measure import extra_memory, keep, machine, medians
from sharetie.balancing import balancer

try:
    import torchjd
    from torchjd.autojac import jac_to_grad, mtl_backward
except ImportError: torchjd = None

LIBMTL = importlib.util.find_spec("LibMTL")
if LIBMTL is not None:
    package = types.ModuleType("LibMTL")
    package.__path__ = [str(Path(LIBMTL.origin).parent)]
    sys.modules["LibMTL"] = package
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import LibMTL.weighting as libmtl

WIDTHS = {"1.4 M": (256, 1024, 1024, 64), "25 M": (512, 3200, 3200, 3200, 1024)}
METHODS = {"1.4 M": ("pcgrad", "mgda", "cagrad", "imtl"), "25 M": ("pcgrad", "mgda")}
TORCHJD = {"pcgrad": "PCGrad", "mgda": "MGDA", "cagrad": "CAGrad", "imtl": "IMTLG", "upgrad": "UPGrad"}
IN_LIBMTL = {"pcgrad": "PCGrad", "mgda": "MGDA", "imtl": "IMTL"}  # its CAGrad is written for three tasks
TASKS = (2, 5, 10, 20)
BATCH = 32


class Tasks(nn.Module):
    "A trunk of ReLU layers, and a linear head per task."
    def __init__(self, widths, count):
        super().__init__()
        layers = [layer for pair in zip(widths, widths[1:]) for layer in (nn.Linear(*pair), nn.ReLU())]
        self.trunk, self.heads = nn.Sequential(*layers), nn.ModuleList(nn.Linear(widths[-1], 1) for _ in range(count))

    def losses(self, x, y):
        "The representation, and the squared error of each task."
        z = self.trunk(x)
        return z, [(head(z)[:, 0] - target).square().mean() for head, target in zip(self.heads, y)]


def by_libmtl(method, model, count, device):
    "LibMTL's method as a function of losses."
    shared = list(model.trunk.parameters())
    peer = getattr(libmtl, IN_LIBMTL[method])()
    peer.task_num, peer.device, peer.rep_grad = count, device, False
    peer.get_share_params = lambda: shared
    def clear():
        for p in shared:
            if p.grad is not None: p.grad.zero_()  # it fills only gradients that are there
    peer.zero_grad_share_params = clear
    peer.init_param()
    return lambda z, losses: peer.backward(torch.stack(losses), mgda_gn="none")


def by_torchjd(method, model):
    "TorchJD's method as a function of losses."
    options = {"c": .4} if method == "cagrad" else {}
    aggregate = getattr(torchjd.aggregation, TORCHJD[method])(**options)
    shared, heads = list(model.trunk.parameters()), [list(head.parameters()) for head in model.heads]
    def run(z, losses):
        mtl_backward(losses, features=z, tasks_params=heads, shared_params=shared)
        jac_to_grad(shared, aggregate)
    return run


def candidates(method, widths, count, device):
    "{name: function} of one step each, by the exact form."
    torch.manual_seed(0)
    model = Tasks(widths, count).to(device)
    x, y = torch.randn(BATCH, widths[0], device=device), torch.randn(count, BATCH, device=device)
    ours = balancer(method)
    def limit(z, losses):
        for loss in losses: loss.backward(retain_graph=True)
    found = {"ours": lambda z, losses: ours.backward(dict(enumerate(losses)), model.trunk), "limit": limit,
             "by representation": lambda z, losses: ours.backward(dict(enumerate(losses)), model.trunk, representation=z),
             "sum": lambda z, losses: sum(losses).backward()}
    if torchjd is not None: found["TorchJD"] = by_torchjd(method, model)
    if LIBMTL is not None and method in IN_LIBMTL: found["LibMTL"] = by_libmtl(method, model, count, device)
    def step(f):
        def run():
            model.zero_grad()
            f(*model.losses(x, y))
        return run
    return {name: step(f) for name, f in found.items()}


def ratio(peer, found): return found[peer] / found["ours"] if peer in found else "absent"


def rows(device):
    for size, widths in WIDTHS.items():
        for method in METHODS[size]:
            for count in TASKS:
                runs = candidates(method, widths, count, device)
                times = medians(runs, device, runs=20 if size == "1.4 M" else 5, warmup=2)
                memory = {name: extra_memory(run, device) for name, run in runs.items()}
                smallest = min((memory[peer] for peer in ("TorchJD", "LibMTL") if peer in memory), default=None)
                yield {"": f"{method}, {size} shared, {count} tasks", "ms": 1e3 * times["ours"],
                       "TorchJD / this": ratio("TorchJD", times), "LibMTL / this": ratio("LibMTL", times),
                       "this / limit": times["ours"] / times["limit"],
                       "representation / sum": times["by representation"] / times["sum"],
                       "memory: this / smaller peer": memory["ours"] / smallest if smallest else "absent"}


def version(name):
    try: return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: return "absent"


def main(device):
    keep(f"balancing_{device.type}", list(rows(device)), torchjd=version("torchjd"), libmtl=version("LibMTL"), batch=BATCH,
         runs="20, with 25 M 5", machine=machine(device))


if __name__ == "__main__":
    for name in ["cpu"] + ["cuda"] * torch.cuda.is_available(): main(torch.device(name))
    if not torch.cuda.is_available(): print("no CUDA device: the GPU ratios were not measured")
