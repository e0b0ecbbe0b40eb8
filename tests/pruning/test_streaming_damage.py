"""What an unfinished run has left, or a finished one has made, is damaged: the same call ends with the same bytes, or
names the file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from optimum_ksparse import SparsityConfig, prune_checkpoint
from optimum_ksparse.checkpoint.staging import remove
from optimum_ksparse.pruning.streaming import Journal, Workspace, is_whole
from optimum_ksparse.pruning.streaming import place as disk_module
from optimum_ksparse.pruning.streaming.journal import FINAL

from .test_streaming import WORK, contents, fails


def _flip(path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes() or b" ")
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _swap(path: Path, other: Path) -> None:
    mine, others = path.read_bytes(), other.read_bytes()
    path.write_bytes(others)
    other.write_bytes(mine)


def _link(path: Path, other: Path) -> None:
    elsewhere = next(parent for parent in path.parents if parent.name == WORK).parent.with_suffix(".elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def _instead(make: Callable[[Path], Any]) -> Callable[[Path, Path], None]:
    def damage(path: Path, other: Path) -> None:
        path.unlink()
        make(path)

    return damage


DAMAGE: dict[str, Callable[[Path, Path], Any]] = {
    "flipped": _flip,
    "truncated": lambda path, other: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path, other: path.write_bytes(b""),
    "swapped": _swap,
    "removed": lambda path, other: path.unlink(),
    "link": _link,
    "folder": _instead(Path.mkdir),
    "fifo": _instead(os.mkfifo),
}
# Where a run of three blocks is cut off, by its phase.
CUTS = {"pruning": (Workspace, "add_block", 2), "complete": (Workspace, "publish", 0)}


@pytest.mark.slow
@pytest.mark.parametrize(("storage", "phases"), [("packed", ["pruning", "complete"]), ("dense", ["complete"])])
def test_every_file_of_an_unfinished_run_may_be_damaged(
    storage: str,
    phases: list[str],
    source: Path,
    tmp_path: Path,
    token_ids: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Damage to any file is found before anything is done. What is left then is whole, so that one run from each that
    can be left shows how all end."""
    asked = SparsityConfig("wanda", "50%", allocation="owl", dataset=token_ids, batch_size=2, storage=storage)
    prune_checkpoint(source, tmp_path / "whole", asked)
    expected, output, tried = contents(tmp_path / "whole"), tmp_path / "damaged", set()
    for phase in phases:
        cut = tmp_path / phase
        where, name, number = CUTS[phase]
        with monkeypatch.context() as patch:
            patch.setattr(disk_module, "_SNAPSHOT_SECONDS", -1.0)
            patch.setattr(where, name, fails(getattr(where, name), number, KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                prune_checkpoint(source, cut, asked)
        job = Journal.load(cut / WORK).job
        files = sorted(path.relative_to(cut) for path in cut.rglob("*") if path.is_file())
        assert len(files) > 5
        for place, file in enumerate(files):
            # Each file in two ways, and all ways in turn.
            for kind in [*DAMAGE][place % 4 :: 4]:
                damage = partial(_damage, kind, cut, output, file, files[place - 1])
                damage()
                left = _left(Workspace(output, job))
                if left in tried:
                    continue
                tried.add(left)
                damage()
                if isinstance(left, str):
                    with pytest.raises((ValueError, OSError), match=left):
                        prune_checkpoint(source, output, asked)
                prune_checkpoint(source, output, asked, resume=not isinstance(left, str))
                assert contents(output) == expected, (phase, file, kind)


def _damage(kind: str, cut: Path, output: Path, file: Path, other: Path) -> None:
    """Makes `output` a damaged copy of `cut`."""
    for path in (output, output.with_suffix(".elsewhere")):
        remove(path)
    shutil.copytree(cut, output)
    DAMAGE[kind](output / file, output / other)


def _left(workspace: Workspace) -> Any:
    """What a run goes on with in a damaged workspace, all of it as it was written: how much of each. Or the name of
    the file for which it has to start over, for which it then finds nothing."""
    folder = workspace.path
    try:
        workspace.lock()
        workspace.open(resume=True)
        journal = workspace.journal
    except (ValueError, OSError) as error:
        name = next(name for name in ("journal.json", "lock") if f"{WORK}/{name}" in str(error))
        if name == "journal.json":
            workspace.open(resume=False)
            assert {path.name for path in folder.iterdir()} == {"journal.json", "lock"}
        return name
    finally:
        ends = workspace._lock
        if ends is not None:
            ends.close()
    recorded = {**journal.checksums, **{block.file: block.sha256 for block in journal.blocks}}
    if journal.phase == "complete":  # then nothing else is read
        recorded = {name: digest for name, digest in recorded.items() if name.startswith(FINAL)}
    assert all(is_whole(folder / name, sha256) for name, sha256 in recorded.items())
    saved = {} if journal.snapshot is None else journal.snapshot.files
    can_load = [is_whole(folder / name, sha256) for name, sha256 in saved.items()]
    return journal.phase, len(journal.blocks), len(journal.checksums), *can_load


@pytest.mark.slow
def test_a_file_in_place_of_the_folder_of_finished_files(
    source: Path, tmp_path: Path, token_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = SparsityConfig("wanda", "2:4", dataset=token_ids)
    prune_checkpoint(source, tmp_path / "whole", asked)
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "publish", fails(Workspace.publish, 0, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(source, tmp_path / "disk", asked)
    shutil.rmtree(tmp_path / "disk" / WORK / FINAL)
    (tmp_path / "disk" / WORK / FINAL).write_text("")
    prune_checkpoint(source, tmp_path / "disk", asked)
    assert contents(tmp_path / "disk") == contents(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["removed", "folder", "flipped"])
def test_a_damaged_checkpoint_is_not_returned_as_finished(
    kind: str, source: Path, tmp_path: Path, token_ids: torch.Tensor
) -> None:
    asked, output = SparsityConfig("magnitude", "2:4"), tmp_path / "disk"
    prune_checkpoint(source, output, asked)
    expected = contents(output)
    path = sorted(output.glob("*.safetensors"))[1]
    DAMAGE[kind](path, path)
    with pytest.raises(ValueError, match=rf"{path.name}.*resume=False"):
        prune_checkpoint(source, output, asked)
    if kind == "folder":
        with pytest.raises(FileExistsError, match=path.name):
            prune_checkpoint(source, output, asked, resume=False)
        assert not (output / WORK).exists()  # before any work
        path.rmdir()
    prune_checkpoint(source, output, asked, resume=False)
    assert contents(output) == expected


@pytest.mark.slow
def test_a_run_goes_on_with_the_threads_that_it_began_with(
    source: Path, tmp_path: Path, token_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, seen = SparsityConfig("wanda", "2:4", dataset=token_ids), []
    begun = torch.get_num_threads()
    add_block = Workspace.add_block
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "add_block", fails(add_block, 1, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(source, tmp_path / "disk", asked)

    def noted(*args: Any) -> None:
        seen.append(torch.get_num_threads())
        add_block(*args)

    monkeypatch.setattr(Workspace, "add_block", noted)
    try:
        torch.set_num_threads(begun + 1)
        prune_checkpoint(source, tmp_path / "disk", asked)
        assert (seen, torch.get_num_threads()) == ([begun, begun], begun + 1)
    finally:
        torch.set_num_threads(begun)
