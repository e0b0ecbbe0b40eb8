"""What the tasks of `optimum-cli ksparse finetune` share."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from typing import Any, ClassVar

from .base import Command, add_flags, boolean, load_checkpoint, read_settings

# Settings of FinetuningSettings as flags: name → argparse arguments. Defaults are FinetuningSettings' own.
SETTINGS_FLAGS: dict[str, dict[str, Any]] = {
    "method": {"help": "lora, masked, dora, hira, or full (the sparse weights themselves)"},
    "r": {"type": int, "help": "rank of the adapter"},
    "alpha": {"type": int, "help": "scale of the adapter: its delta is alpha / r · BA"},
    "dropout": {"type": float, "help": "of the adapter"},
    "target_modules": {"nargs": "+", "help": "linear maps to adapt (default: all of the decoder blocks)"},
    "learning_rate": {"type": float, "help": "at its highest, after the warm-up"},
    "warmup_steps": {"type": int, "help": "steps over which the learning rate rises"},
    "batch_size": {"type": int, "help": "examples a step"},
    "micro_batch_size": {"type": int, "help": "examples in one forward pass"},
    "num_epochs": {"type": float, "help": "passes over the examples"},
    "max_steps": {"type": int, "help": "ends earlier"},
    "seed": {"type": int, "help": "of the order of examples, of dropout and of new weights"},
    "bf16": {"type": boolean, "help": "matrix products in bfloat16, for weights in float32"},
    "gradient_checkpointing": {"type": boolean, "help": "less memory for activations, more time"},
    "save_steps": {"type": int, "help": "steps from one checkpoint to the next"},
}
_RUN_FLAGS: dict[str, dict[str, Any]] = {
    "tokenizer": {"help": "name or folder, where it is not beside the model"},
    "max_examples": {"type": int, "help": "use the first ones alone"},
    "resume": {"type": boolean, "help": "go on with an unfinished run (default), or start over"},
    "overwrite": {"type": boolean, "help": "replace a finished run in the output"},
    "dtype": {"help": "float32, bfloat16, float16, or auto (default: the checkpoint's)"},
    "revision": {"help": "branch, tag or commit of the model"},
    "trust_remote_code": {"type": boolean, "help": "run the code that comes with the model"},
}


class TaskCommand(Command):
    """A subcommand: `FLAGS` are those of its task, `finetune` does it."""

    NAME: ClassVar[str]
    FLAGS: ClassVar[dict[str, dict[str, Any]]]

    @classmethod
    def parse_args(cls, parser: ArgumentParser) -> None:
        parser.add_argument("model", nargs="?", help="folder or Hub id of a sparse (or a dense) model")
        parser.add_argument("output", nargs="?", help="folder for the adapter or the model")
        parser.add_argument("--config", metavar="RECIPE", help="YAML file with any of these settings; flags override")
        add_flags(parser, cls.FLAGS, SETTINGS_FLAGS, _RUN_FLAGS)

    def finetune(self, model: str, loading: dict[str, Any], output: str, settings: Any, more: dict[str, Any]) -> None:
        """Loads the model and trains it.

        Args:
            loading: settings of `load_checkpoint`, and `tokenizer`.
            settings: a `FinetuningSettings`.
            more: flags of the task, and `max_examples`, `resume` and `overwrite`, where they were given.
        """
        raise NotImplementedError

    def execute(self) -> None:
        given = read_settings(self.args, ["model", "output", *self.FLAGS, *SETTINGS_FLAGS, *_RUN_FLAGS])
        for name in ("model", "output"):
            if not given.get(name):
                usage = f"optimum-cli ksparse finetune {self.NAME} MODEL OUTPUT [--config recipe.yaml]"
                raise ValueError(f"{name} is missing: {usage}")

        from ..finetuning import FinetuningSettings, require_peft

        settings = FinetuningSettings(**{name: given.pop(name) for name in SETTINGS_FLAGS if name in given})
        if settings.method != "full":
            require_peft()
        model, output = given.pop("model"), given.pop("output")
        names = ("tokenizer", "dtype", "revision", "trust_remote_code")
        loading = {name: given.pop(name) for name in names if name in given}
        self.finetune(model, loading, output, settings, given)
        if os.environ.get("RANK", "0") == "0":
            print(f"saved in {output}")


def load_with_tokenizer(model: str, loading: dict[str, Any]) -> tuple[Any, Any]:
    """The causal LM, and its tokenizer."""
    from ..calibration.tokenizer import read_tokenizer

    names = ("revision", "trust_remote_code") if "tokenizer" not in loading else ("trust_remote_code",)
    how = {name: loading[name] for name in names if name in loading}
    return load_checkpoint(model, loading), read_tokenizer(loading.get("tokenizer", model), **how)
