"Compressed files: bit for bit, the same bytes, ties, sizes that add up, and whatever is damaged, foreign or in the way refused."
import copy
import itertools
import json
import math
import os
import re
import struct
import subprocess
import sys

import constriction
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from sharetie import archive
from sharetie.archive import _positions as positions
from sharetie.archive import NOTE, Archive, Pieced, Scaled, _bits, _checksum, decompress, from_record, save_archive, to_record, write_archive
from sharetie.checkpoint import Checkpoint, write_tensors
from sharetie.codebooks import cluster_
from sharetie.command import main
from sharetie.factors import factorize_
from sharetie.finding import Transpose, find_ties
from sharetie.hashing import hash_
from sharetie.making import tie_
from sharetie.masks import magnitude, prune_
from sharetie.pieces import PieceLookup, quantize_pieces_
from sharetie.quantization import quantize_, stored_bytes
from sharetie.results import set_seed
from sharetie.saving import load_model, save_model
from tied import Convs, Reused, Words


def words(): return Words(100, 32)


class Coder(nn.Module):
    "A decoder that is the encoder's transpose."
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(60, 30), nn.Linear(30, 60)
        tie_(self, ["encoder.weight", "decoder.weight"], map=Transpose())
    def forward(self, x): return self.decoder(self.encoder(x).relu())


TIED = {"words": (words, torch.arange(4)), "reused": (lambda: Reused(24), torch.randn(3, 24)), "convs": (lambda: Convs(8), torch.randn(1, 8, 4, 4)),
        "coder": (Coder, torch.randn(2, 60))}


@pytest.mark.parametrize("kind", TIED)
def test_a_tied_weight_is_stored_once_and_stays_tied(kind, tmp_path):
    build, x = TIED[kind]
    model, fresh = build(), build()
    prune_(model, magnitude(model), .8)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    save_archive(model, tmp_path / "a")
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())  # untouched
    archive = Archive(tmp_path / "a")
    rows = archive.report()
    assert rows.loc["all", "bytes"] == os.path.getsize(tmp_path / "a")
    assert rows.drop(["all", "header"])["weights"].sum() == sum(p.numel() for p in model.parameters())
    load_model(fresh, archive)
    assert torch.equal(fresh(x), model(x)) and len(find_ties(fresh)) == len(find_ties(build()))
    decompress(tmp_path / "a", tmp_path / "plain")
    again = build()
    load_model(again, tmp_path / "plain")
    assert torch.equal(again(x), model(x))
    assert {*Checkpoint(tmp_path / "plain").names} == {*archive.names}


def test_clustered_models_are_saved_as_what_they_compute(tmp_path):
    model, fresh = cluster_(words(), 16), words()
    save_archive(model, tmp_path / "a")
    load_model(fresh, Archive(tmp_path / "a"))
    assert torch.equal(fresh(torch.arange(5)), model(torch.arange(5)))
    assert os.path.getsize(tmp_path / "a") < 3200 * 4 / 8 + 400


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_models_are_coded_too(tmp_path, bits):
    set_seed(0)
    model = quantize_(words(), bits, 16)
    save_archive(model, tmp_path / "a")
    fresh = quantize_(words(), bits, 16)
    load_model(fresh, Archive(tmp_path / "a"))
    assert torch.equal(fresh(torch.arange(5)), model(torch.arange(5)))
    assert os.path.getsize(tmp_path / "a") < 3200 * bits / 8 + 200 * 4 + 800


