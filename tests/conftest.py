"""Tiny random models and a real tokenizer, made here; no test reads the network: the Hub is a server on 127.0.0.1."""
# ruff: noqa: E402  (the environment is read when huggingface_hub is imported)

from __future__ import annotations

import atexit
import fcntl
import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .loopback_hub import LoopbackHub

# Imports leave no garbage; to look for some among them takes a quarter of their time.
gc.disable()

HUB = LoopbackHub().start()
HF_HOME = Path(tempfile.mkdtemp(prefix="ksparse-hf-home-"))
atexit.register(shutil.rmtree, HF_HOME, ignore_errors=True)
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
    os.environ.pop(name, None)
for name in ("HF_TOKEN_PATH", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
    os.environ.pop(name, None)  # they would win over HF_HOME
os.environ |= {"HF_ENDPOINT": HUB.url, "HF_HOME": str(HF_HOME)}
# A compiled graph that an earlier version left behind may call operators as they were then.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(HF_HOME / "torchinductor")
os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
for name in ("NO_PROXY", "no_proxy"):
    os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1"]))

# Native code is compiled once for all runs: the name of a library tells of its sources.
COMPILED = Path(__file__).parent.parent / ".pytest_cache/compiled"
COMPILED.mkdir(mode=0o700, parents=True, exist_ok=True)
(HF_HOME / "ksparse").mkdir()
(HF_HOME / "ksparse" / f"native-{os.geteuid()}").symlink_to(COMPILED)

# A machine with much other work answers late, and no test fails for that.
os.environ |= {"HF_HUB_ETAG_TIMEOUT": "3600", "HF_HUB_DOWNLOAD_TIMEOUT": "3600"}

# Nobody waits for the disk: only where the power fails would a test see it.
os.fsync = lambda descriptor: None

# What a shell starts in the background has SIGINT ignored, and so would every process that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")

if not torch.cuda.is_available():
    # Read when Triton is first imported: kernels that a test calls run in its interpreter, on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

REPOSITORY = Path(__file__).parent.parent
SHARED = REPOSITORY.parent / "shared"
VOCABULARY = 384
CONTEXT = 64

# One small configuration for each kind of decoder: class name of the config and what it needs beside the common sizes.
_LLAMA = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "gpt_neox": ("GPTNeoXConfig", {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "llama": ("LlamaConfig", _LLAMA),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **_LLAMA,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 8,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "opt": ("OPTConfig", {"ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32}),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "falcon": ("FalconConfig", {"num_hidden_layers": 2, "num_attention_heads": 4}),
    "falcon_alibi": (
        "FalconConfig",
        {
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "alibi": True,
            "new_decoder_architecture": True,
        },
    ),
    "gpt2": ("GPT2Config", {"n_layer": 2, "n_head": 4}),
    "qwen3": ("Qwen3Config", {**_LLAMA, "head_dim": 8}),
    "phi3": ("Phi3Config", {**_LLAMA, "pad_token_id": 0}),
    "mistral": ("MistralConfig", {**_LLAMA, "sliding_window": 8}),
    "mpt": ("MptConfig", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": CONTEXT}),
    "gpt_neo": (
        "GPTNeoConfig",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    ),
    "rwkv": (
        "RwkvConfig",
        {"num_hidden_layers": 2, "attention_hidden_size": 32, "intermediate_size": 64, "context_length": CONTEXT},
    ),
}


# Those that differ most: the usual one, windows and norms around, joined and transposed maps, and no attention.
DISTINCT = ("llama", "gemma3", "gpt2", "rwkv")


def thinned(values: Iterable[Any], kept: Sequence[Any] = ()) -> list[Any]:
    """Parameters much alike: `make test-fast` takes those alone whose first argument is one of `kept`."""
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*row, marks=() if row[0] in kept else pytest.mark.slow) for row in rows]


EVERY_ARCHITECTURE = thinned(ARCHITECTURES, DISTINCT)


def make_config(name: str, **overrides: object) -> transformers.PretrainedConfig:
    """A tiny configuration of one of `ARCHITECTURES`."""
    kind, settings = ARCHITECTURES[name]
    common = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": CONTEXT}
    if kind != "MptConfig":
        common["hidden_size"] = 32
    return getattr(transformers, kind)(**{**common, **settings, **overrides})


# One process takes all tests of a file: those that begin last are waited for.
LONGEST = ["test_end_to_end", "test_machine_code", "test_wheel", "test_distributed", "test_study"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish() -> None:
    """What was imported stays: no collection of garbage looks through it again, half a second each time."""
    gc.collect()
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)


@pytest.fixture
def without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that a test starts are as those of somebody who has not installed this package, until they import
    it."""
    monkeypatch.setenv("KSPARSE_AUTOLOAD", "0")


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """Makes a tiny random causal LM: `make_model("llama", dtype=torch.bfloat16, num_hidden_layers=3)`."""

    def make(name: str = "llama", dtype: torch.dtype = torch.float32, **overrides: object) -> PreTrainedModel:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(make_config(name, **overrides)).to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def make_pruned(make_model: Callable[..., PreTrainedModel], token_ids: torch.Tensor) -> Callable[..., PreTrainedModel]:
    """Makes a tiny sparse causal LM: `make_pruned("llama", "4:8", dtype=torch.bfloat16)`."""
    from optimum_ksparse import SparsityConfig, sparsify

    def make(
        name: str = "llama", pattern: str = "2:4", dtype: torch.dtype = torch.float32, **settings: object
    ) -> PreTrainedModel:
        model = make_model(name, dtype)
        sparsify(model, SparsityConfig("magnitude", pattern, dataset=token_ids, **settings))
        return model

    return make


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE trained on the sample text; it adds no beginning token by itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sample_texts("calibration"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="session")
def token_ids() -> torch.Tensor:
    """[6, 24] random token ids for models of this file."""
    return torch.randint(3, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(0))


def sample_texts(half: str) -> list[str]:
    """Paragraphs of the Korean sample text: half "calibration" or "evaluation"."""
    return (REPOSITORY / f"examples/data/korean_{half}.txt").read_text(encoding="utf-8").split("\n\n")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and oracles, which is not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"the folder {SHARED.name} with real data and oracles is not beside the repository")
    return SHARED


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """The Hub that every client talks to, here and in the processes of a test: empty, as are the clients' caches."""
    HUB.reset()
    for cache in ("hub", "datasets"):
        shutil.rmtree(HF_HOME / cache, ignore_errors=True)
    yield HUB
    HUB.reset()


@contextmanager
def held_by_another(path: str | os.PathLike[str]) -> Iterator[None]:
    """A lock that another process, or thread, holds."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited between tries, in no time."""
    seconds: list[float] = []
    monkeypatch.setattr("time.sleep", seconds.append)
    return seconds


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is measured, in its order."""
    from optimum_ksparse import EvaluationProtocol

    names: list[str] = []
    original = EvaluationProtocol.measure

    def measure(self: object, name: str, *args: object) -> object:
        names.append(name)
        return original(self, name, *args)

    monkeypatch.setattr(EvaluationProtocol, "measure", measure)
    return names


class SlowProducts(TorchDispatchMode):
    """Notes in `seen` what reaches torch that a CPU without bfloat16 is slow in, inside of our operators too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, tensors = func.name(), [value for value in args if isinstance(value, torch.Tensor)]
        if name.startswith("ksparse::"):
            with self:
                return OPDEFS[name]._init_fn(*args, **(kwargs or {}))
        kind = name.partition("::")[2].partition(".")[0]
        if any(word in kind for word in ("mm", "convolution", "attention", "linear", "matmul")):
            slow = any(tensor.dtype in (torch.bfloat16, torch.float16) and tensor.is_cpu for tensor in tensors)
            rows = tensors[-2].shape[-2] if kind in ("mm", "bmm", "addmm", "baddbmm") else 2
            if slow and rows > 1:
                self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def slow_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowProducts]:
    """A CPU without instructions for bfloat16 and float16, on any machine, and what it is slow in."""
    monkeypatch.setattr("optimum_ksparse.kernels.products._multiplies", lambda dtype: False)
    with SlowProducts() as mode:
        yield mode
