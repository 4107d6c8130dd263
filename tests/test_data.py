"""The data sets: what they hold, and that parts never overlap."""
import gzip
import hashlib
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sharetie.data as data
from sharetie import files
from sharetie.data import (Source, adding, copying, digits, encode, load, monks, monks_rule, names, parity, parts,
                           read_conll, shared_curves, standardize, task_pair, two_spirals)

EMBEDDED = ["digits", "two_spirals", "parity", "monks", "task_pair", "adding", "copying", "shared_curves"]
SPLITS = "train", "valid", "test"


def same(a, b):
    "Do two data sets hold the same tensors?"
    return all(torch.equal(getattr(getattr(a, p), k), getattr(getattr(b, p), k)) for p in SPLITS for k in "xy")


def different(*tensors):
    "Different rows in all of `tensors`."
    return len(torch.cat([t.flatten(1).double() for t in tensors]).unique(dim=0))


# parts ------------------------------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.floats(0, 0.49), st.floats(0, 0.49), st.integers(0, 2**31))
def test_parts_are_disjoint_complete_and_proportional(labels, valid, test, seed):
    labels = np.array(labels)
    cut = parts(len(labels), valid, test, seed, labels)
    assert np.array_equal(np.sort(np.concatenate(cut)), np.arange(len(labels)))
    for index, share in zip(cut, (1 - valid - test, valid, test)):
        assert (np.diff(index) > 0).all()
        for c in np.unique(labels):
            assert abs((labels[index] == c).sum() - share * (labels == c).sum()) <= 1


def test_parts_accept_other_labels_than_numbers():
    a = parts(6, 0, 0.5, labels=["b", "a", "b", "a", "b", "b"])
    assert sorted(map(len, a)) == [0, 3, 3]


@pytest.mark.parametrize("options, words", [
    (dict(n=0), ["n: ", "of at least 1", "got 0"]),
    (dict(n=10, valid=-0.1), ["valid: ", "from 0 to 1", "got -0.1"]),
    (dict(n=10, test=1.2, valid=0), ["test: ", "from 0 to 1", "got 1.2"]),
    (dict(n=10, valid=0.7, test=0.3), ["valid + test", "below 1", "(0.7, 0.3)"]),
    (dict(n=10, test=float("nan")), ["test: ", "got nan"]),
    (dict(n=10, labels=[1, 2]), ["labels: one class for each of n=10 examples", "(2,)"]),
    (dict(n=10, seed=-1), ["seed: ", "got -1"]),
])
def test_parts_refuse(options, words):
    with pytest.raises(ValueError) as error: parts(**options)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("n", [2.0, "ten", True, None])
def test_parts_want_a_whole_number(n):
    with pytest.raises(TypeError, match="^n: a whole number is expected, got"): parts(n)


def test_standardize_uses_the_first_part_only():
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(50, 3, generator=generator) * 7 + 2, torch.randn(20, 3, generator=generator)
    a, b = standardize(train, test)
    assert torch.allclose(a.mean(0), torch.zeros(3), atol=1e-6) and torch.allclose(a.std(0, correction=0), torch.ones(3))
    assert torch.equal(standardize(train, test * 100)[0], a)
    assert torch.allclose(b, (test - train.mean(0)) / train.std(0, correction=0))


# the embedded data sets -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_data_sets(name):
    "Same seed, same data; another seed, other data; no row in two parts; global random states untouched."
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, again, other = load(name), load(name), load(name, seed=1)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()
    assert same(first, again)
    assert same(first, other) == (name == "two_spirals")  # without noise it has nothing random
    xs = [getattr(first, p).x for p in SPLITS]
    assert different(*xs) == sum(different(x) for x in xs if len(x))
    assert first.sizes == {p: len(getattr(first, p).y) for p in SPLITS} and first.sizes["test"] > 0
    assert repr(first).startswith(name) and first.source in repr(first)
    assert all(t.isfinite().all() for p in SPLITS for t in getattr(first, p))


def test_the_global_seed_changes_nothing():
    torch.manual_seed(1), np.random.seed(1)
    a = task_pair(n=20, dim=3)
    torch.manual_seed(2), np.random.seed(2)
    assert same(a, task_pair(n=20, dim=3))


