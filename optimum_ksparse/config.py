"""`SparsityConfig`: what the user asks for. Data and validation, no behaviour."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypedDict

from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checks import check_boolean, check_integer, check_keys, check_names, check_number, check_one_of, check_share
from .dataset import (
    check_dataset,
    describe_dataset,
    is_mix,
    is_token_ids,
    mix_shares,
    recorded_dataset,
    token_ids_shape,
)
from .kernels import KERNELS
from .pattern import Pattern
from .pruners import METHODS, REFINEMENTS, statistics_of
from .pruners.allocation import ALLOCATIONS, check_allocation
from .pruners.statistics import ColumnNorms, GramMatrix
from .records import Count, PatternText, build, check_depth, printable
from .records.redaction import check_no_token

QUANT_METHOD = "optimum-ksparse"
_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
# Where `config.json` of a dense-stored sparse checkpoint keeps the settings. Under `sparsity_config` the Auto classes
# would choke on the keyword argument of that name.
DENSE_CONFIG_KEY = "ksparse"
STORAGES = ("packed", "dense")

CALIBRATION_DTYPES = ("bfloat16", "float16")
ACTIVATIONS = ("pruned", "dense", "mixed")
RECONSTRUCTIONS = ("block",)
AUTO = "auto"  # a method that stands for the best of all within a time
OBJECTIVES = ("memory", "speed")
DENSIFY = ("never", "lazy")
# Setting → its values, where they are a few.
CHOICES: dict[str, tuple[str, ...]] = {
    "method": (*METHODS, AUTO),
    "refine": tuple(REFINEMENTS),
    "reconstruct": RECONSTRUCTIONS,
    "activations": ACTIVATIONS,
    "allocation": tuple(ALLOCATIONS),
    "calibration_dtype": CALIBRATION_DTYPES,
    "storage": STORAGES,
    "kernel": ("auto", *KERNELS),
    "optimize_for": OBJECTIVES,
    "densify": DENSIFY,
}

# How a loaded model computes: chosen at each load, never saved.
EXECUTION_SETTINGS = ("kernel", "optimize_for", "max_extra_bytes", "densify", "fuse")
# Settings of the run, not of what was asked for: they may differ when a sparse checkpoint is loaded again.
RUN_TIME_SETTINGS = ("batch_size", "storage", *EXECUTION_SETTINGS)
# What a checkpoint records of its tensors, beside what was asked for.
RECORDED = ("layers", "names")
MODULE_NAMES = "modules"


class LayerRecord(TypedDict):
    """What `config.json` says of a sparse layer."""

    pattern: PatternText
    num_values: Count


class SparsityConfig(QuantizationConfigMixin):
    """How to prune a model, and how to store it.

    Args:
        method: `"admm"` (weights and mask together: more accurate than SparseGPT, in up to 1.5 times its time),
            `"sparsegpt"`, `"alps"` (slow), `"wanda"` (fast; weights stay as they are), `"magnitude"` (which reads no
            data), or `"auto"`: all are tried on one block, and what does best on calibration samples that it has not
            seen, and fits `time_budget`, is taken.
        time_budget: with `method="auto"`: seconds that pruning may take on this machine; None: any.
        pattern: `"2:4"`, `"4:8"`, any `"n:m"` (n nonzero weights in every m), a fraction of zeros (`"50%"`, `0.5`), or
            that fraction of whole blocks of r outputs x c inputs (`"50%/32x32"`), by the sum of the method's scores in
            each, over the layer (`sparsegpt`: over each `block_size` columns).
        allocation: `"uniform"` gives every layer the pattern. `"owl"` gives each its own, from what a pass of the
            calibration data through the dense model measures (the time of one more forward pass): with a fraction of
            zeros each decoder block its own, with the same mean (OWL); with `n:m` some layers stay dense, and `2n:2m`
            takes the place of `n:m`, which has the same size and loses less, unless that has no kernels.
        target_density: with `allocation="owl"` and `n:m`: the most that may be stored of the weights to prune, as a
            mean share in which dense layers count as 1.
        dataset: calibration text: `"mc4-ko"`, `"c4"`, `"kowiki"` (streamed from the Hub), `"self"` (the model writes
            its own), a path to a `.txt` (paragraphs apart by blank lines) or `.jsonl` file, a list of texts, a
            `datasets.Dataset` with a `text` or `messages` column, or token ids [num_samples, seq_len], used as they
            are. Or a mix of names and files with weights that sum to one, `{"mc4-ko": 0.5, "self": 0.5}`: the samples
            are shared out by them, and shuffled with the seed.
        tokenizer: name, folder or object; None takes the model's own.
        num_samples: calibration sequences.
        seq_len: tokens in each of them, the beginning token included. Unless it is passed, the model's context where
            that is shorter.
        batch_size: calibration sequences in one forward pass.
        calibration_dtype: dtype of the matrix products while calibration tokens run through the model; None: that of
            the weights. `"bfloat16"` makes such products of a float32 model twice as fast on some CPUs that have the
            instructions (on an AMD EPYC pruning Gemma 3 270M takes a fifth to a quarter less time), and slower on
            others (an Intel Xeon without AMX); the statistics, the pruning and the weights stay float32.
        seed: draws documents, crops and generated text.
        refine: what follows the method on the same statistics, one or several in their order: `"swaps"` (SparseSwaps:
            a better mask, weight for weight), `"exact"` (the weights of least output error on the mask).
        reconstruct: `"block"`: when the layers of a decoder block are pruned, its kept weights, biases and norms are
            tuned together so that the block gives what the dense one gave. Several times as long, much more accurate.
        reconstruction_epochs: passes over the calibration samples for that.
        reconstruction_lr: learning rate at its height, as a share of the root mean square of each tensor.
        activations: what the calibration inputs of a block are, and whose outputs it is to give: `"pruned"` (the model
            pruned so far, for both), `"dense"` (the dense model, for both) or `"mixed"` (the inputs of the pruned
            model, the outputs of the dense one). None takes what was measured to be best: `"pruned"` for layers,
            `"mixed"` for reconstruction.
        block_size: columns that `sparsegpt` sweeps before it updates the rest; `m`, or the columns of a block, must
            divide it.
        damping: share of the mean diagonal that is added to the diagonal of the Gram matrix; None takes the method's
            own (0.01 for `sparsegpt` and `alps`, 0.1 for `admm`).
        iterations: of `admm` (20) and at most of `alps` (300).
        true_sequential: collect statistics anew for each group of layers inside a block (q, k, v, then o, …), with the
            groups before it pruned. Slower: one forward pass of the block for each group.
        modules_to_not_convert: names, suffixes or regular expressions of linear maps in the blocks to leave dense.
        skip_unsupported: leave what cannot be pruned dense and list it in the report, instead of raising.
        prune_routers: prune the layers that route tokens to experts as well, which otherwise stay dense.
        storage: `"packed"` (0.5625 of the dense bytes at 50 % in 16 bit; needs this plugin to load) or `"dense"`
            (zeros written out; loads everywhere).
        prepend_bos: begin each calibration sequence with the beginning token; None does so where the tokenizer does.
        bos_in_statistics: count the beginning token's position in the statistics.
        kernel: what computes the sparse layers: `"auto"` (what is measured to be fastest), or one by name (see
            `optimum-cli ksparse bench`); the environment variable `KSPARSE_KERNEL` wins over it. This setting and the
            next four say how a loaded model runs; they are chosen anew at each load and not saved.
        optimize_for: `"memory"` keeps at most 0.65 of a layer's dense bytes on the GPU; `"speed"` may keep a second
            form of a layer (dense, or the sparse library's) where it was measured to be faster.
        max_extra_bytes: the most that `"speed"` may add to the whole model; None sets no limit.
        densify: `"lazy"` keeps every layer dense in memory from its first forward pass on, which is the right choice
            where there are no kernels (CPUs, older GPUs) and memory is no concern; `"never"` does not.
        fuse: run layers of a block that read the same input (q, k, v; gate, up) as one product, where that gives the
            same bits.
        layers: filled in when a model has been pruned: for each sparse layer its path in the decoder, pattern and
            number of values. Not for users.
        names: filled in as well: `"modules"` where the tensors of a packed checkpoint have the names of the model's
            modules; None in earlier ones, whose tensors may have others. Not for users.

    Raises:
        TypeError, ValueError: names the argument, what was found and what is allowed.
        FileNotFoundError: the calibration file is missing.
    """

    _given: set[str]

    def __new__(cls, *args: Any, **kwargs: Any) -> SparsityConfig:
        # For a checkpoint that is sparse already only what was given must agree with what it was pruned with.
        config = super().__new__(cls)
        config._given = {*SETTINGS[: len(args)], *kwargs}
        return config

    def __init__(
        self,
        method: str = "admm",
        pattern: str | float | Pattern = "2:4",
        dataset: Any = "mc4-ko",
        tokenizer: Any = None,
        num_samples: int = 128,
        seq_len: int = 2048,
        batch_size: int = 1,
        seed: int = 0,
        block_size: int = 128,
        damping: float | None = None,
        true_sequential: bool = False,
        modules_to_not_convert: Sequence[str] | None = None,
        skip_unsupported: bool = False,
        storage: str = "packed",
        prepend_bos: bool | None = None,
        bos_in_statistics: bool = True,
        calibration_dtype: str | None = None,
        kernel: str = "auto",
        optimize_for: str = "memory",
        max_extra_bytes: int | None = None,
        densify: str = "never",
        fuse: bool = False,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        allocation: str = "uniform",
        target_density: float | None = None,
        time_budget: float | None = None,
        refine: str | Sequence[str] | None = None,
        reconstruct: str | None = None,
        reconstruction_epochs: int = 4,
        reconstruction_lr: float = 0.01,
        activations: str | None = None,
        iterations: int | None = None,
        names: str | None = None,
        prune_routers: bool = False,
    ) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.method = _choice("method", method)
        self.time_budget = None if time_budget is None else check_number("time_budget", time_budget, 0, 1e9)
        if self.time_budget is not None and self.method != AUTO:
            raise ValueError(f"time_budget={time_budget} is for method={AUTO!r}; method={method!r} takes its time")
        self.pattern = str(Pattern(pattern))
        for name, value in (("dataset", dataset), ("tokenizer", tokenizer)):
            check_no_token(name, value)
        self.dataset = dataset
        self.tokenizer = _tokenizer("tokenizer", tokenizer)
        self.num_samples = check_integer("num_samples", num_samples, 1)
        self.seq_len = check_integer("seq_len", seq_len, 2)
        self.batch_size = check_integer("batch_size", batch_size, 1)
        self.calibration_dtype = None if calibration_dtype is None else _choice("calibration_dtype", calibration_dtype)
        self.seed = check_integer("seed", seed, 0)
        self.block_size = check_integer("block_size", block_size, 1)
        self.damping = None if damping is None else check_number("damping", damping, 0, 1)
        self.iterations = None if iterations is None else check_integer("iterations", iterations, 1)
        self.refine = _refinements("refine", refine)
        self.reconstruct = None if reconstruct is None else _choice("reconstruct", reconstruct)
        self.reconstruction_epochs = check_integer("reconstruction_epochs", reconstruction_epochs, 1)
        self.reconstruction_lr = check_number("reconstruction_lr", reconstruction_lr, 0, 1)
        self.activations = None if activations is None else _choice("activations", activations)
        if self.activations == "mixed" and self.reconstruct is None and self.method != AUTO:
            raise ValueError(
                "activations='mixed' gives a block the inputs of the pruned model and the outputs of the dense one to "
                "aim at, which reconstruct='block' alone does: add it, or pass 'pruned' or 'dense'"
            )
        self.true_sequential = check_boolean("true_sequential", true_sequential)
        self.modules_to_not_convert = check_names("modules_to_not_convert", modules_to_not_convert)
        self.skip_unsupported = check_boolean("skip_unsupported", skip_unsupported)
        self.prune_routers = check_boolean("prune_routers", prune_routers)
        self.storage = _choice("storage", storage)
        self.prepend_bos = prepend_bos if prepend_bos is None else check_boolean("prepend_bos", prepend_bos)
        self.bos_in_statistics = check_boolean("bos_in_statistics", bos_in_statistics)
        self.kernel = _choice("kernel", kernel)
        self.optimize_for = _choice("optimize_for", optimize_for)
        self.max_extra_bytes = (
            max_extra_bytes if max_extra_bytes is None else check_integer("max_extra_bytes", max_extra_bytes, 0)
        )
        self.densify = _choice("densify", densify)
        self.fuse = check_boolean("fuse", fuse)
        self.allocation = _choice("allocation", allocation)
        self.target_density = None if target_density is None else check_share("target_density", target_density)
        self.layers = None if layers is None else {name: dict(layer) for name, layer in layers.items()}
        self.names = None if names is None else check_one_of("names", names, (MODULE_NAMES,))

        self._check_pattern(Pattern(self.pattern))
        check_allocation(self.allocation, Pattern(self.pattern), self.target_density, self.needs_data)
        if dataset is not None or self.needs_data:
            check_dataset(dataset)
        if is_mix(dataset):
            mix_shares(dataset, self.num_samples)  # raises where a part would get no sample
        # Now, because a file may be gone when the pruned model is saved.
        self._description = describe_dataset(dataset)
        if is_token_ids(dataset):
            self.num_samples, self.seq_len = token_ids_shape(dataset)

    def _check_pattern(self, pattern: Pattern) -> None:
        """Raises ValueError where the method cannot make the pattern."""
        if self.method == "sparsegpt" and self.block_size % pattern.width:
            what = f"m={pattern.m}" if pattern.block is None else f"the {pattern.width} columns of a block"
            raise ValueError(f"block_size={self.block_size} is not a multiple of {what} of pattern={self.pattern!r}")
        if pattern.block is not None and "swaps" in self.refine:
            raise ValueError(
                f"refine='swaps' exchanges single weights, and pattern={self.pattern!r} keeps whole blocks: leave it "
                "out; refine='exact' works on any mask"
            )

    @property
    def given(self) -> set[str]:
        """Names of the settings that were passed; the others have their defaults."""
        return set(self._given)

    @property
    def statistics(self) -> type[ColumnNorms] | None:
        """What is to be collected of each layer's inputs; None where the method reads no data."""
        return GramMatrix if self.method == AUTO else statistics_of(self.method, self.refine)

    @property
    def pruner_settings(self) -> dict[str, Any]:
        """What `pruners.prune` takes besides method, weight, statistics and pattern."""
        return {"refine": self.refine, **{name: getattr(self, name) for name in METHODS[self.method].settings}}

    @property
    def unread(self) -> dict[str, Any]:
        """Settings, by name, that neither the method nor reconstruction reads; none for `auto`, which may come to read
        any."""
        if self.method == AUTO:
            return {}
        names = {name for method in METHODS.values() for name in method.settings}
        names -= set(METHODS[self.method].settings)
        names |= set() if self.reconstruct else {"reconstruction_epochs", "reconstruction_lr"}
        return {name: getattr(self, name) for name in sorted(names)}

    @property
    def needs_data(self) -> bool:
        """Whether calibration tokens run through the model."""
        return self.statistics is not None or self.reconstruct is not None

    def with_pattern(self, pattern: str | Pattern) -> SparsityConfig:
        """A copy with another pattern, for a layer that has its own."""
        own = copy.copy(self)
        own.pattern = str(pattern)
        return own

    def as_chosen(self, method: str, reconstruct: str | None) -> SparsityConfig:
        """A copy with what `method="auto"` is to try, or has chosen."""
        own = copy.copy(self)
        own.method, own.reconstruct = method, reconstruct
        return own

    def fitted(self, context: int | None) -> SparsityConfig:
        """A copy whose calibration samples fit into `context` positions, unless `seq_len` was passed."""
        own = copy.copy(self)
        if context is not None and "seq_len" not in self.given and not is_token_ids(self.dataset):
            own.seq_len = min(self.seq_len, context)
        return own

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable settings. Data that JSON cannot hold, and files, are described by a fingerprint; folders
        that name a place on this machine are cut to their last part."""
        hidden = {*EXECUTION_SETTINGS, *(name for name in self.__dict__ if name.startswith("_"))}
        settings = {name: value for name, value in self.__dict__.items() if name not in hidden}
        settings["dataset"] = self._description
        settings["tokenizer"] = describe_source(getattr(self.tokenizer, "name_or_path", self.tokenizer))
        return settings

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The settings that a checkpoint records. They may come from anywhere: nothing that they name is opened.

        Raises:
            ValueError: a setting cannot be right; names it.
        """
        settings = {**config_dict, **{k: v for k, v in kwargs.items() if k in config_dict}}
        unused = {k: v for k, v in kwargs.items() if k not in config_dict}
        try:
            config = cls(**_checked_record(settings))
        except (TypeError, ValueError) as error:
            raise ValueError(f"the settings that the checkpoint records cannot be right: {printable(error)}") from None
        return (config, unused) if return_unused_kwargs else config

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    def get(self, name: str, default: Any = None) -> Any:
        """As of the dictionary that `config.json` holds: transformers asks so where a model's config is passed on."""
        return getattr(self, name, default)

    def __deepcopy__(self, memo: dict[int, Any]) -> SparsityConfig:
        # transformers copies configs often; the calibration data are read only, and may be large.
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied


def recorded_settings(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings of quantization that a `config.json` holds, ours or another's; None where it has none. Raises
    ValueError where they are no object."""
    for name in ("quantization_config", DENSE_CONFIG_KEY):
        found = config.get(name)
        if found is not None:
            check_depth(found, name)
            return build(dict[str, Any], found, name)
    return None


def _checked_record(found: dict[str, Any]) -> dict[str, Any]:
    """Recorded settings as far as they are more than arguments of `SparsityConfig`."""
    check_depth(found)
    settings: dict[str, Any] = build(dict[str, Any], found)
    settings.pop("drop_layers", None)  # of earlier versions, which dropped blocks before they pruned the others
    method = settings.pop("quant_method", QUANT_METHOD)
    if method != QUANT_METHOD:
        raise ValueError(f"quant_method={method!r} is not {QUANT_METHOD!r}")
    try:
        check_keys(settings, SETTINGS, "SparsityConfig")
    except ValueError as error:
        raise ValueError(f"{error} (misspelt, or written by a newer optimum-ksparse: then upgrade it)") from None
    build(Annotated[Any, recorded_dataset], settings.get("dataset"), "dataset")
    build(str | None, settings.get("tokenizer"), "tokenizer")
    if "layers" in settings:
        settings["layers"] = build(dict[str, LayerRecord] | None, settings["layers"], "layers")
    return settings


def _setting_names() -> tuple[str, ...]:
    code = SparsityConfig.__init__.__code__
    return code.co_varnames[1 : code.co_argcount]


SETTINGS = _setting_names()


def describe_source(source: Any) -> str | None:
    """Where a model or tokenizer came from, without the path of a local folder."""
    if not source:
        return None
    source = os.fspath(source)
    return os.path.basename(os.path.normpath(source)) if os.path.exists(source) or os.path.isabs(source) else source


def is_repo_id(name: Any) -> bool:
    """Whether a name can be one of a repository on the Hub."""
    # Older clients let other letters and a line break at the end pass.
    if not isinstance(name, str) or not _REPO_ID.fullmatch(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def names_repository(described: str | None, commit: str | None = None) -> bool:
    """Whether what `describe_source` gave is a name on the Hub: with a commit, or of two parts, because a local folder
    is described by its last part alone (which may be somebody else's repository, as "gpt2" is)."""
    return is_repo_id(described) and (commit is not None or "/" in str(described))


def recorded_repository(described: str | None, commit: str | None = None) -> str | None:
    """The repository on the Hub that a file names, where it may be read without the user having named it: never a
    path, nor a name that would be read from a folder here. None otherwise."""
    return described if names_repository(described, commit) and not os.path.exists(str(described)) else None


def _choice(name: str, value: Any) -> str:
    return check_one_of(name, value, CHOICES[name])


def _refinements(name: str, value: Any) -> list[str]:
    if value is None or isinstance(value, str):
        value = [] if value is None else [value]
    if not isinstance(value, Sequence):
        raise TypeError(
            f"{name} must be a string or a list of them, found {value!r}; allowed: {', '.join(REFINEMENTS)}"
        )
    return [_choice(name, step) for step in value]


def _tokenizer(name: str, value: Any) -> Any:
    if value is not None and not isinstance(value, str | os.PathLike) and not hasattr(value, "name_or_path"):
        raise TypeError(f"{name} must be a name, a folder, a tokenizer or None, found {type(value).__name__}")
    return value
