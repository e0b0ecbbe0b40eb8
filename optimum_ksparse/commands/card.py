"""`optimum-cli ksparse card`."""

from __future__ import annotations

from ..hub import LANGUAGES, check_repository, push_model, write_card
from .base import TRUST, Command, folder_of, load_checkpoint, usage

_TEXTS = {"language": "of the card", "tags": "further tags (default: none)"}
_REPO_ID = {"repo_id": "user/name under which it is (to be) published"}


class CardCommand(Command):
    MODELS = ()
    REQUIRED = ("checkpoint",)
    WORDS = {"checkpoint": "folder of a sparse checkpoint, or of an adapter on one"}
    SWITCHES = TRUST
    FLAGS = ((_TEXTS, push_model), (_REPO_ID,))
    CHOICES = {"language": LANGUAGES}

    def execute(self) -> None:
        settings = self.settings()
        folder = folder_of(settings.pop("checkpoint"))
        with usage():
            if "repo_id" in settings:
                check_repository(settings["repo_id"])
        model = load_checkpoint(folder, {"trust_remote_code": settings.pop("trust_remote_code", None)})
        print(f"written: {write_card(model, folder, **settings)}")
