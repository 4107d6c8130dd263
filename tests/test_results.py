"sharetie.results: random numbers that come again, comparisons that hide nothing, records that stay."
import json
import math
import os
import pickle
import random
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch

from sharetie import results as module
from sharetie.results import COLORS, Comparison, benchmark, compare, record, records, set_seed, subplots

# ---- random numbers and figures


@pytest.mark.parametrize("seed, error", [(-1, ValueError), (2**32, ValueError), (1.0, TypeError), ("1", TypeError), (True, TypeError)])
def test_bad_seeds(seed, error):
    with pytest.raises(error, match="seed: a whole number"): set_seed(seed)


def test_the_style_changes_no_global_setting():
    before = dict(mpl.rcParams)
    fig, axes = subplots(1, 2)
    assert len(axes) == 2 and dict(mpl.rcParams) == before
    assert axes[0]._get_lines.get_next_color() == COLORS[0]


# ---- compare


def all_draws(seed, scale=1.0):
    "A run that uses every source of random numbers there is."
    return {"sum": scale * (random.random() + np.random.rand() + torch.rand(()).item()), "threads": torch.get_num_threads()}


def fails(seed):
    if seed == 2: raise ArithmeticError("too large")
    return seed


def test_a_process_pool_gives_the_table_of_a_serial_run():
    variants = {"plain": all_draws, "scaled": partial(all_draws, scale=0.5)}
    torch.rand(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate(), torch.get_num_threads()
    serial = compare(variants, range(3))
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    assert before[2:] == (random.getstate(), torch.get_num_threads())
    processes = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
    processes.set_forkserver_preload(["torch", "pandas", "sharetie.train"])
    with ProcessPoolExecutor(1, mp_context=processes) as pool:
        parallel = compare(variants, range(3), pool)
        with pytest.raises(RuntimeError, match="variant 'odd', seed 2: ArithmeticError: too large"): compare({"odd": fails}, range(5), pool)
        with pytest.raises(RuntimeError, match="variant 'local', seed 0: .*[Pp]ickl"): compare({"local": lambda seed: 0.0}, range(2), pool)
    pd.testing.assert_frame_equal(serial, parallel, check_exact=True)
    pd.testing.assert_frame_equal(serial.runs, parallel.runs, check_exact=True)
    assert (serial.runs["threads"] == 1).all() and serial.runs["sum"].nunique() == 6


def test_mean_deviation_and_number():
    table = compare({"a": float, "b": lambda seed: {"value": torch.tensor(2.0 * seed)}}, [1, 3, 5])
    assert table.loc["a"].tolist() == [3, 2, 3] and table.loc["b"].tolist() == [6, 4, 3]
    assert table.runs["seed"].tolist() == [1, 3, 5, 1, 3, 5] and table.index.tolist() == ["a", "b"]
    assert table.rounded(1).loc["b", "value"] == "6.0 ± 4.0"
    assert compare({"counts": lambda seed: 700., "rates": lambda seed: 1.}, range(2)).rounded(2)["value"].tolist() == ["700 ± 0", "1.00 ± 0.00"]


def test_a_nan_is_not_left_out():
    table = compare({"a": lambda seed: math.nan if seed else 1.0}, range(3))
    assert table.loc["a"].isna().tolist() == [True, True, False] and table.loc["a", ("value", "n")] == 3


def test_numbers_as_names_keep_their_order_and_draw():
    table = compare({0.1: float, 10.0: float, 1.0: float}, range(3))
    assert table.index.tolist() == [0.1, 10, 1]
    assert table.draw().get_ylabel() == "value"
    with pytest.raises(ValueError, match="metric: one of 'value' is expected, got 'loss'"): table.draw("loss")


def test_a_comparison_survives_pickling_and_shows_as_a_table():
    table = compare({"a": float}, range(2))
    again = pickle.loads(pickle.dumps(table))
    pd.testing.assert_frame_equal(again, table)
    pd.testing.assert_frame_equal(again.runs, table.runs)
    assert isinstance(again, Comparison) and "<table" in table._repr_html_() and "mean" in table._repr_html_()


@pytest.mark.parametrize("arguments, error, message", [
    (([float], [0]), TypeError, "variants: a dict of functions of a seed is expected, got list"),
    (({}, [0]), ValueError, "variants: at least one function of a seed is expected, got {}"),
    (({"a": 1}, [0]), TypeError, "variants['a']: a function of (seed) is expected, got 1"),
    (({"a": float}, 3), TypeError, "seeds: several, such as range(10), is expected, got 3"),
    (({"a": float}, []), ValueError, "seeds: at least one is expected, got []"),
    (({"a": float}, [1, 1]), ValueError, "seeds: each seed once is expected, got [1, 1]"),
    (({"a": float}, [0.5]), TypeError, "seeds: whole numbers are expected, got [0.5]"),
    (({"a": float}, [0], "pool"), TypeError, "executor: a concurrent.futures.Executor is expected, got 'pool'"),
    (({"a": float}, [0], ThreadPoolExecutor(1)), ValueError, "threads share one random state"),
    (({"a": float}, [0], None, 0), ValueError, "threads: a whole number of at least 1 is expected, got 0"),
    ((None, [0]), TypeError, "variants: a dict of functions of a seed is expected, got NoneType"),
    (({None: float}, [0]), TypeError, "variants: text or a number for every name is expected, got None"),
    (({("a", 1): float}, [0]), TypeError, "variants: text or a number for every name"), (({math.nan: float}, [0]), TypeError, "variants: text or a number"),
    (({"a": None}, [0]), TypeError, "variants['a']: a function of (seed) is expected, got None"),
    (({"a": lambda: 0}, [0]), TypeError, "variants['a']: a function of (seed) is expected, got <lambda>()"),
    (({"a": float}, "12"), TypeError, "seeds: several, such as range(10), is expected, got '12'"), (({"a": float}, None), TypeError, "seeds: several"),
    (({"a": float}, [True]), TypeError, "seeds: whole numbers are expected, got [True]"), (({"a": float}, torch.tensor(1)), TypeError, "seeds: whole numbers are expected, got tensor(1)"), (({"a": float}, [-1]), ValueError, "seeds: a whole number from 0 to 4294967295"),
    (({"a": float}, [0], None, None), TypeError, "threads: a whole number is expected, got None"), (({"a": float}, [0], None, True), TypeError, "threads: a whole number"),
    (({"a": float}, [0], None, 1, None), TypeError, "progress: True or False is expected, got None"), (({"a": float}, [0], None, 1, torch.zeros(2)), TypeError, "progress: True or False"),
    (({"a": lambda seed: {1: 2.0}}, [4]), RuntimeError, "variant 'a', seed 4: TypeError: returned {1: 2.0}, expected a number or a dict of numbers by name"), (({"a": lambda seed: {(): 2.0}}, [4]), RuntimeError, "variant 'a', seed 4: TypeError"),
    (({"a": lambda seed: "high"}, [4]), RuntimeError, "variant 'a', seed 4: TypeError: returned 'high'"),
    (({"a": lambda seed: {}}, [4]), RuntimeError, "variant 'a', seed 4: TypeError: returned {}"),
    (({"a": lambda seed: {"seed": 1}}, [4]), RuntimeError, "the names variant and seed are taken"),
    (({"a": lambda seed: {"x": 1}, "b": lambda seed: {"y": 1}}, [4]), ValueError, "variant 'b', seed 4: returned the metrics ['y'], and the first run ['x']"),
])
def test_bad_arguments_of_compare(arguments, error, message):
    with pytest.raises(error) as e: compare(*arguments)
    assert message in str(e.value)


# ---- record


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARETIE_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


def test_a_record_round_trip(results):
    entry = record("a_claim", measured=np.float32(0.5), published=0.25, source="Someone 1999", seeds=range(3), note="half")
    assert json.loads((results / "a_claim.json").read_text()) == entry
    assert entry["versions"]["torch"] == torch.__version__ and entry["hardware"]["cores"] == os.cpu_count() and entry["hardware"]["cpu"]
    row = records("a_*").iloc[0]
    assert row[["claim", "published", "measured", "seeds", "source", "note"]].tolist() == ["a_claim", 0.25, 0.5, 3, "Someone 1999", "half"]


def test_a_record_of_a_comparison_has_a_row_per_number(results):
    table = compare({"free": float, 0.5: lambda seed: 2.0 * seed}, [1, 3])
    record("dial", measured=table, published={"free": {"value": 2.5}})
    rows = records().set_index("quantity")
    assert rows["measured"].to_dict() == {"free, value": 2, "0.5, value": 4}
    assert rows["published"].to_dict() == {"free, value": 2.5, "0.5, value": "–"}
    assert rows.loc["free, value", "std"] == math.sqrt(2) and rows["seeds"].tolist() == [2, 2]


def test_a_second_record_is_the_same_file_and_a_failed_one_changes_nothing(results, monkeypatch):
    record("claim", measured={"x": 1 / 3}, seeds=[1])
    before = (results / "claim.json").read_bytes()
    record("claim", measured={"x": 1 / 3}, seeds=[1])
    assert (results / "claim.json").read_bytes() == before
    def full(self, target): raise OSError("disk full")
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError): record("claim", measured=2)
    assert (results / "claim.json").read_bytes() == before and os.listdir(results) == ["claim.json"]


