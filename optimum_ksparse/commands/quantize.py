"""`optimum-cli ksparse quantize`."""

from __future__ import annotations

from ..api import prune_checkpoint
from ..config import CHOICES, FOREIGN_RECORD, SparsityConfig
from .base import DTYPES, LOADING_TEXTS, OVERWRITE, TRUST, Command, usage
from .prune import SETTINGS_TEXTS

_SETTINGS = ("values", "group_size", "storage")
_VALUES_TEXTS = {
    "values": "what to quantise the kept values to: int8, or int4",
    "storage": "packed; dense: zeros written out, which loads everywhere",
}
_TEXTS = {"dtype": LOADING_TEXTS["dtype"], "revision": LOADING_TEXTS["revision"]}
_STREAM_TEXTS = {
    "resume": "go on with an unfinished run, or start over",
    "device": "where it is done: cpu, cuda:0, … (default: a GPU where there is one)",
}


class QuantizeCommand(Command):
    MODELS = ("source",)
    REQUIRED = ("source", "output", "values")
    WORDS = {
        "source": "Hub id or folder of a sparse model: of this package, of compressed-tensors, or dense with zeros",
        "output": "folder to write the checkpoint with quantised values to",
    }
    SWITCHES = {**OVERWRITE, **TRUST}
    FLAGS = {
        "values": ({**{name: SETTINGS_TEXTS[name] for name in _SETTINGS}, **_VALUES_TEXTS}, SparsityConfig),
        "loading": (_TEXTS,),
        "how to run": (_STREAM_TEXTS, prune_checkpoint),
    }
    CHOICES = {**CHOICES, "storage": ("packed", "dense"), "dtype": DTYPES}
    EXAMPLE = "polyglot-ko-5.8b-2of4 polyglot-ko-5.8b-2of4-int8 --values int8"

    def execute(self) -> None:
        settings = self.settings()
        source, output = settings.pop("source"), settings.pop("output")
        with usage():
            given = {name: settings.pop(name) for name in _SETTINGS if name in settings}
            config = SparsityConfig(FOREIGN_RECORD["method"], **given)
        report = prune_checkpoint(source, output, config, **settings)
        print(report, f"saved in {output}", sep="\n")
