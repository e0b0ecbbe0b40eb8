"""A tiny configuration of any model type of transformers: its class's own defaults, with every size made small.

All widths become one width, all heads one size, so that what has to fit together does, in sub-configs as well: a table
of names, not of families.
"""

from __future__ import annotations

import re
import zlib
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

WIDTH, HEADS, KV_HEADS, HEAD_SIZE, INNER, VOCABULARY = 64, 4, 2, 16, 128, 160
FIRST_ID = 64  # token ids below may mean an image, an end, …
MOST_LAYERS = 8

# Name of an integer setting: the value that it gets where its default is larger. The first that matches counts.
SIZES: list[tuple[str, int]] = [
    (r"(encoder_hash_byte_group|ngram)_vocab.*|codebook_size", 64),
    (r".*vocab_size.*|vocab_offset|num_embeddings", VOCABULARY),
    (r"n_groups?|topk_group|num_expert_group|mamba_ngroups|o_groups|num_query_groups", 1),
    (r"(\w*n_|\w*num_)?(key_value|kv|kv_n|global_key_value)_heads|linear_num_key_heads|num_kv_heads", KV_HEADS),
    (r"qk_head_dim", 2 * HEAD_SIZE),
    (r"(\w*_)?(head_dim|head_size|dim_head|d_head|d_kv|kv_channels|headdim|rotary_dim|pre_attn_scalar)", HEAD_SIZE),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"n_mamba_heads", 2),
    (r"index_n_heads|resampler_(n_)?heads", 2),
    (r"(\w*_)?(num_|n_)?(attention_)?heads?|\w*_num_value_heads|linear_num_heads", HEADS),
    (r"mamba_d_state|ssm_state_size|state_size|d_rel|laurel_rank|gated_norm_rank", 8),
    (r"(\w*_)?(lora_rank|adapter_rank|lowrank)|mamba_dt_rank|time_step_rank", 8),
    (r"(\w*_)?(intermediate|ffn|feed_forward|inner|mlp|ff)_?(hidden_)?(dim|size|mlp)|n_inner|dff|dim_ff|d_ff", INNER),
    (r"share_expert_dim|mamba_d_ssm|\w*intermediate_size\w*", INNER),
    (r"(\w*_)?(num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts)", 2),
    (r"(\w*_)?(num_experts|n_routed_experts|num_local_experts|zero_expert_num)", 4),
    (
        r"(\w*_)?(hidden_size|hidden_dim|d_model|n_embd|embed_dim|emb_dim|embedding_dim|embd_dim|proj_dim|lru_width)",
        WIDTH,
    ),
    (r"\w*(hidden_size|projection_dim|embedding_size|output_dim|input_dim|hidden_dimension)\w*", WIDTH),
    (r"adapter_(in|out)_dim|adapter_input_size|image_token_embed_dim|input_size|output_size|dim_model_base", WIDTH),
    (r"sliding_window(_size)?|window_size|local_attention|chunk_size|\w*chunk_size|\w*window_len|index_topk", 16),
    (r"(\w*_)?(num_)?(query_tokens|latents|image_tokens|query_num)", 8),
    (r"block_multiple_of|make_ngram_vocab_size_divisible_by|split_ngram_parts|num_centroids", 8),
]
LAYERS = re.compile(r"(\w*_)?(layers?|blocks?|depth|layers_per_stack)")
NO_COUNT = re.compile(
    r"num_kv_shared_layers|num_nextn_predict_layers|insert_layer_id|num_res(idual)?_(blocks|layers)|\w*random_blocks"
)
POSITIONS = re.compile(
    r"\w*(indexes|indices|idxs?|layer_ids?|target_layers|cross_attention_layers|feature_layer)|moe_layers"
)
TOKEN = re.compile(r"\w*(token_ids?|token_index|mask_index|unk_index|(patch|start|end|newline)_id)")
NOT_SIZES = ("id2label", "label2id", "dtype")

