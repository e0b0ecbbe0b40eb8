"""What a user is told of the text that pruning calibrates on where none was named: it is Korean."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

# Of everyday words, so that a tokenizer that was made on the language has them.
_KOREAN = "오늘은 날씨가 좋아서 친구와 함께 공원에서 점심을 먹고 책을 읽었다."
_ENGLISH = "The weather was good today, so I had lunch in the park with a friend and read a book."
# Tokens for a character: those made on Korean take 0.4 to 0.8, those that cut its characters into bytes more than 1.
_MANY = 1.0


def tell_default_text(dataset: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """One or two sentences on the default calibration text; the second where the tokenizer has little Korean in it."""
    text = f"Calibration text: dataset={dataset!r}, the default, which is Korean."
    korean, english = (_tokens_for_a_character(tokenizer, sample) for sample in (_KOREAN, _ENGLISH))
    if korean is None or english is None or (korean > _MANY and english < korean):
        found = "has no tokens for Korean" if korean is None else f"takes {korean:.1f} tokens for a Korean character"
        text += (
            f" The model's tokenizer {found}: for a model of another language pass text of that language, such as "
            "dataset='c4' (English), or dataset='self'."
        )
    return text


def _tokens_for_a_character(tokenizer: PreTrainedTokenizerBase, text: str) -> float | None:
    """None where some of the text is unknown to the tokenizer."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        return None
    return len(ids) / len(text)
