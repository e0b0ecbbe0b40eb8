"""Which layers keep a second form of their weight, on a simulated GPU: the CPU with made-up speeds; and the settings
that say how a loaded model computes."""

from __future__ import annotations

import copy
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from optimum_ksparse import SparseLinear, SparsityConfig, kernels, sparsify
from optimum_ksparse.checkpoint import sparse_layers
from optimum_ksparse.kernels import dispatch, hardware
from optimum_ksparse.pattern import Pattern
from optimum_ksparse.runtime import RuntimeConfig, autotune, configure

TOKENS = (1, 64, 1024)
# microseconds: kernel → for 1, 64 and 1024 tokens
SPEEDS = {
    "gemv": (10.0, None, None),
    "dot": (12.0, 30.0, 200.0),
    "decompress": (40.0, 50.0, 150.0),
    "library": (20.0, 25.0, 90.0),
    "dense": (18.0, 28.0, 120.0),
}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Sparse layers on the CPU choose among kernels; the library's form is the values and a copy of the mask."""
    pytest.importorskip("triton")
    monkeypatch.setattr(hardware, "runs_kernels", lambda device: True)
    monkeypatch.setattr(hardware, "why_no_kernels", lambda device: None)
    monkeypatch.setenv("KSPARSE_CACHE", str(tmp_path / "speeds"))
    monkeypatch.delenv("KSPARSE_KERNEL", raising=False)

    def form(values, bits, in_features):
        return torch.cat([values.flatten(), bits.flatten().view(values.dtype)])

    monkeypatch.setattr(kernels, "library_form", form)
    kernels.forget()
    yield
    kernels.forget()


def know(shape, speeds=SPEEDS, pattern="2:4"):
    """Makes the dispatch believe that it has measured these speeds."""
    for i, tokens in enumerate(TOKENS):
        problem = kernels.Problem(*shape, tokens, pattern, torch.bfloat16, torch.device("cpu"))
        rows = {
            name: {"config": kernels.KERNELS[name].configs(problem)[0], "us": times[i]}
            for name, times in speeds.items()
            if times[i] is not None
        }
        dispatch._known(problem.device)[str(problem)] = rows


def make_layers(count=2, shape=(32, 64), pattern="2:4", dtype=torch.bfloat16):
    torch.manual_seed(0)
    layers = {}
    for i in range(count):
        linear = nn.Linear(shape[1], shape[0]).to(dtype)
        mask = Pattern(pattern).mask(linear.weight.abs())
        layers[f"layer{i}"] = SparseLinear.from_dense(linear, mask, Pattern(pattern)).requires_grad_(False)
    return layers


def test_memory_mode_takes_the_library_where_it_shares_the_values(gpu):
    layers = make_layers()
    know((32, 64))
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    report = autotune(layers, TOKENS)
    for name, layer in layers.items():
        assert torch.equal(layer.weight, before[name])
        assert layer._library_form is not None and layer._dense_form is None
        assert layer.weight.untyped_storage().data_ptr() == layer._library_form.untyped_storage().data_ptr()
        assert layer.packed_bytes + layer.extra_bytes == 0.625 * layer.dense_bytes
    assert report.rows[0].form == "library" and report.rows[0].kept == 2
    assert [report.rows[0].kernels[t].split("(")[0] for t in TOKENS] == ["gemv", "library", "library"]
    assert "32 x 64 2:4 bfloat16: 2 layers, 2 keep their library form" in str(report)
    assert " 1.33 x dense, library" in str(report)  # 120 / 90


def test_memory_mode_keeps_nothing_that_does_not_share(gpu, monkeypatch):
    monkeypatch.setattr(kernels, "shared_values", lambda form, values: None)
    layers = make_layers()
    know((32, 64))
    report = autotune(layers, TOKENS)
    assert report.extra_bytes == 0
    assert report.rows[0].form is None
    assert [report.rows[0].kernels[t].split("(")[0] for t in TOKENS] == ["gemv", "dot", "decompress"]


