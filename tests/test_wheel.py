"""The built wheel works outside the repository: installed into an environment that does not know the checkout, where
clients load sparse checkpoints without importing it."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
import venv
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from optimum_ksparse import SparsityConfig, evaluate_kobest, sparsify

from .compressed_tensors import write, zero
from .conftest import REPOSITORY, VOCABULARY, sample_texts


def build_wheel(folder: Path, **environment: str) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder]
    subprocess.run([*command, REPOSITORY], check=True, env=os.environ | environment)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """An empty environment with the wheel. What the wheel depends on is linked in from this one, entry by entry, so
    that no network is needed and the checkout (which an editable install would show) stays out of sight."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    arguments = ["--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run([sys.executable, "-m", "pip", "install", *arguments], check=True)
    origin = Path(sysconfig.get_path("purelib"))
    entries = [entry for entry in origin.iterdir() if "ksparse" not in entry.name and entry.suffix != ".pth"]
    # `optimum` is a namespace: its folders hold files of both.
    for entry in (*entries, *(origin / "optimum").iterdir(), *(origin / "optimum" / "commands").iterdir()):
        target = site / entry.relative_to(origin)
        if not target.exists():
            target.symlink_to(entry)
    return folder


# In one process: each takes eight seconds to import what it needs.
SCRIPT = """
import optimum_ksparse
import torch
from optimum_ksparse.__main__ import main
from optimum_ksparse.kernels import describe_device
from transformers import AutoModelForCausalLM

print(optimum_ksparse.__file__, describe_device(torch.device("cpu")))
how = "--texts text.txt --seq-len 32 --max-tokens 96 --tasks none"
for words in ("info sparse", f"eval sparse --baseline dense {how}", "card sparse --language ko"):
    assert main(words.split()) == 0
print(AutoModelForCausalLM.from_pretrained("sparse").sparsity_report.density)
"""


@pytest.mark.processes
def test_the_wheel_holds_the_package_and_the_command(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "optimum_ksparse/__init__.py" in names
    assert "optimum/commands/register/register_ksparse.py" in names
    assert "optimum_ksparse/py.typed" in names
    templates = ("card.md.jinja", "phrases.yaml", "citations.bib")
    assert {f"optimum_ksparse/hub/templates/{name}" for name in templates} <= set(names)
    assert not [name for name in names if name.startswith("optimum/") and name.endswith("__init__.py")]
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {
        "optimum_ksparse",
        "optimum",
        "optimum_ksparse_autoload.py",
    }


@pytest.mark.processes
@pytest.mark.skipif(not shutil.which("cc"), reason="there is no compiler")
def test_a_wheel_with_native_code_is_of_this_platform(wheel):
    library = "optimum_ksparse/kernels/cpu/" + ("libksparse.dylib" if sys.platform == "darwin" else "libksparse.so")
    assert library in zipfile.ZipFile(wheel).namelist()
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")


@pytest.mark.processes
def test_without_a_compiler_the_wheel_is_pure(tmp_path):
    wheel = build_wheel(tmp_path, CC="false")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith((".so", ".dylib"))]


def clean_environment(**variables: str) -> dict[str, str]:
    """That of this process without what shows the checkout; what was compiled is in the wheel."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return clean | {"CC": "false"} | variables


@pytest.mark.end_to_end
def test_prune_and_load_from_an_empty_folder(environment, tmp_path, make_model, tokenizer):
    make_model("llama").save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("\n\n".join(sample_texts("calibration")), encoding="utf-8")
    recipe = {"pattern": "2:4", "dataset": "text.txt", "num_samples": 4, "seq_len": 32}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    python = environment / "bin" / "python"

    def run(*arguments):
        command = [python, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=clean_environment())
        assert done.returncode == 0, done.stderr
        return done.stdout

    cli = ("-m", "optimum.commands.optimum_cli", "ksparse")
    assert "14 sparse layers" in run(*cli, "prune", "dense", "sparse", "--config", "recipe.yaml")
    said = run("-c", SCRIPT)
    assert str(environment) in said.split("\n")[0]
    assert ("by native code" in said.split("\n")[0]) == bool(shutil.which("cc"))
    assert "pattern: 2:4" in said and "perplexity" in said
    assert "# sparse" in (tmp_path / "sparse" / "README.md").read_text(encoding="utf-8")
    assert said.strip().split("\n")[-1] == "0.5"


# Each client in a process of its own, forked where nothing has been loaded: imports take seconds.
CLIENTS = """
import copy, os, sys, warnings
import torch, transformers
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM, Trainer, pipeline
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoQuantizationConfig

tokens, expected = torch.arange(8)[None], torch.load("logits.pt")

