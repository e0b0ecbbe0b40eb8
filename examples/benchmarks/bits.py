"""Perplexity of a dense model whose weights well-kept libraries quantised: the rivals of quantised sparse weights.

python examples/benchmarks/bits.py MODEL CALIBRATION.jsonl TEXTS.jsonl RESULTS.json [--bits 8 4 3]

The linear maps of the decoder blocks are quantised to so many bits in groups of 128 columns (64 where 128 do not
divide them), each with a scale and a zero point (without one 4 and 3 bits lose more): by torchao, which rounds to
nearest, and by GPTQ of llm-compressor, with the calibration samples of a study of the same settings. Dequantised
weights are measured in float32, as a study measures; `bits_table.py` puts both side by side. Neither library is a
dependency of this package: `pip install torchao llmcompressor` into an environment of its own. What RESULTS holds
already is not measured again.
"""

import argparse
import importlib
import json
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from optimum_ksparse import evaluate_perplexity
from optimum_ksparse.data import CalibrationData, calibration_tokens

SAMPLES, LENGTH, WINDOWS = 32, 512, 24
SCALE_BITS = 16
Linears = dict[str, torch.nn.Linear]


def linear_maps(model) -> Linears:
    """Those that a study prunes."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {name: module for name, module in found.items() if module is not model.get_output_embeddings()}


def group_size(layer: torch.nn.Linear) -> int:
    return 64 if layer.in_features % 128 else 128


def bits_a_weight(linears: Linears, bits: int) -> float:
    """Integers, and of each group a scale of 16 bits and a zero point, an integer too."""
    sizes = {name: layer.weight.numel() for name, layer in linears.items()}
    total = sum(size * (bits + (SCALE_BITS + bits) / group_size(linears[name])) for name, size in sizes.items())
    return total / sum(sizes.values())


def by_torchao(model, linears: Linears, bits: int, samples: torch.Tensor, tokenizer) -> None:
    quantization = importlib.import_module("torchao.quantization")
    for layer in linears.values():
        config = quantization.IntxWeightOnlyConfig(
            getattr(torch, f"int{bits}"),
            quantization.PerGroup(group_size(layer)),
            quantization.MappingType.ASYMMETRIC,
        )
        quantization.quantize_(layer, config)
        layer.weight = torch.nn.Parameter(layer.weight.dequantize(), requires_grad=False)


def by_gptq(model, linears: Linears, bits: int, samples: torch.Tensor, tokenizer) -> None:
    """Its layers then hold the quantised weights in float32."""
    llmcompressor = importlib.import_module("llmcompressor")
    quantization = importlib.import_module("compressed_tensors.quantization")
    modifiers = importlib.import_module("llmcompressor.modifiers.quantization")
    groups = defaultdict(list)
    for name, layer in linears.items():
        groups[group_size(layer)].append(name)
    schemes = {}
    for size, names in groups.items():
        weights = quantization.QuantizationArgs(num_bits=bits, strategy="group", group_size=size, symmetric=False)
        schemes[f"group_{size}"] = quantization.QuantizationScheme(targets=names, weights=weights)
    data = {"input_ids": samples.tolist(), "attention_mask": torch.ones_like(samples).tolist()}
    llmcompressor.oneshot(
        model=model,
        processor=tokenizer,
        dataset=Dataset.from_dict(data),
        recipe=modifiers.GPTQModifier(config_groups=schemes),
        max_seq_length=samples.shape[1],
        num_calibration_samples=len(samples),
    )


LIBRARIES = {"torchao": by_torchao, "llmcompressor": by_gptq}


def check_levels(linears: Linears, bits: int) -> None:
    """Raises ArithmeticError where a group holds more values than there are integers."""
    for name, layer in linears.items():
        group = layer.weight[0, : group_size(layer)]
        if len(group.unique()) > 2**bits:
            raise ArithmeticError(f"{name} holds {len(group.unique())} values in a group, in {bits} bits")


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("model", "calibration", "texts"):
        parser.add_argument(name)
    parser.add_argument("results", type=Path)
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 3])
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    args = parser.parse_args()
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = json.loads(args.results.read_text(encoding="utf-8")) if args.results.exists() else []
    done = {(row["library"], row["bits"]) for row in rows}
    for library, bits in ((library, bits) for library in args.libraries for bits in args.bits):
        if (library, bits) in done:
            continue
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        linears, data = linear_maps(model), CalibrationData(args.calibration, num_samples=SAMPLES, seq_len=LENGTH)
        LIBRARIES[library](model, linears, bits, calibration_tokens(data, model, tokenizer).ids, tokenizer)
        check_levels(linears, bits)
        figures = evaluate_perplexity(model, tokenizer, args.texts, seq_len=LENGTH, max_tokens=WINDOWS * LENGTH)
        row = {"library": library, "version": version(library), "bits": bits, **figures}
        rows.append({**row, "bits_per_weight": bits_a_weight(linears, bits)})
        args.results.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(f"{library}, {bits} bits: perplexity {figures['perplexity']:.2f}", flush=True)


if __name__ == "__main__":
    main()
