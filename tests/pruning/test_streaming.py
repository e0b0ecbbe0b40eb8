"""Pruning from disk to disk: the same bits as in memory, whatever cuts it off; and what is refused."""

from __future__ import annotations

import copy
import errno
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, ZambaConfig

from optimum_ksparse import SparsityConfig, SparsityReport, prune_checkpoint
from optimum_ksparse.blocks import Activations, BlockReplay
from optimum_ksparse.checkpoint import files as files_module
from optimum_ksparse.checkpoint.files import find_weight_files
from optimum_ksparse.pruning.progress import BlockDone, listening
from optimum_ksparse.pruning.streaming import Journal, Workspace, workspace
from optimum_ksparse.pruning.streaming import place as disk_module

from ..conftest import REPOSITORY, thinned
from ..loopback_hub import LoopbackHub

torch.set_num_threads(1)

MakeModel = Callable[..., PreTrainedModel]
WORK = ".ksparse-pruning"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def contents(folder: Path) -> dict[str, bytes | dict]:
    """Every file's bytes; the report without what differs from run to run."""
    found: dict[str, bytes | dict] = {}
    for path in folder.rglob("*"):
        if path.name == "sparsity_report.json":
            report = json.loads(path.read_text(encoding="utf-8"))
            for row in (report, *report["layers"]):
                del row["seconds"]
            del report["peak_memory_bytes"]
            found[path.name] = report
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


# ---- the same as in memory


# Those whose blocks lie elsewhere, are called otherwise, or hold other layers; Llamas are in all other tests.
_KINDS = ("gpt_neox", "gemma3", "gpt2", "opt", "bloom", "mpt")
_ASKED = [
    ("float32", {"method": "wanda", "pattern": "2:4"}),
    ("bfloat16", {"method": "sparsegpt", "pattern": "50%", "storage": "dense"}),
    ("auto", {"method": "magnitude", "pattern": "4:8", "dataset": None}),
]


