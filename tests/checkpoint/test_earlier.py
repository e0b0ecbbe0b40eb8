"""Checkpoints written before settings became three concepts still load: `earlier/packed` (SparseGPT 2:4, swaps, blocks
tuned, one block dropped) and `earlier/dense` (Wanda 50 % by OWL), with the logits that their models gave then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optimum_ksparse.checkpoint import sparse_layers

EARLIER = Path(__file__).parent / "earlier"


@pytest.mark.parametrize(("storage", "method", "pattern"), [("packed", "sparsegpt", "2:4"), ("dense", "wanda", "50%")])
def test_an_earlier_checkpoint_gives_the_same_logits_and_can_be_saved_again(storage, method, pattern, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(EARLIER / storage)
    expected = load_file(EARLIER / storage / "expected.safetensors")
    assert len(dict(sparse_layers(model))) == 7 * model.config.num_hidden_layers
    config = model.sparsity_report.config
    assert (config["method"], config["pattern"], config["storage"]) == (method, pattern, storage)
    assert model.sparsity_report.density == pytest.approx(0.5, abs=0.05)
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=1e-6)

    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(expected["input_ids"]).logits, logits, rtol=0, atol=0)
