"""KorQuAD's metric against the official script's figures, its data, and its windows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_ksparse.study.finetuning.korquad import WindowSettings, read_korquad, split_by_article
from optimum_ksparse.study.finetuning.korquad.features import END, SEPARATOR, collate, make_windows
from optimum_ksparse.study.finetuning.korquad.scores import exact_match, f1, korquad_scores, normalize_answer

SIGNS = "'\"《》<>〈〉()‘’"
HARD = st.text(
    st.one_of(
        st.characters(),  # surrogates, combining characters and all
        st.sampled_from(SIGNS + "!#,.-_ \t\n　“”「」ＡｂaB가각힣İßſ́ᄀ"),
    ),
    max_size=30,
)


def references(**answers):
    return [
        {"id": name, "answers": {"text": texts, "answer_start": [0] * len(texts)}} for name, texts in answers.items()
    ]


def squad(*questions, context="가나다 라마바 사아자"):
    """Data in the form of SQuAD 1.1: (id, text, start) each."""
    qas = [
        {"id": name, "question": "무엇인가?", "answers": [{"text": text, "answer_start": start}]}
        for name, text, start in questions
    ]
    return {"version": "1", "data": [{"title": "글", "paragraphs": [{"context": context, "qas": qas}]}]}


def written(folder, content):
    path = folder / "data.json"
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


# The metric


def test_the_official_scripts_figures(shared):
    oracle = json.loads((shared / "oracles/korquad_predictions.json").read_text(encoding="utf-8"))
    data = read_korquad(shared / "data/korquad/public.json")
    found = korquad_scores(oracle["predictions"], [question.reference for question in data.questions])
    assert found["exact_match"] == pytest.approx(oracle["official"]["exact_match"], abs=1e-9)
    assert found["f1"] == pytest.approx(oracle["official"]["f1"], abs=1e-9)
    assert len(oracle["predictions"]) < len(data)  # some are missing, which count 0


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("《가나》(다)", "가나 다"),
        ("‘A’<b>〈C〉\"d\"'e'", "a b c d e"),
        (" 가\t나\n\n다　라 ", "가 나 다 라"),
        ("1,000.5%", "10005"),
        ("가-나_다", "가나다"),  # dropped, not a space
        ("“가”「나」", "“가”「나」"),  # not among the signs of the script
        ("ＡＢ", "ａｂ"),
        ("!?", ""),
    ],
)
def test_normalisation(text, normal):
    assert normalize_answer(text) == normal


def test_f1_counts_characters():
    assert f1("가나다", "가나") == pytest.approx(2 * (2 / 3) / (2 / 3 + 1))
    assert f1("가가", "가") == pytest.approx(2 / 3)
    assert f1("가 나", "나가") == 1 and exact_match("가 나", "나가") == 0


def test_empty_answers_as_the_official_script():
    assert exact_match("()", "!") == 1 and f1("()", "!") == 0
    assert f1("", "가") == 0 and f1("가", "") == 0


@given(HARD, HARD)
@settings(max_examples=300)
def test_properties_of_the_metric(one, two):
    normal = normalize_answer(one)
    assert not set(normal) & set(SIGNS) and "  " not in normal and normal == normal.strip()
    assert 0 <= f1(one, two) <= 1 and exact_match(one, two) in (0, 1)
    assert f1(one, two) == f1(two, one) and exact_match(one, two) == exact_match(two, one)
    if exact_match(one, two):
        assert f1(one, two) == (1 if normal else 0)
    characters = [Counter(normalize_answer(text).replace(" ", "")) for text in (one, two)]
    assert (f1(one, two) == 1) == (characters[0] == characters[1] and bool(characters[0]))
    assert (f1(one, two) == 0) == (not characters[0] & characters[1])


@given(st.dictionaries(st.text(min_size=1, max_size=3), HARD, min_size=1, max_size=5), st.data())
@settings(max_examples=60)
def test_scores_are_means_over_all_questions(answers, data):
    predicted = {name: text for name, text in answers.items() if data.draw(st.booleans())}
    found = korquad_scores(predicted, [{"id": n, "answers": {"text": [t]}} for n, t in answers.items()])
    assert found["exact_match"] == pytest.approx(100 * len(predicted) / len(answers))
    assert 0 <= found["f1"] <= found["exact_match"] + 1e-9


def test_the_best_answer_counts_and_long_texts_are_fast():
    assert korquad_scores({"a": "나"}, references(a=["가", "나"])) == {"exact_match": 100, "f1": 100}
    assert korquad_scores({"a": "가" * 10**6}, references(a=["가"]))["f1"] < 0.01


def test_scores_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="'b' is not the id"):
        korquad_scores({"b": "가"}, references(a=["가"]))
    with pytest.raises(ValueError, match="'a' comes twice"):
        korquad_scores({}, references(a=["가"]) * 2)
    with pytest.raises(ValueError, match="'a' has no answer"):
        korquad_scores({}, references(a=[]))
    with pytest.raises(TypeError, match="'a' must be a text"):
        korquad_scores({"a": None}, references(a=["가"]))
    with pytest.raises(ValueError, match="empty"):
        korquad_scores({}, [])


def test_the_metric_of_evaluate():
    pytest.importorskip("evaluate", reason="needs the extra eval")
    import evaluate

    from optimum_ksparse.study.finetuning.korquad.scores import KorQuAD

    metric = KorQuAD()
    assert isinstance(metric, evaluate.Metric)
    predictions = [{"id": "a", "prediction_text": "가"}]
    both = references(a=["가"], b=["나"])
    assert metric.compute(predictions=predictions, references=both) == {"exact_match": 50, "f1": 50}
    metric.add_batch(predictions=predictions, references=both[:1])
    assert metric.compute() == {"exact_match": 100, "f1": 100}
    with pytest.raises(ValueError, match="'a' comes twice"):
        metric.compute(predictions=predictions * 2, references=both)
    with pytest.raises(ValueError, match="'a' is not the id"):
        metric.compute(predictions=predictions, references=both[1:])


def test_the_functions_need_no_evaluate():
    script = """
