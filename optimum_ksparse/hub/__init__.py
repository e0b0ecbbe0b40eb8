"""The Hub: report and results → card → push."""

from .push import check_target, push_model
from .sources import choose_baseline, choose_tokenizer
from .writing import CARD_NAME, check_language, current_results, is_adapter, read_card, without_peft, write_card

__all__ = [
    "CARD_NAME",
    "check_language",
    "check_target",
    "choose_baseline",
    "choose_tokenizer",
    "current_results",
    "is_adapter",
    "push_model",
    "read_card",
    "without_peft",
    "write_card",
]
