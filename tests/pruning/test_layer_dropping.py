"""Dropping decoder blocks: which ones, and that what is left is an ordinary smaller model everywhere."""

from __future__ import annotations

import copy
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, Mamba2Config, PreTrainedModel

from optimum_ksparse import EvaluationProtocol, SparsityConfig, SparsityReport, prune_checkpoint, sparsify
from optimum_ksparse.api.inspection import inspect_checkpoint
from optimum_ksparse.blocks import find_blocks
from optimum_ksparse.checkpoint import sparse_modules
from optimum_ksparse.hub import write_card
from optimum_ksparse.pruning.layer_dropping import check_drop, drop_blocks
from optimum_ksparse.pruning.layer_dropping.settings import smaller
from optimum_ksparse.report import DroppedBlocks
from optimum_ksparse.study.grid import grid
from optimum_ksparse.study.recipe import Recipe

from ..conftest import REPOSITORY, VOCABULARY, make_config
from ..loopback_hub import LoopbackHub
from .test_streaming import assert_same_tensors, tensors

torch.set_num_threads(1)

_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
_SMALL |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "num_hidden_layers": 4}
# What each kind of decoder needs for four blocks; of a kind that is none of `ARCHITECTURES` the whole config.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]},
    "gpt_neox": {},
    "gpt2": {},
    "opt": {},
    "falcon": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mpt": {},
    "Qwen2Config": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "num_hidden_layers": 4},
    "Qwen2MoeConfig": {**_EXPERTS, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 2},
    "Qwen3MoeConfig": {**_EXPERTS, "head_dim": 8, "mlp_only_layers": [3]},
}
_NAMES = {"gpt2": "n_layer", "mpt": "n_layers", "gpt_neo": "num_layers"}


def make(family: str, **more: Any) -> PreTrainedModel:
    """A random model of four blocks, whose weights are large enough that each matters."""
    torch.manual_seed(0)
    if family.endswith("Config"):
        config = getattr(transformers, family)(**{**_SMALL, **FAMILIES[family], **more})
    else:
        settings = {_NAMES.get(family, "num_hidden_layers"): 4, **FAMILIES[family], **more}
        config = make_config(family, **settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in find_blocks(model).blocks[1].parameters():
        parameter.data *= 3
    return model


@pytest.fixture
def settings(token_ids: torch.Tensor) -> Any:
    def make_settings(pattern: str | None = None, drop_layers: int = 2, **more: Any) -> SparsityConfig:
        return SparsityConfig(
            **{"method": "wanda", "dataset": token_ids, "batch_size": 2, **more},
            pattern=pattern,
            drop_layers=drop_layers,
        )

    return make_settings


def generated(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Ten tokens with a key-value cache, beyond the sliding windows."""
    how: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None, **how)


def plain_model(folder: Path) -> PreTrainedModel:
    """What transformers loads without this package's part of `from_pretrained`."""
    original = PreTrainedModel.from_pretrained.__func__.__wrapped__  # type: ignore[attr-defined]
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    return original(kind, folder).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_smaller_model_is_the_one_that_its_checkpoint_gives(
    family: str, tmp_path: Path, settings: Any, token_ids: torch.Tensor
) -> None:
    model = make(family)
    dense = [block.state_dict() for block in copy.deepcopy(find_blocks(model).blocks)]
    before = model.num_parameters()
    report = sparsify(model, settings())
    dropped = report.dropped
    assert len(dropped.blocks) == 2
    kept = [index for index in range(4) if index not in dropped.blocks]
    for block, index in zip(find_blocks(model).blocks, kept, strict=True):
        assert_same_tensors(block.state_dict(), dense[index])
    assert model.config.num_hidden_layers == 2
    assert (dropped.num_parameters, report.num_parameters) == (before, model.num_parameters())
    model.save_pretrained(tmp_path)
    again = plain_model(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, again(token_ids).logits)
    assert torch.equal(generated(model, token_ids[:2, :6]), generated(again, token_ids[:2, :6]))
    assert report.dropped == SparsityReport.load(tmp_path / "sparsity_report.json").dropped


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt"])
def test_blocks_that_stay_compute_as_before(family: str, settings: Any, token_ids: torch.Tensor) -> None:
    model = make(family)
    reference, outputs = copy.deepcopy(model), []
    report = sparsify(model, settings())
    blocks = find_blocks(reference).blocks
    for index in report.dropped.blocks:
        blocks[index].forward = lambda hidden, *args, **kwargs: hidden
    for found in (model, reference):
        with torch.no_grad():
            outputs.append(found(token_ids, use_cache=False).logits)
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "Qwen3MoeConfig"])
def test_scores_are_those_of_a_plain_forward_pass(family: str, settings: Any, token_ids: torch.Tensor) -> None:
    model = make(family)
    last: list[torch.Tensor] = []
    hook = (
        find_blocks(model)
        .blocks[-1]
        .register_forward_hook(
            lambda module, args, output: last.append(output[0] if isinstance(output, tuple) else output)
        )
    )
    with torch.no_grad():
        hidden = model(token_ids, output_hidden_states=True, use_cache=False).hidden_states
    hook.remove()
    states = [*hidden[:-1], last[0]]  # the last of transformers' is behind the final norm
    expected = []
    for before, after in itertools.pairwise(states):
        cosines = [
            float(x @ y / (x.norm() * y.norm()))
            for x, y in zip(before.double().flatten(0, 1), after.double().flatten(0, 1), strict=True)
        ]
        expected.append(1 - sum(cosines) / len(cosines))
    dropped = sparsify(model, settings()).dropped
    assert dropped.scores == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert dropped.blocks == sorted(sorted(range(4), key=lambda index: expected[index])[:2])


