"""Every decoder family of the installed transformers, pruned: which work, which are refused and why.

python examples/benchmarks/families.py [FOLDER] [--only llama gemma3 …]

A tiny random model of each causal and image-text-to-text class (`tiny_configs`) is saved and loaded, pruned with Wanda
(saved packed) and by magnitude (saved with its zeros written out), loaded again, its logits compared, and its files
compared byte for byte with those of `prune_checkpoint`. Each family runs in a process of its own, with limits of time
and memory. `FOLDER/families.json` and `families.md` hold the table; with `--only` the other rows stay.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from tiny_configs import FIRST_ID, VOCABULARY, tiny_config
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto import modeling_auto

import optimum_ksparse
from optimum_ksparse import SparsityConfig, prune_checkpoint, sparsify

FOLDER = Path(__file__).parent / "results/families"
SECONDS, BYTES = 120, 6 << 30  # of CPU and memory for one family
IDS = torch.randint(FIRST_ID, VOCABULARY, (16, 16), generator=torch.Generator().manual_seed(0))
METHODS = {"wanda": "packed", "magnitude": "dense"}
OUTCOMES = ("works", "refused", "fails", "not tried")


class RefusedError(Exception):
    """This package said no, with a reason."""


class NotTriedError(Exception):
    """There is no model to prune: transformers cannot make, save or run a tiny one."""


def classes() -> dict[str, Any]:
    """`model_type/class name`: the Auto class that makes it."""
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    images = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    table = dict.fromkeys(causal.items(), AutoModelForCausalLM)
    table |= {(kind, name): AutoModelForImageTextToText for kind, name in images.items() if causal.get(kind) != name}
    return {f"{kind}/{name}": auto for (kind, name), auto in sorted(table.items())}


def try_family(kind: str, auto: Any, folder: Path) -> dict[str, Any]:
    """What happens to one family: its outcome, and a note."""
    try:
        try:
            torch.manual_seed(0)
            model = auto.from_config(tiny_config(kind)).eval()
            parameters = model.num_parameters()
            model.save_pretrained(folder / "source")
            expected, found = logits(model), logits(auto.from_pretrained(folder / "source").eval())
        except Exception as error:
            raise NotTriedError(f"transformers: {told(error)}") from error
        if not torch.equal(expected, found):
            raise NotTriedError("transformers: saved and loaded, the dense model computes something else")
        notes = [try_method(auto, folder, method) for method in METHODS]
    except (RefusedError, NotTriedError) as error:
        return {"outcome": "refused" if isinstance(error, RefusedError) else "not tried", "note": str(error)}
    except Exception as error:
        return {"outcome": "fails", "note": told(error)}
    return {"outcome": "works", "note": "; ".join(dict.fromkeys(filter(None, notes))), "parameters": parameters}


def try_method(auto: Any, folder: Path, method: str) -> str:
    """Prunes, saves, loads, compares, in memory and streamed; what had to stay dense."""
    settings = {"method": method, "dataset": IDS, "batch_size": 4, "storage": METHODS[method]}
    model, config, note = auto.from_pretrained(folder / "source").eval(), SparsityConfig.from_flat(**settings), ""
    try:
        sparsify(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        if not ours(error):
            raise
        note = str(error)
        config = SparsityConfig.from_flat(**settings, skip_unsupported=True)
        model = auto.from_pretrained(folder / "source").eval()
        try:
            report = sparsify(model, config)
        except (ValueError, TypeError, NotImplementedError) as second:
            raise (RefusedError(str(second)) if ours(second) else second) from error
        note = f"with skip_unsupported: {len(report.skipped)} layers stay dense, {len(report.layers)} are sparse"
    expected, saved = logits(model), folder / f"{method}-memory"
    if not bool(expected.isfinite().all()):
        raise AssertionError(f"{method}: the pruned model gives NaN or Inf")
    model.save_pretrained(saved)
    torch.testing.assert_close(logits(auto.from_pretrained(saved).eval()), expected, msg=f"{method}: logits as loaded")
    streamed = folder / f"{method}-streamed"
    try:
        prune_checkpoint(folder / "source", streamed, config, model_class=auto)
    except (ValueError, TypeError, NotImplementedError) as error:
        if not ours(error):
            raise
        return f"{note}; not streamed: {first_line(error)}".removeprefix("; ")
    compare(saved, streamed, method)
    return note


def compare(saved: Path, streamed: Path, method: str) -> None:
    one, other = tensors(saved), tensors(streamed)
    names = sorted(one.keys() ^ other.keys()) or [name for name in one if not same(one[name], other[name])]
    if names:
        raise AssertionError(f"{method}: streamed, {len(names)} tensors differ: {', '.join(names[:2])}")


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS[:2], use_cache=False).logits


def ours(error: BaseException) -> bool:
    """Whether this package raised it, and not something that it called."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and Path(trace.tb_frame.f_code.co_filename).is_relative_to(
        Path(optimum_ksparse.__file__).parent
    )


def first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def told(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def in_child(kind: str, auto: Any) -> dict[str, Any]:
    """`try_family` in a forked process."""
    with tempfile.TemporaryDirectory() as folder:
        return _in_child(kind, auto, Path(folder))


def _in_child(kind: str, auto: Any, folder: Path) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reading)
            signal.alarm(10 * SECONDS)  # one that waits for ever
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # progress bars and warnings
            with open(writing, "w", encoding="utf-8") as pipe:
                json.dump(try_family(kind, auto, folder), pipe)
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if text:
        return json.loads(text)
    how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"status {status}"
    return {"outcome": "fails", "note": f"the process ended by {how}"}


def table(rows: dict[str, dict[str, Any]], versions: str) -> str:
    counts = Counter(row["outcome"] for row in rows.values())
    head = f"{len(rows)} classes ({versions}): " + ", ".join(f"{counts[name]} {name}" for name in OUTCOMES)
    lines = ["# Families", "", f"By [`families.py`](../../families.py), tiny random models; {head}.", ""]
    for outcome in OUTCOMES:
        listed = [(name, row) for name, row in rows.items() if row["outcome"] == outcome]
        if listed:
            lines += [f"## {outcome.capitalize()}", "", "| model type | class | |", "|---|---|---|"]
            for name, row in listed:
                note = row["note"].replace("|", "&#124;").replace("<", "&lt;")
                lines.append(f"| {' | '.join(name.split('/'))} | {note} |")
            lines.append("")
    return "\n".join(lines)


def main(folder: Path, only: list[str]) -> int:
    tried = classes()
    if unknown := [name for name in only if name not in {key.split("/")[0] for key in tried}]:
        raise SystemExit(f"no such model type: {', '.join(unknown)}")
    path = folder / "families.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if only and path.is_file() else {}
    with tempfile.TemporaryDirectory() as own:
        try_family("llama", AutoModelForCausalLM, Path(own))  # imports what all need, before they fork
    for name, auto in tried.items():
        kind = name.split("/")[0]
        if not only or kind in only:
            rows[name] = in_child(kind, auto)
            print(f"{name}: {rows[name]['outcome']} {rows[name]['note']}", flush=True)
            write(path, dict(sorted(rows.items())))
    return int(any(row["outcome"] == "fails" for row in rows.values()))


def write(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"
    text = json.dumps({"versions": versions, "rows": rows}, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(table(rows, versions), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--only", nargs="+", default=[], metavar="MODEL_TYPE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # before there are threads, which a forked process would lack
    sys.exit(main(arguments.folder, arguments.only))
