"""`optimum-cli ksparse merge`."""

from __future__ import annotations

import os
import shutil
from argparse import ArgumentParser
from typing import Any

from .base import Command, add_flags, boolean, dataset, read_settings

# Settings of merge_adapter: name → argparse arguments. Defaults are its own.
_FLAGS: dict[str, dict[str, Any]] = {
    "method": {"help": "masked (default), or solve: the kept weights make up for what the mask discards"},
    "dataset": {
        "type": dataset,
        "help": "calibration text, which solve needs: mc4-ko, c4, kowiki, self, a .txt or .jsonl file, or a mix: "
        "mc4-ko=0.5,self=0.5",
    },
    "tokenizer": {"help": "name or folder, where it is not the base model's own"},
    "num_samples": {"type": int, "help": "calibration sequences"},
    "seq_len": {"type": int, "help": "tokens in each of them"},
    "batch_size": {"type": int, "help": "sequences in one forward pass"},
    "seed": {"type": int, "help": "draws documents and crops"},
    "prepend_bos": {"type": boolean, "help": "begin each sequence with the beginning token"},
    "damping": {"type": float, "help": "of solve: holds weights near those of masked"},
    "max_steps": {"type": int, "help": "of solve: at most so many for each layer"},
    "tolerance": {"type": float, "help": "of solve: residual at which a row is finished"},
}
_LOADING_FLAGS: dict[str, dict[str, Any]] = {
    "dtype": {"help": "float32, bfloat16, float16, or auto (default: the checkpoint's)"},
    "revision": {"help": "branch, tag or commit of the adapter"},
    "base_revision": {"help": "the same of the base model"},
    "max_shard_size": {"help": "of the saved files, such as 5GB"},
}
_OWN = ("adapter", "output", "base", "trust_remote_code")


class MergeCommand(Command):
    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("adapter", nargs="?", help="folder or Hub id of an adapter on a sparse model")
        parser.add_argument("output", nargs="?", help="folder to write the merged checkpoint to")
        parser.add_argument("--base", metavar="MODEL", help="the sparse base (default: the one the adapter names)")
        parser.add_argument("--config", metavar="RECIPE", help="YAML file with any of these settings; flags override")
        parser.add_argument("--trust-remote-code", dest="trust_remote_code", action="store_const", const=True)
        add_flags(parser, _FLAGS, _LOADING_FLAGS)

    def execute(self) -> None:
        settings = read_settings(self.args, [*_OWN, *_FLAGS, *_LOADING_FLAGS])
        for name in ("adapter", "output"):
            if not settings.get(name):
                raise ValueError(f"{name} is missing: optimum-cli ksparse merge ADAPTER OUTPUT [--base MODEL]")
        output = settings["output"]
        merging = {name: settings[name] for name in _FLAGS if name in settings}

        from ..finetuning import merge_adapter
        from ..finetuning.korquad import HEAD_NAME
        from ..report import TUNING_NAME
        from ..staging import staged

        with staged(output):  # an output that cannot be written to is an error before the work, not after it
            pass
        source = settings.get("base") or _base_of(settings)
        remote = {"trust_remote_code": settings.get("trust_remote_code"), "revision": settings.get("base_revision")}
        base = {name: value for name, value in remote.items() if value is not None}
        tokenizer, where = _tokenizer(settings, source, base)
        if tokenizer is not None and "tokenizer" not in merging:
            merging["tokenizer"] = tokenizer
        model = merge_adapter(_load(settings, source, base), **merging)
        save = {"max_shard_size": settings["max_shard_size"]} if "max_shard_size" in settings else {}
        with staged(output) as folder:
            model.save_pretrained(folder, **save)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            # Results of the merged model are those after this tuning; and a span head goes with its decoder.
            for path in (os.path.join(settings["adapter"], name) for name in (TUNING_NAME, HEAD_NAME)):
                if os.path.isfile(path):
                    shutil.copy(path, folder)
        print(model.merge_report)
        print(f"saved in {output}" + ("" if tokenizer is not None else f", without a tokenizer: {where}"))


def _base_of(settings: dict[str, Any]) -> str:
    """The model that the adapter names as its base."""
    from peft import PeftConfig

    name = PeftConfig.from_pretrained(settings["adapter"], revision=settings.get("revision")).base_model_name_or_path
    if not name:
        raise ValueError(f"{settings['adapter']} does not name its base model: pass --base MODEL")
    return str(name)


def _load(settings: dict[str, Any], source: str, base: dict[str, Any]) -> Any:
    """The adapter on its base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from ..checkpoint import sparse_modules

    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=settings.get("dtype", "auto"), **base)
    if not sparse_modules(model):
        raise ValueError(f"{source} is no sparse model: name the one that the adapter was trained on with --base")
    return PeftModel.from_pretrained(model, settings["adapter"], revision=settings.get("revision"))


def _tokenizer(settings: dict[str, Any], source: str, base: dict[str, Any]) -> tuple[Any, str]:
    """The tokenizer to save: that beside the adapter, or the base's; or None, and why."""
    from transformers import AutoTokenizer

    adapter = settings["adapter"]
    places: list[tuple[str, dict[str, Any]]] = [(source, base)]
    if os.path.isfile(os.path.join(adapter, "tokenizer_config.json")):
        places.insert(0, (adapter, {}))
    if settings.get("tokenizer"):
        places.insert(0, (settings["tokenizer"], {}))
    reason = ""
    for place, arguments in places:
        try:
            return AutoTokenizer.from_pretrained(place, **arguments), ""
        except (OSError, ValueError) as error:
            reason = f"none could be loaded from {place}: {' '.join(str(error).split())}"
    return None, reason