def test_the_first_position_counts_only_where_it_is_to(settings: Any, tokenizer: Any) -> None:
    found = [
        sparsify(
            make("llama"),
            settings(dataset=["말 " * 200], num_samples=2, seq_len=16, prepend_bos=True, bos_in_statistics=counts),
            tokenizer,
        ).dropped.scores
        for counts in (True, False)
    ]
    assert found[0] != found[1]


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_dropping_then_pruning_is_pruning_the_smaller_model(
    method: str, tmp_path: Path, settings: Any, token_ids: torch.Tensor
) -> None:
    smaller_one, both = make("gemma3"), make("gemma3")
    sparsify(smaller_one, settings())
    smaller_one.save_pretrained(tmp_path / "smaller")
    config = SparsityConfig(method, "2:4", dataset=token_ids, batch_size=2)
    one_after_another = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller", sparsity_config=config)
    report = sparsify(both, settings("2:4", method=method))
    assert_same_tensors(both.state_dict(), one_after_another.state_dict())
    assert not hasattr(one_after_another.config, "ksparse")
    assert len(report.layers) == 14
    assert "dropped 2 of 4 decoder blocks" in str(report)
    both.save_pretrained(tmp_path / "both")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "both")
    assert again.sparsity_report.dropped == report.dropped
    assert torch.equal(generated(both, token_ids[:1, :4]), generated(again, token_ids[:1, :4]))


