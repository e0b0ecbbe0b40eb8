"""The Hub: report and results → card → push."""

from .metadata import card_of_source, tag_model
from .models import current_results, is_adapter, is_ours
from .push import check_target, push_model
from .sources import choose_baseline, choose_tokenizer
from .writing import CARD_NAME, check_language, read_card, write_card, write_trained_card

__all__ = [
    "CARD_NAME",
    "card_of_source",
    "check_language",
    "check_target",
    "choose_baseline",
    "choose_tokenizer",
    "current_results",
    "is_adapter",
    "is_ours",
    "push_model",
    "read_card",
    "tag_model",
    "write_card",
    "write_trained_card",
]