def test_data_sets_pass_through_processes():
    import pickle
    for name in ("digits", "shared_curves"): assert same(load(name), pickle.loads(pickle.dumps(load(name))))


def test_digits():
    d = digits(valid=0.1, test=0.3)
    assert sum(d.sizes.values()) == 1797 and d.train.x.dtype == torch.float32 and d.train.y.dtype == torch.int64
    assert d.train.x.shape[1:] == (1, 8, 8) and d.train.x.min() == 0 and d.train.x.max() == 1
    shares = [getattr(d, p).y.bincount() / len(getattr(d, p).y) for p in SPLITS]
    assert all((s - shares[0]).abs().max() < 0.01 for s in shares)


def test_two_spirals_are_the_published_ones():
    x, y = two_spirals().train
    i = np.arange(97)
    radius, angle = 6.5 * (104 - i) / 104, i * np.pi / 16
    assert np.allclose(x[y == 1], np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1), atol=1e-6)
    assert two_spirals(density=3).sizes == {"train": 578, "valid": 576, "test": 576}
    noisy = two_spirals(density=20, noise=0.3)
    assert abs((noisy.train.x - two_spirals(density=20).train.x).std() - 0.3) < 0.01


def test_parity():
    x, y = parity(6, valid=0, test=0).train
    assert x.shape == (64, 6) and different(x) == 64
    assert y.tolist() == [sum(map(int, row)) % 2 for row in x.tolist()]


@pytest.mark.parametrize("problem, positive", [(1, 216), (2, 142), (3, 228)])
def test_monks(problem, positive):
    every = np.indices((3, 3, 2, 3, 4, 2)).reshape(6, -1).T + 1
    rules = {1: lambda a: a[0] == a[1] or a[4] == 1, 2: lambda a: list(a).count(1) == 2,
             3: lambda a: (a[4] == 3 and a[3] == 1) or (a[4] != 4 and a[1] != 3)}
    assert monks_rule(problem, every).tolist() == [int(rules[problem](a)) for a in every.tolist()]
    assert monks_rule(problem, every).sum() == positive
    d = monks(problem, one_hot=False, valid=0.25)
    n = {1: 124, 2: 169, 3: 122}[problem]
    assert d.sizes == {"train": n, "valid": round((432 - n) / 4), "test": 432 - n - round((432 - n) / 4)}
    assert different(*(getattr(d, p).x for p in SPLITS)) == 432
    wrong = [int((monks_rule(problem, s.x.numpy()) != s.y.numpy()).sum()) for s in (d.train, d.valid, d.test)]
    assert wrong == [6 * (problem == 3), 0, 0]


def test_monks_one_hot_and_published_protocol():
    plain, hot = monks(2, one_hot=False), monks(2)
    edges = np.cumsum([0, 3, 3, 2, 3, 4, 2])
    back = torch.stack([hot.train.x[:, a:b].argmax(1) + 1 for a, b in zip(edges, edges[1:])], 1)
    assert torch.equal(back, plain.train.x) and hot.train.x.shape[1] == 17 and (hot.train.x.sum(1) == 6).all()
    published = monks(2, published=True)
    assert len(published.test.x) == 432 and different(published.train.x, published.test.x) == 432
    assert torch.equal(published.train.x, hot.train.x)


@pytest.mark.parametrize("p", [-1, -0.5, 0, 0.3, 1])
def test_task_pair_weights_have_the_correlation(p):
    d = task_pair(p, n=3000, dim=7, scale=2.0, sines=0, noise=0.0, valid=0, test=0)
    w = d.facts["weights"]
    assert torch.allclose(w.norm(dim=1), torch.tensor([2.0, 2.0])) and abs(torch.cosine_similarity(*w, dim=0) - p) < 1e-5
    assert torch.allclose(d.train.y, d.train.x @ w.T, atol=1e-4)
    assert abs(np.corrcoef(d.train.y.T)[0, 1] - p) < 0.06


def test_task_pair_label_formula():
    d = task_pair(0.4, n=50, dim=5, sines=3, noise=0.0, valid=0, test=0)
    z = d.train.x @ d.facts["weights"].T
    y = z + sum(torch.sin(i * z + (i - 1) ** 2) for i in (1, 2, 3))
    assert torch.allclose(d.train.y, y, atol=1e-4)


