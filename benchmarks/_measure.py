"""What every benchmark shares: medians of runs in turn, limits of the machine, a table printed and kept.

All candidates of a table run in one process, once in each round and in an order of its own, so that whatever else
the machine does is shared among them. Ratios of their medians are the result; milliseconds are context.
"""
import json
import platform
import random
import statistics
import time
from pathlib import Path

import torch

RESULTS = Path(__file__).parents[1] / "results" / "bench"


def synchronize(device):
    if device.type == "cuda": torch.cuda.synchronize(device)


def samples(candidates, device=torch.device("cpu"), runs=20, warmup=3, seconds=float("inf")):
    """Seconds of each run of `candidates`, {name: function}, after warm-up: `runs`, or two and what fits into `seconds`.

    Rounds differ in order: in a fixed one, a candidate would always find in the cache what the one before left."""
    times, begun, order = {name: [] for name in candidates}, time.perf_counter(), random.Random(0)
    for i in range(warmup + runs):
        if i >= warmup + 2 and time.perf_counter() - begun > seconds: break
        for name, function in order.sample([*candidates.items()], len(candidates)):
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if i >= warmup: times[name].append(time.perf_counter() - start)
    return times


def medians(candidates, device=torch.device("cpu"), runs=20, warmup=3):
    "Median seconds of each of `candidates`, as `samples` takes them."
    return {name: statistics.median(t) for name, t in samples(candidates, device, runs, warmup).items()}


def copy(elements, device=torch.device("cpu"), dtype=torch.float32):
    "A candidate that copies `elements` numbers, reading and writing each once: the measure of bandwidth."
    source, target = (torch.ones(elements, dtype=dtype, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def extra_memory(function, device=torch.device("cpu")):
    "Bytes that `function` needs at its peak beyond what is held before it."
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile: function()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def machine(device=torch.device("cpu")):
    "Hardware and versions, as they stand beside every figure."
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    found = {"cpu": cpu, "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__}
    return found | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def _lines(path):
    try: return Path(path).read_text().splitlines()
    except OSError: return []


def keep(name, rows, **facts):
    "Print `rows`, a list of dictionaries, as a table, and write them with `facts` to results/bench/<name>.json."
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[_text(row.get(c, "")) for c in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print(f"\n{name}: {', '.join(f'{k} {v}' for k, v in facts.items() if not isinstance(v, dict))}")
    for row in cells: print("  " + "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))))
    RESULTS.mkdir(parents=True, exist_ok=True)
    temporary = RESULTS / f"{name}.tmp"
    temporary.write_text(json.dumps({"name": name, **facts, "rows": rows}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(RESULTS / f"{name}.json")


def recorded(name):
    "The rows that `keep` wrote last; none before."
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def _text(value): return f"{value:.3g}" if isinstance(value, float) else str(value)
