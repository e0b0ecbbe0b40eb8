"""What of other libraries is replaced: it is what it was when it was replaced, and models that are not ours pass."""

from __future__ import annotations

import builtins
import importlib
import inspect
from types import FunctionType

import peft
import pytest
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM, PreTrainedModel

from optimum_ksparse.integration import register
from optimum_ksparse.integration.patches import PATCHES, apply_patches, find

# The signatures of torch 2.13, transformers 5.23 and PEFT 0.21.2. Where one changes, read first what its wrapper does
# with it.
SIGNATURES = {
    "Module.requires_grad_": "self requires_grad",
    "PreTrainedModel.from_pretrained": "cls pretrained_model_name_or_path *model_args config cache_dir "
    "ignore_mismatched_sizes force_download local_files_only token revision use_safetensors weights_only "
    "fusion_config disable_mmap **kwargs",
    "PreTrainedModel.save_pretrained": "self save_directory is_main_process state_dict push_to_hub max_shard_size "
    "variant token save_peft_format save_original_format distributed_checkpoint **kwargs",
    "PushToHubMixin.push_to_hub": "self repo_id commit_message commit_description private token revision create_pr "
    "max_shard_size tags",
    "PreTrainedConfig.get_config_dict": "cls pretrained_model_name_or_path **kwargs",
    "AutoTokenizer.from_pretrained": "cls pretrained_model_name_or_path *inputs **kwargs",
    "PreTrainedTokenizerBase.from_pretrained": "cls pretrained_model_name_or_path *init_inputs cache_dir "
    "force_download local_files_only token revision trust_remote_code **kwargs",
    "PeftConfigMixin.from_pretrained": "cls pretrained_model_name_or_path subfolder **kwargs",
    "PeftConfigMixin._get_peft_type": "cls model_id **hf_hub_download_kwargs",
    "Trainer.__init__": "self model args data_collator train_dataset eval_dataset processing_class model_init "
    "compute_loss_func compute_metrics callbacks optimizers optimizer_cls_and_kwargs preprocess_logits_for_metrics",
    "BaseTuner.inject_adapter": "self model adapter_name autocast_adapter_dtype low_cpu_mem_usage state_dict",
    "PeftConfigMixin.from_peft_type": "cls **kwargs",
    "PeftModel.save_pretrained": "self save_directory safe_serialization selected_adapters save_embedding_layers "
    "is_main_process path_initial_model_for_weight_conversion **kwargs",
    "PeftModel.load_adapter": "self model_id adapter_name is_trainable torch_device autocast_adapter_dtype "
    "ephemeral_gpu_offload low_cpu_mem_usage key_mapping **kwargs",
    "PeftModel.get_nb_trainable_parameters": "self",
    "build_peft_weight_mapping": "weight_conversions adapter_name peft_config",
}


def parameters(function) -> str:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    found = inspect.signature(inspect.unwrap(function)).parameters.values()
    return " ".join(stars.get(parameter.kind, "") + parameter.name for parameter in found)


def test_what_is_replaced_has_the_signature_that_it_had():
    importlib.import_module("transformers.trainer")
    found = {}
    for patch in PATCHES:
        value = find(patch.target)[2]
        value = getattr(value, "__func__", value)
        if isinstance(value, FunctionType):
            assert inspect.unwrap(value) is not value, f"{patch.target} is not replaced"
            found[patch.target.partition(":")[2]] = parameters(value)
    versions = f"transformers {transformers.__version__}, PEFT {peft.__version__}"
    assert found == SIGNATURES, f"{versions} has other signatures than what was replaced in 5.23 and 0.21.2"


def test_every_replacement_has_a_reason_and_is_made_once():
    before = [find(patch.target)[2] for patch in PATCHES]
    register()
    apply_patches()
    assert [find(patch.target)[2] for patch in PATCHES] == before
    assert all(patch.reason for patch in PATCHES)
    assert len({patch.target for patch in PATCHES}) == len(PATCHES) <= 17


def test_a_library_that_lacks_a_name_is_told_of_and_left_as_it_is(monkeypatch, caplog):
    from optimum_ksparse.integration import patches

    broken = [patch._replace(target=f"{patch.target}_") for patch in PATCHES if "load_adapter" in patch.target]
    monkeypatch.setattr(patches, "PATCHES", broken)
    patches.logger.warning_once.cache_clear()
    patches._apply("peft")
    assert "cannot adapt sparse layers" in caplog.text
    monkeypatch.setattr(patches, "PATCHES", [patch._replace(target="transformers:nothing") for patch in broken])
    with pytest.raises(AttributeError):
        patches._apply(None)


def counted(calls: list, function):
    """A function that notes what it is called with."""

    def call(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, LlamaForCausalLM, AutoModelForSequenceClassification])
def test_a_model_that_is_not_ours_is_loaded_as_without_this_package(tmp_path, make_model, monkeypatch, kind):
    """The same look-ups, attributes and result; the last of these has a new head."""
    make_model("llama").save_pretrained(tmp_path)
    calls: list = []
    monkeypatch.setattr(builtins, "open", counted(calls, open))
    monkeypatch.setattr(transformers.utils.hub, "cached_files", counted(calls, transformers.utils.hub.cached_files))

    def load(**arguments):
        calls.clear()
        result = kind.from_pretrained(tmp_path, **arguments)
        model, info = result if arguments else (result, None)
        return list(calls), sorted(vars(model)), sorted(vars(model.config)), type(model), info

    requests = ({}, {"output_loading_info": True})
    ours = [load(**arguments) for arguments in requests]
    wrapped = vars(PreTrainedModel)["from_pretrained"]
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(inspect.unwrap(wrapped.__func__)))
    assert ours == [load(**arguments) for arguments in requests]
    assert len(ours[0][0]) > 2