def test_task_pair_labels_agree_more_with_more_correlation():
    seen = [np.corrcoef(task_pair(p, n=4000, dim=4, valid=0, test=0).train.y.T)[0, 1] for p in (-1, -0.5, 0, 0.5, 0.9, 1)]
    assert (np.diff(seen) > 0.1).all() and seen[-1] > 0.999 and abs(seen[2]) < 0.06


def test_adding():
    x, y = adding(11, n=500, valid=0, test=0).train
    assert x.shape == (500, 11, 2) and y.shape == (500, 1) and x.dtype == y.dtype == torch.float32
    assert (x[:, :5, 1].sum(1) == 1).all() and (x[:, 5:, 1].sum(1) == 1).all() and ((x[..., 0] >= 0) & (x[..., 0] < 1)).all()
    for row, total in zip(x[:20].tolist(), y.tolist()):
        assert abs(sum(number for number, mark in row if mark == 1) - total[0]) < 1e-6


def test_copying():
    x, y = copying(delay=7, length=4, symbols=5, n=200, valid=0, test=0).train
    assert x.shape == y.shape == (200, 15) and x.dtype == y.dtype == torch.int64
    assert torch.equal(x[:, :4], y[:, -4:]) and x[:, :4].max() == 4
    assert (x[:, 10] == 6).all() and ((x == 6).sum(1) == 1).all() and (y[:, :-4] == 5).all()
    assert (x[:, 4:10] == 5).all() and (x[:, 11:] == 5).all()
    assert len(copying(length=2, symbols=3, n=9, valid=0, test=0).train.x.unique(dim=0)) == 9
    assert copying(length=40, symbols=8, n=10).sizes["train"] == 6


def test_shared_curves():
    d = shared_curves(groups=3, points=5, noise=0.0, rate=0.7, span=2.0)
    truth, t, k = d.truth, d.t, d.group
    assert d.train.x.dtype == torch.float64 and k.tolist() == [0] * 5 + [1] * 5 + [2] * 5 and t.max() == 2
    for split in (d.train, d.valid, d.test):
        t, k = split.x[:, 0], split.x[:, 1].long()
        assert torch.allclose(split.y, truth["amplitude"][k] * torch.exp(-0.7 * t) + truth["offset"][k], atol=1e-12)
    assert (shared_curves(same_amplitude=True).truth["amplitude"] == 1).all()
    assert isinstance(load("shared_curves", points=3), data.Curves)


