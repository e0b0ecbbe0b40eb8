"""The words of the command line: flags, recipes, secrets, what is missing; and `optimum-cli` where this package cannot
be loaded. Nothing here loads a model."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from optimum_ksparse import SparsityConfig, __version__
from optimum_ksparse.__main__ import COMMANDS, main
from optimum_ksparse.__main__ import parse as parse_words
from optimum_ksparse.commands.base import Command
from optimum_ksparse.commands.errors import describe_error
from optimum_ksparse.commands.recipes import read_recipe
from optimum_ksparse.config import SETTINGS
from optimum_ksparse.records.sources import check_no_token, redact

from ..conftest import REPOSITORY
from ..loopback_hub import LoopbackHub

TOKEN = "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZ01234567"
LEAVES = [[name] for name in COMMANDS if name != "finetune"] + [
    ["finetune", name] for name in ("distill", "koalpaca", "korquad")
]


def said(capsys, *words):
    """Status and standard error of a command."""
    try:
        status = main([str(word) for word in words])
    except SystemExit as ended:
        status = ended.code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return status, (err.strip().splitlines() or [""])[-1], out + err


def actions_of(words):
    """The arguments of a command, which its parser gets when it parses."""
    below: argparse.ArgumentParser = parse_words([*words, "x", *(["y"] if words == ["push"] else [])]).parser
    return below._actions


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_each_flag_is_shown_once_with_its_default_and_the_hub_can_be_entered(words, capsys):
    for action in actions_of(words):
        assert len([option for option in action.option_strings if option.startswith("--")]) == bool(
            action.option_strings
        )
        assert action.nargs == 0 or not action.choices or action.metavar is None  # choices are shown
    assert {"--token", "--cache-dir"} <= {option for action in actions_of(words) for option in action.option_strings}
    status, line, shown = said(capsys, *words, "a", "b", "--toke", TOKEN)
    assert (status, TOKEN[4:] in shown) == (2, False)
    assert "did you mean --token?" in line


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_the_help_has_an_example_that_gives_what_the_command_needs(words, capsys):
    status, _, shown = said(capsys, *words, "--help")
    text = " ".join(shown.split())
    command = parse_words([*words, *(text.partition(f"example: optimum-cli ksparse {' '.join(words)} ")[2].split())])
    given = {name: value for name, value in vars(command.args).items() if value is not None}
    assert status == 0 and (command.REQUIRED or command.WORDS) and set(command.REQUIRED) <= given.keys()
    for name in {*command.REQUIRED} & {*command.WORDS}:
        assert f" {name.upper()} " in text.partition("[--OPTION VALUE ...]")[0]


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_what_has_to_be_given_has_no_default_and_everything_has_its_help(words):
    required = parse_words([*words, "x", *(["y"] if words == ["push"] else [])]).REQUIRED
    for action in actions_of(words):
        assert action.help and not (action.dest in required and "(default" in action.help), action.dest


def test_the_version_is_shown(capsys):
    assert said(capsys, "--version")[::2] == (0, f"{__version__}\n")


def test_a_setting_by_the_name_that_others_give_it(capsys):
    assert "did you mean --pattern?" in said(capsys, "prune", "a", "b", "--sparsity", "0.5")[1]


@pytest.mark.parametrize("flag", ["--tok", "--tokn", "--t", "--token-file", f"--token{TOKEN}", "--revison", "-x"])
def test_an_unknown_option_is_never_taken_for_another_nor_its_value_shown(flag, capsys):
    status, line, shown = said(capsys, "prune", "a", "b", flag, TOKEN)
    assert (status, line.startswith("error: there is no -")) == (2, True)
    assert TOKEN not in shown and TOKEN[4:] not in shown


@pytest.mark.parametrize(
    "words",
    [
        f"prune {TOKEN} out",
        f"prune dense out --tokenizer https://user:{TOKEN}@host/x/y",
        f"prune dense out --dataset {TOKEN}=0.5,c4=0.5",
        f"eval dense --baseline {TOKEN} --texts none",
        f"merge adapter out --base user/{TOKEN}",
        f"push sparse user/{TOKEN}",
        f"info {TOKEN}",
        f"finetune koalpaca {TOKEN} out",
        f"finetune distill sparse out --teacher {TOKEN}",
    ],
)
def test_a_token_in_the_place_of_a_name_is_neither_sent_nor_shown(
    words, hub: LoopbackHub, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    status, line, shown = said(capsys, *words.split())
    assert (status, line.startswith("error: ")) == (2, True)
    assert TOKEN not in shown
    assert hub.requests == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"a {TOKEN} b", "a hf_… b"),
        (f"https://x:{TOKEN}@hub.io/a", "https://…@hub.io/a"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer …"),
        ("?token=abc&x=1", "?token=…&x=1"),
        ("pass token=None, hf_hub_download, hf_quantizer, max_tokens=512", None),
    ],
)
def test_redaction(text, shown):
    assert redact(text) == (text if shown is None else shown)


def test_a_token_is_no_tokenizer_of_a_config():
    with pytest.raises(ValueError, match="looks like an access token") as caught:
        SparsityConfig(tokenizer=TOKEN)
    assert TOKEN not in str(caught.value)
    check_no_token("model", "user/hf_model")


def test_a_token_and_a_cache_serve_every_request_of_the_command_alone(hub: LoopbackHub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    hub.add_repo("org/secret", {"config.json": b"{}"}, private=True)
    hub.required_token = TOKEN
    status, line, shown = said(capsys, "info", "org/secret")
    assert (status, "no such model on the Hub that may be read" in line, "--token" in line) == (1, True, True)
    before = dict(os.environ)
    words = ("info", "org/secret", "--token", TOKEN, "--cache-dir", tmp_path / "cache")
    status, line, shown = said(capsys, *words)
    assert (status, "not a checkpoint of optimum-ksparse" in line) == (1, True)
    assert (tmp_path / "cache/models--org--secret").is_dir()
    assert dict(os.environ) == before
    assert TOKEN not in shown
    status, line, shown = said(capsys, "info", "org/secret", "--token", "hf_another1234567")
    assert status == 1 and "hf_another" not in shown


# Recipes


YAML_VALUES = [
    ("2:4", "2:4"), ("190:20:30", "190:20:30"), ("on", "on"), ("no", "no"), ("yes", "yes"), ("true", True),
    ("False", False), ("1e-4", 1e-4), ("1E5", 1e5), (".5", 0.5), ("010", 10), ("0o10", 8), ("0x1F", 31),
    ("-3", -3),
    ("2026-11-29", "2026-11-29"), ("1_000", "1_000"), ("~", None), ("", None), ("null", None),
    (".inf", float("inf")),
    ("'010'", "010"), ("50%", "50%"), ("<<", "<<"), ("=", "="), ("[2:4, 4:8]", ["2:4", "4:8"]),
    ("{mc4-ko: 0.5, self: 0.5}", {"mc4-ko": 0.5, "self": 0.5}),
]  # fmt: skip


def test_a_recipe_has_the_values_of_yaml_1_2(tmp_path):
    for written, value in YAML_VALUES:
        (tmp_path / "r.yaml").write_text(f"pattern: {written}\n", encoding="utf-8")
        read = read_recipe(str(tmp_path / "r.yaml"), ["pattern"])["pattern"]
        assert (read, type(read)) == (value, type(value)), written


NO_RECIPES = [
    ("seed: 1\nseed: 2\n", "'seed' is there twice"),
    ("dataset: {a.txt: 0.5, a.txt: 0.5}\n", "'a.txt' is there twice"),
    ("- seed\n", "found list"),
    ("7\n", "found int"),
    ("sed: 1\n", "did you mean 'seed'"),
    (f"token: {TOKEN}\n", "recipes are kept and shared"),
    ("seed: [1\n", "is not YAML"),
    ("? [a]\n: 1\n", "is not YAML"),
    ("seed: !!python/name:os.system\n", "is not YAML"),
    ("[" * 1200 + "]" * 1200, "is not YAML"),
]


@pytest.mark.slow
def test_what_is_no_recipe_is_refused_in_one_line(tmp_path, capsys):
    for text, message in NO_RECIPES:
        (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
        status, line, shown = said(capsys, "prune", "a", "b", "--config", tmp_path / "r.yaml")
        assert (status, message in line, TOKEN in shown) == (2, True, False), line


# What is missing


def test_a_folder_that_is_missing_is_told_at_once(hub: LoopbackHub, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    names = ["./none", "/none/at/all", "a/b/c", "none/", "~/none", "here/none", "a b", "../none/none", "x\\y"]
    words = ["prune {} o", "info {}", "eval {}", "merge {} o", "bench {}", "card {}", "push {} me/x"]
    words += ["finetune korquad {} o", "eval here --baseline {}", "prune here o --tokenizer {}"]
    for command, name in [*((words[0], name) for name in names), *((command, names[0]) for command in words)]:
        status, line, _ = said(capsys, *(word.format(name) for word in command.split()))
        assert (status, "there is no such folder" in line) == (1, True), line
    assert hub.requests == []
    assert not Path("o").exists()


def test_a_name_on_the_hub_that_cannot_be_asked_is_one_sentence(hub: LoopbackHub, monkeypatch, capsys, tmp_path):
    from huggingface_hub import constants

    hub.add_repo("org/there", {"config.json": b"{}"})
    assert "no such branch" in said(capsys, "info", "org/there", "--revision", "nope")[1]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    status, line, _ = said(capsys, "eval", "org/nothing")
    assert (status, "org/nothing" in line, "switched off" in line, len(line) < 200) == (1, True, True, True)
    (tmp_path / "file").write_text("")
    assert "is a file" in said(capsys, "info", tmp_path / "file")[1]


def test_a_dead_network_is_told_at_once_and_what_was_downloaded_is_read(hub: LoopbackHub, monkeypatch, capsys):
    from huggingface_hub import constants

    hub.add_repo("org/there", {"config.json": b"{}"})
    said(capsys, "info", "org/there")
    dead = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", dead)
    naps: list[float] = []
    monkeypatch.setattr("time.sleep", naps.append)
    for words in (["prune", "org/x", "o"], ["info", "org/x"], ["eval", "org/x"], ["merge", "org/x", "o"]):
        status, line, _ = said(capsys, *words)
        assert (status, "the Hub cannot be reached" in line) == (1, True), line
    status, line, _ = said(capsys, "info", "org/there")
    assert (status, "not a checkpoint of optimum-ksparse" in line) == (1, True), line
    assert naps == [] and not constants.HF_HUB_OFFLINE


def test_a_gated_model_is_one_sentence(hub: LoopbackHub, capsys):
    hub.add_repo("org/gated", {"config.json": b"{}"})
    hub.fail("org/gated", [403], code="GatedRepo")
    status, line, _ = said(capsys, "eval", "org/gated")
    assert (status, "accepted its terms" in line) == (1, True), line


def test_a_token_that_the_hub_does_not_accept_is_one_sentence(hub: LoopbackHub, capsys):
    hub.add_repo("org/private", {"config.json": b"{}"})
    hub.required_token = "hf_another"
    for words in (["eval", "org/private"], ["prune", "org/private", "o"], ["info", "org/private"]):
        status, line, shown = said(capsys, *words, "--token", TOKEN)
        assert (status, "does not accept the token" in line, TOKEN in shown) == (1, True, False), shown
        assert len(line) < 250


# Errors


class Failing(Command):
    def execute(self):
        raise self.args.error


ERRORS = [
    (KeyError("weight"), "KeyError: 'weight'"),
    (RuntimeError("size mismatch"), "RuntimeError: size mismatch"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "memory does not suffice"),
    (MemoryError(), "MemoryError"),
    (EOFError(), "EOFError"),
    (ValueError("Unrecognized configuration class. " + "FooConfig, " * 300), "FooConfig"),
    (
        ValueError("seq_len=512 is above num_samples; resume=False, pattern=None"),
        "--seq-len 512 is above --num-samples",
    ),
    (FileNotFoundError(2, "No such file or directory", "x.yaml"), "x.yaml: No such file or directory"),
    (OSError(f"401 for https://hub.io/?token=abc and {TOKEN}"), "token=… and hf_…"),
    (RecursionError("maximum recursion depth exceeded"), "RecursionError"),
]


def test_any_error_is_one_line_with_status_1(capsys):
    parsed = parse_words(["prune", "a", "b"])
    for error, text in ERRORS:
        parsed.args.error = error
        assert Failing(parsed.parser, parsed.args).run() == 1
        shown = capsys.readouterr().err
        assert shown.startswith("error: ") and text in shown, shown
        assert shown.count("\n") == 1 and len(shown) < 800, shown


def test_what_is_for_those_who_write_code_is_not_shown(recwarn):
    parsed = parse_words(["prune", "a", "b"])
    parsed.execute = lambda: [warnings.warn(*what, stacklevel=2) for what in (("renamed", FutureWarning), ("slow",))]
    assert parsed.run() == 0
    assert [str(warning.message) for warning in recwarn] == ["slow"]


def test_settings_are_named_as_flags_and_other_words_stay():
    flags = {name: f"--{name.replace('_', '-')}" for name in SETTINGS} | {"model": "model", "resume": "--resume"}
    flags["overwrite"] = "--overwrite"
    for python, written in {
        "dataset='x.txt': there is no such file": "--dataset 'x.txt': there is no such file",
        "resume=False starts over": "--resume false starts over",
        "name another folder, or pass overwrite=True": "name another folder, or pass --overwrite",
        "pass tokenizer=, or pattern=None": "pass --tokenizer, or --pattern none",
        'leave out dataset="self" (dataset=["a"])': 'leave out --dataset "self" (--dataset ["a"])',
        "seed must be an integer": "--seed must be an integer",
        "true_sequential must be True or False, found 'yes'": "--true-sequential must be true or false, found 'yes'",
        "model='m': there is no such folder": "model 'm': there is no such folder",
        "the dataset of a method, /a/seq_len/b, x.seq_len": "the dataset of a method, /a/seq_len/b, x.seq_len",
    }.items():
        assert describe_error(ValueError(python), flags, ["overwrite"]) == written


# Where this package cannot be loaded


@pytest.mark.processes
def test_optimum_cli_works_with_a_transformers_that_does_not_suit(tmp_path):
    paths = os.pathsep.join([str(tmp_path), str(REPOSITORY)])

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "optimum.commands.optimum_cli", *words]
        environment = {**os.environ, "PYTHONPATH": paths}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)

    (tmp_path / "transformers.py").write_text('__version__ = "4.57.3"\n')
    done = run("--help")
    assert (done.returncode, "ksparse" in done.stdout, done.stderr) == (0, True, "")
    done = run("ksparse", "info", "x")
    assert (done.returncode, "transformers>=5.17 is needed, 4.57.3 is here" in done.stderr) == (1, True), done.stderr
    (tmp_path / "transformers.py").unlink()
    (tmp_path / "torch.py").write_text('raise OSError("libcudart.so.99")\n')
    done = run("ksparse", "prune", "--help")
    assert (done.returncode, "torch>=" in done.stderr, "libcudart.so.99" in done.stderr) == (1, True, True), (
        done.stderr
    )
    assert "Traceback" not in done.stderr
