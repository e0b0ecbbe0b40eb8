"""The Hub: report and results → card → push."""

from .metadata import card_of_source, tag_model
from .push import push_model
from .sources import choose_tokenizer
from .subject import is_adapter, is_ours
from .writing import CARD_NAME, LANGUAGES, check_repository, check_target, read_card, write_card, write_trained_card
