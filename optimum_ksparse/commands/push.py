"""`optimum-cli ksparse push`."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from .base import Command, add_flags, load_checkpoint, read_settings
from .protocol import LOADING_FLAGS, PROTOCOL_FLAGS, protocol_of

_OPTIONS = ("private", "revision", "create_pr", "commit_message", "language", "dense_revision", "baseline")


class PushCommand(Command):
    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("checkpoint", nargs="?", help="folder of a sparse checkpoint, or of an adapter on one")
        parser.add_argument("repo_id", nargs="?", help="user/name; the token is that of `hf auth login` or HF_TOKEN")
        parser.add_argument("--config", metavar="RECIPE", help="YAML file with any of these settings; flags override")
        parser.add_argument("--private", action="store_const", const=True, help="make the repository private")
        parser.add_argument("--revision", help="branch to push to")
        parser.add_argument(
            "--create-pr", dest="create_pr", action="store_const", const=True, help="as a pull request"
        )
        parser.add_argument("--commit-message", dest="commit_message")
        parser.add_argument("--language", help="of the card: en (default) or ko")
        parser.add_argument("--tags", nargs="+", help="further tags")
        parser.add_argument(
            "--dense-revision", dest="dense_revision", help="branch for the same weights with their zeros written out"
        )
        parser.add_argument(
            "--evaluate",
            action="store_const",
            const=True,
            help="measure first, the dense base too, by the flags below",
        )
        parser.add_argument(
            "--baseline", metavar="MODEL", help="the dense base, where the recorded one is not at hand"
        )
        parser.add_argument("--trust-remote-code", dest="trust_remote_code", action="store_const", const=True)
        add_flags(parser, PROTOCOL_FLAGS, LOADING_FLAGS)

    def execute(self) -> None:
        own = ["checkpoint", "repo_id", "tags", "evaluate", "trust_remote_code", *_OPTIONS]
        settings = read_settings(self.args, [*own, *PROTOCOL_FLAGS, *LOADING_FLAGS])
        for name in ("checkpoint", "repo_id"):
            if not settings.get(name):
                raise ValueError(f"{name} is missing: optimum-cli ksparse push CHECKPOINT USER/NAME")
        protocol = protocol_of(settings)

        from ..evaluation import EvaluationResults
        from ..finetuning.korquad import HEAD_NAME
        from ..hub import CARD_NAME, check_target, push_model, read_card

        check_target(settings["repo_id"], settings.get("revision"), settings.get("dense_revision"))
        folder = Path(settings["checkpoint"])
        if not folder.is_dir():
            raise FileNotFoundError(f"checkpoint={settings['checkpoint']!r} is no folder; download or save it first")
        if (folder / HEAD_NAME).is_file():
            raise ValueError(
                f"{folder} holds a span head, which is no part of a model of transformers: publish the folder as it "
                "is (hf upload), and its figures on the tuned model's card (ksparse eval MODEL --tuned-results FOLDER)"
            )
        model = load_checkpoint(settings["checkpoint"], settings)
        card = folder / CARD_NAME
        try:
            info = push_model(
                model,
                settings["repo_id"],
                evaluate=protocol if settings.get("evaluate") else False,
                tokenizer=settings.get("tokenizer"),
                tags=settings.get("tags"),
                readme=read_card(card) if card.is_file() else None,
                **{name: settings[name] for name in _OPTIONS if name in settings},
            )
        finally:  # what was measured stays, also where the push failed
            results = getattr(model, "evaluation_results", None)
            if settings.get("evaluate") and isinstance(results, EvaluationResults):
                results.save(folder)
        print(f"published: {info.commit_url}")
