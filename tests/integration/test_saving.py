"""Packed and dense storage: what is written, that it is whole, and that damage is found."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from optimum_ksparse import SparsityConfig, sparsify
from optimum_ksparse.checkpoint import sparse_modules
from optimum_ksparse.checkpoint.staging import staged
from optimum_ksparse.config import DENSE_CONFIG_KEY
from optimum_ksparse.report import SparsityReport


@pytest.fixture
def make_sparse(make_model, token_ids):
    def make(pattern="2:4", storage="packed", name="llama", **kwargs):
        model = make_model(name, **kwargs)
        sparsify(model, SparsityConfig("magnitude", pattern, dataset=token_ids, storage=storage))
        return model

    return make


def logits(model, token_ids):
    with torch.no_grad():
        return model(token_ids).logits


def header(path):
    tensors = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            tensors |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    return tensors


def alter(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


MASK = "model.layers.0.mlp.up_proj.weight_mask"
VALUES = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("name", "pattern", "storage"),
    [("gpt2", "2:4", "dense"), ("llama", "1:4", "packed"), ("llama", "50%", "dense"), ("llama", "62.5%", "packed")],
)
def test_round_trip(make_sparse, tmp_path, token_ids, name, pattern, storage):
    model = make_sparse(pattern, storage, name)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sparse_modules(again).keys() == sparse_modules(model).keys()
    assert torch.equal(logits(model, token_ids), logits(again, token_ids))
    assert again.sparsity_report == model.sparsity_report
    again.save_pretrained(tmp_path / "again")
    first, second = header(tmp_path), header(tmp_path / "again")
    assert first.keys() == second.keys()
    if name == "gpt2":
        assert first["transformer.h.0.attn.c_attn.weight"].shape == (32, 96)  # as it stores it
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.5625), (torch.float32, 0.53125)])
def test_packed_bytes(make_sparse, tmp_path, dtype, share):
    model = make_sparse(dtype=dtype)
    model.save_pretrained(tmp_path)
    stored = header(tmp_path)
    for name, module in sparse_modules(model).items():
        packed = stored[f"{name}.weight"].nbytes + stored[f"{name}.weight_mask"].nbytes
        assert packed == share * module.in_features * module.out_features * dtype.itemsize


@pytest.mark.parametrize("storage", ["packed", "dense"])
def test_shards(make_sparse, tmp_path, token_ids, storage):
    model = make_sparse("50%", storage)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), token_ids), logits(model, token_ids))
    model.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_config_of_packed_storage(make_sparse, tmp_path):
    make_sparse().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "optimum-ksparse"
    assert settings["layers"]["layers.0.self_attn.q_proj"] == {"pattern": "2:4", "num_values": 512}
    assert SparsityReport.load(tmp_path / "sparsity_report.json").density == 0.5


PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
assert "optimum_ksparse" not in sys.modules
ids, *folders = sys.argv[1:]
for folder in folders:
    print(folder, file=sys.stderr)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
    except ValueError as error:
        print(error, file=sys.stderr)
    else:
        torch.save(model(torch.load(ids)).logits.detach(), f"{folder}.pt")
"""


