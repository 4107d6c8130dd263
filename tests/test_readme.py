"The README keeps its word: its commands exist, and its first example prints what it shows."
import re
import subprocess
import sys

from conftest import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    "The contents of every fenced block of a language."
    return re.findall(rf"^``` *{language}\n(.*?)^```$", TEXT, re.M | re.S)


def test_every_make_target_that_it_names_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:`|^)make ([a-z]+)\b", TEXT, re.M))
    assert {"book", "test", "chapters", "bench", "preview"} <= named
    for target in named: assert re.search(rf"^{target}:", makefile, re.M), f"make {target}"


def test_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    listed = set(subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())
    for target in re.findall(r"^\.PHONY: help (.*)$", makefile, re.M)[0].split(): assert target in listed


def test_the_first_example_prints_what_it_shows(tmp_path):
    code = "\n".join(block for block in blocks("python")[:2])
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    printed = run.stdout.strip().splitlines()
    assert len(printed) == 2
    for line in printed: assert line in TEXT, line


def test_its_figures_exist():
    figures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", TEXT) + re.findall(r'<img src="([^"]+)"', TEXT)
    assert figures
    for figure in figures: assert (ROOT / figure).is_file(), figure