def check(model, sparse=True):
    assert ("optimum_ksparse" in sys.modules) == sparse
    assert hasattr(model, "sparsity_report") == sparse
    assert not hasattr(model.config, "transformers_weights")
    assert torch.equal(model(tokens).logits, expected["sparse" if sparse else "dense"])
    return model

def auto(): check(AutoModelForCausalLM.from_pretrained("packed"))
def of_the_class(): check(LlamaForCausalLM.from_pretrained("packed"))
def with_a_config(): check(LlamaForCausalLM.from_pretrained("packed", config=AutoConfig.from_pretrained("packed")))
def with_what_was_loaded():
    model, info = LlamaForCausalLM.from_pretrained("packed", output_loading_info=True)
    assert check(model) and not info["missing_keys"]
def stored_dense(): check(AutoModelForCausalLM.from_pretrained("zeros"))
def stored_dense_of_the_class(): check(LlamaForCausalLM.from_pretrained("zeros"))
def a_decoder(): assert AutoModel.from_pretrained("packed").sparsity_report
def of_compressed_tensors(): check(AutoModelForCausalLM.from_pretrained("foreign"))
def dense_of_compressed_tensors(): check(LlamaForCausalLM.from_pretrained("stale"))
def not_sparse_of_compressed_tensors():
    config = {"quant_method": "compressed-tensors", "config_groups": {}, "sparsity_config": {}}
    try:
        assert AutoQuantizationConfig.from_dict(config).quant_method == "compressed-tensors"
    except ImportError as error:  # where that package is not
        assert "compressed-tensors" in str(error)
    assert "optimum_ksparse" not in sys.modules
def no_sparse_one():
    before = LlamaForCausalLM.from_pretrained.__func__
    check(AutoModelForCausalLM.from_pretrained("dense"), sparse=False)
    check(LlamaForCausalLM.from_pretrained("dense"), sparse=False)
    assert LlamaForCausalLM.from_pretrained.__func__ is before
def by_a_pipeline(): assert pipeline("text-generation", "packed")("abc", max_new_tokens=2)[0]["generated_text"]
def settings_first():
    settings = AutoQuantizationConfig.from_dict(AutoConfig.from_pretrained("packed").quantization_config)
    check(AutoModelForCausalLM.from_pretrained("packed", quantization_config=settings))
def an_adapter(): assert AutoPeftModelForCausalLM.from_pretrained("adapter").get_base_model().sparsity_report
def an_adapter_on_a_base():
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("packed"), "adapter")
    assert not torch.equal(adapted(tokens).logits, expected["sparse"])
def pruned_by_plain_settings():
    settings = {"method": "magnitude", "pattern": "2:4"}
    assert AutoModelForCausalLM.from_pretrained("dense", sparsity_config=settings).sparsity_report.density == 0.5
def of_a_function_that_was_kept():
    load = LlamaForCausalLM.from_pretrained
    for name in ("packed", "packed", "zeros"): check(load(name))
def wrapped_by_others():
    theirs, calls = PreTrainedModel.from_pretrained.__func__, []
    def load(cls, *args, **kwargs):
        calls.append(cls)
        return theirs(cls, *args, **kwargs)
    PreTrainedModel.from_pretrained = classmethod(load)
    for _ in range(2):
        calls.clear()
        check(LlamaForCausalLM.from_pretrained("packed"))
        assert calls
def two_and_an_import():
    check(AutoModelForCausalLM.from_pretrained("packed"))
    import optimum_ksparse
    check(LlamaForCausalLM.from_pretrained("packed"))

assert "optimum_ksparse" not in sys.modules
for name, client in list(globals().items()):
    if getattr(client, "__module__", None) == "__main__" and name != "check":
        if not (child := os.fork()):
            client()
            os._exit(0)
        print(name, os.waitpid(child, 0)[1])
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, make_model, tokenizer) -> Path:
    """One model dense, packed, dense-stored with its zeros and as compressed-tensors wrote it, packed and dense, and a
    LoRA adapter of the packed one; logits of two."""
    from peft import LoraConfig, get_peft_model

    folder, tokens, logits = tmp_path_factory.mktemp("checkpoints"), torch.arange(8)[None], {}
    for name, storage in (("packed", "packed"), ("zeros", "dense")):
        model = make_model("llama", vocab_size=VOCABULARY + 64)  # `tokenizer` may have tokens of its own
        model.save_pretrained(folder / "dense")
        logits["dense"] = model(tokens).logits.detach()
        sparsify(model, SparsityConfig("magnitude", "2:4", storage=storage))
        logits["sparse"] = model(tokens).logits.detach()
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    torch.save(logits, folder / "logits.pt")
    zeros = make_model("llama", vocab_size=VOCABULARY + 64)
    zero(zeros)
    write(zeros, folder / "foreign", "sparse-24-bitmask")
    write(zeros, folder / "stale", "dense")
    model.name_or_path = model.config._name_or_path = "packed"
    adapted = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(folder / "adapter")
    return folder


