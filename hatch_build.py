"""Puts the compiled native code for CPUs into wheels.

Such a wheel is of one platform and of any Python; without a compiler, or with KSPARSE_NATIVE=0, it is the pure one,
and the code is compiled where it is first used, as for editable installs. KSPARSE_NATIVE=1 makes a compiler that fails
an error, for releases.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = "optimum_ksparse/kernels/cpu"


class NativeCode(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or version == "editable" or os.environ.get("KSPARSE_NATIVE") == "0":
            return
        build = _load(Path(self.root, FOLDER, "build.py"))
        self.folder = tempfile.mkdtemp(prefix="ksparse-wheel-")
        library = Path(self.folder, build.LIBRARY)
        try:
            build.compile_library(library)
        except OSError as error:
            if os.environ.get("KSPARSE_NATIVE") == "1":
                raise
            self.app.display_warning(f"The wheel has no native code for CPUs: {error}")
            return
        build_data["force_include"][str(library)] = f"{FOLDER}/{build.LIBRARY}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform()}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if folder := getattr(self, "folder", None):
            shutil.rmtree(folder, ignore_errors=True)


def _load(path: Path) -> ModuleType:
    """The file alone: importing the package needs torch."""
    spec = importlib.util.spec_from_file_location("build", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _platform() -> str:
    """The platform of the wheel. `auditwheel` gives it the name of the oldest Linux that it runs on; the C code is for
    macOS 11, the first on arm64."""
    if sys.platform == "darwin":
        return f"macosx_11_0_{platform.machine()}"
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")
