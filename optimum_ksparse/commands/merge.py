"""`optimum-cli ksparse merge`."""

from __future__ import annotations

import os
from typing import Any

from ..adapters import require_peft
from ..checkpoint import facts_of, sparse_modules
from ..checkpoint.model_class import load_model
from ..checkpoint.staging import staged
from ..config import SparsityConfig
from ..data import CalibrationData, copy_processor, read_tokenizer
from ..pruners.solve import solve_on_mask
from ..records import printable, recorded_repository
from .base import DTYPES, LOADING_TEXTS, OVERWRITE, TRUST, Command, check_writable, copy_tuning
from .prune import SETTINGS_TEXTS

# Settings of merge_adapter. It cannot be asked for them without PEFT: they have the types of what it passes them to.
_CALIBRATION_TEXTS = {
    "dataset": "calibration text, which solve needs: mc4-ko (Korean web text), c4 (English), kowiki, self, a .txt or "
    ".jsonl file, or a mix: mc4-ko=0.5,self=0.5 (default: none)",
    "tokenizer": "name or folder (default: the base model's own)",
    "seq_len": "tokens in each calibration sequence (default: 512)",
    **{name: SETTINGS_TEXTS[name] for name in ("num_samples", "batch_size", "seed", "prepend_bos")},
}
_SOLVER_TEXTS = {
    "damping": "holds weights near those of masked (default: 0)",
    "max_steps": "steps for each layer, at most",
    "tolerance": "residual at which a row is finished",
}
_TEXTS = {
    "method": "solve: the kept weights make up for what the mask discards (default: masked)",
    "base": "the sparse base model (default: the one on the Hub that the adapter names)",
    "dtype": LOADING_TEXTS["dtype"],
    "revision": "branch, tag or commit of the adapter (default: main)",
    "base_revision": "branch, tag or commit of the base model (default: main)",
    "max_shard_size": "of the saved files, such as 5GB",
}


class MergeCommand(Command):
    MODELS = ("adapter", "base", "tokenizer")
    REQUIRED = ("adapter", "output")
    WORDS = {
        "adapter": "folder or Hub id of an adapter on a sparse model",
        "output": "folder to write the merged checkpoint to",
    }
    SWITCHES = {**OVERWRITE, **TRUST}
    FLAGS = {
        "merging, loading and saving": (_TEXTS,),
        "calibration text": (_CALIBRATION_TEXTS, SparsityConfig),
        "with --method solve": (_SOLVER_TEXTS, solve_on_mask),
    }
    EXAMPLE = "koalpaca-2of4 merged-2of4 --base polyglot-ko-5.8b-2of4 --method solve --dataset kowiki"
    CHOICES = {"method": ("masked", "solve"), "dtype": DTYPES}

    def execute(self) -> None:
        settings = self.settings()
        require_peft()
        from peft import PeftModel

        from ..adapters import merge_adapter

        adapter, output = settings["adapter"], settings["output"]
        reads = [settings.get(name) for name in ("adapter", "base", "tokenizer", "dataset")]
        check_writable(output, reads, settings.get("overwrite", False))
        if os.path.isdir(adapter) and not os.path.isfile(os.path.join(adapter, "adapter_config.json")):
            raise FileNotFoundError(f"adapter={adapter!r} holds no adapter_config.json: name the folder of an adapter")
        source = settings.get("base") or _base_of(settings)
        remote = {"trust_remote_code": "trust_remote_code", "revision": "base_revision"}
        base = {name: settings[setting] for name, setting in remote.items() if settings.get(setting) is not None}
        tokenizer, missing = _tokenizer(settings, source, base)
        merging: dict[str, Any] = {name: settings[name] for name in ("method", "batch_size") if name in settings}
        merging["method_settings"] = {name: settings[name] for name in _SOLVER_TEXTS if name in settings}
        if settings.get("dataset") is not None:
            drawn = {name: settings[name] for name in _CALIBRATION_TEXTS if name in settings and name != "batch_size"}
            merging["dataset"] = CalibrationData(**({"tokenizer": tokenizer, "seq_len": 512} | drawn))
        model = load_model(source, dtype=settings.get("dtype"), **base)
        if not sparse_modules(model):
            raise ValueError(f"{source} is no sparse model: name the one that the adapter was trained on with --base")
        adapted = PeftModel.from_pretrained(model, adapter, revision=settings.get("revision"))
        model = merge_adapter(adapted, **merging)
        save = {name: settings[name] for name in ("max_shard_size",) if name in settings}
        with staged(output) as folder:
            model.save_pretrained(folder, **save)
            copy_processor(source, folder, **base)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            copy_tuning(adapter, folder)  # results of the merged model are those after it
        print(facts_of(model).merge)
        print(f"saved in {output}{missing}")


def _base_of(settings: dict[str, Any]) -> str:
    """The model on the Hub that the adapter names as its base; a folder here is the user's to name."""
    from peft import PeftConfig

    adapter = settings["adapter"]
    name = PeftConfig.from_pretrained(adapter, revision=settings.get("revision")).base_model_name_or_path
    base = recorded_repository(name)
    if base is None:
        raise ValueError(f"{adapter} names no base model on the Hub, but {printable(name)!r}: pass --base MODEL")
    print(f"base model: {base}, which the adapter names")
    return base


def _tokenizer(settings: dict[str, Any], source: str, base: dict[str, Any]) -> tuple[Any, str]:
    """The tokenizer to save: the one that was named, that beside the adapter, or the base's; or None, and why."""
    place, how = settings.get("tokenizer"), {}
    if place is None and os.path.isfile(os.path.join(settings["adapter"], "tokenizer_config.json")):
        place = settings["adapter"]
    elif place is None:
        place, how = source, base
    try:
        return read_tokenizer(place, **how), ""
    except (OSError, ValueError) as error:
        return None, f", without a tokenizer: none could be loaded from {place}: {' '.join(str(error).split())}"
