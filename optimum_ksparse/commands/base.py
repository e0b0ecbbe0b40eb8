"""What the commands share."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from ..checkpoint import facts_of
from ..checkpoint.model_class import load_model
from ..checkpoint.staging import check_output, recover, staged
from ..data import save_tokenizer
from ..evaluation import EvaluationProtocol, EvaluationResults, read_tuning
from ..records import HEAD_NAME, RESULTS_NAME, TUNING_NAME, printable
from ..records.sources import check_no_token, redact
from .errors import UsageError, describe_error
from .hub import check_source, hub_access
from .parser import Parser, add_flags, add_switches
from .recipes import read_recipe

# Not settings: they say how the command runs, and no recipe holds them.
_OF_THE_PROCESS = ("help", "config", "recipe", "token", "cache_dir")
LOADING_TEXTS = {
    "dtype": "of the weights; auto: as in the checkpoint (default: auto)",
    "device_map": "as in from_pretrained: auto, cpu, cuda:0, … (default: the CPU)",
    "tokenizer": "name or folder, where it is not beside the model",
    "revision": "branch, tag or commit of the model (default: main)",
}
OVERWRITE = {"overwrite": "write into an output that holds something else, such as another model, which is replaced"}
DTYPES = ("float32", "bfloat16", "float16", "auto")
TRUST = {"trust_remote_code": "run the code that comes with the model"}


class Command:
    """A command that ends with one line on standard error where something is wrong: with status 2 where its words
    cannot be, otherwise with 1."""

    # Settings that name a model, or a tokenizer: what is neither here nor on the Hub is refused before any work.
    MODELS: ClassVar[tuple[str, ...]] = ("checkpoint", "tokenizer")
    # Settings without which it cannot begin.
    REQUIRED: ClassVar[tuple[str, ...]] = ()
    # Keys of a recipe, where they are not the words and flags.
    KEYS: ClassVar[list[str] | None] = None
    # Settings that stand before the flags, and flags without a value: name → what it is.
    WORDS: ClassVar[Mapping[str, str]] = {}
    SWITCHES: ClassVar[Mapping[str, str]] = {}
    # Flags with a value, by the heading that they have in the help: arguments of `add_flags`.
    FLAGS: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    # The values of those that have a few.
    CHOICES: ClassVar[Mapping[str, Sequence[Any]]] = {"dtype": DTYPES}
    # What follows the name of the command in the example at the end of its help.
    EXAMPLE: ClassVar[str] = ""

    def __init__(self, parser: Parser, args: argparse.Namespace) -> None:
        self.parser, self.args = parser, args

    @classmethod
    def add_arguments(cls, parser: Parser) -> None:
        """Adds the words of the command to its parser."""
        for name, text in cls.WORDS.items():
            parser.add_argument(name, nargs="?", help=text)
        required = (*cls.REQUIRED, "recipe")
        words = (name.upper() if name in required else f"[{name.upper()}]" for name in cls.WORDS)
        parser.usage = f"%(prog)s {' '.join(words)} [--OPTION VALUE ...]"
        parser.epilog = f"example:\n  {parser.prog} {cls.EXAMPLE}"
        if "recipe" not in cls.WORDS:
            text = "YAML file with any of these settings; flags override"
            parser.add_argument("--config", metavar="RECIPE", help=text)
        add_switches(parser, cls.SWITCHES)
        for title, (texts, *source) in cls.FLAGS.items():
            add_flags(parser.add_argument_group(title), texts, source[0] if source else None, cls.CHOICES)

    def execute(self) -> None:
        raise NotImplementedError

    def run(self) -> int:
        """Does it, and returns the exit status."""
        try:
            with hub_access(self.args.token, self.args.cache_dir), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # is for those who write code
                self.execute()
            sys.stdout.flush()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:  # what reads the output has enough: nobody is there to tell
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except Exception as error:
            if os.environ.get("KSPARSE_TRACEBACK"):
                traceback.print_exc()
            self.say(f"error: {describe_error(error, self.flags, self.SWITCHES)}")
            return 2 if isinstance(error, UsageError) else 1
        return 0

    def say(self, text: str) -> None:
        """A line on standard error, without secrets and control characters."""
        print(redact(printable(text), self.args.token, os.environ.get("HF_TOKEN")), file=sys.stderr)

    def save_tokenizer(self, source: str, folder: Path, output: str, **where: Any) -> None:
        """Saves the tokenizer of a model, and the processor, in a folder; says where `output` then has none."""
        if (error := save_tokenizer(source, folder, **where)) is not None:
            reason = describe_error(error, self.flags, self.SWITCHES)
            self.say(f"{output} has no tokenizer: none could be loaded from {source}: {reason}")

    @property
    def flags(self) -> dict[str, str]:
        """How the command line writes each setting."""
        actions = self.parser._actions
        return {action.dest: action.option_strings[-1] if action.option_strings else action.dest for action in actions}

    def settings(self) -> dict[str, Any]:
        """The settings of the recipe, overridden by the flags that were given; checked."""
        names = [name for name in self.flags if name not in _OF_THE_PROCESS]
        given = {name: value for name in names if (value := getattr(self.args, name)) is not None}
        path = getattr(self.args, "recipe" if "recipe" in self.WORDS else "config")
        with usage():
            settings = self.merged(read_recipe(path, self.KEYS or names) if path else {}, given)
            if missing := [name for name in self.REQUIRED if not settings.get(name)]:
                raise UsageError(f"{missing[0]} is missing; see {self.parser.prog} --help")
        self.check(settings)
        return settings

    def merged(self, recipe: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Settings of a recipe, and flags, which win."""
        return {**recipe, **given}

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuses, before any work, names that hold a token, and models that are not there."""
        with usage():
            for name, value in _strings(settings):
                check_no_token(name, value)
        for name in self.MODELS:
            if isinstance(settings.get(name), str):
                revision = settings.get("revision") if name == self.MODELS[0] else None
                check_source(name, settings[name], revision)


@contextmanager
def usage() -> Iterator[None]:
    """Within it settings are checked: what cannot be is a mistake of usage."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def _strings(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """All strings in settings, with the name of the setting."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(key, name)
            yield from _strings(inner, name or str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner, name)


