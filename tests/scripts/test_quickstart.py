"""scripts/quickstart.ipynb runs as it stands, and what is saved in it is what it gives."""

import base64
import io
import re

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from tests.scripts.conftest import ROOT


def pictures(cell):
    found = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def said(cell):
    return [output.text for output in cell.get("outputs", []) if output.get("name") == "stderr"]


def accuracies(notebook):
    texts = [
        output.text for cell in notebook.cells for output in cell.get("outputs", []) if output.get("name") == "stdout"
    ]
    return [float(number) for number in re.findall(r"accuracy[^:\d]*:? (0\.\d+)", "\n".join(texts))]


def test_the_notebook_runs_and_holds_its_outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "TMPDIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    saved = nbformat.read(ROOT / "scripts" / "quickstart.ipynb", as_version=4)
    nbformat.validate(saved)
    run = nbformat.from_dict(saved)
    for cell in run.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(run, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for notebook in (saved, run):
        assert "Warning" not in "".join(text for cell in notebook.cells for text in said(cell))
    for before, after in zip(saved.cells, run.cells):
        assert before.get("execution_count") == after.get("execution_count")
        if before.cell_type == "code":
            assert [picture.size for picture in pictures(before)] == [picture.size for picture in pictures(after)]
    assert sum(len(pictures(cell)) for cell in saved.cells if cell.cell_type == "code") == 3
    shown = accuracies(saved)
    # Another processor rounds differently.
    assert len(shown) == 3 and accuracies(run) == pytest.approx(shown, abs=0.05)
    assert min(shown) > 0.85