def run_client(environment: Path, folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = (str(environment / "bin" / "python"), *command)
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=clean_environment(**variables))


@pytest.mark.end_to_end
def test_clients_load_sparse_checkpoints_without_an_import(environment, checkpoints):
    done = run_client(environment, checkpoints, "-c", CLIENTS)
    statuses = dict(line.split() for line in done.stdout.splitlines() if re.fullmatch(r"\w+ \d+", line))
    assert len(statuses) == CLIENTS.count("\ndef ") - 1, done.stderr
    assert set(statuses.values()) == {"0"}, (statuses, done.stderr)


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained("packed", **eval(sys.argv[1]))
print("optimum_ksparse" in sys.modules)
"""


@pytest.mark.end_to_end
@pytest.mark.parametrize("switch", ["KSPARSE_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_turned_off_nothing_reads_packed_weights_as_others_and_the_launcher_loads_them(
    environment, checkpoints, switch
):
    (checkpoints / "load.py").write_text(LOAD)
    for arguments in ("{}", "{'ignore_mismatched_sizes': True}"):
        done = run_client(environment, checkpoints, "load.py", arguments, **{switch: "0"})
        assert done.returncode == 1 and "optimum-ksparse" in done.stderr.splitlines()[-1]
    (checkpoints / "scripts").mkdir(exist_ok=True)
    (checkpoints / "scripts" / "beside.py").write_text(LOAD)
    (checkpoints / "scripts" / "start.py").write_text("import beside")
    for script in ("load.py", "scripts/start.py"):
        done = run_client(environment, checkpoints, "-m", "optimum_ksparse", script, "{}", **{switch: "0"})
        assert done.stdout.split() == ["True"], done.stderr
    done = run_client(environment, checkpoints, "-m", "optimum_ksparse", "info", "packed", **{switch: "0"})
    assert f"{switch}=0" in done.stdout


@pytest.mark.end_to_end
def test_a_launched_script_and_the_harness_load_without_an_import(environment, checkpoints, make_model, tokenizer):
    from .evaluation.test_kobest import write_task

    (checkpoints / "load.py").write_text(LOAD)
    launched = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "load.py", "{}")
    done = run_client(environment, checkpoints, *launched)
    assert done.stdout.split()[-1:] == ["True"], done.stderr

    data, tasks = checkpoints / "kobest", ("copa", "sentineg")
    for task in tasks:
        write_task(data, task, train=range(10, 15), validation=range(5))
        files = {name: str(data / task / f"{name}.jsonl") for name in ("train", "validation")}
        packaged = Path(pytest.importorskip("lm_eval.tasks").__file__).parent / "kobest" / f"kobest_{task}.yaml"
        settings = {"include": str(packaged), "task": f"local_{task}", "dataset_path": "json", "dataset_name": None}
        settings |= {"dataset_kwargs": {"data_files": files}, "test_split": None}
        (data / f"{task}.yaml").write_text(yaml.safe_dump(settings))
    names = ",".join(f"local_{task}" for task in tasks)
    words = f"-m lm_eval --model hf --model_args pretrained=packed,dtype=float32 --device cpu --tasks {names}"
    done = run_client(
        environment,
        checkpoints,
        *words.split(),
        "--include_path",
        "kobest",
        "--output_path",
        "out",
        "--batch_size",
        "4",
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(next((checkpoints / "out").rglob("results_*.json")).read_text())["results"]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(checkpoints / "packed")
    loaded = AutoTokenizer.from_pretrained(checkpoints / "packed")
    ours = evaluate_kobest(model, loaded, tasks=tasks, data_dir=data, batch_size=4)
    for task in tasks:
        assert ours[task]["acc"] == results[f"local_{task}"]["acc,none"]
        assert ours[task]["f1"] == results[f"local_{task}"]["f1,none"]


@pytest.mark.end_to_end
def test_a_server_of_transformers_answers_from_a_packed_checkpoint(environment, checkpoints):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [environment / "bin" / "python", "-m", "transformers.cli.transformers", "serve", "packed"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = checkpoints / "serve.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            command, cwd=checkpoints, stdout=output, stderr=output, env=clean_environment(HF_HUB_OFFLINE="1")
        )
    try:
        body = {"model": "packed", "prompt": "abc", "max_tokens": 4, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        answer = None
        while answer is None:
            assert server.poll() is None, log.read_text()
            try:
                answer = json.load(urllib.request.urlopen(request))
            except urllib.error.HTTPError as error:
                pytest.fail(f"{error.read().decode()} {log.read_text()}")
            except OSError:  # it does not listen yet
                time.sleep(0.2)
        assert answer["choices"][0]["text"] is not None and answer["usage"]["completion_tokens"] > 0
    finally:
        server.terminate()
        server.wait()