@pytest.mark.parametrize(("family", "pattern"), [("gpt_neox", None), ("Qwen3MoeConfig", None), ("llama", "2:4")])
def test_from_disk_to_disk_it_is_the_same_and_a_later_run_takes_the_same_blocks(
    family: str, pattern: str | None, tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(family)
    model.save_pretrained(tmp_path / "dense")
    measured = []
    from optimum_ksparse.pruning import plan
    from optimum_ksparse.pruning.streaming import place as disk

    original, count = plan.measure_drop, disk.Workspace.add_block
    monkeypatch.setattr(plan, "measure_drop", lambda *a, **k: measured.append(1) or original(*a, **k))

    def stop(self: Any, index: int, *rest: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        count(self, index, *rest)

    config = settings(pattern)
    with monkeypatch.context() as patched:
        patched.setattr(disk.Workspace, "add_block", stop)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(tmp_path / "dense", tmp_path / "disk", config)
    report = prune_checkpoint(tmp_path / "dense", tmp_path / "disk", config)
    assert measured == [1]
    expected = sparsify(model, config)
    assert report.dropped == expected.dropped
    assert report.num_parameters == expected.num_parameters
    model.save_pretrained(tmp_path / "memory")
    assert_same_tensors(tensors(tmp_path / "disk"), tensors(tmp_path / "memory"))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("disk", "memory")]
    assert configs[0] == configs[1]
    assert prune_checkpoint(tmp_path / "dense", tmp_path / "disk", config).dropped == report.dropped
    if pattern is None:  # it may be pruned as any other dense model
        again = prune_checkpoint(tmp_path / "disk", tmp_path / "sparse", settings("2:4", 1))
        assert len(again.dropped.scores) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_gives_the_model_everything_back(
    error: type[BaseException], settings: Any, token_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("gpt_neo").train()
    state, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    modes = {name: module.training for name, module in model.named_modules()}
    attributes = [copy.deepcopy(vars(module)) for module in model.modules()]
    from optimum_ksparse.pruning import block

    original = block.prune_layer

    def fails(path: str, *rest: Any) -> Any:
        if ".1." in path:
            raise error("stop")
        return original(path, *rest)

    monkeypatch.setattr(block, "prune_layer", fails)
    with pytest.raises(error, match="stop"):
        sparsify(model, settings("2:4"))
    assert_same_tensors(model.state_dict(), state)
    assert model.config.to_dict() == config
    assert {name: module.training for name, module in model.named_modules()} == modes
    for module, before in zip(model.modules(), attributes, strict=True):
        plain = {name: value for name, value in before.items() if isinstance(value, int | str | list)}
        assert {name: vars(module)[name] for name in plain} == plain
    monkeypatch.undo()
    assert sparsify(model, settings("2:4")).dropped is not None


def test_numbers_of_blocks_that_cannot_be(settings: Any) -> None:
    model = make("llama")
    with pytest.raises(
        ValueError, match="drop_layers=4 does not fit LlamaForCausalLM, which has 4 .* allowed: 1 to 3"
    ):
        sparsify(model, settings(drop_layers=4))
    assert len(find_blocks(model).blocks) == 4
    assert len(sparsify(model, settings(drop_layers=3)).dropped.blocks) == 3


def test_a_hybrid_keeps_a_block_with_attention(settings: Any, token_ids: torch.Tensor) -> None:
    """Without one its cache does not know how many tokens it has seen."""
    kinds = ["conv", "full_attention", "conv", "conv"]
    torch.manual_seed(0)
    config = transformers.Lfm2Config(**_SMALL, num_hidden_layers=4, layer_types=kinds, block_multiple_of=8)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in find_blocks(model).blocks[1].parameters():
        parameter.data *= 1e-3
    dropped = sparsify(model, settings(drop_layers=3)).dropped
    assert min(range(4), key=dropped.scores.__getitem__) == 1 and dropped.blocks == [0, 2, 3]
    assert generated(model, token_ids[:1, :8]).shape == (1, 18)


def test_a_model_without_sparse_layers_runs_with_any_settings(settings: Any) -> None:
    report = sparsify(make("llama"), settings(optimize_for="speed", fuse=True, densify="lazy"))
    assert report.is_dense and report.dropped is not None


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"drop_layers": 0}, ValueError, "drop_layers=0 is too small"),
        ({"drop_layers": 1.5}, TypeError, "drop_layers must be an integer"),
        ({"drop_layers": None}, ValueError, "pattern=None prunes nothing, and drop_layers drops nothing"),
        ({"reconstruct": "block"}, ValueError, "reconstruct='block' has no meaning with pattern=None"),
        ({"refine": "swaps"}, ValueError, "refine=.*has no meaning with pattern=None"),
        ({"allocation": "owl"}, ValueError, "allocation='owl' has no meaning with pattern=None"),
        ({"method": "auto"}, ValueError, "method='auto' has no meaning with pattern=None"),
        ({"activations": "mixed"}, ValueError, "activations='mixed' has no meaning with pattern=None"),
    ],
)
def test_settings_are_refused(more: dict[str, Any], error: type[Exception], message: str, settings: Any) -> None:
    with pytest.raises(error, match=message):
        settings(**more)


@pytest.mark.parametrize(
    ("family", "more", "reason"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scaled by its number"),
        ("Qwen3MoeConfig", {"num_kv_shared_layers": 1}, "read the keys and values of earlier ones"),
    ],
)
def test_models_whose_blocks_depend_on_their_place_are_refused(
    family: str, more: dict[str, Any], reason: str, settings: Any
) -> None:
    model = make(family, **more)
    with pytest.raises(ValueError, match=f"cannot be dropped: .*{reason}.*leave drop_layers out"):
        sparsify(model, settings())


