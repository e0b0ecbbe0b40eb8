"""`optimum-cli ksparse card`."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from .base import Command, load_checkpoint


class CardCommand(Command):
    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("checkpoint", help="folder of a sparse checkpoint, or of an adapter on one")
        parser.add_argument("--language", default="en", help="en or ko")
        parser.add_argument("--repo-id", dest="repo_id", help="user/name under which it is (to be) published")
        parser.add_argument("--tags", nargs="+", help="further tags")
        parser.add_argument("--trust-remote-code", dest="trust_remote_code", action="store_const", const=True)

    def execute(self) -> None:
        from ..hub import check_language, write_card

        if not Path(self.args.checkpoint).is_dir():
            raise FileNotFoundError(f"checkpoint={self.args.checkpoint!r} is no folder; download or save it first")
        check_language(self.args.language)
        model = load_checkpoint(self.args.checkpoint, {"trust_remote_code": self.args.trust_remote_code})
        options = {"language": self.args.language, "repo_id": self.args.repo_id, "tags": self.args.tags}
        print(f"written: {write_card(model, self.args.checkpoint, **options)}")
