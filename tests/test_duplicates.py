"What checkpoints hold twice: found exactly, transposed and nearly, without reading much, and stored once."
import itertools
import json
import os

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from safetensors.torch import save_model as their_save
from torch import nn

import sharetie.duplicates as duplicates
from sharetie.binding import BrokenTie
from sharetie.checkpoint import KEY, Checkpoint, Derived, tie_metadata, write_tensors
from sharetie.duplicates import dedup_file, file_ties
from sharetie.finding import Transpose


def rows(report): return [(row.kind, row.names, row.how) for row in report]


def tensors(seed=0):
    torch.manual_seed(seed)
    w, v = torch.randn(6, 4), torch.randn(5, 5)
    return {"w": w, "copy": w.clone(), "turned": w.T.contiguous(), "flat": w.flatten().clone(), "v": v, "v.t": v.T.contiguous(), "other": torch.randn(6, 4),
            "one": torch.ones(6), "ones": torch.ones(6), "count": torch.tensor(3), "counts": torch.tensor(3), "half": w.half(), "empty": torch.empty(0), "void": torch.empty(0)}


def test_every_kind_of_copy_is_found(tmp_path):
    save_file(tensors(), tmp_path / "model")
    found = rows(file_ties(tmp_path / "model"))
    assert sorted(found) == sorted([
        ("duplicate", ("copy", "w"), "same"), ("duplicate", ("copy", "flat"), "reshaped"), ("duplicate", ("copy", "turned"), "transposed"),
        ("duplicate", ("v", "v.t"), "transposed"), ("duplicate", ("one", "ones"), "same"), ("duplicate", ("count", "counts"), "same")])


def test_bytes_and_constants(tmp_path):
    save_file(tensors(), tmp_path / "model")
    report = file_ties(tmp_path / "model")
    assert report.saved == 3 * 6 * 4 * 4 + 25 * 4 + 6 * 4 + 8
    assert {row.names for row in report if row.constant} == {("one", "ones"), ("count", "counts")}
    assert list(report.frame().columns) == ["kind", "names", "how", "code", "shape", "saved", "difference", "constant"]
    assert len(repr(report).splitlines()) == 7 and report._repr_html_().count("<tr>") == 7


def test_a_file_without_ties(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.zeros(2)}, tmp_path / "model")
    report = file_ties(tmp_path / "model", near=0.1)
    assert report == () and repr(report) == "no ties and no duplicates" and report._repr_html_() is None and report.saved == 0


def test_what_differs_is_hardly_read(tmp_path, monkeypatch):
    torch.manual_seed(0)
    save_file({f"{i}": torch.randn(50, 50) for i in range(40)}, tmp_path / "model")
    monkeypatch.setattr(duplicates, "_digest", lambda tensor: pytest.fail("read as a whole"))
    assert file_ties(tmp_path / "model") == ()


def test_what_looks_alike_at_a_glance_is_told_apart(tmp_path):
    a = torch.zeros(40, 40)
    b = a.clone()
    b[1, 1] = 1
    save_file({"a": a, "b": b, "c": a + torch.triu(torch.ones(40, 40), 39), "d": b.T.contiguous() * 2}, tmp_path / "model")
    assert file_ties(tmp_path / "model") == ()


@pytest.mark.parametrize("how", [torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64], ids=str)
def test_types(how, tmp_path):
    w = (torch.randn(8, 5) > 0).to(how) if how is torch.bool else torch.randn(8, 5).mul(4).to(how)
    save_file({"a": w, "b": w.clone(), "t": w.T.contiguous(), "signs": torch.arange(40).to(how)}, tmp_path / "model")
    assert {row.how for row in file_ties(tmp_path / "model", near=1e-6)} == {"same", "transposed"}
    dedup_file(tmp_path / "model", tmp_path / "small")
    assert torch.equal(Checkpoint(tmp_path / "small")["t"], w.T)


