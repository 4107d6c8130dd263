"""`MoE` against a loop over experts, the experts of transformers, ScatterMoE, MegaBlocks, and two limits.

Forward, and forward with backward, of one layer with gated experts, one thread on a CPU. All mixtures have the same
weights, and give the same output, which is checked first. One limit is a dense layer of the width that a token uses:
what is above 1 goes to the router, to sorting and gathering rows, and to products of fewer rows each. The other is to
move the bytes that must be: weights of experts that have tokens, tokens and gradients, at the bandwidth of a copy.
`python benchmarks/moe.py float32` measures single precision again, and leaves other rows as they were recorded.
"""
import statistics
import sys
from copy import deepcopy

import torch
from torch import nn

from _measure import copy, keep, machine, recorded, samples
from sharetie.moe import FeedForward, MoE, TopK

try: from transformers.models.mixtral import MixtralConfig, modeling_mixtral as mixtral
except ImportError: mixtral = None
try: from scattermoe.mlp import GLUMLP
except ImportError: GLUMLP = None
try: from megablocks.layers import arguments, dmoe
except ImportError: dmoe = None

LIMITS = {"float32": 1.25, "bfloat16": 1.6}  # of a CPU at the first size, by the dense layer
SIZES = [{"tokens": 2048, "experts": 8, "top_k": 2, "dim": 256, "hidden": 512},
         {"tokens": 2048, "experts": 64, "top_k": 8, "dim": 256, "hidden": 128},
         {"tokens": 8192, "experts": 8, "top_k": 2, "dim": 256, "hidden": 512},
         {"tokens": 16384, "experts": 64, "top_k": 1, "dim": 256, "hidden": 512},
         {"tokens": 65536, "experts": 8, "top_k": 1, "dim": 128, "hidden": 256},
         {"tokens": 65536, "experts": 128, "top_k": 8, "dim": 128, "hidden": 64},
         {"tokens": 64, "experts": 8, "top_k": 2, "dim": 256, "hidden": 512}]
PEERS = {"transformers, eager": "eager", "transformers, grouped_mm": "grouped_mm", "transformers, batched_mm": "batched_mm"}
LARGE = 256  # tokens above which batched_mm is left out: it copies both matrices for each slot
LARGEST = {"tokens": 16384, "experts": 64, "top_k": 8, "dim": 2048, "hidden": 1024}  # on GPUs, where 1.15 is the aim
RUNS, SECONDS = 20, 45  # runs of each candidate, or as many as fit into so many seconds for all, and two at least
PARTS = {"products": ["mm", "addmm", "bmm", "_grouped_mm"], "rows gathered and summed": ["index_select", "_embedding_bag", "_embedding_bag_forward_only"],
         "activation": ["silu", "silu_backward", "mul", "mul_", "sum"],
         "router, sorting": ["_softmax", "_softmax_backward_data", "topk", "sort", "searchsorted", "scatter", "div"]}


class Loop(nn.Module):
    "The layer as one would write it first, with the weights of ours."
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        layer, k = self.layer, self.layer.router.top_k
        probs = (x.float() @ layer.router.gate.weight.float().mT).softmax(-1)
        weight, expert = probs.topk(k, -1)
        weight = (weight / weight.sum(-1, keepdim=True)).to(x.dtype)
        y = torch.zeros_like(x)  # one split of the stacks: taking expert e out of them costs a stack of zeros on the way back
        for e, (w_in, w_out) in enumerate(zip(layer.experts.w_in.unbind(), layer.experts.w_out.unbind())):
            token, slot = (expert == e).nonzero(as_tuple=True)
            gate, up = (x[token] @ w_in.mT).chunk(2, -1)
            y = y.index_add(0, token, (nn.functional.silu(gate) * up) @ w_out * weight[token, slot, None])
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


class Scattered(nn.Module):
    "ScatterMoE with the weights and the router of our layer."
    def __init__(self, layer):
        super().__init__()
        e, self.router = layer.experts, layer.router
        self.peer = GLUMLP(e.dim, e.hidden, e.num_experts, layer.router.top_k).to(e.w_in)
        with torch.no_grad():
            gate, up = e.w_in.chunk(2, 1)
            self.peer.experts.weight.copy_(torch.cat([up, gate], 1))
            self.peer.output_experts.weight.copy_(e.w_out.mT)

    def forward(self, x):
        weight, expert = (x.float() @ self.router.gate.weight.float().mT).softmax(-1).topk(self.router.top_k, -1)
        return self.peer(x, (weight / weight.sum(-1, keepdim=True)).to(x.dtype), expert)


class Blocks(nn.Module):
    "The dropless layer of MegaBlocks with the weights of ours."
    def __init__(self, layer):
        super().__init__()
        e, half = layer.experts, layer.experts.w_in.dtype
        self.peer = dmoe.dMoE(arguments.Arguments(
            hidden_size=e.dim, ffn_hidden_size=e.hidden, bias=False, return_bias=False, activation_fn=nn.functional.silu,
            moe_num_experts=e.num_experts, moe_top_k=layer.router.top_k, moe_normalize_expert_weights=1, mlp_type="glu",
            fp16=half == torch.float16, bf16=half == torch.bfloat16, device=e.w_in.device))
        with torch.no_grad():
            self.peer.router.layer.weight.copy_(layer.router.gate.weight)
            for own, part in zip((self.peer.experts.mlp.w1, self.peer.experts.mlp.v1, self.peer.experts.mlp.w2), (*e.w_in.chunk(2, 1), e.w_out)):
                own.copy_(part.reshape(own.shape))

    def forward(self, x): return self.peer(x[:, None])[:, 0]


