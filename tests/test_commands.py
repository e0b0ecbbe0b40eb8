"""`optimum-cli ksparse`, in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from optimum_ksparse import SparsityConfig
from optimum_ksparse.commands.base import read_recipe
from optimum_ksparse.commands.prune import _FLAGS, _LOADING_FLAGS
from optimum_ksparse.config import SETTINGS

from .conftest import REPOSITORY, sample_texts

CLI = Path(sys.executable).parent / "optimum-cli"
RECIPES = sorted((REPOSITORY / "configs").glob("*.yaml"))


def run(*arguments, cwd, **environment):
    command = [CLI, "ksparse", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment})


@pytest.fixture
def dense(tmp_path, make_model, tokenizer):
    make_model("llama").save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("\n\n".join(sample_texts("calibration")), encoding="utf-8")
    return tmp_path / "dense"


def test_prune_then_info(dense, tmp_path):
    recipe = {"method": "sparsegpt", "pattern": "4:8", "dataset": "text.txt", "num_samples": 8, "seq_len": 64}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    flags = ("--config", "recipe.yaml", "--seq-len", "32", "--modules-to-not-convert", "o_proj")
    done = run("prune", "dense", "sparse", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "12 sparse layers, density 0.5000" in done.stdout
    assert {"model.safetensors", "tokenizer.json", "sparsity_report.json"} <= set(os.listdir(tmp_path / "sparse"))

    done = run("info", "sparse", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "pattern: 4:8" in done.stdout
    done = run("info", "sparse", "--json", cwd=tmp_path)
    summary = json.loads(done.stdout)
    assert summary["settings"]["seq_len"] == 32
    assert summary["settings"]["method"] == "sparsegpt"
    assert summary["num_sparse_layers"] == 12
    assert summary["file_bytes"]["model.safetensors"] == (tmp_path / "sparse/model.safetensors").stat().st_size

    (tmp_path / "sparse/sparsity_report.json").unlink()
    without_report = json.loads(run("info", "sparse", "--json", cwd=tmp_path).stdout)
    assert without_report["num_parameters"] == summary["num_parameters"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prune", "dense"), "output is missing"),
        (("prune", "dense", "out", "--pattern", "5:4"), "pattern='5:4' is not a pattern"),
        (
            ("prune", "dense", "out", "--method", "wand"),
            "method='wand' is not known; allowed: magnitude, wanda, sparsegpt",
        ),
        (("prune", "dense", "text.txt/out", "--dataset", "text.txt"), "text.txt"),
        (("prune", "dense", "out", "--dataset", "text.txt", "--seq-len", "128"), "above the model's context of 64"),
        (("prune", "nothing-here", "out", "--dataset", "text.txt"), "nothing-here is not a local folder"),
        (("prune", "dense", "out", "--config", "bad.yaml"), "did you mean 'pattern'"),
        (("info", "dense"), "not a checkpoint of optimum-ksparse"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(dense, tmp_path, arguments, message):
    (tmp_path / "bad.yaml").write_text("patern: '2:4'\n")
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_every_setting_has_a_flag():
    assert set(_FLAGS) == set(SETTINGS) - {"layers"}


def test_recipes_are_short_and_valid():
    assert RECIPES
    for path in RECIPES:
        assert len(path.read_text().splitlines()) <= 20, path.name
        recipe = read_recipe(str(path), ["model", "output", *_FLAGS, *_LOADING_FLAGS])
        SparsityConfig(**{name: value for name, value in recipe.items() if name in _FLAGS})


def test_help_of_optimum_cli_lists_us(tmp_path):
    done = subprocess.run([CLI, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert "ksparse" in done.stdout
