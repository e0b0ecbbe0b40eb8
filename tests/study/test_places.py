"""Logs of a study are published with it: they name no folder of the machine."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from optimum_ksparse.study.places import without_places


def test_paths_in_a_log(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    study = tmp_path / "study"
    text = f"{study}/cells/a/model.safetensors, {study}, /home/someone/models/x, {torch.__file__}, {os.sep}\n"
    text += f'File "{Path(without_places.__code__.co_filename)}" in {tempfile.gettempdir()}/y'
    found = without_places(text, study)
    assert found.startswith("cells/a/model.safetensors, ., ~/models/x, <")
    for place in (str(tmp_path), "someone", tempfile.gettempdir(), str(Path(torch.__file__).parents[2])):
        assert place not in found
    assert "optimum_ksparse/study/places.py" in found