@pytest.mark.processes
@pytest.mark.usefixtures("without_the_package")
def test_without_the_plugin_packed_stops_and_dense_gives_the_same_logits(make_sparse, tmp_path, token_ids):
    models = {"packed": make_sparse(), "dense": make_sparse(storage="dense")}
    models["dequantized"] = make_sparse(dtype=torch.bfloat16).dequantize()
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    torch.save(token_ids, tmp_path / "ids.pt")
    arguments = [sys.executable, "-c", PLAIN, tmp_path / "ids.pt", *(tmp_path / name for name in models)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    packed = done.stderr.partition(str(tmp_path / "dense"))[0].lower()
    assert "optimum-ksparse" in packed and "pip install" not in packed  # which name an index has may change
    assert not (tmp_path / "packed.pt").exists()
    for name, tolerance in (("dense", 1e-6), ("dequantized", 0.02)):
        found = torch.load(tmp_path / f"{name}.pt")
        assert torch.allclose(found, logits(models[name], token_ids), atol=tolerance)


def test_a_checkpoint_that_another_version_guards_with_other_words_loads(make_sparse, tmp_path, token_ids):
    model = make_sparse()
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text("utf-8"))
    settings["transformers_weights"] = "packed sparse weights, for which you need: pip install optimum-ksparse"
    (tmp_path / "config.json").write_text(json.dumps(settings), "utf-8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))
    assert not hasattr(again.config, "transformers_weights")


def test_a_dense_checkpoint_filled_in_later_loads_dense(make_sparse, tmp_path):
    make_sparse(storage="dense").save_pretrained(tmp_path)
    alter(tmp_path, lambda w: w[VALUES].add_(1))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not sparse_modules(model)
    assert not hasattr(model.config, DENSE_CONFIG_KEY)


ALTERED = [
    (lambda w: w[MASK].bitwise_not_().bitwise_and_(0), MASK),
    (lambda w: w[MASK].copy_(w[MASK] | 255), MASK),
    (lambda w: w.update({MASK: w[MASK][:, :-1].contiguous()}), MASK),
    (lambda w: w.update({MASK: w[MASK].int()}), MASK),
    (lambda w: w.pop(MASK), MASK),
    (lambda w: w.pop(VALUES), VALUES),
    (lambda w: w.update({VALUES: w[VALUES][:-1].contiguous()}), VALUES),
    (lambda w: w.update({VALUES: w[VALUES].int()}), VALUES),
]


def test_an_altered_file_is_an_error_that_names_the_tensor(make_sparse, tmp_path):
    make_sparse().save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for change, tensor in ALTERED:
        (tmp_path / "model.safetensors").write_bytes(whole)
        alter(tmp_path, change)
        with pytest.raises((ValueError, RuntimeError), match=tensor.removeprefix("model.")):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_truncated_file_is_an_error_that_names_it(make_sparse, tmp_path):
    make_sparse().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1000)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_record_that_cannot_be_true_is_an_error(make_sparse, tmp_path):
    make_sparse().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for record, message in (
        ({"pattern": "2:4", "num_values": 10**9}, "num_values"),
        ({"pattern": "50%", "num_values": -1}, "num_values"),
        ({"pattern": "2:4"}, "num_values"),
        ({"pattern": "9:4", "num_values": 1024}, "pattern"),
    ):
        config["quantization_config"]["layers"]["layers.0.mlp.up_proj"] = record
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_save_leaves_the_earlier_checkpoint_whole(make_sparse, tmp_path, monkeypatch, error):
    model = make_sparse()
    model.save_pretrained(tmp_path / "kept")
    before = snapshot(tmp_path / "kept")
    written = []

    def fail(tensors, path, *args, **kwargs):
        written.append(path)
        if len(written) == 2:
            raise error
        return save_file(tensors, path, *args, **kwargs)

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    for folder in ("kept", "new"):
        written.clear()
        with pytest.raises(type(error) if isinstance(error, OSError) else error):
            model.save_pretrained(tmp_path / folder, max_shard_size="40KB")
    assert snapshot(tmp_path / "kept") == before
    assert not (tmp_path / "new").exists()


def test_a_full_disk_leaves_the_earlier_checkpoint_whole(make_sparse, tmp_path):
    """A real limit on the size of files."""
    model = make_sparse()
    model.save_pretrained(tmp_path / "kept")
    before = snapshot(tmp_path / "kept")
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
    try:
        with pytest.raises(Exception, match="File too large"):
            model.save_pretrained(tmp_path / "kept")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert snapshot(tmp_path / "kept") == before


def test_a_folder_that_cannot_be_written_to_is_named(make_sparse, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        make_sparse().save_pretrained(tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        make_sparse().save_pretrained(tmp_path / "file" / "folder")


def test_staged_keeps_other_files_and_removes_what_would_be_read_beside_the_new(tmp_path):
    kept = ["README.md", "model.fp16.safetensors", "mine.json", "adapter/adapter_config.json"]
    weights = ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    adapter = ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "ksparse_adapter.json"]
    records = ["sparsity_report.json", "finetuning.json", "korquad_head.safetensors", "generation_config.json"]
    tokenizer = ["added_tokens.json", "chat_template.jinja", "tokenizer.json"]
    (tmp_path / "adapter").mkdir()
    for name in (*kept, *weights, *adapter, *records, *tokenizer):
        (tmp_path / name).write_text("old")

    def add(*names):
        with staged(tmp_path) as staging:
            for name in names:
                (staging / name).write_text("new")
        return {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}

    everything = {*kept, *weights, *adapter, *records, *tokenizer}
    assert add("sparsity_report.json") == everything
    assert add("model.safetensors", "generation_config.json") == {
        *(*kept, *tokenizer, "model.safetensors", "generation_config.json")
    }
    new = {"tokenizer_config.json", "tokenizer.json", "generation_config.json", "model.safetensors"}
    assert add("tokenizer_config.json", "tokenizer.json") == {*kept, *new}


def test_a_model_takes_the_place_of_an_adapter_when_told_to(make_sparse, tmp_path, token_ids):
    model = make_sparse()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(FileExistsError, match="holds an adapter"):
        model.save_pretrained(tmp_path)
    assert sorted(snapshot(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]
    model.save_pretrained(tmp_path, overwrite=True)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), token_ids), logits(model, token_ids))


