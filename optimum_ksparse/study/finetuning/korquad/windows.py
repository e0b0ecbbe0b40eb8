"""Questions and paragraphs as the windows of tokens that a model reads: `[bos] question <SEP> paragraph <END>`.

| key of a window | meaning |
|---|---|
| `input_ids` | tokens; `SEPARATOR` and `END`, which no tokenizer has, are negative: `SpanModel` has their embeddings |
| `question` | number of its question |
| `first` | position of the first token of the paragraph; its last is that before the end |
| `offsets` | for each token of the paragraph its characters there: first, and one after the last |
| `start_positions`, `end_positions` | first and last token of the answer; where this window does not hold it, both are
the end's, which stands for "not here": unlike the first token, it has seen question and paragraph. −1 where the
paragraph does not hold the answer at all |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ....data import prepends_bos
from ....data.tokens import check_context, context_length
from ..settings import KorQuADSettings
from .data import Question

SEPARATOR, END = -1, -2
_USUAL_LENGTH = 512


def fitted(settings: KorQuADSettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> KorQuADSettings:
    """The settings with what they leave open: `seq_len`, and whether to `prepend_bos`. Raises TypeError for a slow
    tokenizer, which does not tell the characters of its tokens, ValueError for a `seq_len` above the context."""
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which does not tell the characters that its tokens are "
            "of: KorQuAD needs a fast one (tokenizer.json; AutoTokenizer converts most)"
        )
    seq_len = settings.seq_len or min(context_length(model) or _USUAL_LENGTH, _USUAL_LENGTH)
    check_context(model, seq_len)
    return replace(settings, seq_len=seq_len, prepend_bos=prepends_bos(tokenizer, settings.prepend_bos))


def make_windows(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, settings: KorQuADSettings
) -> list[dict[str, Any]]:
    """The windows of all questions, in their order; `settings` are those of `fitted`."""
    prefix = [tokenizer.bos_token_id] if settings.prepend_bos else []
    context: Any = None
    windows: list[dict[str, Any]] = []
    for number, question in enumerate(tqdm(questions, desc="KorQuAD windows", unit="question", delay=2)):
        if question.context != context:  # questions of one come together
            context = question.context
            ids, offsets = _encode(context, tokenizer)
        tokens = _encode(question.question, tokenizer)[0][: settings.max_question_tokens]
        head = [*prefix, *tokens, SEPARATOR]
        first, after = question.span or (0, 0)  # its characters; several tokens may share one
        answer = [i for i, (start, end) in enumerate(offsets) if start < after and end > first]
        room = (settings.seq_len or _USUAL_LENGTH) - len(head) - 1
        step = min(settings.stride, room)
        for begin in [0, *range(step, len(ids) - room + step, step)] if len(ids) > room else [0]:
            stop = min(begin + room, len(ids))
            window: dict[str, Any] = {"input_ids": [*head, *ids[begin:stop], END], "offsets": offsets[begin:stop]}
            start, end = -1, -1
            if answer:
                inside = begin <= answer[0] and answer[-1] < stop
                last = len(window["input_ids"]) - 1
                start, end = (len(head) + answer[i] - begin if inside else last for i in (0, -1))
            window |= {"question": number, "first": len(head), "start_positions": start, "end_positions": end}
            windows.append(window)
    return windows


def collate(windows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch, padded on the right: `input_ids`, `attention_mask` int64 and `span_mask` bool (where an answer may
    begin and end: the paragraph, and the end), [windows, tokens]; `start_positions`, `end_positions` int64
    [windows]."""
    lengths = torch.tensor([len(window["input_ids"]) for window in windows])
    positions = torch.arange(int(lengths.max()))
    ids = torch.zeros(len(windows), len(positions), dtype=torch.int64)
    for row, window in zip(ids, windows, strict=True):
        row[: len(window["input_ids"])] = torch.tensor(window["input_ids"])
    inside = positions < lengths[:, None]
    first = torch.tensor([window["first"] for window in windows])
    labels = {key: torch.tensor([w[key] for w in windows]) for key in ("start_positions", "end_positions")}
    return {
        "input_ids": ids,
        "attention_mask": inside.long(),
        "span_mask": inside & (positions >= first[:, None]),
        **labels,
    }


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of a text, in which special tokens are text, and the characters of each."""
    encoded = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True, verbose=False
    )
    return encoded["input_ids"], [(start, end) for start, end in encoded["offset_mapping"]]