@pytest.mark.parametrize(
    ("name", "dtype", "asked"),
    thinned([(name, *asked) for name, asked in zip(_KINDS, itertools.cycle(_ASKED))], ["gemma3", "gpt2", "mpt"]),
    ids=_KINDS,
)
def test_the_result_is_that_of_from_pretrained_bit_for_bit(
    name: str,
    dtype: str,
    asked: dict[str, Any],
    tmp_path: Path,
    make_model: MakeModel,
    config: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make_model(name).save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype, sparsity_config=config(**asked))
    model.save_pretrained(tmp_path / "memory")
    with caplog.at_level(logging.WARNING):
        report = prune_checkpoint(tmp_path / "dense", tmp_path / "disk", config(**asked), dtype=dtype)
    assert "meta device" not in caplog.text  # blocks are on the disk: that is the point
    assert_same_tensors(tensors(tmp_path / "disk"), tensors(tmp_path / "memory"))
    for file in ("config.json", "generation_config.json"):
        written = [tmp_path / folder / file for folder in ("memory", "disk")]
        assert [path.exists() for path in written] in ([True, True], [False, False])
        if written[0].exists():
            assert written[0].read_bytes() == written[1].read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "disk")
    for (path, tensor), expected in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(tensor, expected), path
    assert [row.name for row in report.layers] == [row.name for row in model.sparsity_report.layers]
    for row, expected_row in zip(report.layers, model.sparsity_report.layers, strict=True):
        assert row.relative_output_error == expected_row.relative_output_error
    assert (report.config, report.calibration) == (model.sparsity_report.config, model.sparsity_report.calibration)
    assert report.num_parameters == model.sparsity_report.num_parameters
    assert report.fingerprint == SparsityReport.load(tmp_path / "memory/sparsity_report.json").fingerprint is not None
    assert not [path for path in (tmp_path / "disk").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("batch_size", thinned([1, 4], [4]))
def test_activations_in_files_are_those_in_memory(batch_size: int, tmp_path: Path, source: Path, config: Any) -> None:
    asked = config(batch_size=batch_size, true_sequential=batch_size == 4, bos_in_statistics=batch_size != 1)
    prune_checkpoint(source, tmp_path / "memory", asked)
    prune_checkpoint(source, tmp_path / "files", asked, activation_memory=0)
    assert contents(tmp_path / "memory") == contents(tmp_path / "files")


def assert_same_as_in_memory(source: Any, folder: Path, config: SparsityConfig, **loading: Any) -> None:
    """Prunes `source` in memory and from disk to disk: all files that are no weights, but the report, and all tensors
    are the same."""
    model = AutoModelForCausalLM.from_pretrained(source, sparsity_config=copy.deepcopy(config), **loading)
    model.save_pretrained(folder / "memory")
    prune_checkpoint(source, folder / "disk", config, **loading)
    assert_same_tensors(tensors(folder / "disk"), tensors(folder / "memory"))
    reports = [SparsityReport.load(folder / name / "sparsity_report.json") for name in ("memory", "disk")]
    assert reports[0].fingerprint == reports[1].fingerprint
    memory, disk = (
        {name: content for name, content in contents(folder / name).items() if name.endswith((".py", "config.json"))}
        for name in ("memory", "disk")
    )
    assert disk == memory


@pytest.mark.parametrize(
    ("dtype", "stored"), thinned([("float16", torch.float32), (torch.bfloat16, torch.float16)], ["float16"])
)
def test_modules_that_stay_in_float32(
    stored: torch.dtype, dtype: Any, tmp_path: Path, make_model: MakeModel, token_ids: torch.Tensor
) -> None:
    """RWKV keeps two parameters of a block in float32 beside float16; what is stored may have any dtype."""
    make_model("rwkv", dtype=stored).save_pretrained(tmp_path / "dense")
    config = SparsityConfig("wanda", "2:4", dataset=token_ids)
    assert_same_as_in_memory(tmp_path / "dense", tmp_path, config, dtype=dtype)
    kept = tensors(tmp_path / "disk")["rwkv.blocks.0.attention.time_decay"].dtype
    assert kept == (torch.float32 if dtype == "float16" else torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["packed", "dense"])
def test_what_blocks_share_is_stored_once(storage: str, tmp_path: Path, token_ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6}
    mamba = {"mamba_d_state": 8, "mamba_dt_rank": 8, "n_mamba_heads": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    config = ZambaConfig(**sizes, **heads, attn_layer_period=2, attn_layer_offset=1, **mamba)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "dense")
    asked = {"dataset": token_ids, "batch_size": 2, "storage": storage}
    others = {"modules_to_not_convert": [".*mamba", ".*mamba_decoder", ".*linear"]}
    with pytest.raises(ValueError, match=r"shares its weight with layers\.\d\.shared_transf"):
        prune_checkpoint(tmp_path / "dense", tmp_path / "refused", SparsityConfig.from_flat(**asked, **others))
    assert_same_as_in_memory(tmp_path / "dense", tmp_path, SparsityConfig.from_flat(**asked, skip_unsupported=True))
    written = {name for name in tensors(tmp_path / "disk") if "shared_transf" in name}
    assert written and len({name.split(".")[2] for name in written}) == 1


def write_remote_model(folder: Path, model: PreTrainedModel) -> None:
    """A checkpoint whose code lies beside its weights, in three files."""
    model.save_pretrained(folder)
    (folder / "scale.py").write_text("SCALE = 1.0\n")
    (folder / "configuration_tiny.py").write_text(
        'from transformers import LlamaConfig\n\n\nclass TinyConfig(LlamaConfig):\n    model_type = "tiny-remote"\n'
    )
    (folder / "modeling_tiny.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_tiny import TinyConfig\n"
        "from .scale import SCALE\n\n\nclass TinyForCausalLM(LlamaForCausalLM):\n"
        "    config_class = TinyConfig\n    scale = SCALE\n"
    )
    values = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"}
    values |= {"model_type": "tiny-remote", "architectures": ["TinyForCausalLM"], "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.slow
def test_code_beside_the_weights(tmp_path: Path, make_model: MakeModel, config: Any, hub: LoopbackHub) -> None:
    from huggingface_hub import HfApi

    write_remote_model(tmp_path / "remote", make_model("llama"))
    HfApi().create_repo("me/remote")
    commit = HfApi().upload_folder(repo_id="me/remote", folder_path=tmp_path / "remote").oid
    trusted = {"trust_remote_code": True, "dtype": "bfloat16"}
    assert_same_as_in_memory(tmp_path / "remote", tmp_path / "local", config(), **trusted)
    for number, source in enumerate((tmp_path / "remote", "me/remote")):
        prune_checkpoint(source, tmp_path / str(number), config(), code_revision=commit, **trusted)
        for name in ("scale.py", "configuration_tiny.py", "modeling_tiny.py"):
            assert (tmp_path / str(number) / name).read_text() == (tmp_path / "remote" / name).read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "local" / "disk", trust_remote_code=True)
    assert type(again).__name__ == "TinyForCausalLM"


def test_tied_embeddings_are_stored_once(tmp_path: Path, make_model: MakeModel, config: Any) -> None:
    make_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    prune_checkpoint(tmp_path / "dense", tmp_path / "disk", config())
    stored = tensors(tmp_path / "disk")
    assert "model.embed_tokens.weight" in stored
    assert "lm_head.weight" not in stored
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "disk")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_hub_id(tmp_path: Path, source: Path, finished: Path, config: Any, hub: LoopbackHub) -> None:
    from huggingface_hub import HfApi

    HfApi().create_repo("me/dense")
    commit = HfApi().upload_folder(repo_id="me/dense", folder_path=source).oid
    report = prune_checkpoint("me/dense", tmp_path / "hub", config())
    assert_same_tensors(tensors(tmp_path / "hub"), tensors(finished))
    assert (report.base_model, report.base_revision) == ("me/dense", commit)
    assert (tmp_path / "hub" / "tokenizer.json").is_file()


