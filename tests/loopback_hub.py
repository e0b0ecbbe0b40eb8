"""A Hugging Face Hub on 127.0.0.1, in memory: answers the real clients, and fails where a test plans it.

Left out: xet, discussions other than `create_pr`, pagination, redirects to a CDN. What is not served is answered 404
and kept in `LoopbackHub.unknown`.
"""

from __future__ import annotations

import base64
import codecs
import functools
import hashlib
import json
import re
import socket
import struct
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

_LFS_SUFFIXES = {".arrow", ".bin", ".gguf", ".h5", ".jpg", ".npz", ".parquet", ".png", ".pt", ".safetensors", ".zip"}
_LFS_SIZE = 10 << 20  # bytes: larger files go by LFS whatever they hold
_DATE = "2026-01-01T00:00:00.000Z"
_TEXT_FIELDS = ("base_model", "datasets", "language", "library_name", "license", "metrics", "pipeline_tag", "tags")
_RELATIONS = ("adapter", "finetune", "merge", "quantized")


class HubError(Exception):
    """An error answer, with the headers and the body that the client turns into its own errors."""

    def __init__(self, status: int, message: str, code: str = "", commit: str = "") -> None:
        super().__init__(message)
        line = message.encode("ascii", "replace").decode()
        headers = {"X-Error-Message": line, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.reply = _json({"error": message}, status, {name: value for name, value in headers.items() if value})


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes = b""


def _json(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    return Reply(status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(value).encode())


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool

    @functools.cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        lines = ("version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}", f"size {self.size}", "")
        return "\n".join(lines).encode()

    @functools.cached_property
    def oid(self) -> str:
        """The id of the git blob: of the pointer where the content is in LFS."""
        blob = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        """What the client compares its own file with before it uploads."""
        return self.sha256 if self.lfs else self.oid

    @property
    def size(self) -> int:
        return len(self.content)

    def fields(self, checksum: str) -> dict[str, Any]:
        """Size and LFS fields; the API calls the checksum "oid" in a tree and "sha256" among the siblings."""
        lfs = {"lfs": {checksum: self.sha256, "size": self.size, "pointerSize": len(self.pointer)}} if self.lfs else {}
        return {"size": self.size, **lfs}


@dataclass(frozen=True)
class Commit:
    id: str
    parent: Commit | None
    message: str
    description: str
    files: dict[str, File]
    changed: list[str]  # paths added, replaced or deleted, sorted

    def history(self) -> list[Commit]:
        """From the first commit to this one."""
        return [*(self.parent.history() if self.parent else []), self]


class Repository:
    """Commits, refs ("refs/heads/main", "refs/tags/v1", "refs/pr/1") and LFS objects of one repository."""

    def __init__(self, kind: str, name: str, private: bool) -> None:
        self.kind, self.name, self.private = kind, name, private
        self.objects: dict[str, bytes] = {}  # by sha256
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, Commit] = {}
        self.commit("refs/heads/main", {}, "initial commit")

    def find(self, revision: str) -> Commit:
        """The commit of a branch, a tag, a full ref or a commit id."""
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.refs[ref]
        if revision not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[revision]

    def writable(self, revision: str) -> str:
        """The full name of a branch or of a pull request's ref."""
        ref = revision if revision.startswith("refs/pr/") else f"refs/heads/{revision}"
        if ref not in self.refs:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return ref

    def new_ref(self, ref: str, commit: Commit) -> str:
        if ref in self.refs:
            raise HubError(409, f"Reference {ref} already exists")
        self.refs[ref] = commit
        return ref

    def commit(self, ref: str, files: dict[str, File], message: str, description: str = "") -> Commit:
        """Puts a commit that holds exactly `files` on `ref`."""
        parent = self.refs.get(ref)
        before = parent.files if parent else {}
        content = sorted((path, file.oid) for path, file in files.items())
        name = hashlib.sha1(repr((parent and parent.id, message, content)).encode()).hexdigest()
        changed = sorted(path for path in before | files if before.get(path) != files.get(path))
        self.refs[ref] = self.commits[name] = Commit(name, parent, message, description, files, changed)
        return self.refs[ref]


@dataclass
class Request:
    """What came in; the fields after the body are filled while it is answered."""

    method: str
    target: str  # as sent: quoted, with the query
    headers: dict[str, str]  # names in lower case
    body: bytes
    groups: dict[str, str] = field(default_factory=dict)  # from the address
    repo: Repository = field(init=False, repr=False)
    commit: Commit = field(init=False, repr=False)

    @property
    def path(self) -> str:
        return unquote(self.target)

    @property
    def length(self) -> int:
        return len(self.body)

    def json(self) -> Any:
        return json.loads(self.body)

    def flag(self, name: str) -> bool:
        """Whether an option of the query is on."""
        return parse_qs(urlsplit(self.target).query).get(name, [""])[0] in ("1", "true")


def upload_mode(path: str, size: int, sample: bytes) -> str:
    """By LFS go the suffixes of the usual .gitattributes, binary files over 1 KB and very large files."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)  # a sample may end inside a character
        binary = b"\0" in sample
    except UnicodeDecodeError:
        binary = True
    large = size > _LFS_SIZE or (binary and size > 1024)
    return "lfs" if size and (large or PurePosixPath(path).suffix in _LFS_SUFFIXES) else "regular"


def tree_entries(commit: Commit, expand: bool) -> dict[str, dict[str, Any]]:
    """Every folder and file of a commit, as answers about trees and paths describe it."""
    found: dict[str, dict[str, Any]] = {}
    for path, file in sorted(commit.files.items()):
        for folder in map(str, list(PurePosixPath(path).parents)[-2::-1]):
            inside = sorted((name, f.oid) for name, f in commit.files.items() if name.startswith(f"{folder}/"))
            oid = hashlib.sha1(repr(inside).encode()).hexdigest()
            found.setdefault(folder, {"type": "directory", "path": folder, "oid": oid, "size": 0})
        found[path] = {"type": "file", "path": path, "oid": file.oid, **file.fields("oid")}
    for path, entry in found.items() if expand else ():
        touching = [c for c in commit.history() if any(f"{name}/".startswith(f"{path}/") for name in c.changed)]
        entry["lastCommit"] = {"id": touching[-1].id, "title": touching[-1].message, "date": _DATE}
    return found


def card_data(text: str) -> dict[str, Any]:
    """The front matter of a card; ValueError where the real Hub would refuse it."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*$", text, re.DOTALL | re.MULTILINE)
    try:
        data = (yaml.safe_load(match[1]) if match else None) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"YAML Metadata Error: {error}") from error
    if not isinstance(data, dict):
        raise ValueError("YAML Metadata Error: the metadata must be a mapping")
    for name in _TEXT_FIELDS:
        value = data.get(name, "")
        if not all(isinstance(item, str) for item in (value if isinstance(value, list) else [value])):
            raise ValueError(f'"{name}" must be a string or an array of strings')
    if data.get("base_model_relation", "merge") not in _RELATIONS:
        raise ValueError(f'"base_model_relation" must be one of {list(_RELATIONS)}')
    return data


