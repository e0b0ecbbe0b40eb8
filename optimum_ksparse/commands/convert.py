"""`optimum-cli ksparse convert`."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from ..api import prune_checkpoint
from ..checkpoint import is_our_record, sparse_modules
from ..checkpoint.staging import check_output, staged
from ..config import CHOICES, FOREIGN_RECORD, SparsityConfig, recorded_settings
from ..records import COMPRESSED_TENSORS
from .base import LOADING_TEXTS, OVERWRITE, TRUST, Command, copy_tuning, load_checkpoint

_TEXTS = {
    "to": "packed; dense: zeros written out; compressed-tensors: as its versions up to 0.14 read it (default: packed)",
    "revision": LOADING_TEXTS["revision"],
}
_STREAM_TEXTS = {"resume": "go on with an unfinished run, or start over"}


class ConvertCommand(Command):
    MODELS = ("source",)
    REQUIRED = ("source", "output")
    WORDS = {
        "source": "Hub id or folder of a sparse model: of this package, of compressed-tensors, or dense with zeros",
        "output": "folder to write the converted checkpoint to",
    }
    SWITCHES = {**OVERWRITE, **TRUST}
    FLAGS = {"format and source": (_TEXTS,), "how to run": (_STREAM_TEXTS, prune_checkpoint)}
    EXAMPLE = "polyglot-ko-5.8b-2of4 polyglot-ko-5.8b-2of4-dense --to dense"
    CHOICES = {"to": CHOICES["storage"]}

    def execute(self) -> None:
        settings = self.settings()
        source, output, storage = settings.pop("source"), settings.pop("output"), settings.pop("to", "packed")
        values, _ = PreTrainedConfig.get_config_dict(source, revision=settings.get("revision"))
        recorded = recorded_settings(values)
        if is_our_record(recorded) and recorded != FOREIGN_RECORD:
            report = self._save_anew(source, output, storage, settings)
        else:
            config = SparsityConfig(FOREIGN_RECORD["method"], storage=storage)
            report = prune_checkpoint(source, output, config, device="cpu", **settings)
        print(*filter(None, [report, f"saved in {output}"]), sep="\n")

    def _save_anew(self, source: str, output: str, storage: str, settings: dict[str, Any]) -> Any:
        """One of this package's own, with all that it records, by way of the memory."""
        check_output(output, reads=(source,), overwrite=settings.get("overwrite", False))
        model = load_checkpoint(source, settings)
        if not sparse_modules(model):
            raise ValueError(f"{source} holds no sparse weights, though its config says so: convert a copy that does")
        if storage == COMPRESSED_TENSORS:
            model.dequantize_values()  # it has no other ones
        model.config.quantization_config.storage = storage
        where = {name: settings[name] for name in ("revision", "trust_remote_code") if name in settings}
        with staged(output) as folder:
            self.save_tokenizer(source, folder, output, **where)
            model.save_pretrained(folder)
            copy_tuning(source, folder)
        return getattr(model, "sparsity_report", None)
