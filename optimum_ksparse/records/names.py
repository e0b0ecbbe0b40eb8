"""Names of the records and other files of the package that lie beside a model's weights."""

REPORT_NAME = "sparsity_report.json"
RESULTS_NAME = "evaluation_results.json"  # what was measured; see `evaluation.EvaluationResults`
TUNING_NAME = "finetuning.json"  # how a model was fine-tuned; beside the adapter or the weights
MERGE_REPORT_NAME = "merge_report.json"  # what merging an adapter did; see `finetuning.report.MergeReport`
MASKS_NAME = "ksparse_adapter.json"  # which masks an adapter was trained over; see `finetuning.masks`
HEAD_NAME = "korquad_head.safetensors"  # of a span model; see `finetuning.korquad.saving`
