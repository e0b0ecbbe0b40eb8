"""What the tasks of `optimum-cli ksparse finetune` share."""

from __future__ import annotations

import os
from typing import Any

from ...commands.base import LOADING_TEXTS, TRUST, Command, add_loading, load_checkpoint, usage
from ...commands.parser import Parser, add_settings, add_switches

# Settings of FinetuningSettings, whose types and defaults they have.
SETTINGS_TEXTS = {
    "method": "masked: LoRA whose delta keeps the mask; full: the sparse weights themselves",
    "r": "rank of the adapter",
    "alpha": "scale of the adapter: its delta is alpha / r · BA",
    "dropout": "of the adapter",
    "target_modules": "linear maps to adapt (default: all of the decoder blocks)",
    "learning_rate": "at its highest, after the warm-up",
    "warmup_steps": "steps over which the learning rate rises",
    "batch_size": "examples a step",
    "micro_batch_size": "examples in one forward pass",
    "num_epochs": "passes over the examples",
    "max_steps": "ends earlier (default: after the passes)",
    "seed": "of the order of examples, of dropout and of new weights",
    "bf16": "matrix products in bfloat16, for weights in float32",
    "gradient_checkpointing": "less memory for activations, more time",
    "save_steps": "steps from one checkpoint to the next",
}
_DATA = ("data", "train_file", "eval_file")
_LOADING = ("tokenizer", "dtype", "revision", "trust_remote_code")


class TaskCommand(Command):
    """A subcommand: `add_task` adds the flags of its task, `finetune` does it."""

    MODELS = ("model", "tokenizer")
    REQUIRED = ("model", "output")

    @classmethod
    def add_task(cls, parser: Parser) -> None:
        raise NotImplementedError

    @classmethod
    def add_arguments(cls, parser: Parser) -> None:
        from ..finetuning import FinetuningSettings
        from ..finetuning.koalpaca import finetune_koalpaca
        from ..finetuning.settings import METHODS

        parser.add_argument("model", nargs="?", help="folder or Hub id of a sparse (or a dense) model")
        parser.add_argument("output", nargs="?", help="folder for the adapter or the model")
        parser.add_argument("--config", metavar="RECIPE", help="YAML file with any of these settings; flags override")
        cls.add_task(parser)
        add_settings(parser, FinetuningSettings, SETTINGS_TEXTS, choices={"method": METHODS})
        add_settings(
            parser,
            finetune_koalpaca,
            {
                "max_examples": "use the first ones alone (default: all)",
                "resume": "go on with an unfinished run, or start over",
            },
        )
        add_switches(parser, {"overwrite": "replace a finished run in the output", **TRUST})
        add_loading(parser, {name: LOADING_TEXTS[name] for name in _LOADING if name in LOADING_TEXTS})

    def finetune(self, model: str, loading: dict[str, Any], output: str, settings: Any, more: dict[str, Any]) -> None:
        """Loads the model and trains it.

        Args:
            loading: settings of `load_checkpoint`, and `tokenizer`.
            settings: a `FinetuningSettings`.
            more: flags of the task, and `max_examples`, `resume` and `overwrite`, where they were given.
        """
        raise NotImplementedError

    def execute(self) -> None:
        given = self.settings()

        from ...adapters import require_peft
        from ..finetuning import FinetuningSettings
        from ..finetuning.runs import claimed_output

        with usage():
            settings = FinetuningSettings(**{name: given.pop(name) for name in SETTINGS_TEXTS if name in given})
        if settings.method != "full":
            require_peft()
        model, output = given.pop("model"), given.pop("output")
        loading = {name: given.pop(name) for name in _LOADING if name in given}
        reads = (model, *(given.get(name) for name in _DATA), loading.get("tokenizer"))
        with claimed_output(output, reads, overwrite=given.get("overwrite", False)):
            self.finetune(model, loading, output, settings, given)
        if os.environ.get("RANK", "0") == "0":
            print(f"saved in {output}")


def load_with_tokenizer(model: str, loading: dict[str, Any]) -> tuple[Any, Any]:
    """The model, and its tokenizer."""
    from ...data.tokenizer import read_tokenizer

    names = ("revision", "trust_remote_code") if "tokenizer" not in loading else ("trust_remote_code",)
    how = {name: loading[name] for name in names if name in loading}
    return load_checkpoint(model, loading), read_tokenizer(loading.get("tokenizer", model), **how)
