"""Sparse models on disk and in accelerate's keeping: which layers are sparse, packed and dense storage."""

from .loading import check_files, check_loaded
from .modules import (
    SparseModule,
    aligned,
    empty_like,
    install_layers,
    is_offloaded,
    put,
    replace_module,
    sparse_experts,
    sparse_layers,
    sparse_modules,
)
from .records import commit_of, describe_model, has_lost_blocks, is_dense_record, layer_records, made_with
from .storage import dense_state_dict, sparsify_dense, storage_state_dict

__all__ = [
    "SparseModule",
    "aligned",
    "check_files",
    "check_loaded",
    "commit_of",
    "dense_state_dict",
    "describe_model",
    "empty_like",
    "has_lost_blocks",
    "install_layers",
    "is_dense_record",
    "is_offloaded",
    "layer_records",
    "made_with",
    "put",
    "replace_module",
    "sparse_experts",
    "sparse_layers",
    "sparse_modules",
    "sparsify_dense",
    "storage_state_dict",
]
