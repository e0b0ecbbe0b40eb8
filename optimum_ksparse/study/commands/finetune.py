"""`optimum-cli ksparse finetune koalpaca`, and `… korquad`."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import ClassVar

from ...commands.base import LOADING_TEXTS, TRUST, Command, add_loading, usage
from ...commands.parser import Parser, add_settings, add_switches, boolean

_LOADING = ("tokenizer", "dtype", "revision", "trust_remote_code")


class KoAlpacaCommand(Command):
    MODELS = ("model", "tokenizer")
    REQUIRED = ("model", "output")
    SETTINGS: ClassVar[str] = "KoAlpacaSettings"

    @classmethod
    def add_arguments(cls, parser: Parser) -> None:
        from .. import finetuning
        from ..finetuning.settings import TUNING_METHODS

        parser.add_argument("model", nargs="?", help="folder or Hub id of a sparse (or a dense) model")
        parser.add_argument("output", nargs="?", help="folder for the adapter or the model")
        parser.add_argument("--config", metavar="RECIPE", help="YAML file with any of these settings; flags override")
        settings = getattr(finetuning, cls.SETTINGS)
        texts = {f.name: f.metadata["help"] for f in fields(settings)}
        add_settings(parser, settings, texts, choices={"method": TUNING_METHODS})
        text = "go on with an unfinished run, or start over (default: true)"
        parser.add_argument("--resume", type=boolean, metavar="true|false", help=text)
        add_switches(parser, {"overwrite": "replace a finished run in the output", **TRUST})
        add_loading(parser, {name: LOADING_TEXTS[name] for name in _LOADING if name in LOADING_TEXTS})

    def execute(self) -> None:
        given = self.settings()

        from ...adapters import require_peft
        from .. import finetuning

        kind = getattr(finetuning, self.SETTINGS)
        with usage():
            settings = kind(**{f.name: given.pop(f.name) for f in fields(kind) if f.name in given})
        require_peft()
        from ..finetuning.run import finetune

        model, tokenizer, output = given.pop("model"), given.pop("tokenizer", None), given.pop("output")
        results = finetune(model, tokenizer, settings, output, **given).get("results")
        if results:
            print(f"exact match {results['exact_match']:.2f}, F1 {results['f1']:.2f} of {results['num_samples']}")
        if os.environ.get("RANK", "0") == "0":
            print(f"saved in {output}")


class KorQuADCommand(KoAlpacaCommand):
    SETTINGS = "KorQuADSettings"
