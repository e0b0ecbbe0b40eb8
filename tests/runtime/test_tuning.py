"""Which layers keep a second form of their weight, on a simulated GPU: the CPU with made-up speeds; and the settings
that say how a loaded model computes."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from optimum_ksparse import SparseLinear, SparsityConfig, kernels, sparsify
from optimum_ksparse.checkpoint import sparse_layers
from optimum_ksparse.kernels import candidates, dispatch, hardware
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
    monkeypatch.setattr(candidates, "why_not_native", lambda: "this is a GPU")
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
            name: {"config": dispatch._configs(name, problem)[0], "us": times[i]}
            for name, times in speeds.items()
            if times[i] is not None
        }
        dispatch._known(problem.device)[str(problem)] = rows


def kernel_of(calls):
    """What `time_calls` is to time."""
    return getattr(calls[0].func.__self__, "kernel", "dense")


def make_layers(count=2, shape=(32, 64), pattern="2:4", dtype=torch.bfloat16):
    torch.manual_seed(0)
    layers = {}
    for i in range(count):
        linear = nn.Linear(shape[1], shape[0]).to(dtype)
        mask = Pattern(pattern).mask(linear.weight.abs())
        layers[f"layer{i}"] = SparseLinear.from_dense(linear, mask, Pattern(pattern)).requires_grad_(False)
    return layers


def test_layers_take_the_form_of_the_library_where_it_shares_the_values(gpu):
    layers = make_layers()
    know((32, 64))
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    report = autotune(layers, TOKENS)
    for name, layer in layers.items():
        assert torch.equal(layer.weight, before[name])
        assert layer.weight.untyped_storage().data_ptr() == layer._library_form.untyped_storage().data_ptr()
        assert layer.packed_bytes + layer.extra_bytes == 0.625 * layer.dense_bytes
    assert report.rows[0].kept == 2
    assert [report.rows[0].kernels[t].split("(")[0] for t in TOKENS] == ["gemv", "library", "library"]
    assert "32 x 64 2:4 bfloat16: 2 layers, 2 keep their library form" in str(report)
    assert " 1.33 x dense, library" in str(report)  # 120 / 90


def test_layers_keep_nothing_that_does_not_share(gpu, monkeypatch):
    monkeypatch.setattr(kernels, "shared_values", lambda form, values: None)
    layers = make_layers()
    know((32, 64))
    report = autotune(layers, TOKENS)
    assert report.extra_bytes == 0
    assert [report.rows[0].kernels[t].split("(")[0] for t in TOKENS] == ["gemv", "dot", "decompress"]


def test_layers_keep_nothing_that_does_not_pay(gpu):
    layers = make_layers()
    know((32, 64), {**SPEEDS, "library": (20.0, 29.9, 149.9)})
    assert autotune(layers, TOKENS).extra_bytes == 0


def test_tuning_again_gives_the_memory_back(gpu):
    layers = make_layers()
    know((32, 64))
    assert autotune(layers, TOKENS).extra_bytes
    know((32, 64), {**SPEEDS, "library": (20.0, 40.0, 190.0)})
    assert autotune(layers, TOKENS).extra_bytes == 0
    assert all(layer.weight.untyped_storage().nbytes() == layer.weight.nbytes for layer in layers.values())


def test_what_is_missing_is_measured_and_kept(gpu, monkeypatch, tmp_path):
    asked = []

    def fake(calls, device, repeats=0):
        asked.append(kernel_of(calls))
        return 10.0 if asked[-1] == "gemv" else 20.0

    monkeypatch.setattr(dispatch, "time_calls", fake)
    layers = make_layers()
    report = autotune(layers, (1, 64))
    assert set(asked) == {"gemv", "dot", "decompress", "dense"}
    assert report.rows[0].kernels[1].startswith("gemv(")
    (file,) = (tmp_path / "speeds").glob("*.json")
    asked.clear()
    kernels.forget()
    assert str(autotune(layers, (1, 64))) == str(report)
    assert not asked and file.is_file()


def test_layers_without_kernels():
    layers = make_layers(pattern="50%") | {"float32": make_layers(1, dtype=torch.float32)["layer0"]}
    report = autotune(layers)
    assert report.extra_bytes == 0 and kernels.describe_device(torch.device("cpu")) in str(report)
    assert "32 x 64 50% bfloat16: 2 layers, packed alone" in str(report)
    x = torch.randn(3, 64)
    for layer in layers.values():
        own = x.to(layer.weight.dtype)
        expected = F.linear(own, layer.to_dense_weight(), layer.bias)
        torch.testing.assert_close(layer(own), expected, rtol=0.02, atol=2e-3)


@pytest.fixture
def formed():
    """A layer that keeps a library's form, which shares its values; that kernel reads them from it."""
    layer = make_layers()["layer0"]
    form = torch.cat([layer.weight.detach().flatten(), torch.zeros(64, dtype=torch.bfloat16)])
    layer.keep_library_form(form, form[: layer.weight.numel()].view(layer.weight.shape))
    return layer


def test_a_form_is_no_part_of_the_module(formed):
    assert set(formed.state_dict()) == {"weight", "weight_mask", "bias"}
    assert formed.extra_bytes == 64 * 2
    twin = copy.deepcopy(formed)
    assert twin.extra_bytes == 0 and torch.equal(twin.weight, formed.weight)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.to(torch.float16),
        lambda layer: layer.load_state_dict(copy.deepcopy(layer.state_dict())),
        lambda layer: layer.drop_library_form(),
        lambda layer: layer.replace_values(layer.weight.detach().clone()),
    ],
)
def test_a_form_goes_when_the_module_changes(formed, change):
    before = formed.to_dense_weight()
    change(formed)
    assert formed.extra_bytes == 0 and formed._library_form is None
    assert formed.weight.untyped_storage().nbytes() == formed.weight.nbytes
    assert torch.equal(formed.to_dense_weight(), before.to(formed.weight.dtype))


