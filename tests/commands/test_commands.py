"""`optimum-cli ksparse`, in this process."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging as logging_of_transformers

from optimum_ksparse import SparsityConfig, sparsify
from optimum_ksparse.__main__ import main
from optimum_ksparse.commands.prune import _LOADING_TEXTS, SETTINGS_TEXTS
from optimum_ksparse.commands.recipes import read_recipe
from optimum_ksparse.config import FLAT_SETTINGS, METHOD_SETTINGS
from optimum_ksparse.data import documents, tell_default_text
from optimum_ksparse.evaluation import Baseline, EvaluationResults, Measurement

from ..conftest import REPOSITORY, make_config, sample_texts
from ..loopback_hub import LoopbackHub

torch.set_num_threads(1)

Cli = Callable[..., subprocess.CompletedProcess[str]]
CLI = Path(sys.executable).parent / "optimum-cli"
RECIPES = sorted((REPOSITORY / "configs").glob("*.yaml"))


@pytest.fixture
def dense(tmp_path, make_model, tokenizer):
    make_model("llama").save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    write_text(tmp_path)
    return tmp_path / "dense"


def write_text(folder):
    (folder / "text.txt").write_text("\n\n".join(sample_texts("calibration")), encoding="utf-8")


def test_prune_then_info(cli, workplace):
    write_text(workplace)
    recipe = {"method": "sparsegpt", "pattern": "4:8", "dataset": "text.txt", "num_samples": 8, "seq_len": 64}
    (workplace / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    flags = ("--config", "recipe.yaml", "--seq-len", "32", "--modules-to-not-convert", "o_proj")
    done = cli("prune", "dense", "pruned", *flags)
    assert done.returncode == 0, done.stderr
    assert "12 sparse layers, density 0.5000" in done.stdout
    assert {"model.safetensors", "tokenizer.json", "sparsity_report.json"} <= set(os.listdir(workplace / "pruned"))

    done = cli("info", "pruned")
    assert done.returncode == 0, done.stderr
    assert "pattern: 4:8" in done.stdout
    assert "on this machine: " in done.stdout
    assert "block_size: 128" in done.stdout and "reconstruction" not in done.stdout and "[]" not in done.stdout

    done = cli("info", "pruned", "--json")
    summary = json.loads(done.stdout)
    assert summary["settings"]["seq_len"] == 32
    assert summary["settings"]["method"] == "sparsegpt"
    assert summary["num_sparse_layers"] == 12
    assert summary["file_bytes"]["model.safetensors"] == (workplace / "pruned/model.safetensors").stat().st_size

    (workplace / "pruned/sparsity_report.json").unlink()
    without_report = json.loads(cli("info", "pruned", "--json").stdout)
    assert without_report["num_parameters"] == summary["num_parameters"]


def held(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("more", [(), ("--stream",)], ids=["memory", "stream"])
def test_prune_over_something_else_is_refused_unless_told(cli, dense, tmp_path, make_model, more):
    """The source itself, another model, a folder with somebody's files."""
    flags = ("--method", "magnitude", *more)
    make_model("gpt2").save_pretrained(tmp_path / "other")
    (tmp_path / "files").mkdir()
    (tmp_path / "files/thesis.tex").write_text("years")
    for name in ("dense", "other", "files"):
        before = held(tmp_path / name)
        done = cli("prune", dense, tmp_path / name, *flags)
        assert done.returncode == 1 and held(tmp_path / name) == before, done.stderr
    done = cli("prune", dense, tmp_path / "other", *flags, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "other/config.json").read_text())["model_type"] == "llama"
    assert (tmp_path / "other/tokenizer.json").is_file()


def test_the_default_calibration_text_and_a_missing_tokenizer_are_told(
    make_model, tokenizer, tmp_path, caplog, monkeypatch
):
    logger = logging.getLogger("optimum_ksparse")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(documents, "stream", lambda *_, **__: ({"text": text} for text in sample_texts("calibration")))
    logging_of_transformers.get_logger("optimum_ksparse").warning_once.cache_clear()
    told = lambda: [record.getMessage() for record in caplog.records]  # noqa: E731
    settings = {"method": "wanda", "num_samples": 2, "seq_len": 16}
    sparsify(make_model(), SparsityConfig(dataset=sample_texts("calibration"), **settings), tokenizer)
    assert "Korean" not in "".join(told())
    sparsify(model := make_model(), SparsityConfig.from_flat(**settings), tokenizer)
    assert "the default, which is Korean" in told()[-1] and "of another language" in told()[-1]  # of bytes alone
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    assert sum("no tokenizer where the model is saved" in text for text in told()) == 1


