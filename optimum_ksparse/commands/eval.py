"""`optimum-cli ksparse eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .base import LOADING_TEXTS, TRUST, Command, add_loading, load_checkpoint
from .parser import Parser, add_switches
from .protocol import add_protocol, protocol_of

# Folders whose results are taken over: as the dense column, as rows after tuning, and as those before it.
_TAKEN = {
    "baseline_results": "take the dense column from the evaluation_results.json of a dense model, tuned as this one "
    "was, say",
    "tuned_results": "take rows after tuning from the output of `finetune korquad` on this model",
    "before_results": "take rows before tuning from the folder of the model that this one was tuned from",
}


class EvalCommand(Command):
    MODELS = ("checkpoint", "baseline", "tokenizer")
    REQUIRED = ("checkpoint",)

    @classmethod
    def add_arguments(cls, parser: Parser) -> None:
        parser.add_argument("checkpoint", nargs="?", help="folder or Hub id of a sparse (or a dense) model")
        parser.add_argument(
            "--baseline",
            nargs="?",
            const=True,
            metavar="MODEL",
            help="measure the dense model too: the recorded one, or this folder or Hub id",
        )
        for name, text in _TAKEN.items():
            parser.add_argument(f"--{name.replace('_', '-')}", metavar="FOLDER", help=text)
        parser.add_argument("--config", metavar="RECIPE", help="YAML file with any of these settings; flags override")
        parser.add_argument(
            "--output", metavar="FOLDER", help="for evaluation_results.json (default: the checkpoint's folder)"
        )
        add_switches(parser, {"overwrite": "discard results of other weights, and write into any folder", **TRUST})
        add_loading(parser, LOADING_TEXTS)
        add_protocol(parser)

    def execute(self) -> None:
        settings = self.settings()
        protocol = protocol_of(settings)

        from ..checkpoint import facts_of, fingerprint, sparse_modules
        from ..checkpoint.staging import check_output
        from ..evaluation import EvaluationResults, evaluate_baseline, evaluate_model, results_table
        from ..hub import choose_baseline, choose_tokenizer
        from ..records import RESULTS_NAME

        checkpoint, baseline = settings["checkpoint"], settings.get("baseline")
        output = Path(settings.get("output") or _folder_of(checkpoint))
        if output.resolve() != Path(checkpoint).resolve():
            check_output(output, ours=(RESULTS_NAME,), overwrite=settings.get("overwrite", False))
        known = EvaluationResults.load(output / RESULTS_NAME) if (output / RESULTS_NAME).is_file() else None
        folders = [settings.get(name) for name in _TAKEN]
        column, tuned, before = (EvaluationResults.load(Path(f) / RESULTS_NAME) if f else None for f in folders)
        if column:
            EvaluationResults("").take_baseline(column)  # what cannot be one is refused before the work
        model = load_checkpoint(checkpoint, settings)
        if tuned:
            EvaluationResults(fingerprint(model)).take_tuned(tuned)
        if known is not None:
            if known.fingerprint == fingerprint(model):
                facts_of(model).results = known
            elif not settings.get("overwrite"):
                raise ValueError(
                    f"{output / RESULTS_NAME} holds results of other weights, or of another dtype: move it away, or "
                    "discard it with --overwrite"
                )
        if baseline and not sparse_modules(model):
            raise ValueError("the model is dense: it is its own baseline, measure it without --baseline")
        dense = choose_baseline(model, None if baseline is True else baseline, None) if baseline else None
        trusted = settings.get("trust_remote_code")
        tokenizer = choose_tokenizer(model, settings.get("tokenizer"), base=dense, trust_remote_code=trusted)
        assert tokenizer is not None  # only tokenizer=False leaves it out
        output.mkdir(parents=True, exist_ok=True)

        def keep(results: EvaluationResults) -> None:
            results.save(output)

        results = evaluate_model(model, tokenizer, protocol, on_measured=keep)
        if before is not None:
            results.take_before(before)
        if tuned:
            results.take_tuned(tuned)
        if column:
            results.take_baseline(column)
        if dense is not None:
            how: dict[str, Any] = {
                "like": type(model),
                "dtype": model.dtype,
                "device": settings.get("device_map") or model.device,
                "num_parameters": getattr(facts_of(model).report, "num_parameters", None),
            }
            del model  # the dense model has the machine to itself
            evaluate_baseline(results, dense, tokenizer, protocol, on_measured=keep, **how)
        keep(results)
        print(results_table(results))
        print(f"written to {output / RESULTS_NAME}")


def _folder_of(checkpoint: str) -> str:
    """A local checkpoint's own folder; for one on the Hub a folder of its name here."""
    return checkpoint if Path(checkpoint).is_dir() else checkpoint.split("/")[-1]
