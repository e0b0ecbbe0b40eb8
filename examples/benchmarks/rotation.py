"""Whether one rotation of the residual stream, merged into the weights, lowers the perplexity of 2:4.

python examples/benchmarks/rotation.py MODEL CALIBRATION VALIDATION RESULTS.jsonl --rotations none random … --blocks

For models whose modules are named as Llama's, with norms before attention and MLP alone. CALIBRATION and VALIDATION
are `.jsonl` files of texts, or `english` both: every second page of Python's own documentation, and the others. Norms
are folded into what reads them (`folded` does this alone), then the stream is rotated by an orthogonal matrix: the
dense model computes the same, which each row tells in "logits moved".

`random`: of a normal matrix. `principal`: the principal axes of what all layers read, dealt out so that every group of
four has two strong and two weak ones. `learned`: from the identity on, by gradient steps on the share of a row's
importance that 2:4 cuts off, a weight's being W² / diag H⁻¹ as in Optimal Brain Surgeon (DenoiseRotator, arXiv
2505.23049, which rotates each layer by itself, has the entropy of the same). `heads` leaves norms and stream as they
are, and learns in this way a rotation of the values of each head, which the output projection takes back. With
`--blocks` reconstruction follows on ADMM. What RESULTS holds already is not measured again.
"""

import argparse
import itertools
import time
from collections.abc import Callable

import cells
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from optimum_ksparse import SparsityConfig, evaluate_perplexity, sparsify
from optimum_ksparse.data import CalibrationData, calibration_tokens
from optimum_ksparse.nn import densified
from optimum_ksparse.pruners.scaled import scale
from optimum_ksparse.pruners.statistics import GramMatrix

ROTATIONS = ("none", "folded", "random", "principal", "learned", "heads")
GROUP = 4
WINDOW, WINDOWS, DAMPING = 512, 24, 0.1
HEAD_STEPS, HEAD_RATE = 60, 0.02
STEPS, RATE, SHARE = 120, 0.005, 0.3  # learning: steps, learning rate, share of layers and of their rows in each


def main() -> None:
    parser = cells.parser_of(__doc__)
    parser.add_argument("--rotations", nargs="+", choices=ROTATIONS, default=ROTATIONS)
    parser.add_argument("--blocks", action="store_true")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    logging.set_verbosity_error()
    reconstruct = "block" if args.blocks else None
    wanted = [
        {"rotation": rotation, "samples": args.samples, "seed": seed, "reconstruct": reconstruct}
        for seed, rotation in itertools.product(args.seeds, args.rotations)
    ]
    cells.fill(args, wanted, lambda cell: measure(args, cell["rotation"], cell["seed"]))


def measure(args: argparse.Namespace, rotation: str, seed: int) -> dict[str, float]:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    calibration, texts = cells.texts_of(args)
    data = CalibrationData(calibration, num_samples=args.samples, seq_len=WINDOW, seed=seed)
    ids = calibration_tokens(data, model, tokenizer).ids
    started = time.perf_counter()
    moved = {} if rotation == "none" else rotate(model, ids, rotation, seed)
    rotated = time.perf_counter()
    reconstruct = "block" if args.blocks else None
    sparsify(model, SparsityConfig("admm", "2:4", dataset=ids, batch_size=4, reconstruct=reconstruct), tokenizer)
    seconds = {"rotating": round(rotated - started, 1), "pruning": round(time.perf_counter() - rotated, 1)}
    with densified(model):  # packed weights are decompressed by every pass
        found = evaluate_perplexity(model, tokenizer, texts, seq_len=WINDOW, max_tokens=WINDOWS * WINDOW, batch_size=4)
    return {"perplexity": round(found["perplexity"], 4), **moved, "seconds": seconds}


@torch.no_grad()
def rotate(model: nn.Module, ids: torch.Tensor, rotation: str, seed: int) -> dict[str, float]:
    """Returns how far the logits moved by it."""
    before = model(ids[:1, :64]).logits
    if rotation == "heads":
        grams = statistics(model, ids)
        for layer in model.model.layers:
            rotate_heads(layer.self_attn, grams)
    else:
        rotate_stream(model, ids, rotation, seed)
    difference = (model(ids[:1, :64]).logits - before).abs().max() / before.abs().max()
    return {"logits moved": float(difference)}


def rotate_stream(model: nn.Module, ids: torch.Tensor, rotation: str, seed: int) -> None:
    """Folds the norms and merges the rotation."""
    width, layers = model.config.hidden_size, model.model.layers
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())  # no longer that of the embeddings
    model.config.tie_word_embeddings = False
    for norm, readers in [*itertools.chain(*map(norms, layers)), (model.model.norm, [model.lm_head])]:
        for module in readers:
            module.weight.mul_(norm.weight)
        norm.weight.fill_(1)
    found = torch.eye(width)  # folded
    if rotation == "random":
        noise = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        found = orthogonal(noise)
    elif rotation == "principal":
        grams = statistics(model, ids)
        covariance = sum(grams[m.self_attn.q_proj].gram + grams[m.mlp.gate_proj].gram for m in layers)
        places = torch.arange(width).flip(0).view(GROUP, -1)  # eigenvalues ascend; [slot, group]
        places[1::2] = places[1::2].flip(1)
        found = torch.linalg.eigh(covariance.double()).eigenvectors[:, places.T.flatten()]
    elif rotation == "learned":
        found = learned(model, statistics(model, ids), seed)
    found = found.double()
    reading = [module for layer in layers for _, readers in norms(layer) for module in readers]
    for module in [model.model.embed_tokens, model.lm_head, *reading]:
        module.weight.copy_(module.weight.double() @ found)
    for layer in layers:
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.weight.copy_(found.T @ module.weight.double())


