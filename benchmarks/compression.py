"""`kmeans_1d` on a million normal weights against scikit-learn's KMeans (k-means++, one start), and against one sort.

Sums of squares are given as a multiple of the best one known, that of 16,384 allowed edges; ours for the worst of three
draws. scikit-learn's is the slow one by far, so few runs, and the first draw, are enough.
"""
import torch
from sklearn.cluster import KMeans

from _measure import keep, machine, medians
from sharetie.clusters import kmeans_1d


def main(device, n=1_000_000):
    rows = []
    draws = [torch.randn(n, generator=torch.Generator().manual_seed(seed)).mul(.05).to(device) for seed in range(3)]
    there, columns = draws[0], draws[0][:, None].cpu().numpy()
    for k, runs in ((16, 3), (256, 1)):
        theirs = []
        best = [kmeans_1d(draw, k, bins=16_384).error for draw in draws]

        def peer(): theirs.append(KMeans(k, n_init=1, random_state=0).fit(columns).inertia_)
        times = medians({"this": lambda: kmeans_1d(there, k), "sort": lambda: there.sort()}, device, runs=5, warmup=1)
        times |= medians({"peer": peer}, runs=runs, warmup=0)
        rows.append({"": f"k = {k}", "ms": 1e3 * times["this"], "scikit-learn / this": times["peer"] / times["this"],
                     "this / sort": times["this"] / times["sort"], "squares: this / best": max(kmeans_1d(draw, k).error / least for draw, least in zip(draws, best)),
                     "squares: scikit-learn / best": theirs[0] / best[0]})
    keep(f"compression_clusters_{device.type}", rows, runs="5, of scikit-learn 3 and 1", machine=machine(device))


if __name__ == "__main__":
    for name in ["cpu"] + ["cuda"] * torch.cuda.is_available(): main(torch.device(name))
    if not torch.cuda.is_available(): print("no CUDA device: the GPU ratios were not measured")
