"The package as its users get it: what it requires, what importing it costs, what a build contains."
import ast
import configparser
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest
from conftest import ROOT

SETTINGS = configparser.ConfigParser(delimiters=["="], interpolation=None)
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
PACKAGES = {"sklearn": "scikit-learn"}  # where the name to import differs from the name to install
MODULES = sorted(p for p in (ROOT / "sharetie").glob("*.py") if p.name != "_modidx.py")


def requirements(key="requirements"):
    return {re.split(r"[<>=!~\[]", item)[0] for item in SETTINGS["DEFAULT"][key].split()}


def imported(path):
    "Top-level names of every import in a module, also inside functions."
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and not node.level: names.add(node.module.split(".")[0])
    return names


def python(*args, **kwargs):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, **kwargs)


def test_the_requirements_are_what_the_modules_import():
    outside = set().union(*map(imported, MODULES)) - set(sys.stdlib_module_names) - {"sharetie"}
    assert {PACKAGES.get(name, name) for name in outside} == requirements()


def test_importing_costs_nothing():
    code = "import sys, sharetie; sharetie.__version__; assert not {'torch', 'numpy', 'pandas', 'matplotlib'} & sys.modules.keys()"
    run = python("-c", code, cwd="/")
    assert run.returncode == 0, run.stderr


def test_the_names_that_people_start_with():
    import sharetie
    for name in sharetie.__all__: assert name in dir(sharetie) and callable(getattr(sharetie, name))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'; it offers .*TiePenalty"): sharetie.nonsense


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_every_public_name_has_a_docstring(path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"): assert ast.get_docstring(node), node.name


def test_versions_agree():
    import sharetie
    assert sharetie.__version__ == SETTINGS["DEFAULT"]["version"]
    assert f"version: {sharetie.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {sharetie.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The sdist and the wheel made from it, from the files that git would clone."
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        if not (ROOT / name).is_file(): continue
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    run = python("-m", "build", "--no-isolation", "--outdir", str(out), cwd=source)
    assert run.returncode == 0, run.stdout + run.stderr
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


@pytest.mark.long
def test_the_sdist_holds_what_its_wheel_is_built_from(built):
    names = {name.partition("/")[2] for name in tarfile.open(built[0]).getnames()}
    assert {"settings.ini", "setup.py", "README.md", "LICENSE"} <= names


@pytest.mark.long
def test_the_wheel_installs_and_imports(built, tmp_path):
    with zipfile.ZipFile(built[1]) as wheel:
        metadata = next(wheel.read(n).decode() for n in wheel.namelist() if n.endswith("METADATA"))
        assert {p.stem for p in MODULES} <= {n.split("/")[1][:-3] for n in wheel.namelist() if n.startswith("sharetie/")}
    required = {re.split(r"[<>=!~\[ ;]", line.split(": ")[1])[0] for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line}
    assert required == requirements()
    run = python("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(tmp_path), str(built[1]))
    assert run.returncode == 0, run.stderr
    run = python("-c", f"import sharetie; assert sharetie.__file__.startswith({str(tmp_path)!r}); sharetie.TiePenalty", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
