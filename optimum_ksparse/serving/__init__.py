"""The plugin for vLLM, which then serves sparse checkpoints packed. vLLM finds it by its entry point, and calls
`register` in each of its processes; nothing else does."""

from __future__ import annotations

import importlib.metadata
import re

from transformers.utils import logging

logger = logging.get_logger(__name__)

# Minor releases of vLLM that `make test-vllm` has passed with.
TESTED = ("0.32",)


def register() -> None:
    """Registers with vLLM, of which it is a general plugin; a second call does nothing. A vLLM that lacks what the
    plugin builds on is told of in the log, and serves other models as before.

    Raises:
        ValueError: another plugin has registered the same `quant_method`.
    """
    from vllm import __version__ as version

    tested = f"optimum-ksparse was tested with vLLM {', '.join(f'{minor}.*' for minor in TESTED)}"
    try:
        from .config import register_config
    except ImportError as error:
        logger.error(f"vLLM {version} cannot serve packed sparse checkpoints: {error}. {tested}.")
        return
    if ".".join(version.split(".")[:2]) not in TESTED:
        logger.warning(f"{tested}, this is {version}.")
    register_config()
