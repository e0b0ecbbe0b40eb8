"""The loss of distillation, from the teacher's largest logits of each position.

A distribution over the vocabulary is cut to k + 1 outcomes: k tokens, and all others together. The divergence of two
that are cut alike is a proper one: never negative, zero where they agree, and at most that of the whole ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Log of a probability that counts as none; float16 holds it.
_LEAST = -1e4


def log_outcomes(logits: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [..., k + 1] of the tokens `indices` [..., k], and of all others together, by `logits`
    [..., vocabulary], which are overwritten."""
    return _log_softmax(_outcomes(logits, indices)[0])


def _log_softmax(outcomes: torch.Tensor) -> torch.Tensor:
    return outcomes.log_softmax(-1).clamp(min=_LEAST)


def _outcomes(logits: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [..., k + 1] of the outcomes; and, in the place of `logits`, the shares of the other tokens in their sum
    [..., 1], neither of them divided by anything, and zeros for `indices`. One exponential for each logit: with a
    large vocabulary this takes as long as the model's products."""
    peak = logits.amax(-1, keepdim=True)
    largest = logits.gather(-1, indices) - peak
    others = logits.sub_(peak).exp_().scatter_(-1, indices, 0)
    total = others.sum(-1, keepdim=True).clamp_(min=torch.finfo(others.dtype).tiny)
    return torch.cat([largest, total.log()], -1), others, total


def distillation_loss(
    logits: torch.Tensor,
    next_ids: torch.Tensor,
    indices: torch.Tensor,
    log_probs: torch.Tensor,
    temperature: float = 1.0,
    weight: float = 0.0,
) -> torch.Tensor:
    """(1 − w)·T²·KL(teacher ‖ student) + w·CE, the sum over all positions; T² keeps the gradients' size (Hinton et al.
    2015, 1503.02531, section 2.1), CE is that of the next token at T = 1.

    Args:
        logits: of the student, [samples, positions, vocabulary]. next_ids: [samples, positions], the next tokens.
        indices, log_probs: [samples, positions, k] and [..., k + 1], of the teacher at the same temperature.
        temperature, weight: T and w.
    """
    loss: torch.Tensor = _Loss.apply(logits, next_ids, indices, log_probs, temperature, weight)
    return loss


def _divergence(
    logits: torch.Tensor, indices: torch.Tensor, teacher: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed KL(teacher ‖ student), and its gradient in the place of `logits`."""
    outcomes, others, total = _outcomes(logits, indices)
    with torch.enable_grad():
        outcomes.requires_grad_()
        loss = F.kl_div(_log_softmax(outcomes), teacher, reduction="sum", log_target=True)
        (grad,) = torch.autograd.grad(loss, outcomes)
    return loss.detach(), others.mul_(grad[..., -1:] / total).scatter_(-1, indices, grad[..., :-1])


class _Loss(torch.autograd.Function):
    """The gradient is computed with the loss, in the place of what it is computed from."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, *targets: Any) -> torch.Tensor:
        next_ids, indices, log_probs, temperature, weight = targets
        total, grad = logits.new_zeros((), dtype=torch.float32), None
        if weight < 1:
            student = logits.detach().float() / temperature
            loss, of_student = _divergence(student, indices.long(), log_probs.float().log_softmax(-1))
            total += (1 - weight) * temperature**2 * loss
            grad = of_student.mul_((1 - weight) * temperature)
        if weight > 0:
            student = logits.detach().float().requires_grad_()
            with torch.enable_grad():
                loss = weight * F.cross_entropy(student.mT, next_ids, reduction="sum")
            total += loss.detach()
            (of_loss,) = torch.autograd.grad(loss, student)
            grad = of_loss if grad is None else grad.add_(of_loss)
        ctx.save_for_backward(grad)
        ctx.dtype = logits.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad.mul_(grad_loss).to(ctx.dtype), None, None, None, None, None
