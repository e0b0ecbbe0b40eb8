"""The folder in which a run keeps what it has done until all is done: hidden in the output folder, gone at the end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from ...checkpoint import check_saved, storage_state_dict
from ...checkpoint.files import DIGESTS, sha256_of
from ...checkpoint.staging import locked, publish, recover, remove, save_tensors, sync_tree, write_text
from ...data import CalibrationTokens
from ...records import REPORT_NAME, differences, read_record, to_json
from ...report import PrunedBlock, SparsityReport
from .blocks import DiskBlocks
from .journal import FINAL, FinishedBlock, Journal

logger = logging.get_logger(__name__)

_NAME = ".ksparse-pruning"
_TOKENS = "calibration.safetensors"
OURS = (_NAME, REPORT_NAME)  # by which the folder of a run, unfinished or finished, is known


T = TypeVar("T")


class Workspace:
    """The workspace of the run that writes `output`. One process at a time may `lock` it, and only that one writes.

    Attributes:
        path: the folder.
        journal: of this run, or of the one that it goes on with.
    """

    def __init__(self, output: str | os.PathLike[str], job: dict[str, Any]) -> None:
        self.output = Path(output)
        self.path = self.output / _NAME
        self.journal = Journal(job)
        self._lock: ExitStack | None = None
        self._is_open = False

    def lock(self) -> None:
        """Makes the folder this process's. Raises BlockingIOError where another one is at work in it."""
        recover(self.output)
        self.path.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            busy = f"another process is pruning into {self.output}; wait for it, or stop it"
            stack.enter_context(locked(self.path / "lock", busy))
            self._lock = stack.pop_all()

    @property
    def is_unfinished(self) -> bool:
        """Whether an earlier run has left its journal."""
        return Journal.is_in(self.path)

    def open(self, resume: bool) -> None:
        """Goes on from what the folder holds, or empties it.

        Raises:
            ValueError: it holds a run with other settings, which are named.
        """
        earlier = Journal.load(self.path) if resume else None
        if earlier is not None:
            if changes := differences(earlier.job, self.journal.job):
                raise ValueError(
                    f"{self.output} holds an unfinished run with other settings ({'; '.join(changes)}): go on "
                    "with the same settings, start over with resume=False, or name another folder"
                )
            self.journal = earlier
            damaged = self.journal.keep_what_is_whole(self.path)
            if damaged:
                logger.warning(
                    f"{self.path} holds files that are missing or no longer what was written "
                    f"({', '.join(damaged[:3])}{', …' if len(damaged) > 3 else ''}): they are made anew."
                )
        else:
            Journal.remove(self.path)  # first: what is left without it counts for nothing
            for entry in self.path.iterdir():
                if entry.name != "lock":
                    remove(entry)
        self.journal.save(self.path)
        self._is_open = True

    def release(self) -> None:
        """Lets other processes at it; a folder in which nothing was done goes."""
        if self._lock is None:
            return
        nothing = not self.journal.blocks and not self.journal.checksums
        if nothing if self._is_open else not self.is_unfinished:
            shutil.rmtree(self.path, ignore_errors=True)
            if self.output.is_dir() and not any(self.output.iterdir()):
                self.output.rmdir()
        self._lock.close()

    def folder(self, name: str) -> Path:
        """An empty folder for something that no later run goes on with."""
        folder = self.path / name
        remove(folder)
        folder.mkdir(parents=True)
        return folder

    def tokens(self, draw: Callable[[], CalibrationTokens]) -> CalibrationTokens:
        """The calibration samples: those of the run that this one goes on with, or newly drawn ones, which are kept
        for a later run."""
        path = self.path / _TOKENS
        if _TOKENS not in self.journal.checksums:
            drawn = draw()
            save_tensors({"ids": drawn.ids}, path, {"description": json.dumps(drawn.description, ensure_ascii=False)})
            self._record(path)
        with safe_open(path, framework="pt") as file:
            description = json.loads(file.metadata()["description"])
            return CalibrationTokens(file.get_tensor("ids").clone(), description["begins_with_bos"], description)

    def kept(self, name: str, kind: type[T]) -> T | None:
        """What `keep` of the run which this one goes on with has kept under that name; None where it has not."""
        path = self.path / f"{name}.json"
        if path.name not in self.journal.checksums:
            return None
        kept: T = read_record(kind, path, "is damaged", "; start over with resume=False")
        return kept

    def keep(self, name: str, value: Any) -> None:
        """Keeps a dataclass that was measured, for a later run: measured again it may come out otherwise."""
        write_text(self.path / f"{name}.json", to_json(value, indent=None))
        self._record(self.path / f"{name}.json")

    def _record(self, path: Path) -> None:
        """Notes in the journal that a file is written. A later run uses no others."""
        self.journal.checksums[path.name] = sha256_of(path)
        self.journal.save(self.path)

    def add_block(
        self, index: int, state: dict[str, torch.Tensor], layers: Any, pruned: PrunedBlock, digests: list[list[str]]
    ) -> None:
        """Writes a pruned block. It counts when the journal has been saved."""
        name = f"block-{index:05d}.safetensors"
        path = self.path / name
        save_tensors({key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}, path)
        rows = pruned.layers, pruned.reconstruction
        self.journal.blocks.append(FinishedBlock(name, sha256_of(path), layers, digests, *rows))

    def written_bytes(self) -> int:
        """Bytes that an earlier run has left to go on with."""
        files = (path for name in ("block-*", "activations-*") for path in self.path.glob(name))
        return sum(path.stat().st_size for path in files if path.is_file())

    def finish(self, model: PreTrainedModel, disk: DiskBlocks, save_more: Callable[[Path], None]) -> None:
        """Makes a checkpoint of the blocks and of everything else of the model, which `model.save_pretrained` writes.
        `save_more` puts further files into a folder."""
        final, inside = self.folder(FINAL), disk.blocks.prefixes
        state = model.state_dict()
        once = remove_tied_weights_from_state_dict(dict(state), model).keys()  # what blocks share is stored with one
        state = {name: tensor for name, tensor in state.items() if not name.startswith(inside)}
        model.save_pretrained(final, state_dict=state, max_shard_size="10000GB")
        save_more(final)
        names = self.journal.weight_names()
        os.replace(final / SAFE_WEIGHTS_NAME, final / names[0])
        for index, name in enumerate(names[1:]):
            self._finish_block(index, model, disk, final / name, once)
        digests = {name: sha256_of(final / name) for name in names}
        _write_index(final, model.num_parameters(), digests)
        settings: Any = getattr(model.config, "quantization_config", None)
        if settings is not None:
            check_saved(model, final, settings.storage)
        sync_tree(final)
        files = {path.relative_to(final).as_posix(): path for path in final.rglob("*") if path.is_file()}
        self.journal.checksums |= {f"{FINAL}/{n}": digests.get(n) or sha256_of(path) for n, path in files.items()}
        self.journal.phase, self.journal.snapshot = "complete", None
        self.journal.save(self.path)

    def _finish_block(
        self, index: int, model: PreTrainedModel, disk: DiskBlocks, target: Path, once: Collection[str]
    ) -> None:
        with disk.resident(index):
            state, root = disk.state_dict(index), disk.blocks.name_in_model(index)
            stored = storage_state_dict(model, root, state, [name for name in state if name not in once])
            if stored.keys() != state.keys() or any(stored[name] is not state[name] for name in state):
                save_tensors({name: tensor.cpu().contiguous() for name, tensor in stored.items()}, target)
                return
        block = self.path / self.journal.blocks[index].file
        try:
            os.link(block, target)
        except OSError:  # a disk without links
            shutil.copyfile(block, target)

    def publish(self) -> SparsityReport:
        """Moves the files of the finished checkpoint to their places, and removes the workspace."""
        publish(self.output, self.path / FINAL)
        return SparsityReport.load(self.output / REPORT_NAME)


def _write_index(folder: Path, num_parameters: int, digests: Mapping[str, str]) -> None:
    """Writes the index of the weight files, with the SHA-256 of each, for `changed_files`."""
    weight_map: dict[str, str] = {}
    size = 0
    for name in digests:
        path = folder / name
        with safe_open(path, framework="pt") as file:
            weight_map |= dict.fromkeys(file.keys(), name)
        with open(path, "rb") as stream:
            size += path.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")
    metadata = {"total_parameters": num_parameters, "total_size": size, DIGESTS: digests}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / SAFE_WEIGHTS_INDEX_NAME, json.dumps(index, indent=2) + "\n")
