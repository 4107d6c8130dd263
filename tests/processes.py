"""Process groups for tests: one that lasts as long as a block, and functions that run in two processes.

A group must outlive the models that were wrapped in it: where a DistributedDataParallel holds the last reference,
its destructor waits for gloo's threads with Python's lock in hand, which those threads may be waiting for.
"""
import functools
import gc
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path

import torch
import torch.distributed as dist

PROCESSES = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
PROCESSES.set_forkserver_preload(["torch", "pandas", "sharetie.train"])  # once for all processes


@contextmanager
def process_group(folder, rank=0, size=1):
    "A group of `size` processes over gloo, which meet in a file in `folder`."
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")  # no look-up of this host's name
    dist.init_process_group("gloo", init_method=f"file://{Path(folder, 'meet')}", rank=rank, world_size=size, timeout=timedelta(seconds=60))
    try: yield
    finally:
        gc.collect()
        dist.destroy_process_group()


@functools.cache
def pools():
    "Two processes for all tests that need them, each always of one rank: what PyTorch keeps of DTensors belongs to a rank."
    return [ProcessPoolExecutor(1, mp_context=PROCESSES) for _ in range(2)]


def member(f, rank, folder, *args):
    "`f` as one of two processes; what it wrapped is gone when the group ends."
    torch.set_num_threads(1)
    with process_group(folder, rank, 2): return f(*args)


def in_two_processes(f, folder, *args):
    "What `f(*args)` gives in each of two processes; an error if they hang."
    futures = [pool.submit(member, f, rank, folder, *args) for rank, pool in enumerate(pools())]
    return [future.result(timeout=240) for future in futures]