@pytest.mark.parametrize("name", ["a/b", "../a", "", ".hidden", "a b", 3, None, "a\\b", "a\n"])
def test_bad_names_of_records(results, name):
    with pytest.raises(ValueError if isinstance(name, str) else TypeError, match="^name: text"): record(name, measured=1)
    assert not results.exists()


@pytest.mark.parametrize("values, error, message", [
    (dict(measured=math.nan), ValueError, "measured: a finite number is expected, got nan"),
    (dict(measured={"a": [1, math.inf]}), ValueError, "measured['a'][1]: a finite number is expected, got inf"),
    (dict(measured=torch.tensor([math.nan])), ValueError, "measured[0]: a finite number is expected, got nan"),
    (dict(measured={1: 2}), TypeError, "measured: text for every key is expected, got 1"),
    (dict(measured=object()), TypeError, "measured: a number, text, or a list or dict of them is expected, got object"),
    (dict(measured=1, published={"a": {2}}), TypeError, "published['a']: a number, text, or a list or dict of them is expected, got set"),
    (dict(measured=None), ValueError, "measured: at least one number, and no None, is expected, got None"), (dict(measured={}), ValueError, "measured: at least one number"),
    (dict(measured=[]), ValueError, "measured: at least one number"), (dict(measured={"a": {"b": None}}), ValueError, "measured: at least one number"), (dict(measured=np.zeros(0)), ValueError, "measured: at least one number"),
    (dict(measured={"a": []}), ValueError, "measured: at least one number"), (dict(measured=pd.DataFrame({"a": [1]})), TypeError, "measured: a number, text, or a list or dict of them is expected, got DataFrame"), (dict(measured=1j), TypeError, "got complex"),
    (dict(measured=torch.ones(2, device="meta")), TypeError, "measured: a dense tensor with values is expected, got Tensor"), (dict(measured={"a": [torch.eye(2).to_sparse()]}), TypeError, "measured['a'][0]: a dense tensor"),
    (dict(measured={"a": 1}, published={"b": 1}), ValueError, "published: what was measured too (['a']) is expected, got ['b']"), (dict(measured=1, published={"b": 1}), ValueError, "published: what was measured too (one number)"),
    (dict(measured={"a": {"x": 1}}, published={"a": {"y": 1}}), ValueError, "published['a']: what was measured too (['x']) is expected, got ['y']"),
    (dict(measured=1, seeds=[1.7]), TypeError, "seeds: whole numbers are expected, got [1.7]"), (dict(measured=1, seeds="12"), TypeError, "seeds: several, such as range(10), is expected, got '12'"),
    (dict(measured=1, seeds=[1, 1]), ValueError, "seeds: each seed once is expected, got [1, 1]"), (dict(measured=1, seeds=[-1]), ValueError, "seeds: a whole number from 0"), (dict(measured=1, seeds=[None]), TypeError, "seeds: whole numbers"),
    (dict(measured=1, note=3), TypeError, "note: text is expected, got 3"), (dict(measured=1, note=np.zeros(2)), TypeError, "note: text"), (dict(measured=1, source=torch.zeros(2)), TypeError, "source: text"), (dict(measured=1, source=["Someone"]), TypeError, "source: text is expected"),
    (dict(measured=1, seeds=3), TypeError, "seeds: several, such as range(10), is expected, got 3"),
])
def test_bad_values_of_records(results, values, error, message):
    with pytest.raises(error) as e: record("claim", **values)
    assert message in str(e.value) and not results.exists()