def check_writable(output: str, reads: Sequence[object], overwrite: bool) -> None:
    """`check_output`; and what cannot be written to is an error before the work, not after it."""
    check_output(output, reads=reads, overwrite=overwrite)
    with staged(output):
        pass


def copy_tuning(source: str, folder: Path) -> None:
    """Copies from a local folder what says how its model was tuned, and the span head of one tuned on KorQuAD."""
    for name in (TUNING_NAME, HEAD_NAME):
        if os.path.isfile(os.path.join(source, name)):
            shutil.copy(os.path.join(source, name), folder)


def folder_of(checkpoint: str) -> Path:
    """The folder of a checkpoint, which cannot be on the Hub here, put right for whoever reads there."""
    if not os.path.isdir(checkpoint):
        raise FileNotFoundError(f"checkpoint={checkpoint!r}: there is no such folder; download or save it first")
    recover(checkpoint)
    return Path(checkpoint)


def load_checkpoint(source: str | os.PathLike[str], settings: Mapping[str, Any]) -> Any:
    """The model of a checkpoint, of an adapter with its base, by the class that its config names; in its own dtype
    unless `settings` say otherwise. What the folder's `finetuning.json` says becomes `model.ksparse.tuning`. Damaged
    results, of which `from_pretrained` merely warns, are an error."""
    path = os.path.join(source, RESULTS_NAME)
    results = EvaluationResults.load(path) if os.path.isfile(path) else None
    tuning = read_tuning(source, settings.get("revision"))
    names = ("revision", "trust_remote_code", "dtype", "device_map")
    model = load_model(source, **{name: settings.get(name) for name in names})
    facts = facts_of(model)
    facts.results = results or facts.results  # an adapter's own, instead of its base's
    facts.tuning = tuning or facts.tuning
    return model


# Settings of EvaluationProtocol, whose defaults and types they have.
_TEXTS = {
    "texts": "for perplexity: kowiki (Korean Wikipedia), a .txt or .jsonl file, or none (default: kowiki)",
    "seq_len": "window positions (default: the model's context, at most 2048)",
    "stride": "tokens from one window to the next (default: windows do not overlap)",
    "max_tokens": "window positions to use at most (default: all)",
    "tasks": "copa, hellaswag, boolq, sentineg, wic (default: these five, of KoBEST); nsmc; speed; or none",
    "num_fewshot": "solved examples before each item of KoBEST",
    "limit": "items of each task, for trying out (default: all)",
    "data_dir": "folder of <task>/<split>.jsonl (default: the Hub)",
    "prepend_bos": "begin windows and items with the beginning token (default: where the tokenizer does)",
    "batch_size": "windows or items in one forward pass",
}
PROTOCOL = (_TEXTS, EvaluationProtocol)


def protocol_of(settings: dict[str, Any]) -> EvaluationProtocol:
    """The protocol of a recipe and flags; its settings are taken out of `settings`."""
    with usage():
        return EvaluationProtocol.from_settings({name: settings.pop(name) for name in _TEXTS if name in settings})
