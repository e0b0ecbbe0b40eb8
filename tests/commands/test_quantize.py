"""`optimum-cli ksparse quantize`, and what the other commands do with quantised values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_ksparse.__main__ import main
from optimum_ksparse.checkpoint import fingerprint, sparse_modules


@pytest.fixture
def sparse(make_pruned, tokenizer, tmp_path) -> Path:
    make_pruned("llama", "2:4", torch.bfloat16).save_pretrained(tmp_path / "sparse")
    tokenizer.save_pretrained(tmp_path / "sparse")
    return tmp_path / "sparse"


@pytest.fixture
def quantised(sparse, tmp_path) -> Path:
    assert main(["quantize", str(sparse), str(tmp_path / "int8"), "--values", "int8", "--group-size", "64"]) == 0
    return tmp_path / "int8"


def test_a_sparse_model_is_quantised_and_described(quantised, sparse, capsys):
    assert main(["quantize", str(sparse), str(quantised), "--values", "int8", "--group-size", "64"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "int8 values, 5." in said and said.endswith(f"saved in {quantised}")
    assert (quantised / "tokenizer.json").is_file()
    assert main(["info", str(quantised)]) == 0
    said = capsys.readouterr().out
    assert "values: int8" in said and "group_size: 64" in said and "bits a weight" in said
    for language, words in (("en", "kept values are int8"), ("ko", "int8 정수")):
        assert main(["card", str(quantised), "--language", language]) == 0
        text = (quantised / "README.md").read_text(encoding="utf-8")
        assert words in " ".join(text.split()) and "- int8\n" in text and "magnitude" in text


@pytest.mark.parametrize("storage", ["packed", "dense", "compressed-tensors"])
def test_other_forms_hold_the_same_weights(quantised, tmp_path, storage):
    assert main(["convert", str(quantised), str(tmp_path / "out"), "--to", storage]) == 0
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (quantised, tmp_path / "out"))
    values = {module.values for module in sparse_modules(after).values()}
    assert fingerprint(before) == fingerprint(after) and values == {"int8" if storage == "packed" else None}
    settings = after.config.quantization_config
    assert (settings.values, settings.storage) == ("int8" if storage == "packed" else None, storage)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "values is missing"),
        (["--values", "int3"], "int3"),
        (["--values", "int4", "--group-size", "100"], "group-size"),
        (["--values", "int4", "--group-size", "0"], "group-size"),
        (["--values", "int4", "--group-size", "-64"], "group-size"),
        (["--values", "int8", "--storage", "compressed-tensors"], "compressed-tensors"),
    ],
)
def test_words_that_cannot_be(sparse, tmp_path, capsys, words, message):
    try:
        status = main(["quantize", str(sparse), str(tmp_path / "out"), *words])
    except SystemExit as error:
        status = error.code
    assert status == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sources_and_outputs_that_cannot_be(quantised, sparse, make_model, tmp_path, capsys):
    """One line that says what to do; nothing is written, and nothing that lies there is touched."""
    make_model("llama").save_pretrained(tmp_path / "dense")
    before = (quantised / "config.json").read_bytes()
    for source, output, message in (
        (quantised, "out", "int8 already"),
        (tmp_path / "dense", "out", "prune it"),
        (sparse, "int8", "--overwrite"),
        (sparse, "sparse", "another folder"),
    ):
        capsys.readouterr()
        assert main(["quantize", str(source), str(tmp_path / output), "--values", "int4"]) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("error: ") and message in said and "--overwrite true" not in said
        assert not (tmp_path / "out").exists()
    assert (quantised / "config.json").read_bytes() == before
    assert main(["quantize", str(sparse), str(quantised), "--values", "int4", "--overwrite"]) == 0
    assert {module.values for module in sparse_modules(AutoModelForCausalLM.from_pretrained(quantised)).values()} == {
        "int4"
    }


def test_a_model_on_the_hub(hub, sparse, quantised, tmp_path, capsys):
    hub.add_repo("user/sparse", {path.name: path.read_bytes() for path in sparse.iterdir()})
    words = ["--values", "int8", "--group-size", "64"]
    assert main(["quantize", "user/sparse", str(tmp_path / "out"), *words]) == 0
    for path in quantised.glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    hub.add_repo(
        "user/int8", {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    )
    capsys.readouterr()
    assert main(["info", "user/int8"]) == 0
    assert "values: int8" in capsys.readouterr().out
    assert main(["quantize", "user/int8", str(tmp_path / "other"), *words]) == 1
    assert "user/int8" in capsys.readouterr().err


def test_prune_takes_values(make_model, tokenizer, tmp_path, capsys):
    make_model("llama").save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    words = ["--method", "magnitude", "--values", "int4", "--group-size", "-1"]
    assert main(["prune", str(tmp_path / "dense"), str(tmp_path / "out"), *words]) == 0
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert (settings["values"], settings["group_size"]) == ("int4", -1)
    assert "int4 values" in capsys.readouterr().out
