"""Each layer its own pattern: the maths, the choice in models in memory and on disk, and what is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

from optimum_ksparse import Pattern, SparsityConfig, SparsityReport, prune_checkpoint, sparsify
from optimum_ksparse.api.inspection import inspect_checkpoint
from optimum_ksparse.blocks import BlockReplay, find_blocks
from optimum_ksparse.checkpoint import sparse_modules
from optimum_ksparse.hub.card import render_card
from optimum_ksparse.hub.metadata import build_metadata
from optimum_ksparse.pruners.allocation import (
    LEFT_DENSE,
    OUTLIER_MULTIPLE,
    SPREAD,
    Allocation,
    LayerMeasure,
    allocate,
    block_sparsities,
    same_density,
)
from optimum_ksparse.pruning import plan as plan_module
from optimum_ksparse.pruning.distributed import Processes
from optimum_ksparse.pruning.job import Job, Place
from optimum_ksparse.pruning.sensitivity import measure_allocation
from optimum_ksparse.pruning.streaming import place as disk_module
from optimum_ksparse.pruning.targets import find_targets
from optimum_ksparse.report import LayerReport

from ..conftest import VOCABULARY
from ..hub.subjects import make_subject
from ..pruning.test_streaming import assert_same_tensors, tensors

torch.set_num_threads(1)

MakeModel = Callable[..., PreTrainedModel]


def uneven(model: PreTrainedModel) -> PreTrainedModel:
    """A model whose last block has outliers."""
    with torch.no_grad():
        for linear in (m for m in model.model.layers[-1].modules() if isinstance(m, torch.nn.Linear)):
            linear.weight[:2, :2] *= 50
    return model


@pytest.fixture
def owl(token_ids: torch.Tensor) -> Callable[..., SparsityConfig]:
    def make(pattern: str = "2:4", method: str = "wanda", **more: Any) -> SparsityConfig:
        density = {"target_density": 0.6} if ":" in pattern else {}
        settings = {"dataset": token_ids, "batch_size": 2, "allocation": "owl", **density, **more}
        return SparsityConfig.from_flat(method, pattern, **settings)

    return make


def patterns_of(root: Any) -> dict[str, str]:
    return {name: str(module.pattern) for name, module in sparse_modules(root).items()}


# The maths

shares = st.lists(st.tuples(st.floats(0, 1), st.integers(1, 10**9)), min_size=1, max_size=12)


@pytest.mark.slow
@given(shares, st.fractions(Fraction(1, 1000), Fraction(999, 1000)))
def test_the_mean_is_exact_and_more_outliers_keep_more(blocks: list[tuple[float, int]], sparsity: Fraction) -> None:
    outliers, weights = [share for share, _ in blocks], [weight for _, weight in blocks]
    found = block_sparsities(outliers, weights, sparsity)
    assert sum(s * w for s, w in zip(found, weights, strict=True)) == sparsity * sum(weights)
    assert all(0 < s < 1 for s in found)
    for (a, s), (b, t) in itertools.combinations(zip(outliers, found, strict=True), 2):
        assert (s > t) == (a < b) and (s == t) == (a == b)
    assert max(found) - min(found) <= 2 * SPREAD
    rounded = [Pattern("50%").with_sparsity(s).sparsity for s in found]
    assert all(abs(r - s) <= Fraction(1, 2_000_000) for r, s in zip(rounded, found, strict=True))


def test_the_formula_of_the_paper() -> None:
    # D = [0.01, 0.03, 0.05] scaled to [0, 2λ] with λ = 0.08 is [0, 0.08, 0.16], its mean 0.08.
    found = block_sparsities([0.01, 0.03, 0.05], [7, 7, 7], Fraction(1, 2))
    assert [round(float(s), 9) for s in found] == [0.58, 0.5, 0.42]
    assert float(SPREAD) == 0.08 and OUTLIER_MULTIPLE == 5
    # Near 0 and 1 the spread is made smaller, and the mean stays.
    low = block_sparsities([0.0, 1.0], [1, 1], Fraction(5, 100))
    assert [float(s) for s in low] == [0.095, 0.005]
    high = block_sparsities([0.0, 1.0], [1, 1], Fraction(95, 100))
    assert [float(s) for s in high] == [0.995, 0.905]


@given(st.integers(1, 999_999))
def test_a_rounded_sparsity_is_exact_in_its_text(parts: int) -> None:
    sparsity = Fraction(parts, 1_000_000)
    pattern = Pattern("50%").with_sparsity(sparsity)
    assert pattern.sparsity == sparsity and Pattern(str(pattern)) == pattern and str(pattern).endswith("%")


def test_a_sparsity_that_rounds_to_nothing_is_still_a_pattern() -> None:
    assert str(Pattern("50%").with_sparsity(Fraction(1, 10**9))) == "0.0001%"
    assert str(Pattern("50%").with_sparsity(1 - Fraction(1, 10**9))) == "99.9999%"
    assert str(Pattern("50%").with_sparsity(Fraction(1, 2))) == "50%"


@given(st.lists(st.tuples(st.integers(1, 20), st.floats(0.01, 10)), min_size=1, max_size=7), st.fractions(0, 1))
def test_the_choice_is_near_the_best_and_within_the_budget(layers: list[tuple[int, float]], share: Fraction) -> None:
    """Against every choice of layers that stay dense."""
    target = float(round((1 + share) / 2, 3))
    measures = [LayerMeasure(str(i), 0, 4 * n, losses={"2:4": loss}) for i, (n, loss) in enumerate(layers)]
    patterns = allocate(measures, Pattern("2:4"), target).patterns
    lost = [loss * 4 * size for size, loss in layers]
    budget = (2 * Fraction(str(target)) - 1) * sum(2 * size for size, _ in layers)

    def cost_and_loss(dense: Any) -> tuple[int, float]:
        sparse = [i for i in range(len(layers)) if i not in dense]
        return sum(2 * layers[i][0] for i in dense), sum(lost[i] for i in sparse)

    cost, loss = cost_and_loss([i for i in range(len(layers)) if patterns[str(i)] is None])
    subsets = (s for n in range(len(layers) + 1) for s in itertools.combinations(range(len(layers)), n))
    best = min(loss for cost, loss in map(cost_and_loss, subsets) if cost <= budget)
    assert cost <= budget and loss <= best + max(lost) + 1e-9
    if len({size for size, _ in layers}) == 1:
        assert loss == pytest.approx(best)


@pytest.mark.parametrize(
    ("pattern", "in_features", "block_size", "found"),
    [
        ("2:4", 16, None, ["2:4", "4:8"]),
        ("2:4", 12, None, ["2:4"]),  # 8 does not divide 12
        ("2:4", 16, 4, ["2:4"]),  # nor the columns that sparsegpt sweeps at a time
        ("2:4", 16, 128, ["2:4", "4:8"]),
        ("4:8", 16, None, ["4:8"]),  # there are no kernels for 8:16
        ("1:4", 16, None, ["1:4", "2:8"]),
    ],
)
def test_patterns_of_one_density(pattern: str, in_features: int, block_size: int | None, found: list[str]) -> None:
    assert [str(p) for p in same_density(Pattern(pattern), in_features, block_size)] == found


def test_the_layers_that_lose_most_stay_dense() -> None:
    measures = [LayerMeasure(f"l{i}", 0, 64, losses={"2:4": 1.0 + i, "4:8": 0.5 + i}) for i in range(4)]
    measures[0].losses = {"2:4": 1.0, "4:8": 1.0}
    found = allocate(measures, Pattern("2:4"), 0.625)
    # Of equal ones the pattern that was asked for.
    assert found.patterns == {"l0": "2:4", "l1": "4:8", "l2": "4:8", "l3": None}
    assert found.sensitivities == {"l0": 1.0, "l1": 2.0, "l2": 3.0, "l3": 4.0}
    assert list(allocate(measures, Pattern("2:4"), 0.5).patterns.values()) == ["2:4", "4:8", "4:8", "4:8"]
    assert sum(p is None for p in allocate(measures, Pattern("2:4"), 0.874).patterns.values()) == 2
    third = [LayerMeasure("l", 0, 9, losses={"1:3": 1.0})]
    assert allocate(third, Pattern("1:3"), 1 / 3).patterns == {"l": "1:3"}  # 0.333… in decimals is below a third


# Settings


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"allocation": "best"}, ValueError, "allocation='best'"),
        ({"target_density": 0.6}, ValueError, "target_density=0.6 is read with allocation='owl'"),
        ({"allocation": "owl", "pattern": "2:4"}, ValueError, "needs target_density"),
        ({"allocation": "owl", "target_density": 0.4}, ValueError, "target_density=0.4 .*the least is 0.5"),
        ({"allocation": "owl", "target_density": 1}, ValueError, "target_density=1"),
        ({"allocation": "owl", "target_density": "0.6"}, TypeError, "target_density"),
        ({"allocation": "owl", "pattern": "50%", "target_density": 0.6}, ValueError, 'use pattern="40%"'),
        ({"allocation": "owl", "method": "magnitude", "target_density": 0.6}, ValueError, "this method reads no data"),
    ],
)
def test_bad_settings(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SparsityConfig.from_flat(**given)


def test_good_settings_survive_json() -> None:
    for good in ({"target_density": 0.5}, {"pattern": "40%", "target_density": 0.6}, {"pattern": "62.5%"}):
        recorded = json.loads(json.dumps(SparsityConfig.from_flat(allocation="owl", **good).to_dict()))
        again = SparsityConfig.from_dict(recorded)
        assert again.allocation == "owl" and again.method_setting("target_density") == good.get("target_density")
    old = SparsityConfig().to_dict()
    del old["allocation"]
    assert SparsityConfig.from_dict(old).allocation == "uniform"


# Models


@pytest.mark.parametrize(("method", "pattern"), [("wanda", "50%"), ("sparsegpt", "2:4")])
def test_in_memory_and_on_disk_the_same(
    method: str, pattern: str, make_model: MakeModel, owl: Any, tmp_path: Path
) -> None:
    model = uneven(make_model("llama", num_hidden_layers=3))
    model.save_pretrained(tmp_path / "dense")
    config = owl(pattern, method, skip_unsupported=True)
    report = sparsify(model, config)
    model.save_pretrained(tmp_path / "memory")
    streamed = prune_checkpoint(tmp_path / "dense", tmp_path / "disk", config, activation_memory=0)
    assert_same_tensors(tensors(tmp_path / "disk"), tensors(tmp_path / "memory"))
    for found in (report, streamed):
        for row in found.layers:
            row.seconds = 0.0
    assert streamed.layers == report.layers and streamed.skipped == report.skipped
    assert all(row.sensitivity is not None for row in report.layers)
    assert not (tmp_path / "disk" / ".ksparse-pruning").exists()


def test_unstructured_blocks_have_the_asked_density_together(make_model: MakeModel, owl: Any, tmp_path: Path) -> None:
    model = uneven(make_model("llama", num_hidden_layers=3))
    report = sparsify(model, owl("50%"))
    by_block = [{row.pattern for row in report.layers if row.name.startswith(f"layers.{i}.")} for i in range(3)]
    assert all(len(found) == 1 for found in by_block)
    weights = [sum(r.shape[0] * r.shape[1] for r in report.layers if f".{i}." in r.name[:9]) for i in range(3)]
    sparsities = [Pattern(found.copy().pop()).sparsity for found in by_block]
    mean = sum(s * w for s, w in zip(sparsities, weights, strict=True)) / sum(weights)
    assert abs(mean - Fraction(1, 2)) < Fraction(1, 10**6)
    assert sparsities[2] < min(sparsities[:2]), "the block with outliers keeps more"
    assert 0.5 <= report.density < 0.5 + 1 / 32  # each row's number of zeros is rounded down
    assert len({row.sensitivity for row in report.layers}) == 3
    text = str(report)
    assert "allocation owl: densities " in text and "% … " in text and len(report.kinds()) == 7
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert patterns_of(again) == patterns_of(model)
    assert again.sparsity_report.layers == report.layers


@pytest.mark.parametrize("storage", ["packed", "dense"])
def test_mixed_patterns_and_dense_layers_load_again(
    storage: str, make_model: MakeModel, owl: Any, token_ids: torch.Tensor, tmp_path: Path
) -> None:
    model = make_model("llama", intermediate_size=60)  # 8 does not divide the inputs of down_proj
    report = sparsify(model, owl("2:4", storage=storage))
    found = {row.name: row.pattern for row in report.layers}
    dense = {name for name, reason in report.skipped.items() if reason == LEFT_DENSE}
    assert set(found.values()) == {"2:4", "4:8"} and dense and not dense & found.keys()
    assert all((pattern == "2:4") == name.endswith("down_proj") for name, pattern in found.items())
    total = sum(p.numel() for n, p in make_model("llama", intermediate_size=60).named_parameters() if "proj" in n)
    kept = sum(row.num_values for row in report.layers)
    assert report.density == 0.5 and 0.5 * total < total - kept <= 0.6 * total
    expected = model(token_ids).logits
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert patterns_of(again.model) == found
    assert torch.equal(again(token_ids).logits, expected)
    assert again.sparsity_report.skipped == report.skipped
    summary = str(inspect_checkpoint(tmp_path / "model"))
    assert f"dense in {len(dense)}," in summary and "allocation: owl" in summary
    config = json.loads((tmp_path / "model/config.json").read_text())
    layers = (config.get("quantization_config") or config["ksparse"])["layers"]
    assert {name: layer["pattern"] for name, layer in layers.items()} == found


def test_the_whole_budget_that_fits_is_spent(make_model: MakeModel, owl: Any) -> None:
    densities = []
    for target in (0.5, 0.7, 0.95):
        report = sparsify(make_model("llama"), owl("2:4", target_density=target))
        total = sum(p.numel() for n, p in make_model("llama").named_parameters() if "proj" in n)
        densities.append((total - sum(row.num_values for row in report.layers)) / total)
        assert target - 0.06 < densities[-1] <= target
    assert densities == sorted(densities) and densities[0] == 0.5


def test_what_the_dense_pass_measures(make_model: MakeModel, owl: Any, token_ids: torch.Tensor) -> None:
    """Both figures of one linear map by the definitions, with inputs taken by a hook."""
    model = make_model("llama", num_hidden_layers=1)
    linear, inputs = model.model.layers[0].mlp.down_proj, []
    handle = linear.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(token_ids)
    handle.remove()
    x, weight = torch.cat(inputs).double(), linear.weight.detach().double()
    scores = weight.abs() * x.square().mean(0).sqrt()
    others = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
    for pattern in ("50%", "2:4"):
        blocks, config = find_blocks(model), owl(pattern, modules_to_not_convert=others)
        job = Job(Place(model, blocks, Processes(), lambda: None), config, targets=find_targets(blocks, config)[0])
        before = [dict(layers) for layers in job.targets]
        found = measure_allocation(job, BlockReplay(blocks, token_ids, 2))
        assert job.targets == before
        if pattern == "50%":
            expected = float((scores > 5 * scores.mean()).double().mean())
            assert expected > 0
        else:
            mask = Pattern("2:4").mask(scores.float())
            lost = scores.masked_fill(mask, 0).square().sum()
            expected = float(lost / (x @ weight.T).square().sum(1).mean())
        assert found.sensitivities == {"layers.0.mlp.down_proj": pytest.approx(expected, rel=1e-3)}


@pytest.mark.slow
def test_experts_in_a_stack(owl: Any, token_ids: torch.Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    for pattern, storage in (("50%", "packed"), ("2:4", "dense")):
        config = MixtralConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, **sizes)
        model = AutoModelForCausalLM.from_config(config).eval()
        model.save_pretrained(tmp_path / "dense")
        settings = owl(pattern, target_density=0.7 if pattern == "2:4" else None, storage=storage)
        report = sparsify(model, settings)
        stacks = {row.name: row.pattern for row in report.layers if "experts" in row.name}
        assert stacks and all(row.sensitivity for row in report.layers)
        if pattern == "2:4":
            assert any("experts" in name for name in report.skipped) and set(stacks.values()) == {"4:8"}
        model.save_pretrained(tmp_path / "sparse")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
        assert patterns_of(again.model) == {row.name: row.pattern for row in report.layers}
        torch.testing.assert_close(again(token_ids).logits, model(token_ids).logits)
        streamed = prune_checkpoint(tmp_path / "dense", tmp_path / f"disk-{pattern[0]}", settings)
        assert streamed.skipped == report.skipped
        assert_same_tensors(tensors(tmp_path / f"disk-{pattern[0]}"), tensors(tmp_path / "sparse"))


def test_other_architectures(make_model: MakeModel, owl: Any) -> None:
    for name, pattern in (("gpt2", "60%"), ("gpt_neox", "2:4"), ("gemma3", "2:4")):
        report = sparsify(make_model(name, torch.bfloat16), owl(pattern))
        assert report.layers and all(row.sensitivity is not None for row in report.layers)


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_the_patterns(
    make_model: MakeModel, owl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uneven(make_model("llama", num_hidden_layers=3)).save_pretrained(tmp_path / "dense")
    whole = prune_checkpoint(tmp_path / "dense", tmp_path / "whole", owl("50%"))

    def stopped(self: Any, index: int, *rest: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        done(self, index, *rest)

    done = disk_module.DiskPlace.block_is_done
    with monkeypatch.context() as patched:
        patched.setattr(disk_module.DiskPlace, "block_is_done", stopped)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(tmp_path / "dense", tmp_path / "out", owl("50%"))
    kept = tmp_path / "out/.ksparse-pruning/allocation.json"
    assert {row.pattern for row in whole.layers} == {*json.loads(kept.read_text())["patterns"].values()}
    with pytest.raises(ValueError, match=r"other settings .settings.allocation: was 'owl', is 'uniform'"):
        prune_checkpoint(tmp_path / "dense", tmp_path / "out", owl("50%", allocation="uniform"))
    with monkeypatch.context() as patched:
        patched.setattr(plan_module, "measure_allocation", lambda *a: pytest.fail("measured again"))
        resumed = prune_checkpoint(tmp_path / "dense", tmp_path / "out", owl("50%"))
    assert_same_tensors(tensors(tmp_path / "out"), tensors(tmp_path / "whole"))
    assert [row.sensitivity for row in resumed.layers] == [row.sensitivity for row in whole.layers]


def test_a_damaged_choice_is_no_choice(tmp_path: Path) -> None:
    work = disk_module.Workspace(tmp_path, {})
    work.path.mkdir()
    assert work.kept("allocation", Allocation) is None
    (work.path / "allocation.json").write_text('{"patterns": ')
    assert work.kept("allocation", Allocation) is None, "the journal does not know it"
    work.journal.checksums["allocation.json"] = ""
    with pytest.raises(ValueError, match=r"allocation.json is damaged: .*; start over with resume=False"):
        work.kept("allocation", Allocation)


def test_inputs_whose_squares_overflow_are_named(make_model: MakeModel, owl: Any) -> None:
    model = make_model("llama")
    mlp = model.model.layers[1].mlp
    model.model.layers[1].post_attention_layernorm.weight.data *= 1e20
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight.data *= 1e-20
    with pytest.raises(ValueError, match=r"layers.1.mlp.gate_proj: its weight or its inputs hold NaN or Inf"):
        sparsify(model, owl("50%"))
    assert not sparse_modules(model)


# What is said of it


def test_an_old_report_has_no_sensitivity(tmp_path: Path) -> None:
    row = {"name": "l", "shape": [4, 4], "pattern": "2:4", "num_values": 8, "dense_bytes": 32, "packed_bytes": 20}
    row |= {"relative_output_error": None, "seconds": 0.1, "note": ""}
    report = {"schema_version": 1, "config": {"pattern": "2:4"}, "layers": [row]}
    (tmp_path / "sparsity_report.json").write_text(json.dumps(report))
    loaded = SparsityReport.load(tmp_path / "sparsity_report.json")
    assert loaded.layers[0].sensitivity is None and "allocation" not in str(loaded)


@pytest.mark.parametrize("language", ["en", "ko"])
@pytest.mark.parametrize("pattern", ["50%", "2:4"])
def test_the_card(language: str, pattern: str, make_model: MakeModel, owl: Any) -> None:
    report = sparsify(uneven(make_model("llama")), owl(pattern))
    card = render_card(make_subject(report), language)
    assert 'allocation="owl"' in card
    if pattern == "2:4":
        assert "4:8" in card.split("## ")[0] and "2:4" not in card.split("## ")[0]
        left_dense = {"en": LEFT_DENSE, "ko": "target_density에 따라 그대로 둠"}[language]
        assert "0.6" in card and left_dense in card.replace("\\", "")
        assert "4of8" in build_metadata(make_subject(report)).tags
    else:
        assert "50%" in card.split("## ")[0] and "% … " in card


def test_kinds_keep_structures_apart() -> None:
    def row(name: str, pattern: str) -> LayerReport:
        return LayerReport(name, (4, 5), pattern, round(20 * Pattern(pattern).density), 32, 20, None, 0.0)

    report = SparsityReport({}, layers=[row("layers.0.q", "2:4"), row("layers.1.q", "4:8"), row("layers.2.q", "2:4")])
    assert [(kind.pattern, len(kind.layers)) for kind in report.kinds()] == [("2:4", 2), ("4:8", 1)]
    report = SparsityReport({}, layers=[row("layers.0.q", "60%"), row("layers.1.q", "40%")])
    assert [kind.pattern for kind in report.kinds()] == ["40% … 60%"]