def test_nan_equals_itself(tmp_path):
    w = torch.full((3, 3), float("nan"))
    save_file({"a": w, "b": w.clone(), "c": torch.full((3, 3), float("inf"))}, tmp_path / "model")
    assert rows(file_ties(tmp_path / "model", near=0.5)) == [("duplicate", ("a", "b"), "same")]


# Near

def test_near_is_a_part_of_the_largest_number(tmp_path):
    torch.manual_seed(0)
    w = torch.randn(30, 30)
    largest = w.abs().max()
    moved = w.clone()
    moved[7, 7] += 0.01 * largest
    save_file({"a": w, "b": moved}, tmp_path / "model")
    assert [row.names for row in file_ties(tmp_path / "model", near=0.0101)] == [("a", "b")]
    assert file_ties(tmp_path / "model", near=0.0099) == ()
    assert file_ties(tmp_path / "model", near=0.0101)[0].difference == pytest.approx(0.01, rel=0.02)


def brute(state, near):
    "Near pairs by comparing each with each."
    def close(a, b): return (a - b).abs().max() <= near * max(a.abs().max(), b.abs().max())
    return {(a, b) for a, b in itertools.combinations(sorted(state), 2) if state[a].shape == state[b].shape and close(state[a], state[b])}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), near=st.sampled_from([0.01, 0.1, 0.5]), noise=st.sampled_from([0.001, 0.05, 0.3]))
def test_near_rows_agree_with_comparing_each_with_each(seed, near, noise, tmp_path_factory):
    torch.manual_seed(seed)
    bases = [torch.randn(100), torch.randn(100), torch.randn(10, 10)]
    state = {f"{i}": bases[i % 3] + noise * torch.rand(()) * torch.randn_like(bases[i % 3]) for i in range(12)}
    path = tmp_path_factory.getbasetemp() / "near"
    save_file(state, path)
    pairs = brute(state, near)
    found = file_ties(path, near=near)
    for row in found:
        assert row.kind == "near" and all((row.names[0], name) in pairs for name in row.names[1:])
    listed = {name for row in found for name in row.names[1:]}
    heads = set(state) - listed
    assert not any((a, b) in pairs for a, b in itertools.combinations(sorted(heads), 2)), "who is left is near to no other who is left"


def test_a_thousand_near_tensors_need_few_comparisons(tmp_path, monkeypatch):
    torch.manual_seed(0)
    save_file({f"{i}": torch.randn(100) for i in range(1000)} | {"again": torch.randn(100)}, tmp_path / "model")
    counted, plain = [], duplicates._difference
    monkeypatch.setattr(duplicates, "_difference", lambda *args: counted.append(1) or plain(*args))
    assert file_ties(tmp_path / "model", near=1e-3) == () and len(counted) < 10


@pytest.mark.parametrize("near, error", [(-1, ValueError), (float("nan"), ValueError), ("much", TypeError)])
def test_near_that_is_none(near, error, tmp_path):
    save_file(tensors(), tmp_path / "model")
    with pytest.raises(error, match="near: "): file_ties(tmp_path / "model", near=near)


# Other files

