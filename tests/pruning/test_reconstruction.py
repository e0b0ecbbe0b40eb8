"""Block reconstruction: what it lowers, what it leaves alone, and what happens when it goes wrong."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig

from optimum_ksparse import SparsityConfig, prune_checkpoint, sparsify
from optimum_ksparse.blocks import BlockReplay, find_blocks
from optimum_ksparse.checkpoint import sparse_modules
from optimum_ksparse.nn import SparseLinear
from optimum_ksparse.pruning import prune_blocks
from optimum_ksparse.pruning import reconstruction as room
from optimum_ksparse.pruning.distributed import Processes
from optimum_ksparse.pruning.job import Job, Place, Replaced
from optimum_ksparse.pruning.loss import HELD_OUT
from optimum_ksparse.pruning.targets import find_targets
from optimum_ksparse.report import SparsityReport

from ..conftest import thinned

TOKENS = torch.randint(0, 384, (16, 16), generator=torch.Generator().manual_seed(3))


def make_settings(**changes):
    settings = {"method": "wanda", "dataset": TOKENS, "batch_size": 4, "reconstruct": "block", **changes}
    if settings["reconstruct"] is not None:
        settings.setdefault("reconstruction_epochs", 3)
    return SparsityConfig.from_flat(**settings)


def block_error(dense, sparse):
    """Relative error of the last hidden states on the calibration tokens."""
    with torch.no_grad():
        expected, found = (model.base_model(TOKENS)[0].float() for model in (dense, sparse))
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", thinned(["gpt_neox", "llama", "gemma3", "gpt2", "rwkv"], ["llama", "gpt2"]))
def test_every_architecture_comes_nearer_to_the_dense_model(make_model, name):
    dense = make_model(name)
    plain, tuned = copy.deepcopy(dense), copy.deepcopy(dense)
    sparsify(plain, make_settings(reconstruct=None))
    report = sparsify(tuned, make_settings())
    assert [row.block for row in report.reconstruction] == list(range(len(find_blocks(dense).blocks)))
    assert all(row.loss_after <= row.loss_before for row in report.reconstruction)
    assert any(row.loss_after < row.loss_before for row in report.reconstruction)
    assert block_error(dense, tuned) < block_error(dense, plain)
    assert all(parameter.grad is None for parameter in tuned.parameters())


@pytest.mark.parametrize(
    ("name", "dtype"), thinned([("gpt_neox", torch.bfloat16), ("gemma3", torch.float16)], ["gpt_neox"])
)
def test_16_bit_models_stay_in_their_dtype(make_model, name, dtype):
    model = make_model(name, dtype=dtype)
    report = sparsify(model, make_settings(reconstruction_lr=0.05))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert any(row.loss_after < row.loss_before for row in report.reconstruction)
    assert bool(model(TOKENS[:2]).logits.isfinite().all())


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_masks_and_what_is_dense_stay(make_model, pattern):
    dense = make_model("gpt_neox")
    plain, tuned = copy.deepcopy(dense), copy.deepcopy(dense)
    settings = {"pattern": pattern, "modules_to_not_convert": ["dense_4h_to_h"]}
    sparsify(plain, make_settings(reconstruct=None, **settings))
    sparsify(tuned, make_settings(**settings))
    changed = set()
    for (name, before), (_, after) in zip(plain.named_modules(), tuned.named_modules(), strict=True):
        if isinstance(before, SparseLinear) and ".layers.0." in name:  # later ones have other inputs
            assert torch.equal(before.weight_mask, after.weight_mask)
        for own, value in before.named_parameters(recurse=False):
            if not torch.equal(value, getattr(after, own)):
                changed.add(f"{name}.{own}".replace("gpt_neox.layers.", "").split(".", 1)[1])
    assert "mlp.dense_4h_to_h.weight" not in changed
    assert {"input_layernorm.weight", "attention.dense.weight", "attention.dense.bias"} <= changed


@pytest.mark.parametrize("activations", thinned(["pruned", "dense", "mixed"], ["mixed"]))
def test_activations_say_what_a_block_reads_and_what_it_is_to_give(make_model, activations, monkeypatch):
    dense = make_model("llama")
    seen = []

    def look(job, index, replay, targets):
        seen.append((torch.cat(list(replay.hidden)), torch.cat(list(targets))))
        return original(job, index, replay, targets)

    original = room.reconstruct_block
    monkeypatch.setattr("optimum_ksparse.pruning.block.reconstruct_block", look)
    pruned = copy.deepcopy(dense)
    sparsify(pruned, make_settings(activations=activations))
    paths = {}
    for kind, model in (("dense", dense), ("pruned", pruned)):
        with torch.no_grad():
            replay = BlockReplay(find_blocks(model), TOKENS, 2)
            replay.advance(0, find_blocks(model).blocks[0])
            paths[kind] = torch.cat(list(replay.hidden))
            second = find_blocks(dense).blocks[1]
            paths[f"{kind} outputs"] = torch.cat(list(replay.outputs(1, second)))
    reads = "dense" if activations == "dense" else "pruned"
    gives = "pruned" if activations == "pruned" else "dense"
    assert torch.allclose(seen[1][0], paths[reads], atol=1e-6)
    assert torch.allclose(seen[1][1], paths[f"{gives} outputs"], atol=1e-6)


def test_a_rate_that_diverges_stops_and_says_so(make_model):
    report = sparsify(make_model("llama"), make_settings(reconstruction_lr=1.0, reconstruction_epochs=6))
    assert all("diverged in epoch" in row.note for row in report.reconstruction)
    assert all(row.loss_after <= row.loss_before for row in report.reconstruction)
    assert "diverged" in str(report)


def test_what_was_best_before_it_diverged_is_kept(make_model, monkeypatch):
    """Of epochs that end at 0.5 and then at nine times the loss of the beginning, the weights after the first."""
    losses = itertools.cycle((1.0, 0.5, 9.0))
    kept, original = [], room.OutputLoss.mean

    def mean(self, batches):
        loss = next(losses)
        if loss == 0.5:
            kept.append([p.data.clone() for p in self.block.parameters()])
        assert original(self, batches) >= 0
        return loss

    monkeypatch.setattr(room.OutputLoss, "mean", mean)
    model = make_model("llama")
    report = sparsify(model, make_settings(reconstruction_epochs=6))
    assert [(row.loss_before, row.loss_after) for row in report.reconstruction] == [(1.0, 0.5)] * 2
    assert all("diverged in epoch 2" in row.note for row in report.reconstruction)
    for block, values in zip(find_blocks(model).blocks, kept, strict=True):
        assert all(torch.equal(p.data, value) for p, value in zip(block.parameters(), values, strict=True))


def test_what_is_held_out_decides(make_model, monkeypatch):
    """A loss that grows on what is held out leaves the block as it was, bit for bit, whatever the training does."""
    losses = iter(range(1, 1000))
    monkeypatch.setattr(room.OutputLoss, "mean", lambda self, batches: float(next(losses)) / 1000 + 1)
    dense = make_model("llama")
    plain, tuned = copy.deepcopy(dense), copy.deepcopy(dense)
    sparsify(plain, make_settings(reconstruct=None))
    report = sparsify(tuned, make_settings())
    assert all(
        row.loss_after == row.loss_before and "nothing was changed" in row.note for row in report.reconstruction
    )
    for before, after in zip(plain.state_dict().values(), tuned.state_dict().values(), strict=True):
        assert torch.equal(before, after)


@pytest.mark.slow
def test_overfitting_is_told_and_not_kept(make_model):
    """On a few random tokens everything can be learned by heart; the loss on others rises while that is done."""
    few = TOKENS[:8, :6]
    settings = {"reconstruction_epochs": 20, "reconstruction_lr": 0.05, "batch_size": 1, "pattern": "50%"}
    report = sparsify(make_model("llama"), make_settings(dataset=few, **settings))
    assert any("overfitted from epoch" in row.note for row in report.reconstruction), str(report)
    assert all(row.loss_after <= row.loss_before for row in report.reconstruction)
    assert not [row.note for row in sparsify(make_model("llama"), make_settings()).reconstruction if row.note]


def test_float16_has_no_room_for_gradients(make_model, monkeypatch):
    """The products that gradients go through are in bfloat16 where calibration is in float16."""
    seen, original = set(), room.OutputLoss.of

    def of(self, batch):
        def look(*_):
            seen.add((torch.is_grad_enabled(), torch.get_autocast_dtype("cpu")))

        handles = [module.register_forward_pre_hook(look) for module in self.block.modules()]
        try:
            return original(self, batch)
        finally:
            [handle.remove() for handle in handles]

    monkeypatch.setattr(room.OutputLoss, "of", of)
    few = {"dataset": TOKENS[:2, :4], "batch_size": 1, "reconstruction_epochs": 1}
    sparsify(make_model("llama"), make_settings(calibration_dtype="float16", **few))
    assert seen == {(True, torch.bfloat16), (False, torch.bfloat16)}


def test_an_error_gives_the_model_back(make_model, monkeypatch):
    model = make_model("gpt_neox")
    before = copy.deepcopy(model.state_dict())
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) > 20:
            raise KeyboardInterrupt
        return original(*arguments)

    original = room.OutputLoss.of
    monkeypatch.setattr(room.OutputLoss, "of", fail)
    with pytest.raises(KeyboardInterrupt):
        sparsify(model, make_settings(), restore_on_error=True)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activations", "activation_memory", "is_cut"),
    thinned([(None, "4GB", False), ("pruned", 0, True), ("dense", "4GB", True)], ["pruned"]),
)
def test_disk_to_disk_gives_the_same_bits_cut_off_or_not(
    make_model, tmp_path, monkeypatch, activations, activation_memory, is_cut
):
    model = make_model("gemma3")
    model.save_pretrained(tmp_path / "dense")
    settings = make_settings(activations=activations, reconstruction_epochs=2)

    def run():
        return prune_checkpoint(tmp_path / "dense", tmp_path / "disk", settings, activation_memory=activation_memory)

    if is_cut:
        original, stop_at = room.reconstruct_block, iter([False, False, True])

        def stop(*arguments, **named):
            if next(stop_at):
                raise KeyboardInterrupt
            return original(*arguments, **named)

        with monkeypatch.context() as patched:
            patched.setattr("optimum_ksparse.pruning.block.reconstruct_block", stop)
            with pytest.raises(KeyboardInterrupt):
                run()
    report = run()
    sparsify(model, settings)
    loaded = type(model).from_pretrained(tmp_path / "disk").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    saved = SparsityReport.load(tmp_path / "disk/sparsity_report.json")
    assert saved.reconstruction == report.reconstruction
    memory = model.sparsity_report.reconstruction
    assert [(row.block, row.loss_after) for row in saved.reconstruction] == [
        (row.block, row.loss_after) for row in memory
    ]


@pytest.mark.parametrize(
    ("name", "dtype"),
    thinned(
        [("gpt2", torch.float16), ("opt", torch.bfloat16), ("mamba", torch.float16), ("mamba", torch.bfloat16)],
        ["gpt2"],
    ),
)
def test_norms_and_convolutions_in_16_bit(make_model, name, dtype):
    """On a CPU a layer norm takes inputs of its own dtype alone, and a convolution a bias of its weight's."""
    more = {}
    if name == "mamba":  # its dt_proj is not called, but read
        more = {"modules_to_not_convert": ["dt_proj"]}
        sizes = {"state_size": 4, "conv_kernel": 3, "time_step_rank": 4}
        config = MambaConfig(vocab_size=384, hidden_size=32, num_hidden_layers=2, **sizes)
        model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    else:
        model = make_model(name, dtype)
    report = sparsify(model, make_settings(reconstruction_epochs=1, **more))
    assert all(row.loss_after <= row.loss_before < 10 for row in report.reconstruction)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.slow
