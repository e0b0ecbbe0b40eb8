"""A dense and a sparse model side by side, as a page: what both write and how fast, how well they predict a text, and
where the sparse one was pruned.

python examples/space/app.py [dense model] [sparse model]

Models are Hub ids or folders; by default DENSE_MODEL and SPARSE_MODEL of the environment, or those of `make demo`.
"""

from __future__ import annotations

import base64
import inspect
import io
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}  # read when gradio is imported

import gradio as gr
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, RepetitionPenaltyLogitsProcessor

from optimum_ksparse import SparseLinear, evaluate_perplexity
from optimum_ksparse.packing import unpack_mask

HERE = Path(__file__).resolve().parent
MOST_CHARACTERS, MOST_NEW_TOKENS = 300, 96  # of a beginning, and to write
MOST_TEXT_CHARACTERS, MOST_TEXT_TOKENS = 2000, 256  # of a text to predict
USERS, WAITING = 2, 16  # served at once, and in the queue

TITLE, SPEED = "What sparsity costs and gains", "tokens per second"
OF_DENSE, OF_SPARSE = "perplexity, dense", "perplexity, sparse"
BEGINNINGS = ["대한민국의 수도는", "김치는 배추를", "도서관에서 책을 읽다가", "The capital of Korea is"]
TEXT = (
    "우리 동네 도서관은 언덕 끝에 있어서 처음 가는 사람은 대개 숨을 한 번 고른 뒤에야 문을 민다. "
    "일 층에는 아이들이 신발을 벗고 뒹굴며 책을 보는 방이 있고, 이 층에는 오래된 잡지와 신문을 모아 둔 서가가 있다."
)
# One token, or one text, is computed at a time: the figures of a model are not those of two that share the processor.
LOCK = threading.Lock()


class Side:
    """A model with its tokenizer, from a Hub id or a folder."""

    def __init__(self, source: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(source).to("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(source)

    @property
    def megabytes(self) -> float:
        """Of weights, masks and scales in memory."""
        return sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers())) / 1e6

    def write(self, beginning: str, most: int) -> Iterator[tuple[str, float | None]]:
        """The text and the tokens per second, after each new token: the most probable one, where those that are there
        count less. The first token, for which the beginning is read, does not count in the speed."""
        ids = self.tokenizer(beginning, return_tensors="pt").input_ids.to(self.model.device)
        ends, fewer = self.model.generation_config.eos_token_id, RepetitionPenaltyLogitsProcessor(1.2)
        last = dict.fromkeys(inspect.signature(self.model.forward).parameters.keys() & {"logits_to_keep"}, 1)
        cache, seconds = None, []
        for _ in range(most):
            with LOCK, torch.no_grad():
                began = time.perf_counter()
                given = ids if cache is None else ids[:, -1:]
                out = self.model(given, past_key_values=cache, use_cache=True, **last)
                token = fewer(ids, out.logits[:, -1].float()).argmax(-1, keepdim=True)
                cache, is_end = out.past_key_values, token.item() in (ends if isinstance(ends, list) else [ends])
                seconds.append(time.perf_counter() - began)
            if is_end:
                return
            ids = torch.cat([ids, token], 1)
            text = self.tokenizer.decode(ids[0], skip_special_tokens=True).rstrip("\ufffd")  # half a character
            yield text, (len(seconds) - 1) / sum(seconds[1:]) if seconds[1:] else None

    def perplexity(self, text: str) -> float:
        """Of the first tokens of a text; raises gr.Error where there are too few."""
        context = getattr(self.model.config, "max_position_embeddings", None) or MOST_TEXT_TOKENS
        how = {"seq_len": min(MOST_TEXT_TOKENS, context), "max_tokens": MOST_TEXT_TOKENS}
        try:
            return evaluate_perplexity(self.model, self.tokenizer, [text], **how)["perplexity"]
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None


@contextmanager
def output_errors(model: torch.nn.Module, layers: Mapping[str, SparseLinear]) -> Iterator[dict[str, float]]:
    """Relative output errors of sparse layers on the inputs that the dense layers of the same names get within it."""
    errors: dict[str, float] = {}
    sums = {name: [0.0, 0.0] for name in layers}

    def add(name: str, dense: Any, inputs: Any, output: torch.Tensor) -> None:
        exact = output if dense.bias is None else output - dense.bias
        for i, part in enumerate((layers[name](inputs[0]) - output, exact)):
            sums[name][i] += float(part.float().square().sum())

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name in layers:
                hooks.enter_context(module.register_forward_hook(partial(add, name)))
        yield errors
    errors |= {name: (change / exact) ** 0.5 for name, (change, exact) in sums.items() if exact}