def test_a_pattern_without_records(results):
    with pytest.raises(ValueError, match=r"pattern: 'tying_\*' matches no record"): records("tying_*")


@pytest.mark.parametrize("pattern, error", [("/etc/*", ValueError), ("../*", ValueError), ("a/b", ValueError), ("..", ValueError), ("", ValueError), ("a\\b", ValueError), ("a\n", ValueError),
                                            ("**/*", ValueError), (None, TypeError), (3, TypeError), (["a"], TypeError)])
def test_bad_patterns_of_records(results, pattern, error):
    record("claim", measured=1)
    with pytest.raises(error, match="^pattern: "): records(pattern)


@pytest.mark.parametrize("text", ["{", "", "[]", "3", '{"name": "claim"}', "\xff"])
def test_a_file_that_is_no_record(results, text):
    record("claim", measured=1)
    (results / "claim.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="^claim.json: "): records()


@pytest.mark.parametrize("call, error, message", [
    (lambda: subplots(0), ValueError, "^rows: "), (lambda: subplots(1, None), TypeError, "^cols: "), (lambda: subplots(True), TypeError, "^rows: "),
    (lambda: compare({"a": float}, [1]).rounded(-1), ValueError, "^digits: "), (lambda: compare({"a": float}, [1]).rounded("2"), TypeError, "^digits: "),
    (lambda: compare({"a": float}, [1]).draw(3), TypeError, "^metric: "), (lambda: compare({"a": float}, [1]).draw(ax=3), TypeError, "^ax: one axes of matplotlib"),
])
def test_bad_arguments_of_tables_and_figures(call, error, message):
    with pytest.raises(error, match=message): call()


@pytest.mark.parametrize("part", [lambda table: table["value"], lambda table: table.drop(columns=[("value", "std")]), lambda table: table.iloc[:, :0], lambda table: Comparison()], ids=["one metric", "no std", "no columns", "empty"])
def test_parts_of_a_comparison_without_what_is_shown(part):
    table = part(compare({"a": float}, [1, 2]))
    for call in (table.draw, table.rounded):
        with pytest.raises(ValueError, match="^table: mean and std of at least one metric is expected, got"): call()


@pytest.mark.parametrize("text", ["{", "", "[]", "3", '{"a": 1}', '{"rows": 3}', '{"rows": []}', '{"rows": [{"ms": 1}]}', "\xff"])
def test_a_file_that_is_no_benchmark(results, text):
    (results / "bench").mkdir(parents=True)
    (results / "bench" / "speed.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="^speed.json: "): benchmark("speed")


def test_the_folder_of_results(tmp_path, monkeypatch):
    monkeypatch.delenv("SHARETIE_RESULTS", raising=False)
    (tmp_path / "project" / "nbs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "project" / "nbs")
    assert module._results() == tmp_path / "project" / "nbs" / "results"
    (tmp_path / "project" / "settings.ini").touch()
    assert module._results() == tmp_path / "project" / "results"


def test_no_bar_without_a_person(capfd):
    compare({"a": float}, range(2))
    assert capfd.readouterr() == ("", "")
