"""`optimum-cli ksparse card`."""

from __future__ import annotations

from .base import TRUST, Command, folder_of, load_checkpoint, usage
from .parser import Parser, add_switches


class CardCommand(Command):
    MODELS = ()

    @classmethod
    def add_arguments(cls, parser: Parser) -> None:
        from ..hub import LANGUAGES

        parser.add_argument("checkpoint", help="folder of a sparse checkpoint, or of an adapter on one")
        parser.add_argument("--language", choices=list(LANGUAGES), help="of the card (default: en)")
        parser.add_argument("--repo-id", metavar="USER/NAME", help="under which it is (to be) published")
        parser.add_argument("--tags", nargs="+", metavar="TAG", help="further tags")
        add_switches(parser, TRUST)

    def execute(self) -> None:
        from ..hub import check_repository, write_card

        settings = self.settings()
        folder = folder_of(settings.pop("checkpoint"))
        with usage():
            if "repo_id" in settings:
                check_repository(settings["repo_id"])
        model = load_checkpoint(folder, {"trust_remote_code": settings.pop("trust_remote_code", None)})
        print(f"written: {write_card(model, folder, **settings)}")
