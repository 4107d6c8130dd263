"""`MoE` against a loop over experts, the experts of transformers, and a dense layer of the same active operations.

Forward, and forward with backward, of one layer with gated experts, one thread on a CPU. All mixtures have the same
weights, and give the same output, which is checked first. The dense layer has the width that a token uses, so it is
the limit: what is above 1 goes to the router, to sorting and gathering rows, and to products of fewer rows each.
"""
import statistics
import sys

import torch
from torch import nn

from _measure import keep, machine, recorded, samples
from sharetie.moe import FeedForward, MoE

try: from transformers.models.mixtral import MixtralConfig, modeling_mixtral as mixtral
except ImportError: mixtral = None

LIMITS = {"float32": 1.25, "bfloat16": 1.6}  # at the first size, by the dense layer
SIZES = [{"tokens": 2048, "experts": 8, "top_k": 2, "dim": 256, "hidden": 512},
         {"tokens": 2048, "experts": 64, "top_k": 8, "dim": 256, "hidden": 128},
         {"tokens": 8192, "experts": 8, "top_k": 2, "dim": 256, "hidden": 512},
         {"tokens": 16384, "experts": 64, "top_k": 1, "dim": 256, "hidden": 512},
         {"tokens": 65536, "experts": 8, "top_k": 1, "dim": 128, "hidden": 256},
         {"tokens": 65536, "experts": 128, "top_k": 8, "dim": 128, "hidden": 64},
         {"tokens": 64, "experts": 8, "top_k": 2, "dim": 256, "hidden": 512}]
PEERS = {"transformers, eager": "eager", "transformers, grouped_mm": "grouped_mm", "transformers, batched_mm": "batched_mm"}
LARGE = 256  # tokens above which batched_mm is left out: it copies both matrices for each slot
RUNS = {2048: 10, 8192: 6, 65536: 4}  # up to so many tokens
LONG, TWICE = 4096, 2  # tokens above which bfloat16 is timed twice only on CPUs: those without it emulate it for minutes
PARTS = {"products": ["mm", "addmm", "bmm", "_grouped_mm"], "rows gathered and summed": ["index_select", "_embedding_bag", "_embedding_bag_forward_only"],
         "activation": ["silu", "silu_backward", "mul", "mul_", "sum"],
         "router, sorting": ["_softmax", "_softmax_backward_data", "topk", "sort", "searchsorted", "scatter", "div"]}


class Loop(nn.Module):
    "The layer as one would write it first, on the weights of ours."
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        layer, k = self.layer, self.layer.router.top_k
        probs = (x.float() @ layer.router.gate.weight.float().mT).softmax(-1)
        weight, expert = probs.topk(k, -1)
        weight = (weight / weight.sum(-1, keepdim=True)).to(x.dtype)
        y = torch.zeros_like(x)
        for e in range(layer.experts.num_experts):
            token, slot = (expert == e).nonzero(as_tuple=True)
            gate, up = (x[token] @ layer.experts.w_in[e].mT).chunk(2, -1)
            out = (nn.functional.silu(gate) * up) @ layer.experts.w_out[e]
            y = y.index_add(0, token, out * weight[token, slot, None])
        return y


class Peer(nn.Module):
    "The block of a Mixtral model with the weights of our layer, and one of its ways to compute experts."
    def __init__(self, layer, way):
        super().__init__()
        e = layer.experts
        config = MixtralConfig(hidden_size=e.dim, intermediate_size=e.hidden, num_local_experts=e.num_experts,
                               num_experts_per_tok=layer.router.top_k, num_attention_heads=4)
        config._experts_implementation = way
        with torch.device(e.w_in.device): self.block = mixtral.MixtralSparseMoeBlock(config).to(e.w_in.dtype)
        with torch.no_grad():
            self.block.gate.weight.copy_(layer.router.gate.weight)
            self.block.experts.gate_up_proj.copy_(e.w_in)
            self.block.experts.down_proj.copy_(e.w_out.mT)

    def forward(self, x): return self.block(x[None])[0]


