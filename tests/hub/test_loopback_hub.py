"""The loopback Hub against the real clients: what the other tests rely on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..loopback_hub import LoopbackHub

TOKEN = "hf_loopback"
NAME = "user/name"
FILES = {"README.md": b"---\nlicense: mit\n---\n", "config.json": b"{}", "sub/a.txt": b"a", "empty": b""}


@pytest.fixture
def api() -> HfApi:
    return HfApi(token=TOKEN)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def read(folder: str | Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def test_a_folder_is_one_commit_and_comes_back_the_same(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    files = {**FILES, "model.safetensors": bytes(range(256)) * 4000}
    api.create_repo(NAME)
    for _ in range(2):  # an unchanged folder makes no commit
        api.upload_folder(repo_id=NAME, folder_path=write(tmp_path / "a", files))
    assert len(hub.commits(NAME)) == 2 and hub.files(NAME) == files
    assert read(snapshot_download(NAME, local_dir=tmp_path / "b")).items() >= files.items()
    uploads = [request for request in hub.requests if request.method == "PUT"]
    assert len(uploads) == 1 and hub.unknown == []
    assert {file.rfilename for file in api.model_info(NAME).siblings or []} == set(files)
    api.create_commit(NAME, [CommitOperationDelete("empty")], commit_message="Less")
    assert hub.commits(NAME)[-1].changed == ["empty"]


def test_a_parent_commit_must_be_the_head_and_threads_lose_nothing(hub: LoopbackHub, api: HfApi) -> None:
    api.create_repo(NAME)
    head = api.repo_info(NAME).sha
    add = [CommitOperationAdd("a", b"1")]
    api.create_commit(NAME, add, commit_message="First", parent_commit=head)
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_commit(NAME, [CommitOperationAdd("a", b"2")], commit_message="Second", parent_commit=head)
    assert caught.value.response.status_code == 412 and hub.files(NAME) == {"a": b"1"}

    def commit(number: int) -> None:
        api.create_commit(NAME, [CommitOperationAdd(f"{number}", b"x")], commit_message="One of many")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(commit, range(16)))
    assert set(hub.files(NAME)) == {"a", *map(str, range(16))}


def test_branches_and_pull_requests(hub: LoopbackHub, api: HfApi) -> None:
    hub.add_repo(NAME, FILES)
    api.create_branch(NAME, branch="other")
    api.create_commit(NAME, [CommitOperationAdd("new", b"1")], commit_message="New", revision="other")
    info = api.create_commit(NAME, [CommitOperationAdd("new", b"1")], commit_message="New", create_pr=True)
    assert info.pr_revision == "refs/pr/1"
    assert "new" in hub.files(NAME, "other") and "new" in hub.files(NAME, "refs/pr/1")
    assert hub.files(NAME) == FILES


def test_faults_come_as_planned(hub: LoopbackHub, api: HfApi, naps: list[float], tmp_path: Path) -> None:
    hub.add_repo(NAME, FILES)
    hub.fail("/preupload/", [500, 500])
    content = bytes(range(256)) * 8000
    hub.cut("^/lfs/", after_bytes=100_000)
    api.create_commit(NAME, [CommitOperationAdd("model.safetensors", content)], commit_message="Large")
    assert hub.files(NAME)["model.safetensors"] == content and naps
    hub.fail("/commit/", [500])  # the client does not try a commit again
    with pytest.raises(HfHubHTTPError):
        api.create_commit(NAME, [CommitOperationAdd("a", b"1")], commit_message="Fails")
    assert "a" not in hub.files(NAME)


def test_what_is_missing_or_forbidden(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    hub.add_repo(NAME, FILES)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("user/nothing")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(NAME, revision="nothing")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(NAME, "nothing", cache_dir=tmp_path)
    with pytest.raises((BadRequestError, ValueError)):
        api.create_commit(NAME, [CommitOperationAdd("README.md", b"---\na: [\n---\n")], commit_message="Bad card")
    hub.required_token = TOKEN
    assert api.whoami()["name"] == hub.user
    with pytest.raises(HfHubHTTPError) as caught:
        HfApi(token="hf_other").create_repo("user/new")
    assert caught.value.response.status_code == 401
    hub.required_token, hub.forbidden = None, True
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo("user/new")
    assert caught.value.response.status_code == 403


def test_transformers_loads_and_pushes(hub: LoopbackHub, make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("llama", num_hidden_layers=1)
    model.push_to_hub(NAME)
    again = AutoModelForCausalLM.from_pretrained(NAME)
    assert all((a == b).all() for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