# bad options ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make, options, words", [
    (digits, dict(valid=0.6, test=0.4), ["valid + test", "(0.6, 0.4)"]),
    (digits, dict(test=-0.2), ["test: ", "got -0.2"]),
    (digits, dict(seed=-3), ["seed: ", "got -3"]),
    (two_spirals, dict(density=0), ["density: ", "at least 1", "got 0"]),
    (two_spirals, dict(noise=-1.0), ["noise: ", "at least 0", "got -1.0"]),
    (two_spirals, dict(noise=float("inf")), ["noise: a finite number", "got inf"]),
    (parity, dict(bits=0), ["bits: ", "from 1 to 20", "got 0"]),
    (parity, dict(bits=21), ["bits: ", "from 1 to 20", "got 21"]),
    (monks, dict(problem=4), ["problem: ", "from 1 to 3", "got 4"]),
    (monks, dict(problem=1, valid=1.5), ["valid: ", "got 1.5"]),
    (task_pair, dict(correlation=1.01), ["correlation: ", "-1 to 1", "got 1.01"]),
    (task_pair, dict(correlation=float("nan")), ["correlation: ", "got nan"]),
    (task_pair, dict(n=0), ["n: ", "got 0"]),
    (task_pair, dict(dim=1), ["dim: ", "at least 2", "got 1"]),
    (adding, dict(steps=1), ["steps: ", "at least 2", "got 1"]),
    (adding, dict(n=-5), ["n: ", "got -5"]),
    (copying, dict(delay=0), ["delay: ", "got 0"]),
    (copying, dict(symbols=1), ["symbols: ", "got 1"]),
    (copying, dict(n=1001, symbols=10, length=3), ["n: at most 1000, all sequences", "got 1001"]),
    (shared_curves, dict(groups=0), ["groups: ", "got 0"]),
    (shared_curves, dict(points=1), ["points: ", "at least 2", "got 1"]),
    (two_spirals, dict(radius=0), ["radius: ", "above 0", "got 0"]), (two_spirals, dict(radius=-1), ["radius: "]), (two_spirals, dict(seed=-1), ["seed: "]),
    (monks, dict(seed=-1), ["seed: "]), (monks, dict(problem=0), ["problem: ", "got 0"]), (task_pair, dict(scale=0), ["scale: ", "above 0"]), (task_pair, dict(sines=-1), ["sines: "]),
    (task_pair, dict(noise=float("nan")), ["noise: "]), (copying, dict(length=0), ["length: "]), (adding, dict(valid=1.0), ["valid + test"]), (parity, dict(test=1.0), ["valid + test"]),
    (shared_curves, dict(span=0), ["span: ", "above 0", "got 0"]), (shared_curves, dict(span=float("inf")), ["span: "]), (shared_curves, dict(noise=-1), ["noise: "]),
    (shared_curves, dict(rate=-1.0), ["rate: ", "got -1.0"]),
])
def test_bad_options(make, options, words):
    with pytest.raises(ValueError) as error: make(**options)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("make, options", [(adding, dict(steps=5.0)), (parity, dict(bits="4")), (task_pair, dict(correlation="high")),
                                           (copying, dict(n=None)), (shared_curves, dict(groups=True)),
                                           (monks, dict(problem=True)), (monks, dict(problem="1")), (monks, dict(problem=None)), (monks, dict(published="no")), (monks, dict(one_hot=1)), (monks, dict(valid=None)),
                                           (shared_curves, dict(same_amplitude=None)), (shared_curves, dict(span=None)), (shared_curves, dict(rate=[1.0])), (two_spirals, dict(radius="6")), (two_spirals, dict(noise=None)),
                                           (two_spirals, dict(noise=True)), (digits, dict(seed=None)), (digits, dict(seed=1.0)), (digits, dict(valid="0.2")), (parity, dict(seed=[0])), (adding, dict(seed=None)),
                                           (task_pair, dict(scale=None)), (task_pair, dict(sines=4.0)), (data.mnist, dict(seed=None)), (data.adult, dict(valid=None)), (data.conll2000, dict(least=1.5)),
                                           (data.fashion_mnist, dict(valid="half"))])
def test_options_of_the_wrong_type(make, options):
    with pytest.raises(TypeError, match=f"^{next(iter(options))}: .* is expected, got"): make(**options)


@pytest.mark.parametrize("name", [None, 3, ["digits"], {"digits"}, True, torch.zeros(2)], ids=lambda v: type(v).__name__)
def test_load_wants_a_name(name):
    with pytest.raises(TypeError, match="^name: one of adding, adult, .* is expected, got"): load(name)


@pytest.mark.parametrize("labels, error", [([[1, 2], [3, 4]], ValueError), (3, ValueError), ("abcd", ValueError), (["a", 1, None, 2], TypeError), ([0, 1, float("nan"), 1], ValueError), (torch.full((4,), float("nan")), ValueError), ([[1], [2, 3], [4], [5]], TypeError)])
def test_labels_that_are_none(labels, error):
    with pytest.raises(error, match="^labels: "): parts(4, 0, 0, labels=labels)


@pytest.mark.parametrize("arguments, error, message", [
    ((None,), TypeError, "^train: a floating point tensor is expected, got None"), (([[1.0]],), TypeError, "^train: "), ((torch.ones(2, 2).long(),), TypeError, "^train: .* got Tensor of int64"),
    ((torch.ones(3),), ValueError, "^train: a tensor of 2 axes"), ((torch.zeros(0, 2),), ValueError, "^train: a tensor with at least one element"),
    ((torch.tensor([[1.0, float("nan")]]),), ValueError, "^train: finite numbers are expected, got 1 of 2"), ((torch.ones(2, 2), torch.ones(2, 3)), ValueError, r"^others\[0\]: a tensor of shape \(any, 2\)"),
    ((torch.eye(2).to_sparse(),), TypeError, "^train: a dense tensor"), ((torch.ones(2, 2), torch.ones(2, 2), None), TypeError, r"^others\[1\]: "), ((torch.ones(2, 2), torch.full((2, 2), float("inf"))), ValueError, r"^others\[0\]: finite numbers"),
])
def test_bad_arguments_of_standardize(arguments, error, message):
    with pytest.raises(error, match=message): standardize(*arguments)


