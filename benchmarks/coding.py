"""Streams of codes against the peers zlib and Zstandard, which code the codes as bytes, and against a copy of memory.

Rates are in MB of float32 weights per second, from the stream to the weights, on one core. Sizes are bits per weight,
beside the entropy. Sparse weights are 8 percent of a matrix, decoded to the whole matrix.
"""
import zlib

import torch

from _measure import copy, keep, machine, medians
from sharetie.clusters import kmeans_1d
from sharetie.coding import entropy_bits, from_gaps, from_stream, to_gaps, to_stream

try: from compression import zstd
except ImportError:
    try: import zstandard as zstd
    except ImportError: zstd = None


def cases(n):
    "By name: codes of all weights, their number, and whether most are a zero, the last one."
    values = torch.randn(n, generator=torch.Generator().manual_seed(0)).mul(.05)
    for k in (16, 256): yield f"all weights, k = {k}", kmeans_1d(values, k), k, None
    mask = torch.rand(n, generator=torch.Generator().manual_seed(1)) < .08
    yield "8 % of the weights, k = 16", kmeans_1d(values[mask], 16), 16, mask


def ours(streams, codebook, mask):
    "A function from streams to weights."
    if mask is None: return lambda: codebook.index_select(0, from_stream(streams[0]))

    def sparse():
        left = from_gaps(from_stream(streams[1]), 6, mask.shape)
        return torch.zeros(mask.shape).masked_scatter_(left, codebook.index_select(0, from_stream(streams[0])))
    return sparse


def theirs(data, codebook, decompress):
    "A function from the compressed bytes of codes to weights."
    return lambda: codebook.index_select(0, torch.frombuffer(bytearray(decompress(data)), dtype=torch.uint8).int())


def main(n=4_000_000):
    torch.set_num_threads(1)
    rows = []
    for name, found, k, mask in cases(n):
        streams, codebook, dense = [to_stream(found.codes, k)], found.codebook, found.codes.byte()
        least = entropy_bits(found.codes)
        if mask is not None:
            streams.append(to_stream(gaps := to_gaps(mask, 6), 64))
            least += entropy_bits(gaps)
            dense = torch.full((n,), k, dtype=torch.uint8).masked_scatter_(mask, dense)
            codebook = torch.cat([codebook, torch.zeros(1)])
        raw = dense.numpy().tobytes()
        peers = {"zlib": (zlib.compress(raw, 9), zlib.decompress)}
        if zstd: peers["zstd"] = zstd.compress(raw, 19), zstd.decompress
        made = ours(streams, codebook, mask)
        assert torch.equal(made(), codebook[dense.int()])
        times = medians({"ours": made, "copy": copy(n), **{p: theirs(data, codebook, f) for p, (data, f) in peers.items()}}, runs=20)
        row = {"": name, "ours MB/s": 4 * n / times["ours"] / 1e6, "copy / ours": times["ours"] / times["copy"]}
        row |= {f"{p} MB/s": 4 * n / times[p] / 1e6 for p in peers} | {"entropy": least / n, "ours bits": 8 * sum(map(len, streams)) / n}
        rows.append(row | {f"{p} bits": 8 * len(data) / n for p, (data, _) in peers.items()})
    keep("coding_cpu", rows, runs=20, zstd="measured" if zstd else "absent", weights=n, machine=machine())


if __name__ == "__main__": main()
