"""What `prune_speed.py` needs before it measures: llm-compressor's environment, a model, calibration tokens."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_ksparse.data import prepends_bos
from optimum_ksparse.data.texts import evaluation_texts

HERE = Path(__file__).parent
VERSION = "0.14"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ksparse-bench"


def build_environment(cache: Path) -> Path:
    """The Python of llm-compressor's environment, which is built where it is not there yet."""
    folder = cache / f"llmcompressor-{VERSION}"
    python, stamp = folder / "bin/python", folder / "complete"
    if not stamp.exists():
        print(f"Building an environment for llm-compressor {VERSION} in the cache folder: 1.5 GB, minutes", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        requirements = ["--constraint", str(HERE.parents[1] / "constraints.txt"), f"llmcompressor=={VERSION}.*"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
        stamp.touch()
    return python


def embedded_model(cache: Path, dtype: str) -> Path:
    """The demo's Gemma 3 270M as an ordinary checkpoint in `dtype`, so that neither tool converts while it loads."""
    sys.path.insert(0, str(HERE.parent))
    import demo

    folder = cache / f"gemma-3-270m-{dtype}"
    if not (folder / "config.json").exists():
        source = demo.embedded_model(cache / "gemma-3-270m")
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(folder)
    return folder


def calibration_tokens(model: Path, texts: str, samples: int, seq_len: int) -> torch.Tensor:
    """[samples, seq_len] int64: texts joined by two newlines, tokenised as one string and cut, each sample with the
    beginning token where the tokenizer adds one. Raises ValueError where the texts are too short."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    prefix = [tokenizer.bos_token_id] if prepends_bos(tokenizer, None) else []
    step = seq_len - len(prefix)
    ids = tokenizer("\n\n".join(evaluation_texts(texts)[0]), add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < samples * step:
        raise ValueError(f"the calibration texts hold {len(ids):,} tokens, fewer than {samples} x {step}")
    return torch.tensor([prefix + ids[i * step : (i + 1) * step] for i in range(samples)])
