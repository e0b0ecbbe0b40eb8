"""The examples of README and of the pages of docs/, each in their order, run here with tiny models and few texts on
the loopback Hub in place of the named ones. What is not run is in `NOT_RUN`, with the reason; a command in it is
parsed all the same."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer

import optimum_ksparse
from optimum_ksparse.__main__ import main
from optimum_ksparse.__main__ import parse as parse_words
from optimum_ksparse.data import CalibrationData

from ..conftest import CONTEXT, REPOSITORY, sample_texts

torch.set_num_threads(1)

# Beginning of a statement or command → why it is not run.
NOT_RUN = {
    "make ": "sets up an environment, from a package index",
    "pip install ": "needs a package index",
    "torchrun ": "holds an ellipsis; test_distributed runs several processes",
    "vllm ": "needs vLLM; tests/serving runs it",
    "optimum-cli ksparse bench ": "multiplies layers of full size; test_bench runs it on small ones",
    "optimum-cli ksparse finetune ": "needs KorQuAD, KoAlpaca or a real model; tests/study trains",
    "optimum-cli ksparse convert RedHatAI/": "is not on the Hub of the tests; test_convert converts such models",
    "optimum-cli ksparse merge ": "needs the adapter of the fine-tuning; test_commands merges",
    "optimum-cli ksparse eval koalpaca-2of4 ": "needs NSMC; test_nsmc measures it",
    "optimum-cli ksparse study recipe.yaml": "takes minutes; test_study runs one (its --dry-run runs here)",
    "evaluate_kobest(": "needs KoBEST; test_kobest measures it",
    "evaluate_model(": "needs KoBEST; test_measure measures with it",
}
PAGES = [
    f"docs/{name}.md"
    for name in (
        *("index", "quickstart", "prune", "settings", "large", "formats", "speed", "evaluate", "finetune", "publish"),
        *("study", "results", "limits", "design", "algorithms", "compatibility"),
    )
]
UPSTREAM = ["docs/upstream.md"]  # code for other projects
LANGUAGES = ("python", "bash")
RUN = ("optimum-cli ksparse study recipe.yaml --dry-run",)
# What is smaller here than there, and where no GPU and no KoBEST is.
IN_PLACE = {
    "SparsityConfig(": f"SparsityConfig(num_samples=8, seq_len={CONTEXT}, ",
    "dataset='kowiki')": f"dataset=CalibrationData('kowiki', num_samples=8, seq_len={CONTEXT}))",
    "seq_len=2048": f"seq_len={CONTEXT}",
    "device_map='cuda'": "device_map='cpu'",
    "drop_layers(dense, 4)": f"drop_layers(dense, 1, num_samples=8, seq_len={CONTEXT})",
    "evaluate=True": f"evaluate=EvaluationProtocol(texts='held_out.txt', seq_len={CONTEXT}, tasks=())",
}
FLAGS = {
    "prune": ["--overwrite", "--num-samples", "8", "--seq-len", str(CONTEXT)],
    "eval": ["--texts", "held_out.txt", "--seq-len", str(CONTEXT), "--tasks", "none"],
}


def blocks(name: str) -> list[tuple[str, str]]:
    """Language and text of every fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", (REPOSITORY / name).read_text(encoding="utf-8"), re.M | re.S)


def steps(language: str, text: str) -> list[str]:
    """Statements, or commands, without their comments."""
    if language == "python":
        return [ast.unparse(statement) for statement in ast.parse(text).body]
    return [line.split("  #")[0].strip() for line in text.splitlines()]


def skipped(step: str) -> bool:
    return step not in RUN and any(step.startswith(beginning) for beginning in NOT_RUN)


@pytest.fixture
def hub(hub: Any, make_model: Any, tokenizer: Any, tmp_path: Path) -> Any:
    """Holds what README and docs name."""
    for size in ("5.8b", "12.8b"):
        make_model("gpt_neox").save_pretrained(tmp_path / size)
        tokenizer.save_pretrained(tmp_path / size)
        files = {file.name: file.read_bytes() for file in (tmp_path / size).iterdir()}
        hub.add_repo(f"EleutherAI/polyglot-ko-{size}", files)
    rows = [{"id": str(number), "text": text} for number, text in enumerate(sample_texts("calibration") * 4, 1)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for name, part in (("allenai/c4", "ko"), ("wikimedia/wikipedia", "20231101.ko")):
        configs = [{"config_name": part, "data_files": [{"split": "train", "path": f"{part}/*"}]}]
        card = f"---\n{yaml.safe_dump({'configs': configs})}---\n".encode()
        hub.add_repo(name, {"README.md": card, f"{part}/train.jsonl": lines}, "dataset")
    return hub


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new working directory with the recipes, of which that in docs/study.md is one."""
    folder = tmp_path / "workplace"
    folder.mkdir()
    shutil.copytree(REPOSITORY / "configs", folder / "configs")
    (recipe,) = [text for language, text in blocks("docs/study.md") if language == "yaml"]
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "held_out.txt").write_text("\n\n".join(sample_texts("evaluation")[:4]), encoding="utf-8")
    monkeypatch.chdir(folder)
    return folder


def run(language: str, step: str, names: dict[str, Any]) -> None:
    if language == "python":
        for found, placed in IN_PLACE.items():
            step = step.replace(found, placed)
        exec(step, names)
    elif step.startswith("optimum-cli ksparse "):
        words = shlex.split(step)[2:]
        if skipped(step):
            parse_words(words)
        else:
            assert main([*words, *FLAGS.get(words[0], [])]) == 0, step


def examples(names: Iterable[str]) -> list[tuple[str, str]]:
    """Language and text of every statement and command in some pages."""
    every = [block for name in names for block in blocks(name)]
    return [(language, step) for language, text in every if language in LANGUAGES for step in steps(language, text)]


@pytest.mark.slow
@pytest.mark.parametrize("names", [["README.md"], PAGES], ids=["README", "docs"])
def test_examples_run(
    names: list[str], hub: Any, workplace: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    inputs = tokenizer("한국어", return_tensors="pt", return_token_type_ids=False)
    scope = {"tokenizer": tokenizer, "inputs": inputs, "EvaluationProtocol": optimum_ksparse.EvaluationProtocol}
    scope["CalibrationData"] = CalibrationData
    for language, step in examples(names):
        if language == "bash" or not skipped(step):
            run(language, step, scope)
    written = {"polyglot-ko-5.8b-2of4"} if names != PAGES else {"polyglot-ko-12.8b-2of4", "my-adapter"}
    assert written <= {path.name for path in workplace.iterdir()}
    assert AutoTokenizer.from_pretrained("polyglot-ko-5.8b-2of4").vocab_size == tokenizer.vocab_size


def test_what_is_not_run_is_an_example() -> None:
    every = [step for _, step in examples(["README.md", *PAGES])]
    assert [beginning for beginning in NOT_RUN if not any(step.startswith(beginning) for step in every)] == []


def test_every_page_with_examples_is_run() -> None:
    pages = [f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md") if not path.name.endswith(".ko.md")]
    pages = [page for page in pages if page not in UPSTREAM]
    assert {page for page in pages if examples([page])} <= set(PAGES)


@pytest.mark.parametrize("name", ["README.md", *PAGES])
def test_both_languages_show_the_same_examples(name: str) -> None:
    korean = "README_ko.md" if name == "README.md" else name.replace(".md", ".ko.md")
    if (REPOSITORY / korean).exists():
        assert examples([name]) == examples([korean])
