"""Measuring models."""

from ..checkpoint.digests import fingerprint, tensor_digests
from .baseline import Baseline, recorded_baseline, set_aside
from .environment import has_head
from .kobest import evaluate_kobest
from .kobest_data import KOBEST_TASKS
from .measure import evaluate_baseline, evaluate_model
from .nsmc import evaluate_nsmc
from .perplexity import evaluate_perplexity
from .protocol import EvaluationProtocol, check_protocol
from .results import EvaluationResults, Measurement
from .schemas import SCHEMAS
from .table import OTHER_TITLES, TASK_TITLES, result_rows, results_table
from .ties import RECORDS, TrainingRun, is_unchanged, mark_weights, note_merge, settle_records, settled_records
from .tuning import read_tuning, tuning_of, tuning_settings, tuning_title

__all__ = [
    "KOBEST_TASKS",
    "OTHER_TITLES",
    "RECORDS",
    "SCHEMAS",
    "TASK_TITLES",
    "Baseline",
    "EvaluationProtocol",
    "EvaluationResults",
    "Measurement",
    "TrainingRun",
    "check_protocol",
    "evaluate_baseline",
    "evaluate_kobest",
    "evaluate_model",
    "evaluate_nsmc",
    "evaluate_perplexity",
    "fingerprint",
    "has_head",
    "is_unchanged",
    "mark_weights",
    "note_merge",
    "read_tuning",
    "recorded_baseline",
    "result_rows",
    "results_table",
    "set_aside",
    "settle_records",
    "settled_records",
    "tensor_digests",
    "tuning_of",
    "tuning_settings",
    "tuning_title",
]