def peers(layer, size):
    "(name, a function that makes it, why it is not there) of each peer."
    cuda = layer.experts.w_in.is_cuda
    for name, way in PEERS.items():
        small = way != "batched_mm" or size["tokens"] <= LARGE
        yield name, lambda way=way: Peer(layer, way), "not installed" if not mixtral else "" if small else f"above {LARGE} tokens"
    for name, made, there in (("ScatterMoE", Scattered, GLUMLP), ("MegaBlocks", Blocks, dmoe)):
        yield name, lambda made=made: made(layer), "needs CUDA" if not cuda else "" if there else "not installed"


def candidates(size, dtype, device):
    "The layers of one size by name, those that mix give the same; tokens; and why peers are absent."
    torch.manual_seed(0)
    made = {"device": device, "dtype": dtype}
    router = TopK(size["dim"], size["experts"], size["top_k"], renormalize=True, **made)  # as peers do, for one expert too
    layer = MoE(size["dim"], size["hidden"], size["experts"], size["top_k"], router=router, **made)
    found, absent, x = {"ours": layer}, {}, torch.randn(size["tokens"], size["dim"], **made)
    with torch.no_grad():
        expected, exact = layer(x), dtype == torch.float32
        for name, make, why in [("loop", lambda: Loop(deepcopy(layer)), ""), *peers(layer, size)]:
            try:
                other = None if why else make()
                y = other and other(x)
            except Exception as error: why = f"{type(error).__name__}: {error}".partition("\n")[0]  # whatever a peer cannot do here
            if why: absent[name] = why
            else:
                near = (y - expected).abs().amax(-1) < (1e-4 if exact else .05)
                assert near.float().mean() >= (1 if exact else .98), f"{name} gives something else"  # peers round logits of bfloat16, and a few tokens go elsewhere
                found[name] = other
    return found | {"dense": FeedForward(size["dim"], size["top_k"] * size["hidden"], **made)}, x, absent


def least(layer, x, back):
    "A copy of as many bytes as a pass has to read and write."
    e, used = layer.experts, int((layer.routing.counts() > 0).sum())
    weights, tokens = used * 3 * e.dim * e.hidden, x.numel()
    return copy((3 * weights + 5 * tokens if back else weights + 2 * tokens) // 2, x.device, x.dtype)  # a copy reads and writes


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
    layers, x, _ = candidates(size, torch.float32, torch.device("cpu"))
    x.requires_grad_()
    for name, back in (("forward", False), ("forward and backward", True)):
        times = {key: parts(step(layers[key], x, back)) for key in ("ours", "dense")}
        total = sum(times["dense"].values())
        for key in times: yield {"": key, "pass": name, **size, **{part: t / total for part, t in times[key].items()}}


def compare(size, dtype, device):
    "The rows of one size and type, and why peers are absent."
    (layers, x, absent), rows = candidates(size, dtype, device), []
    x.requires_grad_()
    for name, back in (("forward", False), ("forward and backward", True)):
        steps = {key: step(layer, x, back) for key, layer in layers.items()} | {"bytes": least(layers["ours"], x, back)}
        seconds = samples(steps, device, RUNS, warmup=1, seconds=SECONDS)
        times = {key: statistics.median(t) for key, t in seconds.items()}
        best = min(times.keys() - {"ours", "dense", "bytes"}, key=times.get)
        low, _, high = statistics.quantiles([a / b for a, b in zip(seconds["ours"], seconds[best])], method="inclusive")
        rows.append({"": name, "dtype": str(dtype).removeprefix("torch."), **size, "runs": len(seconds["ours"]), "ours, ms": 1e3 * times["ours"],
                     "ours / dense": times["ours"] / times["dense"], "ours / best peer": times["ours"] / times[best], "quartiles": [low, high],
                     **{f"{key} / dense": t / times["dense"] for key, t in times.items() if key not in ("ours", "dense")}})
    return rows, absent


def main(device, kinds):
    "Measure the `kinds` of numbers; rows of others stay as they were recorded."
    if device.type == "cpu": torch.set_num_threads(1)
    sizes, name = [*SIZES, *[LARGEST] * (device.type == "cuda")], f"moe_{device.type}"
    def size_of(row): return {k: row[k] for k in SIZES[0]}
    rows, absent = [row for row in recorded(name) if row["dtype"] not in kinds and size_of(row) in sizes], {}
    for size in sizes:
        for kind in kinds:
            found, why = compare(size, getattr(torch, kind), device)
            rows, absent = rows + found, absent | why
            print(f"{size}, {kind}: done", flush=True)
        rows.sort(key=lambda row: (sizes.index(size_of(row)), row["dtype"] != "float32"))
        keep(name, rows, absent=absent, limits=LIMITS if device.type == "cpu" else {"the last size": 1.15}, machine=machine(device))
    if device.type == "cpu" and "float32" in kinds: keep("moe_parts_cpu", [row for size in (*SIZES[:2], SIZES[-1]) for row in where(size)], runs=10, machine=machine(device))


if __name__ == "__main__":
    kinds = sys.argv[1:] or ["float32", "bfloat16"]
    for name in ["cpu"] + ["cuda"] * torch.cuda.is_available(): main(torch.device(name), kinds)
    if not torch.cuda.is_available(): print("no CUDA device: the GPU ratios were not measured")
