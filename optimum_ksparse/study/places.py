"""What a log may say of this machine: nothing but what lies below the study."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub.constants import HF_HOME


def without_places(text: str, study: Path) -> str:
    """A text with paths below the folder of a study made relative, and with names in the place of those folders of
    this machine that others lie in: of the home folder, caches, packages, this program and temporary files."""
    for place, name in _places(study):
        text = text.replace(place + os.sep, f"{name}/" if name else "").replace(place, name or ".")
    return text


def _places(study: Path) -> Iterator[tuple[str, str]]:
    """Folders and their names, those that lie in others first."""
    program = Path(__file__).resolve().parents[2]
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    named = {
        os.path.expanduser("~"): "~",
        tempfile.gettempdir(): "<tmp>",
        os.getcwd(): "<cwd>",
        os.path.expanduser(HF_HOME): "<cache>",
        sys.prefix: "<python>",
        sys.base_prefix: "<python>",
        **dict.fromkeys(packages, "<packages>"),
        os.fspath(program): "<program>",
        os.path.abspath(study): "",
        os.path.realpath(study): "",
    }
    known = {place.rstrip(os.sep): name for place, name in named.items() if len(Path(place).parts) > 1}
    yield from sorted(known.items(), key=lambda item: -len(item[0]))
