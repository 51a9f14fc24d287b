"""The notebook runs from top to bottom, and shows what it says; what is stored with it is small."""

import re
from pathlib import Path

import pytest


nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "wash_in_ten_minutes.ipynb"


def printed(notebook):
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def accuracies(notebook):
    """For each population the accuracy of members, ensemble and soup, in %."""
    rows = re.findall(r"^(WASH|apart) +([\d.]+) +([\d.]+) +([\d.]+)$", printed(notebook), re.MULTILINE)
    return {name: tuple(map(float, figures)) for name, *figures in rows}


@pytest.mark.slow
def test_it_trains_looks_and_soups(tmp_path, monkeypatch):
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    notebook = nbformat.read(NOTEBOOK, 4)
    nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    found = accuracies(notebook)
    _, ensemble, soup = found["WASH"]
    assert soup > 90 and soup > ensemble - 2
    _, ensemble, soup = found["apart"]
    assert ensemble > 90 and soup < 50
    assert "the saved model is the mean: True" in printed(notebook)
    assert "image/png" in str(notebook)
    assert (tmp_path / "wash" / "model.safetensors").exists()


def test_what_is_stored_with_it_is_whole_and_small():
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert set(accuracies(notebook)) == {"WASH", "apart"}
    assert not any(
        output.output_type == "error" or output.get("name") == "stderr" for c in code for output in c.outputs
    )
    assert NOTEBOOK.stat().st_size < 60_000
    assert "/tmp/" not in NOTEBOOK.read_text() and "/home/" not in NOTEBOOK.read_text()
