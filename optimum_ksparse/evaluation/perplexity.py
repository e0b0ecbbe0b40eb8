"""Perplexity and bits per byte over text."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..blocks import evaluation_mode
from ..blocks.running import device_of
from ..checks import check_integer
from ..data import prepends_bos
from ..data.texts import describe_texts, evaluation_texts
from ..data.tokens import check_context, context_length
from ..records import As, Between, Count, Positive
from .running import check_causal_lm, environment, map_logits
from .tasks import LENGTH, HubEntry, Named, Task, add_task

if TYPE_CHECKING:
    from .protocol import EvaluationProtocol

_MOST_POSITIONS = 2048
_Window = tuple[list[int], int]  # the tokens that the model sees, of which so many, the last ones, are scored


class _Texts(Named):
    """The description of texts, with the SHA-256 of what was read."""

    sha256: str


@dataclass(frozen=True, kw_only=True)
class _Perplexity(Task):
    """Perplexity on the `texts` of a protocol."""

    def check(self, protocol: EvaluationProtocol) -> None:
        _check_stride(protocol.stride, protocol.seq_len)
        describe_texts(protocol.texts)  # type: ignore[arg-type] # not None: perplexity is asked for

    def check_model(self, model: PreTrainedModel, protocol: EvaluationProtocol) -> None:
        windows = _windows(model, protocol)
        check_context(model, windows["seq_len"])
        _check_stride(protocol.stride, windows["seq_len"])

    def request(self, model: PreTrainedModel, protocol: EvaluationProtocol) -> dict[str, Any]:
        return {"texts": describe_texts(protocol.texts), **_windows(model, protocol)}  # type: ignore[arg-type]

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, protocol: EvaluationProtocol
    ) -> dict[str, Any]:
        how = {"prepend_bos": protocol.prepend_bos, "batch_size": protocol.batch_size, **_windows(model, protocol)}
        return evaluate_perplexity(model, tokenizer, protocol.texts, **how)  # type: ignore[arg-type]


PERPLEXITY = add_task(
    _Perplexity(
        name="perplexity",
        title="perplexity",
        metrics={
            "perplexity": Annotated[float, Between(1.0)] | None,  # null: too large for a float, which JSON cannot hold
            "bits_per_byte": Annotated[float, Between(0.0)],
        },
        protocol={
            "texts": Annotated[dict[str, Any], As(_Texts, is_open=True)],
            "seq_len": LENGTH,
            "stride": Positive | None,
            "max_tokens": LENGTH | None,
            "num_windows": Positive,
            "num_tokens": Positive,
            "num_bytes": Count,
            "prepend_bos": bool,
            "dtype": str,
        },
        shown=("perplexity", "bits_per_byte"),
        hub=HubEntry(
            task_type="text-generation",
            dataset="local",
            dataset_name="local text",
            metrics={"perplexity": ("perplexity", None)},
            arguments=("seq_len", "stride", "prepend_bos", "num_tokens"),
        ),
    )
)


def _windows(model: PreTrainedModel, protocol: EvaluationProtocol) -> dict[str, Any]:
    seq_len = protocol.seq_len or min(_MOST_POSITIONS, context_length(model) or _MOST_POSITIONS)
    return {"seq_len": seq_len, "stride": protocol.stride, "max_tokens": protocol.max_tokens}


def _check_stride(stride: int | None, seq_len: int | None) -> None:
    if stride is not None and seq_len is not None and not 1 <= stride <= seq_len - 1:
        raise ValueError(f"stride={stride} is out of range, it must be from 1 to seq_len - 1 = {seq_len - 1}")


def evaluate_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | os.PathLike[str] | Sequence[str],
    *,
    seq_len: int,
    stride: int | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 4,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Perplexity of a causal LM over `texts`, joined by two newlines and tokenised as one string without special
    tokens.

    The text is cut into windows of `seq_len` positions. With a beginning token, a window is that token and `seq_len` −
    1 others, all of which are scored; without one its first token is not. Without `stride` windows do not overlap;
    with it each begins `stride` tokens after the one before, and scores the tokens that no window before it has
    scored. The last window may be shorter. Log-softmax is taken in float32, a part of the positions at a time.

    Args:
        model: causal LM, dense or sparse.
        tokenizer: the model's.
        texts: a list of texts, a `.txt` (paragraphs apart by blank lines) or `.jsonl` file (a `text` in each line), or
            `"kowiki"`: of the Korean Wikipedia (`wikimedia/wikipedia`, `20231101.ko`) the first 256 articles whose
            page id 50 divides, in the order of its files, which calibration never draws.
        seq_len: window positions, at most the model's context.
        stride: tokens from one window to the next.
        prepend_bos: begin each window with the beginning token; None does so where the tokenizer does.
        batch_size: windows in one forward pass.
        max_tokens: window positions to use at most; a whole number of windows where `seq_len` divides it.

    Returns:
        `perplexity`, `bits_per_byte` (bits per UTF-8 byte of the scored text, comparable over tokenizers),
        `num_tokens` (scored), `num_bytes`, `num_windows`, and how it was measured: `texts` (name, or number and
        SHA-256), `seq_len`, `stride`, `max_tokens`, `prepend_bos`, `dtype`, `product_dtype` (in which products
        ran: float32 on a CPU that is slow in `dtype`), `batch_size`, `device`, `versions`.

    Raises:
        TypeError: the model has no language model head, or the tokenizer is none.
        ValueError: an argument is out of range, or the text has no token to score.
        FileNotFoundError: the file is missing.
        ConnectionError: `"kowiki"` cannot be read from the Hub.
    """
    check_integer("seq_len", seq_len, 2)
    check_integer("batch_size", batch_size, 1)
    if max_tokens is not None:
        check_integer("max_tokens", max_tokens, 2)
    check_causal_lm(model)
    if not hasattr(tokenizer, "bos_token_id"):
        raise TypeError(f"tokenizer must be the model's tokenizer, found {type(tokenizer).__name__}")
    check_context(model, seq_len)
    bos = prepends_bos(tokenizer, prepend_bos)
    _check_stride(stride, seq_len)
    documents, description = evaluation_texts(texts)
    text = "\n\n".join(documents)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    ids = encoded["input_ids"]
    prefix = [tokenizer.bos_token_id] if bos else []
    spans = list(_spans(len(ids), seq_len, stride, bos, max_tokens))
    if not spans:
        raise ValueError(f"texts hold {len(ids)} tokens, too few to score one in a window of seq_len={seq_len}")
    windows = [(prefix + ids[start:stop], stop - scored_from) for start, scored_from, stop in spans]
    loss = _total_loss(model, windows, batch_size)
    if math.isnan(loss):
        raise ValueError(
            f"{type(model).__name__} gives NaN for this text; load it in float32 or bfloat16, or look at its weights"
        )
    num_tokens = sum(scored for _, scored in windows)
    parts = [(scored_from, stop) for _, scored_from, stop in spans]
    if tokenizer.is_fast:
        num_bytes = _bytes_of_spans(text, encoded["offset_mapping"], parts)
    else:
        num_bytes = _bytes_of_ids(tokenizer, ids, parts)
    mean = loss / num_tokens
    return {
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "bits_per_byte": loss / math.log(2) / max(1, num_bytes),
        "num_tokens": num_tokens,
        "num_bytes": num_bytes,
        "num_windows": len(windows),
        "texts": description,
        "seq_len": seq_len,
        "stride": stride,
        "max_tokens": max_tokens,
        "prepend_bos": bos,
        "batch_size": batch_size,
        **environment(model),
    }