import sys
sys.modules["evaluate"] = None
from optimum_ksparse.study.finetuning.korquad import scores
assert korquad.f1("가", "가") == 1
try:
    korquad.KorQuAD
except ImportError as error:
    assert "pip install" in str(error) and "evaluate" in str(error), error
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# The data


def test_reading_mends_and_counts(tmp_path):
    content = squad(("a", "라마바", 4), ("b", "라마바", 0), ("c", "가", 3), ("d", "없음", 0), ("e", "사아자", 99))
    data = read_korquad(written(tmp_path, content))
    assert [question.span for question in data.questions] == [(4, 7), (4, 7), (0, 1), None, (8, 11)]
    assert data.mended == ["b", "c", "e"] and data.lost == ["d"] and len(data) == 5
    assert data.description["file"] == "data.json" and len(data.description["sha256"]) == 64
    assert data.questions[3].reference["answers"]["text"] == ["없음"]


def test_an_answer_that_is_there_twice_is_not_guessed(tmp_path):
    data = read_korquad(written(tmp_path, squad(("a", "가", 1), context="가나가")))
    assert data.questions[0].span is None and data.lost == ["a"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("data"), "data.json: the field 'data' must be a list"),
        (lambda d: d["data"][0].pop("paragraphs"), "article 0: the field 'paragraphs'"),
        (lambda d: d["data"][0]["paragraphs"][0].update(context=3), "article 0, paragraph 0: the field 'context'"),
        (lambda d: d["data"][0]["paragraphs"][0]["qas"][0].pop("id"), "paragraph 0, question 0: the field 'id'"),
        (lambda d: d["data"][0]["paragraphs"][0]["qas"][0].update(answers=[]), "question 0: the field 'answers'"),
        (lambda d: d["data"][0]["paragraphs"][0]["qas"].append("x"), "question 1: .*no object but str"),
        (
            lambda d: d["data"][0]["paragraphs"][0]["qas"][0]["answers"][0].update(answer_start=True),
            "question 0, answer 0: the field 'answer_start'",
        ),
        (
            lambda d: d["data"][0]["paragraphs"][0]["qas"].append(d["data"][0]["paragraphs"][0]["qas"][0]),
            "question 1: the id 'a' comes twice",
        ),
        (lambda d: d["data"].clear(), "holds no questions"),
    ],
)
def test_damaged_data_are_named(tmp_path, change, message):
    content = squad(("a", "가", 0))
    change(content)
    with pytest.raises(ValueError, match=message):
        read_korquad(written(tmp_path, content))


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        read_korquad("none.json")
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.json is not JSON"):
        read_korquad(tmp_path / "broken.json")


