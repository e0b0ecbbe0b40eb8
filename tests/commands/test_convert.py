"""`optimum-cli ksparse convert`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optimum_ksparse.__main__ import main
from optimum_ksparse.checkpoint import sparse_layers

from ..compressed_tensors import FORMATS, write, zero

STORAGES = ["packed", "dense", "compressed-tensors"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory, make_model, tokenizer) -> Path:
    """One model in each form of compressed-tensors, and without a word of sparsity."""
    folder, model = tmp_path_factory.mktemp("sources"), make_model("llama", torch.bfloat16)
    zero(model)
    for form in FORMATS:
        tokenizer.save_pretrained(write(model, folder / form, form))
    model.save_pretrained(folder / "plain")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    layers = sparse_layers(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))
    return {name: layer.to_dense_weight() for name, layer in layers.items()}


@pytest.mark.parametrize("form", [*FORMATS, "plain"])
@pytest.mark.parametrize("storage", STORAGES)
def test_every_source_becomes_every_form(sources, tmp_path, capsys, form, storage):
    output = tmp_path / "out"
    assert main(["convert", str(sources / form), str(output), "--to", storage]) == 0
    said = capsys.readouterr().out
    assert "14 sparse layers, density 0.5000" in said and said.strip().endswith(f"saved in {output}")
    settings = json.loads((output / "config.json").read_text())
    assert settings.get("quantization_config", {}).get("quant_method") == {
        "packed": "optimum-ksparse", "dense": None, "compressed-tensors": "compressed-tensors"
    }[storage]  # fmt: skip
    assert (output / "tokenizer.json").is_file() == (form != "plain")
    found, expected = weights(output), weights(sources / FORMATS[0])
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert main(["info", str(output)]) == 0
    assert f"storage: {storage}" in capsys.readouterr().out
    assert main(["card", str(output)]) == 0
    assert "was not pruned here" in " ".join((output / "README.md").read_text().split())


@pytest.mark.parametrize("first", STORAGES)
def test_our_own_go_round_and_keep_their_records(make_pruned, tokenizer, tmp_path, first):
    model = make_pruned("gpt_neox", "4:8", torch.bfloat16, storage=first)
    model.save_pretrained(tmp_path / "0")
    tokenizer.save_pretrained(tmp_path / "0")
    (tmp_path / "0" / "finetuning.json").write_text('{"task": "nsmc"}')
    for number, storage in enumerate([*STORAGES, first]):
        words = ["convert", str(tmp_path / str(number)), str(tmp_path / str(number + 1)), "--to", storage]
        assert main(words) == 0
    last, files = tmp_path / str(len(STORAGES) + 1), [path.name for path in (tmp_path / "0").iterdir()]
    assert sorted(path.name for path in last.iterdir()) == sorted(files)
    stored, original = (load_file(folder / "model.safetensors") for folder in (last, tmp_path / "0"))
    assert stored.keys() == original.keys() and all(torch.equal(stored[name], original[name]) for name in stored)
    assert (last / "sparsity_report.json").read_bytes() == (tmp_path / "0" / "sparsity_report.json").read_bytes()
    settings = [json.loads((folder / "config.json").read_text()) for folder in (last, tmp_path / "0")]
    assert settings[0] == settings[1]


def test_words_that_cannot_be(sources, tmp_path, capsys):
    source = str(sources / "plain")
    with pytest.raises(SystemExit) as left:
        main(["convert", source, str(tmp_path / "out"), "--to", "gguf"])
    assert left.value.code == 2
    assert "packed, dense, compressed-tensors" in capsys.readouterr().err
    assert main(["convert", source, source]) == 1
    assert main(["convert", str(tmp_path / "nothing"), str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


def test_a_dense_model_is_none_to_convert(make_model, tmp_path, capsys):
    make_model("llama").save_pretrained(tmp_path / "dense")
    assert main(["convert", str(tmp_path / "dense"), str(tmp_path / "out")]) == 1
    assert "no layer of LlamaForCausalLM is sparse" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_finished_conversion_is_not_made_again_and_another_is_no_surprise(sources, tmp_path, capsys):
    words = ["convert", str(sources / FORMATS[1]), str(tmp_path / "out")]
    assert main(words) == main(words) == 0
    before = (tmp_path / "out" / "config.json").stat().st_mtime_ns
    assert main([*words, "--to", "dense"]) == 1
    assert "another sparse checkpoint" in capsys.readouterr().err
    assert (tmp_path / "out" / "config.json").stat().st_mtime_ns == before
    assert main([*words, "--to", "dense", "--overwrite"]) == 0
