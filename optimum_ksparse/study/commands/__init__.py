"""The commands of the study, beside those of the library: `optimum_ksparse.__main__` has both."""

from __future__ import annotations

from typing import Any

from .bench import BenchCommand
from .finetune import KoAlpacaCommand, KorQuADCommand
from .study import StudyCommand

COMMANDS: dict[str, tuple[str, Any]] = {
    "finetune": (
        "Fine-tune on a task.",
        {
            "koalpaca": ("Answer instructions in Korean.", KoAlpacaCommand),
            "korquad": ("Find answers in Korean texts.", KorQuADCommand),
        },
    ),
    "study": ("Compare methods, patterns, data.", StudyCommand),
    "bench": ("Measure speed beside dense.", BenchCommand),
}