@pytest.mark.long
def test_the_same_model_gives_the_same_bytes(tmp_path):
    code = ("import sys, torch; from torch import nn; from sharetie.archive import save_archive; from sharetie.codebooks import cluster_;"
            "torch.manual_seed(0); save_archive(cluster_(nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 9)), 4), sys.argv[1])")
    subprocess.run([sys.executable, "-c", code, tmp_path / "a"], check=True)
    torch.manual_seed(0)
    save_archive(cluster_(nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 9)), 4), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    file = Archive(tmp_path / "a")
    write_archive(tmp_path / "c", {name: file[name] for name in reversed([*file.entries])}, file.metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()


def odd_values():
    "Values that are easily lost: signs of zero, what is no number, the smallest, all types."
    set_seed(0)
    special = torch.tensor([0., -0., float("inf"), -float("inf"), float("nan"), 1e-45, 3.4e38, 1.])
    yield "special", special[torch.randint(8, (20, 30))]
    yield "signs of zero", torch.where(torch.rand(40, 50) < .5, 0., -0.)
    yield "all zero", torch.zeros(30, 40)
    yield "all alike", torch.full((300,), .1)
    yield "scalar", torch.tensor(3.)
    yield "nothing", torch.zeros(0, 5)
    yield "distinct", torch.randn(300, 300)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        yield f"{dtype}", torch.randn(9)[torch.randint(9, (8, 4, 3, 3))].mul(torch.rand(8, 4, 3, 3) < .3).to(dtype)
    yield "other types", torch.arange(99)
    yield "complex", torch.randn(9, dtype=torch.complex64)
    yield "bool", torch.rand(99) < .5
    yield "not contiguous", torch.randn(5)[torch.randint(5, (40, 30))].T
    yield "sparse columns", torch.randn(200, 300) * (torch.rand(300) < .05)
    yield "many values", torch.randn(70_000)[torch.randint(70_000, (3, 70_000))]


@pytest.mark.parametrize("entropy", [True, False])
def test_every_value_comes_back_bit_for_bit(tmp_path, entropy):
    values = dict(odd_values())
    write_archive(tmp_path / "a", values, {"who": "me"}, entropy)
    file = Archive(tmp_path / "a")
    for name, value in values.items():
        assert file[name].dtype == value.dtype and file[name].shape == value.shape, name
        assert file[name].contiguous().flatten().view(torch.uint8).tolist() == value.contiguous().flatten().view(torch.uint8).tolist(), name
    assert file.metadata == {"who": "me"} and file.report().loc["all", "bytes"] == os.path.getsize(tmp_path / "a")
    decompress(tmp_path / "a", tmp_path / "b")
    assert {*load_file(tmp_path / "b")} == {*values}


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 40), st.floats(0, 1), st.booleans(), st.integers(0, 99))
def test_records_of_any_shape(shape, k, q, entropy, seed):
    torch.manual_seed(seed)
    value = torch.randn(k)[torch.randint(k, shape)] * (torch.rand(shape) < q)
    found = from_record(to_record(value, entropy), value.dtype, tuple(shape))
    assert torch.equal(_bits(found), _bits(value))