def test_memory_mode_keeps_nothing_that_does_not_pay(gpu):
    layers = make_layers()
    know((32, 64), {**SPEEDS, "library": (20.0, 29.9, 149.9)})
    assert autotune(layers, TOKENS).extra_bytes == 0


def test_speed_mode_without_a_limit_takes_what_saves_most(gpu):
    layers = make_layers()
    know((32, 64), {**SPEEDS, "dense": (18.0, 20.0, 80.0)})
    report = autotune(layers, TOKENS, optimize_for="speed")
    assert report.rows[0].form == "dense"
    assert report.extra_bytes == 2 * 32 * 64 * 2
    assert [report.rows[0].kernels[t].split("(")[0] for t in TOKENS] == ["gemv", "dense", "dense"]


@pytest.mark.parametrize(
    ("limit", "dense", "library"), [(0, 0, 0), (300, 0, 1), (700, 0, 2), (4500, 1, 1), (9000, 2, 0)]
)
def test_speed_mode_fills_its_limit_where_it_gains_most(gpu, limit, dense, library):
    layers = make_layers()
    know((32, 64), {**SPEEDS, "dense": (18.0, 20.0, 80.0)})
    report = autotune(layers, TOKENS, optimize_for="speed", max_extra_bytes=limit)
    assert sum(layer._dense_form is not None for layer in layers.values()) == dense
    assert sum(layer._library_form is not None for layer in layers.values()) == library
    assert report.extra_bytes <= limit


def test_the_limit_goes_to_the_layers_that_gain_most(gpu):
    layers = make_layers(1, (32, 64)) | {"other": make_layers(1, (64, 64))["layer0"]}
    know((32, 64), {**SPEEDS, "library": (20.0, 29.0, 140.0), "dense": (18.0, 29.0, 140.0)})
    know((64, 64))
    autotune(layers, TOKENS, optimize_for="speed", max_extra_bytes=600)
    assert layers["layer0"].extra_bytes == 0
    assert layers["other"].extra_bytes > 0


def test_tuning_again_with_another_aim_gives_the_memory_back(gpu):
    layers = make_layers()
    know((32, 64), {**SPEEDS, "dense": (18.0, 20.0, 80.0)})
    autotune(layers, TOKENS, optimize_for="speed")
    know((32, 64), {**SPEEDS, "library": (20.0, 40.0, 190.0)})
    assert autotune(layers, TOKENS, optimize_for="memory").extra_bytes == 0


def test_what_is_missing_is_measured_and_kept(gpu, monkeypatch, tmp_path):
    asked = []

    def fake(calls, device, repeats=0):
        asked.append(calls[0].func.__self__)
        return 10.0 if asked[-1].kernel == "gemv" else 20.0

    monkeypatch.setattr(dispatch, "time_calls", fake)
    layers = make_layers()
    report = autotune(layers, (1, 64))
    assert {candidate.kernel for candidate in asked} == {"gemv", "dot", "decompress", "dense"}
    assert report.rows[0].kernels[1].startswith("gemv(")
    (file,) = (tmp_path / "speeds").glob("*.json")
    asked.clear()
    kernels.forget()
    assert str(autotune(layers, (1, 64))) == str(report)
    assert not asked and file.is_file()


def test_layers_without_kernels():
    layers = make_layers(pattern="50%") | {"float32": make_layers(1, dtype=torch.float32)["layer0"]}
    report = autotune(layers)
    assert report.extra_bytes == 0 and "decompresses" in str(report)
    assert "32 x 64 50% bfloat16: 2 layers, packed alone" in str(report)
    size = layers["layer0"].dense_bytes
    report = autotune(layers, optimize_for="speed", max_extra_bytes=size)
    assert report.extra_bytes == size
    report = autotune(layers, optimize_for="speed")
    assert report.extra_bytes == 4 * size
    x = torch.randn(3, 64)
    for layer in layers.values():
        own = x.to(layer.weight.dtype)
        assert torch.equal(layer(own), F.linear(own, layer.to_dense_weight(), layer.bias))
    assert autotune(layers).extra_bytes == 0


