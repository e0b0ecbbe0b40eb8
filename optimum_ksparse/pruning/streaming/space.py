"""The disk space that pruning a checkpoint takes."""

from __future__ import annotations

from transformers import PreTrainedModel

from ...checkpoint import check_space
from ...config import SparsityConfig
from ...pattern import Pattern
from ..targets import Layer, weight_of
from .workspace import Workspace


def check_run_space(
    model: PreTrainedModel, targets: list[dict[str, Layer]], config: SparsityConfig, workspace: Workspace
) -> None:
    """Raises OSError where the disk is too small for what is still to be written, as far as can be told."""
    density = config.method_setting("target_density") or Pattern(config.pattern).density
    size = {name: tensor.nbytes for name, tensor in model.state_dict().items()}
    pruned = [weight_of(layer) for layers in targets for layer in layers.values()]
    dense = sum(weight.nbytes for weight in pruned)
    packed = dense * density + sum(weight.numel() for weight in pruned) / 8
    needed = sum(size.values()) - dense + packed
    if config.storage == "dense":  # packed blocks are written first, and become dense ones at the end
        needed += dense
    if config.needs_data and workspace.journal.phase == "pruning":
        hidden = int(getattr(model.config.get_text_config(decoder=True), "hidden_size", 0))
        needed += (
            (2 if config.reconstruct is None else 4)
            * config.num_samples
            * config.seq_len
            * hidden
            * model.dtype.itemsize
        )
    needed = max(0, needed - workspace.written_bytes())
    check_space(workspace.path, int(needed), "the sparse checkpoint and the calibration activations")
