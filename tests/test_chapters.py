"Every chapter is a test: all its cells run, from top to bottom, but for the flagged ones that are off."
import atexit
import json
from collections import Counter

import pytest
from conftest import ROOT
from execnb.shell import CaptureShell
from flags import flags_off
from IPython.core.interactiveshell import InteractiveShell
from matplotlib_inline.config import InlineBackend
from nbdev.test import test_nb as run_notebook

CHAPTERS = sorted((ROOT / "nbs").glob("*.ipynb"))


def flags_of(path):
    "How many cells of a notebook each flag that is off leaves out."
    cells = (cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code")
    lines = ({line.removeprefix("#|").strip() for line in cell["source"] if line.startswith("#|")} for cell in cells)
    return Counter(flag for found in lines for flag in found & flags_off())


class Shell(CaptureShell):
    "A shell in which figures are made, but drawn in the long run only: drawing takes a third of the time."
    def __init__(self, path):
        super().__init__(path, mpl_format="png")
        if "long" in flags_off(): self.run_cell("set_matplotlib_formats()")

    def close(self):
        "Let go of the shell, which IPython would keep, with all that its chapter made, until the process ends."
        atexit.unregister(self.atexit_operations)  # it clears the names too, which operators that a chapter registered still read
        self.history_manager.end_session()
        self.history_manager.close()
        self.restore_sys_module_state()  # the next shell keeps what is __main__ then
        InlineBackend.clear_instance()
        InteractiveShell.clear_instance()
        InteractiveShell._instance = None


@pytest.fixture
def shells(monkeypatch):
    "The shells that nbdev makes to run chapters; they are closed after the test."
    shells = []
    monkeypatch.setattr("nbdev.test.CaptureShell", lambda path: shells.append(Shell(path)) or shells[-1])
    yield shells
    for shell in shells: shell.close()


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_chapter(path, record_property, capfd, shells):
    passed, _ = run_notebook(path, skip_flags=flags_off(), basepath=ROOT)
    assert shells and passed, capfd.readouterr().err
    for flag, count in flags_of(path).items(): record_property("left_out", (flag, count, path.stem))