def apply_changes(repo: Repository, before: dict[str, File], changes: list[dict[str, Any]]) -> dict[str, File]:
    """The files after the operations of a commit; raises, changing nothing, where one of them cannot be."""
    files = dict(before)
    for key, value in ((change["key"], change["value"]) for change in changes):
        path = value["path"].rstrip("/")
        if key == "file":
            files[path] = File(base64.b64decode(value["content"]), lfs=False)
        elif key == "lfsFile" and value["oid"] in repo.objects:
            files[path] = File(repo.objects[value["oid"]], lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            gone = [p for p in files if p == path or (key == "deletedFolder" and p.startswith(f"{path}/"))]
            if not gone:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            files = {p: file for p, file in files.items() if p not in gone}
        else:
            raise HubError(400, f"{key} {path}: an unknown operation, or an LFS object that was not uploaded")
    return files


def ranged(content: bytes, wanted: str, headers: dict[str, str]) -> Reply:
    """The content, or the part that a Range header asks for."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted)
    if not match:
        return Reply(200, headers, content)
    size, (first, last) = len(content), match.groups()
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= stop:
        return Reply(416, {**headers, "Content-Range": f"bytes */{size}"})
    return Reply(206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}, content[start:stop])


_Answer = Callable[["LoopbackHub", Request], Any]  # a Reply, or what goes out as JSON with status 200
_ROUTES: list[tuple[str, re.Pattern[str], bool, _Answer]] = []
_NAME = r"(?P<name>[^/]+(?:/[^/]+)??)"  # lazy: in "gpt2/revision/main" the name is gpt2
_API = rf"/api/(?P<kind>model|dataset)s/{_NAME}"
_SITE = rf"/(?:(?P<kind>dataset)s/)?{_NAME}"
_LFS = rf"/lfs/(?P<kind>model|dataset)s/{_NAME}/(?P<oid>[0-9a-f]{{64}})"
_REVISION = "(?P<revision>[^/]+)"


def _route(method: str, address: str, write: bool = False) -> Callable[[_Answer], _Answer]:
    def register(answer: _Answer) -> _Answer:
        _ROUTES.append((method, re.compile(address), write, answer))
        return answer

    return register


class LoopbackHub:
    """The server. To be set at will: `required_token`, `forbidden` (writes get 403), `user` (whose the token is)."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.reset()

    def start(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def reset(self) -> None:
        """Forgets repositories, planned faults, the request log, and who may do what."""
        with self._lock:
            self.user, self.forbidden = "user", False
            self.required_token: str | None = None
            self.requests: list[Request] = []  # in the order in which they came
            self.unknown: list[Request] = []  # those that nothing here answers
            self._repos: dict[tuple[str, str], Repository] = {}
            self._faults: list[tuple[re.Pattern[str], str | None, list[HubError | int]]] = []

    def add_repo(
        self, name: str, files: Mapping[str, bytes] | None = None, repo_type: str = "model", private: bool = False
    ) -> Repository:
        """A repository with an empty first commit and, where there are files, a second one that holds them."""
        with self._lock:
            self._repos[repo_type, name] = Repository(repo_type, name, private)
            if files:
                self.commit(name, files, "Add files", repo_type=repo_type)
            return self._repos[repo_type, name]

    def repo(self, name: str, repo_type: str = "model") -> Repository:
        """Raises KeyError where there is none."""
        return self._repos[repo_type, name]

    def commit(
        self, name: str, files: Mapping[str, bytes], message: str, revision: str = "main", repo_type: str = "model"
    ) -> Commit:
        """Adds or replaces files, as somebody else's commit would."""
        with self._lock:
            repo = self.repo(name, repo_type)
            new = {path: File(c, upload_mode(path, len(c), c[:512]) == "lfs") for path, c in files.items()}
            repo.objects.update({file.sha256: file.content for file in new.values() if file.lfs})
            return repo.commit(repo.writable(revision), repo.find(revision).files | new, message)

    def files(self, name: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """Path → bytes at a branch, tag, ref or commit id."""
        with self._lock:
            return {path: file.content for path, file in self.repo(name, repo_type).find(revision).files.items()}

    def commits(self, name: str, revision: str = "main", repo_type: str = "model") -> list[Commit]:
        """Oldest first; the first is the empty "initial commit"."""
        with self._lock:
            return self.repo(name, repo_type).find(revision).history()

    def fail(self, path_regex: str, statuses: list[int], method: str | None = None, code: str = "") -> None:
        """The next requests whose path (unquoted, with query) matches get these statuses, with X-Error-Code `code`."""
        plan: list[HubError | int] = [HubError(status, "planned by the test", code) for status in statuses]
        with self._lock:
            self._faults.append((re.compile(path_regex), method, plan))

    def cut(self, path_regex: str, after_bytes: int, times: int = 1, method: str = "PUT") -> None:
        """The next matching requests lose their connection: GET after that many bytes of the answer's body (closed),
        others after that many bytes of their own (reset, and nothing is stored)."""
        with self._lock:
            self._faults.append((re.compile(path_regex), method, [after_bytes] * times))

    def take_fault(self, method: str, target: str) -> HubError | int | None:
        """What is planned for a request: an error, a number of bytes to cut after, or nothing."""
        with self._lock:
            for pattern, wanted, plan in self._faults:
                if plan and wanted in (None, method) and pattern.search(unquote(target)):
                    return plan.pop(0)
        return None

    def record(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def answer(self, request: Request, fault: HubError | None) -> Reply:
        with self._lock:
            try:
                if fault:
                    raise fault
                value = self._dispatch(request)
            except HubError as error:
                return error.reply
            except Exception:  # a mistake in this file: not a status that the client retries
                return Reply(501, {}, traceback.format_exc().encode())
        return value if isinstance(value, Reply) else _json(value)

    def _dispatch(self, request: Request) -> Any:
        path = urlsplit(request.target).path
        for method, address, write, answer in _ROUTES:
            if method == request.method.replace("HEAD", "GET") and (match := address.fullmatch(path)):
                self._authorize(request, path, write)
                request.groups = {key: unquote(value) for key, value in match.groupdict().items() if value}
                if "name" in request.groups:
                    request.repo = self._find(request, request.groups.get("kind", "model"), request.groups["name"])
                    request.commit = request.repo.find(request.groups.get("revision", "main"))
                return answer(self, request)
        self.unknown.append(request)
        raise HubError(404, f"not served here: {request.method} {path}")

    def _authorize(self, request: Request, path: str, write: bool) -> None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.required_token and token and token != self.required_token:
            raise HubError(401, "Invalid credentials in Authorization header")
        if self.required_token and not token and re.match(r"/api/|.*\.git/", path):
            # From 401 alone the client concludes that a repository is missing, but only where the address is https.
            code = "RepoNotFound" if re.match("/api/(models|datasets)/", path) else ""
            raise HubError(401, "Invalid username or password.", code)
        if self.forbidden and write:
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")

    def _find(self, request: Request, kind: str, name: str) -> Repository:
        repo = self._repos.get((kind, name))
        stranger = self.required_token and "authorization" not in request.headers
        if repo is None or (repo.private and stranger and not request.target.startswith("/lfs/")):
            raise HubError(401 if stranger else 404, "Repository not found", "RepoNotFound")
        return repo

    def _address(self, repo: Repository) -> str:
        return f"{self.url}/{'datasets/' if repo.kind == 'dataset' else ''}{repo.name}"

    @_route("GET", "/api/whoami-v2")
    def _whoami(self, request: Request) -> Any:
        token = {"displayName": "test", "role": "read" if self.forbidden else "write"}
        auth = {"type": "access_token", "accessToken": token}
        return {"type": "user", "name": self.user, "fullname": self.user, "orgs": [], "auth": auth}

    @_route("POST", "/api/repos/create", write=True)
    def _create(self, request: Request) -> Any:
        wanted = request.json()
        kind, name = wanted.get("type", "model"), f"{wanted.get('organization') or self.user}/{wanted['name']}"
        if kind not in ("model", "dataset"):
            raise HubError(400, f"no repositories of type {kind} here")
        exists = (kind, name) in self._repos
        private = wanted.get("visibility") == "private" or wanted.get("private", False)
        repo = self._repos[kind, name] if exists else self.add_repo(name, None, kind, private)
        body = {"url": self._address(repo), "name": name}
        return _json({**body, "error": f"You already created this {kind} repo"}, 409) if exists else body

    @_route("POST", "/api/validate-yaml")
    def _validate_yaml(self, request: Request) -> Any:
        try:
            data = card_data(request.json()["content"])
        except ValueError as error:  # the client reads `errors` only where the status is 400
            return _json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return {"errors": [], "warnings": [] if data else [{"message": "empty or missing yaml metadata in repo card"}]}

    @_route("GET", f"{_API}(?:/revision/{_REVISION})?")
    def _info(self, request: Request) -> Any:
        repo, files = request.repo, request.commit.files
        blobs = {path: {"blobId": file.oid, **file.fields("sha256")} for path, file in files.items()}
        siblings = [{"rfilename": p, **(blobs[p] if request.flag("blobs") else {})} for p in sorted(files)]
        try:
            card = card_data(files["README.md"].content.decode()) if "README.md" in files else {}
        except ValueError:
            card = {}
        facts = {"private": repo.private, "gated": False, "disabled": False, "lastModified": _DATE}
        more = {
            "author": repo.name.split("/")[0],
            "cardData": card,
            "tags": card.get("tags", []),
            "siblings": siblings,
        }
        return {"id": repo.name, "sha": request.commit.id, **facts, **more}

    @_route("GET", f"{_API}/tree/{_REVISION}(?:/(?P<path>.+))?")
    def _tree(self, request: Request) -> Any:
        found, path = tree_entries(request.commit, request.flag("expand")), request.groups.get("path", "")
        if path and found.get(path, {}).get("type") != "directory":
            raise HubError(404, f"{path} does not exist", "EntryNotFound", request.commit.id)
        start = len(path) + 1 if path else 0
        inside = {p[start:]: entry for p, entry in found.items() if p.startswith(f"{path}/" if path else "")}
        return [entry for p, entry in inside.items() if request.flag("recursive") or "/" not in p]

    @_route("POST", f"{_API}/paths-info/{_REVISION}")
    def _paths_info(self, request: Request) -> Any:
        form = parse_qs(request.body.decode())
        found = tree_entries(request.commit, form.get("expand") == ["true"])
        return [found[path.strip("/")] for path in form.get("paths", []) if path.strip("/") in found]

    @_route("GET", f"{_API}/refs")
    def _refs(self, request: Request) -> Any:
        found: dict[str, list[dict[str, str]]] = {"heads": [], "tags": [], "pr": []}
        for ref, commit in request.repo.refs.items():
            _, group, name = ref.split("/", 2)
            found[group].append({"name": ref if group == "pr" else name, "ref": ref, "targetCommit": commit.id})
        pulls = {"pullRequests": found["pr"]} if request.flag("include_prs") else {}
        return {"branches": found["heads"], "converts": [], "tags": found["tags"], **pulls}

    @_route("POST", f"{_API}/branch/(?P<branch>[^/]+)", write=True)
    def _branch(self, request: Request) -> Any:
        start = request.repo.find(request.json().get("startingPoint", "main"))
        return request.repo.new_ref(f"refs/heads/{request.groups['branch']}", start)

    @_route("POST", f"{_API}/tag/{_REVISION}", write=True)
    def _tag(self, request: Request) -> Any:
        return request.repo.new_ref(f"refs/tags/{request.json()['tag']}", request.commit)

    @_route("POST", f"{_API}/preupload/{_REVISION}", write=True)
    def _preupload(self, request: Request) -> Any:
        answers = []
        for path, size, sample in ((item["path"], item["size"], item["sample"]) for item in request.json()["files"]):
            old = request.commit.files.get(path)
            mode = upload_mode(path, size, base64.b64decode(sample))
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": old.etag if old else None})
        return {"files": answers}

    @_route("POST", rf"{_SITE}\.git/info/lfs/objects/batch", write=True)
    def _batch(self, request: Request) -> Any:
        objects = []
        for item in request.json()["objects"]:
            href = f"{self.url}/lfs/{request.repo.kind}s/{request.repo.name}/{item['oid']}"
            actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append({**item, **({} if item["oid"] in request.repo.objects else {"actions": actions})})
        return {"transfer": "basic", "objects": objects}

    @_route("PUT", _LFS)
    def _upload(self, request: Request) -> Any:
        if hashlib.sha256(request.body).hexdigest() != request.groups["oid"]:
            raise HubError(400, "the content does not have this checksum")
        request.repo.objects[request.groups["oid"]] = request.body
        return Reply(200, {})

    @_route("POST", f"{_LFS}/verify")
    def _verify(self, request: Request) -> Any:
        content = request.repo.objects.get(request.groups["oid"])
        if content is None or len(content) != request.json()["size"]:
            raise HubError(404, "no such object of that size")
        return {}

    @_route("POST", f"{_API}/commit/{_REVISION}", write=True)
    def _commit(self, request: Request) -> Any:
        repo, base, create_pr = request.repo, request.commit, request.flag("create_pr")
        header, *changes = map(json.loads, request.body.splitlines())
        parent = header["value"].get("parentCommit")
        if create_pr and parent:
            base = repo.find(parent)
        elif parent not in (None, base.id):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = apply_changes(repo, base.files, changes)
        number = sum(name.startswith("refs/pr/") for name in repo.refs) + 1
        ref = repo.new_ref(f"refs/pr/{number}", base) if create_pr else repo.writable(request.groups["revision"])
        commit = repo.commit(ref, files, header["value"]["summary"], header["value"].get("description", ""))
        pull = {"pullRequestUrl": f"{self._address(repo)}/discussions/{number}"} if create_pr else {}
        return {"commitUrl": f"{self._address(repo)}/commit/{commit.id}", "commitOid": commit.id, **pull}

    @_route("GET", f"{_SITE}/resolve/{_REVISION}/(?P<path>.+)")
    def _resolve(self, request: Request) -> Any:
        commit, file = request.commit, request.commit.files.get(request.groups["path"])
        if file is None:
            raise HubError(404, "Entry not found", "EntryNotFound", commit.id)
        headers = {"X-Repo-Commit": commit.id, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(file.size)}
        return ranged(file.content, request.headers.get("range", ""), headers)


class _Server(ThreadingHTTPServer):
    hub: LoopbackHub
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is not worth a traceback."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _serve(self) -> None:
        hub, fault = self.server.hub, self.server.hub.take_fault(self.command, self.path)
        cut = fault if isinstance(fault, int) else None
        body = b"".join(self._body(None if self.command == "GET" else cut))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, body)
        hub.record(request)
        if cut is not None and self.command != "GET":
            self._reset()
        else:
            self._send(hub.answer(request, fault if isinstance(fault, HubError) else None), cut)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815 (names of http.server)

    def _body(self, limit: int | None) -> Iterator[bytes]:
        """The body in pieces, at most `limit` bytes of it."""
        chunked = self.headers.get("Transfer-Encoding", "").lower() == "chunked"
        while size := int(self.rfile.readline(), 16) if chunked else int(self.headers.get("Content-Length", 0)):
            yield (piece := self.rfile.read(size if limit is None else min(size, limit)))
            limit = None if limit is None else limit - len(piece)
            if not chunked or limit == 0:
                return
            self.rfile.readline()
        if chunked:
            self.rfile.readline()

    def _send(self, reply: Reply, cut: int | None) -> None:
        self.send_response_only(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body[:cut])
        self.close_connection = self.close_connection or cut is not None

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close = reset
        socket.close(self.connection.detach())
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing to standard error: `LoopbackHub.requests` is the log."""
