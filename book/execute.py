"""Run the chapters in place and save their outputs.

    python book/execute.py [04_tying ...]

Cells with a flag of `tst_flags` run when SHARETIE_FLAGS names it (`gpu` also where CUDA is present, `long` always);
the others keep the outputs that they have. A notebook is written only when all of it ran.
"""
import os
import sys
import time
from pathlib import Path

import pandas as pd
from execnb.nbio import nb2str, write_nb
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.process import NBProcessor

from flags import flags_on, flags_off


def execute(path):
    "Run the notebook at `path` and save its outputs; return how many cells a missing flag left out."
    nb = NBProcessor(path, rm_directives=False).nb
    off, left_out = flags_off(), []

    def skip(cell):
        "Should `cell` keep the outputs that it has?"
        directives = getattr(cell, "directives_", None) or {}
        if cell.cell_type != "code" or "nbdev_export(" in cell.source: return True
        if directives.get("eval:", [""])[0].lower() == "false": return True
        if off & directives.keys():
            left_out.append(cell)
            return True
        cell.outputs = []

    shell = CaptureShell(path, mpl_format="png")
    with working_directory(path.parent):
        shell.run_all(nb, exc_stop=True, preproc=skip)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell["outputs"] = [o for o in cell.get("outputs", []) if o.get("name") != "stderr"]
    save(nb, path)
    return len(left_out)


def save(nb, path):
    "Write `nb` without what nbdev added to it, to a temporary name first."
    for cell in nb.cells:
        for key in [k for k in cell if k.endswith("_")]: del cell[key]
    clean_nb(nb)
    temporary = path.with_suffix(".tmp")
    write_nb(nb, temporary)
    temporary.replace(path)


def main(names):
    os.environ["IN_TEST"] = "1"
    os.environ["SHARETIE_FLAGS"] = f"long {os.environ.get('SHARETIE_FLAGS', '')}"
    os.environ["PYTHONHASHSEED"] = "0"
    pd.set_option("display.max_colwidth", None)  # the pages wrap what is long
    nbs = sorted(get_config().nbs_path.glob("*.ipynb"))
    unknown = set(names) - {p.stem for p in nbs}
    if unknown: sys.exit(f"no chapter {', '.join(sorted(unknown))}; there are {', '.join(p.stem for p in nbs)}")
    for path in nbs:
        if names and path.stem not in names: continue
        start = time.time()
        left_out = execute(path)
        kept = f", {left_out} flagged cells kept as they were" if left_out else ""
        print(f"{path.stem}: {time.time() - start:.1f} s{kept}")
    on = " ".join(sorted(flags_on())) or "none"
    print(f"flags on: {on}")


if __name__ == "__main__": main(sys.argv[1:])