def test_forms_give_what_the_packed_weight_gives(gpu):
    layer = make_layers()["layer0"]
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    expected = F.linear(x, layer.to_dense_weight(), layer.bias)
    layer.keep_form("dense", layer.to_dense_weight())
    layer.kernel = "dense"
    assert torch.equal(layer(x), expected)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)


@pytest.fixture
def formed():
    """A layer that keeps a dense form and a library's that shares its values."""
    layer = make_layers()["layer0"]
    form = torch.cat([layer.weight.detach().flatten(), torch.zeros(64, dtype=torch.bfloat16)])
    layer.keep_form("library", form, form[: layer.weight.numel()].view(layer.weight.shape))
    layer.keep_form("dense", layer.to_dense_weight())
    return layer


def test_forms_are_no_part_of_the_module(formed):
    assert set(formed.state_dict()) == {"weight", "weight_mask", "bias"}
    assert formed.extra_bytes == 64 * 2 + formed.dense_bytes
    twin = copy.deepcopy(formed)
    assert twin.extra_bytes == 0 and torch.equal(twin.weight, formed.weight)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.to(torch.float16),
        lambda layer: layer.load_state_dict(copy.deepcopy(layer.state_dict())),
        lambda layer: layer.drop_forms(),
    ],
)
def test_forms_go_when_the_module_changes(formed, change):
    before = formed.to_dense_weight()
    change(formed)
    assert formed.extra_bytes == 0
    assert formed.weight.untyped_storage().nbytes() == formed.weight.nbytes
    assert torch.equal(formed.to_dense_weight(), before.to(formed.weight.dtype))


def test_a_stale_form_is_not_used(formed):
    with torch.no_grad():
        formed.weight.mul_(2)
    formed.kernel = "auto"
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(formed(x), F.linear(x, formed.to_dense_weight(), formed.bias))
    assert formed.extra_bytes == 0


def test_a_lazily_dense_layer_is_dense_after_its_first_pass():
    layer = make_layers()["layer0"]
    layer.densify = "lazy"
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    assert layer.extra_bytes == 0
    first = layer(x)
    assert layer.extra_bytes == layer.dense_bytes
    assert torch.equal(layer(x), first)
    assert torch.equal(first, F.linear(x, layer.to_dense_weight(), layer.bias))


@pytest.mark.parametrize("write", [lambda w: w.data.copy_(2 * w.data), lambda w: w.data.mul_(2), lambda w: w.mul_(2)])
def test_a_lazily_dense_layer_sees_what_is_written_into_its_weight(write):
    layer = make_layers()["layer0"]
    layer.densify = "lazy"
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    layer(x)
    write(layer.weight)
    assert torch.equal(layer(x), F.linear(x, layer.to_dense_weight(), layer.bias))


