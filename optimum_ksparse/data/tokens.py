"""Calibration text → token blocks [num_samples, seq_len]."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..kernels import fast_products
from .calibration import CalibrationData
from .dataset import describe_dataset, is_mix, is_token_ids, mix_shares
from .documents import documents

_SEPARATOR = "\n\n"
# Documents read for each sample wanted before short ones are packed: a streamed corpus has no end to wait for.
_MOST_DOCUMENTS = 100


@dataclass
class CalibrationTokens:
    """Calibration samples.

    Attributes:
        ids: [num_samples, seq_len] int64.
        begins_with_bos: the first position of each sample is the beginning token.
        description: for the report: where the tokens came from, how many, and in which form: "crops" (one from each
            document long enough), "packed" (short texts one after another), "token ids" or "generated"; a "mix"
            has `parts`, each with its own.
    """

    ids: torch.Tensor
    begins_with_bos: bool
    description: dict[str, Any]


def calibration_tokens(
    data: CalibrationData, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> CalibrationTokens:
    """Makes the calibration samples that `data` ask for; each part of a mix is drawn with the same seed.

    Raises:
        ValueError: `seq_len` is above the model's context, the text gives too few samples, a token is not in the
            vocabulary, a tokenizer is needed and missing, or a part of a mix is the record of a file.
    """
    check_context(model, data.seq_len)
    shares = mix_shares(data.dataset, data.num_samples)
    for part, _ in shares:
        if isinstance(part, Mapping) and is_mix(data.dataset):
            raise ValueError(
                f"dataset is the record of an earlier mix, of whose data {part} is only the checksum: pass the mix "
                'again to prune with, with the files themselves, as {"texts.txt": 0.5, …}'
            )
    drawn = [_draw(replace(data, dataset=part, num_samples=share), model, tokenizer) for part, share in shares]
    ids, begins_with_bos = torch.cat([ids for ids, _, _ in drawn]), all(bos for _, bos, _ in drawn)
    _check_vocabulary(ids, model)
    description = {
        "dataset": describe_dataset(data.dataset),
        "form": "mix" if is_mix(data.dataset) else drawn[0][2],
        "num_samples": ids.shape[0],
        "seq_len": ids.shape[1],
        "seed": data.seed,
        "begins_with_bos": begins_with_bos,
    }
    if is_mix(data.dataset):  # shuffled, so that batches are mixed
        order = list(range(data.num_samples))
        random.Random(data.seed).shuffle(order)
        ids = ids[order]
        description["parts"] = [
            {"dataset": describe_dataset(part), "num_samples": share, "form": form, "begins_with_bos": bos}
            for (part, share), (_, bos, form) in zip(shares, drawn, strict=True)
        ]
    return CalibrationTokens(ids, begins_with_bos, description)


def _draw(
    data: CalibrationData, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[torch.Tensor, bool, str]:
    """Samples [num_samples, seq_len] of one source, whether all begin with the beginning token, and their form."""
    if is_token_ids(data.dataset):
        ids = torch.as_tensor(data.dataset).to("cpu", torch.int64)
        return ids, bool((ids[:, 0] == _bos_token_id(model, tokenizer)).all()), "token ids"
    if isinstance(data.dataset, str) and data.dataset == "self":
        return _generate(data, model, tokenizer), True, "generated"
    if tokenizer is None:
        raise ValueError(
            f"a tokenizer is needed to calibrate on dataset={describe_dataset(data.dataset)!r}: pass "
            "tokenizer=, or token ids [num_samples, seq_len] as the dataset"
        )
    begins_with_bos = prepends_bos(tokenizer, data.prepend_bos)
    ids, form = _tokenize(data, tokenizer, begins_with_bos)
    return ids, begins_with_bos, form


def prepends_bos(tokenizer: PreTrainedTokenizerBase, setting: bool | None) -> bool:
    """Whether samples begin with the beginning token: `setting`, or, where that is None, what the tokenizer does by
    itself.

    Raises:
        ValueError: `setting` is True and the tokenizer has no beginning token.
    """
    bos = tokenizer.bos_token_id
    if setting and bos is None:
        raise ValueError("prepend_bos=True, and the tokenizer has no beginning token (bos_token)")
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos] if setting is None else setting


def context_length(model: PreTrainedModel | PreTrainedConfig) -> int | None:
    """Positions that the model can attend over; None where it has no limit (ALiBi, state spaces)."""
    config = model if isinstance(model, PreTrainedConfig) else model.config
    length = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


# As configs call the length of the longest texts that a model was made for, with a limit or without.
_LENGTHS = ("max_position_embeddings", "max_seq_len", "max_sequence_length", "seq_length", "context_length", "n_ctx")


def usual_context(config: PreTrainedConfig) -> int | None:
    """The most positions that a model was made for, as its config says; None where it says nothing."""
    text = config.get_text_config(decoder=True)
    lengths = [length for name in _LENGTHS if type(length := getattr(text, name, None)) is int and length > 1]
    return lengths[0] if lengths else None


def check_context(model: PreTrainedModel | PreTrainedConfig, length: int, name: str = "seq_len") -> None:
    """Raises ValueError where a length, the setting `name`, is above the model's context."""
    context = context_length(model)
    if context is not None and length > context:
        raise ValueError(
            f"{name}={length} is above the model's context of {context} positions: pass at most {name}={context}"
        )


