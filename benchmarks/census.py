"""The census against the plain forward pass, and against PyTorch's own counter of operations.

One thread, so that wall-clock and CPU time can be compared; on a busy machine the second is the steadier.
The census runs one example, so beside a batch it is cheap; a batch of one is the hard case and is shown too.
The second table counts a transformer with 70 billion parameters on the meta device, in a process of its own.
"""
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from _measure import keep, machine, medians
from sharetie.census import census
from sharetie.classics import ResNet50

LIMITS = {"seconds": 10, "bytes": 1e9, "census / forward": 3}


def transformer(width=256, blocks=4):
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True), blocks, enable_nested_tensor=False)


def llama():
    "Llama 2 70B, for the meta device."
    import torch.nn.functional as F

    class Block(nn.Module):
        def __init__(self, d=8192, kv=1024, hidden=28672):
            super().__init__()
            self.norms = nn.ModuleList(nn.RMSNorm(d) for _ in range(2))
            sizes = {"q": (d, d), "k": (d, kv), "v": (d, kv), "o": (d, d), "gate": (d, hidden), "up": (d, hidden), "down": (hidden, d)}
            for name, (ins, outs) in sizes.items(): setattr(self, name, nn.Linear(ins, outs, bias=False))

        def forward(self, x):
            y = self.norms[0](x)
            q, k, v = (f(y).unflatten(-1, (-1, 128)).transpose(1, 2) for f in (self.q, self.k, self.v))
            x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2))
            y = self.norms[1](x)
            return x + self.down(F.silu(self.gate(y)) * self.up(y))
    return nn.Sequential(nn.Embedding(32000, 8192), *(Block() for _ in range(80)), nn.RMSNorm(8192), nn.Linear(8192, 32000, bias=False))


def large():
    "Count Llama 2 70B without memory, and print seconds, peak memory and counts; run in a fresh process."
    with torch.device("meta"):
        model, words = llama(), torch.zeros(1, 4096, dtype=torch.long)
        start, used = time.perf_counter(), time.process_time()
        counted = census(model, words)
        first, first_cpu = time.perf_counter() - start, time.process_time() - used
        start = time.perf_counter()
        with torch.no_grad(): model(words)
        plain = time.perf_counter() - start
    print(json.dumps({"stored": counted.stored, "used": counted.used, "seconds": first, "CPU seconds": first_cpu, "forward on meta, seconds": plain, "bytes": peak_bytes()}))


def peak_bytes():
    "The most memory that this process ever held; not what its parent held, which ru_maxrss starts from on Linux."
    try: return 1024 * next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cpu_seconds(function, runs=20, warmup=3):
    "Median seconds of the processor, which other processes on a busy machine do not lengthen as they do the clock's."
    times = []
    for i in range(warmup + runs):
        start = time.process_time()
        function()
        if i >= warmup: times.append(time.process_time() - start)
    return statistics.median(times)


def main(device):
    torch.manual_seed(0)
    torch.set_num_threads(1)  # threads that wait for each other would count as work
    rows = []
    for name, model, x in [
        ("ResNet-50, 4 images of 64×64", ResNet50(), torch.rand(4, 3, 64, 64)), ("ResNet-50, 1 image of 64×64", ResNet50(), torch.rand(1, 3, 64, 64)),
        ("transformer, 8 × 64 tokens", transformer(), torch.rand(8, 64, 256)), ("transformer, 1 × 64 tokens", transformer(), torch.rand(1, 64, 256)),
        ("LSTM, 16 × 100 steps", nn.LSTM(64, 256, batch_first=True), torch.rand(16, 100, 64)), ("LSTM, 1 × 100 steps", nn.LSTM(64, 256, batch_first=True), torch.rand(1, 100, 64)),
    ]:
        model, x = model.to(device).eval(), x.to(device)
        def forward():
            with torch.no_grad(): model(x)
        def flops():
            with torch.no_grad(), FlopCounterMode(display=False): model(x)
        times = medians({"forward": forward, "census": lambda: census(model, x), "FlopCounterMode": flops}, device)
        rows.append({"": name, "forward, ms": 1e3 * times["forward"], "census / forward": times["census"] / times["forward"],
                     "by CPU time": cpu_seconds(lambda: census(model, x)) / cpu_seconds(forward) if device.type == "cpu" else "–",
                     "FlopCounterMode / forward": times["FlopCounterMode"] / times["forward"], "limit": LIMITS["census / forward"]})
    keep(f"census_{device.type}", rows, runs=20, machine=machine(device))


if __name__ == "__main__":
    if sys.argv[1:] == ["large"]: large()
    else:
        for name in ["cpu"] + ["cuda"] * torch.cuda.is_available(): main(torch.device(name))
        if not torch.cuda.is_available(): print("no CUDA device: the GPU ratios were not measured")
        run = subprocess.run([sys.executable, __file__, "large"], capture_output=True, text=True, check=True)
        found = json.loads(run.stdout)
        keep("census_large", [{"": key, "measured": found[key], "limit": LIMITS[key]} for key in ("seconds", "bytes")],
             model="Llama 2 70B, 4,096 tokens, meta device", **{k: v for k, v in found.items() if k not in LIMITS}, machine=machine())
