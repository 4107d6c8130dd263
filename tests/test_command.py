"The command line: what it prints, what it writes, and its exit status."
import json
import os
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import sharetie
from sharetie.checkpoint import Derived, tie_metadata
from sharetie.command import main


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    w = torch.randn(30, 4)
    save_file({"w": w, "copy": w.clone(), "near": w + 1e-4, "one": torch.ones(2), "ones": torch.ones(2)}, "model.safetensors")
    save_file({"a": w, "b": w + 1}, "broken.safetensors", tie_metadata({"b": Derived("a")}))
    return tmp_path


def run(*words): return CliRunner().invoke(main, words, prog_name="sharetie")


def test_a_table(folder):
    done = run("ties", "model.safetensors")
    assert done.exit_code == 0
    head, first, second, last = done.output.splitlines()
    assert head.split() == ["kind", "names", "how", "shape", "type", "bytes", "saved", "note"]
    assert first.split() == ["duplicate", "copy", "=", "w", "same", "30×4", "F32", "480"]
    assert second.split() == ["duplicate", "one", "=", "ones", "same", "2", "F32", "8", "constant"]
    assert last == "488 bytes can be saved by: sharetie dedup model.safetensors OUT"


def test_near_and_smallest(folder):
    assert "near" in run("ties", "model.safetensors", "--near", "1e-3").output
    assert "ones" not in run("ties", "model.safetensors", "--smallest", "9").output


def test_json(folder):
    done = run("ties", "model.safetensors", "--near", "0.001", "--json")
    held = json.loads(done.output)
    assert done.exit_code == 0 and held["checkpoint"] == "model.safetensors" and held["saved"] == 488
    assert [(row["kind"], row["names"]) for row in held["ties"]] == [("duplicate", ["copy", "w"]), ("near", ["copy", "near"]), ("duplicate", ["one", "ones"])]


def test_broken_ties_have_a_status_of_their_own(folder):
    for words in (["ties", "broken.safetensors"], ["ties", "broken.safetensors", "--json"]):
        done = run(*words)
        assert done.exit_code == 1 and "stored with other numbers than a gives" in done.output
    done = run("dedup", "broken.safetensors", "new")
    assert done.exit_code == 1 and done.output.startswith("Error: a = b: in broken.safetensors") and not os.path.exists("new")


class Gift:
    def __reduce__(self): return os.system, ("touch ran",)


def test_what_cannot_be_read_is_one_line(folder):
    torch.save({"gift": Gift()}, "gift.pt")
    torch.save({"sparse": torch.eye(3).to_sparse()}, "sparse.pt")
    own = {}
    own["own"] = own
    torch.save(own, "own.pt")
    (folder / "deep.index.json").write_text("[" * 200_000)
    (folder / "text").write_text("hello, I am no checkpoint")
    (folder / "cut").write_bytes((folder / "model.safetensors").read_bytes()[:100])
    said = {"gift.pt": "a pickle that calls", "sparse.pt": "a tensor of torch.sparse_coo", "own.pt": "do not hold themselves", "deep.index.json": "no index", "text": "neither safetensors nor a torch file", "cut": "damaged, truncated", "none": "No such file", ".": "Is a directory"}
    for path, why in said.items():
        for words in (["ties", path], ["dedup", path, "new"]):
            done = run(*words)
            assert done.exit_code == 2 and done.output.startswith(f"Error: {path}: ") and why in done.output, done.output
            assert len(done.output.splitlines()) == 1
    assert not os.path.exists("ran") and not os.path.exists("new")


@pytest.mark.parametrize("words", [["ties"], ["ties", "a", "b"], ["tie", "a"], ["ties", "model.safetensors", "--near", "x"], ["dedup", "model.safetensors"],
                                   ["ties", "model.safetensors", "--smallest", "-1"], ["ties", "model.safetensors", "--near", "-1"], ["ties", "--nonsense", "a"]])
def test_wrong_usage(words):
    done = run(*words)
    assert done.exit_code == 2 and "Error" in done.output


def test_dedup(folder):
    before = (folder / "model.safetensors").read_bytes()
    done = run("dedup", "model.safetensors", "new.safetensors")
    assert done.exit_code == 0 and done.output.startswith("new.safetensors: 1.4") or done.output.startswith("new.safetensors: ")
    assert done.output.endswith(", 2 tensors less\n") and sorted(load_file("new.safetensors")) == ["copy", "near", "one"]
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("copies, less", [(1, "nothing was there twice"), (2, "1 tensor less"), (3, "2 tensors less")])
def test_dedup_counts_in_english(folder, copies, less):
    save_file({str(i): torch.arange(3.) for i in range(copies)}, "few.safetensors")
    assert run("dedup", "few.safetensors", "out.safetensors").output.endswith(f", {less}\n")


def test_dedup_replaces_only_by_force(folder):
    before = (folder / "model.safetensors").read_bytes()
    done = run("dedup", "model.safetensors", "model.safetensors")
    assert done.exit_code == 2 and "this one exists; --force replaces it" in done.output and "True" not in done.output and (folder / "model.safetensors").read_bytes() == before
    done = run("dedup", "model.safetensors", "model.safetensors", "--force", "--json")
    assert done.exit_code == 0 and json.loads(done.output)["names"] == ["ones", "w"] and len(load_file("model.safetensors")) == 3


def test_what_was_stored_once_is_a_duplicate(folder):
    run("dedup", "model.safetensors", "new.safetensors")
    done = run("ties", "new.safetensors")
    assert done.exit_code == 0 and [line.split()[0] for line in done.output.splitlines()[1:]] == ["duplicate"] * 2 and "can be saved" not in done.output
    torch.save({"model": {"w": torch.ones(2)}, "epoch": 3}, "nested.pt")
    done = run("dedup", "nested.pt", "other")
    assert done.exit_code == 2 and done.output.startswith("Error: nested.pt: a file of tensors only is expected, got also epoch; save its state dict by itself")


def test_help_and_version():
    assert run("--version").output.strip() == f"sharetie, version {sharetie.__version__}"
    assert "ties" in run("-h").output and "--near TOL" in run("ties", "-h").output and "IN OUT" in run("dedup", "--help").output


@pytest.mark.long
def test_as_a_process(folder):
    done = subprocess.run([sys.executable, "-c", "from sharetie.command import main; main()", "ties", "broken.safetensors"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.startswith("kind") and done.stderr == ""
