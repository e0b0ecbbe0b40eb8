"""What cards are made of: measurements, reports, and the subjects of whole cards."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from markdown_it import MarkdownIt

from optimum_ksparse.adapters import MergedLayer, MergeReport
from optimum_ksparse.evaluation import KOBEST_TASKS, EvaluationResults, Measurement
from optimum_ksparse.hub.card import BEGIN, END
from optimum_ksparse.hub.figures import ERROR_FIGURE, RESULTS_FIGURE
from optimum_ksparse.hub.subject import CardSubject
from optimum_ksparse.report import BlockReport, Change, LayerReport, SparsityReport
from optimum_ksparse.study import quantities  # noqa: F401 - their titles

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECTION = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
MARKDOWN = MarkdownIt("gfm-like", {"linkify": False})
TUNING = {"task": "koalpaca", "method": "LORA", "r": 8, "steps": 300}


def perplexity(value: float | None = 12.5, bits: float = 1.25, **protocol: Any) -> Measurement:
    texts = {"name": "kowiki", "dataset": "wikimedia/wikipedia", "configuration": "20231101.ko", "slice": "first 256"}
    usual = {"texts": {**texts, "sha256": "5ba1"}, "seq_len": 2048, "stride": None, "max_tokens": None}
    usual |= {"num_windows": 37, "num_tokens": 75739, "num_bytes": 312345, "prepend_bos": False, "dtype": "bfloat16"}
    environment = {"device": "NVIDIA H100", "batch_size": 4, "versions": {"torch": "2.13.0"}}
    metrics = {"perplexity": value, "bits_per_byte": bits}
    return Measurement("perplexity", metrics, {**usual, **protocol}, environment)


def kobest(task: str = "copa", acc: float = 0.5, f1: float = 0.45, **protocol: Any) -> Measurement:
    usual = {"task": f"kobest_{task}", "task_version": 1.0, "num_fewshot": 0, "limit": None, "split": "test"}
    usual |= {"data": {"name": "skt/kobest_v1"}, "num_samples": 1000, "items_sha256": "ef01"}
    usual |= {"prepend_bos": True, "dtype": "bfloat16"}
    versions = {"torch": "2.13.0", "transformers": "5.23.0", "lm-eval": "0.4.13"}
    metrics = {"acc": acc, "acc_stderr": 0.0158, "f1": f1}
    return Measurement(task, metrics, {**usual, **protocol}, {"device": "cpu", "batch_size": 8, "versions": versions})


def decoding(per_second: float, **protocol: Any) -> Measurement:
    usual = {"machine": "Some CPU", "threads": 2, "prompt_tokens": 256, "new_tokens": 32, "cuda_graph": False}
    environment = {"device": "cpu", "batch_size": 1, "versions": {"torch": "2.13.0"}}
    return Measurement("speed", {"tokens_per_s": per_second}, {**usual, "dtype": "bfloat16", **protocol}, environment)


def make_results(tuned: bool = False, speed: bool = False, **protocol: Any) -> EvaluationResults:
    """Perplexity and all tasks, dense and sparse; `protocol` is of the sparse tasks alone. `tuned`: after a tuning as
    well; `speed`: of decoding too."""
    results = EvaluationResults(
        "0123",
        sparse=[perplexity(), *(kobest(task, **protocol) for task in KOBEST_TASKS)],
        dense=[perplexity(10.0, 1.0), *(kobest(task, 0.625, 0.6) for task in KOBEST_TASKS)],
        dense_model="EleutherAI/polyglot-ko-1.3b",
        dense_revision=COMMIT,
    )
    if tuned:
        results.sparse += [perplexity(11.0, tuning=TUNING), kobest("copa", 0.6, 0.6, tuning=TUNING)]
        results.dense += [perplexity(9.0, tuning=TUNING)]
    if speed:
        results.sparse.append(decoding(25.0))
        results.dense.append(decoding(20.0))
    return results


def make_report(method: str = "wanda", pattern: str = "2:4", **more: Any) -> SparsityReport:
    """Pruned so; `more` are settings where they have the names of some, otherwise of the calibration."""
    data = {"dataset": "kowiki", "form": "crops", "num_samples": 1024, "seq_len": 2048, "seed": 7}
    error = None if method == "magnitude" else 0.125
    settings = ("allocation", "target_density", "refine", "reconstruct")
    chosen = {name: more.pop(name) for name in settings if name in more}
    calibration = {**data, "begins_with_bos": True, "bos_in_statistics": False, **more}
    return SparsityReport(
        config={"method": method, "pattern": pattern, **chosen},
        calibration={} if method == "magnitude" else calibration,
        layers=[
            LayerReport(f"layers.{i}.{name}", (64, 32), pattern, 1024, 4096, 2304, error, 0.5)
            for i in range(3)
            for name in ("self_attn.q_proj", "mlp.up_proj")
        ],
        skipped={"layers.0.mlp.down_proj": "in modules_to_not_convert"},
        base_model="EleutherAI/polyglot-ko-1.3b",
        base_revision=COMMIT,
        num_parameters=1_331_810_304,
        versions={"torch": "2.12.1", "transformers": "5.20.0"},
    )


def make_subject(report: Any = "default", results: Any = "default", **more: Any) -> CardSubject:
    """A packed model, pruned from one on the Hub, with report, results and figures."""
    report = make_report() if isinstance(report, str) else report
    results = make_results() if isinstance(results, str) else results
    base = more.get("base_model", "EleutherAI/polyglot-ko-1.3b")
    usual = {"name": "polyglot-2of4", "repo_id": "user/polyglot-2of4", "storage": "packed", "dtype": "bfloat16"}
    usual |= {"file_bytes": 1_862_345_678, "inherited": {"license": "apache-2.0", "language": ["ko"]}}
    usual |= {"base_model": base, "base_name": base, "base_revision": COMMIT if base else None}
    drawn = report is not None and more.get("adapter") is None
    usual["figures"] = {ERROR_FIGURE: drawn, RESULTS_FIGURE: results is not None}
    return CardSubject(report=report, results=results, **{**usual, **more})


def make_adapter(**more: Any) -> CardSubject:
    facts = {"kind": "LORA", "settings": {"r": 8, "lora_alpha": 16, "target_modules": "q_proj, v_proj"}}
    facts["num_parameters"] = 123_456
    usual = {"adapter": facts, "base_model": "user/polyglot-2of4", "repo_id": "user/polyglot-lora"}
    return make_subject(**{**usual, **more})


def make_changed(results: Any = None, **more: Any) -> CardSubject:
    """Of a model that was trained and merged after pruning, by every step that a card tells of."""
    report = make_report("admm", reconstruct="block", refine=["swaps", "exact"], allocation="owl", target_density=0.6)
    report.reconstruction = [BlockReport(0, 0.5, 0.25, 1.0)]
    trained = Change("trained", "SFTTrainer", "beomi/KoAlpaca-v1.1a", 300, 1.5)
    report.changes = [Change("unknown"), trained, Change("merged", "solve", adapters=["LORA"], steps=20)]
    layer = MergedLayer("layers.0.mlp.up_proj", (64, 32), 1024, "solved", 0.25, 0.5, 1.0)
    merge = MergeReport("solve", [{"name": "default", "peft_type": "LORA"}], layers=[layer])
    return make_subject(report, results, merge=merge, tuning={"title": "KoAlpaca", "steps": 300}, **more)


def _mixed() -> SparsityReport:
    parts = [
        {"dataset": "kowiki", "num_samples": 8, "form": "crops", "begins_with_bos": False},
        {"dataset": {"file": "a.txt", "sha256": "00"}, "num_samples": 8, "form": "texts", "begins_with_bos": True},
    ]
    report = make_report("sparsegpt", "50%/32x16", refine=["swaps"], begins_with_bos=False, parts=parts)
    del report.calibration["dataset"]
    return report


# Subjects that between them take every branch of the templates.
SUBJECTS: dict[str, Callable[[], CardSubject]] = {
    "packed": lambda: make_subject(results=make_results(speed=True), dense_revision="zeros"),
    "changed": lambda: make_changed(results=make_results(tuned=True)),
    "dense": lambda: make_subject(make_report("magnitude", "50%/32x16"), None, storage="dense", dense_revision="z"),
    "adapter": lambda: make_adapter(results=EvaluationResults("0", [perplexity(stride=512)])),
    "bare": lambda: make_subject(None, None, base_model=None, repo_id=None),
    "bare adapter": lambda: make_adapter(report=None, results=None, base_model=None, base_name="folder"),
    "mixed": lambda: make_subject(_mixed(), make_results(limit=50, num_samples=50), base_model=None),
    "image": lambda: make_subject(
        make_report("wanda", "50%", dataset={"texts": 2, "sha256": "00"}, allocation="owl"),
        EvaluationResults("0", [perplexity(texts={"file": "a.txt", "sha256": "00"})]),
        auto_class="AutoModelForImageTextToText",
    ),
    "token ids": lambda: make_subject(make_report("alps", "50%", dataset={"token_ids": [2, 8], "sha256": "00"})),
}


def front(card: str) -> dict[str, Any]:
    match = REGEX_YAML_BLOCK.match(card)
    assert match is not None
    metadata: dict[str, Any] = yaml.safe_load(match[2])
    return metadata


def body(card: str) -> str:
    return REGEX_YAML_BLOCK.sub("", card, count=1)


def tables(card: str) -> list[list[list[str]]]:
    """Tables of rows of cells, as plain text."""
    made: list[list[list[str]]] = []
    for token in MARKDOWN.parse(body(card)):
        if token.type == "table_open":
            made.append([])
        elif token.type == "tr_open":
            made[-1].append([])
        elif token.type in ("th_open", "td_open"):
            made[-1][-1].append("")
        elif token.type == "inline" and made and token.level > 3:
            made[-1][-1][-1] = "".join(part.content for part in token.children or [])
    return made
