"""Experts stacked in one parameter [experts, out, in]: which of them can be pruned matrix by matrix, what each matrix
is multiplied with, and the implementation of transformers that takes them one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

from ..nn import SparseExperts
from ..nn.experts import MATMUL

# Classes without the marks of transformers whose forward reads its stacks as marked ones do.
_UNMARKED = ("JetMoeParallelExperts", "LongcatFlashExperts", "Step3p7Experts")
# Those that give all experts as many tokens, with zeros for the tokens of others.
BATCHED = ("Llama4TextExperts",)


@dataclass(frozen=True)
class ExpertStack:
    """A parameter of a dense model that holds a stack of matrices.

    Attributes:
        owner: the module that holds it.
        name: the parameter's name there.
    """

    owner: nn.Module
    name: str

    @property
    def weight(self) -> nn.Parameter:
        """The parameter, [experts, out, in], or [experts, in, out] where `is_transposed`."""
        return getattr(self.owner, self.name)

    @property
    def is_transposed(self) -> bool:
        """Whether the owner multiplies with the matrices from the right, `x @ self.<name>[expert]`, or, in Llama 4,
        `torch.bmm(x, self.<name>)`."""
        return getattr(self.owner, "is_transposed", type(self.owner).__name__ in BATCHED) is True

    @property
    def matrices(self) -> torch.Tensor:
        """The parameter as [experts, out, in], a view."""
        return self.weight.mT if self.is_transposed else self.weight

    def reads_matrices(self) -> bool:
        """Whether the owner reads the parameter as `F.linear(x, self.<name>[expert])`, or in the way of
        `is_transposed`, and in no other: by the marks that transformers' `use_experts_implementation` sets."""
        owner: Any = self.owner
        if type(owner).__name__ in (*_UNMARKED, *BATCHED):
            return True
        first = "gate_up_proj" if getattr(owner, "has_gate", True) else "up_proj"
        return hasattr(owner, "is_transposed") and self.name in (first, "down_proj")


@dataclass(frozen=True)
class ExpertMatrix:
    """One matrix [out, in] of a stack, as a layer to observe."""

    stack: ExpertStack
    expert: int


def matrix_name(path: str, expert: int) -> str:
    """How statistics name a matrix of the stack `path`."""
    return f"{path}[{expert}]"


def layer_of(name: str) -> str:
    """The path of the stack that a matrix of this name belongs to; that of a linear map is its name."""
    return name.partition("[")[0]


def observable(layers: Mapping[str, nn.Module | ExpertStack]) -> dict[str, nn.Module | ExpertMatrix]:
    """What has inputs to observe: linear maps by their own names, and the matrices of stacks that are not packed."""
    observed: dict[str, nn.Module | ExpertMatrix] = {}
    for name, layer in layers.items():
        if isinstance(layer, ExpertStack):
            observed |= {matrix_name(name, i): ExpertMatrix(layer, i) for i in range(len(layer.weight))}
        elif not isinstance(layer, SparseExperts):
            observed[name] = layer
    return observed


def find_stacks(block: nn.Module) -> dict[str, ExpertStack]:
    """Parameters of a block that hold a stack of matrices, such as experts fused into one tensor, by path.
    Convolutions, and stacks of vectors, are none."""
    stacks = {}
    for module_name, module in block.named_modules():
        if isinstance(module, _ConvNd):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 3 and parameter.shape[-1] > 1 and parameter.shape[-2] > 1:
                stacks[f"{module_name}.{name}".lstrip(".")] = ExpertStack(module, name)
    return stacks


class observed_matrices(TorchFunctionMode):  # noqa: N801 (used like a function)
    """Within it, a hook is called with the input of each `F.linear` whose weight is one of `matrices`, as a forward
    pre-hook of a module would be; not where no token came. A matrix is known from where its stack is indexed, so that
    nothing is put in the parameters' places, and accelerate may bring them in for a forward pass.

    Args:
        matrices: name → matrix.
        make: the hook for a name.
    """

    def __init__(self, matrices: Mapping[str, ExpertMatrix], make: Callable[[str], Callable[..., None]]) -> None:
        super().__init__()
        self._stacks = list(dict.fromkeys(matrix.stack for matrix in matrices.values()))
        self._hooks = {(matrix.stack, matrix.expert): make(name) for name, matrix in matrices.items()}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(("input", "weight")))
            self._call(weight, x)
        elif func in MATMUL and len(args) == 2:
            self._call(args[1], args[0])
        elif func is torch.bmm and len(args) == 2:
            for stack in self._stacks:
                if args[1] is stack.weight:
                    for expert, x in enumerate(args[0]):
                        hook = self._hooks.get((stack, expert))
                        rows = x[x.any(-1)]
                        if hook is not None and len(rows):
                            hook(None, (rows,))
        result = func(*args, **kwargs)
        if func is torch.Tensor.__getitem__ and result.dim() == 2:
            for stack in self._stacks:
                if args[0] is stack.weight:
                    result._ksparse_hook = self._hooks.get((stack, int(args[1]) % len(args[0])))
        return result

    @staticmethod
    def _call(weight: Any, x: torch.Tensor) -> None:
        hook = getattr(weight, "_ksparse_hook", None)
        if hook is not None and len(x):
            hook(None, (x,))


def use_eager_experts(model: PreTrainedModel) -> None:
    """Makes transformers call experts one by one (`experts_implementation="eager"`), wherever they read that from."""
    for config in _configs(model):
        config._experts_implementation = "eager"


@contextmanager
def eager_experts(model: PreTrainedModel) -> Iterator[None]:
    """Within it transformers calls experts one by one; after it, as before."""
    before = [(config, config._experts_implementation) for config in _configs(model)]
    use_eager_experts(model)
    try:
        yield
    finally:
        for config, implementation in before:  # parents before the parts of theirs that they set as well
            config._experts_implementation = implementation


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs that modules of the model hold, outer ones first."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    return list({id(config): config for config in configs if isinstance(config, PreTrainedConfig)}.values())
