"""Which kernel computes a product, on a simulated GPU: the CPU with made-up speeds; and the file that keeps them."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace

import pytest
import torch

from optimum_ksparse import kernels
from optimum_ksparse.kernels import cache, candidates, dispatch, hardware, why_not_native
from optimum_ksparse.pattern import Pattern

from ..conftest import REPOSITORY

CPU = torch.device("cpu")

# What a CPU takes by itself.
NATIVE = "native" if why_not_native() is None else "reference"


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """An empty cache, and no choice in the environment."""
    monkeypatch.setenv("KSPARSE_CACHE", str(tmp_path / "speeds"))
    for name in ("KSPARSE_KERNEL", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    kernels.forget()
    yield
    kernels.forget()


@pytest.fixture
def gpu(monkeypatch):
    """The CPU counts as a GPU that has kernels; none is run."""
    monkeypatch.setattr(hardware, "runs_kernels", lambda device: True)
    monkeypatch.setattr(hardware, "why_no_kernels", lambda device: None)
    monkeypatch.setattr(candidates, "why_not_native", lambda: "this is a GPU")


class Clock:
    """Stands for `time_calls`: times by kernel, or by a candidate as it is printed; what has none fails."""

    def __init__(self):
        self.times = {}
        self.asked = []

    def __call__(self, calls, device):
        x, weight, bias = calls[0].args
        is_dense = isinstance(weight, torch.Tensor)
        candidate = kernels.Candidate(kernels.DENSE) if is_dense else calls[0].func.__self__
        assert x.shape == (self.tokens, weight.shape[1] if is_dense else weight.in_features) and bias is None
        self.asked.append(str(candidate))
        if str(candidate) in self.times:
            return self.times[str(candidate)]
        if candidate.kernel in self.times:
            return self.times[candidate.kernel]
        raise NotImplementedError(f"{candidate} cannot run")


@pytest.fixture
def clock(gpu, monkeypatch):
    clock = Clock()
    clock.tokens = 1
    monkeypatch.setattr(dispatch, "time_calls", clock)
    return clock


def make_problem(tokens=1, out_features=16, in_features=32, pattern="2:4", dtype=torch.bfloat16):
    return kernels.Problem(out_features, in_features, tokens, pattern, dtype, CPU)


def make_weight(*args, **options):
    return kernels.sample_weights(make_problem(*args, **options), 1)[0]


def first(name, problem):
    return kernels.Candidate(name, kernels.KERNELS[name].configs(problem)[0])


def test_every_number_of_tokens_falls_into_the_next_bucket():
    assert {kernels.bucket(tokens) for tokens in range(1, 5000)} == set(kernels.BUCKETS)
    assert all(tokens <= kernels.bucket(tokens) < 2 * tokens for tokens in range(1, 4097))
    assert kernels.bucket(10**6) == 4096


# Forced kernels.


def choose_by(by, monkeypatch, weight, tokens, name):
    """With a kernel forced by argument, or by the environment, which wins over what the layer says."""
    if by == "environment":
        monkeypatch.setenv("KSPARSE_KERNEL", name)
    return kernels.choose(weight, tokens, name if by == "argument" else "reference")


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_forced_kernel_is_taken(gpu, monkeypatch, by):
    weight = make_weight()
    for name, tokens in (("gemv", 4), ("dot", 5), ("decompress", 5), ("reference", 5)):
        assert choose_by(by, monkeypatch, weight, tokens, name) == first(name, weight.problem(tokens))


def test_an_empty_variable_and_auto_force_nothing(gpu, monkeypatch):
    monkeypatch.setenv("KSPARSE_KERNEL", "")
    assert kernels.choose(make_weight(), 1, "dot").kernel == "dot"
    assert kernels.choose(make_weight(), 1).kernel == "gemv"
    monkeypatch.setenv("KSPARSE_KERNEL", "auto")
    assert kernels.choose(make_weight(), 1, "reference").kernel == "gemv"


REFUSALS = [
    ("GEMV", 1, {}, "allowed: auto, gemv, dot, decompress"),
    ("gemv", 5, {}, "at most 4 tokens, not 5"),
    ("dot", 5, {"in_features": 20}, "in_features that 8 divides, not 20"),
    ("decompress", 5, {"dtype": torch.float32}, "bfloat16 and float16, not torch.float32"),
    ("gemv", 1, {"pattern": "1:4"}, "for 2:4 and 4:8, not for 1:4"),
    ("dense", 5, {}, "allowed: auto, gemv"),
    ("library", 5, {}, "need a CUDA device"),
]


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_kernel_that_cannot_take_a_product_says_why(gpu, monkeypatch, by):
    for name, tokens, changes, reason in REFUSALS:
        weight = make_weight(**{**changes, "pattern": "2:4"})._replace(pattern=changes.get("pattern", "2:4"))
        with pytest.raises(ValueError, match=reason):
            choose_by(by, monkeypatch, weight, tokens, name)


def test_where_there_is_no_gpu_kernels_run_in_the_interpreter_or_not_at_all(monkeypatch):
    weight = make_weight()
    with pytest.raises(ValueError, match="need an NVIDIA GPU"):
        kernels.choose(weight, 2, "gemv")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if hardware.is_interpreted():  # Triton is there
        assert kernels.choose(weight, 2, "gemv").kernel == "gemv"
    # Only what is forced runs there.
    assert kernels.choose(weight, 2) == kernels.Candidate(NATIVE)


def test_the_operator_refuses_what_a_forced_kernel_cannot_take(gpu):
    weight, x = make_weight(), torch.randn(5, 32, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="gemv takes at most 4 tokens, not 5"):
        kernels.linear(x, weight.values, weight.bits, None, 32, "2:4", "gemv")


# What is chosen where nothing is forced.


def test_a_rule_of_thumb_decides_where_nothing_was_measured(clock):
    """A forward pass measures nothing."""
    for problem, expected in (
        (make_problem(1), "gemv"),
        (make_problem(2, pattern="4:8"), "gemv"),
        (make_problem(4), "dot"),
        (make_problem(64), "dot"),
        (make_problem(128), "decompress"),
        (make_problem(1, in_features=20), "gemv"),
        (make_problem(4, in_features=20), "decompress"),
    ):
        weight = kernels.sample_weights(problem, 1)[0]
        assert kernels.choose(weight, problem.tokens) == first(expected, problem)
    assert clock.asked == []


@pytest.mark.parametrize("changes", [{"pattern": "50%"}, {"dtype": torch.float32}])
def test_what_kernels_do_not_take_is_computed_in_pytorch(gpu, changes):
    weight = make_weight(**{**changes, "pattern": "2:4"})._replace(pattern=changes.get("pattern", "2:4"))
    assert kernels.choose(weight, 1) == kernels.Candidate("reference")


def test_the_fastest_kernel_that_the_layer_has_is_taken(clock):
    weight = make_weight()
    assert kernels.choose(weight, 1).kernel == "gemv"
    for fastest in ("gemv", "dot", "decompress"):
        clock.times = {"gemv": 30.0, "dot": 30.0, "decompress": 30.0, "dense": 20.0, fastest: 25.0}
        kernels.measure(make_problem(1))
        assert kernels.choose(weight, 1) == first(fastest, make_problem(1))


def test_all_configurations_are_measured_and_the_fastest_of_each_kernel_is_known(clock):
    problem = make_problem(1)
    configs = {name: kernels.KERNELS[name].configs(problem) for name in ("gemv", "dot", "decompress")}
    configs[kernels.DENSE] = [{}]
    clock.times = {"gemv": 30.0, "dot": 50.0, "decompress": 70.0, "dense": 20.0}
    best = kernels.Candidate("gemv", configs["gemv"][3])
    clock.times[str(best)] = 25.0
    result = kernels.measure(problem)
    assert result == kernels.measured(problem)
    assert result == {
        "gemv": (best, 25.0),
        "dot": (first("dot", problem), 50.0),
        "decompress": (first("decompress", problem), 70.0),
        "dense": (kernels.Candidate("dense"), 20.0),
    }
    assert clock.asked == [str(kernels.Candidate(name, c)) for name, some in configs.items() for c in some]


@pytest.mark.parametrize(("share", "wins"), [(0.985, False), (0.975, True)])
def test_noise_does_not_choose_a_configuration(clock, share, wins):
    problem = make_problem(1)
    other = kernels.Candidate("gemv", kernels.KERNELS["gemv"].configs(problem)[1])
    clock.times = {"gemv": 100.0, str(other): 100.0 * share}
    kernels.measure(problem)
    assert kernels.measured(problem)["gemv"][0] == (other if wins else first("gemv", problem))


def test_candidates_and_forms_that_fail_are_left_out(clock, monkeypatch):
    def fail(*arguments):
        raise torch.OutOfMemoryError("there is no memory left")  # of the dense weight's copies

    problem = make_problem(1)
    runs = kernels.Candidate("dot", kernels.KERNELS["dot"].configs(problem)[2])
    clock.times = {str(runs): 10.0, "dense": 5.0}
    monkeypatch.setattr(torch, "empty", fail)
    assert kernels.measure(problem) == {"dot": (runs, 10.0)}
    assert kernels.choose(make_weight(), 1) == runs


def test_where_everything_fails_the_rule_of_thumb_stays(clock, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert kernels.measure(make_problem(1)) == {}
    assert kernels.choose(make_weight(), 1) == first("gemv", make_problem(1))
    assert "No kernel could be measured" in caplog.text
    assert not list(tmp_path.glob("speeds/*.json"))


def test_each_bucket_is_measured_by_itself(clock):
    for tokens, times in [(1, {"gemv": 1.0, "dot": 2.0}), (16, {"decompress": 2.0})]:
        clock.times, clock.tokens = times, tokens
        kernels.measure(make_problem(tokens))
    assert [kernels.choose(make_weight(), tokens).kernel for tokens in (1, 9, 16)] == ["gemv"] + 2 * ["decompress"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_measuring_leaves_the_mode_and_the_random_numbers_alone(clock, mode):
    clock.times = {"gemv": 1.0}
    state = torch.random.get_rng_state()
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        kernels.measure(make_problem(1))
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_speeds_on_disk_are_taken_by_the_next_process(clock):
    clock.times = {"gemv": 30.0, "dot": 10.0}
    kernels.measure(make_problem(1))
    kernels.forget()
    clock.times, clock.asked = {}, []
    assert kernels.choose(make_weight(), 1).kernel == "dot"
    assert clock.asked == []


@pytest.mark.slow
def test_threads_choose_while_another_measures(clock):
    """What one thread looks up, another forgets in the middle of it."""
    clock.times = {"gemv": 1.0, "dot": 2.0}
    weights, stop, errors = [make_weight(in_features=16 * i) for i in range(1, 40)], threading.Event(), []

    def look_up():
        try:
            while not stop.is_set():
                for weight in weights:
                    kernels.choose(weight, 1)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=look_up) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        kernels.measure(make_problem(1))
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors


# The file.

ROW = {"gemv": {"config": {"warps": 4, "rows": 2}, "us": 12.5}}


def known(*names):
    return dict.fromkeys(names, ROW)


def test_what_is_written_is_read():
    assert cache.read_timings(CPU) == {}
    cache.write_timings(CPU, known("a", "b"))
    other = {"b": {"dot": {"config": {"rows": 64}, "us": 1.0}}}
    cache.write_timings(CPU, other)
    assert cache.read_timings(CPU) == {**known("a"), **other}
    (file,) = cache.cache_path(CPU).parent.glob("*.json")
    assert file == cache.cache_path(CPU)
    assert set(json.loads(file.read_text())) == {"gpu", "versions", "timings"}


def test_the_folder_is_that_of_hugging_face_unless_told(monkeypatch, tmp_path):
    from huggingface_hub.constants import HF_HOME

    assert cache.cache_path(CPU).parent == tmp_path / "speeds"
    monkeypatch.delenv("KSPARSE_CACHE")
    assert str(cache.cache_path(CPU).parent) == os.path.join(HF_HOME, "ksparse")


def test_other_gpus_and_versions_have_other_files(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X100 / 40 GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    paths = [cache.cache_path(CPU), cache.cache_path(torch.device("cuda:0"))]
    assert paths[1].name.startswith("NVIDIA-X100-40-GB-9-0-")
    assert cache.cache_path(torch.device("cuda:1")) == paths[1]  # the same kind of GPU
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 1))
    paths.append(cache.cache_path(torch.device("cuda:0")))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X100 / 80 GB")
    paths.append(cache.cache_path(torch.device("cuda:0")))
    monkeypatch.setattr(torch.version, "cuda", "99.9")
    paths.append(cache.cache_path(torch.device("cuda:0")))
    versions = cache.library_versions("torch", "triton")
    for name in versions:
        if name != "python":
            other = {**versions, name: "0.0"}
            monkeypatch.setattr(cache, "library_versions", lambda *names, other=other: dict(other))
            paths.append(cache.cache_path(torch.device("cuda:0")))
    assert len(set(paths)) == len(paths)


def written(change=lambda data: data):
    """A file's text, with something changed."""
    path = cache.cache_path(CPU)
    cache.write_timings(CPU, known("a"))
    return json.dumps(change(json.loads(path.read_text()))).encode()


