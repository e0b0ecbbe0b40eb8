"""`optimum-cli ksparse bench`."""

from __future__ import annotations

from ...commands.base import TRUST, Command
from ...commands.parser import Parser, add_settings, add_switches

_TEXTS = {
    "models": "shapes of models by name: {models} (default: all)",
    "shapes": "further shapes as OUTxIN, such as 4096x11008 (default: none)",
    "tokens": "in a product",
    "patterns": "2:4 and 4:8 (default: both; a checkpoint's own)",
    "dtype": "of weights (default: bfloat16; a checkpoint's own)",
    "whole_models": "models by name to run whole, with random weights (default: none)",
    "layers": "blocks of a whole model (default: as many as it has)",
    "prompt_tokens": "of the prefill of a whole model",
    "optimize_for": "of a whole model",
    "device": "cuda where there is one, otherwise cpu",
    "revision": "branch, tag or commit of the checkpoint (default: main)",
    "output": "folder for results.json and speedup.png",
}


class BenchCommand(Command):
    @classmethod
    def add_arguments(cls, parser: Parser) -> None:
        from ..benchmark import MODELS, BenchSettings
        from ..benchmark.run import DTYPES, OPTIMIZE_FOR

        parser.add_argument("checkpoint", nargs="?", help="folder or Hub id of a sparse model")
        texts = {name: text.format(models=", ".join(MODELS)) for name, text in _TEXTS.items()}
        add_settings(parser, BenchSettings, texts, choices={"dtype": DTYPES, "optimize_for": OPTIMIZE_FOR})
        add_switches(parser, TRUST)

    def execute(self) -> None:
        from ..benchmark import BenchSettings, run

        settings = self.settings()
        print(run(settings.pop("checkpoint", None), **settings))
        print(f"written to {settings.get('output', BenchSettings.output)}")
