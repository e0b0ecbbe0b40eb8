"""What other libraries do to the weight of a module that keeps it packed, and cannot."""

from __future__ import annotations

from torch import nn


class PackedModule(nn.Module):
    """Base class of modules whose `weight` is the kept values of a sparse weight, and `weight_mask` where they are."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in `nn.Module`, which also comes here for `module.weight = nn.Parameter(...)`.

        Raises:
            TypeError: torch.nn.utils.prune would put its own mask in the place of `weight_mask`; or the values are a
                quantized tensor of another library, which this module's kernels cannot read; or the weight is taken
                away, as by quanto, whose module has it by then and would read it as a dense one.
        """
        library = type(param).__module__.partition(".")[0]
        what = None
        if name == "weight_orig":
            what = "torch.nn.utils.prune or spectral_norm"
        elif name == "weight" and param is None and self._parameters.get(name) is not None:
            what = "what takes its weight away and computes with it (optimum-quanto)"
        elif name == "weight" and param is not None and library != "torch":
            what = f"{type(param).__name__} of {library}"
        if what is not None:
            raise TypeError(
                f"{type(self).__name__} keeps its weight packed, the kept values and a bitmask of where they are: "
                f"{what} cannot work on it. Call model.dequantize() first, which gives dense modules with the zeros "
                "written out, or leave these modules out"
            )
        super().register_parameter(name, param)