def test_the_hubs_form(monkeypatch):
    datasets = pytest.importorskip("datasets")
    answers = {"text": ["나"], "answer_start": [1]}
    rows = [{"id": "a", "title": "글", "context": "가나", "question": "?", "answers": answers}]
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = read_korquad(split="train")
    assert asked == [("KorQuAD/squad_kor_v1", "train")] and data.split == "train"
    assert data.questions[0].span == (1, 2) and data.questions[0].article == "글"
    assert data.description["name"] == "KorQuAD/squad_kor_v1" and len(data.description["sha256"]) == 64
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: 1 / 0)
    with pytest.raises(ConnectionError, match="KorQuAD/squad_kor_v1, validation.*pass train_file"):
        read_korquad()


def test_articles_are_split_whole(shared):
    data = read_korquad(shared / "data/korquad/public.json")
    assert (len(data), data.mended, data.lost) == (4051, [], [])
    train, test = split_by_article(data, seed=1)
    articles = [{question.article for question in part.questions} for part in (train, test)]
    assert list(map(len, articles)) == [80, 20] and not articles[0] & articles[1]
    assert len(train) + len(test) == len(data)
    again = split_by_article(data, seed=1)[0]
    assert again.questions == train.questions and split_by_article(data, seed=2)[0].questions != train.questions
    with pytest.raises(ValueError, match="share=1.0"):
        split_by_article(data, 1.0)


# The windows


@pytest.fixture
def asking(tokenizer, tmp_path):
    """A tokenizer that knows the two tokens."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    own = type(tokenizer).from_pretrained(tmp_path / "tokenizer")
    own.add_tokens([SEPARATOR, END], special_tokens=True)
    return own


def test_windows_hold_the_question_and_all_of_the_paragraph(asking, shared):
    data = read_korquad(shared / "data/korquad/public.json")
    how = WindowSettings(seq_len=128, max_question_tokens=30, stride=40, prepend_bos=True)
    questions = data.questions[:12]
    windows = make_windows(questions, asking, how)
    for number, question in enumerate(questions):
        own = [window for window in windows if window.question == number]
        asked = asking(question.question, add_special_tokens=False)["input_ids"][:30]
        head = [asking.bos_token_id, *asked, asking.convert_tokens_to_ids(SEPARATOR)]
        covered = set()
        for window in own:
            assert window.ids[: window.first] == head and len(window) <= 128
            assert window.ids[-1] == asking.convert_tokens_to_ids(END)
            assert len(window.offsets) == len(window) - window.first - 1
            covered |= {character for a, b in window.offsets for character in range(a, b)}
            if window.start == len(window) - 1:
                assert window.end == window.start
                continue
            first, last = (window.offsets[p - window.first] for p in (window.start, window.end))
            assert question.context[first[0] : last[1]].strip() == question.answers[0]
        assert covered == set(range(len(question.context)))
        assert any(window.start != len(window) - 1 for window in own)
    longest = [window for window in windows if window.question == 0]
    assert len(longest) > 2 and longest[1].offsets[0] == longest[0].offsets[40]


def test_special_tokens_in_a_text_are_text(asking, tmp_path):
    context = f"가{SEPARATOR}나다</s>라"
    data = read_korquad(written(tmp_path, squad(("a", "나다", 1 + len(SEPARATOR)), context=context)))
    (window,) = make_windows(data.questions, asking, WindowSettings(prepend_bos=False))
    special = [asking.convert_tokens_to_ids(token) for token in (SEPARATOR, END)]
    assert [window.ids.count(token) for token in special] == [1, 1] and asking.eos_token_id not in window.ids


def test_answers_that_share_a_token_and_lost_ones(asking, tmp_path):
    data = read_korquad(written(tmp_path, squad(("a", "없", 0), context="가나다")))
    (window,) = make_windows(data.questions, asking, WindowSettings(prepend_bos=False))
    assert window.start is None
    batch = collate([window], 0)
    assert "start_positions" not in batch and batch["span_mask"].sum() == len(window.offsets) + 1


def test_window_settings_are_checked(asking, tokenizer, make_model):
    with pytest.raises(ValueError, match=r"seq_len=64 has no room .* at least 107"):
        WindowSettings(seq_len=64)
    with pytest.raises(TypeError, match="stride"):
        WindowSettings(stride=1.5)
    model = make_model("llama")
    fitted = WindowSettings.for_model(model, tokenizer)
    assert (fitted.seq_len, fitted.max_question_tokens, fitted.prepend_bos) == (64, 16, False)
    with pytest.raises(ValueError, match="above the model's context of 64"):
        WindowSettings.for_model(model, tokenizer, seq_len=200)
    with pytest.raises(ValueError, match="lacks"):
        make_windows([], tokenizer, WindowSettings())
