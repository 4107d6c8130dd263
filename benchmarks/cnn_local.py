"""`LocallyConnected2d`, forward and backward, against the two usual ways and the limit of the memory.

The usual ways are `F.unfold` with an `einsum` over windows, and a loop over positions with a matrix product at each.
Both get their weights in the order that suits them. The limit is the time to read the weights once forward, and
backward to read them once more and to write their gradient, at the copy bandwidth measured in the same turns.
"""
import torch
import torch.nn.functional as F

from _measure import copy, extra_memory, keep, machine, medians
from sharetie.local import LocallyConnected2d

SIZES = [(1, 32, 32, 14, 3), (16, 32, 32, 14, 3), (64, 32, 32, 14, 3), (64, 3, 32, 28, 5), (128, 16, 32, 14, 5), (128, 64, 64, 8, 3)]


def by_einsum(x, weight, kernel):
    "Windows by F.unfold, (b, k, l), and one einsum with weights (l, o, k)."
    rows = x.shape[2] - kernel + 1
    return torch.einsum("bkl,lok->bol", F.unfold(x, kernel), weight).unflatten(2, (rows, -1))


def by_loop(x, weights, kernel):
    "A matrix product at each position; `weights` is a list, since a loop over one tensor is far slower backward."
    rows = x.shape[2] - kernel + 1
    at = [(r, c) for r in range(rows) for c in range(rows)]
    out = [x[:, :, r:r + kernel, c:c + kernel].flatten(1) @ w.T for (r, c), w in zip(at, weights)]
    return torch.stack(out, 2).unflatten(2, (rows, rows))


def main(device):
    rows = []
    for images, ins, outs, size, kernel in SIZES:
        torch.manual_seed(0)
        layer = LocallyConnected2d(ins, outs, size, kernel, bias=False, device=device)
        x = torch.randn(images, ins, size, size, device=device, requires_grad=True)
        flat = layer.weight.detach().flatten(0, 1).flatten(2).clone().requires_grad_()
        parts = [w.clone().requires_grad_() for w in flat.detach()]
        ways = {"layer": (lambda: layer(x), [layer.weight]), "unfold + einsum": (lambda: by_einsum(x, flat, kernel), [flat]),
                "loop": (lambda: by_loop(x, parts, kernel), parts)}
        seed = torch.randn_like(layer(x))

        def gradients(name): return torch.autograd.grad(ways[name][0](), [x, *ways[name][1]], seed)
        expected = gradients("layer")
        for name in ways:  # every candidate must compute the same
            torch.testing.assert_close(ways[name][0](), layer(x), rtol=1e-3, atol=1e-3)
            found = gradients(name)
            torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(torch.stack(found[1:]).flatten(), expected[1].flatten(), rtol=1e-3, atol=1e-3)

        def forward(name):
            def run():
                with torch.no_grad(): ways[name][0]()
            return run
        copying = {"copy": copy(layer.weight.numel(), device)}
        fast = medians({name: forward(name) for name in ways} | copying, device)
        both = medians({name: (lambda name=name: gradients(name)) for name in ways} | copying, device)
        memory = {name: extra_memory(lambda: gradients(name), device) for name in ways}
        for step, times, limit in (("forward", fast, fast["copy"] / 2), ("and backward", both, 1.5 * both["copy"])):
            best = min(t for name, t in times.items() if name not in ("layer", "copy"))
            row = {"": f"{images} images, {ins}→{outs}, {size}², {kernel}×{kernel}, {step}", "ms": 1e3 * times["layer"],
                   "einsum / this": times["unfold + einsum"] / times["layer"], "loop / this": times["loop"] / times["layer"],
                   "best / this": best / times["layer"], "this / limit": times["layer"] / limit, "weights (MB)": layer.weight.nbytes / 1e6}
            rows.append(row | ({} if step == "forward" else {"memory: this / einsum": memory["layer"] / memory["unfold + einsum"]}))
    keep(f"cnn_local_{device.type}", rows, limit="bytes of the weights: read forward; read twice and gradients written with backward",
         runs=20, machine=machine(device))


if __name__ == "__main__":
    for name in ["cpu"] + ["cuda"] * torch.cuda.is_available(): main(torch.device(name))
    if not torch.cuda.is_available(): print("no CUDA device: the GPU ratios were not measured")
