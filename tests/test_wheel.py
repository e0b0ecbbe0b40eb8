"""The built wheel works outside the repository: installed into an environment that does not know the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from .conftest import REPOSITORY, sample_texts


def build_wheel(folder: Path, **environment: str) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder]
    subprocess.run([*command, REPOSITORY], check=True, env=os.environ | environment)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """An empty environment with the wheel. What the wheel depends on is linked in from this one, entry by entry, so
    that no network is needed and the checkout (which an editable install would show) stays out of sight."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    arguments = ["--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run([sys.executable, "-m", "pip", "install", *arguments], check=True)
    origin = Path(sysconfig.get_path("purelib"))
    entries = [entry for entry in origin.iterdir() if "ksparse" not in entry.name and entry.suffix != ".pth"]
    # `optimum` is a namespace: its folders hold files of both.
    for entry in (*entries, *(origin / "optimum").iterdir(), *(origin / "optimum" / "commands").iterdir()):
        target = site / entry.relative_to(origin)
        if not target.exists():
            target.symlink_to(entry)
    return folder


# In one process: each takes eight seconds to import what it needs.
SCRIPT = """
import optimum_ksparse
import torch
from optimum_ksparse.__main__ import main
from optimum_ksparse.kernels import describe_device
from transformers import AutoModelForCausalLM

print(optimum_ksparse.__file__, describe_device(torch.device("cpu")))
how = "--texts text.txt --seq-len 32 --max-tokens 96 --tasks none"
for words in ("info sparse", f"eval sparse --baseline dense {how}", "card sparse --language ko"):
    assert main(words.split()) == 0
print(AutoModelForCausalLM.from_pretrained("sparse").sparsity_report.density)
"""


@pytest.mark.processes
def test_the_wheel_holds_the_package_and_the_command(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "optimum_ksparse/__init__.py" in names
    assert "optimum/commands/register/register_ksparse.py" in names
    templates = ("card.md.jinja", "phrases.yaml", "citations.bib")
    assert {f"optimum_ksparse/hub/templates/{name}" for name in templates} <= set(names)
    assert not [name for name in names if name.startswith("optimum/") and name.endswith("__init__.py")]
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"optimum_ksparse", "optimum"}


@pytest.mark.processes
@pytest.mark.skipif(not shutil.which("cc"), reason="there is no compiler")
def test_a_wheel_with_native_code_is_of_this_platform(wheel):
    library = "optimum_ksparse/kernels/cpu/" + ("libksparse.dylib" if sys.platform == "darwin" else "libksparse.so")
    assert library in zipfile.ZipFile(wheel).namelist()
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")


@pytest.mark.processes
def test_without_a_compiler_the_wheel_is_pure(tmp_path):
    wheel = build_wheel(tmp_path, CC="false")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith((".so", ".dylib"))]


@pytest.mark.end_to_end
def test_prune_and_load_from_an_empty_folder(environment, tmp_path, make_model, tokenizer):
    make_model("llama").save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("\n\n".join(sample_texts("calibration")), encoding="utf-8")
    recipe = {"pattern": "2:4", "dataset": "text.txt", "num_samples": 4, "seq_len": 32}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    python = environment / "bin" / "python"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    clean["CC"] = "false"  # what was compiled is in the wheel

    def run(*arguments):
        done = subprocess.run([python, *arguments], capture_output=True, text=True, cwd=tmp_path, env=clean)
        assert done.returncode == 0, done.stderr
        return done.stdout

    cli = ("-m", "optimum.commands.optimum_cli", "ksparse")
    assert "14 sparse layers" in run(*cli, "prune", "dense", "sparse", "--config", "recipe.yaml")
    said = run("-c", SCRIPT)
    assert str(environment) in said.split("\n")[0]
    assert ("by native code" in said.split("\n")[0]) == bool(shutil.which("cc"))
    assert "pattern: 2:4" in said and "perplexity" in said
    assert "# sparse" in (tmp_path / "sparse" / "README.md").read_text(encoding="utf-8")
    assert said.strip().split("\n")[-1] == "0.5"