# What cannot be read from names.
_GEMMA4 = {"global_head_dim": HEAD_SIZE, "per_layer_config": None}
_MOE = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_INDEXER = {"n_heads": 2, "kv_heads": 1, "head_dim": HEAD_SIZE, "budget": 16, "compress_ratio": 4}
_QWEN4 = {f"indexer_{name}": size for name, size in _INDEXER.items()}
_COMPASS = {"rope_parameters": {"full_attention": {**_ROPE["rope_parameters"], "mrope_section": [4, 2, 2]}}}
_SWA = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "q_lora_rank": 8, "kv_lora_rank": 8}
_SWA |= {"head_dim": 2 * HEAD_SIZE, "qk_nope_head_dim": HEAD_SIZE, "v_head_dim": HEAD_SIZE}
_DOTS3 = {f"swa_{name}": size for name, size in _SWA.items()}
_ZAMBA = {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4}
_ZAMBA |= {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * HEAD_SIZE}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass": {"text_config": _COMPASS},
    "cohere_compass_text": _COMPASS,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "diffusion_gemma": {"text_config": _GEMMA4},
    "dots1": {**_MOE, "num_local_experts": 4, "first_k_dense_replace": 1, "num_hidden_layers": 2},
    "dots3_note": {"text_config": _DOTS3},
    "dots3_note_text": _DOTS3,
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 2}},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "hunyuan_v1_dense": {**_ROPE, "head_dim": HEAD_SIZE},
    "hunyuan_v1_moe": {**_ROPE, "head_dim": HEAD_SIZE},
    "hunyuan_vl": {"text_config": {**_ROPE, "head_dim": HEAD_SIZE}},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"], "num_hidden_layers": 4},
    "mamba2": {"num_heads": 8},
    "ministral": {**_ROPE, "head_dim": HEAD_SIZE},
    "nemotron": {"head_dim": HEAD_SIZE, "num_key_value_heads": KV_HEADS},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"is_decoder": True, "axial_pos_shape": (8, 8), "axial_pos_embds_dim": (WIDTH // 2, WIDTH // 2)},
    "zamba": _ZAMBA,
    "zamba2": {**_ZAMBA, "n_mamba_heads": 8, "mamba_headdim": HEAD_SIZE},
}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A configuration of `model_type` for a random model of some 100,000 parameters; what can be an encoder or a
    decoder is a decoder."""
    config_class = CONFIG_MAPPING[model_type]
    overrides = OVERRIDES.get(model_type, {})
    config = config_class(**_merged(_small(config_class()), overrides))
    if getattr(config, "is_decoder", True) is False:
        config.is_decoder = True
    return config


def _small(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings of a configuration, those of its parts as dictionaries, that make it small."""
    small: dict[str, Any] = {}
    settings, (old, new) = vars(config), _layers(config)
    for name, value in settings.items():
        if isinstance(value, PreTrainedConfig):
            small[name] = {**_small(value), "model_type": value.model_type}
        elif name == "rope_parameters":
            small[name] = _small_rope(config, value)
        elif not name.startswith("_") and name not in NOT_SIZES and not isinstance(value, bool):
            small[name] = _small_value(name, value, old, new)
    if settings.get("num_key_value_heads") == settings.get("num_attention_heads"):
        small.pop("num_key_value_heads", None)
        small |= {"num_key_value_heads": HEADS} if "num_key_value_heads" in settings else {}
    return {name: value for name, value in small.items() if value is not None and value != settings.get(name)}


def _layers(config: PreTrainedConfig) -> tuple[int | None, int]:
    """How many layers the default has, and the fewest, from the first on, that have all kinds of layers."""
    old = getattr(config, "num_hidden_layers", None)
    listed = [*vars(config).values(), *(getattr(config, name, None) for name in ("layer_types", "layers_block_type"))]
    kinds = [value for value in listed if isinstance(value, list) and len(value) == old]
    needed = [max(value.index(kind) + 1 for kind in set(value)) for value in kinds if isinstance(value[0], str)]
    return old, min(MOST_LAYERS, max([2, *needed]))


def _small_value(name: str, value: Any, old: int | None, new: int) -> Any:
    if isinstance(value, list | tuple):
        if POSITIONS.fullmatch(name) and all(isinstance(item, int) for item in value):
            return type(value)(sorted({item % new for item in value}))
        if len(value) == old and name not in ("vision_feature_layer",):
            value = value[:new]
        return type(value)(_small_value(name, item, old, new) for item in value)
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if TOKEN.fullmatch(name):
        return value if value < FIRST_ID else 3 + zlib.crc32(name.encode()) % (FIRST_ID - 3)
    if POSITIONS.fullmatch(name):
        return value if value < 0 else value % new
    if LAYERS.fullmatch(name) and not NO_COUNT.fullmatch(name):
        return min(value, new)
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name):
            return min(value, size)
    return value


def _small_rope(config: PreTrainedConfig, rope: dict[str, Any] | None) -> dict[str, Any] | None:
    """Sections of a rotary embedding that sum to half of the part of a head that is turned."""
    if not rope or "mrope_section" not in (type(config).ignore_keys_at_rope_validation or ()):
        return None
    kinds = [name for name, value in rope.items() if isinstance(value, dict)]
    if kinds:  # one for each kind of layer
        return {**rope, **{name: _small_rope(config, rope[name]) for name in kinds}}
    half = int(HEAD_SIZE * rope.get("partial_rotary_factor", 1.0)) // 2
    third = half // 3
    return {**rope, "mrope_section": [half - 2 * third, third, third]}


def _merged(settings: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for name, value in overrides.items():
        inner = merged.get(name)
        merged[name] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged
