"""Pruning a checkpoint from disk to disk, one decoder block in memory at a time."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..calibration import Activations, BlockReplay, ExpertStack, eager_experts, evaluation_mode, read_tokenizer
from ..checkpoint import install_layers, layer_records
from ..config import DENSE_CONFIG_KEY, SparsityConfig, check_integer
from ..distributed import Processes, joined
from ..memory import peak_memory
from ..nn import dense_weight, densified
from ..pattern import Pattern
from ..pruners import METHODS
from ..pruning import find_targets, prune_blocks
from ..report import REPORT_NAME, LayerReport, SparsityReport
from ..streaming import (
    DiskBlocks,
    Snapshot,
    WeightFiles,
    Workspace,
    check_output,
    check_space,
    find_weight_files,
    open_checkpoint,
)
from .model import (
    attach,
    calibration_dtype,
    check_model,
    draw_tokens,
    load_tokenizer,
    make_report,
    record_settings,
    share_tokens,
)

logger = logging.get_logger(__name__)

# Activations that are in memory are saved this often: what a killed run has to compute again.
_SNAPSHOT_SECONDS = 60.0


def prune_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: SparsityConfig,
    *,
    resume: bool = True,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    activation_memory: int | str = "4GB",
    model_class: Any = AutoModelForCausalLM,
    **loading: Any,
) -> SparsityReport:
    """Prunes a checkpoint that need not fit into memory, and writes the sparse one with its report and tokenizer.

    One decoder block at a time is read from the safetensors files, run, pruned, packed and written. Memory holds that
    block, the embeddings and the calibration activations. On a CPU the result is, bit for bit, what `from_pretrained`
    with the same config gives.

    A run that was killed, or met an error, goes on from its last finished block when it is called again with the same
    arguments (and, for the same bytes, versions and number of processes); what it needs for that lies in a hidden
    folder in `output` until the checkpoint is whole. The processes
    that `torchrun` or `accelerate launch` starts share the work (and `output`, which all must see).

    Args:
        source: folder or Hub id of a dense checkpoint in safetensors.
        output: folder; new, empty, or with the unfinished run.
        config: what to do.
        resume: go on with an unfinished run, or return the report of a finished one; False starts over, and replaces a
            sparse checkpoint that is in `output`.
        dtype: of the weights, as in `from_pretrained`; "auto" takes the checkpoint's.
        device: where blocks run; None takes this process's GPU, where there is one.
        activation_memory: calibration activations that stay in memory, in bytes or as "4GB"; more go to files in
            `output`.
        model_class: Auto class, or model's class, of the checkpoint.
        loading: `revision`, `token`, `cache_dir`, `subfolder`, `trust_remote_code`, `local_files_only`.

    Raises:
        TypeError, ValueError: an argument, the checkpoint or the data do not fit, an unfinished run had other
            settings, or the processes have different ones.
        FileNotFoundError, FileExistsError, NotADirectoryError, BlockingIOError: `source` has no weights, or `output`
            holds something else, or is in use.
        OSError: a file cannot be read or written, or the disk is too small, which is checked before the work.
        ArithmeticError: a layer's Gram matrix stays singular.
        ConnectionError: the Hub cannot be reached, or another process has stopped.
    """
    if not isinstance(config, SparsityConfig):
        raise TypeError(f"config must be a SparsityConfig, found {type(config).__name__}")
    limit, place = _bytes("activation_memory", activation_memory), _device(device)
    _check_arguments(config, loading)
    with joined() as processes:
        processes.once(lambda: check_output(output, source))
        processes.once(lambda: find_weight_files(source, **_hub(loading)))  # one downloads them for all
        files = find_weight_files(source, **_hub(loading))
        _check_dense(source, loading)
        job = {
            "source_fingerprint": files.fingerprint(),
            "settings": _settings(config),
            "dtype": str(dtype).removeprefix("torch."),
            "model_class": model_class.__name__,
        }
        how = {"output": os.path.basename(output), "resume": resume, "activation_memory": limit}
        processes.agree({**job, **job["settings"], **how, "settings": None})
        workspace = Workspace(output, job)
        run = _Run(source, config, workspace, files, processes, dtype, place, limit, model_class, loading)
        return run(resume)


class _Run:
    """One call of `prune_checkpoint`, after its arguments have been checked."""

    def __init__(
        self,
        source: str | os.PathLike[str],
        config: SparsityConfig,
        workspace: Workspace,
        files: WeightFiles,
        processes: Processes,
        dtype: torch.dtype | str,
        device: torch.device,
        activation_memory: int,
        model_class: Any,
        loading: dict[str, Any],
    ) -> None:
        self.source, self.config, self.workspace, self.files = source, config, workspace, files
        self.processes, self.dtype, self.device = processes, dtype, device
        self.activation_memory, self.model_class, self.loading = activation_memory, model_class, loading
        self.started = self.noted = self.saved = time.perf_counter()

    def __call__(self, resume: bool) -> SparsityReport:
        workspace, processes = self.workspace, self.processes
        try:
            finished = processes.once(lambda: self._begin(resume))
            if finished is not None:
                return finished
            workspace.journal = processes.once(lambda: workspace.journal)
            if workspace.journal.phase != "complete":
                self._prune()
            return processes.once(workspace.publish)
        finally:
            if processes.is_main:
                workspace.release()

    def _begin(self, resume: bool) -> SparsityReport | None:
        """Opens the workspace; the report where this job is finished already."""
        self.workspace.lock()
        finished = None if self.workspace.is_unfinished or not resume else _finished_report(self.workspace)
        if finished is None:
            self.workspace.open(resume)
        return finished

    def _prune(self) -> None:
        config, workspace, processes = self.config, self.workspace, self.processes
        model, disk = open_checkpoint(
            self.source,
            self.model_class,
            dtype=self.dtype,
            device=self.device,
            offload_folder=workspace.folder(f"offload-{processes.rank}"),
            offload_space=self.files.num_bytes * processes.size,
            **self.loading,
        )
        check_model(model, config)
        blocks, num_parameters = disk.blocks, model.num_parameters()
        targets, skipped = find_targets(blocks, config)
        processes.once(lambda: self._check_space(model, targets))
        done = list(workspace.journal.blocks)
        stacked = any(isinstance(layer, ExpertStack) for layers in targets for layer in layers.values())
        with evaluation_mode(model), eager_experts(model) if stacked else nullcontext(), torch.no_grad():
            data, replay = self._calibration(model, disk, bool(len(done) < len(blocks.blocks)))
            for index, block in enumerate(done):
                install_layers(model, block.layers)
                disk.take_shard(index, workspace.path / block.file)
            if replay is not None:
                self._catch_up(replay, disk)
            rows = [row for block in done for row in block.rows]
            rows += prune_blocks(
                blocks,
                targets,
                config,
                replay,
                resident=disk.resident,
                finished=lambda index, rows: self._block_is_done(index, rows, model, disk, replay),
                start=len(done),
                processes=processes,
            )
        processes.once(lambda: self._finish(model, disk, num_parameters, data, rows, skipped))

    def _calibration(
        self, model: PreTrainedModel, disk: DiskBlocks, needed: bool
    ) -> tuple[dict[str, Any], BlockReplay | None]:
        """The description of the calibration data, and the activations at the first block, where a block is left."""
        if METHODS[self.config.method].statistics is None:
            return {}, None

        def draw() -> tuple[torch.Tensor, dict[str, Any]]:
            names = ("trust_remote_code", *_HUB_ARGUMENTS)
            arguments = {name: value for name, value in self.loading.items() if name in names}
            drawn = draw_tokens(model, self.config, load_tokenizer(self.config, self.source, **arguments))
            assert drawn is not None
            return drawn.ids, drawn.description

        ids, description = self.processes.once(lambda: self.workspace.tokens(draw))
        if not needed:
            return description, None
        batch_size = self.config.batch_size
        ids = share_tokens(ids, batch_size, self.processes)
        hidden = Activations(
            -(-len(ids) // batch_size),
            self.activation_memory,
            self.workspace.path,
            f"activations-{self.processes.rank}-of-{self.processes.size}",
        )
        skip_first = description["begins_with_bos"] and not self.config.bos_in_statistics
        return description, BlockReplay(
            disk.blocks, ids, batch_size, skip_first, disk.resident, hidden, calibration_dtype(self.config)
        )

    def _catch_up(self, replay: BlockReplay, disk: DiskBlocks) -> None:
        """Brings the activations to the first block that is not done: from the latest snapshot, where it is whole,
        through the finished blocks after it."""
        processes, snapshot = self.processes, self.workspace.journal.snapshot
        done, at = len(self.workspace.journal.blocks), 0
        # Another number of processes has other files.
        mine = snapshot.files[processes.rank] if snapshot and len(snapshot.files) == processes.size else None
        there = processes.gather(mine is not None and snapshot and replay.hidden.can_load(mine, snapshot.block))
        if snapshot is not None and mine is not None and all(there):
            replay.hidden.load(mine)
            at = snapshot.block
        for index in range(at, done):
            block = disk.blocks.blocks[index]
            with disk.resident(index), densified(block, replay.dtype):
                replay.advance(index, block)

    def _block_is_done(
        self, index: int, rows: list[LayerReport], model: PreTrainedModel, disk: DiskBlocks, replay: BlockReplay | None
    ) -> None:
        workspace, processes = self.workspace, self.processes
        snapshot = None
        if replay is not None and index + 1 < len(disk.blocks.blocks):
            due = time.perf_counter() - self.saved > _SNAPSHOT_SECONDS
            # Files that the next block would write over are saved with every block.
            if any(processes.gather(replay.hidden.in_files or due)):
                snapshot = Snapshot(index + 1, processes.gather(replay.hidden.save(index + 1)))
                self.saved = time.perf_counter()
        peaks = processes.gather(peak_memory())

        def note() -> None:
            prefix = disk.blocks.name_in_decoder(index, "")
            layers = {name: layer for name, layer in layer_records(model).items() if name.startswith(prefix)}
            workspace.add_block(index, disk.state_dict(index), layers, rows)
            if snapshot is not None:
                workspace.journal.snapshot = snapshot
            self._note_costs(peaks)
            workspace.journal.save(workspace.path)

        processes.once(note)  # an error in it stops all

    def _note_costs(self, peaks: list[dict[str, int]]) -> None:
        journal, now = self.workspace.journal, time.perf_counter()
        journal.seconds += now - self.noted
        self.noted = now
        for name, peak in (item for peaks_of_one in peaks for item in peaks_of_one.items()):
            journal.peak_memory_bytes[name] = max(peak, journal.peak_memory_bytes.get(name, 0))

    def _finish(
        self,
        model: PreTrainedModel,
        disk: DiskBlocks,
        num_parameters: int,
        calibration: dict[str, Any],
        rows: list[LayerReport],
        skipped: dict[str, str],
    ) -> None:
        recorded = record_settings(self.config)
        attach(model, recorded)
        report = make_report(model, recorded, num_parameters, calibration, rows, skipped)
        report.source_fingerprint = self.workspace.journal.job["source_fingerprint"]
        self._note_costs([peak_memory()])
        report.seconds = round(self.workspace.journal.seconds, 2)
        report.peak_memory_bytes = self.workspace.journal.peak_memory_bytes
        model.sparsity_report = report  # type: ignore[assignment]
        self.workspace.finish(model, disk, self._save_tokenizer)

    def _save_tokenizer(self, folder: Path) -> None:
        try:
            tokenizer = read_tokenizer(os.fspath(self.source), **self.loading)
        except Exception as error:  # transformers and huggingface_hub raise many kinds here
            reason = " ".join(str(error).split())
            logger.warning(f"The checkpoint has no tokenizer: none could be loaded from {self.source}: {reason}")
            return
        tokenizer.save_pretrained(folder)

    def _check_space(self, model: PreTrainedModel, targets: list[dict[str, Any]]) -> None:
        """Raises OSError where the disk is too small for what is still to be written, as far as can be told."""
        pattern = Pattern(self.config.pattern)
        size = {name: tensor.nbytes for name, tensor in model.state_dict().items()}
        pruned = [
            layer.weight if isinstance(layer, ExpertStack) else dense_weight(layer)
            for layers in targets
            for layer in layers.values()
        ]
        dense = sum(weight.nbytes for weight in pruned)
        packed = dense * float(1 - pattern.sparsity) + sum(weight.numel() for weight in pruned) / 8
        needed = sum(size.values()) - dense + packed
        if self.config.storage == "dense":  # packed blocks are written first, and become dense ones at the end
            needed += dense
        if METHODS[self.config.method].statistics is not None and self.workspace.journal.phase == "pruning":
            hidden = int(getattr(model.config.get_text_config(decoder=True), "hidden_size", 0))
            needed += 2 * self.config.num_samples * self.config.seq_len * hidden * model.dtype.itemsize
        needed = max(0, needed - self.workspace.written_bytes())
        check_space(self.workspace.path, int(needed), "the sparse checkpoint and the calibration activations")


_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "subfolder", "local_files_only")


def _hub(loading: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in loading.items() if name in _HUB_ARGUMENTS}


def _check_arguments(config: SparsityConfig, loading: dict[str, Any]) -> None:
    unknown = sorted(set(loading) - {"trust_remote_code", *_HUB_ARGUMENTS})
    if unknown:
        raise TypeError(
            f"prune_checkpoint takes no argument {unknown[0]!r}; of from_pretrained's it takes trust_remote_code, "
            f"{', '.join(_HUB_ARGUMENTS)}; weights in other forms than safetensors have to be converted first"
        )
    if isinstance(config.dataset, str) and config.dataset == "self" and METHODS[config.method].statistics is not None:
        raise ValueError(
            'dataset="self" needs the whole model in memory to write text: use a text, or from_pretrained with a '
            "sparsity_config"
        )


def _check_dense(source: str | os.PathLike[str], loading: dict[str, Any]) -> None:
    values, _ = PreTrainedConfig.get_config_dict(source, **_hub(loading))
    settings = values.get("quantization_config") or values.get(DENSE_CONFIG_KEY)
    if settings is not None:
        raise ValueError(
            f"{source} is quantized or sparse already ({dict(settings).get('quant_method')}): prune the model that it "
            "was made from"
        )


def _settings(config: SparsityConfig) -> dict[str, Any]:
    settings = config.to_dict()
    settings.pop("layers")
    return settings


def _finished_report(workspace: Workspace) -> SparsityReport | None:
    """The report of a checkpoint that the same job has made already; None where there is none.

    Raises:
        FileExistsError: the folder holds a checkpoint that another job made, and may not be replaced.
    """
    if not (workspace.output / REPORT_NAME).is_file():
        return None
    report = SparsityReport.load(workspace.output / REPORT_NAME)
    values, _ = PreTrainedConfig.get_config_dict(workspace.output)
    job = workspace.journal.job
    same_dtype = job["dtype"] in ("auto", values.get("dtype"))
    if report.source_fingerprint == job["source_fingerprint"] and report.config == job["settings"] and same_dtype:
        logger.warning(f"{workspace.output} holds what this call would make; resume=False makes it again.")
        return report
    raise FileExistsError(
        f"{workspace.output} holds another sparse checkpoint; name another folder, or replace it with resume=False"
    )


def _bytes(name: str, size: int | str) -> int:
    from accelerate.utils import convert_file_size_to_int

    if isinstance(size, str) and not size.isdigit():
        try:
            return int(convert_file_size_to_int(size))
        except ValueError:
            raise ValueError(f"{name}={size!r} is no size; allowed: a number of bytes, or such as '4GB'") from None
    return check_integer(name, int(size) if isinstance(size, str) else size, 0)


def _device(device: torch.device | str | None) -> torch.device:
    if device is not None:
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device={device!r} is no device: {error}; allowed: such as 'cpu', 'cuda:0'") from None
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
