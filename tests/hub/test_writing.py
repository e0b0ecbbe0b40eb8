"""Card and figures in a folder: whole or as they were, and what the base's own card said."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from optimum_ksparse import SparsityConfig, sparsify, write_card
from optimum_ksparse.checkpoint import fingerprint
from optimum_ksparse.evaluation import KOBEST_TASKS, EvaluationResults
from optimum_ksparse.hub import writing
from optimum_ksparse.hub.figures import ERROR_FIGURE, RESULTS_FIGURE, draw_figures, logger
from optimum_ksparse.report import SparsityReport

from ..conftest import make_config
from ..loopback_hub import LoopbackHub
from .subjects import MARKDOWN, SECTION, body, front, kobest, make_changed, make_report, make_results, perplexity

torch.set_num_threads(1)

MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture
def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)


# --- Figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_figures_show_what_there_are_data_for_and_always_by_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    (odd := make_report()).layers[0].name = "layers.0.$x^2$_\\frac\0"
    cases: list[tuple[SparsityReport | None, EvaluationResults | None, set[str]]] = [
        (make_report(), make_results(tuned=True), {ERROR_FIGURE, RESULTS_FIGURE}),
        (make_report("magnitude"), EvaluationResults("0", [perplexity()]), set()),
        (make_changed().report, EvaluationResults("0", [perplexity(None)], [perplexity()]), set()),
        (odd, EvaluationResults("0", [kobest()], [kobest(split="validation")]), {ERROR_FIGURE}),
    ]
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)  # others import it
    contents = []
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        for number, (report, results, expected) in enumerate(cases):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of signs that the font does not have
                drawn = draw_figures(tmp_path / folder, report, results)
            there = {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
            assert set(there) == expected == {name for name, drawn_it in drawn.items() if drawn_it}
            contents.append((number, there))
    assert contents[:4] == contents[4:]
    assert "matplotlib.pyplot" not in sys.modules


def test_the_figure_shows_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    figures: list[Any] = []
    monkeypatch.setattr("optimum_ksparse.hub.figures.save_figure", lambda figure, path: figures.append(figure))
    draw_figures(tmp_path, None, make_results())
    axes = figures[0].axes
    assert [[bar.get_height() for bar in axis.patches] for axis in axes] == [[10.0, 12.5], [0.6] * 5 + [0.45] * 5]
    assert [tick.get_text() for tick in axes[1].get_xticklabels()] == list(KOBEST_TASKS)


def test_without_matplotlib_there_are_no_figures(
    tmp_path: Path, no_matplotlib: None, caplog: pytest.LogCaptureFixture
) -> None:
    logger.warning_once.cache_clear()
    for _ in range(2):
        assert not any(draw_figures(tmp_path, make_report(), make_results()).values())
    assert not list(tmp_path.iterdir())
    assert [record.levelname for record in caplog.records] == ["WARNING"]


# --- Written into a folder -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny sparse model."""
    model = AutoModelForCausalLM.from_config(make_config("llama", num_hidden_layers=1))
    sparsify(model, SparsityConfig("magnitude", "2:4"))
    folder = tmp_path_factory.mktemp("card") / "sparse"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def saved(checkpoint: Path, tmp_path: Path, no_matplotlib: None) -> tuple[PreTrainedModel, Path]:
    """The model, and a folder for its card."""
    folder = tmp_path / "a name"
    folder.mkdir()
    return AutoModelForCausalLM.from_pretrained(checkpoint), folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_write_card(checkpoint: Path, saved: tuple[PreTrainedModel, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = saved
    model.ksparse.results = make_results()
    with pytest.raises(ValueError, match="other weights"):
        write_card(model, folder)
    assert contents(folder) == {}
    model.ksparse.results.fingerprint = fingerprint(model)
    path = write_card(model, folder, repo_id="user/name", tags=["mine"])
    card = path.read_text(encoding="utf-8")
    assert "# name\n" in card and 'from_pretrained("user/name")' in card
    assert str(folder.parent) not in card
    assert front(card)["model-index"][0]["name"] == "name" and "mine" in front(card)["tags"]
    write_card(model, folder, repo_id="user/name", tags=["mine"])
    assert path.read_text(encoding="utf-8") == card
    monkeypatch.chdir(folder)
    assert "\n# a name\n" in write_card(model, ".", existing="").read_text(encoding="utf-8")


def test_a_model_without_a_head_is_not_loaded_with_one(tmp_path: Path, no_matplotlib: None) -> None:
    """A head that is not in the checkpoint would be a random one."""
    model = AutoModel.from_config(make_config("llama", num_hidden_layers=1))
    sparsify(model, SparsityConfig("magnitude", "2:4", storage="dense"))
    model.save_pretrained(tmp_path)
    card = write_card(model, tmp_path).read_text(encoding="utf-8")
    assert "AutoModelForCausalLM" not in card and "plain transformers" in card
    assert "pipeline_tag" not in front(card)


@pytest.mark.parametrize("text", [b"---\nlicense: [\n---\nMine.\n", b"\xff\xfe not UTF-8", b"Mine.\n"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_fails_leaves_the_old_card_and_no_other_file(
    saved: tuple[PreTrainedModel, Path], monkeypatch: pytest.MonkeyPatch, text: bytes, error: type[BaseException]
) -> None:
    def fail(*args: Any) -> None:
        raise error

    model, folder = saved
    (folder / "README.md").write_bytes(text)
    if text == b"Mine.\n":
        monkeypatch.setattr("os.replace" if error is OSError else "optimum_ksparse.hub.writing.render_card", fail)
    with pytest.raises((ValueError, error)):
        write_card(model, folder)
    assert contents(folder) == {"README.md": text}


@pytest.mark.parametrize("name", ['user/na"me', "user/name\n```\n# Heading", 'x")\nimport os  # ', "한글/이름"])
def test_what_cannot_be_right_is_refused(
    saved: tuple[PreTrainedModel, Path], name: str, make_model: MakeModel
) -> None:
    model, folder = saved
    for arguments in ({"repo_id": name}, {"repo_id": "user/name", "dense_revision": name}, {"language": "fr"}):
        with pytest.raises(ValueError, match=list(arguments)[-1]):
            write_card(model, folder, **arguments)
    if name == "한글/이름":
        with pytest.raises(TypeError, match="no sparse model"):
            write_card(make_model("llama"), folder)
        with pytest.raises(FileNotFoundError, match="directory=.*nowhere.*save the model there"):
            write_card(model, folder / "nowhere")
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize("name", ["# x", "a\nb", "{{ 7 }}", "\udcff"], ids=ascii)
def test_a_folder_with_a_nasty_name(saved: tuple[PreTrainedModel, Path], name: str) -> None:
    model, folder = saved
    folder = folder.rename(folder.parent / name)
    card = write_card(model, folder).read_text(encoding="utf-8")
    headings = [token for token in MARKDOWN.parse(body(card)) if token.type == "heading_open"]
    assert [token.tag for token in headings].count("h1") == len(SECTION.findall(card)) == 1


# --- The base's own card ---------------------------------------------------------------------------------------------

BASE_CARD = (
    "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\nlanguage: [ko]\ntags: [theirs]\n---\n# Base\n"
)


def prune_from(source: Any, out: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(source, sparsity_config=SparsityConfig("magnitude", "2:4"))
    model.save_pretrained(out)
    return model


@pytest.fixture
def base(make_model: MakeModel, tmp_path: Path, no_matplotlib: None) -> Path:
    make_model("llama", num_hidden_layers=1).save_pretrained(tmp_path / "my base")
    return tmp_path / "my base"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BASE_CARD, {"license": "other", "license_name": "mine", "license_link": "LICENSE", "language": ["ko"]}),
        ("---\nlicense: [a, b]\nlanguage: {a: b}\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
        (None, {}),
    ],
)
def test_a_local_base(base: Path, tmp_path: Path, text: str | None, expected: dict[str, Any]) -> None:
    if text is not None:
        (base / "README.md").write_text(text, encoding="utf-8")
    card = write_card(prune_from(base, tmp_path / "out"), tmp_path / "out").read_text(encoding="utf-8")
    keys = ("license", "license_name", "license_link", "language", "base_model", "base_model_relation")
    assert {key: front(card)[key] for key in keys if key in front(card)} == expected
    assert "my base (a local folder" in card
    assert str(tmp_path) not in card and "theirs" not in front(card)["tags"]


@pytest.mark.parametrize("text", [BASE_CARD, None])
def test_a_base_on_the_hub(base: Path, tmp_path: Path, hub: LoopbackHub, text: str | None) -> None:
    files = {path.name: path.read_bytes() for path in base.iterdir()}
    hub.add_repo("user/base_1", {**files, **({"README.md": text.encode()} if text else {})})
    commit = hub.commits("user/base_1")[-1].id
    card = write_card(prune_from("user/base_1", tmp_path / "out"), tmp_path / "out").read_text(encoding="utf-8")
    metadata = front(card)
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("user/base_1", "quantized")
    assert (metadata.get("license"), metadata.get("language")) == (("other", ["ko"]) if text else (None, None))
    assert "https://huggingface.co/user/base_1)" in card and commit in card


def test_an_adapter_on_a_sparse_model(base: Path, tmp_path: Path, hub: LoopbackHub) -> None:
    peft = pytest.importorskip("peft")
    prune_from(base, tmp_path / "sparse")
    hub.add_repo("user/sparse", {**contents(tmp_path / "sparse"), "README.md": BASE_CARD.encode()})
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained("user/sparse"), lora)
    model.save_pretrained(tmp_path / "adapter")
    assert "More Information Needed" in (tmp_path / "adapter/README.md").read_text(encoding="utf-8")
    card = write_card(model, tmp_path / "adapter").read_text(encoding="utf-8")
    assert (front(card)["base_model"], front(card)["base_model_relation"]) == ("user/sparse", "adapter")
    assert (front(card)["library_name"], front(card)["license"]) == ("peft", "other")
    assert "More Information Needed" not in card and str(tmp_path) not in card
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{trained:,}" in card and "q\\_proj, v\\_proj" in card
    assert writing.CARD_NAME in contents(tmp_path / "adapter")