@pytest.mark.parametrize("shape, size", [((6, 10), 10), ((6, 10), 4), ((1, 7), 3), ((4, 3, 3, 3), 27), ((30, 40), 1), ((50,), 8)])
@pytest.mark.parametrize("q", [1., .1])
def test_whole_numbers_with_scales(tmp_path, shape, size, q):
    set_seed(0)
    rows, n = (shape[0], torch.Size(shape[1:]).numel()) if len(shape) > 1 else (1, shape[0])
    codes = torch.randint(-127, 128, shape).mul(torch.rand(shape) < q).to(torch.int8)
    form = Scaled(codes, torch.rand(rows, -(-n // size)), size)
    each = torch.tensor([[form.scales[i, j // size] * codes.reshape(rows, n)[i, j] for j in range(n)] for i in range(rows)])
    assert torch.equal(form.values(), each.view(shape))
    write_archive(tmp_path / "a", {"w": form})
    file = Archive(tmp_path / "a")
    again = file.form("w")
    assert torch.equal(again.codes, codes.int()) and torch.equal(again.scales, form.scales) and again.group_size == size
    assert torch.equal(file["w"], form.values()) and file.entries["w"].shape == shape
    assert file.report().loc["all", "bytes"] == os.path.getsize(tmp_path / "a")


@pytest.mark.parametrize("codes, scales, size, error, words", [
    (torch.zeros(2, 6).int(), torch.ones(2, 1), 3, ValueError, r"value.scales: a tensor of shape \(2, 2\)"),
    (torch.zeros(2, 6).int(), torch.ones(1, 1), 6, ValueError, r"value.scales: a tensor of shape \(2, 1\)"),
    (torch.zeros(2, 6).int(), torch.ones(2, 1), 0, ValueError, "value.group_size: a whole number of at least 1"),
    (torch.zeros(2, 6).int(), torch.ones(2, 1).int(), 6, TypeError, "value.scales: a floating point tensor"),
    (torch.zeros(2, 6), torch.ones(2, 1), 6, TypeError, "value.codes: a tensor of whole numbers"),
    (torch.zeros(2, 0).int(), torch.ones(2, 0), 6, ValueError, "value.codes: a tensor with at least one element"),
    (torch.tensor([[-1, 65535]]), torch.ones(1, 1), 2, ValueError, r"value.codes: at most 65536 numbers.*\[-1, 65535\]"),
])
def test_codes_and_scales_that_do_not_fit_are_not_written(tmp_path, codes, scales, size, error, words):
    with pytest.raises(error, match=words): write_archive(tmp_path / "a", {"w": Scaled(codes, scales, size)})
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("books", ["layer", "positions"])
@pytest.mark.parametrize("kind", ["words", "convs"])
@pytest.mark.parametrize("entropy", [True, False])
def test_pieces_take_the_bytes_that_are_reported(tmp_path, kind, books, entropy):
    build, x = TIED[kind]
    set_seed(0)
    model = quantize_pieces_(build(), 4, 4, books=books)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    save_archive(model, tmp_path / "a", entropy)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    rows = Archive(tmp_path / "a").report()
    assert rows.loc["all", "bytes"] == os.path.getsize(tmp_path / "a") <= stored_bytes(model) + rows.loc["header", "bytes"] + 64
    for read in (Archive, lambda path: decompress(path, tmp_path / "plain") and tmp_path / "plain"):
        fresh = build()
        load_model(fresh, read(tmp_path / "a"))
        assert torch.equal(fresh(x), model(x)) and len(find_ties(fresh)) == len(find_ties(build()))


MADE = {"hashed": lambda m: hash_(m, 8), "low rank": lambda m: factorize_(m, rank=4), "8 bits": quantize_, "4 bits": lambda m: quantize_(m, 4, 16),
        "pieces": lambda m: quantize_pieces_(m, 16, 4), "clustered": lambda m: cluster_(m, 16), "across": lambda m: cluster_(m, 16, scope="across")}


@pytest.mark.parametrize("kind", MADE)
def test_a_file_holds_what_a_model_stores_and_no_more(tmp_path, kind):
    def build(seed=0):
        set_seed(seed)
        return MADE[kind](nn.Sequential(nn.Linear(64, 100), nn.Tanh(), nn.Linear(100, 40)))
    model, x = build(), torch.randn(3, 64)
    save_archive(model, tmp_path / "a")
    file = Archive(tmp_path / "a")
    size = stored_bytes(model) + (4 * 16 if kind == "across" else 0)  # each tensor has its codebook
    assert os.path.getsize(tmp_path / "a") <= size + file.report().loc["header", "bytes"] + 64
    plain = kind in ("pieces", "clustered", "across")
    fresh = nn.Sequential(nn.Linear(64, 100), nn.Tanh(), nn.Linear(100, 40)) if plain else build(1)
    load_model(fresh, file)
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("books", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_codes_and_codebooks_of_pieces(tmp_path, books, dtype):
    set_seed(0)
    form = Pieced(torch.randint(7, (20, 5)), torch.randn(books, 7, 6).to(dtype), (20, 3, 10))
    each = [[form.codebooks[j % books, form.codes[i, j]] for j in range(5)] for i in range(20)]
    assert torch.equal(form.values(), torch.stack([torch.cat(row) for row in each]).view(20, 3, 10))
    write_archive(tmp_path / "a", {"w": form})
    again = Archive(tmp_path / "a").form("w")
    assert torch.equal(again.codes, form.codes.int()) and torch.equal(again.codebooks, form.codebooks) and again.shape == form.shape
    assert torch.equal(Archive(tmp_path / "a")["w"], form.values()) and again.codebooks.dtype == dtype


@pytest.mark.parametrize("codes, books, shape, error, words", [
    (torch.zeros(2, 3).int(), torch.ones(2, 4, 2), (2, 6), ValueError, "value.codebooks: 1 or 3 codebooks"),
    (torch.zeros(2, 3).int(), torch.ones(1, 4, 2), (2, 5), ValueError, "value.shape: 2 rows of 6 columns"),
    (torch.zeros(2, 3).int(), torch.ones(1, 4, 2), (12,), ValueError, "value.shape: 2 rows of 6 columns"),
    (torch.full((2, 3), 4), torch.ones(1, 4, 2), (2, 6), ValueError, r"value.codes: numbers from 0 to 3.*\[4, 4\]"),
    (torch.full((2, 3), -1), torch.ones(1, 4, 2), (2, 6), ValueError, "value.codes: numbers from 0 to 3"),
    (torch.zeros(2, 3), torch.ones(1, 4, 2), (2, 6), TypeError, "value.codes: a tensor of whole numbers"),
    (torch.zeros(2, 3).int(), torch.ones(1, 4, 2).int(), (2, 6), TypeError, "value.codebooks: a floating point tensor"),
    (torch.zeros(2, 0).int(), torch.ones(1, 4, 2), (2, 0), ValueError, "value.codes: a tensor with at least one element"),
    (torch.zeros(2, 3).int(), torch.ones(1, 65537, 2), (2, 6), ValueError, "value.codebooks: at most 65536 pieces"),
])
def test_pieces_that_do_not_fit_are_not_written(tmp_path, codes, books, shape, error, words):
    with pytest.raises(error, match=words): write_archive(tmp_path / "a", {"w": Pieced(codes, books, shape)})
    assert not [*tmp_path.iterdir()]


def test_damaged_pieces_are_refused_or_of_the_shape():
    set_seed(0)
    base = to_record(Pieced(torch.randint(7, (20, 5)), torch.randn(5, 7, 6), (20, 30)))
    for i in range(400):
        bad = base.clone()
        bad[torch.randint(len(bad) if i % 2 else 8, (1 + i % 3,))] = torch.randint(256, (1,), dtype=torch.uint8)
        try: found = from_record(bad, torch.float32, (20, 30))
        except ValueError: continue
        assert found.shape == (20, 30)  # the numbers themselves have no check of their own
    for size in range(len(base) - 1):
        try: from_record(base[:size], torch.float32, (20, 30))
        except ValueError: continue
        raise AssertionError(size)
    for shape in ((), (600,), (30, 20), (20, 31), (0, 30), (20, 0), (2_000_000, 3)):
        with pytest.raises(ValueError, match="record|stream|value"): from_record(base, torch.float32, shape)


def test_more_pieces_than_a_stream_tells_apart_are_plain_weights(tmp_path):
    torch.manual_seed(0)
    layer = nn.Linear(2, 70_000, bias=False)
    lookup = PieceLookup(torch.arange(70_000)[:, None], 70_000, (70_000, 2))
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", lookup, unsafe=True)
    layer.parametrizations.weight.original = nn.Parameter(torch.randn(1, 70_000, 2))
    save_archive(layer, tmp_path / "a")
    assert torch.equal(Archive(tmp_path / "a")["weight"], layer.weight)


def test_only_files_with_pieces_are_of_the_second_version(tmp_path):
    def version(): return json.loads(safe_open(tmp_path / "a", "pt").metadata()[NOTE])["version"]
    save_archive(cluster_(nn.Linear(20, 30), 4), tmp_path / "a")
    assert version() == 1
    save_archive(quantize_pieces_(nn.Linear(20, 30), 4, 4), tmp_path / "a", force=True)
    assert version() == 2


KINDS = [np.float16, None, np.float32, np.float64, np.int8, np.uint8]


def test_positions_are_coded_only_where_they_can_pay(monkeypatch):
    set_seed(0)
    coded, value = [], torch.rand(200, 300) + 1
    monkeypatch.setattr(archive, "_positions", lambda mask, *more: coded.append(mask.shape) or positions(mask, *more))
    value[5, 5] = 0
    assert len(to_record(value)) <= value.nbytes + 3 and not coded  # a single zero
    value[:, 7] = 0
    assert len(to_record(value)) < value.nbytes - 700 and coded == [(300, 200)]  # in columns it is one gap


def by_the_book(path):
    "The tensors of a file, read as the text says it, with NumPy and the coder alone; those that are no records as they are."
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start])
    described, found = json.loads(header.pop("__metadata__")["sharetie.archive"])["tensors"], {}
    for name, entry in header.items():
        a, b = entry["data_offsets"]
        held = data[start + a : start + b]
        if name in described:
            code, _, shape = described[name].partition(" ")
            shape = tuple(map(int, shape.split("x"))) if shape else ()
        else: code, shape = entry["dtype"], tuple(entry["shape"])
        kind = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "I8": np.int8, "U8": np.uint8, "I64": np.int64}[code]
        found[name] = one_record(held, shape, kind) if name in described else np.frombuffer(held, kind).reshape(shape)
    return found


def one_number(data):
    value = 0
    for i in itertools.count():
        value |= (data[0] & 127) << 7 * i
        data, more = data[1:], data[0] & 128
        if not more: return value, data


def one_stream(data):
    width, data = data[0], data[1:]
    n, data = one_number(data)
    k, data = one_number(data)
    table, data = np.frombuffer(data[: k * width // 8], f"<u{width // 8}") if width else np.ones(k), data[k * width // 8 :]
    if k == 1: return np.zeros(n, int)
    coder = constriction.stream.stack.AnsCoder(np.frombuffer(data[4:], "<u4").astype(np.uint32))
    return coder.decode(constriction.stream.model.Categorical(table.astype(np.float32), perfect=False), n)


def one_record(data, shape, kind):
    order, data = data[0], data[1:]
    turned = (math.prod(shape[1:]), shape[0]) if order == 2 else shape
    there = np.arange(math.prod(shape))
    if order:
        bits, (length, data), at, there = data[0], one_number(data[1:]), -1, []
        for gap in one_stream(data[:length]):
            at += gap + (gap != 2**bits - 1)
            if gap != 2**bits - 1: there.append(at)
        data = data[length:]
    form, data = data[0], data[1:]
    if form > 1:
        first, data = one_number(data)
        size, data = one_number(data)
    if form:
        length, data = one_number(data)
        codes, data = one_stream(data[:length]), data[length:]
    numbers = np.frombuffer(data[1:], KINDS[data[0]]).astype(kind)
    if form == 3:
        books, m = numbers.reshape(first, -1, size), math.prod(shape[1:]) // size
        return np.concatenate([books[i % m % first][code] for i, code in enumerate(codes)]).reshape(shape)
    values = np.zeros(math.prod(shape), kind if form < 2 else int)
    values[there] = numbers if form == 0 else numbers[codes] if form == 1 else codes - first
    values = values.reshape(turned).T.reshape(shape) if order == 2 else values.reshape(shape)
    if form < 2: return values
    rows = values.reshape(len(values) if len(shape) > 1 else 1, -1)
    scales = numbers.reshape(len(rows), -1).repeat(size, 1)[:, : rows.shape[1]]
    return (rows * scales).astype(kind).reshape(shape)


def test_a_file_can_be_read_by_the_text_alone(tmp_path):
    values = {name: v for name, v in odd_values() if v.dtype not in (torch.bfloat16, torch.complex64, torch.bool)}
    draw = torch.Generator().manual_seed(0)
    for name, size, q in (("scaled", 4, 1.), ("scaled, sparse", 10, .1)):
        codes = torch.randint(-7, 8, (20, 10), generator=draw) * (torch.rand(20, 10, generator=draw) < q)
        values[name] = Scaled(codes, torch.rand(20, -(-10 // size), generator=draw), size)
    for count in (1, 5): values[f"pieced, {count}"] = Pieced(torch.randint(7, (20, 5), generator=draw), torch.rand(count, 7, 6, generator=draw), (20, 3, 10))
    for entropy in (True, False):
        write_archive(tmp_path / "a", values, {"who": "me"}, entropy, force=True)
        read = by_the_book(tmp_path / "a")
        assert {*read} == {*values}
        for name, value in values.items():
            value = value if isinstance(value, torch.Tensor) else value.values()
            assert read[name].tobytes() == value.contiguous().numpy().tobytes(), name


def small(folder):
    "A compressed file with everything in it."
    set_seed(1)
    model = cluster_(nn.Sequential(nn.Linear(20, 20), nn.BatchNorm1d(20), nn.Linear(20, 20), nn.Linear(20, 12)), 4, "0.weight")
    prune_(model, {"2.weight": torch.rand(20, 20)}, .8)
    quantize_pieces_(model, 4, 4, "3.weight")
    model[2].bias = model[1].bias
    save_archive(model, folder / "small")
    return folder / "small"


@pytest.mark.long
def test_every_damaged_byte_and_every_cut_is_refused(tmp_path):
    data = small(tmp_path).read_bytes()
    model = nn.Sequential(nn.Linear(20, 20), nn.BatchNorm1d(20), nn.Linear(20, 20), nn.Linear(20, 12))
    before = copy.deepcopy(model.state_dict())
    for i in range(0, len(data), 3):
        (tmp_path / "cut").write_bytes(data[:i])
        (tmp_path / "broken").write_bytes(data[:i] + bytes([data[i] ^ (1 << i % 8)]) + data[i + 1 :])
        for name in ("cut", "broken"):
            with pytest.raises(ValueError, match=name): load_model(model, Archive(tmp_path / name))
    (tmp_path / "longer").write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="longer"): Archive(tmp_path / "longer")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def rewritten(path, change, stored=None):
    "The file with its note changed, and a check that fits."
    with safe_open(path, "pt") as file: metadata = file.metadata()
    stored = load_file(path) if stored is None else stored
    note = json.loads(metadata[NOTE])
    del note["check"]
    change(note)
    def text(): return json.dumps(note, sort_keys=True, separators=(",", ":"))
    note["check"] = _checksum(metadata | {NOTE: text()}, stored)
    write_tensors(path, stored, metadata | {NOTE: text()})


@pytest.mark.parametrize("change, words", [
    (lambda note: note.update(version=3), "a later sharetie, in version 3"),
    (lambda note: note.update(version=3, tensors="other"), "a later sharetie, in version 3"),
    (lambda note: note.update(version=0), "damaged"),
    (lambda note: note.update(version="1"), "damaged"),
    (lambda note: note.update(version=True), "damaged"),
    (lambda note: note.pop("tensors"), "damaged"),
    (lambda note: note.update(tensors=[]), "damaged"),
    (lambda note: note["tensors"].update({"0.weight": "I64 20x20"}), "damaged"),
    (lambda note: note["tensors"].update({"0.weight": "F32 20x-1"}), "damaged"),
    (lambda note: note["tensors"].update({"0.bias": "F32 20"}), "damaged"),
    (lambda note: note["tensors"].update({"other": "F32 20"}), "damaged"),
])
def test_notes_that_are_refused(tmp_path, change, words):
    path = small(tmp_path)
    rewritten(path, change)
    with pytest.raises(ValueError, match=words): Archive(path)


@pytest.mark.parametrize("shape", ["20", "20x21", "19x20", "2000000x2000000"])
def test_records_of_another_shape_are_refused(tmp_path, shape):
    path = small(tmp_path)
    rewritten(path, lambda note: note["tensors"].update({"0.weight": f"F32 {shape}"}))
    with pytest.raises(ValueError, match="0.weight: "): Archive(path)["0.weight"]


def test_records_that_no_one_wrote():
    set_seed(0)
    base = to_record(torch.randn(4)[torch.randint(4, (20, 30))] * (torch.rand(20, 30) < .2))
    for i in range(200):
        bad = base.clone()
        bad[torch.randint(len(bad), (1 + i % 3,))] = torch.randint(256, (1,), dtype=torch.uint8)
        try: found = from_record(bad, torch.float32, (20, 30))
        except ValueError: continue
        assert found.shape == (20, 30)  # the numbers themselves have no check of their own
    for bad in (torch.zeros(0), base[:1], torch.tensor([3, 0, 0])):
        with pytest.raises(ValueError, match="record|stream"): from_record(bad.byte(), torch.float32, (20, 30))


@pytest.mark.parametrize("tensors", [None, {3: torch.ones(2)}, [torch.ones(2)]])
def test_what_is_no_dictionary_by_name_is_not_written(tmp_path, tensors):
    with pytest.raises(TypeError, match="tensors: a dictionary of tensors by name"): write_archive(tmp_path / "a", tensors)
    assert not [*tmp_path.iterdir()]


def test_foreign_files(tmp_path):
    save_model(words(), tmp_path / "plain.safetensors")
    torch.save({"a": torch.ones(2)}, tmp_path / "torch.pt")
    (tmp_path / "text").write_text("hello, this is text")
    (tmp_path / "empty").write_bytes(b"")
    for name in ("plain.safetensors", "torch.pt", "text", "empty"):
        with pytest.raises(ValueError, match=name): Archive(tmp_path / name)
        with pytest.raises(ValueError, match=name): decompress(tmp_path / name, tmp_path / "out")
    with pytest.raises(FileNotFoundError): Archive(tmp_path / "none")
    with pytest.raises(TypeError, match="the path of a file"): Archive(3)
    assert not (tmp_path / "out").exists()


def test_nothing_is_in_the_way_by_accident(tmp_path):
    path = small(tmp_path)
    data = path.read_bytes()
    with pytest.raises(FileExistsError, match="force=True"): save_archive(words(), path)
    with pytest.raises(FileExistsError, match="force=True"): decompress(path, path)
    with pytest.raises(FileNotFoundError, match="no folder"): save_archive(words(), tmp_path / "none" / "a")
    with pytest.raises(IsADirectoryError): save_archive(words(), tmp_path, force=True)
    assert path.read_bytes() == data and [*tmp_path.iterdir()] == [path]
    sizes = decompress(path, path, force=True)
    assert sizes.before == len(data) and sizes.after == os.path.getsize(path) and "0.weight" in load_file(path)


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    path = small(tmp_path)
    data = path.read_bytes()
    with pytest.raises(ValueError, match="meta device"): write_archive(path, {"a": torch.ones(2), "b": torch.ones(2, device="meta")}, force=True)
    with pytest.raises(TypeError, match="a tensor"): write_archive(path, {"a": [1, 2]}, force=True)
    with pytest.raises(ValueError, match=f"any key but '{NOTE}'"): write_archive(path, {"a": torch.ones(2)}, {NOTE: ""}, force=True)
    with pytest.raises(TypeError, match="a module"): save_archive({"a": torch.ones(2)}, path, force=True)
    assert path.read_bytes() == data and [*tmp_path.iterdir()] == [path]


COMPRESSED = "weights are expected, got a compressed file, which holds codes of them; Archive.* sharetie decompress, reads it"


@pytest.mark.parametrize("words", [["ties", "small"], ["dedup", "small", "small", "--force"], ["dedup", "small", "new"],
                                   ["compress", "small", "small", "--force", "--recipe", "r.json"], ["compress", "small", "new", "--recipe", "r.json"]])
def test_a_compressed_file_is_not_taken_for_weights(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    data = small(tmp_path).read_bytes()
    (tmp_path / "r.json").write_text('[{"stage": "code"}]')
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2 and re.fullmatch(f"Error: small: {COMPRESSED}\n", done.output), done.output
    assert {p.name for p in tmp_path.iterdir()} == {"small", "r.json"} and (tmp_path / "small").read_bytes() == data


def test_a_model_is_not_loaded_from_the_path_of_a_compressed_file(tmp_path):
    with pytest.raises(ValueError, match=f"small: {COMPRESSED}"): load_model(nn.Linear(2, 2), small(tmp_path))


def test_other_loaders_see_plain_entries(tmp_path):
    path = small(tmp_path)
    found = load_file(path)
    assert found["1.num_batches_tracked"] == 0 and torch.equal(found["0.bias"], Archive(path)["0.bias"])
    assert found["0.weight"].dtype == torch.uint8
