"""What the tests of publishing share: names, files and what the loopback Hub holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from optimum_ksparse import SparsityConfig
from optimum_ksparse.evaluation import EvaluationProtocol

from ..conftest import make_config, sample_texts
from ..loopback_hub import Commit, LoopbackHub

torch.set_num_threads(1)

Tokenizer = PreTrainedTokenizerBase
TOKEN = "hf_loopback"
NAME = "user/name"
TEXTS = [text[:80] for text in sample_texts("evaluation")[:2]]
TEXT_ONLY = EvaluationProtocol(texts=TEXTS, seq_len=32, tasks=())
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}
PLAIN_FILES = {"config.json", "generation_config.json", "model.safetensors", "sparsity_report.json"} | TOKENIZER_FILES
QUICK = PLAIN_FILES | {"README.md"}
UNEVALUATED = QUICK | {"relative_output_error.png"}
EVALUATED = UNEVALUATED | {"dense_and_sparse.png", "evaluation_results.json"}


def make_dense(seed: int = 0, **overrides: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    more = {"max_position_embeddings": 256, "num_hidden_layers": 1, **overrides}
    return AutoModelForCausalLM.from_config(make_config("llama", **more))


def prune(source: Any, config: SparsityConfig, folder: Path, tokenizer: Tokenizer) -> Path:
    AutoModelForCausalLM.from_pretrained(source, sparsity_config=config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def read(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def logits(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids).logits


def pushed(hub: LoopbackHub, name: str = NAME, revision: str = "main") -> list[Commit]:
    """The commits after the empty first one."""
    return hub.commits(name, revision)[1:]


def sent(hub: LoopbackHub, method: str, part: str = "") -> list[str]:
    return [request.path for request in hub.requests if request.method == method and part in request.path]


def created(hub: LoopbackHub) -> list[str]:
    """What was asked of the Hub that changes something there."""
    return [request.target for request in hub.requests if request.method not in ("GET", "HEAD")]


def card_of(hub: LoopbackHub, name: str = NAME, revision: str = "main") -> str:
    return hub.files(name, revision)["README.md"].decode()


def metadata(hub: LoopbackHub, name: str = NAME) -> dict[str, Any]:
    return ModelCard(card_of(hub, name), ignore_metadata_errors=False).data.to_dict()


def lora(model: PreTrainedModel, kind: str) -> Any:
    """A model with a LoRA adapter that has been trained a little, by PEFT or by transformers."""
    peft = pytest.importorskip("peft", reason="needs the extra finetune")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=2, task_type="CAUSAL_LM")
    if kind == "peft":
        model = peft.get_peft_model(model, config)
    else:
        model.add_adapter(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model.eval()
