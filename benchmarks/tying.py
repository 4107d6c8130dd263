"""The tying penalty against the plain loop and the limit of the memory.

Two copies of a 12-layer transformer's weights (about 85 million parameters, 200 tensors). The limit is the time
to read both copies and to write both gradients once, at the copy bandwidth measured in the same turns.
Gradients are kept from step to step, as gradient accumulation and `zero_grad(set_to_none=False)` do; a second
table frees them before every step, and there the allocation of fresh memory is part of every candidate's time.
"""
import torch
from torch import nn

from _measure import copy, extra_memory, keep, machine, medians
from sharetie.tying import TiePenalty, accumulate_grad_

STRENGTH = 0.01
RUNS = 60  # other work on a shared machine makes single runs differ by half


def transformer(device):
    "The weights of 12 blocks of width 768, with the tensors that a GPT-2 block has, and a few beside them."
    width, blocks = 768, 12
    def block():
        return nn.ModuleDict({"norm1": nn.LayerNorm(width, device=device), "qkv": nn.Linear(width, 3 * width, device=device),
                              "project": nn.Linear(width, width, device=device), "norm2": nn.LayerNorm(width, device=device),
                              "up": nn.Linear(width, 4 * width, device=device), "down": nn.Linear(4 * width, width, device=device),
                              "scales": nn.ParameterDict({k: torch.ones(width, device=device) for k in ("attention", "mlp", "query", "key")})})
    return nn.ModuleDict({"blocks": nn.ModuleList(block() for _ in range(blocks)), "norm": nn.LayerNorm(width, device=device),
                          "extra": nn.ParameterList([torch.randn(width, device=device) for _ in range(6)])})


def candidates(a, b, fresh):
    "{name: function} of one value and gradient each; `fresh` frees the gradients first."
    parameters = [*a.parameters(), *b.parameters()]
    penalty = TiePenalty(a, b, strength=STRENGTH)

    def loop(): (STRENGTH * sum((x - y).pow(2).sum() for x, y in zip(a.parameters(), b.parameters()))).backward()
    def autograd(): penalty().backward()
    def one_pass(): accumulate_grad_(penalty)
    def compiled(): accumulate_grad_(penalty, compiled=True)

    def prepared(function):
        def run():
            for p in parameters if fresh else (): p.grad = None
            function()
        return run
    return {name: prepared(f) for name, f in {"loop": loop, "penalty().backward()": autograd, "accumulate_grad_": one_pass, "accumulate_grad_, compiled": compiled}.items()}


def main(device):
    torch.manual_seed(0)
    a, b = transformer(device), transformer(device)
    count, tensors = sum(p.numel() for p in a.parameters()), len(list(a.parameters()))
    for fresh in (False, True):
        runs = candidates(a, b, fresh)
        runs["loop"]()
        expected = torch.cat([p.grad.flatten() for p in b.parameters()])
        for name, run in runs.items():  # every candidate must compute the same gradient
            for p in (*a.parameters(), *b.parameters()): p.grad = None
            run()
            torch.testing.assert_close(torch.cat([p.grad.flatten() for p in b.parameters()]), expected)
        memory = {name: extra_memory(run, device) / (4 * count) for name, run in runs.items()}
        times = medians({"copy": copy(count, device), **runs}, device, runs=RUNS)
        limit = 2 * times.pop("copy")  # a copy reads and writes each number once; the limit reads two and writes two
        rows = [{"": name, "ms": 1e3 * t, "loop / this": times["loop"] / t, "this / limit": t / limit, "extra memory (gradients)": memory[name]}
                for name, t in times.items()]
        keep(f"tying_{device.type}_{'fresh' if fresh else 'kept'}", rows, gradients="freed before each step" if fresh else "kept",
             parameters=count, tensors=tensors, limit_ms=round(1e3 * limit, 2), runs=RUNS, machine=machine(device))


if __name__ == "__main__":
    for name in ["cpu"] + ["cuda"] * torch.cuda.is_available(): main(torch.device(name))
    if not torch.cuda.is_available(): print("no CUDA device: the GPU ratios were not measured")
