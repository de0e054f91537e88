"""docs/walkthrough.ipynb: its code runs, without Jupyter; it is short and has its figures."""

import json
import re

import matplotlib
from conftest import PROJECT
from matplotlib import pyplot as plt

CELLS = json.loads((PROJECT / "docs" / "walkthrough.ipynb").read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_the_notebook_is_short_and_has_its_figures():
    lines = [sum(bool(line.strip()) for line in code.splitlines()) for code in CODE]
    prose = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown"]
    prose = "\n\n".join(prose)
    assert sum(lines) <= 100 and max(lines) <= 15 and len(prose.split()) <= 1500
    for page in re.findall(r"\]\(([\w./]+)", prose):
        assert (PROJECT / "docs" / page).exists(), page
    outputs = [output for cell in CELLS for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 9
    assert not any(output["output_type"] == "error" for output in outputs)


def test_every_cell_runs(monkeypatch):
    """From docs/, as Jupyter opens it, and with 2 updates in the place of 20."""
    monkeypatch.chdir(PROJECT / "docs")
    matplotlib.use("agg")
    code = "\n".join(CODE)
    assert "\nUPDATES = 20\n" in code
    names = {}
    exec(code.replace("\nUPDATES = 20\n", "\nUPDATES = 2\n"), names)
    assert len(plt.get_fignums()) == 9
    plt.close("all")
    R, kept = names["R"], names["kept"]
    assert R.shape == kept.shape == (2, 24)
    assert (R[:, :12].mean(dim=1) > R[:, 12:].mean(dim=1)).all()
