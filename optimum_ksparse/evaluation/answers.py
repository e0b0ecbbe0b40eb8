"""The likelihoods of answers after their prompts, in batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from .head import input_device, map_logits, run_base


@dataclass(frozen=True)
class Query:
    """What the model reads: `ids`, whose positions from `first` on predict an answer's tokens: `targets` holds those
    of each answer of `labels`. Answers of one token each share a query, others need one each."""

    ids: list[int]
    first: int
    labels: tuple[int, ...]
    targets: list[list[int]]


def answer_queries(prompt: list[int], *answers: list[int]) -> list[Query]:
    """Queries of an item, from the tokens of its prompt alone and with each answer."""
    start = min(_shared(prompt, ids) for ids in answers)
    if start == 0:
        raise ValueError("the tokenizer splits a prompt in another way for each answer; pass prepend_bos=True")
    if answers[0] == answers[1]:
        raise ValueError("the tokenizer makes the same tokens of every answer: is it the model's own?")
    queries: dict[tuple[int, ...], Query] = {}
    for label, ids in enumerate(answers):
        known = queries.get(tuple(ids[:-1]))
        labels, targets = (known.labels, known.targets) if known is not None else ((), [])
        queries[tuple(ids[:-1])] = Query(ids[:-1], start - 1, (*labels, label), [*targets, ids[start:]])
    return list(queries.values())


def _shared(ours: list[int], others: list[int]) -> int:
    """Tokens that two sequences begin with in common."""
    pairs = enumerate(zip(ours, others, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ours), len(others)))


@torch.no_grad()
def score_answers(model: PreTrainedModel, batch: list[Query]) -> list[tuple[list[float], int]]:
    """For each query the log-likelihoods of its answers, in nats, and the most likely token at its first position."""
    device, longest = input_device(model), max(len(query.ids) for query in batch)
    ids = torch.tensor([query.ids + [0] * (longest - len(query.ids)) for query in batch], device=device)
    lengths = torch.tensor([len(query.ids) for query in batch], device=device)
    # Padding stands on the right, so that positions count from the first token on in every model.
    output = run_base(model, ids, (torch.arange(longest, device=device) < lengths[:, None]).to(torch.int64))
    rows = torch.arange(len(batch), device=device)[:, None]
    first = torch.tensor([query.first for query in batch], device=device)
    steps = max(len(query.targets[0]) for query in batch)
    # Where an answer is shorter than another one, its last position stands in the place of those it does not have.
    positions = torch.minimum(first[:, None] + torch.arange(steps, device=device), lengths[:, None] - 1)
    answers = max(len(query.targets) for query in batch)
    targets = torch.zeros(len(batch), steps, answers, dtype=torch.int64)
    counts = torch.zeros(len(batch), steps, answers, dtype=torch.bool)
    for i, query in enumerate(batch):
        for j, target in enumerate(query.targets):
            targets[i, : len(target), j] = torch.tensor(target)
            counts[i, : len(target), j] = True

    def score(part: slice, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = logits.float().log_softmax(-1).gather(-1, targets[:, part].to(logits.device))
        return found.cpu(), logits[:, 0].argmax(-1).cpu()

    hidden = output[0]
    hidden = hidden[rows.to(hidden.device), positions.to(hidden.device)]
    scored = map_logits(model, output, hidden, ids[rows, positions], score)
    values = torch.cat([found for found, _ in scored], 1).double().where(counts, 0).sum(1)
    return [(values[i, : len(query.targets)].tolist(), int(scored[0][1][i])) for i, query in enumerate(batch)]
