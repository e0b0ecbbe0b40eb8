"""What a sparse checkpoint holds, read from its config, its report and the headers of its weight files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME

import optimum_ksparse_autoload

from ..checkpoint.model_class import class_for_config
from ..config import QUANT_METHOD, RECORDED, SparsityConfig, recorded_settings
from ..data import find_file
from ..kernels import describe_device
from ..records import REPORT_NAME, printable
from ..report import SparsityReport

_TOTALS = ("density", "dense_bytes", "packed_bytes", "bits_per_weight")  # of a report


@dataclass
class CheckpointSummary:
    """Attributes:
    source: as it was named.
    settings: what it was pruned with, without the list of layers.
    layers: the recorded sparse layers, path in the decoder → pattern and number of values.
    num_parameters: logical, zeros included.
    file_bytes: weight file → bytes.
    report: None where the checkpoint has none.
    device: how its sparse layers run on this machine, in a sentence.
    autoload: whether such checkpoints load here without an import of this package, in a sentence.
    """

    source: str
    settings: dict[str, Any]
    layers: dict[str, dict[str, Any]]
    num_parameters: int
    file_bytes: dict[str, int]
    report: SparsityReport | None
    device: str
    autoload: str

    def to_dict(self) -> dict[str, Any]:
        totals: dict[str, Any] = {}
        if self.report is not None:
            totals = {name: getattr(self.report, name) for name in _TOTALS}
        return {
            "checkpoint": self.source,
            "settings": self.settings,
            "num_sparse_layers": len(self.layers),
            "num_parameters": self.num_parameters,
            "num_values": sum(layer["num_values"] for layer in self.layers.values()),
            "file_bytes": self.file_bytes,
            "device": self.device,
            "autoload": self.autoload,
            **totals,
        }

    def __str__(self) -> str:
        lines = [self.source]
        told = {name: value for name, value in self.settings.items() if value is not None and value != []}
        lines += [f"  {name}: {printable(value)}" for name, value in told.items()]
        lines.append(f"{self.num_parameters:,} parameters, zeros included; {len(self.layers)} sparse layers")
        lines.append(f"{sum(self.file_bytes.values()):,} bytes of weights in {len(self.file_bytes)} file(s)")
        if self.layers:
            lines.append(f"on this machine: {self.device}; {self.autoload}")
        lines.append("no sparsity_report.json" if self.report is None else str(self.report))
        return "\n".join(lines)


def inspect_checkpoint(
    source: str | os.PathLike[str], revision: str | None = None, trust_remote_code: bool = False
) -> CheckpointSummary:
    """Summarises a sparse checkpoint, a local folder or one on the Hub, without reading a weight.

    Raises:
        OSError: there is no such checkpoint.
        ValueError: it is not sparse.
    """
    source = os.fspath(source)
    values, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    recorded = recorded_settings(values) or {}
    if recorded.get("quant_method") != QUANT_METHOD:
        why = "its config has no sparsity settings" if values else f"it has no {CONFIG_NAME}"
        raise ValueError(f"{source} is not a checkpoint of optimum-ksparse: {why}")
    config = SparsityConfig.from_dict(recorded)
    layers = config.layers or {}
    hidden = ("quant_method", *RECORDED)
    settings = {name: value for name, value in config.to_dict().items() if name not in hidden}
    path = find_file(source, REPORT_NAME, revision=revision)
    report = None if path is None else SparsityReport.load(path)
    num_parameters = (
        report.num_parameters if report is not None else _count_parameters(source, revision, trust_remote_code)
    )
    device = describe_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    files, autoload = _file_bytes(source, revision), optimum_ksparse_autoload.describe()
    return CheckpointSummary(source, settings, layers, num_parameters, files, report, device, autoload)


def _count_parameters(source: str, revision: str | None, trust_remote_code: bool) -> int:
    """Logical parameters, of the model built without weights."""
    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    model_class = class_for_config(config, trust_remote_code)
    with torch.device("meta"):
        build = getattr(model_class, "from_config", None) or model_class._from_config
        trusted = {"trust_remote_code": True} if trust_remote_code else {}
        return int(build(config, **trusted).num_parameters())


def _file_bytes(source: str, revision: str | None) -> dict[str, int]:
    if os.path.isdir(source):
        return {path.name: path.stat().st_size for path in sorted(Path(source).glob("*.safetensors"))}
    from huggingface_hub import HfApi

    info = HfApi().model_info(source, revision=revision, files_metadata=True)
    return {file.rfilename: file.size or 0 for file in info.siblings or () if file.rfilename.endswith(".safetensors")}
