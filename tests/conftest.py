"""What all tests share: flags, data, a results folder of their own, and a last word on what was left out.

A test or chapter section with a flag (`long`, `gpu`, `slow`, `mnist`, `adult`, `conll`) runs when SHARETIE_FLAGS names
it; `gpu` runs wherever CUDA is. `make test FLAGS="slow mnist"` sets the variable.
"""
import gc
import os
import shutil
import sys
from pathlib import Path

gc.disable()  # looking through all that is imported and collected, again and again, takes as long as the rest of it
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run in parallel processes, before torch is imported
os.environ.setdefault("MPLBACKEND", "agg")

import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "book")]

from flags import flags_asked, flags_off

DATA = ROOT.parent / "shared" / "data"
if DATA.is_dir(): os.environ.setdefault("SHARETIE_DATA", str(DATA))


def pytest_configure(config):
    try: flags_asked()  # an unknown flag fails here, once, and not in every test
    except ValueError as error: raise pytest.UsageError(str(error)) from None


def pytest_collection_modifyitems(items):
    off = flags_off()
    for item in items:
        for flag in sorted(off & {mark.name for mark in item.iter_markers()}):
            why = "no CUDA device" if flag == "gpu" else f'run with make test FLAGS="{flag}"'
            item.add_marker(pytest.mark.skip(reason=f"{flag}: {why}"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop():
    "What was imported stays until the end: only what the tests make is looked through."
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def results_of_their_own(tmp_path_factory):
    "Tests read the recorded results, and write to a copy: running them leaves the repository as it was."
    folder = tmp_path_factory.mktemp("results") / "results"
    shutil.copytree(ROOT / "results", folder)
    os.environ["SHARETIE_RESULTS"] = str(folder)
    yield folder
    del os.environ["SHARETIE_RESULTS"]


@pytest.fixture(autouse=True)
def graphs_of_their_own():
    "What a test compiled is forgotten: another test in its process would compile for other shapes, or too often."
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo and dynamo.utils.counters["frames"]:
        dynamo.reset()
        dynamo.utils.counters.clear()


@pytest.fixture
def one_process(tmp_path):
    "A process group of one."
    from processes import process_group  # only here: pytest's first process needs no torch
    with process_group(tmp_path): yield


def pytest_terminal_summary(terminalreporter):
    "Say once per reason what did not run."
    skipped, left_out = {}, {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else str(report.longrepr)
        skipped[reason] = skipped.get(reason, 0) + 1
    for report in terminalreporter.stats.get("passed", []):
        for flag, cells, chapter in (value for name, value in report.user_properties if name == "left_out"):
            left_out.setdefault(flag, []).append((cells, chapter))
    for reason, count in sorted(skipped.items()): terminalreporter.write_line(f"skipped {count} test{'s' * (count > 1)}: {reason}")
    for flag, found in sorted(left_out.items()):
        why = "no CUDA device" if flag == "gpu" else f'run with make test FLAGS="{flag}"'
        chapters = ", ".join(f"{chapter} ({cells})" for cells, chapter in sorted(found, key=lambda f: f[1]))
        terminalreporter.write_line(f"left out {sum(cells for cells, _ in found)} cells: {flag}: {why}: {chapters}")
