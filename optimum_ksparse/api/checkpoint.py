"""Pruning a checkpoint from disk to disk, one decoder block in memory at a time."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from ..checkpoint import commit_of, find_weight_files, is_dense_record, is_our_record
from ..checkpoint.model_class import class_for_source
from ..checkpoint.staging import check_apart, check_output, recover
from ..checks import check_integer
from ..config import FOREIGN_RECORD, SparsityConfig, recorded_settings
from ..data import find_file, hub_arguments, usual_context
from ..data.dataset import holds
from ..hub import card_of_source
from ..pruners import METHODS
from ..pruning.distributed import joined
from ..pruning.model import settings_of
from ..pruning.streaming import OURS, Workspace
from ..pruning.streaming.loading import Source
from ..pruning.streaming.run import CheckpointRun
from ..records import REPORT_NAME
from ..report import SparsityReport

_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "subfolder", "local_files_only")
_CODE_ARGUMENTS = ("trust_remote_code", "code_revision")


def prune_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: SparsityConfig,
    *,
    resume: bool = True,
    overwrite: bool = False,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    activation_memory: int | str = "4GB",
    model_class: Any = None,
    **loading: Any,
) -> SparsityReport:
    """Prunes a checkpoint that need not fit into memory, and writes the sparse one with its report and tokenizer.

    One decoder block at a time is read from the safetensors files, run, pruned, packed and written. Memory holds that
    block, the embeddings and the calibration activations. On a CPU the result is, bit for bit, what `from_pretrained`
    with the same config gives.

    A run that was killed, or met an error, goes on from its last finished block when it is called again with the same
    arguments, with as many threads as it began with. For the same bytes the versions of torch and transformers, the
    kind of device and the number of processes have to be the same, too; others give a warning. What it needs lies in a
    hidden folder in `output` until the checkpoint is whole; it is compared with its checksums, and what is damaged is
    made anew. The processes that `torchrun` or `accelerate launch` starts share the work (and `output`, which all must
    see).

    Args:
        source: folder or Hub id of a dense checkpoint in safetensors; with `SparsityConfig("existing", values="int8")`
            of a sparse one, whose values are quantised.
        output: folder; new, empty, or with the unfinished run; not that of `source`, nor in it.
        config: what to do.
        resume: go on with an unfinished run, or return the report of a finished one; False starts over, and replaces a
            sparse checkpoint that is in `output`.
        overwrite: write into `output` whatever else it holds, too, such as another model, which is replaced.
        dtype: of the weights, as in `from_pretrained`; "auto" takes the checkpoint's.
        device: where blocks run; None takes this process's GPU, where there is one.
        activation_memory: calibration activations that stay in memory, in bytes or as "4GB"; more go to files in
            `output`. With `reconstruct` there are two such sets: the pruned model's and the dense one's.
        model_class: Auto class, or model's class, of the checkpoint; None: the one that its config.json names.
        loading: `revision`, `token`, `cache_dir`, `subfolder`, `local_files_only`, `trust_remote_code`,
            `code_revision`.

    Raises:
        TypeError, ValueError: an argument, the checkpoint or the data do not fit, an unfinished run had other
            settings, its journal or the finished checkpoint is damaged, or the processes have different ones.
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
        processes.once(lambda: _check_folders(source, output, config, overwrite))
        commit = None if os.path.isdir(source) else processes.once(lambda: commit_of(source, **loading))
        if commit is not None:  # for as long as the run takes, whatever is pushed meanwhile
            loading["revision"] = commit
        files = processes.once(lambda: find_weight_files(source, **loading))  # one downloads them for all
        if not processes.is_main:
            files = find_weight_files(source, **loading)
        made, earlier = _check_source(source, config, loading)
        model_class = model_class or class_for_source(source, **loading)
        config = config.fitted(usual_context(AutoConfig.from_pretrained(source, **loading)))
        job = {
            "source": processes.each(files.digests),
            "settings": settings_of(config),
            "dtype": str(dtype).removeprefix("torch."),
            "model_class": model_class.__name__,
            "code_revision": loading.get("code_revision"),
        }
        how = {"output": os.path.basename(output), "resume": resume, "activation_memory": limit}
        processes.agree({**job, **job["source"], **job["settings"], **how, "source": None, "settings": None})
        card = partial(card_of_source, token=loading.get("token"))
        read_from = Source(source, files, model_class, dtype, loading, made, earlier)
        run = CheckpointRun(read_from, config, Workspace(output, job), processes, place, limit, card)
        return run.execute(resume, overwrite)


def _check_folders(
    source: str | os.PathLike[str], output: str | os.PathLike[str], config: SparsityConfig, overwrite: bool
) -> None:
    reads = (source, config.tokenizer, config.dataset)
    check_output(output, reads=reads, ours=OURS, overwrite=overwrite)
    check_apart(output, reads)  # whatever may be overwritten: they are read to the end
    recover(source)


def _check_arguments(config: SparsityConfig, loading: dict[str, Any]) -> None:
    unknown = sorted(set(loading) - {*_CODE_ARGUMENTS, *_HUB_ARGUMENTS})
    if unknown:
        raise TypeError(
            f"prune_checkpoint takes no argument {unknown[0]!r}; of from_pretrained's it takes "
            f"{', '.join((*_CODE_ARGUMENTS, *_HUB_ARGUMENTS))}; weights in other forms than safetensors have to be "
            "converted first"
        )
    if holds(config.dataset, "self") and config.needs_data:
        raise ValueError(
            'dataset="self" needs the whole model in memory to write text: use a text, or from_pretrained with a '
            "sparsity_config"
        )


def _check_source(
    source: str | os.PathLike[str], config: SparsityConfig, loading: dict[str, Any]
) -> tuple[SparsityConfig | None, SparsityReport | None]:
    """Settings and report of a sparse model of this package whose values are to be quantised; None for any other
    source. Raises ValueError where the source cannot be pruned."""
    values, _ = PreTrainedConfig.get_config_dict(source, **hub_arguments(loading))
    if values.get("transformers_weights") is not None:
        raise ValueError(
            f"the config of {source} names its own weight file ({values['transformers_weights']!r}), which cannot be "
            f"read block by block; save it once as others are: from_pretrained, then save_pretrained"
        )
    settings = recorded_settings(values)
    if settings is None or is_dense_record(settings):
        return None, None
    if settings == FOREIGN_RECORD and settings["method"] == config.method:
        return None, None
    recognises = METHODS[config.method].recognise is not None
    if not (recognises and config.values is not None and is_our_record(settings)):
        raise ValueError(
            f"{source} is quantized or sparse already ({settings.get('quant_method')}): prune the model that it "
            "was made from"
        )
    made = SparsityConfig.from_dict(settings)
    if made.values is not None:
        raise ValueError(f"the values of {source} are {made.values} already: take the model that it was made from")
    path = find_file(source, REPORT_NAME, **loading)
    return made, None if path is None else SparsityReport.load(path)


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
