"""Notebooks: committed without outputs, and executed on the invented study they finish with figures and tables."""

import json
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_without_outputs(path):
    notebook = json.loads(path.read_text())
    nbformat.validate(nbformat.from_dict(notebook))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
    assert [cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    assert notebook["cells"][0]["cell_type"] == "markdown"
    assert "/work" not in path.read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_executes(path, study, tmp_path, monkeypatch):
    """As the workflow runs it: papermill sets `results`."""
    papermill = pytest.importorskip("papermill")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    done = tmp_path / path.name
    papermill.execute_notebook(path, done, {"results": str(study)}, kernel_name="python3", progress_bar=False)
    cells = [cell for cell in json.loads(done.read_text())["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 4
    assert [output for output in outputs if "text/html" in output.get("data", {})], "no table"
    assert not [output for output in outputs if output.get("name") == "stderr"], "a warning is part of the page"