def _tokenize(data: CalibrationData, tokenizer: PreTrainedTokenizerBase, bos: bool) -> tuple[torch.Tensor, str]:
    """One crop from each of the first `num_samples` documents that are long enough, in the order drawn with the seed;
    where there are fewer, all documents one after another, cut into samples."""
    length = data.seq_len - bos
    draw = random.Random(data.seed)
    read: list[list[int]] = []
    crops: list[list[int]] = []
    num_tokens = 0
    with tqdm(total=data.num_samples, desc="Calibration text", unit="sample") as progress:
        for ids in _encode(documents(data.dataset, data.seed, tokenizer), tokenizer):
            num_tokens += len(ids)
            read.append(ids)
            if len(ids) >= length:
                start = draw.randint(0, len(ids) - length)
                crops.append(ids[start : start + length])
                progress.update()
            plenty = len(read) >= _MOST_DOCUMENTS * data.num_samples and num_tokens >= data.num_samples * length
            if len(crops) == data.num_samples or plenty:
                break
    form = "crops"
    if len(crops) < data.num_samples:
        form = "packed"
        separator = tokenizer(_SEPARATOR, add_special_tokens=False)["input_ids"]
        stream = [token for ids in read for token in (*ids, *separator)]
        possible = len(stream) // length
        if possible < data.num_samples:
            raise ValueError(
                f"num_samples={data.num_samples} with seq_len={data.seq_len} needs "
                f"{data.num_samples * length:,} tokens of text: pass more text, or fewer or shorter samples; the "
                f"dataset has {len(read):,} documents with {num_tokens:,} tokens, enough for num_samples={possible}"
            )
        crops = [stream[i * length : (i + 1) * length] for i in range(data.num_samples)]
    samples = torch.tensor(crops, dtype=torch.int64)
    if bos:
        samples = torch.nn.functional.pad(samples, (1, 0), value=tokenizer.bos_token_id)
    return samples, form


def _encode(texts: Iterator[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Token ids of each text, without special tokens; each text is tokenised once."""
    while batch := list(itertools.islice(texts, 64)):
        yield from tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]


@torch.no_grad()
def _generate(
    data: CalibrationData, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> torch.Tensor:
    """Samples text from the model itself, from its beginning token on, with the seed; the end token is not drawn
    before `seq_len`, so that each sample is one text."""
    if not model.can_generate():
        raise ValueError(
            f'dataset="self" needs a model that generates, {type(model).__name__} does not: load the causal LM'
        )
    bos = _bos_token_id(model, tokenizer)
    if bos < 0:
        raise ValueError('dataset="self" needs a beginning token, and neither model nor tokenizer has one')
    # Not the model's own settings, which may cut, repeat or rank what it writes.
    length, eos = data.seq_len - 1, model.generation_config.eos_token_id
    settings = GenerationConfig(
        do_sample=True, top_k=0, min_new_tokens=length, max_new_tokens=length, eos_token_id=eos, pad_token_id=bos
    )
    samples = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), fast_products(model):
        torch.manual_seed(data.seed)
        for start in tqdm(range(0, data.num_samples, 32), desc="Calibration text written by the model"):
            count = min(32, data.num_samples - start)
            prompt = torch.full((count, 1), bos, dtype=torch.int64, device=model.device)
            samples.append(
                model.generate(  # type: ignore[operator]
                    prompt, attention_mask=torch.ones_like(prompt), generation_config=settings
                ).cpu()
            )
    return torch.cat(samples)


def _bos_token_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Id of the beginning token, −1 where there is none."""
    text_config = model.config.get_text_config(decoder=True)
    ids = (getattr(place, "bos_token_id", None) for place in (tokenizer, text_config))
    return next((number for number in ids if isinstance(number, int)), -1)


def _check_vocabulary(ids: torch.Tensor, model: PreTrainedModel) -> None:
    size = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    wrong = (ids < 0) | (ids >= size)
    if bool(wrong.any()):
        sample, position = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"dataset: token id {int(ids[sample, position])} at sample {sample}, position {position} is not in the "
            f"model's vocabulary of {size}: is this the model's own tokenizer?"
        )