def _spans(
    count: int, seq_len: int, stride: int | None, bos: bool, max_tokens: int | None
) -> Iterator[tuple[int, int, int]]:
    """Windows over `count` tokens as (start, first scored, stop); every token is scored at most once."""
    length = seq_len - bos
    positions = 0
    done = 0  # tokens before this one are scored
    start = 0
    while start < count:
        stop = min(start + length, count)
        if max_tokens is not None:
            stop = min(stop, start + max_tokens - positions - bos)
        scored_from = max(done, start + (not bos) if stride is None or start == 0 else done)
        if scored_from >= stop:
            return
        yield start, scored_from, stop
        positions += stop - start + bos
        if stop == count or (max_tokens is not None and positions >= max_tokens):
            return
        done = stop
        start += length if stride is None else stride


@torch.no_grad()
def _total_loss(model: PreTrainedModel, windows: list[_Window], batch_size: int) -> float:
    """Summed negative log-likelihood in nats of all scored tokens."""
    total = 0.0
    # Only the last window has another length.
    groups = [windows] if len(windows[0][0]) == len(windows[-1][0]) else [windows[:-1], windows[-1:]]
    with evaluation_mode(model), tqdm(total=len(windows), desc="Perplexity", unit="window") as progress:
        for group in groups:
            for i in range(0, len(group), batch_size):
                batch = group[i : i + batch_size]
                total += _batch_loss(model, batch)
                progress.update(len(batch))
    return total


def _batch_loss(model: PreTrainedModel, batch: list[_Window]) -> float:
    ids = torch.tensor([window for window, _ in batch], device=device_of(model))
    scored = torch.tensor([number for _, number in batch], device=ids.device)
    # Position p predicts token p + 1.
    positions = torch.arange(ids.shape[1] - 1, device=ids.device)
    counts = positions >= ids.shape[1] - 1 - scored.unsqueeze(1)

    def loss(part: slice, logits: torch.Tensor) -> float:
        targets = ids[:, 1:][:, part].to(logits.device)
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        return float((losses.view_as(targets) * counts[:, part].to(losses.device)).double().sum())

    return sum(map_logits(model, ids, loss))


def _bytes_of_spans(text: str, offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> int:
    """UTF-8 bytes that the tokens of `spans` add to the text: a character split over tokens counts once, whitespace
    between two tokens with the second one."""
    ends = [0]
    for _, end in offsets:
        ends.append(max(ends[-1], end))
    return sum(len(text[ends[a] : ends[b]].encode("utf-8", "surrogatepass")) for a, b in spans)


def _bytes_of_ids(tokenizer: PreTrainedTokenizerBase, ids: list[int], spans: list[tuple[int, int]]) -> int:
    """`_bytes_of_spans` for a tokenizer without offsets, by decoding runs of scored tokens; half a character at a
    run's end is not counted."""
    runs: list[list[int]] = []
    for start, stop in spans:
        if runs and runs[-1][1] == start:
            runs[-1][1] = stop
        else:
            runs.append([start, stop])
    return sum(len(str(tokenizer.decode(ids[start:stop])).strip("\ufffd").encode()) for start, stop in runs)