@pytest.mark.parametrize(
    ("write", "follows"),
    [
        (lambda layer: layer.weight.mul_(2), True),
        (lambda layer: layer.weight.data.copy_(2 * layer.weight.data), True),
        (lambda layer: setattr(layer.weight, "data", 2 * layer.weight.data), False),
        (lambda layer: setattr(layer, "weight", nn.Parameter(2 * layer.weight.detach())), False),
    ],
)
def test_a_form_follows_what_is_written_and_is_not_used_where_the_weight_is_another(formed, write, follows):
    with torch.no_grad():
        write(formed)
    assert formed.packed().has_library == follows
    values = formed._library_form[: formed.weight.numel()].view(formed.weight.shape)
    assert torch.equal(values, formed.weight) == follows


# --- on a model ------------------------------------------------------------------------------------------------------


def test_settings_reach_every_layer_and_are_not_saved(make_model, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "dense")
    how = {"runtime_config": RuntimeConfig(kernel="reference")}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", sparsity_config=SparsityConfig("magnitude", "2:4"), **how
    )
    model.save_pretrained(tmp_path / "sparse")
    assert '"kernel"' not in (tmp_path / "sparse/config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", runtime_config={"kernel": "reference"})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    for one, kernel in ((model, "reference"), (again, "reference"), (plain, "auto")):
        assert {layer.kernel for layer in sparse_layers(one).values()} == {kernel}
    configure(again, RuntimeConfig())
    assert {layer.kernel for layer in sparse_layers(again).values()} == {"auto"}


@pytest.mark.slow
def test_a_model_runs_on_kernels_that_were_measured(gpu, monkeypatch, make_model):
    """The whole way on the simulated GPU: measured choice, forward and backward, with kernels in the interpreter."""
    taken = []

    def fake(calls, device, repeats=0):
        return {"gemv": 1.0, "dot": 2.0}.get(kernel_of(calls), 3.0)

    def run(self, x, weight, bias, original=kernels.Candidate.run):
        taken.append(self.kernel)
        return original(self, x, weight, bias)

    monkeypatch.setattr(dispatch, "time_calls", fake)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}  # the interpreter is slow
    model = make_model("llama", dtype=torch.bfloat16, **sizes)
    sparsify(
        model, SparsityConfig("magnitude", "2:4", modules_to_not_convert=["k_proj", "v_proj", "o_proj", "gate_proj"])
    )
    dense = copy.deepcopy(model)
    dense.dequantize()
    report = model.autotune_kernels((1, 16))
    assert [name.split("(")[0] for name in report.rows[0].kernels.values()] == ["gemv", "dot"]
    monkeypatch.setattr(kernels.Candidate, "run", run)
    model.requires_grad_(False)
    for ids, kernel in ((torch.tensor([[5]]), "gemv"), (torch.arange(3, 13)[None], "dot")):
        inputs = model.get_input_embeddings()(ids).requires_grad_()
        taken.clear()
        logits = model(inputs_embeds=inputs).logits
        assert taken == [kernel] * 3
        torch.testing.assert_close(logits, dense(ids).logits, rtol=0.05, atol=0.02)
        logits.float().sum().backward()
        assert inputs.grad.isfinite().all() and inputs.grad.any()


@pytest.mark.slow
def test_a_block_compiles_with_kernels_in_it(gpu, monkeypatch, make_model):
    torch._dynamo.reset()
    monkeypatch.setenv("KSPARSE_KERNEL", "dot")
    model = make_model("llama", dtype=torch.bfloat16, num_hidden_layers=1)
    sparsify(model, SparsityConfig("magnitude", "2:4"))
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
    sparsify(model, SparsityConfig("magnitude", "2:4"))
    assert model.autotune_kernels() is model.kernel_report
    for arguments, message in [
        ({"tokens": (3,)}, r"tokens=\[3\] must be some of 1, 2, 4"),
        ({"tokens": ()}, "must be some of"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.autotune_kernels(**arguments)


def test_a_kernel_that_cannot_run_here_is_an_error_that_says_why(make_model, token_ids, monkeypatch):
    model = make_model("llama")
    sparsify(model, SparsityConfig("magnitude", "2:4"))
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
        ({"kernel": "dense"}, ValueError, "kernel='dense' is not known"),
        ({"kernel": 1}, TypeError, "kernel must be a string"),
        ({"kernels": "gemv"}, TypeError, "no setting 'kernels'; allowed: kernel"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        RuntimeConfig(**settings)


def test_sparsity_config_says_where_the_kernel_went():
    with pytest.raises(TypeError, match=r"runtime_config=RuntimeConfig\(kernel="):
        SparsityConfig(kernel="gemv")


@pytest.mark.parametrize("name", ["fuse", "densify", "optimize_for", "max_extra_bytes"])
def test_settings_of_earlier_versions_do_no_harm(name, make_model, tmp_path):
    for config in (RuntimeConfig, SparsityConfig):
        with pytest.raises(TypeError, match=name):
            config(**{name: None})
    model = make_model("llama")
    sparsify(model, SparsityConfig("magnitude", "2:4"))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"][name] = "lazy"  # as versions recorded it that kept all settings in one
    path.write_text(json.dumps(config))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sparse_layers(again) and name not in again.config.quantization_config.to_dict()


def test_a_runtime_config_needs_sparse_layers(make_model, tmp_path):
    with pytest.raises(ValueError, match="runtime_config"):
        configure(make_model("llama"), RuntimeConfig())
    with pytest.raises(TypeError, match="runtime_config"):
        LlamaForCausalLM.from_pretrained(tmp_path, runtime_config="lazy")
