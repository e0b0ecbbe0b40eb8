"""What a contributor is told: the diff in CONTRIBUTING fits the code, versions agree, forms and workflows parse."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from optimum_ksparse import __version__

from .conftest import REPOSITORY

FORGE = REPOSITORY / ".github"


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


@pytest.mark.processes
def test_the_method_in_contributing_applies():
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    (diff,) = re.findall(r"^```diff\n(.*?)^```$", read("CONTRIBUTING.md"), re.M | re.S)
    # Who follows CONTRIBUTING has applied it.
    applied = [
        subprocess.run(["git", "apply", "--check", *how], input=diff, text=True, cwd=REPOSITORY, capture_output=True)
        for how in ((), ("--reverse",))
    ]
    assert 0 in [done.returncode for done in applied], [done.stderr for done in applied]


def test_every_file_says_the_same_version():
    assert yaml.safe_load(read("CITATION.cff"))["version"] == __version__
    released = re.findall(r"^## \[(\d[^]]*)\]", read("CHANGELOG.md"), re.M)
    assert released[0] == __version__


@pytest.mark.parametrize("path", sorted(FORGE.glob("workflows/*.yml")), ids=lambda path: path.name)
def test_a_workflow_names_only_targets_and_files_that_are_there(path: Path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.M))
    for job in workflow["jobs"].values():
        named = job.get("strategy", {}).get("matrix", {}).get("target", [])
        runs = [step["run"] for step in job["steps"] if "run" in step]
        named = {*named, *(name for run in runs for name in re.findall(r"^make ([\w-]+)", run, re.M))}
        assert named <= targets
        for file in (name for run in runs for name in re.findall(r"[\w.-]+\.(?:txt|py)\b", run)):
            assert list(REPOSITORY.rglob(file)), file
