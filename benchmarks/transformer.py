"""A transformer with shared layers against the same one with its own: time of a training step, memory, bytes on disk.

The computation is the same, layer for layer. What sharing leaves out is the optimizer's work on the weights that
are no longer there, so a step must not be slower; gradients and the optimizer's state shrink with the weights.
Relaxed layers are shown too, without a limit on their time: they compute their weights in every step.
"""
import copy
import tempfile
from pathlib import Path

import torch
from torch import nn

from _measure import extra_memory, keep, machine, medians
from sharetie.attention import Block
from sharetie.depth import relax_layers_
from sharetie.layers import share_layers_
from sharetie.saving import save_model

LIMITS = {"step / own": 1.0, "state / own": 1.0, "file - header - stored": 0}
SIZE = {"layers": 12, "dim": 256, "batch": 4, "positions": 32}


class Stack(nn.Module):
    "Twelve layers."
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(SIZE["dim"], 4) for _ in range(SIZE["layers"]))

    def forward(self, x):
        for block in self.blocks: x = block(x)
        return x


WAYS = {"own": lambda model: None, "all": share_layers_, "cycle, 3": lambda model: share_layers_(model, "cycle", 3),
        "attention": lambda model: share_layers_(model, parts="attention"), "relaxed, rank 8": lambda model: relax_layers_(model, 8)}


def stepper(model, x):
    "A function that takes one step of Adam, and the optimizer."
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    def step():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return step, optimizer


def state_bytes(optimizer):
    "What an optimizer holds besides the weights."
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor))


def file_bytes(model):
    "Size of a saved file, and of its header."
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_model(model, path)
        data = path.read_bytes()
    return len(data), 8 + int.from_bytes(data[:8], "little")


def main(device):
    torch.manual_seed(0)
    if device.type == "cpu": torch.set_num_threads(1)
    first, x = Stack(), torch.randn(SIZE["batch"], SIZE["positions"], SIZE["dim"], device=device)
    models, steps, states = {}, {}, {}
    for name, change in WAYS.items():
        models[name] = copy.deepcopy(first)
        change(models[name])
        steps[name], optimizer = stepper(models[name].to(device), x)
        steps[name]()
        states[name] = state_bytes(optimizer)
    times, rows = medians(steps, device), []
    for name, model in models.items():
        stored = sum(p.nbytes for p in model.parameters())
        size, header = file_bytes(model.cpu())
        model.to(device)
        rows.append({"": name, "step, ms": 1e3 * times[name], "step / own": times[name] / times["own"], "stored, bytes": stored,
                     "state of Adam, bytes": states[name], "state / own": states[name] / states["own"],
                     "peak of a step, bytes": extra_memory(steps[name], device), "file - header - stored": size - header - stored})
    keep(f"transformer_layers_{device.type}", rows, runs=20, **SIZE, limits=LIMITS, machine=machine(device))


if __name__ == "__main__":
    for name in ["cpu"] + ["cuda"] * torch.cuda.is_available(): main(torch.device(name))
    if not torch.cuda.is_available(): print("no CUDA device: the GPU ratios were not measured")
