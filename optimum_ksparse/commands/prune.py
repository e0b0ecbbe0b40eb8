"""`optimum-cli ksparse prune`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from ..api import prune_checkpoint, sparsify
from ..checkpoint.model_class import class_for_source
from ..checkpoint.staging import staged
from ..config import CHOICES, FLAT_SETTINGS, METHOD_SETTINGS, SparsityConfig
from ..data import load_tokenizer
from ..pruners import METHODS
from ..pruners.settings import share, whole
from ..pruning import drop_experts, drop_layers
from ..pruning.distributed import joined
from ..pruning.progress import listening
from .base import DTYPES, LOADING_TEXTS, OVERWRITE, TRUST, Command, check_writable, usage
from .errors import UsageError

# Settings of SparsityConfig, whose types and defaults they have.
SETTINGS_TEXTS = {
    "method": "; ".join(f"{name}: {method.summary}" for name, method in METHODS.items()),
    "refine": "what follows the method: swaps (a better mask), exact (the best weights on it) (default: nothing)",
    "reconstruct": "tune each block to its dense outputs; slower, much more accurate (default: do not)",
    "activations": "calibration inputs and targets (default: the measured best)",
    "pattern": "2:4, 4:8, any n:m (n nonzero weights in every m), a share of zeros such as 50%, the same of whole "
    "blocks of outputs x inputs such as 50%/32x32; none prunes nothing, with --drop-layers or --drop-experts "
    "(default: 2:4 where there is a GPU, 50% elsewhere)",
    "values": "quantise the kept values: int8, or int4 (default: as they are)",
    "group_size": "columns of a row that share a scale, a multiple of 64, or -1: all (default: the measured best)",
    "permute": "free: reorder channels first, where that changes nothing, so that n:m loses less (default: do not)",
    "allocation": "owl: each layer its own pattern, by what it would lose",
    "dataset": "calibration text: mc4-ko (Korean web text), c4 (English), kowiki (Korean Wikipedia), self (the model "
    "writes it), a .txt or .jsonl file, or a mix: mc4-ko=0.5,self=0.5 (default: mc4-ko, which is Korean)",
    "tokenizer": "name or folder (default: the model's own)",
    "num_samples": "calibration sequences",
    "seq_len": "tokens in each calibration sequence",
    "batch_size": "calibration sequences in one forward pass",
    "calibration_dtype": "of matrix products while calibrating (default: the weights')",
    "seed": "draws documents and crops",
    "true_sequential": "prune each layer with the inputs that the pruned layers before it in its block give",
    "modules_to_not_convert": "linear maps to leave dense (default: none)",
    "skip_unsupported": "leave what cannot be pruned dense, instead of an error",
    "prune_routers": "prune the layers that route tokens to experts as well",
    "storage": "packed; dense: zeros written out, which loads everywhere; or for compressed-tensors up to 0.14",
    "prepend_bos": "begin each calibration sequence with the beginning token (default: where the tokenizer does)",
}
_LOADING_TEXTS = {
    **{name: LOADING_TEXTS[name] for name in ("dtype", "device_map", "revision")},
    "gguf_file": "the GGUF file in the model's folder or repository (default: its safetensors)",
    "max_shard_size": "of the saved files, such as 5GB; with --stream a file is a block",
}
# Settings of prune_checkpoint.
_STREAM_TEXTS = {
    "resume": "go on with an unfinished run, or start over",
    "device": "where blocks run: cpu, cuda:0, … (default: a GPU where there is one)",
    "activation_memory": "calibration activations to keep in memory",
}
_DROPS: dict[str, Any] = {"drop_layers": drop_layers, "drop_experts": drop_experts}
_DROP_TEXTS = {
    "drop_layers": whole("decoder blocks to drop first: those that change the hidden states least (default: none)"),
    "drop_experts": share("experts of each layer to drop first: those that add least to its output (default: none)"),
}


class PruneCommand(Command):
    MODELS = ("model", "tokenizer")
    REQUIRED = ("model", "output")
    WORDS = {"model": "Hub id or folder", "output": "folder to write the sparse checkpoint to"}
    SWITCHES = {
        **TRUST,
        **OVERWRITE,
        "stream": "prune block by block from disk to disk: for models beyond memory; can be resumed",
        "json": "progress and report as a line of JSON each, for machines",
    }
    FLAGS = {
        "what to prune, and how": (SETTINGS_TEXTS, SparsityConfig),
        "read by one method or step alone": (METHOD_SETTINGS,),
        "before pruning": (_DROP_TEXTS,),
        "loading and saving": (_LOADING_TEXTS,),
        "with --stream": (_STREAM_TEXTS, prune_checkpoint),
    }
    EXAMPLE = "EleutherAI/polyglot-ko-5.8b polyglot-ko-5.8b-2of4 --pattern 2:4"
    CHOICES = {**CHOICES, "dtype": DTYPES}

    def execute(self) -> None:
        settings = self.settings()
        model, output = settings.pop("model"), settings.pop("output")
        stream, as_json = settings.pop("stream", False), settings.pop("json", False)
        self.dropped = {name: settings.pop(name) for name in _DROPS if name in settings}
        self.drops_alone = str(settings.get("pattern", "")).lower() == "none"
        if self.drops_alone and not self.dropped:
            raise UsageError(
                "pattern=none prunes nothing: name a pattern, or drop blocks with --drop-layers, experts with "
                "--drop-experts"
            )
        if self.dropped and stream:
            raise UsageError(
                f"{min(self.dropped)}= needs the whole model in memory: leave out --stream and pass --pattern none, "
                "then prune the model that comes out with --stream"
            )
        if self.drops_alone:
            del settings["pattern"]
        loading = {name: settings.pop(name) for name in list(settings) if name not in FLAT_SETTINGS}
        foreign = ("device_map", "gguf_file", "max_shard_size") if stream else tuple(_STREAM_TEXTS)
        for name in foreign:
            if name in loading:
                raise UsageError(f"{name}= has no meaning with{'' if stream else 'out'} --stream; leave it out")
        with usage():
            for name, value in self.dropped.items():
                _DROP_TEXTS[name].check(name, value)
            config = SparsityConfig.from_flat(**settings)
        print_block = lambda done: print(json.dumps({"event": "block", **asdict(done)}), flush=True)  # noqa: E731
        with joined() as processes:
            shown = processes.is_main
            with listening(print_block if as_json and shown else None):
                if stream:
                    report = prune_checkpoint(model, output, config, **loading)
                else:
                    report = self._prune(model, output, config, loading, shown)
        if shown:
            rows = {} if report is None else asdict(report)
            if as_json or report is not None:
                print(json.dumps({"event": "done", "output": output, **rows}) if as_json else report)
            print(f"saved in {output}", file=sys.stderr if as_json else sys.stdout)

    def _prune(self, source: str, output: str, config: Any, loading: dict[str, Any], shown: bool) -> Any:
        overwrite = loading.pop("overwrite", False)
        save = {"max_shard_size": loading.pop("max_shard_size")} if "max_shard_size" in loading else {}
        if shown:
            check_writable(output, (source, config.tokenizer, config.dataset), overwrite)
        where = {name: loading[name] for name in ("revision", "gguf_file", "trust_remote_code") if name in loading}
        model_class = class_for_source(source, **where)
        if not self.dropped:
            model = model_class.from_pretrained(source, sparsity_config=config, **loading)
        else:
            model = model_class.from_pretrained(source, **loading)
            self._drop(model, config, where)
        report = getattr(model, "sparsity_report", None)
        if not shown:
            return report
        with staged(output) as folder:
            self.save_tokenizer(source, folder, output, **where)
            model.save_pretrained(folder, **save)
        return report

    def _drop(self, model: Any, config: Any, where: Any) -> None:
        """Drops blocks and experts, and prunes what is left unless that is all."""
        tokenizer = load_tokenizer(config.calibration, model.name_or_path, **where)
        names = ("num_samples", "seq_len", "batch_size", "seed", "prepend_bos")
        given = {name: getattr(config, name) for name in names if name in config.given}
        for name, drop in _DROPS.items():
            if name in self.dropped:
                drop(model, self.dropped[name], config.dataset, tokenizer, **given)
        if not self.drops_alone:
            sparsify(model, config, tokenizer)

    def merged(self, recipe: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """One path with a recipe that names the model is the output."""
        if "model" in given and "output" not in given and recipe.get("model") and not recipe.get("output"):
            given["output"] = given.pop("model")
        return {**recipe, **given}
