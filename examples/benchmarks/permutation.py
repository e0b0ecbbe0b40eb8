"""Whether a free order of channels lowers the perplexity of 2:4: by method, over seeds.

python examples/benchmarks/permutation.py MODEL CALIBRATION VALIDATION RESULTS.jsonl --methods admm wanda …

For models whose modules are named as Llama's or Gemma 3's. CALIBRATION and VALIDATION are `.jsonl` files of texts, or
`english` both: every second page of Python's own documentation, and the others. The MLP's channels and the value
channels of each head change places, with `swept+residual` those of the residual stream, too; the dense model computes
the same. `dealt`: by importance, the heaviest first into different groups of four; `swept`: from there on, place after
place by an assignment that maximises the scores kept. `SparsityConfig(permute="free")` is `swept`, found in the model
itself and block by block. What RESULTS holds already is not measured again.
"""

import argparse
import itertools

import cells
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from optimum_ksparse import SparsityConfig, evaluate_perplexity, sparsify
from optimum_ksparse.data import CalibrationData, calibration_tokens
from optimum_ksparse.nn import densified
from optimum_ksparse.pruners.order import best_order, importance
from optimum_ksparse.pruners.statistics import GramMatrix

KEPT, GROUP = 2, 4
ORDERS = ("as it is", "dealt", "swept", "swept+residual")
SAMPLES, WINDOW, WINDOWS, ROWS = 8, 512, 12, 4096


def main() -> None:
    parser = cells.parser_of(__doc__)
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=ORDERS)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    logging.set_verbosity_error()
    wanted = [
        {"method": method, "samples": SAMPLES, "seed": seed, "order": order}
        for seed, method, order in itertools.product(range(args.seeds), args.methods, args.orders)
    ]
    cells.fill(args, wanted, lambda cell: measure(args, cell["method"], cell["order"], cell["seed"]))


def measure(args: argparse.Namespace, method: str, order: str, seed: int) -> dict[str, float]:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    calibration, texts = cells.texts_of(args)
    data = CalibrationData(calibration, num_samples=SAMPLES, seq_len=WINDOW, seed=seed)
    ids = calibration_tokens(data, model, tokenizer).ids
    moved = {} if order == "as it is" else permute(model, ids, method, order)
    sparsify(model, SparsityConfig(method, "2:4", dataset=ids, batch_size=4, calibration_dtype="bfloat16"), tokenizer)
    with densified(model), torch.autocast("cpu", torch.bfloat16):  # packed weights are decompressed by every pass
        found = evaluate_perplexity(model, tokenizer, texts, seq_len=WINDOW, max_tokens=WINDOWS * WINDOW, batch_size=1)
    return {"perplexity": round(found["perplexity"], 4), **moved}


@torch.no_grad()
def permute(model: nn.Module, ids: torch.Tensor, method: str, order: str) -> dict[str, float]:
    """Gives channels other places, and returns how far the logits moved by it."""
    torch.manual_seed(0)
    before, grams = model(ids[:1, :64]).logits, statistics(model, ids)
    config, shared = model.config, []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = (mlp.down_proj, attention.o_proj, attention.q_proj, mlp.gate_proj)
        down, value, first, second = (scores(reader, grams[reader], method) for reader in readers)
        for module in (attention.k_proj, attention.v_proj, mlp.up_proj):
            source = mlp.gate_proj if module is mlp.up_proj else attention.q_proj
            shared.append(scores(module, grams[source], method))
        shared += [first, second]
        places = arranged(down, order)
        for module in (mlp.gate_proj, mlp.up_proj):
            module.weight.copy_(module.weight[places])
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, places])
        heads, size = config.num_key_value_heads, config.head_dim
        columns = attention.o_proj.weight.unflatten(1, (heads, -1, size))  # [out, kv heads, queries of each, size]
        rows = attention.v_proj.weight.unflatten(0, (heads, size))
        for head, by_head in enumerate(value.unflatten(1, (heads, -1, size)).unbind(1)):
            places = arranged(by_head.flatten(0, 1), order)
            columns[:, head] = columns[:, head][..., places]
            rows[head] = rows[head][places]
    if order == "swept+residual":
        stream = torch.cat(shared)
        places = arranged(stream[torch.randperm(len(stream))[:ROWS]], order)
        for name, parameter in model.named_parameters():
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            if writes or parameter.shape == (config.hidden_size,):
                parameter.copy_(parameter[places])
            elif parameter.dim() == 2:
                parameter.copy_(parameter[:, places])
    difference = (model(ids[:1, :64]).logits - before).abs().max() / before.abs().max()
    return {"logits moved": float(difference)}


def statistics(model: nn.Module, ids: torch.Tensor) -> dict[nn.Module, GramMatrix]:
    read = [m for name, m in model.named_modules() if name.endswith(("q_proj", "o_proj", "gate_proj", "down_proj"))]
    grams = {module: GramMatrix(module.weight.shape[1]) for module in read}
    hooks = [m.register_forward_pre_hook(lambda module, inputs: grams[module].update(inputs[0])) for m in read]
    with torch.autocast("cpu", torch.bfloat16):
        for batch in ids.split(4):
            model.base_model(batch)
    for hook in hooks:
        hook.remove()
    return grams


def scores(module: nn.Linear, statistics: GramMatrix, method: str) -> torch.Tensor:
    """[out, in], the sum of each matrix being one."""
    if method == "wanda":
        found = module.weight.square() * statistics.squared_norms
    else:
        found = importance(module.weight, statistics)
    return found / found.sum()


def arranged(scores: torch.Tensor, order: str) -> torch.Tensor:
    """Which old column each new place takes, by scores [rows, columns]."""
    if order.startswith("swept"):
        return best_order(scores, KEPT, GROUP)
    members = scores.sum(0).argsort(descending=True).view(GROUP, -1)  # [slot, group]
    members[1::2] = members[1::2].flip(1)
    return members.T.flatten()


if __name__ == "__main__":
    main()