def test_large_batches_leave_some_samples_to_hold_out(make_model):
    """As if the batches had been small enough from the start; of one sample alone nothing can be held out."""
    one, other = make_model("llama"), make_model("llama")
    report = sparsify(one, make_settings(batch_size=64))
    assert report.reconstruction[0].note == ""
    sparsify(other, make_settings(batch_size=max(1, len(TOKENS) // HELD_OUT)))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    alone = sparsify(make_model("llama"), make_settings(dataset=TOKENS[:1]))
    assert "one sample alone: nothing was held out" in str(alone)


def test_what_would_be_restored_is_norms_and_biases(make_model):
    """Values of an unstructured layer have one dimension as well, and go with their layer."""
    model, replaced = make_model("llama"), Replaced()
    job = Job(Place(model, find_blocks(model), Processes(), lambda: None), make_settings(pattern="50%"), replaced)
    job.targets, _ = find_targets(job.blocks, job.config)
    with torch.no_grad():
        replay = BlockReplay(job.blocks, TOKENS, 2)
        prune_blocks(job, replay, replay.fork("original"))
    values = {id(module.weight) for module in sparse_modules(model).values()}
    assert replaced.tuned and not values & {id(parameter) for parameter, _ in replaced.tuned}


def test_a_norm_that_two_blocks_share_stays(make_model):
    """Tuned for the later block, it would spoil the earlier one."""
    model = make_model("llama")
    first, second = find_blocks(model).blocks[:2]
    second.input_layernorm = first.input_layernorm
    before = copy.deepcopy(model.state_dict())
    sparsify(model, make_settings())
    changed = {name for name, value in model.state_dict().items() if name in before and "norm" in name}
    changed = {name for name in changed if not torch.equal(before[name], model.state_dict()[name])}
    assert changed and not any("input_layernorm" in name for name in changed)


def test_a_block_with_nothing_to_tune_is_told(make_model):
    """Its layers are left dense, and its norms are those of the other block."""
    model = make_model("llama")
    first, second = find_blocks(model).blocks[:2]
    second.input_layernorm, second.post_attention_layernorm = first.input_layernorm, first.post_attention_layernorm
    report = sparsify(model, make_settings(modules_to_not_convert=["model.layers.1."]))
    assert [row.note for row in report.reconstruction] == ["", "nothing to tune"]


def test_mixed_activations_are_for_reconstruction():
    with pytest.raises(ValueError, match="activations='mixed' gives a block .* which reconstruct='block' alone does"):
        make_settings(activations="mixed", reconstruct=None)