def test_a_subfolder_is_read_and_recorded(tmp_path: Path, source: Path, finished: Path, config: Any) -> None:
    shutil.copytree(source, tmp_path / "models" / "small")
    report = prune_checkpoint(tmp_path / "models", tmp_path / "disk", config(), subfolder="small")
    assert report.base_arguments == {"subfolder": "small"}
    assert_same_tensors(tensors(tmp_path / "disk"), tensors(finished))
    assert (tmp_path / "disk" / "tokenizer.json").is_file()


def test_the_index_is_what_the_files_hold(finished: Path) -> None:
    index = json.loads((finished / "model.safetensors.index.json").read_text())
    found = {}
    for path in finished.glob("*.safetensors"):
        found |= {name: (path.name, tensor.nbytes) for name, tensor in load_file(path).items()}
    assert index["weight_map"] == {name: file for name, (file, _) in sorted(found.items())}
    assert index["metadata"]["total_size"] == sum(size for _, size in found.values())


def test_text_is_drawn_once_and_kept_for_the_next_run(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    shutil.copy(REPOSITORY / "examples/data/korean_calibration.txt", text)
    asked = SparsityConfig("wanda", dataset=str(text), num_samples=4, seq_len=16)
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "add_block", fails(Workspace.add_block, 2, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(source, tmp_path / "disk", asked)
    text.unlink()
    report = prune_checkpoint(source, tmp_path / "disk", asked)
    assert report.calibration["num_samples"] == 4


# ---- cut off


def fails(function: Callable[..., Any], number: int, error: BaseException) -> Callable[..., Any]:
    """`function`, whose call of that number (from 0) fails instead."""
    calls = iter(range(10**9))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise error
        return function(*args, **kwargs)

    return wrapped


# Where a run of three blocks is cut off again and again: what is called, and at which of its calls in each run.
PLACES = {
    "save_tensors": (workspace, (0, 2, 3)),
    "replace": (workspace.os, (3, 6, 13, 5)),
    "link": (workspace.os, (0,)),
    "Journal.save": (Journal, (1, 2, 4)),
    "unlink": (os, (2, 8, 3)),
    "fsync": (os, (12, 20, 24)),
    "Activations.replace": (Activations, (1, 0)),
    "Activations.save": (Activations, (0, 0)),
    "sha256_of": (workspace, (0, 2, 3)),
    "rmtree": (workspace.shutil, (0, 1)),
}
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("name", thinned(PLACES, ["replace", "Journal.save", "Activations.replace"]))
def test_after_an_error_anywhere_the_same_call_ends_with_the_same_bytes(
    name: str,
    tmp_path: Path,
    source: Path,
    whole: Any,
    config: Any,
    monkeypatch: pytest.MonkeyPatch,
    always_snapshot: None,
) -> None:
    asked, output, expected = config(), tmp_path / "disk", whole
    if name == "save_tensors":  # at the end, too
        asked = config(storage="dense")
        prune_checkpoint(source, tmp_path / "dense", asked)
        expected = contents(tmp_path / "dense")
    (where, numbers), attribute = PLACES[name], name.split(".")[-1]
    failures = 0
    for number, error, memory in zip(
        numbers, itertools.cycle((FULL, KeyboardInterrupt())), itertools.cycle((0, "1GB"))
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, attribute, fails(getattr(where, attribute), number, error))
            try:
                prune_checkpoint(source, output, asked, activation_memory=memory)
            except type(error):
                failures += 1
        model = output / "config.json"
        assert not model.exists() or contents_without_work(output) == expected, "a half-written model"
    assert failures == (0 if name == "link" else len(numbers))  # what cannot be linked is copied
    prune_checkpoint(source, output, asked)
    assert contents(output) == expected


def contents_without_work(folder: Path) -> dict[str, bytes | dict]:
    return {name: content for name, content in contents(folder).items() if not name.startswith(".")}


_CHILD = """
import os, signal, sys, torch, accelerate.hooks
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # once for all that are killed
from optimum_ksparse import SparsityConfig, prune_checkpoint
from optimum_ksparse.pruning.streaming import place as disk
torch.set_num_threads(1)
disk._SNAPSHOT_SECONDS = -1.0
source, output, ids = sys.argv[1:]
def killing(function, number):
    calls = iter(range(1, 10**9))
    def wrapped(*args):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return wrapped
codes = []
# Each gets a little further; the last one is not killed.
for place, number, memory in (("fsync", 9, 0), ("replace", 6, "1GB"), ("replace", 99, 0)):
    child = os.fork()
    if child == 0:
        setattr(os, place, killing(getattr(os, place), number))
        config = SparsityConfig("sparsegpt", "2:4", dataset=torch.load(ids), batch_size=2)
        prune_checkpoint(source, output, config, activation_memory=memory)
        os._exit(0)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(codes)
"""


@pytest.mark.processes
def test_processes_killed_again_and_again(tmp_path: Path, source: Path, token_ids: Any, whole: Any) -> None:
    """With the activations in files, and in memory."""
    torch.save(token_ids, tmp_path / "ids.pt")
    arguments = [str(path) for path in (source, tmp_path / "disk", tmp_path / "ids.pt")]
    done = subprocess.run([sys.executable, "-c", _CHILD, *arguments], capture_output=True, text=True)
    assert done.stdout.split("\n")[-2:] == [str([-9, -9, 0]), ""], done.stderr
    assert contents(tmp_path / "disk") == whole


def test_a_run_goes_on_where_it_was_cut_off(unfinished: Path, whole: Any, source: Path, config: Any) -> None:
    seen: list[BlockDone] = []
    with listening(seen.append):
        report = prune_checkpoint(source, unfinished, config())
    assert [(block.done, block.total, block.resumed) for block in seen] == [(3, 3, 2)]
    assert len(report.layers) == 21
    assert contents(unfinished) == whole


@pytest.mark.parametrize("damage", ["changed", "snapshot cut"])
def test_damaged_files_of_a_run_are_made_again(
    damage: str, unfinished: Path, whole: Any, source: Path, config: Any
) -> None:
    work = unfinished / WORK
    block = work / "block-00001.safetensors"
    snapshots = [path for path in work.iterdir() if path.name.startswith("activations")]
    assert snapshots
    if damage == "changed":
        content = bytearray(block.read_bytes())
        content[-1] ^= 1
        block.write_bytes(content)
    for path in snapshots if "snapshot" in damage else []:
        path.write_bytes(path.read_bytes()[:-1])
    seen: list[BlockDone] = []
    with listening(seen.append):
        prune_checkpoint(source, unfinished, config())
    assert seen[0].resumed == (2 if "snapshot" in damage else 1)
    assert contents(unfinished) == whole


def test_other_settings_are_refused_with_the_difference(unfinished: Path, source: Path, config: Any) -> None:
    with pytest.raises(ValueError, match=r"settings\.pattern: was '2:4', is '4:8'.*resume=False"):
        prune_checkpoint(source, unfinished, config(pattern="4:8"))
    with pytest.raises(ValueError, match="dtype: was 'auto', is 'bfloat16'"):
        prune_checkpoint(source, unfinished, config(), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"settings\.dataset"):
        prune_checkpoint(source, unfinished, config(dataset=torch.ones(6, 24, dtype=torch.int64)))
    prune_checkpoint(source, unfinished, config())  # none of this has harmed it


@pytest.mark.parametrize("phase", thinned(["pruning", "complete"], ["pruning"]))
def test_a_refusal_leaves_an_unfinished_run_without_data_as_it_is(
    phase: str, tmp_path: Path, source: Path, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = (Workspace, "add_block", 2) if phase == "pruning" else (Workspace, "publish", 0)
    with monkeypatch.context() as patch:
        patch.setattr(*where[:2], fails(getattr(*where[:2]), where[2], KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(source, tmp_path / "disk", config("magnitude"))
    before = contents(tmp_path / "disk")
    with pytest.raises(ValueError, match="other settings"):
        prune_checkpoint(source, tmp_path / "disk", config("magnitude", "4:8"))
    assert contents(tmp_path / "disk") == before
    prune_checkpoint(source, tmp_path / "disk", config("magnitude"))
    prune_checkpoint(source, tmp_path / "whole", config("magnitude"))
    assert contents(tmp_path / "disk") == contents(tmp_path / "whole")


@pytest.mark.parametrize(("done", "memory"), [(1, 0), (2, "1GB")])
def test_a_snapshot_is_used_and_blocks_before_it_are_not_run_again(
    memory: Any, done: int, tmp_path: Path, source: Path, config: Any, monkeypatch: Any, always_snapshot: None
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "add_block", fails(Workspace.add_block, done, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(source, tmp_path / "disk", config(), activation_memory=memory)
    run: list[int] = []
    advance = BlockReplay.advance
    monkeypatch.setattr(BlockReplay, "advance", lambda self, i, block: (run.append(i), advance(self, i, block))[1])
    prune_checkpoint(source, tmp_path / "disk", config(), activation_memory=memory)
    assert run == list(range(done, 2))


def test_activations_of_a_later_block_do_not_pass_for_those_of_the_snapshot(
    unfinished: Path, whole: Any, source: Path, config: Any
) -> None:
    journal = Journal.load(unfinished / WORK)
    assert journal is not None and journal.snapshot is not None
    journal.snapshot.block -= 1
    journal.save(unfinished / WORK)
    assert all((unfinished / WORK / name).exists() for name in journal.snapshot.files)
    prune_checkpoint(source, unfinished, config())
    assert contents(unfinished) == whole


def test_starting_over_that_is_killed_leaves_no_journal_of_before(
    unfinished: Path, source: Path, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fails(Path.unlink, 1, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(source, unfinished, config(), resume=False)
    assert not (unfinished / WORK / "journal.json").exists()


def test_a_full_disk_while_the_tokenizer_is_written_is_an_error(
    tmp_path: Path, source: Path, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(AutoTokenizer.from_pretrained(source))
    with monkeypatch.context() as patch:
        patch.setattr(kind, "save_pretrained", fails(kind.save_pretrained, 0, FULL))
        with pytest.raises(OSError, match="No space left"):
            prune_checkpoint(source, tmp_path / "disk", config("magnitude"))
    prune_checkpoint(source, tmp_path / "disk", config("magnitude"))
    assert (tmp_path / "disk" / "tokenizer.json").is_file()


def test_files_in_subfolders_are_published_over_earlier_ones(tmp_path: Path, own_source: Path, config: Any) -> None:
    more = own_source / "additional_chat_templates"
    more.mkdir()
    (own_source / "chat_template.jinja").write_text("{{ messages }}")
    (more / "tools.jinja").write_text("{{ messages }}")
    for _ in range(2):
        prune_checkpoint(own_source, tmp_path / "disk", config("magnitude"), resume=False)
        assert (tmp_path / "disk" / "additional_chat_templates" / "tools.jinja").is_file()


def test_another_source_is_refused(unfinished: Path, own_source: Path, config: Any) -> None:
    path = sorted(own_source.glob("*.safetensors"))[1]
    changed = {name: tensor + 1 for name, tensor in load_file(path).items()}
    save_file(changed, path, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"source\.{path.name}: was"):
        prune_checkpoint(own_source, unfinished, config())


def test_starting_over(unfinished: Path, tmp_path: Path, source: Path, config: Any) -> None:
    seen: list[BlockDone] = []
    with listening(seen.append):
        prune_checkpoint(source, unfinished, config("wanda"), resume=False)
    assert (len(seen), seen[0].resumed) == (3, 0)
    prune_checkpoint(source, tmp_path / "whole", config("wanda"))
    assert contents(unfinished) == contents(tmp_path / "whole")


def test_a_damaged_journal_is_named(unfinished: Path, source: Path, config: Any) -> None:
    (unfinished / WORK / "journal.json").write_text("{")
    with pytest.raises(ValueError, match=r"journal\.json is damaged.*resume=False"):
        prune_checkpoint(source, unfinished, config())


def test_a_finished_run_is_not_run_again(tmp_path: Path, source: Path, finished: Path, config: Any) -> None:
    shutil.copytree(finished, tmp_path / "disk")
    first = SparsityReport.load(finished / "sparsity_report.json")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "disk").iterdir()}
    assert prune_checkpoint(source, tmp_path / "disk", config()) == first
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "disk").iterdir()}
    with pytest.raises(FileExistsError, match="another sparse checkpoint"):
        prune_checkpoint(source, tmp_path / "disk", config("wanda"))
    prune_checkpoint(source, tmp_path / "disk", config("magnitude", storage="dense"), resume=False)
    assert SparsityReport.load(tmp_path / "disk" / "sparsity_report.json").config["method"] == "magnitude"


def test_a_run_that_failed_before_its_work_leaves_nothing(tmp_path: Path, source: Path, config: Any) -> None:
    with pytest.raises(ValueError, match="matches nothing"):
        prune_checkpoint(source, tmp_path / "disk", config(modules_to_not_convert=["nonsense"]))
    assert not (tmp_path / "disk").exists()


def test_one_process_at_a_time(unfinished: Path, source: Path, config: Any) -> None:
    from filelock import FileLock

    with FileLock(unfinished / WORK / "lock"), pytest.raises(BlockingIOError, match="another process is pruning"):
        prune_checkpoint(source, unfinished, config())


# ---- bad input


def spoil(source: Path, how: str) -> None:
    shards = sorted(source.glob("*.safetensors"))
    index_path = source / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    if how == "missing shard":
        shards[1].unlink()
    elif how == "truncated shard":
        shards[1].write_bytes(shards[1].read_bytes()[:-10])
    elif how == "absent tensor":
        index["weight_map"]["model.layers.9.weight"] = shards[0].name
    elif how == "missing tensor":
        name = next(name for name in index["weight_map"] if "layers.2.mlp" in name)
        path = source / index["weight_map"].pop(name)
        save_file({key: value for key, value in load_file(path).items() if key != name}, path, {"format": "pt"})
    elif how == "tensor twice":
        twice = load_file(shards[0]) | dict(list(load_file(shards[1]).items())[:1])
        save_file(twice, shards[0], {"format": "pt"})
    elif how == "unlisted tensor":
        save_file(load_file(shards[0]) | {"extra.weight": torch.zeros(2)}, shards[0], {"format": "pt"})
    elif how == "outside":
        index["weight_map"]["model.norm.weight"] = "../model.safetensors"
    elif how in ("pickle", "nothing"):
        for path in shards:
            path.unlink()
        if how == "pickle":
            (source / "pytorch_model.bin").write_bytes(b"")
    if how in ("pickle", "nothing"):
        index_path.unlink()
    else:
        index_path.write_text("{" if how == "damaged index" else json.dumps(index))


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("missing shard", FileNotFoundError, r"no model-00002-of-\d+\.safetensors, which its .*index\.json names"),
        ("truncated shard", ValueError, r"model-00002-of-\d+\.safetensors is truncated or damaged"),
        ("absent tensor", ValueError, r"model\.layers\.9\.weight is in model-00001-of-\d+\.safetensors by the index"),
        ("missing tensor", ValueError, r"not in the checkpoint.*model\.layers\.2\.mlp"),
        ("tensor twice", ValueError, r"is in model-00001-of-\d+\.safetensors and in model-00002-of"),
        ("unlisted tensor", ValueError, r"extra\.weight is in no file by the index, and in fact in model-00001"),
        ("outside", ValueError, r"names '\.\./model\.safetensors' as a weight file"),
        ("pickle", ValueError, r"pickle only \(pytorch_model\.bin\).*convert.*save_pretrained"),
        ("nothing", FileNotFoundError, r"no model\.safetensors"),
        ("damaged index", ValueError, r"model\.safetensors\.index\.json is damaged"),
    ],
)
def test_damaged_sources(
    how: str, error: type[Exception], message: str, tmp_path: Path, own_source: Path, config: Any
) -> None:
    spoil(own_source, how)
    with pytest.raises(error, match=message):
        prune_checkpoint(own_source, tmp_path / "disk", config())
    assert not (tmp_path / "disk").exists()


@pytest.mark.parametrize("elsewhere", ["../source/model.safetensors", "/etc/model.safetensors"])
def test_an_index_that_leaves_its_folder_is_refused_before_anything_is_read(
    elsewhere: str, tmp_path: Path, make_pruned: Any, own_source: Path, config: Any
) -> None:
    make_pruned().save_pretrained(tmp_path / "sparse", max_shard_size="40KB")
    for folder, settings in ((tmp_path / "sparse", {}), (own_source, config())):
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"]["model.norm.weight"] = elsewhere
        path.write_text(json.dumps(index))
        with pytest.raises(ValueError, match="index.json names .* as a weight file"):
            AutoModelForCausalLM.from_pretrained(folder, **({"sparsity_config": settings} if settings else {}))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, own_source: Path, config: Any) -> None:
    sorted(own_source.glob("*.safetensors"))[1].chmod(0)
    with pytest.raises(PermissionError, match="model-00002"):
        prune_checkpoint(own_source, tmp_path / "disk", config())


def test_weights_that_are_not_whole_are_named(tmp_path: Path, own_source: Path, config: Any) -> None:
    path = next(p for p in own_source.glob("*.safetensors") if "model.layers.2.mlp.up_proj.weight" in load_file(p))
    state = load_file(path)
    state["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(state, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.up_proj\.weight holds NaN or Inf"):
        prune_checkpoint(own_source, tmp_path / "disk", config())
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.up_proj.*holds NaN or Inf"):
        prune_checkpoint(own_source, tmp_path / "magnitude", config("magnitude", dataset=None))


def test_a_file_that_goes_away_meanwhile(
    tmp_path: Path, own_source: Path, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove(*args: Any) -> None:
        for path in own_source.glob("*.safetensors"):
            path.unlink()

    monkeypatch.setattr(disk_module, "check_run_space", remove)
    with pytest.raises(OSError, match=r"model\.layers\.0.* cannot be read"):
        prune_checkpoint(own_source, tmp_path / "disk", config())


@pytest.mark.parametrize("where", thinned(["config.json", "a block", "not a block"], ["a block"]))
def test_a_source_that_changes_meanwhile(
    where: str, tmp_path: Path, own_source: Path, whole: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its size and its times put back."""
    tensor = {"a block": "model.layers.2.mlp.up_proj.weight", "not a block": "model.norm.weight"}.get(where)
    shards = (path for path in own_source.glob("*.safetensors") if tensor in load_file(path))
    path = own_source / where if tensor is None else next(shards)
    before, add_block = path.read_bytes(), Workspace.add_block

    changed = before.replace(b'"silu"', b'"gelu"') if tensor is None else before[:-1] + bytes([before[-1] ^ 1])

    def write(content: bytes) -> None:
        times = path.stat()
        with open(path, "r+b") as file:
            file.write(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def add(work: Workspace, index: int, *arguments: Any) -> None:
        add_block(work, index, *arguments)
        if index == 1:
            write(changed)

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "add_block", add)
        with pytest.raises(OSError, match=f"{path.name} has changed since the run began"):
            prune_checkpoint(own_source, tmp_path / "disk", config())
    assert not (tmp_path / "disk" / "config.json").exists()
    with pytest.raises(ValueError, match=rf"source\.{path.name}: was"):
        prune_checkpoint(own_source, tmp_path / "disk", config())
    write(before)
    prune_checkpoint(own_source, tmp_path / "disk", config())
    assert contents(tmp_path / "disk") == whole


def test_a_source_whose_times_alone_change_is_the_same(
    tmp_path: Path, own_source: Path, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = disk_module.check_run_space
    monkeypatch.setattr(
        disk_module, "check_run_space", lambda *given: ([os.utime(p) for p in own_source.iterdir()], original(*given))
    )
    prune_checkpoint(own_source, tmp_path / "disk", config("magnitude"))


def test_sources_that_are_sparse_or_quantized(tmp_path: Path, finished: Path, config: Any) -> None:
    with pytest.raises(ValueError, match=r"sparse already \(optimum-ksparse\)"):
        prune_checkpoint(finished, tmp_path / "again", config())


def test_outputs_that_hold_something_else(tmp_path: Path, source: Path, config: Any) -> None:
    asked = config("magnitude")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        prune_checkpoint(source, tmp_path / "file", asked)
    with pytest.raises(ValueError, match="is the source"):
        prune_checkpoint(source, source, asked)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    with pytest.raises(FileExistsError, match=r"holds something else \(cat\.jpg\)"):
        prune_checkpoint(source, tmp_path / "photos", asked)
    (tmp_path / "clone" / ".git").mkdir(parents=True)
    (tmp_path / "clone" / "README.md").write_text("mine")
    prune_checkpoint(source, tmp_path / "clone", asked)
    assert (tmp_path / "clone" / "README.md").read_text() == "mine"


def test_no_space_is_noticed_before_the_work(
    tmp_path: Path, source: Path, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=50_000))
    with pytest.raises(OSError, match=r"about 0\.00 GB are needed") as caught:
        prune_checkpoint(source, tmp_path / "disk", config())
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "disk").exists()


@pytest.mark.parametrize("values", [None, "int8", "int4"])
def test_as_much_space_is_asked_for_as_the_tensors_take(
    values: str | None, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(disk_module, "check_space", lambda folder, needed, what: asked.append(needed))
    prune_checkpoint(source, tmp_path / "disk", SparsityConfig("magnitude", "2:4", dataset=None, values=values))
    assert asked == [sum(tensor.nbytes for tensor in tensors(tmp_path / "disk").values())]


def test_arguments(tmp_path: Path, source: Path, config: Any) -> None:
    for arguments, error, message in (
        ({"activation_memory": "much"}, ValueError, "activation_memory='much' is no size"),
        ({"activation_memory": -1}, ValueError, "activation_memory=-1"),
        ({"gguf_file": "model.gguf"}, TypeError, "no argument 'gguf_file'"),
    ):
        with pytest.raises(error, match=message):
            prune_checkpoint(source, tmp_path / "disk", config(), **arguments)
    with pytest.raises(TypeError, match="config must be a SparsityConfig, found dict"):
        prune_checkpoint(source, tmp_path / "disk", {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='dataset="self" needs the whole model'):
        prune_checkpoint(source, tmp_path / "disk", config(dataset="self"))


# ---- parts


@pytest.mark.parametrize(("limit", "dtype"), [(None, torch.float32), (0, torch.bfloat16)])
def test_saved_activations_are_read_back(limit: int | None, dtype: torch.dtype, tmp_path: Path) -> None:
    batches = [torch.randn(4, 3, 8).to(dtype), torch.randn(4, 3, 8).to(dtype), torch.randn(1, 3, 8).to(dtype)]
    hidden = Activations(3, limit, tmp_path)
    for batch in batches:
        hidden.append(batch)
    assert hidden.in_files == (limit == 0)
    hidden.replace(batch + 1 for batch in batches)
    hidden.replace(list(hidden))
    saved = hidden.save()
    hidden.replace(batch * 2 for batch in hidden)  # what was saved stays
    assert len(list(tmp_path.iterdir())) == (6 if limit == 0 else 3)  # space is counted for two blocks
    again = Activations(3, limit, tmp_path)
    for batch in batches:
        again.append(torch.zeros_like(batch))
    assert again.paths(2) == saved
    again.load(2)
    for batch, expected in zip(again, batches, strict=True):
        assert torch.equal(batch, expected + 1)
    again[0].zero_() if limit == 0 else None  # a block may write into its input
    assert torch.equal(again[0], batches[0] + 1) or limit is None


@pytest.mark.parametrize("name", ["tokenizer.json", "more/chat.jinja", ""])
def test_a_source_is_told_apart_by_every_byte(name: str, tmp_path: Path, own_source: Path, config: Any) -> None:
    """A finished checkpoint is not that of a source of which anything has changed, wherever in a file."""
    (own_source / "more").mkdir()
    (own_source / "more" / "chat.jinja").write_text("{{ messages }}")
    prune_checkpoint(own_source, tmp_path / "disk", config("magnitude", dataset=None))
    before = find_weight_files(own_source).sha256()
    assert find_weight_files(own_source).sha256() == before
    path = own_source / name if name else sorted(own_source.glob("*.safetensors"))[1]
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)
    assert find_weight_files(own_source).sha256() != before
    if not name:
        with pytest.raises(FileExistsError, match="another sparse checkpoint"):
            prune_checkpoint(own_source, tmp_path / "disk", config("magnitude", dataset=None))
