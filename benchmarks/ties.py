"""Ties: finding and checking them in a large model, and saving and loading a gigabyte.

Finding is held against a walk over all names, which any finder must do, and against 50 ms. Saving and loading are
held against `safetensors.torch` on the same tensors without their ties, and against the time to copy as many bytes.
Its `load_file` maps the file and copies nothing until a number is used, and so does `load_model` into a model on the
meta device: one table has the mapping alone, where a few milliseconds for names and ties are all there is, another the
mapping and one use of every number. A model that has its memory is filled, and there the peers are those that fill one.
Files are kept in memory where the machine has a folder for that, so that a disk does not decide.
"""
import os
import re
import shutil
import tempfile
import threading
from pathlib import Path

import safetensors.torch as peer
import torch
from torch import nn

from _measure import copy, keep, machine, medians
from sharetie.binding import check_ties, tie_
from sharetie.finding import find_ties
from sharetie.saving import load_model, save_model


def stack(blocks):
    "A model of four tensors a block, one pair of which is tied."
    model = nn.ModuleList(nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4)]) for _ in range(blocks))
    tie_(model, ["0.0.weight", "1.0.weight"])
    return model


def finding(blocks=2500):
    model = stack(blocks)
    names = list(model.named_parameters(remove_duplicate=False))
    candidates = {"walk over all names": lambda: list(model.named_parameters(remove_duplicate=False)),
                  "find_ties": lambda: find_ties(model), "check_ties": lambda: check_ties(model)}
    times = medians(candidates)
    rows = [{"": name, "ms": 1e3 * t, "walk / this": times["walk over all names"] / t, "50 ms / this": 0.05 / t} for name, t in times.items()]
    keep("ties_find_cpu", rows, tensors=len(names), runs=20, machine=machine(), absent="accelerate")


def language_model(gigabytes, width=2048, words=32_000):
    "An embedding and a head that are one, and square layers up to the size wanted."
    layers = (int(gigabytes * 1e9) - 4 * words * width) // (4 * width * width)
    model = nn.ModuleDict({"embed": nn.Embedding(words, width), "layers": nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers)),
                           "head": nn.Linear(width, words, bias=False)})
    tie_(model, ["embed.weight", "head.weight"])
    return model


def peak(function):
    "Bytes that `function` needs at most beyond what is held before it, pages of files not counted."
    def held(): return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    samples, done = [held()], threading.Event()
    def watch():
        while not done.wait(0.001): samples.append(held())
    thread = threading.Thread(target=watch)
    thread.start()
    function()
    done.set()
    thread.join()
    return max(samples) - samples[0]


def folder_in_memory(bytes):
    "A new folder, in memory if there is room for three files."
    there = os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > 3 * bytes
    return Path(tempfile.mkdtemp(dir="/dev/shm" if there else None)), there


def table(name, candidates, first, bytes, **facts):
    "Time and memory of candidates; ratios to the first of them and to a copy of all bytes."
    memory = {key: peak(run) / bytes for key, run in candidates.items()} if Path("/proc/self/status").exists() else {}
    times = medians({"copy": copy(bytes // 4), **candidates})
    limit = times.pop("copy")
    rows = [{"": key, "ms": 1e3 * t, f"{first} / this": times[first] / t, "this / copy": t / limit,
             "extra memory (files)": memory.get(key, "not measured")} for key, t in times.items()]
    keep(name, rows, bytes=bytes, **facts, copy_ms=round(1e3 * limit, 1), runs=20, machine=machine())


def saving(gigabytes=1.0):
    model = language_model(gigabytes)
    unique = {name: tensor.detach() for name, tensor in model.named_parameters()}
    bytes = sum(tensor.nbytes for tensor in unique.values())
    folder, in_memory = folder_in_memory(bytes)
    facts = {"tensors": len(unique), "files": "in memory" if in_memory else "on disk"}
    try:
        table("ties_save_cpu", {"save_file": lambda: peer.save_file(unique, folder / "theirs"),
                                "save_model": lambda: save_model(model, folder / "ours")}, "save_file", bytes, **facts)
        with torch.device("meta"): empty = [language_model(gigabytes) for _ in range(50)]
        def theirs(): return peer.load_file(folder / "theirs").values()
        def ours():
            filled = empty.pop()
            load_model(filled, folder / "ours")
            return [tensor.detach() for tensor in filled.parameters()]
        def use(tensors): return [tensor.sum() for tensor in tensors]
        table("ties_map_cpu", {"load_file": theirs, "load_model, meta": ours}, "load_file", bytes, **facts)
        table("ties_use_cpu", {"load_file, use": lambda: use(theirs()), "load_model, meta, use": lambda: use(ours())},
              "load_file, use", bytes, **facts)
        read = peer.load_file(folder / "theirs")
        table("ties_load_cpu", {"load_file, load_state_dict": lambda: model.load_state_dict(peer.load_file(folder / "theirs"), strict=False),
                                "safetensors' load_model": lambda: peer.load_model(model, folder / "theirs"),
                                "load_model": lambda: load_model(model, folder / "ours")}, "load_file, load_state_dict", bytes, **facts)
        for name, tensor in model.named_parameters(): torch.testing.assert_close(tensor.detach(), read[name], rtol=0, atol=0)
    finally: shutil.rmtree(folder)


if __name__ == "__main__":
    torch.manual_seed(0)
    finding()
    saving()