@pytest.mark.parametrize("kept", [True, False])
def test_no_model_is_saved_over_the_one_that_it_was_made_from(make_model, make_sparse, tmp_path, monkeypatch, kept):
    """By whatever name the folder is given; `kept` is a dense source, otherwise a sparse one that becomes dense."""
    (make_model() if kept else make_sparse()).save_pretrained(tmp_path / "source")
    (tmp_path / "link").symlink_to("source")
    monkeypatch.chdir(tmp_path)
    settings = {"sparsity_config": SparsityConfig("magnitude", "2:4", dataset=None)} if kept else {}
    model, before = AutoModelForCausalLM.from_pretrained("link", **settings), snapshot(tmp_path / "source")
    for name in ("source", "link", tmp_path / "link", "./link/../source/") if kept else ():
        with pytest.raises(FileExistsError, match="was made from"):
            model.save_pretrained(name)
    model.dequantize()
    with pytest.raises(FileExistsError, match="was made from"):
        model.save_pretrained("source")
    assert snapshot(tmp_path / "source") == before
    model.save_pretrained("source", overwrite=True)
    assert sorted(snapshot(tmp_path / "source")) == ["config.json", "generation_config.json", "model.safetensors"]
    assert not hasattr(AutoModelForCausalLM.from_pretrained("source").config, "quantization_config")


def test_a_dense_model_in_the_place_of_a_sparse_one_has_no_records(make_model, make_sparse, tmp_path):
    make_sparse().save_pretrained(tmp_path)
    assert (tmp_path / "sparsity_report.json").is_file()
    make_model().save_pretrained(tmp_path)
    assert sorted(snapshot(tmp_path)) == ["config.json", "generation_config.json", "model.safetensors"]


def test_a_model_in_training_saves_what_it_learnt(make_sparse, tmp_path, token_ids):
    model = make_sparse("50%")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(token_ids, labels=token_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, token_ids), logits(model.eval(), token_ids))


def test_dequantize_after_saving_keeps_the_dtype(make_sparse, tmp_path, token_ids):
    model = make_sparse(dtype=torch.bfloat16)
    expected = logits(model, token_ids)
    model.save_pretrained(tmp_path / "sparse")
    model.dequantize()
    assert model.dtype == torch.bfloat16
    assert torch.equal(logits(model, token_ids), expected)
    assert make_sparse().dequantize(dtype="bfloat16").model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_sparse_modules_of_unknown_origin_are_not_saved(make_sparse, tmp_path):
    model = make_sparse()
    del model.config.quantization_config
    with pytest.raises(ValueError, match="sparse modules that sparsify"):
        model.save_pretrained(tmp_path)


def test_trainer_trains_saves_and_resumes(make_sparse, tmp_path, token_ids):
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": ids, "labels": ids} for ids in token_ids]

    def trainer(model, steps):
        arguments = TrainingArguments(
            tmp_path, max_steps=steps, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1
        )
        return Trainer(model, arguments, train_dataset=data)

    straight = make_sparse()
    zeros = {name: module.weight_mask.clone() for name, module in sparse_modules(straight).items()}
    trainer(straight, 4).train()
    assert all(torch.equal(module.weight_mask, zeros[name]) for name, module in sparse_modules(straight).items())
    resumed = make_sparse()
    trainer(resumed, 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.allclose(logits(resumed.eval(), token_ids), logits(straight.eval(), token_ids), atol=1e-5)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert torch.equal(logits(again, token_ids), logits(resumed, token_ids))
    assert again.sparsity_report.density == 0.5


def test_a_dense_state_dict_with_other_zeros_is_refused(make_sparse):
    model = make_sparse()
    state = {key: value.clone() for key, value in make_sparse().dequantize().state_dict().items()}
    model.load_state_dict(state)
    state["model.layers.0.mlp.up_proj.weight"] += 1
    with pytest.raises(RuntimeError, match="up_proj.weight is dense and not zero"):
        model.load_state_dict(state)


def wrap_block(model):
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")


def wrap_layer(model):
    model.model.layers[0].mlp.up_proj = torch.nn.Sequential(model.model.layers[0].mlp.up_proj)


def delete_block(model):
    del model.model.layers[1]


def other_head(model):
    model.lm_head = torch.nn.Linear(32, 400, bias=False)


def norm_head(model):
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)


def adapt(model):
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize("change", [wrap_block, wrap_layer, delete_block, other_head, norm_head, adapt])
def test_what_nothing_could_load_does_not_replace_a_checkpoint(make_sparse, tmp_path, change):
    model = make_sparse(storage="dense" if change in (wrap_block, other_head) else "packed")
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    change(model)
    with pytest.raises(ValueError, match="nothing could load"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("storage", ["packed", "dense"])
def test_a_block_that_recomputes_its_activations_is_saved_as_any_other(make_sparse, tmp_path, token_ids, storage):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = make_sparse(storage=storage)
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(sparse_modules(again)) == len(sparse_modules(model))
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))


@pytest.mark.parametrize("storage", ["packed", "dense"])
def test_the_decoder_of_a_sparse_model_can_be_saved_by_itself(make_sparse, tmp_path, token_ids, storage):
    model = make_sparse(storage=storage)
    model.model.save_pretrained(tmp_path / "decoder")
    again = AutoModel.from_pretrained(tmp_path / "decoder")
    assert len(sparse_modules(again)) == len(sparse_modules(model))
    with torch.no_grad():
        assert torch.equal(again(token_ids).last_hidden_state, model.model(token_ids).last_hidden_state)
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), token_ids), logits(model, token_ids)
    )
