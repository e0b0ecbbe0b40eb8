"""Sparse models on disk and in accelerate's keeping: which layers are sparse, packed and dense storage."""

from .digests import fingerprint, tensor_digests
from .facts import ModelFacts, commit_of, facts_of, note_origin, sparsity_report, without_peft
from .files import WeightFiles, changed_files, check_index, check_space, find_weight_files, read_headers, sha256_of
from .loading import check_finite, check_headers, check_loaded, check_scales, random_weights
from .modules import (
    MASK_SUFFIX,
    SCALE_SUFFIX,
    SparseModule,
    aligned,
    empty_like,
    install_layers,
    is_elsewhere,
    is_offloaded,
    logical_parameters,
    put,
    replace_module,
    sparse_experts,
    sparse_layers,
    sparse_modules,
)
from .names import check_reversible, check_saved, forget_conversions
from .records import (
    describe_model,
    drop_guard,
    drop_record,
    guard_packed,
    is_dense_record,
    is_our_record,
    layer_records,
    made_with,
    record_layers,
    without_record,
)
from .storage import dense_shapes, dense_state_dict, sparsify_dense, storage_state_dict