def check_length(text: str, most: int) -> None:
    """Raises gr.Error where there is no text, or too much."""
    if not text.strip() or len(text) > most:
        raise gr.Error(f"Found {len(text)} characters; from 1 to {most:,} are allowed.", print_exception=False)


def figure(value: float | None, form: str, unit: str, dense: float | None = None) -> str:
    """A number with its unit, and how many times the dense model's it is."""
    times = f" · {value / dense:.2f} × dense" if value and dense else ""
    return f'<div class="figure"><b>{"–" if value is None else format(value, form)}</b> {unit}{times}</div>'


def picture(shares: torch.Tensor, what: str) -> str:
    """Numbers from 0 to 1 [rows, columns] as a picture, with its description below."""
    opacity = Image.fromarray((255 * shares).byte().cpu().numpy())
    image, file = Image.new("RGBA", opacity.size, (37, 99, 235)), io.BytesIO()
    image.putalpha(opacity)
    image.save(file, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return f'<figure><img src="{source}" alt="{what}"><figcaption>{what}</figcaption></figure>'


def show_mask(layer: SparseLinear) -> str:
    """The first weights of a layer one by one, and of the whole layer the share of weights that bands of rows keep."""
    mask = unpack_mask(layer.weight_mask, layer.in_features)
    sizes = layer.to_dense_weight().detach().float().abs()[:32, :32]
    first = torch.where(mask[:32, :32], 0.25 + 0.75 * sizes / sizes.max(), 0)
    (height, width), rows = mask.shape, -(-len(mask) // 64)
    bands = torch.stack([band.float().mean(0) for band in mask[:, :640].split(rows)])
    pictures = (
        picture(first, f"Its first weights, {len(first)} × {len(first.T)}: the empty ones are zero"),
        picture(bands, f"{bands.shape[1]} of {width} columns, {height} rows by {rows}: the bluer, the more are kept"),
    )
    return f'<div class="pictures">{"".join(pictures)}</div>'


def show_errors(errors: Mapping[str, float], where: str) -> str:
    """Relative output errors as a table: a row for each kind of layer, a column for each block."""
    kinds: dict[str, dict[int, float]] = {}
    for name, error in errors.items():
        block = re.search(r"\.(\d+)\.", name)
        kinds.setdefault(name[block.end() :] if block else name, {})[int(block[1]) if block else 0] = error
    blocks, most = sorted({block for row in kinds.values() for block in row}), max(errors.values()) or 1

    def cell(error: float | None) -> str:
        colour = f"rgb(220 60 30 / {0.65 * (error or 0) / most:.2f})"
        return f'<td style="background: {colour}">{"" if error is None else round(100 * error)}'

    head = "".join(f"<th>{block}</th>" for block in blocks)
    lines = (f"<tr><th>{escape(kind)}</th>{''.join(map(cell, map(row.get, blocks)))}" for kind, row in kinds.items())
    table = f"<table><tr><th>block</th>{head}{''.join(lines)}</table>"
    return f'<div class="errors">{table}</div>‖X(Ŵ − W)ᵀ‖ / ‖XWᵀ‖ in percent, {where}.'


def build(dense: Side, sparse: Side) -> gr.Blocks:
    """The page. Raises ValueError where the second model has no sparse layers."""
    layers = {name: part for name, part in sparse.model.named_modules() if isinstance(part, SparseLinear)}
    if not layers:
        raise ValueError("the second model has no SparseLinear: give one that optimum-ksparse pruned and saved packed")
    report = sparse.model.sparsity_report
    rows = report.layers if report is not None and not report.changes else []
    known = {row.name: row.relative_output_error for row in rows if row.relative_output_error is not None}
    # The dense model has no outputs to compare with those of layers whose channels have another order.
    reordered = tuple(f".{row.name}" for row in rows if row.reordered_with)
    unknown = {} if known else {name: layer for name, layer in layers.items() if not name.endswith(reordered)}

    def write(beginning: str, most: float) -> Iterator[tuple[str, ...]]:
        check_length(beginning, MOST_CHARACTERS)
        most = max(1, min(int(most), MOST_NEW_TOKENS))
        latest: list[tuple[str, float | None]] = [("", None)] * 2
        for steps in zip_longest(*(side.write(beginning, most) for side in (dense, sparse))):  # by turns
            latest = [step or before for step, before in zip(steps, latest, strict=True)]
            (first, speed), (second, other) = latest
            yield first, second, figure(speed, ".1f", SPEED), figure(other, ".1f", SPEED, speed)

    def measure(text: str) -> Iterator[tuple[Any, ...]]:
        check_length(text, MOST_TEXT_CHARACTERS)
        with LOCK, output_errors(dense.model, unknown) as errors:
            first = dense.perplexity(text)
        below = show_errors(errors, "measured on the text above") if errors else gr.skip()
        yield figure(first, ".1f", OF_DENSE), figure(None, "", OF_SPARSE), below
        with LOCK:
            second = sparse.perplexity(text)
        yield figure(first, ".1f", OF_DENSE), figure(second, ".1f", OF_SPARSE, first), gr.skip()

    kept = sum(layer.num_values for layer in layers.values()) / sum(layer.shape.numel() for layer in layers.values())
    packed = sum(layer.packed_bytes for layer in layers.values()) / sum(layer.dense_bytes for layer in layers.values())
    most, least = (choose(layers.values(), key=lambda layer: layer.density).pattern for choose in (max, min))
    pattern = str(most) if most == least else f"{most} … {least}"
    method = "" if report is None else f", by {report.method}"
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(
            f"# {TITLE}\nOne model twice. In the sparse one {len(layers)} layers keep **{100 * kept:.0f} %** of their "
            f"weights (**{pattern}**{method}) in **{100 * packed:.0f} %** of the bytes. The rest is as it was."
        )
        with gr.Row(equal_height=False):
            how = {"max_length": MOST_CHARACTERS, "elem_id": "beginning"}
            beginning = gr.Textbox(BEGINNINGS[0], label="A beginning", scale=5, **how)
            most = gr.Slider(8, MOST_NEW_TOKENS, 48, step=8, label="New tokens", scale=2)
            go = gr.Button("Write", variant="primary", min_width=90, elem_id="write")
        gr.Examples(BEGINNINGS, beginning, label="For example")
        answers, speeds = [], []
        with gr.Row():
            for name, side, base in (("dense", dense, None), ("sparse", sparse, dense.megabytes)):
                with gr.Column():
                    gr.HTML(f"<h2>{name.title()}</h2>{figure(side.megabytes, ',.1f', 'MB', base)}")
                    answers.append(gr.Textbox(label=f"The {name} model writes", lines=6, max_lines=6, elem_id=name))
                    speeds.append(gr.HTML(figure(None, "", SPEED), elem_id=f"{name}-speed"))
        gr.Markdown(
            "## How well they predict a text\nPerplexity: among how many tokens a model hesitates, on average, over "
            f"the first {MOST_TEXT_TOKENS} of a text."
        )
        with gr.Row(equal_height=False):
            text = gr.Textbox(TEXT, label="A text", lines=3, max_length=MOST_TEXT_CHARACTERS, scale=9)
            gauge = gr.Button("Measure", variant="primary", min_width=90, elem_id="measure")
        with gr.Row():
            places = {"dense-perplexity": OF_DENSE, "sparse-perplexity": OF_SPARSE}
            perplexities = [gr.HTML(figure(None, "", what), elem_id=name) for name, what in places.items()]
        gr.Markdown("## What was pruned")
        layer = gr.Dropdown(list(layers), value=list(layers)[len(layers) // 2], label="Layer")
        mask = gr.HTML(show_mask(layers[layer.value]), elem_id="mask")
        gr.Markdown("## What each layer lost\nHow far its outputs are from the dense layer's, for the same inputs.")
        where = f"on the calibration text{', before blocks were tuned' if report and report.reconstruction else ''}"
        errors = gr.HTML(show_errors(known, where) if known else "Measure a text to see it.", elem_id="errors")
        gr.on([go.click, beginning.submit], write, [beginning, most], [*answers, *speeds], show_progress="minimal")
        gauge.click(measure, text, [*perplexities, errors], show_progress="minimal")
        layer.change(lambda name: show_mask(layers[name]), layer, mask, show_progress="hidden", api_name="mask")
    return page.queue(max_size=WAITING, default_concurrency_limit=USERS)


def serve(page: gr.Blocks, **options: Any) -> str:
    """Serves the page, which loads nothing from elsewhere, and takes and gives no file; returns its address."""
    theme = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono="ui-monospace")
    look = {"theme": theme, "css_paths": HERE / "style.css", "footer_links": []}
    closed = {"enable_monitoring": False, "ssr_mode": False, "max_file_size": 1, "pwa": False}
    return page.launch(**look, **closed, **options)[1]


def named(arguments: list[str]) -> list[str]:
    """The dense and the sparse model; raises SystemExit, which says how to name them, where they are not."""
    sources = arguments or [os.environ.get(name, "") for name in ("DENSE_MODEL", "SPARSE_MODEL")]
    demo = [HERE / "../../.demo" / name for name in ("gemma-3-270m", "sparse")]
    if not any(sources) and all(folder.is_dir() for folder in demo):
        return list(map(str, demo))
    if len(sources) != 2 or not all(sources):
        sys.exit("Give a dense and a sparse model: as arguments, as DENSE_MODEL and SPARSE_MODEL, or by `make demo`")
    return sources


if __name__ == "__main__":
    serve(build(*map(Side, named(sys.argv[1:]))))
