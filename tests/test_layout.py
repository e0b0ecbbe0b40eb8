"""The order of rooms: a file imports only from rooms above its own, and importing the package needs little."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import REPOSITORY

PACKAGE = REPOSITORY / "optimum_ksparse"
ROOMS = [
    ["version", "checks"],
    ["pattern"],
    ["records"],
    ["packing"],
    ["quantization"],
    ["kernels"],
    ["nn"],
    ["pruners"],
    ["data"],
    ["config"],
    ["blocks"],
    ["checkpoint"],
    ["report"],
    ["pruning"],
    ["runtime"],
    ["evaluation"],
    ["adapters"],
    ["hub"],
    ["api"],
    ["integration"],
    ["serving"],
    ["commands"],
    ["study"],
    ["__main__"],
]
ROW = {room: row for row, rooms in enumerate(ROOMS) for room in rooms}
FILES = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of this package that a file imports from, wherever in the file."""
    package = ["optimum_ksparse", *path.relative_to(PACKAGE).parent.parts]
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            modules = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        rooms |= {parts[1] for parts in (m.split(".") for m in modules) if parts[0] == "optimum_ksparse" and parts[1:]}
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_from_rooms_above(path):
    room = room_of(path)
    assert room in ROW, f"{room} has no row: add it to ROOMS"
    below = {other for other in imported_rooms(path) - {room} if ROW[other] >= ROW[room]}
    assert not below, f"{path.name} imports {below}, which are not above {room}"


def test_the_check_above_can_fail():
    assert imported_rooms(PACKAGE / "pruners" / "wanda.py") - {"pruners"} == {"pattern"}
    assert imported_rooms(PACKAGE / "config.py") == {"checks", "data", "pattern", "pruners", "quantization", "records"}


@pytest.mark.processes
def test_importing_needs_torch_and_transformers_alone():
    script = """
import sys
from importlib.machinery import PathFinder
missing = {"datasets", "peft", "optimum", "lm_eval", "evaluate", "matplotlib", "accelerate", "gguf", "triton"}
class Hide(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in missing else super().find_spec(name, path, target)
sys.meta_path = [Hide if finder is PathFinder else finder for finder in sys.meta_path]
import torch, optimum_ksparse
from transformers import LlamaConfig, AutoModelForCausalLM
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
model = AutoModelForCausalLM.from_config(config)
ids = torch.randint(0, 64, (2, 8))
report = optimum_ksparse.sparsify(model, optimum_ksparse.SparsityConfig("sparsegpt", dataset=ids))
assert report.density == 0.5
assert "transformers.trainer" not in sys.modules  # takes long, and brings accelerate and PEFT with it where they are
assert not missing & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_file_names_this_machine():
    files = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=REPOSITORY)
    if files.returncode:
        pytest.skip("not a git checkout")
    for name in files.stdout.split():
        text = (REPOSITORY / name).read_text(encoding="utf-8", errors="replace")
        assert str(Path.home()) + "/" not in text or str(Path.home()) == "/", name


def test_the_table_of_rooms_in_the_docs_is_the_order_of_rooms():
    text = (REPOSITORY / "docs/design.md").read_text(encoding="utf-8")
    rows = [
        re.findall(r"`(\w+)/?`", row)
        for row in re.findall(r"^\| (`[^|]*) \|", text.split("tests/test_layout.py")[1], re.M)
    ]
    assert [set(row) for row in rows] == [set(row) for row in ROOMS if row != ["__main__"]]
