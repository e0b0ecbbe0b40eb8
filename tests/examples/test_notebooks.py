"""The notebooks, run whole in a kernel of their own, with a tiny model on the loopback Hub for the named one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from huggingface_hub import ModelCard
from nbclient import NotebookClient

from optimum_ksparse.report import SparsityReport

from ..conftest import CONTEXT, REPOSITORY, sample_texts
from ..loopback_hub import LoopbackHub

NOTEBOOKS = sorted((REPOSITORY / "examples/notebooks").glob("*.ipynb"))


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def shown(notebook: Any, kind: str) -> list[str]:
    """What cells show as `kind`, such as text/html, in their order."""
    return [output.data[kind] for output in outputs(notebook) if kind in output.get("data", {})]


def printed(notebook: Any) -> str:
    return "".join(output.text for output in outputs(notebook) if output.get("name") == "stdout")


@pytest.fixture
def run(hub: LoopbackHub, make_model: Any, tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    """Runs a notebook in `tmp_path`, with a tiny model, few texts and other parameters. A cell that fails raises."""
    make_model().save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    hub.add_repo("user/tiny", {file.name: file.read_bytes() for file in (tmp_path / "tiny").iterdir()})
    (tmp_path / "texts.txt").write_text("\n\n".join(sample_texts("calibration")), encoding="utf-8")

    def run(name: str, **parameters: object) -> Any:
        notebook = nbformat.read(REPOSITORY / f"examples/notebooks/{name}.ipynb", as_version=4)
        (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
        common = {"MODEL": "user/tiny", "DATASET": "texts.txt", "NUM_SAMPLES": 4, "SEQ_LEN": CONTEXT}
        for parameter, value in {**common, **parameters}.items():
            line = rf"^{parameter} = .*$"
            assert len(re.findall(line, cell.source, re.M)) == 1, parameter
            cell.source = re.sub(line, f"{parameter} = {value!r}", cell.source, flags=re.M)
        return NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()

    return run


@pytest.mark.processes
def test_prune_and_publish(run: Any, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    notebook = run("prune_and_publish", PATTERN="50%", REPO_ID="user/sparse")
    settings, report, results = shown(notebook, "text/html")
    saved = SparsityReport.load(tmp_path / "sparse-model/sparsity_report.json")
    assert saved.patterns == ["50%"] and "<strong>pattern</strong>" in settings and "50%" in settings
    assert f"{saved.kinds()[0].relative_output_error:.4f}" in report
    assert "perplexity" in results and "not evaluated" not in results
    assert f"{saved.packed_bytes:,} bytes ({saved.packed_ratio:.1%})" in printed(notebook)
    assert re.search("[가-힣]", *shown(notebook, "text/markdown"))
    files = hub.files("user/sparse")
    assert {"model.safetensors", "tokenizer.json", "sparsity_report.json", "evaluation_results.json"} <= set(files)
    assert ModelCard(files["README.md"].decode()).data.base_model == "user/tiny"
    assert files["model.safetensors"] == (tmp_path / "sparse-model/model.safetensors").read_bytes()


@pytest.mark.processes
def test_fine_tune_and_merge(run: Any, tmp_path: Path) -> None:
    notebook = run("fine_tune_and_merge", STEPS=6, LEARNING_RATE=1e-2)
    pruned, _, merged = shown(notebook, "text/html")
    assert "2:4" in pruned and "merged" in merged
    saved = SparsityReport.load(tmp_path / "tuned-model/sparsity_report.json")
    assert saved.patterns == ["2:4"] and [change.kind for change in saved.changes] == ["merged"]
    assert {"adapter_model.safetensors"} <= {path.name for path in (tmp_path / "tuned-model-adapter").iterdir()}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs_and_explains_itself_in_both_languages(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not outputs(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            assert re.search("[가-힣]", cell.source) and re.search("[a-z]{3}", cell.source), cell.source
