"""`SparsityConfig`: what to prune, and how. Data and validation, no behaviour."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from functools import partial, wraps
from typing import Annotated, Any, TypedDict, TypeVar

from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_ksparse_autoload import DENSE_CONFIG_KEY, QUANT_METHOD

from .checks import check_boolean, check_integer, check_keys, check_names, check_one_of
from .data import CalibrationData
from .data.dataset import describe_dataset, is_token_ids, recorded_dataset
from .pattern import Pattern, default_pattern
from .pruners import METHODS, REFINEMENTS, Setting, statistics_of
from .pruners.allocation import ALLOCATIONS, check_allocation
from .pruners.settings import number, share, switch, whole
from .pruners.statistics import ColumnNorms
from .quantization import GROUP_SIZES, LIMITS, check_group_size
from .records import (
    COMPRESSED_TENSORS,
    Count,
    PatternText,
    Version,
    as_html,
    build,
    check_depth,
    describe_source,
    printable,
    sparse_format,
)

# The settings by which a sparse model that this package has not made is read.
FOREIGN_RECORD = {"quant_method": QUANT_METHOD, "method": "existing"}
# Setting → its values, where they are a few.
CHOICES: dict[str, tuple[str, ...]] = {
    "method": tuple(METHODS),
    "refine": tuple(REFINEMENTS),
    "reconstruct": ("block",),
    "activations": ("pruned", "dense", "mixed"),
    "permute": ("free",),
    "allocation": tuple(ALLOCATIONS),
    "values": tuple(LIMITS),
    "calibration_dtype": ("bfloat16", "float16"),
    "storage": ("packed", "dense", COMPRESSED_TENSORS),
}
# Which `method_settings` there are: by what reads them.
READERS: dict[str, dict[str, Setting]] = {
    **{f"method={name!r}": method.settings for name, method in METHODS.items()},
    "reconstruct='block'": {
        "reconstruction_epochs": whole("passes of reconstruction over the calibration samples", default=4),
        "reconstruction_lr": number(
            "learning rate of reconstruction at its height, as a share of each tensor's root mean square", default=0.01
        ),
    },
    "allocation='owl'": {
        "target_density": share("with owl and n:m, which need it: the mean share of weights to store, such as 0.6")
    },
    "calibration data": {
        "bos_in_statistics": switch("count the beginning token's position in the statistics", default=True),
        "first_position_share": number(
            "least share of a sample's first position, the attention sink, in the statistics (default: the method's)",
            0.9,
        ),
    },
}
# They may differ when a sparse checkpoint is loaded again: settings of the run, not of what was asked for.
RUN_TIME_SETTINGS = ("batch_size", "storage")
# What a checkpoint records of its tensors, beside what was asked for.
RECORDED = ("layers", "names", "format_version")
# Of a record with quantised values, which earlier versions refuse; others have none, so that they read them.
FORMAT_VERSION = 2
MODULE_NAMES = "modules"
_Config = TypeVar("_Config")
# Settings of earlier versions, which their checkpoints record.
_OUTDATED = ("drop_layers", "kernel", "time_budget", "fuse", "densify", "optimize_for", "max_extra_bytes")


class LayerRecord(TypedDict):
    """What `config.json` says of a sparse layer."""

    pattern: PatternText
    num_values: Count


def _merged(tables: Iterable[Mapping[str, Setting]]) -> dict[str, Setting]:
    """Settings of several tables. One whose defaults differ has none."""
    merged: dict[str, Setting] = {}
    for name, setting in (item for table in tables for item in table.items()):
        same = name not in merged or merged[name].default == setting.default
        merged[name] = setting if same else replace(setting, default=None)
    return merged


METHOD_SETTINGS = _merged(READERS.values())


def _read_with(settings: Mapping[str, Any]) -> dict[str, Setting]:
    """The `method_settings` that are read with these other settings, which need not have been checked."""
    method, reconstruct = settings.get("method"), settings.get("reconstruct")
    has_data = method not in METHODS or METHODS[method].statistics is not None
    readers = [f"method={name!r}" for name in METHODS if name == method]
    readers += ["reconstruct='block'"] if reconstruct else []
    readers += ["allocation='owl'"] if settings.get("allocation") == "owl" else []
    readers += ["calibration data"] if has_data or settings.get("refine") or reconstruct else []
    return _merged(READERS[reader] for reader in readers)


def _optional(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else check(name, value)


def _choice(name: str, value: Any) -> str:
    return check_one_of(name, value, CHOICES[name])


def _refinements(name: str, value: Any) -> list[str]:
    steps = [value] if isinstance(value, str) else () if value is None else value
    if not isinstance(steps, Sequence):
        raise TypeError(f"{name} must be one or several of {', '.join(REFINEMENTS)}, found {value!r}")
    return [_choice(name, step) for step in steps]


# Each gives the value back, or raises TypeError or ValueError.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "method": _choice,
    "pattern": lambda name, value: str(Pattern(value)),
    "batch_size": partial(check_integer, least=1),
    "calibration_dtype": _optional(_choice),
    "values": _optional(_choice),
    "group_size": _optional(check_group_size),
    "refine": _refinements,
    "reconstruct": _optional(_choice),
    "activations": _optional(_choice),
    "permute": _optional(_choice),
    "allocation": _choice,
    "true_sequential": check_boolean,
    "modules_to_not_convert": check_names,
    "skip_unsupported": check_boolean,
    "prune_routers": check_boolean,
    "storage": _choice,
}


def _noting_what_is_given(cls: type[_Config]) -> type[_Config]:
    """Keeps which settings are passed: for a checkpoint that is sparse already they alone must agree with what it was
    pruned with."""
    initialise = cls.__init__

    @wraps(initialise)  # `help` and editors show its signature
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        for name in kwargs:
            if name == "kernel":
                raise TypeError(
                    "kernel says how a loaded model runs, which is not saved: pass "
                    "runtime_config=RuntimeConfig(kernel=...) to from_pretrained, or to configure(model, ...)"
                )
            if name in METHOD_SETTINGS:
                raise TypeError(f"{name} is read by one method or step: pass method_settings={{{name!r}: ...}}")
        try:
            check_keys(kwargs, SETTINGS, "SparsityConfig")
        except ValueError as error:
            raise TypeError(str(error)) from None
        self._given = {*SETTINGS[: len(args)], *kwargs}
        initialise(self, *args, **kwargs)

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


@_noting_what_is_given
@dataclass(eq=False, repr=False)
class SparsityConfig(QuantizationConfigMixin):
    """What to prune, and how.

    Args:
        method: `"admm"` (weights and mask together: more accurate than SparseGPT, in up to 1.5 times its time),
            `"sparsegpt"`, `"alps"` (slow), `"wanda"` (fast; weights stay as they are), `"magnitude"` (which reads no
            data) or `"existing"` (nothing is pruned: the zeros of a model that was pruned elsewhere are kept, and
            layers that have none stay dense).
        pattern: `"2:4"`, `"4:8"`, any `"n:m"` (n nonzero weights in every m), a fraction of zeros (`"50%"`, `0.5`), or
            that fraction of whole tiles of r outputs x c inputs (`"50%/32x32"`), by the sum of the method's scores in
            each, over the layer (`sparsegpt`: over each `block_size` columns). None takes `"2:4"` where torch sees a
            GPU or where other settings need n:m, and elsewhere `"50%"`: there all are equally fast and this one loses
            least. With `"existing"` each layer's own is found, and none is passed.
        values: how the kept values are stored: None: in the dtype of the weights; `"int8"` (5.0 bits for each weight
            at 50 %, instead of 9) or `"int4"` (3.3): integers, each times the scale of its group.
        group_size: so many columns of a row share a scale, a multiple of 64; -1: all of a row. None takes what was
            measured to be best for the type of values.
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
        seed: draws documents, crops and generated text.
        prepend_bos: begin each calibration sequence with the beginning token; None does so where the tokenizer does.
        calibration_dtype: dtype of the matrix products while calibration tokens run through the model; None: that of
            the weights. `"bfloat16"` makes such products of a float32 model twice as fast on some CPUs that have the
            instructions (on an AMD EPYC pruning Gemma 3 270M takes a fifth to a quarter less time), and slower on
            others (an Intel Xeon without AMX); the statistics, the pruning and the weights stay float32.
        refine: what follows the method on the same statistics, one or several in their order: `"swaps"` (SparseSwaps:
            a better mask, weight for weight), `"exact"` (the weights of least output error on the mask).
        reconstruct: `"block"`: when the layers of a decoder block are pruned, its kept weights, biases and norms are
            tuned together so that the block gives what the dense one gave. Several times as long, much more accurate.
        activations: what the calibration inputs of a block are, and whose outputs it is to give: `"pruned"` (the model
            pruned so far, for both), `"dense"` (the dense model, for both) or `"mixed"` (the inputs of the pruned
            model, the outputs of the dense one). None takes what was measured to be best: `"pruned"` for layers,
            `"mixed"` for reconstruction.
        permute: `"free"`: before a block is pruned, channels that may change places without changing what it computes
            (those of the MLP, and value channels within a head) do so, for `n:m` to lose less. The layers' weights are
            then in another order than those of the dense model.
        allocation: `"uniform"` gives every layer the pattern. `"owl"` gives each its own, from what a pass of the
            calibration data through the dense model measures (the time of one more forward pass): with a fraction of
            zeros each decoder block its own, with the same mean (OWL); with `n:m` some layers stay dense, and `2n:2m`
            takes the place of `n:m`, which has the same size and loses less, unless that has no kernels.
        true_sequential: prune each layer (q, k and v together, then o, …) with the inputs that it has when those
            before it in its block are pruned. One pass through the block where all samples can wait for each other
            inside it, in at most 16 batches (larger ones than `batch_size`, where needed): memory then holds four to
            six times the hidden states of all samples. Otherwise, and with `activation_memory` too small for that,
            the same result takes a pass for each group of layers.
        modules_to_not_convert: names, suffixes or regular expressions of linear maps in the blocks to leave dense.
        skip_unsupported: leave what cannot be pruned dense and list it in the report, instead of raising.
        prune_routers: prune the layers that route tokens to experts as well, which otherwise stay dense.
        storage: `"packed"` (0.5625 of the dense bytes at 50 % in 16 bit; needs this plugin to load) or `"dense"`
            (zeros written out; loads everywhere), or `"compressed-tensors"` (packed for its versions up to 0.14).
        method_settings: what one method or step alone reads, such as `{"damping": 0.1}`; the table `READERS` has all:
            `block_size` (sparsegpt), `damping` (sparsegpt, admm, alps), `iterations` (admm, alps),
            `reconstruction_epochs` and `reconstruction_lr` (reconstruct), `target_density` (owl), `bos_in_statistics`.
            In `config.json`, recipes and flags they stand among the others.

    Attributes:
        layers: of a model that has been pruned: for each sparse layer its path in the decoder, pattern and number of
            values.
        names: `"modules"` where the tensors of a packed checkpoint have the names of the model's modules; None in
            earlier ones, whose tensors may have others.

    Raises:
        TypeError, ValueError: names the argument, what was found and what is allowed.
        FileNotFoundError: the calibration file is missing.
    """

    quant_method: str = field(default=QUANT_METHOD, init=False)  # type: ignore[assignment]
    method: str = "admm"
    pattern: Any = None
    _: KW_ONLY
    values: str | None = None
    group_size: int | None = None
    dataset: Any = "mc4-ko"
    tokenizer: Any = None
    num_samples: int = 128
    seq_len: int = 2048
    batch_size: int = 1
    seed: int = 0
    prepend_bos: bool | None = None
    calibration_dtype: str | None = None
    refine: Sequence[str] = ()
    reconstruct: str | None = None
    activations: str | None = None
    permute: str | None = None
    allocation: str = "uniform"
    true_sequential: bool = False
    modules_to_not_convert: list[str] | None = None
    skip_unsupported: bool = False
    prune_routers: bool = False
    storage: str = "packed"
    method_settings: Mapping[str, Any] = field(default_factory=dict)
    layers: dict[str, Any] | None = field(default=None, init=False)
    names: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.pattern is None:
            special = self.method_settings if isinstance(self.method_settings, Mapping) else {}
            needs_groups = self.permute is not None or "target_density" in special
            self.pattern = "2:4" if needs_groups else default_pattern()[0]
        for name, check in _CHECKS.items():
            setattr(self, name, check(name, getattr(self, name)))
        self.method_settings = self._checked_method_settings()
        if self.activations == "mixed" and self.reconstruct is None:
            raise ValueError(
                "activations='mixed' gives a block the inputs of the pruned model and the outputs of the dense one to "
                "aim at, which reconstruct='block' alone does: add it, or pass 'pruned' or 'dense'"
            )
        if METHODS[self.method].recognise and (self.refine or self.reconstruct):
            raise ValueError(f"method={self.method!r} changes no weight: leave refine and reconstruct out")
        if self.permute is not None and (self.statistics is None or not Pattern(self.pattern).is_semi_structured):
            raise ValueError(
                f"permute={self.permute!r} reorders channels by their inputs, so that n:m loses less: it needs a "
                f"pattern n:m and a method that reads data, found {self.pattern!r} and method={self.method!r}"
            )
        self._check_pattern(Pattern(self.pattern))
        self._check_values()
        data = self.calibration  # checked
        self.num_samples, self.seq_len = data.num_samples, data.seq_len
        # Now, because a file may be gone when the pruned model is saved.
        self._description = describe_dataset(self.dataset)

    def _checked_method_settings(self) -> dict[str, Any]:
        if not isinstance(self.method_settings, Mapping):
            raise TypeError(
                f"method_settings must be a dict, such as {{'damping': 0.1}}, found {self.method_settings!r}"
            )
        check_keys(self.method_settings, tuple(METHOD_SETTINGS), "method_settings")
        checked, read = {}, self.read_settings
        for name, value in self.method_settings.items():
            if name not in read and value is not None:
                readers = " or ".join(reader for reader, settings in READERS.items() if name in settings)
                raise ValueError(
                    f"{name}={value!r} is read with {readers}; method={self.method!r} with the other settings reads "
                    f"{', '.join(read) or 'none of method_settings'}"
                )
            if value is not None:
                checked[name] = read[name].check(name, value)
        return checked

    def _check_pattern(self, pattern: Pattern) -> None:
        """Raises ValueError where the method cannot make the pattern."""
        check_allocation(self.allocation, pattern, self.method_setting("target_density"), self.needs_data)
        block_size = self.method_setting("block_size")
        if self.method == "sparsegpt" and block_size % pattern.width:
            what = f"m={pattern.m}" if pattern.tile is None else f"the {pattern.width} columns of a tile"
            raise ValueError(f"block_size={block_size} is not a multiple of {what} of pattern={self.pattern!r}")
        if pattern.tile is not None and "swaps" in self.refine:
            raise ValueError(
                f"refine='swaps' exchanges single weights, and pattern={self.pattern!r} keeps whole tiles: leave it "
                "out; refine='exact' works on any mask"
            )

    def _check_values(self) -> None:
        """Raises ValueError where quantised values do not go together with other settings."""
        if self.values is None and self.group_size is not None:
            raise ValueError(f"group_size={self.group_size} is read with values={' or '.join(map(repr, LIMITS))}")
        if self.values is not None and self.group_size is None:
            self.group_size = GROUP_SIZES[self.values]
        if self.values is not None and self.storage == COMPRESSED_TENSORS:
            raise ValueError(
                f"values={self.values!r} cannot be stored as {COMPRESSED_TENSORS}, whose sparse layers hold values in "
                "the dtype of the model: take storage='packed' or 'dense', or leave values out"
            )

    @property
    def given(self) -> set[str]:
        """Names of the settings that were passed; the others have their defaults."""
        return set(self._given)  # type: ignore[attr-defined]

    @property
    def read_settings(self) -> dict[str, Setting]:
        """The `method_settings` that are read, by name."""
        return _read_with(vars(self))

    def method_setting(self, name: str) -> Any:
        """A setting of `method_settings`, or its default; None where that is the method's own, or nothing reads it."""
        setting = self.read_settings.get(name)
        return self.method_settings.get(name, setting and setting.default)

    @property
    def quantisation(self) -> dict[str, Any]:
        """What sparse modules take besides their pattern: `values` and `group_size`, where values are quantised."""
        return {} if self.values is None else {"values": self.values, "group_size": self.group_size}

    @property
    def statistics(self) -> type[ColumnNorms] | None:
        """What is to be collected of each layer's inputs; None where the method reads no data."""
        return statistics_of(self.method, self.refine, self.values is not None)

    @property
    def calibration(self) -> CalibrationData:
        """What calibration tokens are drawn from."""
        data = {item.name: getattr(self, item.name) for item in fields(CalibrationData)}
        if self.dataset is None and not self.needs_data:
            data["dataset"] = "self"  # none are drawn
        return CalibrationData(**data)

    @property
    def pruner_settings(self) -> dict[str, Any]:
        """What `pruners.prune` takes besides method, weight, statistics and pattern."""
        names = METHODS[self.method].settings.keys() & self.method_settings.keys()
        return {"refine": self.refine, **{name: self.method_settings[name] for name in names}}

    @property
    def needs_data(self) -> bool:
        """Whether calibration tokens run through the model."""
        return self.statistics is not None or self.reconstruct is not None

    def changed(self, **settings: Any) -> SparsityConfig:
        """A copy with other settings, which are not checked, such as a layer's own pattern."""
        changed = copy.copy(self)
        vars(changed).update(settings)
        return changed

    def fitted(self, context: int | None) -> SparsityConfig:
        """A copy whose calibration samples fit into `context` positions, unless `seq_len` was passed."""
        free = context is not None and "seq_len" not in self.given and not is_token_ids(self.dataset)
        return self.changed(seq_len=min(self.seq_len, context or 0)) if free else self

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable settings, those of the method among them. Data that JSON cannot hold, and files, are
        described by a checksum; folders that name a place on this machine are cut to their last part."""
        settings = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "method_settings"}
        special = {name: self.method_setting(name) for name in self.read_settings}
        if self.permute is None:  # earlier versions do not know it
            del settings["permute"]
        if self.values is None:
            del settings["values"], settings["group_size"]
        else:
            settings["format_version"] = FORMAT_VERSION
        settings["dataset"] = self._description
        settings["tokenizer"] = describe_source(getattr(self.tokenizer, "name_or_path", self.tokenizer))
        return settings | {name: value for name, value in special.items() if value is not None}

    @classmethod
    def from_flat(cls, *args: Any, **settings: Any) -> SparsityConfig:
        """From settings as flags and recipes have them, where those of the method stand among the others."""
        special = {name: value for name, value in settings.items() if name in METHOD_SETTINGS}
        others = {name: value for name, value in settings.items() if name not in special}
        return cls(*args, **(others | ({"method_settings": special} if special else {})))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The settings that a checkpoint records. They may come from anywhere: nothing that they name is opened.

        Raises:
            ValueError: a setting cannot be right; names it.
        """
        settings = {**config_dict, **{k: v for k, v in kwargs.items() if k in config_dict}}
        unused = {k: v for k, v in kwargs.items() if k not in config_dict}
        try:
            settings, recorded = _checked_record(settings)
            config = cls.from_flat(**settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the settings that the checkpoint records cannot be right: {printable(error)}") from None
        config.layers, config.names = recorded["layers"], recorded["names"]
        return (config, unused) if return_unused_kwargs else config

    def __repr__(self) -> str:
        if "_description" not in vars(self):  # debuggers and tracebacks show what has been refused
            return f"{type(self).__name__} ({', '.join(sorted(self.given))})"
        settings = self.to_dict()
        if settings["layers"]:  # of a large model hundreds
            settings["layers"] = f"{len(settings['layers'])} sparse layers"
        return f"{type(self).__name__} {json.dumps(settings, indent=2, sort_keys=True)}"

    def _repr_html_(self) -> str:
        """The settings that are read, the ones that were passed marked."""
        settings = {name: value for name, value in self.to_dict().items() if name not in (*RECORDED, "quant_method")}
        rows = [(name, _shown(value)) for name, value in settings.items() if value not in (None, [])]
        given = self.given | self.method_settings.keys()
        marked = [number for number, (name, _) in enumerate(rows) if name in given]
        unset = [name for name, value in settings.items() if value in (None, [])]
        notes = ["Marked settings were passed.", f"Not set: {', '.join(unset)}."]
        return as_html([("setting", "value"), *rows], "SparsityConfig", notes, marked=marked)

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    def get(self, name: str, default: Any = None) -> Any:
        """A setting by name: transformers reads a `quantization_config` as the dictionary that `config.json` holds."""
        return getattr(self, name, default)

    def __deepcopy__(self, memo: dict[int, Any]) -> SparsityConfig:
        # transformers copies configs often; the calibration data are read only, and may be large.
        return copy.copy(self)


def _shown(value: Any) -> str:
    """A setting in a table, checksums shortened."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    text = str(value)
    return f"{text[:8]}…" if re.fullmatch("[0-9a-f]{64}", text) else text


class ForeignConfig(SparsityConfig):
    """The settings of a sparse model of compressed-tensors while it is loaded; `targets`: what its config says that it
    has made sparse, `layers`: what has been found in its files."""

    targets: Any = None


SETTINGS = tuple(item.name for item in fields(SparsityConfig) if item.init)
# As flags, recipes and `config.json` have them.
FLAT_SETTINGS = (*(name for name in SETTINGS if name != "method_settings"), *METHOD_SETTINGS)


def recorded_settings(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings of quantization that a `config.json` holds, ours or another's; None where it has none. Of a sparse
    model of compressed-tensors those by which this package reads it. Raises ValueError where they are no object, or
    cannot be read."""
    names = ["quantization_config", DENSE_CONFIG_KEY]
    if sparse_format(config.get(names[0])) is not None:
        if config.get(DENSE_CONFIG_KEY) is None:
            return dict(FOREIGN_RECORD)
        names.reverse()
    for name in names:
        settings = config.get(name)
        if settings is not None:
            check_depth(settings, name)
            return build(dict[str, Any], settings, name)
    return None


def _checked_record(record: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Recorded settings as far as they are arguments of `SparsityConfig`, and what is recorded of the tensors. Earlier
    versions recorded the settings of all methods."""
    check_depth(record)
    settings: dict[str, Any] = build(dict[str, Any], record)
    for name in _OUTDATED:
        settings.pop(name, None)
    if settings.get("method") == "auto":  # they chose one, usually the default
        settings["method"] = SparsityConfig.method
    method = settings.pop("quant_method", QUANT_METHOD)
    if method != QUANT_METHOD:
        raise ValueError(f"quant_method={method!r} is not {QUANT_METHOD!r}")
    try:
        check_keys(settings, (*FLAT_SETTINGS, *RECORDED), "SparsityConfig")
    except ValueError as error:
        newer = "" if "did you mean" in str(error) else "; a newer optimum-ksparse may have written it: then upgrade"
        raise ValueError(f"{error}{newer}") from None
    version = build(int, settings.pop("format_version", FORMAT_VERSION), "format_version")
    Version(FORMAT_VERSION).check("format_version", version)
    build(Annotated[Any, recorded_dataset], settings.get("dataset"), "dataset")
    build(str | None, settings.get("tokenizer"), "tokenizer")
    build(str, settings.get("method", SparsityConfig.method), "method")
    recorded = {
        "layers": build(dict[str, LayerRecord] | None, settings.pop("layers", None), "layers"),
        "names": _optional(partial(check_one_of, allowed=(MODULE_NAMES,)))("names", settings.pop("names", None)),
    }
    read = _read_with({"method": SparsityConfig.method, **settings})
    return {k: v for k, v in settings.items() if k not in METHOD_SETTINGS or k in read}, recorded
