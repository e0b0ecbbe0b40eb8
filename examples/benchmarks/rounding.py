"""What rounding kept values costs, layer by layer: by type, columns of a group, and how the integers are chosen.

python examples/benchmarks/rounding.py MODEL CALIBRATION.jsonl OTHER.jsonl RESULTS.json --layers 9.self_attn.o_proj …

Layers are named by block and path. Each is pruned with the inputs of the dense model on CALIBRATION; errors are those
of its outputs on CALIBRATION and on OTHER, as shares of the errors before rounding; the table has geometric means.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from optimum_ksparse.blocks import find_blocks
from optimum_ksparse.pattern import Pattern
from optimum_ksparse.pruners import prune, rounding
from optimum_ksparse.pruners.statistics import GramMatrix
from optimum_ksparse.quantization import ROW, by_column, columns_of_group, to_integers

LENGTH = 512
GROUPS = {"int8": (ROW, 128), "int4": (64, 128, 192)}
ROUNDS = (0, 1, 2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("model", "calibration", "other", "results"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--layers", nargs="+", required=True)
    parser.add_argument("--samples", type=int, default=32)
    args = parser.parse_args()
    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
    blocks = find_blocks(model).blocks
    paths = {name: name.split(".", 1) for name in args.layers}
    layers = {name: blocks[int(index)].get_submodule(path) for name, (index, path) in paths.items()}
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    measured = [
        statistics(model, layers, tokens(tokenizer, file, args.samples)) for file in (args.calibration, args.other)
    ]
    rows = [
        row
        for name, layer in layers.items()
        for row in of_layer(name, layer.weight.detach(), *(m[name] for m in measured))
    ]
    args.results.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


def tokens(tokenizer, file: Path, samples: int) -> torch.Tensor:
    """The first windows of a file, each with the beginning token where the tokenizer adds it."""
    text = "\n\n".join(json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines())
    first = tokenizer("").input_ids[:1]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    windows = ids[: len(ids) // (LENGTH - len(first)) * (LENGTH - len(first))].view(-1, LENGTH - len(first))[:samples]
    return torch.cat([torch.tensor(first, dtype=ids.dtype).expand(len(windows), -1), windows], dim=1)


@torch.no_grad()
def statistics(model: nn.Module, layers: dict[str, nn.Module], ids: torch.Tensor) -> dict[str, GramMatrix]:
    grams = {name: GramMatrix(layer.weight.shape[1]) for name, layer in layers.items()}
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, gram=grams[name]: gram.update(inputs[0]))
        for name, layer in layers.items()
    ]
    for batch in ids.split(4):
        model.base_model(batch)
    for hook in hooks:
        hook.remove()
    return grams


def of_layer(name: str, weight: torch.Tensor, seen: GramMatrix, other: GramMatrix) -> Iterator[dict]:
    def errors(found: torch.Tensor) -> list[float]:
        difference = found - weight
        return [math.sqrt(float(((difference @ one.gram) * difference).sum())) for one in (seen, other)]

    for method in ("sparsegpt", "admm"):
        for pattern in ("2:4", "50%"):
            pruned, mask = prune(method, weight, seen, Pattern(pattern))
            before = errors(pruned)
            for values, sizes in GROUPS.items():
                for size in sizes:
                    for how, found, seconds in rounded(weight, pruned, mask, seen, values, size):
                        after = [a / b for a, b in zip(errors(found), before, strict=True)]
                        row = {"layer": name, "method": method, "pattern": pattern, "values": values, "group": size}
                        yield {**row, "how": how, "seen": after[0], "other": after[1], "seconds": round(seconds, 3)}


def rounded(weight, pruned, mask, seen, values, size) -> Iterator[tuple[str, torch.Tensor, float]]:
    group_size, columns = columns_of_group(size, weight.shape[1]), weight.shape[1]
    padded = nn.functional.pad(pruned, (0, -columns % group_size)).unflatten(1, (-1, group_size))
    scale = padded.abs().amax(-1) / {"int8": 127, "int4": 7}[values]
    integers = to_integers(pruned, scale, group_size, values)
    yield "nearest", integers * by_column(scale, group_size, columns), 0.0
    for rounds in (None, *ROUNDS):
        rounding._ROUNDS = rounds
        started = time.perf_counter()
        result = rounding.quantise(weight, pruned, mask, seen if rounds is not None else None, values, group_size)
        seconds = time.perf_counter() - started
        how = "nearest, searched scales" if rounds is None else f"sweep, {rounds} rounds"
        yield how, result.integers * by_column(result.scale, group_size, columns), seconds


def table(rows: list[dict]) -> str:
    kinds: dict[tuple, dict[str, list[float]]] = {}
    for row in rows:
        kind = row["values"], "a row" if row["group"] == ROW else str(row["group"]), row["how"]
        kinds.setdefault(kind, {}).setdefault(f"{row['method']} {row['pattern']}", []).append(row["other"])
        kinds[kind].setdefault("seconds", []).append(row["seconds"])
    names = [name for name in next(iter(kinds.values())) if name != "seconds"]
    lines = [
        f"| values | columns of a group | integers | {' | '.join(names)} | seconds |",
        "|" + "---|" * (4 + len(names)),
    ]
    for kind, found in kinds.items():
        means = [f"{math.exp(sum(map(math.log, found[name])) / len(found[name])):.4f}" for name in names]
        lines.append(f"| {' | '.join([*kind, *means])} | {sum(found['seconds']) / len(found['seconds']):.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
