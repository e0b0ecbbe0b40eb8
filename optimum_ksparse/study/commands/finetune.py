"""`optimum-cli ksparse finetune koalpaca`, and `… korquad`."""

from __future__ import annotations

import os
from dataclasses import fields

from ...adapters import require_peft
from ...commands.base import DTYPES, LOADING_TEXTS, TRUST, Command, usage
from ...pruners.settings import switch
from ..finetuning import FinetuningSettings, KoAlpacaSettings, KorQuADSettings
from ..finetuning.settings import TUNING_METHODS
from ..settings import help_texts

_RESUME = {"resume": switch("go on with an unfinished run, or start over", default=True)}
_LOADING_TEXTS = {name: LOADING_TEXTS[name] for name in ("tokenizer", "dtype", "revision")}


class KoAlpacaCommand(Command):
    SETTINGS: type[FinetuningSettings] = KoAlpacaSettings
    MODELS = ("model", "tokenizer")
    REQUIRED = ("model", "output")
    WORDS = {
        "model": "folder or Hub id of a sparse (or a dense) model",
        "output": "folder for the adapter or the model",
    }
    SWITCHES = {"overwrite": "replace a finished run in the output", **TRUST}
    FLAGS = ((help_texts(SETTINGS), SETTINGS), (_RESUME,), (_LOADING_TEXTS,))
    CHOICES = {"method": TUNING_METHODS, "dtype": DTYPES}

    def execute(self) -> None:
        given = self.settings()
        with usage():
            settings = self.SETTINGS(**{f.name: given.pop(f.name) for f in fields(self.SETTINGS) if f.name in given})
        require_peft()
        from ..finetuning.run import finetune  # needs PEFT

        model, tokenizer, output = given.pop("model"), given.pop("tokenizer", None), given.pop("output")
        results = finetune(model, tokenizer, settings, output, **given).get("results")
        if results:
            print(f"exact match {results['exact_match']:.2f}, F1 {results['f1']:.2f} of {results['num_samples']}")
        if os.environ.get("RANK", "0") == "0":
            print(f"saved in {output}")


class KorQuADCommand(KoAlpacaCommand):
    SETTINGS = KorQuADSettings
    FLAGS = ((help_texts(SETTINGS), SETTINGS), *KoAlpacaCommand.FLAGS[1:])