def test_a_lazily_dense_layer_trains_and_is_measured_in_turns():
    layer = make_layers(dtype=torch.float32)["layer0"].requires_grad_()
    layer.densify = "lazy"
    x = torch.randn(8, 64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(layer(x), F.linear(x, layer.to_dense_weight(), layer.bias))
        assert layer.extra_bytes
        layer(x).square().sum().backward()
        assert layer.weight.grad.any()
        optimizer.step()
        optimizer.zero_grad()
    mask = Pattern("2:4").mask(layer.to_dense_weight().abs())
    assert not layer.to_dense_weight()[~mask].any()


def test_a_form_that_is_kept_does_not_swallow_the_gradient():
    layer = make_layers(dtype=torch.float32)["layer0"].requires_grad_()
    layer.keep_form("dense", layer.to_dense_weight())
    layer(torch.randn(8, 64)).sum().backward()
    assert layer.weight.grad.any()


def test_a_lazily_dense_layer_passes_gradients_to_adapters():
    layer = make_layers(dtype=torch.float32)["layer0"]
    layer.densify = "lazy"
    x = torch.randn(8, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.to_dense_weight().sum(0).expand(8, 64))


# --- on a model ------------------------------------------------------------------------------------------------------


def test_settings_reach_every_layer_and_are_not_saved(make_model, tmp_path, token_ids):
    make_model("llama").save_pretrained(tmp_path / "dense")
    chosen = {"kernel": "reference", "densify": "lazy", "optimize_for": "speed", "max_extra_bytes": 0}
    how = {"runtime_config": RuntimeConfig(**chosen)}
    config = SparsityConfig("magnitude")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", sparsity_config=config, **how)
    assert "not faster" in str(model.kernel_report)
    model.save_pretrained(tmp_path / "sparse")
    text = (tmp_path / "sparse/config.json").read_text()
    assert not [name for name in chosen if f'"{name}"' in text]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", **how)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    with torch.no_grad():
        expected = plain(token_ids).logits
        for one in (model, again):
            layers = [module for module in one.modules() if isinstance(module, SparseLinear)]
            assert {(layer.kernel, layer.densify) for layer in layers} == {("reference", "lazy")}
            assert torch.equal(one(token_ids).logits, expected)
            assert all(layer._dense_weight is not None for layer in layers)
    assert {layer.densify for layer in plain.modules() if isinstance(layer, SparseLinear)} == {"never"}


def test_a_model_runs_on_kernels_that_were_measured(gpu, monkeypatch, make_model):
    """The whole way on the simulated GPU: measured choice, eager and compiled, with kernels in the interpreter."""
    taken = []

    def fake(calls, device, repeats=0):
        return {"gemv": 1.0, "dot": 2.0}.get(calls[0].func.__self__.kernel, 3.0)

    def run(self, x, weight, bias, original=kernels.Candidate.run):
        taken.append(self.kernel)
        return original(self, x, weight, bias)

    monkeypatch.setattr(dispatch, "time_calls", fake)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}  # the interpreter is slow
    model = make_model("llama", dtype=torch.bfloat16, **sizes)
    sparsify(model, SparsityConfig("magnitude"))
    dense = copy.deepcopy(model)
    dense.dequantize()
    report = model.autotune_kernels((1, 16))
    assert [name.split("(")[0] for name in report.rows[0].kernels.values()] == ["gemv", "dot"]
    monkeypatch.setattr(kernels.Candidate, "run", run)
    for ids, kernel in ((torch.tensor([[5]]), "gemv"), (torch.arange(3, 13)[None], "dot")):
        with torch.no_grad():
            expected = dense(ids).logits
            taken.clear()
            torch.testing.assert_close(model(ids).logits, expected, rtol=0.05, atol=0.02)
            assert taken == [kernel] * 7
        model.requires_grad_(False)
        inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=inputs).logits.float().sum().backward()
        assert inputs.grad.isfinite().all() and inputs.grad.any()


