"""What torch calls where the package is installed: it costs nothing, disturbs nobody, and is withdrawn in time. That
clients then load sparse checkpoints is tested with the wheel, in `test_wheel`."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import tomllib
import zipfile

import pytest
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

import optimum_ksparse_autoload as autoload
from optimum_ksparse import SparsityConfig

from .conftest import REPOSITORY

# Beside the standard library's own, what `import torch` has imported.
SCRIPT = """
import sys
import optimum_ksparse_autoload as autoload
before = set(sys.modules)
autoload.install()
autoload.install()
assert set(sys.modules) == before and not [name for name in before if name.split(".")[0] in ("torch", "transformers")]
assert sum(type(finder).__name__ == "_Waiting" for finder in sys.meta_path) == 2
{more}
"""
# transformers that has neither the table nor the class, as older ones.
OLDER = """
import pathlib, tempfile
folder = pathlib.Path(tempfile.mkdtemp())
for name in ("__init__", "modeling_utils", "quantizers/__init__", "quantizers/auto"):
    (folder / "transformers" / f"{name}.py").parent.mkdir(parents=True, exist_ok=True)
    (folder / "transformers" / f"{name}.py").write_text("")
sys.path.insert(0, str(folder))
import transformers.modeling_utils, transformers.quantizers.auto
assert not any(type(finder).__name__ == "_Waiting" for finder in sys.meta_path)
autoload.withdraw()
"""


@pytest.mark.processes
@pytest.mark.parametrize("more", ["", OLDER], ids=["alone", "older transformers"])
def test_it_imports_nothing_and_suits_any_transformers(more):
    subprocess.run([sys.executable, "-c", SCRIPT.format(more=more)], check=True, cwd=REPOSITORY)


def test_the_entry_point_is_the_function():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["entry-points"]["torch.backends"]["optimum-ksparse"].partition(":")
    assert getattr(importlib.import_module(module), name) is autoload.install


def test_the_package_has_withdrawn_it():
    before = list(sys.meta_path)
    autoload.install()  # does nothing where the package is
    assert sys.meta_path == before
    assert AUTO_QUANTIZATION_CONFIG_MAPPING[autoload.QUANT_METHOD] is SparsityConfig
    assert "autoload" not in vars(PreTrainedModel)["from_pretrained"].__func__.__module__


def test_looking_for_a_module_is_no_import(tmp_path, monkeypatch):
    (tmp_path / "waited_for.py").write_text("value = 1")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[int] = []
    finder = autoload.when_imported("waited_for", lambda module: seen.append(module.value))
    assert importlib.util.find_spec("waited_for") is not None and not seen
    importlib.import_module("waited_for")
    assert seen == [1] and finder not in sys.meta_path
    assert autoload.when_imported("waited_for", lambda module: seen.append(2)) is None
    assert seen == [1, 2]
    del sys.modules["waited_for"]


class _Another:
    """A finder that asks all the others, as those of tracers do."""

    def find_spec(self, name, path, target=None):
        if name != "waited_for" or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        return importlib.util.find_spec(name)


class _Earlier:
    """A finder of before Python 3.4."""

    def find_module(self, name, path=None):
        return None


def test_other_finders_and_loaders_of_many_modules(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "modules.zip", "w") as archive:
        archive.writestr("waited_for.py", "import another_module")
        archive.writestr("another_module.py", "")
    monkeypatch.syspath_prepend(tmp_path / "modules.zip")
    monkeypatch.setattr(sys, "meta_path", [_Another(), _Earlier(), *sys.meta_path])
    seen: list[str] = []
    autoload.when_imported("waited_for", lambda module: seen.append(module.__name__))
    importlib.import_module("waited_for")
    assert seen == ["waited_for"]
    for name in ("waited_for", "another_module"):
        del sys.modules[name]


@pytest.mark.parametrize(
    "setting",
    ["KSPARSE_AUTOLOAD=0", "TORCH_DEVICE_BACKEND_AUTOLOAD=0", "TORCH_DEVICE_BACKEND_AUTOLOAD=false"],
)
def test_a_switch_is_named(monkeypatch, setting):
    monkeypatch.setenv(*setting.split("="))
    assert setting in autoload.describe()
