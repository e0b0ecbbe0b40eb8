"""What a `config.json` of compressed-tensors says of sparsity: its versions up to 0.14 wrote it, and later ones do not
read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optimum_ksparse_autoload import COMPRESSED_TENSORS

from .files import printable

TWO_OF_FOUR, BITMASK, DENSE = "sparse-24-bitmask", "sparse-bitmask", "dense"
# Layers packed to 2:4, packed by any mask, or dense with zeros in them.
FORMATS = (TWO_OF_FOUR, BITMASK, DENSE)


def sparse_format(settings: Any) -> str | None:
    """How a model with this `quantization_config` stores its sparse weights, one of `FORMATS`; None for one that
    compressed-tensors has not sparsified.

    Raises:
        ValueError: it is quantised as well as sparse, or the format is none of these.
    """
    if not isinstance(settings, Mapping) or settings.get("quant_method") != COMPRESSED_TENSORS:
        return None
    sparsity, quantized = settings.get("sparsity_config"), bool(settings.get("config_groups"))
    name = sparsity.get("format") if isinstance(sparsity, Mapping) else None
    if settings.get("format") == "marlin-24" or (quantized and name in (TWO_OF_FOUR, BITMASK)):
        found = printable(f"{settings.get('format')}, sparsity {name}")
        raise ValueError(
            f"the checkpoint is quantised as well as sparse ({COMPRESSED_TENSORS}, format {found}), which is not read "
            "here: take the sparse model in 16 bit that it was made from, or serve it with a vLLM before "
            f"0.19.1 and {COMPRESSED_TENSORS} 0.14, the last that read it"
        )
    if quantized or name is None:
        return None
    if name not in FORMATS:
        raise ValueError(
            f"sparsity_config.format={printable(name)!r} of the checkpoint's config is unknown; allowed: "
            f"{', '.join(FORMATS)}"
        )
    return str(name)