def test_a_block_compiles_with_kernels_in_it(gpu, monkeypatch, make_model):
    torch._dynamo.reset()
    monkeypatch.setenv("KSPARSE_KERNEL", "dot")
    model = make_model("llama", dtype=torch.bfloat16, num_hidden_layers=1)
    sparsify(model, SparsityConfig("magnitude"))
    block = model.model.layers[0].mlp
    x = torch.randn(1, 3, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        found = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(found, block(x), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("config", [SparsityConfig(batch_size=3), {"batch_size": 3, "damping": 0.02}])
def test_only_what_is_passed_must_agree_with_the_checkpoint(make_model, tmp_path, config, token_ids):
    model = make_model("llama")
    sparsify(model, SparsityConfig("sparsegpt", "4:8", dataset=token_ids, method_settings={"damping": 0.02}))
    model.save_pretrained(tmp_path / "sparse")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", sparsity_config=config)
    assert again.config.quantization_config.batch_size == 3
    assert again.config.quantization_config.pattern == "4:8"
    with pytest.raises(ValueError, match="sparse already.*pattern: passed '2:4', recorded '4:8'"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", sparsity_config=SparsityConfig(pattern="2:4"))


def test_autotune_kernels_of_a_model(make_model, token_ids):
    model = make_model("llama")
    with pytest.raises(ValueError, match="LlamaForCausalLM has no sparse layers"):
        model.autotune_kernels()
    sparsify(model, SparsityConfig("magnitude"))
    assert model.autotune_kernels() is model.kernel_report
    for arguments, message in [
        ({"tokens": (3,)}, r"tokens=\[3\] must be some of 1, 2, 4"),
        ({"tokens": ()}, "must be some of"),
        ({"optimize_for": "size"}, "optimize_for='size' is not known; allowed: memory, speed"),
        ({"max_extra_bytes": -1}, "max_extra_bytes=-1 is too small"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.autotune_kernels(**arguments)


def test_a_kernel_that_cannot_run_here_is_an_error_that_says_why(make_model, token_ids, monkeypatch):
    model = make_model("llama")
    sparsify(model, SparsityConfig("magnitude"))
    configure(model, RuntimeConfig(kernel="gemv"))
    with pytest.raises(ValueError, match="kernel='gemv' cannot compute 2:4 float32 .*: the kernels"):
        model(token_ids)
    monkeypatch.setenv("KSPARSE_KERNEL", "reference")  # wins
    model(token_ids)
    monkeypatch.setenv("KSPARSE_KERNEL", "fastest")
    with pytest.raises(ValueError, match="kernel='fastest' is not known; allowed: auto, gemv, dot"):
        model(token_ids)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"kernel": "fast"}, ValueError, "kernel='fast' is not known; allowed: auto, gemv"),
        ({"optimize_for": 1}, TypeError, "optimize_for must be a string"),
        ({"densify": "always"}, ValueError, "densify='always' is not known; allowed: never, lazy"),
        ({"max_extra_bytes": 1.5}, TypeError, "max_extra_bytes must be an integer"),
        ({"fuse": "yes"}, TypeError, "fuse must be True or False"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        RuntimeConfig(**settings)


@pytest.mark.parametrize("name", [field.name for field in fields(RuntimeConfig)])
def test_sparsity_config_says_where_the_settings_of_running_went(name):
    with pytest.raises(TypeError, match=rf"runtime_config=RuntimeConfig\({name}="):
        SparsityConfig(**{name: getattr(RuntimeConfig(), name)})


def test_a_model_can_be_configured_back(make_model, token_ids):
    model = make_model("llama", torch.bfloat16)
    sparsify(model, SparsityConfig("magnitude"))
    layers = sparse_layers(model).values()
    configure(model, RuntimeConfig(densify="lazy", fuse=True))
    with torch.no_grad():
        model(token_ids)
    assert any(layer._dense_weight is not None for layer in layers)
    assert any(layer._group is not None for layer in layers)
    configure(model, RuntimeConfig())
    assert all(layer._dense_weight is None and layer._group is None for layer in layers)


def test_a_runtime_config_needs_sparse_layers(make_model, tmp_path):
    with pytest.raises(ValueError, match="runtime_config"):
        configure(make_model("llama"), RuntimeConfig())
    with pytest.raises(TypeError, match="runtime_config"):
        LlamaForCausalLM.from_pretrained(tmp_path, runtime_config="lazy")


def test_a_model_that_is_pruned_stays_so_where_there_is_no_room_to_run_it(make_model, tmp_path, monkeypatch, caplog):
    def fail(*arguments):
        raise torch.OutOfMemoryError("no room")

    make_model("llama").save_pretrained(tmp_path)
    monkeypatch.setattr("optimum_ksparse.integration.loading.configure", fail)
    how = {"sparsity_config": SparsityConfig("magnitude"), "runtime_config": {"optimize_for": "speed"}}
    with caplog.at_level("WARNING", logger="optimum_ksparse.integration.loading"):
        assert AutoModelForCausalLM.from_pretrained(tmp_path, **how).sparsity_report.layers
    assert "memory" in caplog.text and "'speed'" in caplog.text
