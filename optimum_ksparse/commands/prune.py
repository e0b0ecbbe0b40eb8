"""`optimum-cli ksparse prune`."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from dataclasses import asdict
from typing import Any

from .base import Command, add_flags, boolean, dataset, read_recipe

# Settings of SparsityConfig as flags: name → argparse arguments. Defaults are SparsityConfig's own.
_FLAGS: dict[str, dict[str, Any]] = {
    "method": {"help": "admm (default), sparsegpt, alps, wanda, magnitude, or auto: the best within --time-budget"},
    "time_budget": {"type": float, "help": "with auto: seconds that pruning may take (default: any)"},
    "refine": {"nargs": "+", "help": "what follows the method: swaps (a better mask), exact (the best weights on it)"},
    "reconstruct": {"help": "block: tune each block to its dense outputs; slower, much more accurate"},
    "reconstruction_epochs": {"type": int, "help": "passes over the calibration samples for that"},
    "reconstruction_lr": {"type": float, "help": "learning rate of that, as a share of each tensor's size"},
    "activations": {"help": "calibration inputs and targets: pruned, dense or mixed (default: the measured best)"},
    "pattern": {
        "help": '"2:4", "4:8", any "n:m" (n nonzero weights in every m), a share of zeros such as "50%%", the '
        'same of whole blocks of outputs x inputs such as "50%%/32x32", or "none", with --drop-layers'
    },
    "drop_layers": {"type": int, "help": "decoder blocks to drop first: those that change the hidden states least"},
    "allocation": {"help": "uniform (default), or owl: each layer its own pattern, by what it would lose"},
    "target_density": {"type": float, "help": "with owl and n:m: mean share of weights to store, such as 0.6"},
    "dataset": {
        "type": dataset,
        "help": "calibration text: mc4-ko, c4, kowiki, self, a .txt or .jsonl file, or a mix: mc4-ko=0.5,self=0.5",
    },
    "tokenizer": {"help": "name or folder, where it is not the model's own"},
    "num_samples": {"type": int, "help": "calibration sequences"},
    "seq_len": {"type": int, "help": "tokens in each of them"},
    "batch_size": {"type": int, "help": "sequences in one forward pass"},
    "calibration_dtype": {"help": "bfloat16: dtype of matrix products while calibrating (default: the weights')"},
    "seed": {"type": int, "help": "draws documents and crops"},
    "block_size": {"type": int, "help": "columns swept at a time by sparsegpt"},
    "damping": {"type": float, "help": "of the Gram matrix (default: the method's own)"},
    "iterations": {"type": int, "help": "of admm, and at most of alps"},
    "true_sequential": {"type": boolean, "help": "collect statistics anew for each group of layers in a block"},
    "modules_to_not_convert": {"nargs": "+", "help": "linear maps to leave dense"},
    "skip_unsupported": {"type": boolean, "help": "leave what cannot be pruned dense, instead of an error"},
    "storage": {"help": "packed or dense"},
    "prepend_bos": {"type": boolean, "help": "begin each sequence with the beginning token"},
    "bos_in_statistics": {"type": boolean, "help": "count its position in the statistics"},
}
_LOADING_FLAGS: dict[str, dict[str, Any]] = {
    "dtype": {"help": "float32, bfloat16, float16, or auto (default: the checkpoint's)"},
    "device_map": {"help": "as in from_pretrained: auto, cpu, cuda:0, …"},
    "revision": {"help": "branch, tag or commit of the model"},
    "gguf_file": {"help": "the GGUF file in the model's folder or repository"},
    "max_shard_size": {"help": "of the saved files, such as 5GB; with --stream a file is a block"},
}
_STREAM_FLAGS: dict[str, dict[str, Any]] = {
    "resume": {"type": boolean, "help": "with --stream: go on with an unfinished run (default), or start over"},
    "device": {"help": "with --stream: where blocks run: cpu, cuda:0, … (default: a GPU where there is one)"},
    "activation_memory": {"help": "with --stream: calibration activations to keep in memory, such as 4GB (default)"},
}
_SWITCHES = {
    "trust_remote_code": "run the code that comes with the model",
    "stream": "prune block by block from disk to disk: for models beyond memory; can be resumed",
    "json": "progress and report as a line of JSON each, for machines",
}


class PruneCommand(Command):
    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("model", nargs="?", help="Hub id or folder")
        parser.add_argument("output", nargs="?", help="folder to write the sparse checkpoint to")
        parser.add_argument(
            "--config", metavar="RECIPE", help="YAML file with any of these settings; flags override it"
        )
        for name, text in _SWITCHES.items():
            parser.add_argument(f"--{name.replace('_', '-')}", dest=name, action="store_const", const=True, help=text)
        add_flags(parser, _FLAGS, _LOADING_FLAGS, _STREAM_FLAGS)

    def execute(self) -> None:
        settings = self._settings()
        missing = [name for name in ("model", "output") if not settings.get(name)]
        if missing:
            raise ValueError(f"{missing[0]} is missing: optimum-cli ksparse prune MODEL OUTPUT [--config recipe.yaml]")
        model, output = settings.pop("model"), settings.pop("output")
        stream, as_json = settings.pop("stream", False), settings.pop("json", False)
        names = [name for name in (*_LOADING_FLAGS, *_STREAM_FLAGS, "trust_remote_code") if name in settings]
        loading = {name: settings.pop(name) for name in names}
        foreign = ("device_map", "gguf_file", "max_shard_size") if stream else tuple(_STREAM_FLAGS)
        for name in foreign:
            if name in loading:
                raise ValueError(f"{name} has no meaning with{'' if stream else 'out'} --stream; leave it out")

        from ..config import SparsityConfig
        from ..distributed import joined
        from ..progress import listening

        config = SparsityConfig(**settings)
        prune = self._stream if stream else self._prune
        with joined() as processes:
            shown = processes.is_main
            with listening(_print_json if as_json and shown else None):
                report = prune(model, output, config, loading, shown)
        if shown:
            print(json.dumps({"event": "done", "output": output, **asdict(report)}) if as_json else report)
            print(f"saved in {output}", file=sys.stderr if as_json else sys.stdout)

    def _stream(self, model: str, output: str, config: Any, loading: dict[str, Any], shown: bool) -> Any:
        from ..api import prune_checkpoint

        return prune_checkpoint(model, output, config, **loading)

    def _prune(self, model_name: str, output: str, config: Any, loading: dict[str, Any], shown: bool) -> Any:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from ..staging import staged

        save = {"max_shard_size": loading.pop("max_shard_size")} if "max_shard_size" in loading else {}
        if shown:
            with staged(output):  # an output that cannot be written to is an error before the work, not after it
                pass
        model = AutoModelForCausalLM.from_pretrained(model_name, sparsity_config=config, **loading)
        if not shown:
            return model.sparsity_report
        model.save_pretrained(output, **save)
        names = ("revision", "gguf_file", "trust_remote_code")
        try:
            tokenizer = AutoTokenizer.from_pretrained(model_name, **{k: loading[k] for k in names if k in loading})
        except (OSError, ValueError) as error:
            print(f"{output} has no tokenizer: none could be loaded from {model_name}: {error}", file=sys.stderr)
        else:
            tokenizer.save_pretrained(output)
        return model.sparsity_report

    def _settings(self) -> dict[str, Any]:
        """The recipe's settings, overridden by the flags that were given."""
        allowed = ["model", "output", *_SWITCHES, *_FLAGS, *_LOADING_FLAGS, *_STREAM_FLAGS]
        recipe = read_recipe(self.args.config, allowed) if self.args.config else {}
        given: dict[str, Any] = {name: getattr(self.args, name) for name in allowed}
        # One path with a recipe that names the model is the output.
        if given["model"] and not given["output"] and recipe.get("model") and not recipe.get("output"):
            given["model"], given["output"] = None, given["model"]
        return {**recipe, **{name: value for name, value in given.items() if value is not None}}


def _print_json(done: Any) -> None:
    print(json.dumps({"event": "block", **asdict(done)}), flush=True)