def test_what_follows_the_place_of_a_block_is_found_and_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    kind = type(find_blocks(model).blocks[0].self_attn)
    original = kind.__init__

    def init(self: Any, config: Any, layer_idx: int) -> None:
        original(self, config, layer_idx)
        self.window = 8 if layer_idx % 2 else None

    monkeypatch.setattr(kind, "__init__", init)
    blocks, state = find_blocks(model), copy.deepcopy(model.state_dict())
    check_drop(blocks, 2)
    with pytest.raises(ValueError, match=r"window of layers\.1\.self_attn would change from 8 to None"):
        drop_blocks(blocks, [0])
    assert_same_tensors(model.state_dict(), state)
    drop_blocks(blocks, [0, 1])()
    assert_same_tensors(model.state_dict(), state)
    assert model.config.num_hidden_layers == len(blocks.blocks) == 4


def test_the_config_says_of_each_block_what_it_said() -> None:
    config = make_config("llama", num_hidden_layers=4)
    config.eos_token_id = [1, 2, 3, 4]
    config.mlp_layer_types, config.mlp_only_layers = ["a", "b", "c", "d"], [0, 2, 3]
    config.first_k_dense_replace = 2
    config.widths, config.kinds, config.scales, config.grid, config.ends = ([5, 6, 7, 8] for _ in range(5))
    source = (
        "config.widths[layer_idx], self.kinds[index - 1], len(self.scales), config.grid[0], x not in (0,), config.ends"
    )
    assert smaller(config, [1, 3], f"for kind in {source}") == {
        "num_hidden_layers": 2,
        "mlp_layer_types": ["b", "d"],
        "widths": [6, 8],
        "kinds": [6, 8],
        "scales": [6, 8],
        "mlp_only_layers": [1],
        "first_k_dense_replace": 1,
    }


def test_it_is_published_as_a_dense_model(tmp_path: Path, settings: Any) -> None:
    model = make("llama")
    model.save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", sparsity_config=settings())
    model.save_pretrained(tmp_path / "small")
    config = json.loads((tmp_path / "small/config.json").read_text())
    assert "quantization_config" not in config
    assert config["ksparse"]["drop_layers"] == 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert not sparse_modules(again)
    assert again.sparsity_report.dropped == model.sparsity_report.dropped
    again.save_pretrained(tmp_path / "once more")
    assert (tmp_path / "once more/sparsity_report.json").is_file()
    summary = inspect_checkpoint(tmp_path / "small")
    assert "dropped 2 of 4 decoder blocks" in str(summary)
    assert summary.to_dict()["dropped_blocks"] == model.sparsity_report.dropped.blocks
    for language, words in {"en": "decoder blocks were dropped", "ko": "디코더 블록 4개 가운데"}.items():
        text = write_card(again, tmp_path / "small", language=language).read_text(encoding="utf-8")
        assert words in text
        assert "men2024shortgpt" in text
        assert "layer-dropping" in text.split("---")[1]
        assert "sparse\n" not in text.split("---")[1].replace("optimum-ksparse", "")


def test_it_is_pushed_with_its_card_and_measured_beside_the_dense_model(
    tmp_path: Path, settings: Any, tokenizer: Any, hub: LoopbackHub, token_ids: torch.Tensor
) -> None:
    make("llama").save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", sparsity_config=settings())
    (tmp_path / "text.txt").write_text("가나다 " * 100, encoding="utf-8")
    protocol = EvaluationProtocol(texts=str(tmp_path / "text.txt"), tasks=(), seq_len=16, max_tokens=64)
    model.push_to_hub("me/small", evaluate=protocol, baseline=tmp_path / "dense", language="ko")
    files = hub.files("me/small")
    assert hub.commits("me/small")[-1].message == "Upload model without dropped blocks"
    assert {"sparsity_report.json", "evaluation_results.json", "tokenizer.json", "README.md"} <= set(files)
    assert "블록을 뺀 모델" in files["README.md"].decode()
    again = AutoModelForCausalLM.from_pretrained("me/small")
    assert len(again.ksparse.results.sparse) == len(again.ksparse.results.dense) == 1
    with torch.no_grad():
        assert torch.equal(again(token_ids).logits, model(token_ids).logits)
    with pytest.raises(ValueError, match="dense_revision: the model is dense itself"):
        model.push_to_hub("me/small", dense_revision="dense")