def test_row_11_an_exported_program_with_both_names(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
            self.head.weight = self.embed.weight
        def forward(self, x): return self.head(self.embed(x))
    program = torch.export.export(Tied(), (torch.arange(3),))
    save_file({name: tensor.clone() for name, tensor in program.state_dict.items()}, tmp_path / "exported")
    assert rows(file_ties(tmp_path / "exported")) == [("duplicate", ("embed.weight", "head.weight"), "same")]
    dedup_file(tmp_path / "exported", tmp_path / "once")
    assert len(load_file(tmp_path / "once")) == 1 and Checkpoint(tmp_path / "once").names == ["embed.weight", "head.weight"]


def test_torch_files(tmp_path):
    w = torch.randn(4, 3)
    torch.save({"model": {"a": w, "b": w, "t": w.T}, "list": [w.clone()], "step": 3}, tmp_path / "model.pt")
    assert set(rows(file_ties(tmp_path / "model.pt"))) == {
        ("memory", ("model.a", "model.b"), "same"), ("memory", ("model.a", "model.t"), "transposed"), ("duplicate", ("model.a", "list.0"), "same")}
    with pytest.raises(ValueError, match="model.pt: a file of tensors only is expected, got also step; save its state dict"): dedup_file(tmp_path / "model.pt", tmp_path / "new")
    torch.save({"a": w, "t": w.T}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    dedup_file(tmp_path / "old.pt", tmp_path / "new")
    assert list(load_file(tmp_path / "new")) == ["a"] and torch.equal(Checkpoint(tmp_path / "new")["t"], w.T)


def test_the_hints_of_safetensors(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model.b.weight = model.a.weight
    their_save(model, tmp_path / "model")
    assert rows(file_ties(tmp_path / "model")) == [("tie", ("a.weight", "b.weight"), "same")]


def test_shards(tmp_path):
    w = torch.randn(4, 3)
    save_file({"a": w}, tmp_path / "1.safetensors")
    save_file({"b": w}, tmp_path / "2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    assert rows(file_ties(index)) == [("duplicate", ("a", "b"), "same")]
    done = dedup_file(index, tmp_path / "whole")
    assert done.before == sum(os.path.getsize(tmp_path / f"{i}.safetensors") for i in "12") and done.names == ("b",)


# Stored once

def test_every_name_keeps_its_numbers(tmp_path):
    state = tensors()
    save_file(state, tmp_path / "model", {"made": "here"})
    before = (tmp_path / "model").read_bytes()
    done = dedup_file(tmp_path / "model", tmp_path / "small")
    file = Checkpoint(tmp_path / "small")
    assert sorted(file.names) == sorted(state) and all(torch.equal(file[name], tensor) for name, tensor in state.items())
    assert done.before == len(before) and done.after == os.path.getsize(tmp_path / "small")
    assert len(done.names) == 6 and set(file.derived) == set(done.names) and {d.kind for d in file.derived.values()} == {"duplicate"}
    assert file.metadata["made"] == "here" and (tmp_path / "model").read_bytes() == before and file_ties(tmp_path / "small").saved == 0


def test_twice_is_once(tmp_path):
    save_file(tensors(), tmp_path / "model")
    dedup_file(tmp_path / "model", tmp_path / "a")
    assert dedup_file(tmp_path / "a", tmp_path / "b").names == ()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@example(seed=0, parts=[(1, "same"), (1, "turned"), (1, "turned")], ties=[(0, False), (1, False), (2, True)])  # a source that is a copy of one that is turned
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 9), parts=st.lists(st.tuples(st.integers(0, 1), st.sampled_from(["same", "turned", "flat", "column"])), min_size=1, max_size=7),
       ties=st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=3))
def test_any_mixture_of_copies_and_ties(seed, parts, ties, tmp_path_factory):
    torch.manual_seed(seed)
    bases = [torch.randn(3, 2), torch.randn(4, 4)]
    ways = {"same": lambda w: w, "turned": lambda w: w.T.contiguous(), "flat": lambda w: w.flatten(), "column": lambda w: w.reshape(-1, 1)}
    state = {f"{i}": ways[how](bases[which]).clone() for i, (which, how) in enumerate(parts)}
    derived, wanted = {}, dict(state)
    for i, (source, turned) in enumerate(ties):
        if str(source) not in state: continue
        derived[f"tie{i}"] = Derived(str(source), "parameter", Transpose() if turned else None)
        wanted[f"tie{i}"] = state[str(source)].permute(*range(state[str(source)].ndim)[::-1]) if turned else state[str(source)]
    folder = tmp_path_factory.getbasetemp()
    write_tensors(folder / "mixed", state, tie_metadata(derived))
    dedup_file(folder / "mixed", folder / "once", force=True)
    file = Checkpoint(folder / "once")
    assert not file.broken and all(torch.equal(file[name], tensor) for name, tensor in wanted.items())
    assert {name for name, d in file.derived.items() if d.kind == "parameter"} == set(derived), "a tie stays one"


def test_files_are_replaced_only_when_asked(tmp_path):
    save_file(tensors(), tmp_path / "model")
    before = (tmp_path / "model").read_bytes()
    (tmp_path / "there").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for target in ("model", "there", "link"):
        with pytest.raises(FileExistsError, match=f"{target}: a new file is expected"): dedup_file(tmp_path / "model", tmp_path / target)
    assert (tmp_path / "model").read_bytes() == before and (tmp_path / "there").read_text() == "mine"
    dedup_file(tmp_path / "model", tmp_path / "model", force=True)
    assert os.path.getsize(tmp_path / "model") < len(before)
    assert all(torch.equal(Checkpoint(tmp_path / "model")[name], tensor) for name, tensor in tensors().items())


def test_a_file_that_contradicts_itself_is_left_alone(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.zeros(2)}, tmp_path / "model", tie_metadata({"b": Derived("a")}))
    report = file_ties(tmp_path / "model")
    assert rows(report) == [("broken", ("a", "b"), "it is stored with other numbers than a gives")] and report.broken == report
    with pytest.raises(BrokenTie, match="a = b: .*other numbers"): dedup_file(tmp_path / "model", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_is_stored_once_is_a_duplicate_and_no_tie(tmp_path):
    save_file(tensors(), tmp_path / "model")
    dedup_file(tmp_path / "model", tmp_path / "once")
    report = file_ties(tmp_path / "once")
    assert {row.kind for row in report} == {"duplicate"} and report.saved == 0 and repr(report).count("stored once") == len(report)
    save_file({"a": torch.ones(2)}, tmp_path / "tied", tie_metadata({"b": Derived("a")}))
    assert [row.kind for row in file_ties(tmp_path / "tied")] == ["tie"] and "stored once" not in repr(file_ties(tmp_path / "tied"))


def test_a_nested_checkpoint_says_what_to_do(tmp_path):
    torch.save({"model": {"w": torch.ones(2)}, "epoch": 3, "steps": [1, 2]}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="model.pt: a file of tensors only is expected, got also epoch, steps.0, steps.1; save its state dict by itself"):
        dedup_file(tmp_path / "model.pt", tmp_path / "new")
    torch.save({"w": torch.ones(2)} | {f"n{i}": i for i in range(9)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="got also n0, n1, n2 and 6 more; save"): dedup_file(tmp_path / "model.pt", tmp_path / "new")


def test_shared_modules_are_still_noted(tmp_path):
    from sharetie.saving import save_model
    save_model(nn.Sequential(*[nn.Linear(2, 2)] * 2), tmp_path / "model")
    dedup_file(tmp_path / "model", tmp_path / "once")
    assert Checkpoint(tmp_path / "once").modules == Checkpoint(tmp_path / "model").modules == [["0", "1"]]


def test_broken_rows_come_first(tmp_path):
    save_file(tensors(), tmp_path / "model", tie_metadata({"other": Derived("w")}) | {"note": "x"})
    assert [row.kind for row in file_ties(tmp_path / "model")][0] == "broken"
    save_file({"a": torch.ones(2)}, tmp_path / "lost", tie_metadata({"b": Derived("gone")}))
    assert file_ties(tmp_path / "lost")[0].shape is None and "?" in repr(file_ties(tmp_path / "lost"))


def test_unknown_types_of_the_format_are_named(tmp_path):
    header = json.dumps({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}, "b": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [3, 6]}}).encode()
    (tmp_path / "model").write_bytes(len(header).to_bytes(8, "little") + header + b"abcdef")
    with pytest.raises(ValueError, match="model: a cannot be read .*F6_E2M3"): file_ties(tmp_path / "model")


def test_metadata_survives_under_its_own_keys(tmp_path):
    save_file(tensors(), tmp_path / "model", {"format": "pt", "a": "b"})
    dedup_file(tmp_path / "model", tmp_path / "new")
    metadata = Checkpoint(tmp_path / "new").metadata
    assert {key: metadata[key] for key in ("format", "a")} == {"format": "pt", "a": "b"} and KEY in metadata
