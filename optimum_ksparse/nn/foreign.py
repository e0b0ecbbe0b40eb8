"""What other libraries do to the weight of a module that keeps it packed, and cannot."""

from __future__ import annotations

from torch import nn


class PackedModule(nn.Module):
    """Base class of modules whose `weight` is the kept values of a sparse weight, and `weight_mask` where they are."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in `nn.Module`, which also comes here for `module.weight = nn.Parameter(...)`.

        Raises:
            TypeError: torch.nn.utils.prune would put its own mask in the place of `weight_mask`, or the values are a
                quantized tensor of another library, which this module's kernels cannot read.
        """
        library = type(param).__module__.partition(".")[0]
        if name == "weight_orig" or (name == "weight" and param is not None and library != "torch"):
            what = "torch.nn.utils.prune" if name == "weight_orig" else f"{type(param).__name__} of {library}"
            raise TypeError(
                f"{type(self).__name__} keeps its weight packed, the kept values and a bitmask of where they are: "
                f"{what} cannot work on it. Call model.dequantize() first, which gives dense modules with the zeros "
                "written out, or leave these modules out"
            )
        super().register_parameter(name, param)
