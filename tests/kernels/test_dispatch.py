"""Which kernel computes a product, on a simulated GPU: the CPU with made-up speeds; and the file that keeps them."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import tempfile

import pytest
import torch

from optimum_ksparse import kernels
from optimum_ksparse.kernels import cache, dispatch, hardware

from ..conftest import REPOSITORY

CPU = torch.device("cpu")
ALLOWED = "auto, gemv, dot, decompress, library, strips, dense, reference"


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """An empty cache, and no choice in the environment."""
    monkeypatch.setenv("KSPARSE_CACHE", str(tmp_path / "speeds"))
    for name in ("KSPARSE_KERNEL", "KSPARSE_AUTOTUNE", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    kernels.forget()
    yield
    kernels.forget()


@pytest.fixture
def gpu(monkeypatch):
    """The CPU counts as a GPU that has kernels; none is run."""
    monkeypatch.setattr(hardware, "runs_kernels", lambda device: True)
    monkeypatch.setattr(hardware, "why_no_kernels", lambda device: None)


class Clock:
    """Stands for `time_calls`: times by kernel, or by a candidate as it is printed; what has none fails."""

    def __init__(self):
        self.times = {}
        self.asked = []

    def __call__(self, calls, device):
        candidate, (x, weight, bias) = calls[0].func.__self__, calls[0].args
        assert x.shape == (self.tokens, weight.in_features) and bias is None
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


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8), (9, 16), (2049, 4096), (4096, 4096), (4097, 4096), (10**6, 4096)],
)
def test_bucket(tokens, expected):
    assert kernels.bucket(tokens) == expected


def test_every_number_of_tokens_falls_into_the_next_bucket():
    assert {kernels.bucket(tokens) for tokens in range(1, 5000)} == set(kernels.BUCKETS)
    for tokens in range(1, 4097):
        assert tokens <= kernels.bucket(tokens) < 2 * tokens


# Forced kernels.


@pytest.mark.parametrize(
    ("name", "tokens"), [("gemv", 4), ("dot", 5), ("decompress", 5), ("reference", 5), ("dense", 5)]
)
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_forced_kernel_is_taken(gpu, monkeypatch, name, tokens, by):
    weight = make_weight().with_form("dense")
    if by == "environment":
        monkeypatch.setenv("KSPARSE_KERNEL", name)
    # The environment wins over what the layer says.
    candidate = kernels.choose(weight, tokens, name if by == "argument" else "reference")
    assert candidate == first(name, weight.problem(tokens))


def test_an_empty_variable_forces_nothing(gpu, monkeypatch):
    monkeypatch.setenv("KSPARSE_KERNEL", "")
    monkeypatch.setenv("KSPARSE_AUTOTUNE", "0")
    assert kernels.choose(make_weight(), 1, "dot").kernel == "dot"
    assert kernels.choose(make_weight(), 1).kernel == "gemv"


def test_the_variable_may_say_auto(clock, monkeypatch):
    clock.times = {"dot": 1.0}
    monkeypatch.setenv("KSPARSE_KERNEL", "auto")
    assert kernels.choose(make_weight(), 1, "reference").kernel == "dot"


@pytest.mark.parametrize("name", ["fast", "GEMV", " gemv", "None"])
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_unknown_kernels_are_refused_with_those_that_are_known(gpu, monkeypatch, name, by):
    if by == "environment":
        monkeypatch.setenv("KSPARSE_KERNEL", name)
    with pytest.raises(ValueError) as caught:
        kernels.choose(make_weight(), 1, name if by == "argument" else "auto")
    assert str(caught.value) == f"kernel={name!r} is not known; allowed: {ALLOWED}"


REFUSALS = [
    ("gemv", 5, {}, "gemv takes at most 4 tokens, not 5"),
    ("dot", 5, {"in_features": 20}, "dot needs in_features that 8 divides, not 20"),
    ("gemv", 1, {"dtype": torch.float32}, "the kernels take bfloat16 and float16, not torch.float32"),
    ("dot", 5, {"dtype": torch.float32}, "the kernels take bfloat16 and float16, not torch.float32"),
    ("decompress", 5, {"dtype": torch.float32}, "the kernels take bfloat16 and float16, not torch.float32"),
    ("decompress", 5, {"pattern": "50%"}, "there are kernels for 2:4 and 4:8, not for 50%"),
    ("gemv", 1, {"pattern": "1:4"}, "there are kernels for 2:4 and 4:8, not for 1:4"),
    ("dense", 5, {}, "the layer keeps no dense form; load with optimize_for='speed'"),
    ("library", 5, {}, "torch's semi-structured tensors need a CUDA device"),
]


@pytest.mark.parametrize(("name", "tokens", "changes", "reason"), REFUSALS)
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_kernel_that_cannot_take_a_product_says_why(gpu, monkeypatch, name, tokens, changes, reason, by):
    pattern = changes.get("pattern", "2:4")
    weight = make_weight(**{**changes, "pattern": "2:4"})._replace(pattern=pattern)
    if by == "environment":
        monkeypatch.setenv("KSPARSE_KERNEL", name)
    with pytest.raises(ValueError) as caught:
        kernels.choose(weight, tokens, name if by == "argument" else "auto")
    assert str(caught.value) == f"kernel={name!r} cannot compute {weight.problem(tokens)}: {reason}"


def test_a_library_form_that_the_layer_does_not_keep(gpu, monkeypatch):
    monkeypatch.setattr(kernels.candidates, "_why_not_library", lambda problem: None)
    takes = kernels.candidates.Kernel(lambda problem: None, kernels.candidates._no_config, lambda *arguments: None)
    monkeypatch.setitem(kernels.KERNELS, "library", takes)
    with pytest.raises(ValueError, match="the layer keeps no library form; load with optimize_for='speed'"):
        kernels.choose(make_weight(), 64, "library")
    kept = make_weight()._replace(library=torch.empty(0))
    assert kernels.choose(kept, 64, "library") == kernels.Candidate("library")


def test_where_there_is_no_gpu_kernels_run_in_the_interpreter_or_not_at_all(monkeypatch):
    weight = make_weight()
    for name in ("gemv", "dot", "decompress"):
        with pytest.raises(ValueError, match="the kernels need an NVIDIA GPU, and the layer is on cpu"):
            kernels.choose(weight, 2, name)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if hardware.is_interpreted():  # Triton is there
        assert kernels.choose(weight, 2, "gemv").kernel == "gemv"
    # Only what is forced runs there.
    assert kernels.choose(weight, 2) == kernels.Candidate("reference")


def test_the_operator_refuses_what_a_forced_kernel_cannot_take(gpu):
    weight = make_weight()
    with pytest.raises(ValueError, match="gemv takes at most 4 tokens, not 5"):
        x = torch.randn(5, 32, dtype=torch.bfloat16)
        kernels.linear(x, weight.values, weight.bits, None, 32, "2:4", "gemv")


# What is chosen where nothing is forced.


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (make_problem(1), "gemv"),
        (make_problem(2), "gemv"),
        (make_problem(4), "dot"),
        (make_problem(64), "dot"),
        (make_problem(128), "decompress"),
        (make_problem(4096), "decompress"),
        (make_problem(1, in_features=20), "gemv"),
        (make_problem(4, in_features=20), "decompress"),
        (make_problem(2, pattern="4:8"), "gemv"),
    ],
    ids=str,
)
def test_rule_of_thumb(gpu, monkeypatch, problem, expected):
    assert kernels.rule_of_thumb(problem) == first(expected, problem)
    monkeypatch.setenv("KSPARSE_AUTOTUNE", "0")
    weight = kernels.sample_weights(problem, 1)[0]
    assert kernels.choose(weight, problem.tokens) == first(expected, problem)


def test_without_autotuning_nothing_is_measured_nor_settled(clock, monkeypatch):
    clock.times = {"dot": 1.0}
    weight = make_weight()
    monkeypatch.setenv("KSPARSE_AUTOTUNE", "0")
    assert kernels.choose(weight, 1).kernel == "gemv"
    assert clock.asked == []
    monkeypatch.delenv("KSPARSE_AUTOTUNE")
    assert kernels.choose(weight, 1).kernel == "dot"
    monkeypatch.setenv("KSPARSE_AUTOTUNE", "0")
    assert kernels.choose(weight, 1).kernel == "dot"  # known by now


@pytest.mark.parametrize("changes", [{"pattern": "50%"}, {"dtype": torch.float32}])
def test_what_kernels_do_not_take_is_computed_in_pytorch(clock, changes):
    pattern = changes.get("pattern", "2:4")
    weight = make_weight(**{**changes, "pattern": "2:4"})._replace(pattern=pattern)
    assert kernels.choose(weight, 1) == kernels.Candidate("reference")
    assert kernels.choose(weight._replace(dense=torch.empty(0)), 1) == kernels.Candidate("dense")
    assert clock.asked == []


@pytest.mark.parametrize("fastest", ["gemv", "dot", "decompress"])
def test_the_fastest_kernel_is_taken(clock, fastest):
    clock.times = {"gemv": 30.0, "dot": 30.0, "decompress": 30.0, "dense": 40.0, fastest: 10.0}
    weight = make_weight()
    assert kernels.choose(weight, 1) == first(fastest, make_problem(1))
    asked = len(clock.asked)
    assert kernels.choose(weight, 1).kernel == fastest
    assert len(clock.asked) == asked  # measured once


def test_all_configurations_are_measured_and_the_fastest_of_each_kernel_is_known(clock):
    problem = make_problem(1)
    configs = {name: kernels.KERNELS[name].configs(problem) for name in ("gemv", "dot", "decompress", "dense")}
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


def test_candidates_that_fail_are_left_out(clock):
    problem = make_problem(1)
    runs = kernels.Candidate("dot", kernels.KERNELS["dot"].configs(problem)[2])
    clock.times = {str(runs): 10.0}
    assert kernels.measure(problem) == {"dot": (runs, 10.0)}
    assert kernels.choose(make_weight(), 1) == runs


def test_where_everything_fails_the_rule_of_thumb_stays(clock, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert kernels.choose(make_weight(), 1) == first("gemv", make_problem(1))
    assert "No kernel could be measured" in caplog.text
    assert not list(tmp_path.glob("speeds/*.json"))


def test_a_form_that_cannot_be_made_is_left_out(clock, monkeypatch):
    def fail(self, name):
        raise torch.OutOfMemoryError("there is no memory left")

    monkeypatch.setattr(kernels.PackedWeight, "with_form", fail)
    clock.times = {"gemv": 10.0, "dense": 5.0}
    assert set(kernels.measure(make_problem(1))) == {"gemv"}


def test_only_what_the_layer_keeps_is_taken(clock):
    clock.times = {"gemv": 30.0, "dot": 50.0, "dense": 10.0}
    weight = make_weight()
    assert kernels.choose(weight, 1).kernel == "gemv"
    assert kernels.choose(weight.with_form("dense"), 1).kernel == "dense"
    assert kernels.choose(weight, 1).kernel == "gemv"
    assert len([name for name in clock.asked if name == "dense"]) == 1


def test_a_kept_form_must_be_the_fastest_too(clock):
    clock.times = {"gemv": 30.0, "dense": 31.0}
    assert kernels.choose(make_weight().with_form("dense"), 1).kernel == "gemv"


def test_each_bucket_is_measured_by_itself(clock):
    weight = make_weight()
    for tokens, times, expected in [(1, {"gemv": 1.0, "dot": 2.0}, "gemv"), (16, {"dot": 2.0}, "dot")]:
        clock.times, clock.tokens = times, tokens
        assert kernels.choose(weight, tokens).kernel == expected
    assert kernels.choose(weight, 9).kernel == "dot"  # what 16 tokens take
    assert set(kernels.measured(make_problem(16))) == {"dot"}


def test_measuring_again_changes_the_choice(clock):
    weight = make_weight()
    for name in ("gemv", "dot"):
        clock.times = {name: 1.0}
        kernels.measure(make_problem(1))
        assert kernels.choose(weight, 1).kernel == name


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_measuring_leaves_the_mode_alone(clock, mode):
    clock.times = {"gemv": 1.0}
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        kernels.measure(make_problem(1))
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before


def test_measuring_draws_no_random_numbers(clock):
    """What a model samples must not depend on whether its speeds were known."""
    clock.times = {"gemv": 1.0}
    before = torch.random.get_rng_state()
    kernels.measure(make_problem(1))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_problem_of_which_only_unusable_speeds_are_known_is_measured(clock):
    clock.times = {"dot": 10.0}
    cache.write_timings(CPU, {str(make_problem(1)): {"gemv": {"config": {"warps": 99}, "us": 1.0}}})
    assert kernels.choose(make_weight(), 1).kernel == "dot"


def test_speeds_on_disk_are_taken_by_the_next_process(clock):
    clock.times = {"gemv": 30.0, "dot": 10.0}
    kernels.choose(make_weight(), 1)
    kernels.forget()
    clock.times, clock.asked = {}, []
    assert kernels.choose(make_weight(), 1).kernel == "dot"
    assert clock.asked == []


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
    "cut to one byte": lambda: written()[:1],
    "not JSON": lambda: b"timings: none",
    "two documents": lambda: written() * 2,
    "binary": lambda: bytes(range(256)),
    "zeros": lambda: bytes(512),
    "UTF-16": lambda: written().decode().encode("utf-16"),
    "null": lambda: b"null",
    "a number": lambda: b"5",
    "a list": lambda: b"[]",
    "an object": lambda: b"{}",
    "nested": lambda: b"[" * 200_000,
    "no timings": lambda: written(lambda data: {"gpu": data["gpu"], "versions": data["versions"]}),
    "timings: a list": lambda: written(lambda data: {**data, "timings": ["a"]}),
    "timings: text": lambda: written(lambda data: {**data, "timings": "a"}),
    "timings: null": lambda: written(lambda data: {**data, "timings": None}),
    "kernels: a list": lambda: written(lambda data: {**data, "timings": {"a": ["gemv"]}}),
    "a row: a number": lambda: written(with_row(12.5)),
    "a row: empty": lambda: written(with_row({})),
    "no time": lambda: written(with_row({"config": {}})),
    "time: text": lambda: written(with_row({"config": {}, "us": "fast"})),
    "time: null": lambda: written(with_row({"config": {}, "us": None})),
    "time: a list": lambda: written(with_row({"config": {}, "us": [1.0]})),
    "no config": lambda: written(with_row({"us": 1.0})),
    "config: a number": lambda: written(with_row({"config": 4, "us": 1.0})),
    "config: text": lambda: written(with_row({"config": "warps=4", "us": 1.0})),
    "another GPU": lambda: written(lambda data: {**data, "gpu": "another"}),
    "no GPU": lambda: written(lambda data: {"versions": data["versions"], "timings": data["timings"]}),
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


def test_a_damaged_file_does_not_keep_a_model_from_running(clock):
    clock.times = {"dot": 1.0}
    path = cache.cache_path(CPU)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x00{")
    assert kernels.choose(make_weight(), 1).kernel == "dot"
    assert list(cache.read_timings(CPU)) == [str(make_problem(1))]


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
    assert kernels.choose(make_weight().with_form("dense"), 1) == kernels.Candidate("gemv", config)


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
        monkeypatch.setattr(json, "dump", fill)
    elif how == "not replaced":
        monkeypatch.setattr(os, "replace", deny)
    else:
        import filelock

        monkeypatch.setattr(filelock, "FileLock", deny)
    clock.times = {"dot": 1.0}
    with caplog.at_level(logging.WARNING):
        assert kernels.choose(make_weight(), 1).kernel == "dot"
    assert f"Measured speeds of kernels cannot be kept in {tmp_path / 'speeds'}" in caplog.text
    assert set(kernels.measured(make_problem(1))) == {"dot"}  # for as long as the process lives
    if (tmp_path / "speeds").is_dir():
        assert not [path for path in (tmp_path / "speeds").iterdir() if path.suffix != ".lock"]  # nothing half done


def run_script(script):
    """In another process, whose imports its children share."""
    head = "import json, multiprocessing, os, signal, sys, torch\nfrom optimum_ksparse.kernels import cache\n"
    head += "import filelock\nCPU = torch.device('cpu')\nfork = multiprocessing.get_context('fork').Process\n"
    head += "ROW = {'gemv': {'config': {}, 'us': 1.0}}\n"
    done = subprocess.run([sys.executable, "-c", head + script], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_processes_that_write_at_once_lose_nothing():
    script = """