def candidates(size, dtype, device):
    "The layers of one size by name; those that mix give the same."
    torch.manual_seed(0)
    made = {"device": device, "dtype": dtype}
    layer = MoE(size["dim"], size["hidden"], size["experts"], size["top_k"], **made)
    found = {"ours": layer, "loop": Loop(layer)}
    if mixtral: found |= {name: Peer(layer, way) for name, way in PEERS.items() if way != "batched_mm" or size["tokens"] <= LARGE}
    x = torch.randn(size["tokens"], size["dim"], **made)
    with torch.no_grad():
        expected = layer(x)
        for name, other in found.items():
            near = (other(x) - expected).abs().amax(-1) < (1e-4 if dtype == torch.float32 else .05)
            assert near.float().mean() > .98, f"{name} gives something else"  # in bfloat16 peers round logits, and a few tokens go elsewhere
    return found | {"dense": FeedForward(size["dim"], size["top_k"] * size["hidden"], **made)}, x


def step(layer, x, back):
    "A function that runs a layer forward, or forward and backward."
    if not back:
        def forward():
            with torch.no_grad(): layer(x)
        return forward
    grad = torch.randn_like(x)
    def both():
        for p in layer.parameters(): p.grad = None
        x.grad = None
        layer(x).backward(grad)
    return both


def parts(function, runs=10):
    "Milliseconds of one run by kind of operation, from the profiler."
    function()
    with torch.profiler.profile() as profile:
        for _ in range(runs): function()
    own = {e.key.removeprefix("aten::"): e.self_cpu_time_total / 1e3 / runs for e in profile.key_averages()}
    found = {part: sum(own.pop(name, 0) for name in names) for part, names in PARTS.items()}
    return found | {"rest": sum(own.values())}


def where(size):
    "What each kind of operation takes in our layer and in the dense one, as shares of all that the dense one takes."
    layers, x = candidates(size, torch.float32, torch.device("cpu"))
    x.requires_grad_()
    for name, back in (("forward", False), ("forward and backward", True)):
        times = {key: parts(step(layers[key], x, back)) for key in ("ours", "dense")}
        total = sum(times["dense"].values())
        for key in times: yield {"": key, "pass": name, **size, **{part: t / total for part, t in times[key].items()}}


def main(device, kinds):
    "Measure the `kinds` of numbers; rows of others stay as they were recorded."
    if device.type == "cpu": torch.set_num_threads(1)
    rows = [row for row in recorded(f"moe_{device.type}") if row["dtype"] not in kinds]
    for size in SIZES:
        for dtype in (getattr(torch, kind) for kind in kinds):
            slow = dtype == torch.bfloat16 and device.type == "cpu" and size["tokens"] > LONG
            runs = TWICE if slow else next(n for tokens, n in RUNS.items() if size["tokens"] <= tokens)
            layers, x = candidates(size, dtype, device)
            x.requires_grad_()
            for name, back in (("forward", False), ("forward and backward", True)):
                seconds = samples({key: step(layer, x, back) for key, layer in layers.items()}, device, runs, warmup=not slow)
                times = {key: statistics.median(t) for key, t in seconds.items()}
                best = min(times.keys() - {"ours", "dense"}, key=times.get)
                low, _, high = statistics.quantiles([a / b for a, b in zip(seconds["ours"], seconds[best])], method="inclusive")
                rows.append({"": name, "dtype": str(dtype).removeprefix("torch."), **size, "ours, ms": 1e3 * times["ours"],
                             "ours / dense": times["ours"] / times["dense"], "ours / best peer": times["ours"] / times[best], "quartiles": [low, high],
                             **{f"{key} / dense": t / times["dense"] for key, t in times.items() if key not in ("ours", "dense")}})
            print(f"{size}, {dtype}: done", flush=True)
    rows.sort(key=lambda row: (SIZES.index({k: row[k] for k in SIZES[0]}), row["dtype"] != "float32"))
    keep(f"moe_{device.type}", rows, runs=RUNS | {f"bfloat16 on a CPU above {LONG}": TWICE}, absent="" if mixtral else "transformers", limits=LIMITS, machine=machine(device))
    if device.type == "cpu" and "float32" in kinds: keep("moe_parts_cpu", [row for size in (*SIZES[:2], SIZES[-1]) for row in where(size)], runs=10, machine=machine(device))


if __name__ == "__main__":
    kinds = sys.argv[1:] or ["float32", "bfloat16"]
    for name in ["cpu"] + ["cuda"] * torch.cuda.is_available(): main(torch.device(name), kinds)
    if not torch.cuda.is_available(): print("no CUDA device: the GPU ratios were not measured; ScatterMoE and MegaBlocks need one")