TINY = data.Sentences(((("We", "PRP"), ("read", "VBP")),))


@pytest.mark.parametrize("arguments, error, message", [
    ((None, ("a",), ()), TypeError, "^sentences: `Sentences` is expected, got NoneType"), ((["We read"], ("a",), ()), TypeError, "^sentences: .* got list"),
    ((TINY, None, ()), TypeError, "^words: a tuple of text is expected, got None"), ((TINY, "ab", ()), TypeError, "^words: "), ((TINY, ("a", 1), ()), TypeError, "^words: "), ((TINY, ("a", ["b"]), ()), TypeError, "^words: "), ((TINY, ("a",), None), TypeError, "^tags: a tuple is expected, got None"),
    ((TINY, ("a",), "ab"), TypeError, "^tags: "), ((TINY, ("a",), (None,)), TypeError, r"^tags\[0\]: "), ((TINY, ("a",), (("PRP", "VBP", None),)), TypeError, r"^tags\[0\]: a tuple of text"), ((TINY, ("a",), (("PRP", []),)), TypeError, r"^tags\[0\]: "), ((TINY, ("a",), (("PRP",),)), ValueError, r"^tags\[0\]: every tag .* got \['VBP'\]"),
    ((TINY, ("a",), (("PRP", "VBP"), ("O",))), ValueError, "^k: a whole number from 0 to 1 is expected, got 2"),
])
def test_bad_arguments_of_encode(arguments, error, message):
    with pytest.raises(error, match=message): encode(*arguments)


ONES = np.ones((2, 6), int)


@pytest.mark.parametrize("problem, a", [(1, None), (2, [[1] * 6]), (3, ONES[:, :5]), (1, ONES[0]), (2, ONES + 0.5), (2, ONES * np.nan), (1, ONES.astype(str)), (3, ONES.astype(bool)), (2, np.full((2, 6), None))])
def test_attributes_of_another_form(problem, a):
    with pytest.raises(TypeError, match=r"^a: an array of whole numbers of shape \(n, 6\) is expected, got"): monks_rule(problem, a)


@pytest.mark.parametrize("a", [ONES - 1, ONES * 4, -ONES])
def test_attributes_that_no_example_has(a):
    with pytest.raises(ValueError, match=r"^a: a row from 1 to \(3, 3, 2, 3, 4, 2\) is expected, got \[\["): monks_rule(2, a)
    assert monks_rule(2, ONES[:0]).tolist() == []


def test_numbers_of_sequences_that_no_int64_holds():
    assert copying(length=np.int64(30), symbols=np.int64(8), n=5, valid=0, test=0).sizes["train"] == 5


TWO = data.Split(torch.zeros(2, 3), torch.zeros(2))


@pytest.mark.parametrize("part, split, error, message", [
    ("train", None, TypeError, "^train: a Split is expected, got NoneType"), ("valid", tuple(TWO), TypeError, "^valid: a Split is expected, got tuple"), ("test", TWO._replace(x=[0.0, 1.0]), TypeError, r"^test.x: a tensor is expected, got \[0.0, 1.0\]"),
    ("train", TWO._replace(y=np.zeros(2)), TypeError, "^train.y: a tensor"), ("valid", TWO._replace(y=torch.zeros(3)), ValueError, r"^valid: as many inputs as targets is expected, got \[\(2, 3\), \(3,\)\]"),
    ("test", TWO._replace(x=torch.tensor(1.0)), ValueError, "^test: as many inputs"),
])
def test_parts_of_a_data_set_of_another_form(part, split, error, message):
    with pytest.raises(error, match=message): data.Dataset("toy", **{"train": TWO, "valid": TWO, "test": TWO, part: split}, source="zeros")


