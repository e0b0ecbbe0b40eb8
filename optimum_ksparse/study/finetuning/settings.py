"""How to fine-tune: the settings of a run, and the adapter that they stand for. The fields with their help are the
flags of `optimum-cli ksparse finetune`, the keys of its recipes and those of a study's sections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, TypeVar

from transformers import PreTrainedModel

from ...blocks import find_blocks
from ...checks import check_keys, check_one_of
from ...data import CalibrationData
from ...nn import is_linear_map
from ...records import Between, Count, Positive, Share
from ..settings import check_types, setting

# What is trained: low-rank adapters of three kinds, one whose delta is masked, or the sparse weights themselves.
TUNING_METHODS = ("lora", "masked", "dora", "hira", "full")
KOALPACA = "beomi/KoAlpaca-v1.1a"
_LEAST_ROOM = 8  # paragraph tokens that a window must have room for
_AboveZero = Annotated[float, Between(1e-12)]
_MAX_EXAMPLES = "use the first ones alone (default: all)"


@dataclass(frozen=True)
class FinetuningSettings:
    """Settings of every task; the defaults are those of Alpaca-LoRA (https://github.com/tloen/alpaca-lora) on all
    linear maps of attention and MLP. Raises ValueError, which names the setting, for what cannot be."""

    method: str = setting("lora", "masked: LoRA whose delta keeps the mask; full: the sparse weights")
    r: Positive = setting(8, "rank of the adapter")
    alpha: Positive = setting(16, "scale of the adapter: its delta is alpha / r · BA")
    dropout: Annotated[float, Between(0, 0.99)] = setting(0.05, "of the adapter")
    target_modules: list[str] | None = setting(None, "linear maps to adapt (default: all of the decoder blocks)")
    learning_rate: _AboveZero = setting(3e-4, "at its highest, after the warm-up; it falls linearly to zero")
    warmup_steps: Count = setting(100, "steps over which the learning rate rises")
    batch_size: Positive = setting(128, "examples a step, over all processes")
    micro_batch_size: Positive = setting(4, "examples in one forward pass")
    num_epochs: _AboveZero = setting(3, "passes over the examples")
    max_steps: Positive | None = setting(None, "ends earlier (default: after the passes)")
    seed: Count = setting(0, "of the order of examples, of dropout and of new weights")
    bf16: bool = setting(False, "matrix products in bfloat16, for weights in float32")
    gradient_checkpointing: bool = setting(False, "less memory for activations, more time")
    save_steps: Positive = setting(50, "steps from one checkpoint to the next")

    def __post_init__(self) -> None:
        check_one_of("method", self.method, TUNING_METHODS)
        check_types(self)
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of micro_batch_size={self.micro_batch_size}"
            )

    def trainer_class(self) -> Any:
        """The `TaskTrainer` of these settings. Raises ImportError where a library is missing."""
        raise NotImplementedError


@dataclass(frozen=True)
class KoAlpacaSettings(FinetuningSettings):
    """Settings of KoAlpaca. `data` may also be a list of rows, each with `instruction` and `output`."""

    data: Any = setting(KOALPACA, "JSON lines with instruction and output, or a Hub id (default: KoAlpaca v1.1a)")
    max_length: Annotated[int, Between(2)] = setting(512, "tokens; longer answers are cut, longer prompts left out")
    max_examples: Positive | None = setting(None, _MAX_EXAMPLES)

    def trainer_class(self) -> Any:
        from .koalpaca import KoAlpacaTrainer

        return KoAlpacaTrainer


@dataclass(frozen=True)
class KorQuADSettings(FinetuningSettings):
    """Settings of KorQuAD."""

    train_file: str | None = setting(None, "JSON in the form of SQuAD 1.1 (default: KorQuAD 1.0 on the Hub)")
    eval_file: str | None = setting(
        None, "the same, to measure on (default: a fifth of the articles of --train-file, drawn with --seed)"
    )
    max_examples: Positive | None = setting(None, _MAX_EXAMPLES)
    max_eval_questions: Positive | None = setting(None, "measure on the first ones alone (default: on all)")
    eval_every: Positive | None = setting(None, "steps after which these are measured too (default: at the end alone)")
    head_only: bool = setting(False, "train the span head without an adapter")
    seq_len: Positive | None = setting(None, "tokens of a window (default: 512, or the model's context)")
    max_question_tokens: Positive = setting(96, "of a question at most")
    stride: Positive = setting(128, "tokens from one window of a long paragraph to the next")
    prepend_bos: bool | None = setting(None, "begin with the beginning token (default: where the tokenizer does)")

    def __post_init__(self) -> None:
        super().__post_init__()
        least = self.max_question_tokens + 3 + _LEAST_ROOM
        if self.seq_len is not None and self.seq_len < least:
            raise ValueError(
                f"seq_len={self.seq_len} has no room for a question of max_question_tokens="
                f"{self.max_question_tokens} and a paragraph: it must be at least {least}"
            )
        if self.head_only and self.method != "lora":
            raise ValueError(f"head_only trains no adapter, and none of method={self.method!r}: leave one of them out")
        if self.eval_file is not None and self.train_file is None:
            raise ValueError("eval_file without train_file: give both, or neither for the Hub's KorQuAD 1.0")

    def trainer_class(self) -> Any:
        from .korquad.trainer import KorQuADTrainer

        return KorQuADTrainer


@dataclass(frozen=True)
class DistillSettings(FinetuningSettings):
    """Settings of distillation. `dataset` has the forms of that of `SparsityConfig`."""

    method: str = setting("full", "full: kept values, norms and biases; or an adapter: lora, masked, dora, hira")
    learning_rate: _AboveZero = setting(2e-5, "at its highest; it falls as a cosine")
    warmup_steps: Count | None = setting(  # type: ignore[assignment]
        None, "steps over which the learning rate rises (default: a twentieth of all)"
    )
    batch_size: Positive = setting(8, "samples a step, over all processes")
    micro_batch_size: Positive = setting(1, "samples in one forward pass")
    num_epochs: _AboveZero = setting(1, "passes over the samples")
    teacher: str | None = setting(None, "folder or Hub id of the dense model, whose logits are learnt")
    teacher_revision: str | None = setting(None, "branch, tag or commit of the teacher (default: main)")
    dataset: Any = setting(
        "mc4-ko",
        "text: mc4-ko (Korean web text), c4 (English), kowiki (Korean Wikipedia), self (the teacher writes it), a "
        ".txt or .jsonl file, or a mix: mc4-ko=0.5,self=0.5 (default: mc4-ko, which is Korean)",
    )
    num_samples: Positive = setting(2048, "sequences of text")
    seq_len: Annotated[int, Between(2)] = setting(512, "tokens in each sequence of text")
    prepend_bos: bool | None = setting(
        None, "begin each sequence with the beginning token (default: where the tokenizer does)"
    )
    top_k: Positive = setting(64, "largest logits of the teacher that are kept of each position")
    temperature: _AboveZero = setting(1.0, "of both models' distributions")
    cross_entropy: Share = setting(0.0, "weight of the cross entropy with the text; the divergence has the rest")
    cache: str | None = setting(
        None, "folder for the teacher's logits, which other runs read too (default: in the output, while it runs)"
    )
    texts: str | None = setting(
        None, "to measure perplexity on: kowiki, a .txt or .jsonl file (default: do not measure)"
    )
    max_tokens: Annotated[int, Between(2)] | None = setting(None, "of these texts at most (default: all)")
    eval_every: Positive | None = setting(None, "steps from one measurement to the next (default: before and after)")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.calibration()

    @property
    def checked_teacher(self) -> str:
        """Raises ValueError where there is none."""
        if not self.teacher:
            raise ValueError("teacher is missing: name the dense model, a folder or Hub id, whose logits are learnt")
        return self.teacher

    def calibration(self, tokenizer: Any = None) -> CalibrationData:
        """What the text is drawn from."""
        return CalibrationData(
            self.dataset, tokenizer, self.num_samples, self.seq_len, self.seed, prepend_bos=self.prepend_bos
        )

    def trainer_class(self) -> Any:
        from .distill.trainer import DistillTrainer

        return DistillTrainer


S = TypeVar("S", bound=FinetuningSettings)


def study_settings(kind: type[S], settings: Any, where: str) -> S:
    """Settings in a recipe of a study, which tunes the dense model as the sparse ones. Raises TypeError or ValueError
    for what the task does not take, or the dense model cannot do."""
    if not isinstance(settings, Mapping):
        raise TypeError(f"{where} must be settings of the tuning as key: value ({{}} for none), found {settings!r}")
    check_keys(settings, [f.name for f in fields(kind)], where)
    try:
        made = kind(**settings)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from None
    if made.method == "masked":
        raise ValueError(
            "method='masked' needs sparse layers, and a study tunes the dense model alike: take another, such as "
            "'lora'"
        )
    return made


def linear_targets(model: PreTrainedModel) -> list[str]:
    """Names, within a decoder block, of all linear maps of the blocks, sparse or dense: what an adapter on attention
    and MLP adapts, and never the output head."""
    names: dict[str, None] = {}
    for block in find_blocks(model).blocks:
        names |= dict.fromkeys(name for name, module in block.named_modules() if is_linear_map(module))
    return list(names)