def with_row(row):
    return lambda data: {**data, "timings": {"a": {"gemv": row}}}


DAMAGES = {
    "empty": lambda: b"",
    "truncated": lambda: written()[:-20],
    "binary": lambda: bytes(range(256)),
    "a list": lambda: b"[]",
    "nested": lambda: b"[" * 200_000,
    "no timings": lambda: written(lambda data: {"gpu": data["gpu"], "versions": data["versions"]}),
    "timings: null": lambda: written(lambda data: {**data, "timings": None}),
    "kernels: a list": lambda: written(lambda data: {**data, "timings": {"a": ["gemv"]}}),
    "a row: a number": lambda: written(with_row(12.5)),
    "no time": lambda: written(with_row({"config": {}})),
    "time: null": lambda: written(with_row({"config": {}, "us": None})),
    "config: text": lambda: written(with_row({"config": "warps=4", "us": 1.0})),
    "another GPU": lambda: written(lambda data: {**data, "gpu": "another"}),
    "another version": lambda: written(lambda data: {**data, "versions": {**data["versions"], "torch": "0.1"}}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_ignored_with_a_warning_and_written_anew(damage, caplog):
    content, path = DAMAGES[damage](), cache.cache_path(CPU)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert cache.read_timings(CPU) == {}
    assert f"The measured speeds in {path} cannot be used and will be measured again" in caplog.text
    cache.write_timings(CPU, known("b"))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert cache.read_timings(CPU) == known("b")
    assert caplog.text == ""


def test_kernels_and_configurations_that_are_not_offered_are_ignored(clock):
    problem = make_problem(1)
    config = kernels.KERNELS["gemv"].configs(problem)[1]
    cache.write_timings(
        CPU,
        {
            str(problem): {
                "gemv": {"config": config, "us": 20.0},
                "dot": {"config": {"rows": 7}, "us": 1.0},
                "decompress": {"config": {}, "us": 1.0},
                "dense": {"config": {"warps": 4}, "us": 1.0},
                "magic": {"config": {}, "us": 0.1},
            }
        },
    )
    assert kernels.measured(problem) == {"gemv": (kernels.Candidate("gemv", config), 20.0)}
    assert kernels.choose(make_weight(), 1) == kernels.Candidate("gemv", config)


def deny(*arguments, **options):
    raise PermissionError(errno.EACCES, "Permission denied")


def fill(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("how", ["a file in its place", "permission denied", "disk full", "not replaced", "no lock"])
def test_a_folder_that_cannot_be_written_warns_and_goes_on(clock, monkeypatch, tmp_path, caplog, how):
    # Changed by mode, a folder is still writable for root, as whom tests may run.
    if how == "a file in its place":
        (tmp_path / "speeds").write_text("")
    elif how == "permission denied":
        monkeypatch.setattr(tempfile, "mkstemp", deny)
    elif how == "disk full":
        monkeypatch.setattr(cache, "open", fill, raising=False)
    elif how == "not replaced":
        monkeypatch.setattr(os, "replace", deny)
    else:
        import filelock

        monkeypatch.setattr(filelock, "FileLock", deny)
    clock.times = {"dot": 1.0}
    with caplog.at_level(logging.WARNING):
        kernels.measure(make_problem(1))
    assert f"Measured speeds of kernels cannot be kept in {tmp_path / 'speeds'}" in caplog.text
    assert set(kernels.measured(make_problem(1))) == {"dot"}  # for as long as the process lives
    if (tmp_path / "speeds").is_dir():
        assert not [path for path in (tmp_path / "speeds").iterdir() if path.suffix != ".lock"]  # nothing half done


@pytest.mark.processes
def test_processes_that_write_at_once_or_are_killed_lose_nothing(caplog):
    cache.write_timings(CPU, known("before"))
    script = """
import filelock, json, multiprocessing, os, signal, torch
from optimum_ksparse.kernels import cache

CPU = torch.device("cpu")
fork = multiprocessing.get_context("fork").Process

def write(number):
    for i in range(25):
        cache.write_timings(CPU, {f"{number}-{i}": {"gemv": {"config": {}, "us": 1.0}}})

def half(file, mode):
    with open(file, mode, buffering=0) as stream:
        stream.write(b'{"gpu": "')
        os.kill(os.getpid(), signal.SIGKILL)

def write_half():
    cache.open = half
    cache.write_timings(CPU, {"killed": {}})

for _ in range(2):  # the second one finds the lock of the first
    killed = fork(target=write_half)
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
writers = [fork(target=write, args=(number,)) for number in range(4)]
for writer in writers:
    writer.start()
while any(writer.is_alive() for writer in writers):
    json.loads(cache.cache_path(CPU).read_text())["timings"]
assert all(writer.exitcode == 0 for writer in writers)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    with caplog.at_level(logging.WARNING):
        found = set(cache.read_timings(CPU))
    assert found == {"before"} | {f"{number}-{i}" for number in range(4) for i in range(25)}
    assert caplog.text == ""


# What is timed, and on what.


def test_a_cpu_is_timed_on_more_copies_than_its_caches_hold(monkeypatch, tmp_path):
    timing = sys.modules[kernels.time_calls.__module__]
    for name, size in (("index0", "32K"), ("index3", "8M")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "size").write_text(f"{size}\n")
    for folder, cache_bytes in ((tmp_path, 8 << 20), (tmp_path / "none", 64 << 20)):
        monkeypatch.setattr(timing, "_CACHES", folder)
        timing._last_level_cache.cache_clear()
        assert timing.rotations(1 << 20, CPU) << 20 > 2 * cache_bytes
    timing._last_level_cache.cache_clear()
    assert timing.rotations(1 << 40, CPU) == 2 and timing.rotations(0, CPU) < 1000


def test_calls_are_timed_in_turn():
    called = []
    assert kernels.time_calls([lambda i=i: called.append(i) for i in range(3)], CPU, repeats=3) > 0
    assert called == [i % 3 for i in range(len(called))] and len(called) > 9


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "3:10", "50%", "25%", "50%/16x8"])
@pytest.mark.parametrize(("rows", "values"), [(512, None), (64, None), (512, "int8"), (64, "int4")])
def test_random_weights_have_the_pattern_and_the_bytes(pattern, rows, values):
    problem = replace(make_problem(1, rows, 40, pattern), value_type=values)
    first, second = kernels.sample_weights(problem, 2)
    scale = 0 if first.scale is None else first.scale.nbytes
    assert problem.packed_bytes == first.values.nbytes + first.bits.nbytes + scale and problem == first.problem(1)
    assert first.values.data_ptr() != second.values.data_ptr()
    Pattern(pattern).verify(first.dense())
    assert torch.equal(first.dense(), second.dense())


def test_products_of_a_cpu_are_timed_as_layers_compute_them():
    for pattern in ("2:4", "50%"):
        problem = make_problem(2, pattern=pattern)
        assert set(kernels.time_kernels(problem)) == {NATIVE}
        assert kernels.time_dense(problem) > 0