def write(number):
    for i in range(25):
        cache.write_timings(CPU, {f"{number}-{i}": ROW})

writers = [fork(target=write, args=(number,)) for number in range(4)]
for writer in writers:
    writer.start()
path, reads = cache.cache_path(CPU), 0
while any(writer.is_alive() for writer in writers):
    if path.exists():
        json.loads(path.read_text())["timings"]
        reads += 1
assert all(writer.exitcode == 0 for writer in writers)
print(reads)
"""
    assert int(run_script(script)) > 0
    assert set(cache.read_timings(CPU)) == {f"{number}-{i}" for number in range(4) for i in range(25)}
    assert not list(cache.cache_path(CPU).parent.glob("*.tmp"))


def test_a_process_killed_while_it_writes_leaves_a_readable_file(caplog):
    cache.write_timings(CPU, known("before"))
    script = """
def half(data, stream, **options):
    text = json.dumps(data)
    stream.write(text[: len(text) // 2])
    stream.flush()
    os.kill(os.getpid(), signal.SIGKILL)

def write():
    json.dump = half
    cache.write_timings(CPU, {"killed": ROW})

for _ in range(2):  # the second one finds the lock of the first
    writer = fork(target=write)
    writer.start()
    writer.join(20)
    print(writer.exitcode)
"""
    assert run_script(script).split() == ["-9", "-9"]
    with caplog.at_level(logging.WARNING):
        assert cache.read_timings(CPU) == known("before")
        cache.write_timings(CPU, known("after"))
        assert cache.read_timings(CPU) == known("before", "after")
    assert caplog.text == ""


def test_another_thread_may_choose_while_choices_are_forgotten(gpu, monkeypatch):
    problem = make_problem()

    class Meanwhile:
        """A problem that is compared at the moment at which another thread adds its choice."""

        def __eq__(self, other):
            dispatch._choices[make_problem(tokens=len(dispatch._choices) + 1), False, False] = kernels.Candidate(
                "gemv"
            )
            return other is problem

        __hash__ = object.__hash__

    monkeypatch.setattr(dispatch, "_choices", {(Meanwhile(), False, False): kernels.Candidate("gemv")})
    dispatch._forget_choices(problem)
    assert all(isinstance(key[0], kernels.Problem) for key in dispatch._choices), "it is forgotten"
