"""`KorQuAD`, the metric of KorQuAD 1.0 for the library `evaluate`, which this module imports."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from .scores import korquad_scores

_DESCRIPTION = "Exact match and F1 over characters, in per cent, as the official script of KorQuAD 1.0."
_CITATION = """@article{lim2019korquad1,
  title={KorQuAD1.0: Korean QA Dataset for Machine Reading Comprehension},
  author={Lim, Seungyoung and Kim, Myungji and Lee, Jooyoul},
  journal={arXiv preprint arXiv:1909.07005},
  year={2019}
}"""


class KorQuAD(evaluate.Metric):
    """Exact match and F1 over characters of KorQuAD 1.0; reads no network.

    `compute(predictions=..., references=...)` takes SQuAD's form, predictions as `{"id", "prediction_text"}` and
    references as `{"id", "answers": {"text": [...], "answer_start": [...]}}`, and returns `exact_match` and `f1` in
    per cent. There may be fewer predictions than references: a question without one counts 0.

    Raises:
        ValueError: an id comes twice, or is predicted and not asked.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        answers = datasets.Sequence({"text": text, "answer_start": datasets.Value("int32")})
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=self.__doc__,
            features=datasets.Features(
                {
                    "predictions": {"id": text, "prediction_text": text},
                    "references": {"id": text, "answers": answers},
                }
            ),
            reference_urls=["https://korquad.github.io/KorQuad%201.0/"],
        )

    def _download_and_prepare(self, dl_manager: Any) -> None:
        """There is nothing to download."""

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float] | None:
        """As of `evaluate.Metric`, which wants as many predictions as references."""
        whole = predictions is not None and references is not None and self.writer is None
        if whole and self.num_process == 1:
            return self._compute(predictions, references, **kwargs)
        found: dict[str, float] | None = super().compute(predictions=predictions, references=references, **kwargs)
        return found

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        texts: dict[str, str] = {}
        for row in predictions:
            if row["id"] in texts:
                raise ValueError(f"predictions: the id {row['id']!r} comes twice")
            texts[row["id"]] = row["prediction_text"]
        return korquad_scores(texts, references)