def test_the_command(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("optimum.commands")
    from optimum_ksparse.commands import parse_words

    make("llama").save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("가나다 " * 200, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    flags = "--drop-layers 1 --pattern none --dataset text.txt --num-samples 2 --seq-len 16"
    for more in ("memory", "disk --stream"):
        parse_words(f"prune dense {more} {flags}".split()).execute()
        assert "dropped 1 of 4 decoder blocks" in capsys.readouterr().out
    assert_same_tensors(tensors(tmp_path / "memory"), tensors(tmp_path / "disk"))


def test_a_report_survives_json(tmp_path: Path) -> None:
    dropped = DroppedBlocks([1], [0.5, 0.25, 1.0], 100)
    config = SparsityConfig("magnitude", pattern=None, drop_layers=1).to_dict()
    SparsityReport(config, dropped=dropped, num_parameters=80).save(tmp_path)
    report = SparsityReport.load(tmp_path / "sparsity_report.json")
    assert report.dropped == dropped
    assert (report.is_dense, report.dense_parameters, report.density, report.patterns) == (True, 100, 1.0, [])


def make_recipe(**changes: Any) -> Recipe:
    methods = ["magnitude", {"name": "drop 1", "method": "wanda", "drop_layers": 1}]
    found = {"model": "m", "output": "o", "methods": methods, "patterns": ["none", "2:4"], "evaluation": {}}
    return Recipe.from_dict({**found, **changes})


def test_cells_of_a_study() -> None:
    cells = [str(cell) for cell in grid(make_recipe())]
    assert [cell.split(", mc4")[0] for cell in cells] == ["dense", "magnitude, 2:4", "drop 1, none", "drop 1, 2:4"]
    twice = [{"name": name, "method": name, "drop_layers": 1} for name in ("wanda", "sparsegpt")]
    assert len(grid(make_recipe(methods=twice, patterns=[None]))) == 2, "the same model"
    with pytest.raises(ValueError, match="'none' prunes nothing, and no method drops blocks"):
        make_recipe(methods=["wanda"])


_WORKER = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, logging
from optimum_ksparse import SparsityConfig, prune_checkpoint, sparsify
from optimum_ksparse.pruning.distributed import joined
logging.set_verbosity_error()
torch.set_num_threads(1)
folder = Path(sys.argv[1])
config = lambda pattern: SparsityConfig(
    "wanda", pattern, drop_layers=2, dataset=torch.load(folder / "ids.pt"), batch_size=2
)
prune_checkpoint(folder / "dense", folder / "disk", config("2:4"))
with joined() as processes:
    model = AutoModelForCausalLM.from_pretrained(folder / "dense")
    report = sparsify(model, config(None))
    (folder / f"dropped-{processes.rank}.json").write_text(json.dumps(vars(report.dropped)))
"""


def test_two_processes_drop_the_same_blocks_as_one(tmp_path: Path, settings: Any, token_ids: torch.Tensor) -> None:
    model = make("llama")
    model.save_pretrained(tmp_path / "dense")
    torch.save(token_ids, tmp_path / "ids.pt")
    (tmp_path / "worker.py").write_text(_WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([*launch, tmp_path / "worker.py", tmp_path], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = sparsify(model, settings("2:4"))
    for rank in range(2):
        assert DroppedBlocks(**json.loads((tmp_path / f"dropped-{rank}.json").read_text())) == alone.dropped
    model.save_pretrained(tmp_path / "memory")
    assert_same_tensors(tensors(tmp_path / "disk"), tensors(tmp_path / "memory"))


def test_blocks_named_by_number_are_refused_with_drop_layers(make_model, token_ids):
    settings = SparsityConfig("wanda", dataset=token_ids, drop_layers=1, modules_to_not_convert=["model.layers.1.mlp"])
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp' names a block by its number"):
        sparsify(make_model("llama"), settings)


def test_configs_with_infinite_numbers_are_read_as_they_are_saved(token_ids):
    sizes = {"state_size": 8, "num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1, "chunk_size": 8}
    config = Mamba2Config(vocab_size=384, hidden_size=32, num_hidden_layers=3, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    sparsify(model, SparsityConfig(pattern=None, dataset=token_ids, drop_layers=1))
    assert model.config.num_hidden_layers == len(model.backbone.layers) == 2
