"""Families whose tensors have other names on disk than in the model, or another form: what is saved can be loaded."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel, conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, revert_weight_conversion

from optimum_ksparse import SparsityConfig, prune_checkpoint, sparsify
from optimum_ksparse.checkpoint import sparse_experts, sparse_modules

from ..conftest import REPOSITORY, thinned

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "pad_token_id": 0}
SIZES |= {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Renamed; joined and renamed; stacked and renamed; stacked, transposed, under their own name.
FAMILIES: dict[str, dict[str, Any]] = {
    "Lfm3Config": {"layer_types": ["conv", "full_attention"]},
    "HrmTextConfig": {"num_key_value_heads": 4},
    "MixtralConfig": EXPERTS,
    "AriaTextConfig": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
}
IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))


def make(kind: str, storage: str = "packed", prune: bool = True, **settings: Any) -> PreTrainedModel:
    if not hasattr(transformers, kind):
        pytest.skip(f"this transformers has no {kind}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**SIZES, **FAMILIES[kind]})).eval()
    if prune:
        sparsify(model, magnitude(storage, **settings))
    return model


def magnitude(storage: str, **settings: Any) -> SparsityConfig:
    return SparsityConfig("magnitude", "2:4", dataset=None, storage=storage, skip_unsupported=True, **settings)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model.eval()(IDS).logits


def check_loads(folder: Path, model: PreTrainedModel, **loading: Any) -> None:
    again = AutoModelForCausalLM.from_pretrained(folder, **loading)
    assert sparse_modules(again).keys() == sparse_modules(model).keys() != set()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("storage", ["packed", "dense"])
@pytest.mark.parametrize("kind", thinned(FAMILIES, ["MixtralConfig"]))
def test_what_is_saved_is_loaded(kind, storage, tmp_path: Path):
    model = make(kind, storage)
    for number, settings in enumerate(
        (
            {},
            {"save_original_format": False, "max_shard_size": "20KB"},
            {"variant": "half"},
            {"state_dict": model.state_dict()},
        )[: 4 if storage == "packed" else 2]
    ):
        model.save_pretrained(tmp_path / str(number), **settings)
        check_loads(tmp_path / str(number), model, variant=settings.get("variant"))
    make(kind, prune=False).save_pretrained(tmp_path / "source")
    prune_checkpoint(tmp_path / "source", tmp_path / "streamed", magnitude(storage))
    check_loads(tmp_path / "streamed", model)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "0")
    again.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "0/model.safetensors").keys() == load_file(tmp_path / "again/model.safetensors").keys()
    again.dequantize()
    again.save_pretrained(tmp_path / "dequantized")
    usual = load_file(tmp_path / "source/model.safetensors").keys()
    assert load_file(tmp_path / "dequantized/model.safetensors").keys() == usual


@pytest.mark.slow
def test_experts_that_are_transposed_where_their_shape_says_so(tmp_path: Path, monkeypatch):
    """transformers then asks the model for the parameter in whose place sparse experts are."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples/benchmarks"))
    from families import logits as logits_of
    from tiny_configs import tiny_config

    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(tiny_config("qwen3_vl_moe")).eval()
    model.save_pretrained(tmp_path / "source")
    prune_checkpoint(
        tmp_path / "source", tmp_path / "streamed", magnitude("dense"), model_class=AutoModelForImageTextToText
    )
    sparsify(model, magnitude("dense"))
    model.save_pretrained(tmp_path / "saved")
    for name in ("saved", "streamed"):
        again = AutoModelForImageTextToText.from_pretrained(tmp_path / name).eval()
        assert sparse_experts(again) and torch.equal(logits_of(again), logits_of(model))


def test_packed_tensors_under_renamed_names_as_earlier_versions_wrote_them(tmp_path: Path):
    model = make("MixtralConfig", modules_to_not_convert=[".*experts.*"])
    model.save_pretrained(tmp_path)
    stored = revert_weight_conversion(model, model.state_dict())
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in stored
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"].pop("names") == "modules"
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_loads(tmp_path, model)


