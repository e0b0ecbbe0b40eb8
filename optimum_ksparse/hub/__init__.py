"""The Hub: report and results → card → push."""

from .metadata import card_of_source, tag_model
from .names import LANGUAGES, check_repository, check_target
from .push import push_model
from .sources import choose_baseline, choose_tokenizer
from .subject import is_adapter, is_ours
from .writing import CARD_NAME, read_card, write_card, write_trained_card

__all__ = [
    "CARD_NAME",
    "LANGUAGES",
    "card_of_source",
    "check_repository",
    "check_target",
    "choose_baseline",
    "choose_tokenizer",
    "is_adapter",
    "is_ours",
    "push_model",
    "read_card",
    "tag_model",
    "write_card",
    "write_trained_card",
]
