"""Half of a layer of 4096 × 4096 weights taken out by `prune_rows`, against the plain surgeon and against its Cholesky factorization.

The plain surgeon goes row by row: the weight that costs least goes, the others of its row move, its inverse is cut down,
and so on, for each row with an inverse of its own. At 4096 × 4096 that takes days, so some steps of some rows are timed and
multiplied; every step of every row costs the same. At 256 × 256 all of it is timed. The published loop of the fixed order
(SparseGPT), which factorizes the inverse and updates to the right column by column, is written anew here and timed beside.
The limit is one Cholesky factorization of the layer's matrix, which no method of this kind can do without.
"""
import statistics
import time

import torch

from _measure import keep, machine, medians, synchronize
from sharetie.layerwise import prune_rows


def layer(d, device):
    "Weights (d, d) and the matrix of correlated inputs (d, d), dampened already."
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2 * d, d, generator=draw) @ (torch.eye(d) + torch.randn(d, d, generator=draw) / d ** .5)
    x, w = x.to(device), torch.randn(d, d, generator=draw).to(device)
    h = x.T @ x / len(x)
    h.diagonal().add_(.01 * h.diagonal().mean())
    return w, h


def plain_row(w, inverse, steps):
    "Take weights out of one row, one after the other."
    w, inverse = w.clone(), inverse.clone()
    gone = torch.zeros_like(w, dtype=torch.bool)
    for _ in range(steps):
        q = (w.square() / inverse.diagonal()).masked_fill(gone, torch.inf).argmin()
        column, at = inverse[:, q].clone(), inverse[q, q].clone()
        w -= w[q] / at * column
        inverse.addr_(column, column / at, alpha=-1)
        gone[q] = True
        w[gone], inverse[q, q] = 0, 1
    return w


def plain_time(w, h, device, rows=None, steps=None):
    "Seconds that the plain surgeon takes for half of all weights: all timed, or some steps of some rows, multiplied."
    half, inverse, times = w.shape[1] // 2, torch.linalg.inv(h), []
    for row in w[:rows]:
        synchronize(device)
        start = time.perf_counter()
        plain_row(row, inverse, steps or half)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return sum(times) if rows is None else statistics.median(times) * len(w) * half / steps


def published_loop(w, h, block=128):
    "Half of all weights, by the loop of SparseGPT's code."
    w, d = w.clone(), w.shape[1]
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for s in range(0, d, block):
        e = min(s + block, d)
        part, own, errors = w[:, s:e].clone(), u[s:e, s:e], torch.zeros_like(w[:, s:e])
        scores = part.square() / own.diagonal().square()
        out = scores <= scores.flatten().sort().values[scores.numel() // 2]
        for j in range(e - s):
            error = part[:, j] * out[:, j] / own[j, j]
            part[:, j:] -= error[:, None] * own[j, j:]
            part[:, j] *= ~out[:, j]
            errors[:, j] = error
        w[:, s:e] = part
        w[:, e:] -= errors @ u[s:e, e:]
    return w


def main(device):
    rows = []
    for d, runs, some in ((256, 20, {}), (4096, 3, {"rows": 3, "steps": 20})):
        w, h = layer(d, device)
        times = medians({"this": lambda: prune_rows(w, h, .5, damp=0), "pattern": lambda: prune_rows(w, h, pattern="2:4", damp=0),
                         "published": lambda: published_loop(w, h), "cholesky": lambda: torch.linalg.cholesky(h),
                         "product": lambda: w @ h}, device, runs=runs, warmup=1)
        plain = plain_time(w, h, device, **some)
        def lost(new): return (((w - new) @ h) * (w - new)).sum().item()
        best = lost(prune_rows(w, h, .5, damp=0)[0])
        rows.append({"": f"{d} × {d}", "this (s)": times["this"], "2:4 (s)": times["pattern"], "plain (s)": plain,
                     "plain is": "extrapolated from 20 steps in 3 rows" if some else "timed whole", "plain / this": plain / times["this"],
                     "published loop / this": times["published"] / times["this"], "this / Cholesky": times["this"] / times["cholesky"],
                     "this / (Cholesky + product)": times["this"] / (times["cholesky"] + times["product"]),
                     "error: published loop / this": lost(published_loop(w, h)) / best})
    keep(f"pruning_layerwise_{device.type}", rows, limit="one Cholesky factorization; a product of the weights and the matrix beside it",
         runs="20, of 4096 × 4096 3", machine=machine(device))


if __name__ == "__main__":
    for name in ["cpu"] + ["cuda"] * torch.cuda.is_available(): main(torch.device(name))
    if not torch.cuda.is_available(): print("no CUDA device: the GPU ratios were not measured")