def test_a_tokenizer_with_korean_words_is_no_reason_for_another_text():
    words = {word: index for index, word in enumerate(["[UNK]", *"abcdefghijklmnopqrstuvwxyzTIS,."])}
    backend = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = Split("", "isolated")
    english = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    assert "has no tokens for Korean" in tell_default_text("mc4-ko", english)
    whole = Tokenizer(BPE({"a": 0}, [], unk_token="a"))
    korean = PreTrainedTokenizerFast(tokenizer_object=whole)
    assert "another language" not in tell_default_text("mc4-ko", korean)


def test_prune_from_disk_to_disk(cli, workplace):
    write_text(workplace)
    flags = ("--dataset", "text.txt", "--num-samples", "4", "--seq-len", "32")
    assert cli("prune", "dense", "memory", *flags).returncode == 0
    done = cli("prune", "dense", "disk", *flags, "--stream", "--json", "--activation-memory", "1KB")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["event"], line.get("done")) for line in lines] == [("block", 1), ("block", 2), ("done", None)]
    assert lines[0]["total"] == 2
    assert lines[0]["tokens_per_second"] > 0
    assert lines[0]["peak_memory_bytes"] >= lines[0]["memory_bytes"] > 10**8
    assert len(lines[2]["layers"]) == 14
    assert (workplace / "disk" / "tokenizer.json").is_file()
    states = [AutoModelForCausalLM.from_pretrained(workplace / name).state_dict() for name in ("memory", "disk")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    done = cli("prune", "dense", "disk", *flags, "--stream", "--pattern", "4:8")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: disk holds another sparse checkpoint")


def test_every_setting_has_a_flag():
    assert {*SETTINGS_TEXTS, *METHOD_SETTINGS} == {*FLAT_SETTINGS}


def test_recipes_are_short_and_valid():
    assert RECIPES
    for path in RECIPES:
        assert len(path.read_text().splitlines()) <= 20, path.name
        recipe = read_recipe(str(path), ["model", "output", *FLAT_SETTINGS, *_LOADING_TEXTS])
        SparsityConfig.from_flat(**{name: value for name, value in recipe.items() if name in FLAT_SETTINGS})


@pytest.mark.processes
def test_help_of_optimum_cli_lists_us(tmp_path):
    done = subprocess.run([CLI, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert "ksparse" in done.stdout


# --- eval, card and push, in this process ----------------------------------------------------------------------------


EVAL = ("--texts", "held_out.txt", "--seq-len", "32", "--tasks", "none")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A folder with `dense` and `sparse`, a tiny model before and after pruning, each with its tokenizer."""
    folder = tmp_path_factory.mktemp("commands")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config("llama", max_position_embeddings=256))
    model.save_pretrained(folder / "dense")
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", sparsity_config=SparsityConfig("magnitude"))
    model.save_pretrained(folder / "sparse")
    for name in ("dense", "sparse"):
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def workplace(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: `dense`, `sparse`, a held-out text and four items of COPA."""
    for name in ("dense", "sparse"):
        shutil.copytree(models / name, tmp_path / name)
    texts = [text[:80] for text in sample_texts("evaluation")[:2]]
    (tmp_path / "held_out.txt").write_text("\n\n".join(texts), encoding="utf-8")
    (tmp_path / "kobest/copa").mkdir(parents=True)
    with open(tmp_path / "kobest/copa/test.jsonl", "w", encoding="utf-8") as file:
        for number in range(4):
            answers = {"alternative_1": f"{number} 나무", "alternative_2": f"바다 {number}", "label": number // 2}
            item = {"premise": f"비 {number}", "question": ("원인", "결과")[number % 2], **answers}
            file.write(json.dumps(item, ensure_ascii=False) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cli(workplace: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    """`optimum-cli ksparse` in this process."""

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        words = list(map(str, arguments))
        capsys.readouterr()
        try:
            status: Any = main(words)
        except SystemExit as ended:
            status = ended.code
        return subprocess.CompletedProcess(words, status, *capsys.readouterr())

    return call


def results_in(folder: str | Path) -> EvaluationResults:
    return EvaluationResults.load(Path(folder) / "evaluation_results.json")


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(done: subprocess.CompletedProcess[str], *parts: str, status: int | None = None) -> None:
    """One line on standard error, and status 1, or 2 for a mistake of usage."""
    *before, line = done.stderr.splitlines()
    assert line.startswith("error: "), done.stderr
    assert done.returncode in ((1, 2) if status is None else (status,)), done
    assert all(part in line for part in parts), line
    assert not any("Traceback" in other for other in before)


def test_eval_with_a_baseline_and_again(cli: Cli, workplace: Path, measured: list[str]) -> None:
    done = cli("eval", "sparse", *EVAL, "--baseline", "dense")
    assert done.returncode == 0, done.stderr
    assert measured == ["perplexity"] * 2
    assert f"written to {Path('sparse/evaluation_results.json')}" in done.stdout
    results = results_in("sparse")
    assert (results.dense_model, results.dense_revision, len(results.comparable())) == ("dense", None, 1)
    assert f"{results.dense[0].metrics['perplexity']:.4f}" in done.stdout
    again = cli("eval", "sparse", *EVAL, "--baseline", "dense")
    assert (again.returncode, again.stdout, measured) == (0, done.stdout, ["perplexity"] * 2)
    assert results_in("sparse") == results
    assert AutoModelForCausalLM.from_pretrained("sparse").ksparse.results == results


def test_eval_with_the_recorded_base_of_the_hub(cli: Cli, hub: LoopbackHub, workplace: Path) -> None:
    recorded = hub.add_repo("org/base", files_in(workplace / "dense")).find("main").id
    model = AutoModelForCausalLM.from_pretrained("org/base", sparsity_config=SparsityConfig("magnitude"))
    model.save_pretrained("pruned")
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(make_config("llama", max_position_embeddings=256)).save_pretrained("newer")
    hub.commit("org/base", files_in(workplace / "newer"), "Other weights")
    done = cli("eval", "pruned", *EVAL, "--baseline")
    assert done.returncode == 0, done.stderr
    results = results_in("pruned")
    assert (results.dense_model, results.dense_revision) == ("org/base", recorded)
    assert cli("eval", "dense", *EVAL).returncode == 0
    assert results_in("dense").dense[0].metrics == results.dense[0].metrics


@pytest.mark.slow
def test_eval_of_more_adds_to_what_is_there(cli: Cli, measured: list[str]) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    tasks = ("--tasks", "copa", "--data-dir", "kobest", "--seq-len", "32")
    for flags in (EVAL, ("--texts", "none", *tasks), ("--texts", "held_out.txt", *tasks)):
        done = cli("eval", "sparse", *flags)
        assert done.returncode == 0, done.stderr
    assert measured == ["perplexity", "copa"]
    assert [row.name for row in results_in("sparse").sparse] == measured
    done = cli("eval", "sparse", "--texts", "none", *tasks, "--limit", "2")
    assert results_in("sparse").sparse[1].protocol["limit"] == 2


def test_eval_that_is_interrupted_goes_on(cli: Cli, monkeypatch: pytest.MonkeyPatch, measured: list[str]) -> None:
    original = Baseline.load
    monkeypatch.setattr(Baseline, "load", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    done = cli("eval", "sparse", *EVAL, "--baseline", "dense")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (130, "interrupted")
    assert (len(results_in("sparse").sparse), len(results_in("sparse").dense)) == (1, 0)
    monkeypatch.setattr(Baseline, "load", original)
    assert cli("eval", "sparse", *EVAL, "--baseline", "dense").returncode == 0
    assert len(results_in("sparse").comparable()) == 1
    assert measured == ["perplexity"] * 2


@pytest.mark.parametrize("baseline", ["nothing-here", "org/nothing"])
def test_eval_with_a_baseline_that_is_missing(cli: Cli, hub: LoopbackHub, baseline: str) -> None:
    refused(cli("eval", "sparse", *EVAL, "--baseline", baseline), baseline)


def test_eval_of_a_dense_model(cli: Cli, workplace: Path) -> None:
    assert cli("eval", "dense", *EVAL).returncode == 0
    results = results_in("dense")
    assert (results.sparse, results.dense_model, len(results.dense)) == ([], "dense", 1)
    refused(cli("eval", "dense", *EVAL, "--baseline", "sparse"), "baseline")
    refused(cli("eval", "dense", *EVAL, "--baseline", "dense"), "the model is dense: it is its own baseline")
    assert results_in("dense") == results


def test_eval_with_a_sparse_baseline(cli: Cli, workplace: Path) -> None:
    shutil.copytree("sparse", "other")
    refused(cli("eval", "sparse", *EVAL, "--baseline", "other"), "other is sparse itself, and no dense baseline")
    assert results_in("sparse").dense == []


def test_eval_refuses_results_of_another_checkpoint(cli: Cli, measured: list[str]) -> None:
    refused(cli("eval", "dense", *EVAL, "--output", "sparse"), "holds something else")
    assert cli("eval", "dense", *EVAL).returncode == 0
    shutil.move("dense/evaluation_results.json", "sparse")
    before = results_in("sparse")
    message = "holds results of other weights, or of another dtype: move it away, or discard it with --overwrite"
    refused(cli("eval", "sparse", *EVAL), str(Path("sparse/evaluation_results.json")), message)
    assert (results_in("sparse"), measured) == (before, ["perplexity"])
    refused(cli("eval", "dense", *EVAL, "--output", "sparse", "--dtype", "bfloat16"), message)
    assert cli("eval", "sparse", *EVAL, "--overwrite").returncode == 0
    assert (len(results_in("sparse").sparse), results_in("sparse").dense) == (1, [])


@pytest.mark.parametrize("command", [("eval", "sparse", *EVAL), ("push", "sparse", "user/name")])
def test_results_that_were_edited_by_hand(
    command: tuple[str, ...], cli: Cli, hub: LoopbackHub, measured: list[str]
) -> None:
    EvaluationResults("0123", sparse=[perplexity()]).save("sparse")
    path = Path("sparse/evaluation_results.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    data["sparse"][0]["metrics"]["bits_per_byte"] = -1
    path.write_text(json.dumps(data), encoding="utf-8")
    before = path.read_bytes()
    refused(cli(*command), "evaluation_results.json", "sparse[0].metrics.bits_per_byte is -1")
    assert (path.read_bytes(), measured, hub.requests) == (before, [], [])


def perplexity() -> Measurement:
    windows = {"seq_len": 32, "stride": None, "max_tokens": None, "num_windows": 3, "num_tokens": 45, "num_bytes": 99}
    protocol = {"texts": {"texts": 2, "sha256": "ab"}, **windows, "prepend_bos": False, "dtype": "float32"}
    environment = {"device": "cpu", "batch_size": 4, "versions": {}}
    return Measurement("perplexity", {"perplexity": 12.5, "bits_per_byte": 1.25}, protocol, environment)


def test_eval_by_a_recipe_and_flags(cli: Cli, workplace: Path) -> None:
    how = {"texts": "held_out.txt", "tasks": [], "seq_len": 16, "stride": 8}
    recipe = {"checkpoint": "sparse", "output": "out", **how}
    (workplace / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "baseline": True}))
    refused(cli("eval", "--config", "recipe.yaml"), "pass --baseline <Hub id or folder>")
    (workplace / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "baseline": "dense"}))
    done = cli("eval", "--config", "recipe.yaml", "--seq-len", "32", "--prepend_bos", "true")
    assert done.returncode == 0, done.stderr
    protocol = results_in("out").sparse[0].protocol
    assert [protocol[name] for name in ("seq_len", "stride", "prepend_bos")] == [32, 8, True]
    assert results_in("out").dense_model == "dense"
    assert not (workplace / "sparse/evaluation_results.json").exists()


BAD_INPUT = [
    ("prune dense", "output is missing"),
    ("prune dense out --pattern 5:4", "--pattern '5:4'"),
    ("prune dense out --method wand", "did you mean wanda?"),
    ("prune dense held_out.txt/out --dataset held_out.txt", "held_out.txt"),
    ("prune dense out --dataset held_out.txt --seq-len 512", "context of 256"),
    ("prune nothing-here out --dataset held_out.txt", "model 'nothing-here'"),
    ("prune dense out --config bad.yaml", "bad.yaml"),
    ("prune dense out --method magnitude --stream --device-map cpu", "--device-map"),
    ("prune dense out --method magnitude --resume false", "--resume"),
    ("info dense", "not a checkpoint of optimum-ksparse"),
    ("merge dense out", "adapter 'dense'"),
    ("eval", "checkpoint is missing"),
    ("eval sparse --config bad.yaml", "did you mean 'tasks'?"),
    ("eval sparse --config nothing.yaml", "nothing.yaml"),
    ("eval sparse --texts none --tasks coopa", "did you mean 'copa'?"),
    ("eval sparse --limit 0", "--limit 0"),
    ("eval sparse --texts held_out.txt --tasks none --seq-len 512", "--seq-len 512"),
    ("eval sparse --tokenizer nothing-here", "nothing-here"),
    ("eval sparse --texts none --tasks none", "nothing to measure"),
    ("eval sparse --texts nothing.txt", "--texts 'nothing.txt'"),
    ("eval sparse --texts none --data-dir nothing", "--data-dir"),
    ("eval sparse --texts held_out.txt --tasks none --baseline", "'dense'"),
    ("eval org/nothing --texts held_out.txt --tasks none", "checkpoint 'org/nothing'"),
    ("card nothing-here", "checkpoint 'nothing-here'"),
    ("card sparse --language de", "'de'"),
    ("card dense", "is no sparse model"),
    ("push sparse", "repo_id is missing"),
    ("push nothing-here user/name", "checkpoint 'nothing-here'"),
    ("push sparse bad_name/a/b", "repo_id 'bad_name/a/b'"),
    ("push sparse user/name --revision ..", "--revision '..'"),
    ("push sparse user/name --dense-revision main", "main"),
    ("push dense user/name", "is no sparse model"),
    ("push sparse user/name --evaluate --texts held_out.txt --tasks none", "--baseline"),
]


def test_bad_input_is_one_line_and_changes_nothing(
    cli: Cli, hub: LoopbackHub, workplace: Path, measured: list[str]
) -> None:
    (workplace / "bad.yaml").write_text("task: [copa]\n")
    before = files_in(workplace)
    for arguments, message in BAD_INPUT:
        refused(cli(*arguments.split()), message)
    assert (files_in(workplace), measured) == (before, [])
    assert [request.method for request in hub.requests if request.method not in ("GET", "HEAD")] == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tasks", "none"), "without a network, measure on a .txt or .jsonl file"),
        (
            ("--texts", "none", "--tasks", "copa"),
            "without a network pass --data-dir, a folder",
        ),
    ],
)
def test_eval_without_a_network(cli: Cli, hub: LoopbackHub, flags: tuple[str, ...], message: str) -> None:
    if "copa" in flags:
        pytest.importorskip("lm_eval", reason="needs the extra eval")
    refused(cli("eval", "sparse", *flags), message)


def test_eval_of_a_model_on_the_hub(cli: Cli, hub: LoopbackHub, workplace: Path) -> None:
    old = hub.add_repo("user/pruned", files_in(workplace / "sparse")).find("main").id
    hub.commit("user/pruned", {"notes.md": b"mine"}, "Newer")
    for flags, folder in ((("--output", "deep/out"), "deep/out"), (("--revision", old), "pruned")):
        done = cli("eval", "user/pruned", *EVAL, *flags)
        assert done.returncode == 0, done.stderr
        assert list(files_in(workplace / folder)) == ["evaluation_results.json"]
    assert results_in("deep/out").fingerprint == results_in("pruned").fingerprint


def test_card(cli: Cli, workplace: Path) -> None:
    for flags, title in ((("--language", "ko", "--tags", "mine", "korean"), "## 결과"), ((), "## Results")):
        done = cli("card", "sparse", *flags, "--repo-id", "user/name")
        assert (done.returncode, done.stdout) == (0, f"written: {Path('sparse/README.md')}\n"), done.stderr
        text = Path("sparse/README.md").read_text(encoding="utf-8")
        assert title in text
        assert 'from_pretrained("user/name")' in text
        Path("sparse/README.md").write_text(f"{text}\n내 글\n", encoding="utf-8")
    assert text.count("내 글") == 1
    assert {"mine", "korean"} <= set(yaml.safe_load(text.split("---\n")[1])["tags"])


@pytest.fixture
def adapter(workplace: Path) -> Path:
    """A folder with an adapter on `sparse`."""
    peft = pytest.importorskip("peft", reason="needs the extra finetune")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained("sparse"), config).save_pretrained("adapter")
    return workplace / "adapter"


def test_card_and_push_of_an_adapter(cli: Cli, hub: LoopbackHub, adapter: Path) -> None:
    done = cli("card", "adapter", "--language", "ko")
    assert done.returncode == 0, done.stderr
    text = (adapter / "README.md").read_text(encoding="utf-8")
    assert "위에서 학습한 어댑터입니다(LORA" in text
    assert "More Information Needed" not in text
    done = cli("push", "adapter", "user/adapter", "--tokenizer", "sparse")
    assert done.returncode == 0, done.stderr
    assert hub.commits("user/adapter")[-1].message == "Upload adapter"
    assert json.loads(hub.files("user/adapter")["adapter_config.json"])["base_model_name_or_path"] == "sparse"
    assert "An adapter (LORA" in hub.files("user/adapter")["README.md"].decode()


def test_push(cli: Cli, hub: LoopbackHub, workplace: Path) -> None:
    (workplace / "sparse/README.md").write_text("---\nlicense: mit\n---\n# 내 글\n", encoding="utf-8")
    before = files_in(workplace)
    for flags in ((), ("--language", "ko")):
        done = cli("push", "sparse", "user/name", "--private", "--tags", "mine", "--commit-message", "둘", *flags)
        assert done.returncode == 0, done.stderr
        head = hub.commits("user/name")[-1].id
        assert done.stdout.splitlines()[-1] == f"published: {hub.url}/user/name/commit/{head}"
    assert [commit.message for commit in hub.commits("user/name")[1:]] == ["둘", "둘"]
    assert hub.commits("user/name")[-1].changed == ["README.md"]
    assert hub.repo("user/name").private
    card = hub.files("user/name")["README.md"].decode()
    assert card.count("# 내 글") == 1
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit"
    assert "mine" in yaml.safe_load(card.split("---\n")[1])["tags"]
    assert files_in(workplace) == before


def test_push_to_branches_by_a_recipe(cli: Cli, hub: LoopbackHub, workplace: Path) -> None:
    recipe = {"checkpoint": "sparse", "repo_id": "user/other", "revision": "a", "dense_revision": "dense"}
    (workplace / "push.yaml").write_text(yaml.safe_dump(recipe))
    done = cli("push", "sparse", "user/name", "--config", "push.yaml", "--revision", "b")
    assert done.returncode == 0, done.stderr
    assert set(hub.repo("user/name").refs) == {"refs/heads/main", "refs/heads/b", "refs/heads/dense"}
    assert hub.files("user/name") == {}
    done = cli("push", "sparse", "user/name", "--create-pr")
    assert "refs/pr/1" in hub.repo("user/name").refs


@pytest.mark.slow
def test_push_that_measures_first(cli: Cli, hub: LoopbackHub, workplace: Path, measured: list[str]) -> None:
    hub.fail("/commit/", [403])
    flags = ("--evaluate", *EVAL, "--baseline", "dense")
    refused(cli("push", "sparse", "user/name", *flags), "the token may not write to user/name (403)")
    done = cli("push", "sparse", "user/name", *flags)
    assert done.returncode == 0, done.stderr
    assert json.loads(hub.files("user/name")["evaluation_results.json"]) == json.loads(
        Path("sparse/evaluation_results.json").read_text(encoding="utf-8")
    )
    assert len(results_in("sparse").comparable()) == 1
    assert measured == ["perplexity"] * 2  # they had been kept beside the model when the push failed


def test_push_of_other_weights_than_were_measured(cli: Cli, hub: LoopbackHub) -> None:
    EvaluationResults("0123", sparse=[perplexity()]).save("sparse")
    refused(cli("push", "sparse", "user/name"), "was measured on other weights, or in another dtype: measure again")
    assert hub.requests == []
