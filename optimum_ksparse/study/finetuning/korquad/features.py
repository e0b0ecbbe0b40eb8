"""Questions and paragraphs as the windows of tokens that a model reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ....checks import check_integer
from ....data import prepends_bos
from ....data.tokens import context_length
from .data import Question

SEPARATOR, END = "<|SEP|>", "<|EOS|>"
# Paragraph tokens that a window must have room for.
_LEAST_ROOM = 8


@dataclass(frozen=True)
class WindowSettings:
    """How questions and paragraphs become windows, `[bos] question <|SEP|> paragraph <|EOS|>`.

    Args:
        seq_len: tokens of a window at most.
        max_question_tokens: of a question, the tokens after them are cut off.
        stride: paragraph tokens from one window to the next, where a paragraph is too long for one.
        prepend_bos: begin with the beginning token; None does so where the tokenizer does.

    Raises:
        TypeError, ValueError: names the setting, what was found and what is allowed.
    """

    seq_len: int = 512
    max_question_tokens: int = 96
    stride: int = 128
    prepend_bos: bool | None = None

    def __post_init__(self) -> None:
        for name in ("seq_len", "max_question_tokens", "stride"):
            check_integer(name, getattr(self, name), 1)
        least = self.max_question_tokens + 3 + _LEAST_ROOM
        if self.seq_len < least:
            raise ValueError(
                f"seq_len={self.seq_len} has no room for a question of max_question_tokens="
                f"{self.max_question_tokens} and a paragraph: it must be at least {least}"
            )

    @classmethod
    def for_model(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> WindowSettings:
        """The settings with what they leave open: `seq_len` is at most the model's context, and `prepend_bos` is True
        or False."""
        wanted, context = cls(**settings), context_length(model)
        found = asdict(wanted) | {"prepend_bos": prepends_bos(tokenizer, wanted.prepend_bos)}
        if context is not None and context < wanted.seq_len:
            if "seq_len" in settings:
                raise ValueError(f"seq_len={wanted.seq_len} is above the model's context of {context} positions")
            found["seq_len"] = context
            if "max_question_tokens" not in settings:
                found["max_question_tokens"] = min(wanted.max_question_tokens, context // 4)
        return cls(**found)


@dataclass(frozen=True)
class Window:
    """What a model reads at a time.

    Attributes:
        question: number of its question.
        ids: tokens. first: position of the first token of the paragraph; its last is that before the end token.
        offsets: for each token of the paragraph its characters there, first, and one after the last.
        start, end: positions of the first and last token of the answer; where this window does not hold it, both are
            the end token's, which stands for "not here": unlike the first token, it has seen question and paragraph.
            None where the paragraph does not hold the answer at all.
    """

    question: int
    ids: list[int]
    first: int
    offsets: list[tuple[int, int]]
    start: int | None
    end: int | None

    def __len__(self) -> int:
        return len(self.ids)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Those of `<|SEP|>` and `<|EOS|>` that the tokenizer lacks.

    Raises:
        TypeError: the tokenizer is a slow one, which does not tell the characters of its tokens.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which does not tell the characters that its tokens are "
            "of: KorQuAD needs a fast one (tokenizer.json; AutoTokenizer converts most)"
        )
    known = tokenizer.get_vocab()
    return [token for token in (SEPARATOR, END) if token not in known]


def make_windows(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, settings: WindowSettings
) -> list[Window]:
    """The windows of all questions, in their order; `tokenizer` knows `<|SEP|>` and `<|EOS|>`, and `settings` says
    whether there is a beginning token."""
    if special_tokens(tokenizer):
        raise ValueError(f"the tokenizer lacks {special_tokens(tokenizer)[0]}: add it first (`prepare_tokens`)")
    prefix = [tokenizer.bos_token_id] if settings.prepend_bos else []
    vocabulary = tokenizer.get_vocab()
    separator, end = vocabulary[SEPARATOR], vocabulary[END]
    paragraphs: dict[str, tuple[list[int], list[tuple[int, int]]]] = {}
    windows: list[Window] = []
    for number, question in enumerate(tqdm(questions, desc="KorQuAD windows", unit="question", delay=2)):
        if question.context not in paragraphs:
            paragraphs = {question.context: _encode(question.context, tokenizer)}  # questions of one come together
        asked = _encode(question.question, tokenizer)[0][: settings.max_question_tokens]
        head = [*prefix, *asked, separator]
        ids, offsets = paragraphs[question.context]
        answer = None if question.span is None else _token_span(offsets, *question.span)
        room = settings.seq_len - len(head) - 1
        for begin in _begins(len(ids), room, settings.stride):
            stop = min(begin + room, len(ids))
            window = [*head, *ids[begin:stop], end]
            span: tuple[int | None, int | None] = (None, None)
            if answer is not None:
                inside = begin <= answer[0] and answer[1] < stop
                last = len(window) - 1
                span = (len(head) + answer[0] - begin, len(head) + answer[1] - begin) if inside else (last, last)
            windows.append(Window(number, window, len(head), offsets[begin:stop], *span))
    return windows


def collate(windows: Iterable[Window], pad: int) -> dict[str, torch.Tensor]:
    """A batch, padded on the right.

    Returns:
        `input_ids`, `attention_mask` int64 and `span_mask` bool (where an answer may begin and end: the paragraph,
        and the end token), [windows, tokens]; `start_positions`, `end_positions` int64 [windows], where all have one.
    """
    windows = list(windows)
    longest = max(map(len, windows))
    ids = torch.full((len(windows), longest), pad)
    attention = torch.zeros_like(ids)
    spans = torch.zeros_like(ids, dtype=torch.bool)
    for row, window in enumerate(windows):
        ids[row, : len(window)] = torch.tensor(window.ids)
        attention[row, : len(window)] = 1
        spans[row, window.first : len(window)] = True
    batch = {"input_ids": ids, "attention_mask": attention, "span_mask": spans}
    if all(window.start is not None for window in windows):
        batch["start_positions"] = torch.tensor([window.start for window in windows])
        batch["end_positions"] = torch.tensor([window.end for window in windows])
    return batch


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[tuple[int, int]]]:
    found = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True, verbose=False
    )
    return found["input_ids"], [(start, end) for start, end in found["offset_mapping"]]


def _begins(count: int, room: int, stride: int) -> list[int]:
    """The paragraph token at which each window begins: so many that the last one ends with the paragraph."""
    step = min(stride, room)
    return [0, *range(step, count - room + step, step)] if count > room else [0]


def _token_span(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int] | None:
    """The first and last token that hold a character from `start` to before `end`; several tokens may share one."""
    inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
    return (inside[0], inside[-1]) if inside else None
