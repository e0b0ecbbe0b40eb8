"""The Space on two tiny models: in a browser two answers stream, nothing fails and nothing comes from elsewhere; two
users are served at once; its limits hold, and no file is read by its path."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
import torch
import yaml
from packaging.requirements import Requirement

from optimum_ksparse import SparsityConfig, evaluate_perplexity, sparsify

from ..conftest import REPOSITORY

pytest.importorskip("gradio", reason="needs the extra space")
gradio_client = pytest.importorskip("gradio_client")
httpx = pytest.importorskip("httpx")

pytestmark = pytest.mark.filterwarnings("ignore::Warning:gradio")  # of what pandas will do
SPACE = REPOSITORY / "examples/space"
HERE = {"127.0.0.1", "localhost", "::1", "", None}


@pytest.fixture(scope="module")
def app() -> ModuleType:
    spec = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def load(app: ModuleType, make_model: Callable, tokenizer: Any, token_ids: torch.Tensor, tmp_path_factory: Any) -> Any:
    """Saves a tiny model, pruned by a method where one is given, and loads it as the app does."""

    def load(method: str | None = None, **settings: Any) -> Any:
        folder, model = tmp_path_factory.mktemp("model"), make_model("llama", max_position_embeddings=512)
        if method:
            sparsify(model, SparsityConfig(method, **{"pattern": "2:4", "dataset": token_ids, **settings}))
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
        return app.Side(str(folder))

    return load


@pytest.fixture(scope="module")
def sides(load: Any) -> Any:
    """A dense model, and what a method without data, which knows no output errors, made of it."""
    return load(), load("magnitude")


@pytest.fixture(scope="module")
def asked() -> Iterator[set[Any]]:
    """Hosts that this process looks up or connects to."""
    hosts: set[Any] = set()
    ended = threading.Event()

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.getaddrinfo" and not ended.is_set():
            hosts.add(arguments[0].decode() if isinstance(arguments[0], bytes) else arguments[0])
        elif event == "socket.connect" and isinstance(arguments[1], tuple) and not ended.is_set():
            hosts.add(arguments[1][0])

    sys.addaudithook(note)  # nothing takes it away again
    yield hosts
    ended.set()


@pytest.fixture(scope="module")
def address(app: ModuleType, sides: Any, asked: set[Any]) -> Iterator[str]:
    page = app.build(*sides)
    yield app.serve(page, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1").rstrip("/")
    page.close()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """A headless Chromium with logs of its console and its network."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium, of the extra dev")
    programs = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    program, driver = next(filter(None, programs), None), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("needs Chromium with its driver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1200,1400"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chromium = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chromium
    chromium.quit()


def until(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """What the condition gives, as soon as it is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.05)
    return found


WATCH = """
window.lengths = [];
setInterval(() => window.lengths.push([...document.querySelectorAll("#dense textarea, #sparse textarea")]
    .map(area => area.value.length)), 2);
"""


@pytest.mark.processes
def test_two_answers_stream_in_a_browser(browser: Any, address: str, asked: set[Any]) -> None:
    def find(selector: str) -> Any:
        return until(lambda: browser.find_elements("css selector", selector), selector)[0]

    browser.get(address)
    beginning = find("#beginning textarea")
    beginning.clear()
    beginning.send_keys("도서관은")
    browser.execute_script(WATCH)
    find("#write").click()
    until(lambda: "× dense" in find("#sparse-speed").text, "the speed of the sparse model")
    find("#measure").click()
    until(lambda: "× dense" in find("#sparse-perplexity").text, "the perplexity of the sparse model")
    for name in ("dense", "sparse"):
        assert find(f"#{name} textarea").get_property("value").startswith("도서관은")
    assert browser.find_elements("css selector", "#mask img[alt]")
    until(lambda: len(browser.find_elements("css selector", "#errors td")) == 2 * 7, "the errors of 14 layers")
    # Both grow a little at a time, and at the same time.
    lengths = browser.execute_script("return window.lengths")
    seen = [len({row[i] for row in lengths}) for i in range(2)]
    assert min(seen) > 3
    assert any(0 < first < max(row[0] for row in lengths) and second > 0 for first, second in lengths)

    assert [line for line in browser.get_log("browser") if line["level"] in ("SEVERE", "WARNING")] == []
    events = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert len(urls) > 5
    hosts = {urlsplit(url).hostname for url in urls if url.startswith(("http", "ws"))}
    assert hosts == {"127.0.0.1"}
    assert "127.0.0.1" in asked and asked <= HERE


def client(address: str) -> Any:
    return gradio_client.Client(address, verbose=False, analytics_enabled=False)


def test_two_users_are_served_at_once(address: str, sides: Any) -> None:
    beginnings = ["도서관은 언덕 끝에", "김치는"]
    alone = [tuple(list(side.write(text, 64))[-1][0] for side in sides) for text in beginnings]
    clients = [client(address) for _ in beginnings]
    ready = threading.Barrier(2)
    seen: dict[str, list[tuple[float, Any]]] = {}

    def use(client: Any, beginning: str) -> None:
        ready.wait()
        job = client.submit(beginning, 64, api_name="/write")
        seen[beginning] = [(time.monotonic(), shown) for shown in job]

    threads = [threading.Thread(target=use, args=pair) for pair in zip(clients, beginnings, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [seen[text][-1][1][:2] for text in beginnings] == alone
    first, second = (seen[text] for text in beginnings)
    assert first[0][0] < second[-1][0] and second[0][0] < first[-1][0]  # neither waited for the other's end


def test_it_writes_as_generate_does_and_says_how_fast(sides: Any) -> None:
    for side in sides:
        inputs = side.tokenizer("도서관은", return_tensors="pt", return_token_type_ids=False)
        written = side.model.generate(**inputs, max_new_tokens=24, do_sample=False, repetition_penalty=1.2)
        steps = list(side.write("도서관은", 24))
        assert steps[-1][0] == side.tokenizer.decode(written[0], skip_special_tokens=True).rstrip("\ufffd")
        assert steps[0][1] is None and all(speed > 0 for _, speed in steps[1:])


def test_perplexity_is_of_the_first_tokens_alone(app: ModuleType, sides: Any, address: str) -> None:
    for text in (app.TEXT, app.TEXT * 5):
        *_, (first, second, _) = client(address).submit(text, api_name="/measure")
        for side, shown in zip(sides, (first, second), strict=True):
            most = app.MOST_TEXT_TOKENS
            exact = evaluate_perplexity(side.model, side.tokenizer, [text], seq_len=most, max_tokens=most)
            assert f"<b>{exact['perplexity']:.1f}</b>" in shown


def test_output_errors_are_those_of_the_report(app: ModuleType, make_model: Callable, token_ids: torch.Tensor) -> None:
    model, dense = make_model("gpt_neox"), make_model("gpt_neox")
    # On the dense model's inputs, as they are measured: later blocks are not yet fed by sparse ones.
    report = sparsify(model, SparsityConfig("wanda", "2:4", dataset=token_ids, true_sequential=False))
    layers = {name: part for name, part in model.named_modules() if isinstance(part, app.SparseLinear)}
    with torch.no_grad(), app.output_errors(dense, layers) as errors:
        for row in token_ids.split(2):
            dense(row)
    assert sorted(name.removeprefix("gpt_neox.") for name in errors) == sorted(row.name for row in report.layers)
    first = {f"gpt_neox.{row.name}": row.relative_output_error for row in report.layers if ".0." in row.name}
    assert {name: errors[name] for name in first} == pytest.approx(first, rel=1e-4)


def test_layers_of_unequal_density_are_shown(app: ModuleType, sides: Any, load: Any) -> None:
    sparse = load("wanda", pattern="50%", allocation="owl", values="int8")
    layers = [part for part in sparse.model.modules() if isinstance(part, app.SparseLinear)]
    most, least = (choose(layers, key=lambda layer: layer.density) for choose in (max, min))
    assert most.density > least.density
    shown = [str(part.value) for part in app.build(sides[0], sparse).blocks.values() if hasattr(part, "value")]
    assert sum(f"**{most.pattern} … {least.pattern}**" in text for text in shown) == 1
    assert sum(text.count("<img") for text in shown) == 2


def test_known_output_errors_are_shown_from_the_start(app: ModuleType, sides: Any, load: Any) -> None:
    sparse = load("wanda")
    (shown,) = (part.value for part in app.build(sides[0], sparse).blocks.values() if part.elem_id == "errors")
    known = [f">{round(100 * row.relative_output_error)}<" for row in sparse.model.sparsity_report.layers]
    assert len(known) == shown.count("<td") == 14 and all(error in shown for error in known)


@pytest.mark.parametrize(
    "call",
    [
        ("/write", " ", 8),
        ("/write", "가" * 301, 8),
        ("/write", "가", 1000),
        ("/measure", "가" * 2001),
        ("/measure", "a"),
        ("/mask", "../app.py"),
    ],
    ids=str,
)
def test_what_is_beyond_a_limit_is_refused(address: str, call: tuple[Any, ...]) -> None:
    with pytest.raises(gradio_client.exceptions.AppError):
        client(address).predict(*call[1:], api_name=call[0])


def test_no_file_is_read_by_its_path(address: str, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    paths = [SPACE / "app.py", tmp_path / "secret.txt", "examples/space/app.py", "/etc/hostname", "../../etc/hostname"]
    for path in paths:
        for route in ("file=", "file/", "proxy=", "stream/"):
            answer = httpx.get(f"{address}/gradio_api/{route}{quote(str(path))}")
            assert 400 <= answer.status_code < 500, (route, path)
    for path in ("/static/", "/assets/", "/svelte/"):
        assert 400 <= httpx.get(f"{address}{path}{quote('../' * 9, safe='')}etc/hostname").status_code < 500
    *_, written = client(address).submit({"path": "/etc/hostname"}, 8, api_name="/write")
    assert written[0].startswith("{'path':")  # text as any other
    sent = httpx.post(f"{address}/gradio_api/upload", files={"files": ("a.txt", b"more than a byte")})
    assert sent.status_code == 413


def test_a_dense_model_as_the_sparse_one_is_refused(app: ModuleType, sides: Any) -> None:
    with pytest.raises(ValueError, match="SparseLinear"):
        app.build(sides[0], sides[0])


def test_models_are_named_by_arguments_the_environment_or_the_demo(
    app: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "HERE", tmp_path / "examples/space")
    for name in ("DENSE_MODEL", "SPARSE_MODEL"):
        monkeypatch.delenv(name, raising=False)
    for arguments in ([], ["one"], ["one", "two", "three"]):
        with pytest.raises(SystemExit, match="DENSE_MODEL"):
            app.named(arguments)
    app.HERE.mkdir(parents=True)
    demo = [tmp_path / ".demo" / name for name in ("gemma-3-270m", "sparse")]
    for folder in demo:
        folder.mkdir(parents=True)
    assert [Path(source).resolve() for source in app.named([])] == demo
    monkeypatch.setenv("DENSE_MODEL", "a/dense")
    with pytest.raises(SystemExit):
        app.named([])
    monkeypatch.setenv("SPARSE_MODEL", "a/sparse")
    assert app.named([]) == ["a/dense", "a/sparse"]
    assert app.named(["one", "two"]) == ["one", "two"]


def test_the_hub_runs_what_was_tested() -> None:
    head = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert head["sdk"] == "gradio" and (SPACE / head["app_file"]).is_file()
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (gradio,) = map(Requirement, extras["optional-dependencies"]["space"])
    assert gradio.name == "gradio" and head["sdk_version"] in gradio.specifier
    lines = (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    (needed,) = (Requirement(line) for line in lines if not line.startswith("#"))
    assert (needed.name, needed.extras) == ("optimum-ksparse", {"space"})
    assert needed.url  # on an index the name may be somebody else's
    assert head["python_version"] in Requirement(f"python{extras['requires-python']}").specifier