def rotate_heads(attention: nn.Module, grams: dict[nn.Module, GramMatrix]) -> None:
    """Gives each head of values the rotation that is learned for it, and takes it back where they are read."""
    size = attention.head_dim
    values = attention.v_proj.weight.unflatten(0, (-1, size))  # [heads, size, in]
    reading = attention.o_proj.weight.unflatten(1, (-1, size)).transpose(0, 1)  # [queries, out, size]
    queries = len(reading) // len(values)
    of_values = inverse_gram(attention.v_proj.weight, grams[attention.q_proj]).diagonal()
    whole = (
        inverse_gram(attention.o_proj.weight, grams[attention.o_proj])
        .unflatten(0, (-1, size))
        .unflatten(2, (-1, size))
    )
    of_read = whole.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [queries, size, size]

    def loss(rotation: torch.Tensor) -> torch.Tensor:
        each = rotation.repeat_interleave(queries, 0)
        read = (reading @ each).square() / ((of_read @ each) * each).sum(1, keepdim=True)
        written = (rotation.mT @ values).square() / of_values
        return share_cut(read.transpose(0, 1).flatten(1)) + share_cut(written.flatten(0, 1))

    found = descend(torch.eye(size).repeat(len(values), 1, 1), loss, HEAD_STEPS, HEAD_RATE)
    attention.v_proj.weight.copy_((found.mT @ values).flatten(0, 1))
    attention.o_proj.weight.copy_((reading @ found.repeat_interleave(queries, 0)).transpose(0, 1).flatten(1))


def norms(layer: nn.Module) -> list[tuple[nn.Module, list[nn.Linear]]]:
    """Each norm, and what reads it."""
    attention, mlp = layer.self_attn, layer.mlp
    return [
        (layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
        (layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
    ]


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Q of Q·R with a positive diagonal of R: uniformly distributed if `matrix` is normal, continuous in it."""
    q, r = torch.linalg.qr(matrix)
    return q * r.diagonal(dim1=-2, dim2=-1).sign().detach().unsqueeze(-2)


def descend(raw: torch.Tensor, loss: Callable[[torch.Tensor], torch.Tensor], steps: int, rate: float) -> torch.Tensor:
    """The rotation, by Adam on what `orthogonal` makes orthogonal, with a rate that falls to zero."""
    raw = raw.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([raw], lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        with torch.enable_grad():
            loss(orthogonal(raw)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return orthogonal(raw.detach())


def share_cut(scores: torch.Tensor) -> torch.Tensor:
    """The mean share of a row's scores [rows, columns] that 2:4 cuts off."""
    a, b, c, d = scores.unflatten(1, (-1, 4)).unbind(-1)  # faster than to sort
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    other_low, other_high = torch.minimum(c, d), torch.maximum(c, d)
    second = torch.minimum(torch.maximum(low, other_low), torch.minimum(high, other_high))
    return ((torch.minimum(low, other_low) + second).sum(1) / scores.sum(1)).mean()


def inverse_gram(weight: torch.Tensor, statistics: GramMatrix) -> torch.Tensor:
    problem = scale(weight, statistics, DAMPING)
    return torch.linalg.inv(problem.gram) / problem.scale / problem.scale[:, None]


def statistics(model: nn.Module, ids: torch.Tensor) -> dict[nn.Module, GramMatrix]:
    names = ("q_proj", "o_proj", "gate_proj", "down_proj")
    grams = {m: GramMatrix(m.weight.shape[1]) for name, m in model.named_modules() if name.endswith(names)}
    hooks = [m.register_forward_pre_hook(lambda module, inputs: grams[module].update(inputs[0])) for m in grams]
    for batch in ids.split(4):
        model.base_model(batch)
    for hook in hooks:
        hook.remove()
    return grams


def learned(model: nn.Module, grams: dict[nn.Module, GramMatrix], seed: int) -> torch.Tensor:
    found = [cost for layer in model.model.layers for cost in costs(layer, grams)]
    generator = torch.Generator().manual_seed(seed)

    def loss(rotation: torch.Tensor) -> torch.Tensor:
        chosen = some(torch.arange(len(found)), generator).tolist()
        return torch.stack([found[number](rotation, generator) for number in chosen]).mean()

    return descend(torch.eye(model.config.hidden_size), loss, STEPS, RATE)


class Cost:
    """The mean share of a row's importance that 2:4 cuts off after a rotation of the inputs of linear maps, or of the
    outputs of one, on some of the rows, or of the groups of columns."""

    def __init__(self, modules: list[nn.Linear], statistics: GramMatrix, of_inputs: bool) -> None:
        self.weight, self.of_inputs = torch.cat([module.weight for module in modules]), of_inputs
        self.inverse = inverse_gram(self.weight, statistics)

    def __call__(self, rotation: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if self.of_inputs:
            rows = some(torch.arange(len(self.weight)), generator)
            scores = (self.weight[rows] @ rotation).square() / ((self.inverse @ rotation) * rotation).sum(0)
        else:
            columns = some(torch.arange(self.weight.shape[1]).view(-1, GROUP), generator).flatten()
            scores = (rotation.T @ self.weight[:, columns]).square() / self.inverse.diagonal()[columns]
        return share_cut(scores)


def some(numbers: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return numbers[torch.randperm(len(numbers), generator=generator)[: round(SHARE * len(numbers))]]


def costs(layer: nn.Module, grams: dict[nn.Module, GramMatrix]) -> list[Cost]:
    reading = [Cost(readers, grams[readers[0]], True) for _, readers in norms(layer)]
    return reading + [Cost([module], grams[module], False) for module in (layer.self_attn.o_proj, layer.mlp.down_proj)]


if __name__ == "__main__":
    main()
