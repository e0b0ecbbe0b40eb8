"""The loss of distillation, from the teacher's largest logits of each position.

A distribution over the vocabulary is cut to k + 1 outcomes: k tokens, and all others together. The divergence of two
that are cut alike is a proper one: never negative, zero where they agree, and at most that of the whole ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Logits held in float32 at a time, beside those of the model.
_PART_BYTES = 128 * 2**20
# Log of a probability that counts as none; float16 holds it. And a logit of none, whose gradient is no NaN.
_LEAST, _NONE = -1e4, -1e30


def log_outcomes(logits: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [..., k + 1] of the tokens `indices` [..., k], and of all others together, by `logits`
    [..., vocabulary]."""
    others = logits.scatter(-1, indices, _NONE).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, indices), others], -1).log_softmax(-1).clamp(min=_LEAST)


def distillation_loss(
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    indices: torch.Tensor,
    log_probs: torch.Tensor,
    temperature: float = 1.0,
    weight: float = 0.0,
) -> torch.Tensor:
    """(1 − w)·T²·KL(teacher ‖ student) + w·CE, the mean over all positions but the last of each sample; T² keeps the
    gradients' size (Hinton et al. 2015, 1503.02531, section 2.1), CE is that of the next token at T = 1.

    Args:
        logits: of the student, [samples, positions, vocabulary]. input_ids: [samples, positions].
        indices, log_probs: [samples, positions − 1, k] and [..., k + 1], of the teacher at the same temperature.
        temperature, weight: T and w.
    """
    loss: torch.Tensor = _Loss.apply(logits, input_ids, indices, log_probs, temperature, weight)
    return loss


class _Loss(torch.autograd.Function):
    """The gradient is computed with the loss, a part of the positions at a time: beside logits and gradient nothing is
    as large as they are."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, *targets: Any) -> torch.Tensor:
        input_ids, indices, log_probs, temperature, weight = targets
        samples, positions, vocabulary = logits.shape
        total, grad = logits.new_zeros((), dtype=torch.float32), torch.zeros_like(logits)
        step = max(1, _PART_BYTES // (4 * samples * vocabulary))
        for start in range(0, positions - 1, step):
            part = slice(start, min(start + step, positions - 1))
            with torch.enable_grad():
                student = logits[:, part].detach().float().requires_grad_()
                loss = student.new_zeros(())
                if weight < 1:
                    teacher = log_probs[:, part].float().log_softmax(-1)
                    outcomes = log_outcomes(student / temperature, indices[:, part].long())
                    divergence = F.kl_div(outcomes, teacher, reduction="sum", log_target=True)
                    loss = loss + (1 - weight) * temperature**2 * divergence
                if weight > 0:
                    labels = input_ids[:, 1:][:, part]
                    loss = loss + weight * F.cross_entropy(student.mT, labels, reduction="sum")
                loss = loss / (samples * (positions - 1))
                grad[:, part] = torch.autograd.grad(loss, student)[0]
            total += loss.detach()
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad.mul_(grad_loss), None, None, None, None, None
