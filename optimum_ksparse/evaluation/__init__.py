"""Measuring models."""

from .baseline import Baseline, choose_baseline, recorded_baseline, set_aside
from .harness import HarnessTask
from .kobest import KOBEST_TASKS, STUDY_TASKS
from .measure import evaluate_baseline, evaluate_kobest, evaluate_model
from .perplexity import evaluate_perplexity
from .protocol import EvaluationProtocol, check_protocol
from .results import EvaluationResults, Measurement
from .speed import SPEED
from .table import ResultRow, result_rows, results_table
from .tasks import TASKS, HubEntry, Task, add_task, task_of
from .ties import TrainingRun, adapted_fingerprint, mark_weights, note_merge, settle_records, settled_records
from .tuning import read_tuning, tuning_settings, tuning_title
