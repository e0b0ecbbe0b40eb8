"""`optimum-cli ksparse eval`."""

from __future__ import annotations

from operator import methodcaller
from pathlib import Path

from ..checkpoint import facts_of, fingerprint, sparse_modules
from ..checkpoint.staging import check_output
from ..evaluation import EvaluationResults, choose_baseline, evaluate_baseline, evaluate_model, results_table
from ..hub import choose_tokenizer
from ..records import RESULTS_NAME
from .base import LOADING_TEXTS, PROTOCOL, TRUST, Command, load_checkpoint, protocol_of
from .parser import Parser

# Folders whose results are taken over: as the dense column, as rows after tuning, and as those before it.
_TAKEN = {
    "baseline_results": "take the dense column from the evaluation_results.json of the dense model in this folder, "
    "tuned as this one was, say",
    "tuned_results": "take rows after tuning from this folder, the output of `finetune korquad` on this model",
    "before_results": "take rows before tuning from this folder, of the model that this one was tuned from",
}
_OUTPUT = {"output": "folder for evaluation_results.json (default: the checkpoint's folder)"}


class EvalCommand(Command):
    MODELS = ("checkpoint", "baseline", "tokenizer")
    REQUIRED = ("checkpoint",)
    WORDS = {"checkpoint": "folder or Hub id of a sparse (or a dense) model"}
    SWITCHES = {"overwrite": "discard results of other weights, and write into any folder", **TRUST}
    FLAGS = {"results": ({**_TAKEN, **_OUTPUT},), "loading": (LOADING_TEXTS,), "what to measure": PROTOCOL}
    EXAMPLE = "polyglot-ko-5.8b-2of4 --baseline"

    @classmethod
    def add_arguments(cls, parser: Parser) -> None:
        text = "measure the dense model too: the recorded one, or this folder or Hub id"
        parser.add_argument("--baseline", nargs="?", const=True, metavar="MODEL", help=text)
        super().add_arguments(parser)

    def execute(self) -> None:
        settings = self.settings()
        protocol = protocol_of(settings)
        checkpoint, overwrite = settings["checkpoint"], settings.get("overwrite", False)
        # Of a local checkpoint its own folder; for one on the Hub a folder of its name here.
        folder = checkpoint if Path(checkpoint).is_dir() else checkpoint.split("/")[-1]
        output = Path(settings.get("output") or folder)
        if output.resolve() != Path(checkpoint).resolve():
            check_output(output, ours=(RESULTS_NAME,), overwrite=overwrite)
        column, tuned, before = (_results_in(settings[name]) if settings.get(name) else None for name in _TAKEN)
        if column:
            EvaluationResults("").take_baseline(column)  # what cannot be one is refused before the work
        earlier = _results_in(output) if (output / RESULTS_NAME).is_file() else None
        model = load_checkpoint(checkpoint, settings)
        if tuned:
            EvaluationResults(fingerprint(model)).take_tuned(tuned)
        if earlier is not None and earlier.fingerprint == fingerprint(model):
            facts_of(model).results = earlier
        elif earlier is not None and not overwrite:
            raise ValueError(
                f"{output / RESULTS_NAME} holds results of other weights, or of another dtype: move it away, or "
                "discard it with --overwrite"
            )
        baseline = settings.get("baseline")
        if baseline and not sparse_modules(model):
            raise ValueError("the model is dense: it is its own baseline, measure it without --baseline")
        dense = choose_baseline(model, baseline) if baseline else None
        trusted = settings.get("trust_remote_code")
        tokenizer = choose_tokenizer(model, settings.get("tokenizer"), base=dense, trust_remote_code=trusted)
        assert tokenizer is not None  # only tokenizer=False leaves it out
        output.mkdir(parents=True, exist_ok=True)
        keep = methodcaller("save", output)
        results = evaluate_model(model, tokenizer, protocol, on_measured=keep)
        takes = (results.take_baseline, column), (results.take_tuned, tuned), (results.take_before, before)
        for take, rows in reversed(takes):
            if rows is not None:
                take(rows)
        if dense is not None:
            device = settings.get("device_map") or model.device
            del model  # the dense model has the machine to itself
            evaluate_baseline(results, dense, tokenizer, protocol, device=device, on_measured=keep)
        results.save(output)
        print(results_table(results))
        print(f"written to {output / RESULTS_NAME}")


def _results_in(folder: str | Path) -> EvaluationResults:
    return EvaluationResults.load(Path(folder) / RESULTS_NAME)