def test_a_state_dict_of_the_model_loads_without_a_folder():
    model = make("HrmTextConfig")
    again = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(logits(again), logits(model))


def test_a_key_mapping_of_the_user_still_renames(tmp_path: Path):
    model = make("Lfm3Config")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({f"net.{name}": tensor for name, tensor in weights.items()}, tmp_path / "model.safetensors")
    check_loads(tmp_path, model, key_mapping={"^net.": ""})


@pytest.mark.parametrize("storage", ["packed", "dense"])
@pytest.mark.parametrize("tensor", ["model.norm.weight", "model.layers.1.self_attn.q_proj.weight"])
def test_a_checkpoint_that_would_lack_a_tensor_is_not_written(make_pruned, tmp_path: Path, storage, tensor):
    model = make_pruned("llama", storage=storage)
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    state = dict(model.state_dict() if storage == "packed" else model.dequantize().state_dict())
    model = make_pruned("llama", storage=storage)
    del state[tensor]
    with pytest.raises(ValueError, match=tensor):
        model.save_pretrained(tmp_path, state_dict=state)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


class OneWay(ConversionOps):
    """A conversion that cannot be undone."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return input_dict


def test_a_form_that_leads_nowhere_is_refused_before_any_work(make_model, tmp_path: Path, monkeypatch):
    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    one_way = [WeightConverter("mlp.up.weight", "mlp.up_proj.weight", operations=[OneWay()])]
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "llama", one_way)
    model = make_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="LlamaForCausalLM .* use storage='packed'"):
        sparsify(model, magnitude("dense"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    sparsify(model, magnitude("packed"))
    model.save_pretrained(tmp_path)
    assert sparse_modules(AutoModelForCausalLM.from_pretrained(tmp_path))


LOADER = """
import json, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import transformers, optimum_ksparse
from families import logits
torch.set_num_threads(1)
wrong = []
for folder in sorted(Path(sys.argv[1]).iterdir()):
    auto = getattr(transformers, (folder / "auto").read_text())
    try:
        found = logits(auto.from_pretrained(folder).eval())
        if not torch.equal(found, torch.load(folder / "logits.pt")):
            wrong.append(f"{folder.name}: other logits")
    except Exception as error:
        wrong.append(f"{folder.name}: {type(error).__name__}: {error}")
print(json.dumps(wrong))
"""


@pytest.mark.end_to_end
def test_every_family_that_transformers_converts(tmp_path: Path, monkeypatch):
    """Packed and dense; all are loaded by a fresh process. Every sixth family, or with FAMILIES=all every one."""
    scripts = str(REPOSITORY / "examples/benchmarks")
    monkeypatch.syspath_prepend(scripts)
    from families import classes
    from families import logits as logits_of
    from tiny_configs import tiny_config

    (tmp_path / "saved").mkdir()
    tried = set()
    step = 1 if os.environ.get("FAMILIES") == "all" else 6
    for name, auto in list(classes().items())[::step]:
        source = tmp_path / "source"
        try:
            torch.manual_seed(0)
            model = auto.from_config(tiny_config(name.split("/")[0])).eval()
            if not conversion_mapping.get_model_conversion_mapping(model, add_legacy=False):
                continue
            model.save_pretrained(source)
            dense = auto.from_pretrained(source).eval()
            logits_of(dense)
        except Exception:  # transformers itself has no use of it
            continue
        for storage in ("packed", "dense"):
            model = copy.deepcopy(dense)
            try:
                sparsify(model, magnitude(storage))
            except ValueError:  # refused, before any work
                continue
            saved = tmp_path / "saved" / f"{name.replace('/', ' ')} {storage}"
            model.save_pretrained(saved)
            torch.save(logits_of(model), saved / "logits.pt")
            (saved / "auto").write_text(auto.__name__)
            tried.add(name)
    assert len(tried) > 60 // step
    done = subprocess.run(
        [sys.executable, "-c", LOADER, tmp_path / "saved", scripts], capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not json.loads(done.stdout.splitlines()[-1])