def test_load_lists_the_names_that_exist():
    with pytest.raises(ValueError) as error: load("nonsense")
    assert all(name in str(error.value) for name in names()) and "did you mean" not in str(error.value)
    with pytest.raises(ValueError, match="did you mean 'two_spirals'"): load("spirals")
    with pytest.raises(ValueError, match="did you mean 'mnist'"): load("MNIST")
    assert names() == sorted([*EMBEDDED, "mnist", "fashion_mnist", "adult", "conll2000"])
    with pytest.raises(TypeError, match="^option of parity: .* got 'bitz'"): load("parity", bitz=3)


# the full data sets, on small copies of their formats ------------------------------------------------------------

TEXT = "We PRP B-NP\nread VBP B-VP\n\nWell UH O\n\n"


def idx(array):
    "An idx file of bytes."
    array = np.asarray(array, np.uint8)
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def test_files_are_offered_here_too():
    for name in files.__all__: assert getattr(data, name) is getattr(files, name)


def test_encode(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    text = read_conll(tmp_path / "a.txt")
    x, y = encode(text, ("<pad>", "<unknown>", "read"), (("PRP", "UH", "VBP"),))
    assert x.tolist() == [[1, 2], [1, 0]] and y[..., 0].tolist() == [[0, 2], [1, -100]]
    with pytest.raises(ValueError, match=r"tags\[0\]: every tag of column 1 in \('PRP', 'VBP'\) is expected, got \['UH'\]"):
        encode(text, ("<pad>", "<unknown>"), (("PRP", "VBP"),))


def provide(monkeypatch, tmp_path, name, blobs):
    "Put `blobs` into the data folder as the files of data set `name`."
    (tmp_path / name).mkdir()
    for file, blob in blobs.items(): (tmp_path / name / file).write_bytes(blob)
    monkeypatch.setenv("SHARETIE_DATA", str(tmp_path))
    digest = {file: hashlib.sha256(files._content(tmp_path / name / file)).hexdigest() for file in blobs}
    monkeypatch.setitem(data.SOURCES, name, Source((), digest))


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_images_from_small_files(monkeypatch, tmp_path, name):
    rng = np.random.default_rng(0)
    image = {"train": rng.integers(0, 256, (60, 28, 28)), "t10k": rng.integers(0, 256, (10, 28, 28))}
    label = {"train": np.arange(60) % 10, "t10k": np.arange(10)}
    provide(monkeypatch, tmp_path, name, {f"{p}-{w}-ubyte.gz": gzip.compress(idx(a[p]))
                                          for p in image for w, a in (("images-idx3", image), ("labels-idx1", label))})
    d = load(name)
    assert d.sizes == {"train": 50, "valid": 10, "test": 10} and d.train.x.shape[1:] == (1, 28, 28)
    assert d.train.x.dtype == torch.float32 and d.train.x.max() <= 1 and d.valid.y.sort().values.tolist() == list(range(10))
    assert np.allclose(d.test.x[:, 0] * 255, image["t10k"]) and d.test.y.tolist() == list(range(10))
    assert different(*(getattr(d, p).x for p in SPLITS)) == 70
    assert same(d, load(name)) and not same(d, load(name, seed=1))


PERSON = "{age}, Private, {weight}, HS-grad, 9, {marital}, Sales, {relation}, White, Male, 0, 0, 40, ?, {income}\n"


def people(n, dot, shift=0.0):
    "n records in the format of Adult."
    kinds = ("Never-married", "Own-child"), ("Divorced", "Unmarried")
    rows = [PERSON.format(age=20 + i + shift, weight=1000 + i, marital=kinds[i % 2][0], relation=kinds[i % 2][1],
                          income=("<=50K", ">50K")[i % 3 == 0] + dot) for i in range(n)]
    return "".join(rows).encode()


def test_adult_from_small_files(monkeypatch, tmp_path):
    provide(monkeypatch, tmp_path, "adult", {"adult.data": people(30, ""), "adult.test": b"|1x3 Cross validator\n" + people(12, ".")})
    d = load("adult")
    assert d.sizes == {"train": 24, "valid": 6, "test": 12} and d.train.x.shape[1] == 94 == len(d.facts["inputs"])
    assert d.test.y.tolist() == [[float(i % 3 == 0), float(i % 2 == 0)] for i in range(12)]
    assert not any(word in name for name in d.facts["inputs"] for word in ("marital", "relationship", "fnlwgt", "income"))
    assert (d.train.x[:, 5:].sum(1) == 6).all() and d.train.x[:, :5].mean(0).abs().max() < 1e-6
    fit, held = d.facts["index"]
    assert torch.equal(torch.cat([fit, held]).sort().values, torch.arange(30))
    age, mean = torch.arange(30.0) + 20, (fit + 20.0).mean()
    assert torch.allclose(d.valid.x[:, 0], ((age[held] - mean) / age[fit].std(correction=0)), atol=1e-5)


def test_adult_statistics_ignore_the_other_parts(monkeypatch, tmp_path):
    provide(monkeypatch, tmp_path, "adult", {"adult.data": people(30, ""), "adult.test": people(12, ".")})
    before = load("adult")
    (tmp_path / "adult/adult.test").write_bytes(people(12, ".", shift=500))
    monkeypatch.setitem(data.SOURCES["adult"].files, "adult.test", hashlib.sha256(people(12, ".", shift=500)).hexdigest())
    after = load("adult")
    assert torch.equal(before.train.x, after.train.x) and not torch.equal(before.test.x, after.test.x)


def test_adult_refuses_an_unknown_category(monkeypatch, tmp_path):
    wrong = people(30, "").replace(b"Divorced", b"Engaged")
    provide(monkeypatch, tmp_path, "adult", {"adult.data": wrong, "adult.test": people(12, ".")})
    with pytest.raises(ValueError, match="adult.data: line 2, column marital-status: 'Engaged', expected one of"): load("adult")


def test_conll2000_from_a_small_file(monkeypatch, tmp_path):
    train = "".join(f"the DT B-NP\nword{i} NN I-NP\n\n" for i in range(20))
    with zipfile.ZipFile(tmp_path / "conll.zip", "w") as archive:
        archive.writestr("conll2000/train.txt", train), archive.writestr("conll2000/test.txt", TEXT)
    provide(monkeypatch, tmp_path, "conll2000", {"conll2000.zip": (tmp_path / "conll.zip").read_bytes()})
    d = load("conll2000", valid=0.25)
    assert d.sizes == {"train": 15, "valid": 5, "test": 2} and d.words == ("<pad>", "<unknown>", "the")
    assert d.tags == (("DT", "NN", "PRP", "UH", "VBP"), ("B-NP", "B-VP", "I-NP", "O"))
    assert (d.train.x == torch.tensor([2, 1])).all() and d.test.x.tolist() == [[1, 1], [1, 0]]
    assert not set(d.sentences["train"].rows) & set(d.sentences["valid"].rows)


# the full data sets themselves ------------------------------------------------------------------------------------

def provided(name):
    "Skip unless the folder SHARETIE_DATA has data set `name`."
    folder = Path(os.environ.get("SHARETIE_DATA", "")) / name
    return pytest.mark.skipif(not os.environ.get("SHARETIE_DATA") or not folder.is_dir(), reason=f"no {name} in SHARETIE_DATA")


@pytest.mark.mnist
@provided("mnist")
def test_mnist():
    d = load("mnist")
    assert d.sizes["train"] + d.sizes["valid"] == 60_000 and d.sizes["test"] == 10_000
    assert d.test.y[:5].tolist() == [7, 2, 1, 0, 4] and 0.1 < d.train.x.mean() < 0.2


@pytest.mark.adult
@provided("adult")
def test_adult():
    d = load("adult")
    assert d.sizes["train"] + d.sizes["valid"] == 32_561 and d.sizes["test"] == 16_281
    positive = torch.cat([d.train.y, d.valid.y]).sum(0)
    assert positive.tolist() == [7841, 10683]


@pytest.mark.conll
@provided("conll2000")
def test_conll2000():
    d = load("conll2000")
    tokens = {part: text.tokens for part, text in d.sentences.items()}
    assert tokens["train"] + tokens["valid"] == 211_727 and tokens["test"] == 47_377
    assert d.sizes["train"] + d.sizes["valid"] == 8936 and d.sizes["test"] == 2012
    assert all((getattr(d, p).y >= 0).any(-1).sum() == tokens[p] for p in SPLITS)
