"""`method="auto"`: what is tried, what is taken, and the time that it may take."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from optimum_ksparse import SparsityConfig, prune_checkpoint, sparsify
from optimum_ksparse.pruning import choosing
from optimum_ksparse.records import build, to_json
from optimum_ksparse.report import MethodChoice, SparsityReport, Trial

TOKENS = torch.randint(0, 384, (16, 24), generator=torch.Generator().manual_seed(3))


def make_settings(**changes):
    return SparsityConfig.from_flat(**{"method": "auto", "dataset": TOKENS, "batch_size": 2, **changes})


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(choosing, "CANDIDATES", (("wanda", None), ("admm", None), ("admm", "block")))


def test_it_takes_the_least_loss_and_prunes_as_if_it_had_been_asked_for(make_model, few):
    dense = make_model("llama")
    model, other = copy.deepcopy(dense), copy.deepcopy(dense)
    report = sparsify(model, make_settings())
    assert [trial.name for trial in report.choice.trials] == ["wanda", "admm", "admm + block"]
    best = min(report.choice.trials, key=lambda trial: trial.loss)
    assert (report.choice.method, report.choice.reconstruct) == (best.method, best.reconstruct)
    assert report.method == best.name
    assert f"chosen by auto: {best.name}" in str(report)
    sparsify(other, make_settings(method=best.method, reconstruct=best.reconstruct))
    for name, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


class Clock:
    """A second for each look at it, and so many more for one while a method is at work."""

    def __init__(self, seconds):
        self.now, self.method, self.slow = 0.0, None, seconds

    def perf_counter(self):
        self.now += self.slow.get(self.method, 1)
        return self.now


@pytest.fixture
def slow(monkeypatch):
    def make(**seconds):
        clock, original = Clock(seconds), choosing.prune_one_block
        monkeypatch.setattr(choosing, "time", clock)

        def prune_one_block(*arguments):
            clock.method = arguments[0].config.reconstruct or arguments[0].config.method
            done = original(*arguments)
            clock.now += clock.slow.get(clock.method, 1)
            clock.method = None
            return done

        monkeypatch.setattr(choosing, "prune_one_block", prune_one_block)

    return make


def test_the_time_budget_rules_out_what_takes_too_long(make_model, few, slow):
    slow(admm=30)
    report = sparsify(make_model("llama"), make_settings(time_budget=90.0))
    fits = {trial.name: trial.fits for trial in report.choice.trials}
    assert fits == {"wanda": True, "admm": False}, "what needs more than a method that is too long is not tried"
    assert report.choice.method == "wanda" and "too long" in str(report)
    assert all(trial.seconds > 20 for trial in report.choice.trials), "all trials count in all"


def test_a_trial_that_spends_the_budget_leaves_the_fastest(make_model, few, slow):
    slow(admm=1000)
    report = sparsify(make_model("llama"), make_settings(time_budget=100.0))
    assert report.choice.method == "wanda" and not any(trial.fits for trial in report.choice.trials)
    assert "chosen by auto: wanda, the fastest, because the trials" in str(report)


@pytest.mark.parametrize("error", [ArithmeticError, torch.OutOfMemoryError])
def test_a_method_that_fails_is_told_and_the_others_go_on(make_model, few, monkeypatch, error):
    original = choosing.prune_one_block

    def fail(*arguments):
        if arguments[0].config.method == "admm":
            raise error("the Gram matrix stays singular")
        return original(*arguments)

    monkeypatch.setattr(choosing, "prune_one_block", fail)
    report = sparsify(make_model("llama"), make_settings())
    assert report.choice.method == "wanda"
    assert "admm failed (the Gram matrix stays singular)" in str(report)


def test_a_block_without_layers_to_prune_is_not_the_one_tried(make_model, few):
    model = make_model("llama", num_hidden_layers=4)
    report = sparsify(model, make_settings(modules_to_not_convert=["model.layers.2."]))
    assert report.choice.block in (1, 3)


def test_it_is_tried_with_the_patterns_that_layers_will_have(make_model, monkeypatch):
    monkeypatch.setattr(choosing, "CANDIDATES", (("sparsegpt", None),))
    asked = make_settings(block_size=4, allocation="owl", target_density=0.6)
    assert {layer.pattern for layer in sparsify(make_model("llama"), asked).layers} == {"2:4"}


def test_a_budget_that_nothing_meets_says_the_least_and_changes_nothing(make_model, few):
    model = make_model("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"time_budget=0\.0 is too short for any method: the least .* s \(wanda\)"):
        sparsify(model, make_settings(time_budget=0.0))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_disk_to_disk_and_resumed(make_model, few, tmp_path, monkeypatch):
    model = make_model("gpt_neox")
    model.save_pretrained(tmp_path / "dense")
    original = choosing.choose_method
    calls = []
    monkeypatch.setattr(
        "optimum_ksparse.pruning.plan.choose_method", lambda *a, **k: calls.append(1) or original(*a, **k)
    )

    def stop(*arguments, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("optimum_ksparse.pruning.plan.prune_blocks", stop)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", make_settings())
    report = prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", make_settings())
    assert len(calls) == 1, "a run that goes on takes what was chosen"
    assert SparsityReport.load(tmp_path / "sparse/sparsity_report.json").choice == report.choice
    loaded = type(model).from_pretrained(tmp_path / "sparse")
    sparsify(model, make_settings(method=report.choice.method, reconstruct=report.choice.reconstruct))
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_other_settings_hold_for_all_that_is_tried():
    assert ("sparsegpt", None) not in choosing._candidates(make_settings(pattern="4:8", block_size=12))
    found = choosing._candidates(make_settings(reconstruct="block"))
    assert all(reconstruct == "block" for _, reconstruct in found)


def test_a_choice_survives_json():
    trials = [Trial("wanda", None, 0.5, 3.0, True), Trial("admm", "block", 0.25, 30.0, False)]
    choice = MethodChoice("wanda", None, 4, 10.0, trials)
    report = SparsityReport({"method": "auto"}, choice=choice)
    assert build(MethodChoice, json.loads(to_json(choice))) == choice
    assert report.method == "wanda"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "wanda", "time_budget": 3}, "time_budget=3.*method='auto'"),
        ({"time_budget": -1}, "time_budget=-1 is out of range"),
    ],
)
def test_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_settings(**settings)


def test_a_single_batch_cannot_be_compared_on(make_model, few):
    with pytest.raises(ValueError, match=r"a single batch of them in a process \(num_samples=1\): use more"):
        sparsify(make_model("llama"), make_settings(dataset=TOKENS[:1]))
