"""A Hub or a network that fails, and interrupts: one commit, or nothing at all."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from transformers import PreTrainedModel

from optimum_ksparse import SparsityConfig, sparsify

from ..loopback_hub import LoopbackHub
from .pushes import NAME, QUICK, card_of, make_dense, metadata, pushed, read

pytest.importorskip("matplotlib", reason="needs the extra plot")

# kind of request → path, method
REQUESTS: dict[str, tuple[str, str]] = {
    "create": ("^/api/repos/create", "POST"),
    "branch": ("/branch/", "POST"),
    "info": (r"^/api/models/user/name(/revision/.*)?$", "GET"),
    "card": ("/resolve/.*/README.md", "GET"),
    "preupload": ("/preupload/", "POST"),
    "batch": ("/objects/batch", "POST"),
    "upload": ("^/lfs/", "PUT"),
    "commit": ("/commit/", "POST"),
}


@pytest.mark.slow
def test_an_error_that_stays(
    hub: LoopbackHub, quick: PreTrainedModel, simple: Path, naps: list[float], scratch: Path
) -> None:
    before = read(simple)
    hub.add_repo(NAME, {"README.md": b"# Theirs\n"})
    cases = [(kind, 500, ConnectionError) for kind in REQUESTS]
    # Another status is another sentence, wherever it comes from.
    cases += [("info", 401, PermissionError), ("commit", 403, PermissionError)]
    for kind, status, error in cases:
        path, method = REQUESTS[kind]
        hub.fail(path, [status] * 1000, method=method)
        with pytest.raises(error, match=NAME):
            quick.push_to_hub(NAME, revision="other")
        hub._faults.clear()
    assert [len(hub.commits(NAME, ref.removeprefix("refs/heads/"))) for ref in hub.repo(NAME).refs] in ([2], [2, 2])
    assert read(simple) == before and list(scratch.iterdir()) == []
    quick.push_to_hub(NAME, revision="other")
    assert set(hub.files(NAME, "other")) == QUICK


def test_an_upload_that_breaks_off(hub: LoopbackHub, naps: list[float], scratch: Path) -> None:
    model = make_dense(hidden_size=256, intermediate_size=1024)
    sparsify(model, SparsityConfig("magnitude", "2:4"))
    hub.cut("^/lfs/", after_bytes=200_000, times=1000)
    with pytest.raises(ConnectionError, match=NAME):
        model.push_to_hub(NAME, tokenizer=False)
    assert (pushed(hub), hub.repo(NAME).objects, list(scratch.iterdir())) == ([], {}, [])
    hub._faults.clear()
    hub.cut("^/lfs/", after_bytes=200_000)  # once: the client tries again
    model.push_to_hub(NAME, tokenizer=False)
    assert len(pushed(hub)) == 1


def test_a_hub_that_is_not_there(hub: LoopbackHub, quick: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("optimum_ksparse.hub.push.HfApi", lambda **kwargs: HfApi("http://127.0.0.1:9", **kwargs))
    with pytest.raises(ConnectionError, match="ConnectError"):
        quick.push_to_hub(NAME)
    assert hub.requests == []


@pytest.mark.parametrize("times", [1, 3])
def test_somebody_else_commits_in_between(
    times: int, hub: LoopbackHub, quick: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo(NAME, {"README.md": b"# Old\n"})
    original, calls = HfApi.create_commit, []

    def create_commit(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) <= times:
            theirs = f"---\nlicense: mit\n---\n# Theirs {len(calls)}\n".encode()
            hub.commit(NAME, {"README.md": theirs, "notes.md": b"theirs"}, "Theirs")
        return original(*args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    if times == 3:
        with pytest.raises(ConnectionError, match=NAME):
            quick.push_to_hub(NAME)
        assert {commit.message for commit in pushed(hub)} == {"Add files", "Theirs"}
        return
    quick.push_to_hub(NAME)
    assert [commit.message for commit in pushed(hub)] == ["Add files", "Theirs", "Upload sparse model"]
    assert "# Old" not in card_of(hub) and card_of(hub).count("# Theirs") == 1
    assert metadata(hub)["license"] == "mit" and set(hub.files(NAME)) == QUICK | {"notes.md"}


def test_a_commit_whose_answer_is_lost_is_not_made_twice(
    hub: LoopbackHub, quick: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = HfApi.create_commit

    def create_commit(*args: Any, **kwargs: Any) -> Any:
        original(*args, **kwargs)
        raise HTTPError("the answer was lost")

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    with pytest.raises(ConnectionError, match="push again"):
        quick.push_to_hub(NAME)
    monkeypatch.setattr(HfApi, "create_commit", original)
    info = quick.push_to_hub(NAME)
    assert [commit.id for commit in pushed(hub)] == [info.oid]


INTERRUPTED = {
    "saving": "transformers.modeling_utils.safe_save_file",
    "the card": "optimum_ksparse.hub.push.write_card_of",
    "the upload": "huggingface_hub._commit_api._upload_lfs_files",
    "the commit": "huggingface_hub._commit_api._send_commit",
}


@pytest.mark.parametrize(("place", "fatal"), [*((place, 1) for place in INTERRUPTED), ("the commit", 2)])
def test_interrupt(
    place: str, fatal: int, hub: LoopbackHub, quick: PreTrainedModel, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first commit, or in that of the dense variant: what was committed before stays whole."""
    path, calls = INTERRUPTED[place], []
    module, name = path.rsplit(".", 1)
    original = getattr(importlib.import_module(module), name)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == fatal:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(path, interrupted)
    with pytest.raises(KeyboardInterrupt):
        quick.push_to_hub(NAME, dense_revision="dense")
    assert [len(pushed(hub)), len(pushed(hub, revision="dense"))] == [fatal - 1, 0]
    assert list(scratch.iterdir()) == [] and quick.config.quantization_config.storage == "packed"
    quick.push_to_hub(NAME, dense_revision="dense")
    assert [len(pushed(hub)), len(pushed(hub, revision="dense"))] == [1, 1]
