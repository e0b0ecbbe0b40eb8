"""The loopback Hub against the real clients: huggingface_hub, transformers and datasets."""

from __future__ import annotations

import http.client
import io
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..loopback_hub import LoopbackHub

TOKEN = "hf_loopback"
CARD = b"---\nlicense: apache-2.0\ntags:\n- test\n---\n# Card\n"
SMALL = {
    "README.md": CARD,
    "config.json": b"{}",
    "sub/folder/a.txt": b"a",
    "한글 이름.txt": "글".encode(),
    "empty": b"",
}

MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture
def api() -> HfApi:
    return HfApi(token=TOKEN)


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds for which the client would have slept before it tried again."""
    seconds: list[float] = []
    for module in ("utils._http", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", SimpleNamespace(sleep=seconds.append))
    return seconds


def weights(seed: int = 0, size: int = 3_000_000) -> bytes:
    return (
        torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)).numpy().tobytes()
    )


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def read(folder: str | Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def sent(hub: LoopbackHub, method: str, part: str = "") -> list[str]:
    return [request.path for request in hub.requests if request.method == method and part in request.path]


# --- Uploads and downloads -------------------------------------------------------------------------------------------


def test_folder_is_one_commit_and_comes_back_the_same(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    files = {**SMALL, "model.safetensors": weights()}
    assert api.create_repo("user/name").repo_id == "user/name"
    done = api.upload_folder(repo_id="user/name", folder_path=write(tmp_path / "up", files), commit_message="All")
    assert hub.files("user/name") == files
    first, commit = hub.commits("user/name")
    assert (first.files, commit.id, commit.message, commit.changed) == ({}, done.oid, "All", sorted(files))
    assert [path for path, file in commit.files.items() if file.lfs] == ["model.safetensors"]
    assert [request.length for request in hub.requests if request.method == "PUT"] == [3_000_000]
    assert all(("authorization" in request.headers) == (request.method != "PUT") for request in hub.requests)
    assert read(snapshot_download("user/name", cache_dir=tmp_path / "other")) == files
    assert hub.unknown == []


def test_unchanged_folder_makes_no_commit_and_a_changed_file_only_itself(
    hub: LoopbackHub, api: HfApi, tmp_path: Path
) -> None:
    hub.add_repo("user/name", {**SMALL, "model.safetensors": weights(), "photo.png": b"png"})
    folder = write(tmp_path, {**SMALL, "model.safetensors": weights(), "photo.png": b"png"})
    head = hub.commits("user/name")[-1].id
    assert api.upload_folder(repo_id="user/name", folder_path=folder).oid == head
    assert sent(hub, "PUT") == sent(hub, "POST", "/commit/") == []
    write(tmp_path, {"config.json": b'{"a": 1}'})
    done = api.upload_folder(repo_id="user/name", folder_path=folder)
    assert [commit.changed for commit in hub.commits("user/name")[2:]] == [["config.json"]]
    assert hub.files("user/name", revision=done.oid)["config.json"] == b'{"a": 1}'
    assert hub.files("user/name", revision=head)["config.json"] == b"{}"


@pytest.mark.parametrize(
    ("path", "content", "lfs"),
    [
        ("a.safetensors", b"a", True),
        ("a.safetensors", b"", False),  # the client sends empty files as regular ones
        ("a.dat", b"\0" * 1024, False),
        ("a.dat", b"\0" * 1025, True),
        ("a.json", b"x" + "글".encode() * 1000, False),  # the sample of 512 bytes ends inside a character
        ("a.txt", b"a" * (11 << 20), True),
    ],
)
def test_upload_mode(path: str, content: bytes, lfs: bool, hub: LoopbackHub, api: HfApi) -> None:
    hub.add_repo("user/name")
    for _ in range(2):
        api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id="user/name")
    assert len(hub.commits("user/name")) == 2
    file = hub.repo("user/name").find("main").files[path]
    assert (file.content, file.lfs) == (content, lfs)


def test_object_that_is_present_is_not_sent_again(hub: LoopbackHub, api: HfApi) -> None:
    hub.add_repo("user/name", {"a.bin": weights()})
    api.upload_file(path_or_fileobj=weights(), path_in_repo="b.bin", repo_id="user/name")
    assert sent(hub, "PUT") == []
    assert hub.files("user/name") == {"a.bin": weights(), "b.bin": weights()}


def test_copies_and_deletions(hub: LoopbackHub, api: HfApi) -> None:
    hub.add_repo("user/name", {"a.bin": b"binary", "a.txt": b"text", "d/e/f": b"1", "d/g": b"2"})
    operations = [
        CommitOperationCopy("a.bin", "b.bin"),
        CommitOperationCopy("a.txt", "b.txt"),
        CommitOperationDelete("a.txt"),
        CommitOperationDelete("d/"),
    ]
    api.create_commit("user/name", operations, commit_message="Move")
    assert hub.files("user/name") == {"a.bin": b"binary", "b.bin": b"binary", "b.txt": b"text"}
    assert hub.commits("user/name")[-1].changed == ["a.txt", "b.bin", "b.txt", "d/e/f", "d/g"]
    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        api.delete_file("nothing", "user/name")


def test_threads_that_commit_at_once_lose_nothing(hub: LoopbackHub, api: HfApi) -> None:
    hub.add_repo("user/name")

    def upload(i: int) -> None:
        api.upload_file(path_or_fileobj=b"\0%d" % i * 1000, path_in_repo=f"{i}.bin", repo_id="user/name")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(upload, range(16)))
    assert hub.files("user/name") == {f"{i}.bin": b"\0%d" % i * 1000 for i in range(16)}
    assert len(hub.commits("user/name")) == 17


def test_body_in_chunks(hub: LoopbackHub) -> None:
    file = hub.add_repo("user/name", {"a.bin": b"12345678"}).find("main").files["a.bin"]
    hub.repo("user/name").objects.clear()
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"))
    for _ in range(2):  # the second one on the same connection
        address = f"/lfs/models/user/name/{file.sha256}"
        connection.request("PUT", address, iter([b"1234", b"5678"]), encode_chunked=True)
        reply = connection.getresponse()
        assert (reply.status, reply.read()) == (200, b"")
    connection.close()
    assert hub.repo("user/name").objects == {file.sha256: b"12345678"}


# --- What the API says -----------------------------------------------------------------------------------------------


def test_listing(hub: LoopbackHub, api: HfApi) -> None:
    hub.add_repo("user/name", {**SMALL, "sub/b.bin": b"bin"}, private=True)
    hub.commit("user/name", {"config.json": b"[]"}, "Second")
    info = api.model_info("user/name", files_metadata=True)
    assert (info.sha, info.private, info.card_data.license, info.tags) == (
        hub.commits("user/name")[-1].id,
        True,
        "apache-2.0",
        ["test"],
    )
    assert sorted(api.list_repo_files("user/name")) == sorted([*SMALL, "sub/b.bin"])
    sizes = {sibling.rfilename: (sibling.size, sibling.lfs and sibling.lfs.size) for sibling in info.siblings}
    assert sizes["sub/b.bin"] == (3, 3)
    assert sizes["config.json"] == (2, None)
    assert [entry.path for entry in api.list_repo_tree("user/name", "sub")] == ["sub/b.bin", "sub/folder"]
    deep = api.list_repo_tree("user/name", "sub", recursive=True, expand=True)
    assert [entry.path for entry in deep] == ["sub/b.bin", "sub/folder", "sub/folder/a.txt"]
    found = api.get_paths_info("user/name", ["sub", "config.json", "nothing"], expand=True)
    assert [(entry.path, entry.last_commit.title) for entry in found] == [
        ("sub", "Add files"),
        ("config.json", "Second"),
    ]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("user/name", "su"))


def test_who_and_repositories(hub: LoopbackHub, api: HfApi) -> None:
    hub.user = "somebody"
    assert api.whoami()["name"] == "somebody"
    assert api.create_repo("name", private=True, repo_type="dataset").repo_id == "somebody/name"
    assert hub.repo("somebody/name", "dataset").private
    with pytest.raises(HfHubHTTPError, match="already created this dataset"):
        api.create_repo("somebody/name", repo_type="dataset")
    assert api.create_repo("somebody/name", repo_type="dataset", exist_ok=True).repo_type == "dataset"
    assert not api.repo_exists("somebody/name")


def test_branches_tags_and_pull_requests(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    hub.add_repo("user/name", {"a.txt": b"1"})
    api.create_branch("user/name", branch="feature/이름", exist_ok=True)
    api.create_branch("user/name", branch="feature/이름", exist_ok=True)
    api.upload_file(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id="user/name", revision="feature/이름")
    api.create_tag("user/name", tag="v1", revision="feature/이름")
    folder = write(tmp_path / "up", {"a.txt": b"3"})
    pull = api.upload_folder(repo_id="user/name", folder_path=folder, create_pr=True, commit_message="Change")
    assert (pull.pr_num, pull.pr_revision) == (1, "refs/pr/1")
    revisions = ("main", "feature/이름", "v1", "refs/pr/1", pull.oid)
    assert [hub.files("user/name", revision)["a.txt"] for revision in revisions] == [b"1", b"2", b"2", b"3", b"3"]
    for revision, content in zip(revisions, (b"1", b"2", b"2", b"3", b"3"), strict=True):
        path = hf_hub_download("user/name", "a.txt", revision=revision, cache_dir=tmp_path / "cache")
        assert Path(path).read_bytes() == content
    refs = api.list_repo_refs("user/name", include_pull_requests=True)
    assert [branch.name for branch in refs.branches] == ["main", "feature/이름"]
    assert [tag.name for tag in refs.tags] == ["v1"]
    assert [(request.ref, request.target_commit) for request in refs.pull_requests] == [("refs/pr/1", pull.oid)]
    api.upload_file(path_or_fileobj=b"4", path_in_repo="a.txt", repo_id="user/name", revision="refs/pr/1")
    assert hub.files("user/name", "refs/pr/1")["a.txt"] == b"4"


def test_parent_commit_must_be_the_head(hub: LoopbackHub, api: HfApi) -> None:
    old = hub.add_repo("user/name", {"a.txt": b"1"}).find("main").id
    head = hub.commit("user/name", {"a.txt": b"2"}, "Somebody else's").id
    upload = {"path_or_fileobj": b"3", "path_in_repo": "a.txt", "repo_id": "user/name"}
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        api.upload_file(**upload, parent_commit=old)
    assert caught.value.response.status_code == 412
    assert hub.files("user/name") == {"a.txt": b"2"}
    api.upload_file(**upload, parent_commit=head)
    assert hub.files("user/name") == {"a.txt": b"3"}


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("---\na: [\n---\n", "YAML Metadata Error"),
        ("---\n- a\n---\n", "must be a mapping"),
        ("---\nlanguage: no\n---\n", '"language" must be a string'),
        ("---\ntags: [1.0]\n---\n", '"tags" must be a string'),
        ("---\nbase_model_relation: pruned\n---\n", '"base_model_relation" must be one of'),
    ],
)
def test_bad_card_is_refused_before_anything_is_sent(card: str, message: str, hub: LoopbackHub, api: HfApi) -> None:
    hub.add_repo("user/name")
    with pytest.raises(ValueError, match=message):
        api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id="user/name")
    assert sent(hub, "POST") == ["/api/validate-yaml"]


def test_card_without_metadata_is_a_warning(hub: LoopbackHub, api: HfApi) -> None:
    hub.add_repo("user/name")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(path_or_fileobj=b"# Card", path_in_repo="README.md", repo_id="user/name")
    assert hub.files("user/name") == {"README.md": b"# Card"}


# --- transformers and datasets ---------------------------------------------------------------------------------------


def test_transformers_loads_and_pushes(
    hub: LoopbackHub,
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerBase,
    token_ids: torch.Tensor,
    tmp_path: Path,
) -> None:
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    hub.add_repo("user/name", read(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained("user/name")
    assert torch.equal(loaded(token_ids).logits, model(token_ids).logits)
    assert AutoTokenizer.from_pretrained("user/name")("한국어")["input_ids"] == tokenizer("한국어")["input_ids"]
    loaded.push_to_hub("user/other", token=TOKEN, private=True)
    assert {"config.json", "model.safetensors", "README.md"} <= set(hub.files("user/other"))
    again = AutoModelForCausalLM.from_pretrained("user/other", revision=hub.commits("user/other")[-1].id)
    assert torch.equal(again(token_ids).logits, model(token_ids).logits)
    assert hub.unknown == []


KOBEST = {"boolq": ["paragraph", "question", "label"], "copa": ["premise", "question", "label"]}
SPLITS = {"train": 3, "validation": 2, "test": 1}


def kobest_rows(configuration: str, split: str) -> list[dict[str, object]]:
    *texts, label = KOBEST[configuration]
    return [{**{name: f"{split} {name} {i} 한국어" for name in texts}, label: i % 2} for i in range(SPLITS[split])]


@pytest.fixture
def kobest(hub: LoopbackHub) -> str:
    """Laid out like skt/kobest_v1."""
    configs = []
    files = {}
    for name in KOBEST:
        configs.append(
            {"config_name": name, "data_files": [{"split": s, "path": f"{name}/{s}.jsonl"} for s in SPLITS]}
        )
        for split in SPLITS:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in kobest_rows(name, split)]
            files[f"{name}/{split}.jsonl"] = "".join(lines).encode()
    card = f"---\n{yaml.safe_dump({'language': 'ko', 'configs': configs})}---\n# KoBEST\n"
    hub.add_repo("skt/kobest_v1", {"README.md": card.encode(), **files}, "dataset")
    return "skt/kobest_v1"


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_by_configuration_and_split(kobest: str, streaming: bool, hub: LoopbackHub, tmp_path: Path) -> None:
    for name in KOBEST:
        found = datasets.load_dataset(kobest, name, streaming=streaming, cache_dir=tmp_path)
        assert {split: list(rows) for split, rows in found.items()} == {s: kobest_rows(name, s) for s in SPLITS}
    rows = datasets.load_dataset(kobest, "copa", split="test", streaming=streaming, cache_dir=tmp_path)
    assert list(rows) == kobest_rows("copa", "test")
    with pytest.raises(ValueError, match="BuilderConfig 'nothing' not found"):
        datasets.load_dataset(kobest, "nothing", streaming=streaming, cache_dir=tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_with_a_folder_for_each_configuration(
    streaming: bool, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 s after each shuffled parquet stream
    texts = {name: [f"{name} 문서 {i}" for i in range(50)] for name in ("20231101.en", "20231101.ko")}
    files = {}
    for name, column in texts.items():
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), buffer := io.BytesIO())
        files[f"{name}/train-00000-of-00001.parquet"] = buffer.getvalue()
    configs = [{"config_name": name, "data_files": [{"split": "train", "path": f"{name}/*"}]} for name in texts]
    files["README.md"] = f"---\n{yaml.safe_dump({'configs': configs})}---\n".encode()
    hub.add_repo("wikimedia/wikipedia", files, "dataset")
    where = {"split": "train", "streaming": streaming, "cache_dir": tmp_path}
    rows = datasets.load_dataset("wikimedia/wikipedia", "20231101.ko", **where)
    assert [row["text"] for row in rows] == texts["20231101.ko"]
    if streaming:
        shuffled = rows.shuffle(seed=0, buffer_size=20)
        assert sorted(row["text"] for row in shuffled) == sorted(texts["20231101.ko"])
        assert {path.split("/")[-2] for path in sent(hub, "GET", ".parquet")} == {"20231101.ko"}
    with pytest.raises(datasets.exceptions.DatasetNotFoundError, match="'wikimedia/nothing' doesn't exist"):
        datasets.load_dataset("wikimedia/nothing", **where)


# --- Faults ----------------------------------------------------------------------------------------------------------


def test_two_errors_then_an_answer(hub: LoopbackHub, api: HfApi, naps: list[float]) -> None:
    hub.add_repo("user/name")
    hub.fail(r"/preupload/", [500, 503])
    hub.fail(r"^/lfs/", [429], method="PUT")
    api.upload_file(path_or_fileobj=weights(), path_in_repo="a.bin", repo_id="user/name")
    assert naps == [1, 2, 1]
    assert len(sent(hub, "POST", "/preupload/")) == 3
    assert len(sent(hub, "PUT")) == 2
    assert hub.files("user/name") == {"a.bin": weights()}


def test_commit_is_not_tried_again(hub: LoopbackHub, api: HfApi, naps: list[float]) -> None:
    hub.add_repo("user/name")
    hub.fail(r"/commit/main", [500])
    with pytest.raises(HfHubHTTPError, match="(?s)500 .*planned by the test"):
        api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="user/name")
    assert (naps, len(hub.commits("user/name"))) == ([], 1)


def test_upload_that_loses_its_connection_is_tried_again(hub: LoopbackHub, api: HfApi, naps: list[float]) -> None:
    hub.add_repo("user/name")
    hub.cut("^/lfs/", after_bytes=1_000_000, times=2)
    api.upload_file(path_or_fileobj=weights(), path_in_repo="a.bin", repo_id="user/name")
    assert [request.length for request in hub.requests if request.method == "PUT"] == [1_000_000, 1_000_000, 3_000_000]
    assert naps == [1, 2]
    assert hub.files("user/name") == {"a.bin": weights()}


def test_upload_that_always_loses_its_connection_commits_nothing(
    hub: LoopbackHub, api: HfApi, naps: list[float], tmp_path: Path
) -> None:
    hub.add_repo("user/name", {"a.txt": b"old"})
    hub.cut("^/lfs/", after_bytes=1_000_000, times=6)
    folder = write(tmp_path, {"a.bin": weights(), "a.txt": b"new"})
    with pytest.raises(RuntimeError, match="Error while uploading 'a.bin' to the Hub") as caught:
        api.upload_folder(repo_id="user/name", folder_path=folder)
    assert isinstance(caught.value.__cause__, HTTPError)
    assert naps == [1, 2, 4, 8, 8]
    assert (hub.files("user/name"), hub.repo("user/name").objects) == ({"a.txt": b"old"}, {})
    api.upload_folder(repo_id="user/name", folder_path=folder)
    assert hub.files("user/name") == read(tmp_path)


def test_download_that_loses_its_connection_goes_on(
    hub: LoopbackHub, naps: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1_000_000)  # what came of an unfinished chunk is lost
    hub.add_repo("user/name", {"a.bin": weights()})
    hub.cut("resolve/main/a.bin", after_bytes=2_500_000, method="GET")
    path = hf_hub_download("user/name", "a.bin", cache_dir=tmp_path)
    assert Path(path).read_bytes() == weights()
    downloads = [request.headers.get("range") for request in hub.requests if request.method == "GET"]
    assert (downloads, naps) == ([None, "bytes=2000000-"], [1])


@pytest.mark.parametrize(
    ("wanted", "status", "part"),
    [
        ("bytes=2-4", 206, b"234"),
        ("bytes=7-99", 206, b"789"),
        ("bytes=-3", 206, b"789"),
        ("bytes=10-", 416, b""),
        ("lines=1-2", 200, b"0123456789"),
    ],
)
def test_range(wanted: str, status: int, part: bytes, hub: LoopbackHub) -> None:
    hub.add_repo("user/name", {"a.txt": b"0123456789"})
    found = get_session().get(f"{hub.url}/user/name/resolve/main/a.txt", headers={"Range": wanted})
    assert (found.status_code, found.content) == (status, part)


# --- Who may, and what is missing ------------------------------------------------------------------------------------


def test_required_token(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    hub.required_token = TOKEN
    hub.add_repo("user/name", {"a.txt": b"1"})
    hub.add_repo("user/private", {"a.txt": b"1"}, private=True)
    assert api.whoami()["name"] == "user"
    for name in ("user/name", "user/private"):
        assert Path(hf_hub_download(name, "a.txt", token=TOKEN, cache_dir=tmp_path)).read_bytes() == b"1"
    hf_hub_download("user/name", "a.txt", token=False, cache_dir=tmp_path / "anonymous")
    with pytest.raises(RepositoryNotFoundError, match="401 "):
        hf_hub_download("user/private", "a.txt", token=False, cache_dir=tmp_path / "anonymous")
    upload = {"path_or_fileobj": b"2", "path_in_repo": "a.txt", "repo_id": "user/name"}
    with pytest.raises(RepositoryNotFoundError, match="(?s)401 .*Invalid username or password"):
        api.upload_file(**upload, token=False)
    for call in (HfApi(token="hf_wrong").whoami, lambda: api.upload_file(**upload, token="hf_wrong")):
        with pytest.raises(HfHubHTTPError, match="Invalid") as caught:
            call()
        assert caught.value.response.status_code == 401
        assert not isinstance(caught.value, RepositoryNotFoundError)
    with pytest.raises(HfHubHTTPError, match="Invalid username or password"):
        api.create_repo("user/other", token=False)
    assert hub.files("user/name") == {"a.txt": b"1"}
    api.upload_file(**upload)
    assert hub.files("user/name") == {"a.txt": b"2"}


def test_forbidden(hub: LoopbackHub, api: HfApi) -> None:
    hub.add_repo("user/name", {"a.txt": b"1"})
    hub.forbidden = True
    for write_to in (
        lambda: api.create_repo("user/other", exist_ok=True),
        lambda: api.upload_file(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id="user/name"),
        lambda: api.create_branch("user/name", branch="other"),
        lambda: api.create_tag("user/name", tag="v1"),
    ):
        with pytest.raises(HfHubHTTPError, match="403 Forbidden: .*you must use a write token"):
            write_to()
    assert api.create_repo("user/name", exist_ok=True).repo_id == "user/name"
    assert api.file_exists("user/name", "a.txt")
    assert list(hub.repo("user/name").refs) == ["refs/heads/main"]
    assert hub.files("user/name") == {"a.txt": b"1"}


def test_gated(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add_repo("user/name", {"a.txt": b"1"})
    hub.fail("/resolve/", [403], code="GatedRepo")
    with pytest.raises(GatedRepoError):
        hf_hub_download("user/name", "a.txt", cache_dir=tmp_path)


def test_missing(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    hub.add_repo("user/name", {"a.txt": b"1"})
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("user/name", "b.txt", cache_dir=tmp_path)
    head = hub.commits("user/name")[-1].id  # the client keeps a note of it only if the answer names the commit
    assert (tmp_path / f"models--user--name/.no_exist/{head}/b.txt").exists()
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("user/name", "a.txt", revision="other", cache_dir=tmp_path)
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("user/other", "a.txt", cache_dir=tmp_path)
    upload = {"path_or_fileobj": b"1", "path_in_repo": "a"}
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(**upload, repo_id="user/name", revision="other")
    with pytest.raises(RepositoryNotFoundError):
        api.upload_file(**upload, repo_id="user/other")
    with pytest.raises(OSError, match="user/other is not a local folder and is not a valid model identifier"):
        AutoModelForCausalLM.from_pretrained("user/other")
    assert not api.revision_exists("user/name", "other")
    assert hub.unknown == []


def test_object_that_was_not_uploaded_cannot_be_committed(hub: LoopbackHub, api: HfApi) -> None:
    hub.add_repo("user/name")
    operation = CommitOperationAdd("a.bin", b"binary")
    api.preupload_lfs_files("user/name", [operation], free_memory=False)
    hub.repo("user/name").objects.clear()
    with pytest.raises(BadRequestError, match="an LFS object that was not uploaded"):
        api.create_commit("user/name", [operation], commit_message="Add")
    assert hub.files("user/name") == {}


def test_what_is_not_served_is_kept(hub: LoopbackHub, api: HfApi) -> None:
    with pytest.raises(HfHubHTTPError, match="not served here: GET /api/spaces/user/name"):
        api.space_info("user/name")
    assert [request.path for request in hub.unknown] == ["/api/spaces/user/name"]
    hub.reset()
    assert hub.requests == hub.unknown == []


def test_processes_of_a_test_talk_to_it(hub: LoopbackHub) -> None:
    hub.add_repo("user/name", {"a.txt": b"from the loopback"})
    code = "from huggingface_hub import hf_hub_download as get; print(open(get('user/name', 'a.txt')).read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "from the loopback\n"
    assert "HF_HUB_OFFLINE" not in os.environ


def test_start_and_stop() -> None:
    other = LoopbackHub().start()
    other.add_repo("user/name", {"a.txt": b"1"})
    address = f"{other.url}/user/name/resolve/main/a.txt"
    assert urllib.request.urlopen(address).read() == b"1"
    other.stop()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address)
