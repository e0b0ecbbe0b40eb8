"""A vision-language model through every command: by the class that its config.json names, and with its processor."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
import yaml
from transformers import AutoModelForImageTextToText
from transformers.utils import CHAT_TEMPLATE_FILE, IMAGE_PROCESSOR_NAME

from optimum_ksparse.__main__ import main

from ..conftest import VOCABULARY, sample_texts
from ..loopback_hub import LoopbackHub

torch.set_num_threads(1)

PROCESSOR = {
    IMAGE_PROCESSOR_NAME: '{"image_processor_type": "Qwen2VLImageProcessor"}\n',
    CHAT_TEMPLATE_FILE: "{{ 1 }}",
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory, tokenizer):
    """A folder with a tiny vision-language model, its tokenizer, and its processor."""
    text = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    text |= {"max_position_embeddings": 64}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3VLConfig(
        text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]}, image_token_id=5
    )
    folder = tmp_path_factory.mktemp("vision") / "dense"
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, content in PROCESSOR.items():
        (folder / name).write_text(content)
    return folder


@pytest.fixture(scope="module")
def sparse(dense):
    """The same, pruned by the command."""
    assert main(["prune", str(dense), str(dense.parent / "sparse"), "--method", "magnitude"]) == 0
    return dense.parent / "sparse"


def holds_all(folder):
    """Whether a folder has a model of the class, with nothing missing, its tokenizer and its processor."""
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration"
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (folder / "tokenizer.json").is_file()
    return {name: (folder / name).read_text() for name in PROCESSOR} == PROCESSOR


def check_card(text):
    assert yaml.safe_load(text.split("---")[1])["pipeline_tag"] == "image-text-to-text"
    assert "AutoModelForImageTextToText.from_pretrained" in text
    assert "AutoModelForCausalLM" not in text


def test_prune_in_memory_and_streamed_are_one(dense, sparse, tmp_path):
    assert main(["prune", str(dense), str(tmp_path / "out"), "--method", "magnitude", "--stream"]) == 0
    assert holds_all(sparse) and holds_all(tmp_path / "out")
    files = [folder / "config.json" for folder in (sparse, tmp_path / "out")]
    layers = [json.loads(file.read_text())["quantization_config"]["layers"] for file in files]
    assert layers[0] == layers[1]


@pytest.mark.slow
def test_info_eval_card_and_push(sparse, hub: LoopbackHub, tmp_path, capsys):
    shutil.copytree(sparse, folder := tmp_path / "sparse")
    (tmp_path / "text.txt").write_text("\n\n".join(sample_texts("evaluation")[:2]), encoding="utf-8")
    assert main(["info", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_sparse_layers"] == 14
    words = ["--texts", str(tmp_path / "text.txt"), "--tasks", "none", "--seq-len", "32", "--max-tokens", "64"]
    assert main(["eval", str(folder), *words]) == 0
    assert main(["card", str(folder)]) == 0
    check_card((folder / "README.md").read_text(encoding="utf-8"))
    assert main(["push", str(folder), "user/vision", "--tokenizer", "none"]) == 0
    files = hub.files("user/vision")
    check_card(files["README.md"].decode())
    assert {name: files[name].decode() for name in PROCESSOR} == PROCESSOR
    assert "tokenizer.json" not in files
    assert main(["push", str(folder), "user/vision"]) == 0
    assert "tokenizer.json" in hub.files("user/vision")
    # Once more from the Hub, where the processor is now.
    AutoModelForImageTextToText.from_pretrained("user/vision").push_to_hub("user/copy")
    assert {name: hub.files("user/copy")[name].decode() for name in PROCESSOR} == PROCESSOR


def test_merge(sparse, tmp_path):
    peft = pytest.importorskip("peft")
    model = AutoModelForImageTextToText.from_pretrained(sparse)
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    words = ["merge", tmp_path / "adapter", tmp_path / "merged", "--base", sparse]
    assert main([str(word) for word in words]) == 0
    assert holds_all(tmp_path / "merged")


@pytest.mark.processes
@pytest.mark.usefixtures("without_the_package")
def test_without_the_plugin_its_text_model_alone_is_not_made_of_random_weights(sparse):
    script = "import sys, transformers; transformers.Qwen3VLTextModel.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", script, sparse], capture_output=True, text=True, cwd=sparse)
    assert done.returncode == 1 and "optimum-ksparse" in done.stderr.splitlines()[-1]
    with pytest.raises(ValueError, match="load it with the class that it was saved from"):
        transformers.Qwen3VLTextModel.from_pretrained(sparse)
    config = transformers.AutoConfig.from_pretrained(sparse)
    assert not hasattr(config, "transformers_weights") and not hasattr(config.text_config, "transformers_weights")
