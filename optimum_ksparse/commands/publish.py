"""`optimum-cli ksparse card`, which writes a card beside a model, and `push`, which publishes both."""

from __future__ import annotations

from typing import Any

from ..checkpoint import facts_of
from ..hub import CARD_NAME, LANGUAGES, check_repository, check_target, push_model, read_card, write_card
from ..records import HEAD_NAME
from .base import DTYPES, LOADING_TEXTS, PROTOCOL, TRUST, Command, folder_of, load_checkpoint, protocol_of, usage

# Settings of push_model.
_TEXTS = {
    "revision": "branch to push to (default: main)",
    "commit_message": "of the commit (default: what it does)",
    "language": "of the card (default: en)",
    "tags": "further tags (default: none)",
    "dense_revision": "branch for the same weights with their zeros written out (default: none)",
    "baseline": "the dense base, where the recorded one is not at hand (default: that)",
}
_LOADING_TEXTS = {
    **{name: LOADING_TEXTS[name] for name in ("dtype", "device_map")},
    "tokenizer": "name or folder, where it is not beside the model; none: without one",
}
_OPTIONS = (*_TEXTS, "private", "create_pr", "tokenizer", "trust_remote_code")
_REPO_ID = {"repo_id": "user/name under which it is (to be) published"}
_WITHOUT = ("none", "false")  # how flags and recipes write tokenizer=False


class CardCommand(Command):
    MODELS = ()
    REQUIRED = ("checkpoint",)
    WORDS = {"checkpoint": "folder of a sparse checkpoint, or of an adapter on one"}
    SWITCHES = TRUST
    FLAGS = {
        "the card": ({name: _TEXTS[name] for name in ("language", "tags")}, push_model),
        "where the model is published": (_REPO_ID,),
    }
    EXAMPLE = "polyglot-ko-5.8b-2of4 --language ko"
    CHOICES = {"language": LANGUAGES}

    def execute(self) -> None:
        settings = self.settings()
        folder = folder_of(settings.pop("checkpoint"))
        with usage():
            if "repo_id" in settings:
                check_repository(settings["repo_id"])
        model = load_checkpoint(folder, {"trust_remote_code": settings.pop("trust_remote_code", None)})
        print(f"written: {write_card(model, folder, **settings)}")


class PushCommand(Command):
    MODELS = ("baseline", "tokenizer")
    REQUIRED = ("checkpoint", "repo_id")
    WORDS = {
        "checkpoint": "folder of a sparse checkpoint, or of an adapter on one",
        "repo_id": "user/name on the Hub",
    }
    SWITCHES = {
        "private": "make the repository private",
        "create_pr": "publish as a pull request",
        "evaluate": "measure first, the dense base too, by the flags below",
        **TRUST,
    }
    FLAGS = {"publishing": (_TEXTS, push_model), "loading": (_LOADING_TEXTS,), "with --evaluate": PROTOCOL}
    EXAMPLE = "polyglot-ko-5.8b-2of4 me/polyglot-ko-5.8b-2of4"
    CHOICES = {"language": LANGUAGES, "dtype": DTYPES}

    def merged(self, recipe: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """`--tokenizer none` is `tokenizer=False`: None stands for the model's own."""
        settings = super().merged(recipe, given)
        return {**settings, "tokenizer": False} if settings.get("tokenizer") in _WITHOUT else settings

    def execute(self) -> None:
        settings = self.settings()
        protocol = protocol_of(settings)
        with usage():
            check_target(settings["repo_id"], settings.get("revision"), settings.get("dense_revision"))
        folder = folder_of(settings["checkpoint"])
        if (folder / HEAD_NAME).is_file():
            raise ValueError(
                f"{folder} holds a span head, which is no part of a model of transformers: publish the folder as it "
                "is (hf upload), and its figures on the tuned model's card (ksparse eval MODEL --tuned-results FOLDER)"
            )
        how = {name: settings.get(name) for name in ("dtype", "device_map", "trust_remote_code")}
        model = load_checkpoint(settings["checkpoint"], how)
        card = folder / CARD_NAME
        try:
            info = push_model(
                model,
                settings["repo_id"],
                evaluate=protocol if settings.get("evaluate") else False,
                readme=read_card(card) if card.is_file() else None,
                **{name: settings[name] for name in _OPTIONS if name in settings},
            )
        finally:  # what was measured stays, also where the push failed
            results = facts_of(model).results
            if settings.get("evaluate") and results is not None:
                results.save(folder)
        print(f"published: {info.commit_url}")
