"""What the kernels compile to, for GPUs that are not here: wide loads, no spilled registers, tensor cores, and tiles
that fit the shared memory.

All is compiled once, in one process, by the first test; that takes a minute or so.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton, in which the kernels are written, is not installed")

from optimum_ksparse.kernels import KERNELS, Problem, hardware

from .machine_code import Product, compile_products

KIB = 1024
# The most that one program may have.
SHARED_MEMORY = {80: 163 * KIB, 86: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}
OTHERS = (80, 86, 100, 120)  # beside sm_90


def offered(kernel, tokens, pattern="2:4", dtype="bfloat16", capability=90, in_features=4096):
    """A product for each configuration that is tried for it on a GPU of that capability."""
    problem = Problem(4096, in_features, tokens, pattern, getattr(torch, dtype), torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "capability", lambda device: divmod(capability, 10))
        configs = KERNELS[kernel].configs(problem)
    return [Product(kernel, c, tokens, pattern, dtype, capability, in_features=in_features) for c in configs]


# The first of what is offered is what the rule of thumb takes.
GEMV = [
    *(product for tokens in (1, 2, 4) for product in offered("gemv", tokens)),
    *(offered("gemv", tokens, "4:8", dtype)[0] for tokens, dtype in ((1, "float16"), (4, "bfloat16"))),
    *(offered("gemv", 1, capability=capability)[0] for capability in OTHERS),
]
QUANTISED = [
    replace(offered(kernel, tokens, pattern)[0], values=values, group_size=size)
    for kernel, tokens, pattern, values, size in (
        ("gemv", 1, "2:4", "int8", 4096),
        ("gemv", 1, "2:4", "int4", 128),
        ("gemv", 4, "4:8", "int8", 128),
        ("gemv", 1, "4:8", "int4", 128),
        ("dot", 16, "2:4", "int8", 4096),
        ("dot", 16, "2:4", "int4", 128),
        ("dot", 64, "4:8", "int4", 128),
    )
]
# A width that 512 does not divide, as real models have.
WIDTHS = [offered("gemv", 1, in_features=640)[0]]
DOT = [
    *(product for tokens in (16, 64, 128) for product in offered("dot", tokens)[:2]),
    offered("dot", 32, "4:8", "float16")[0],
]
FIRST = [offered("dot", 128, capability=capability)[0] for capability in OTHERS]
SWEEP = [
    *(Product("sweep", {}, 128, pattern, "float32") for pattern in ("2:4", "50%")),
    Product("sweep", {}, 60, "3:5", "float32"),
]

TOO_LARGE = Product(
    "dot",
    {"rows": 128, "tokens": 128, "bytes": 32, "warps": 4, "stages": 3, "splits": 1, "permute": True},
    128,
    capability=86,
)


@pytest.fixture(scope="module")
def compiled():
    """Machine code by product."""
    products = [*GEMV, *QUANTISED, *WIDTHS, *DOT, *FIRST, *SWEEP, TOO_LARGE]
    return dict(zip(map(str, products), compile_products(products), strict=True))


def spilled(code):
    return code.spilled, code.count("STL", "LDL")


@pytest.mark.processes
@pytest.mark.parametrize("product", GEMV, ids=str)
def test_gemv_reads_weights_once_and_wide_and_spills_nothing(product, compiled):
    code = compiled[str(product)]
    rows = product.config["rows"]
    assert spilled(code) == (0, 0)
    # 128 bits of values a lane, row and step; they are all that is marked to leave the cache first.
    assert code.count("LDG.E.EF.128") == code.count_in_loop("LDG.E.EF") == code.count("LDG.E.EF") == rows
    # The masks: 16 bits a lane, row and step.
    assert code.count_in_loop("LDG.E.U16") == rows


@pytest.mark.processes
@pytest.mark.parametrize("product", GEMV, ids=str)
def test_lanes_of_gemv_meet_only_in_the_end(product, compiled):
    code = compiled[str(product)]
    assert code.count_in_loop("LDS", "STS", "BAR", "SHFL") == 0
    assert code.count("SHFL") > 0
    sums = product.config["rows"] * product.tokens
    if product.config["warps"] == 1:
        assert code.count("LDS", "STS", "BAR") == code.shared == 0
    else:  # a store for each sum (two with Triton 3.6), with a barrier behind it and one before the next
        assert 0 < code.count("STS") <= 2 * sums
        assert code.count("BAR") <= 4 * sums


@pytest.mark.processes
@pytest.mark.parametrize("product", [p for p in GEMV if p.tokens == 1 and p.pattern == "2:4"], ids=str)
def test_gemv_takes_few_instructions_for_a_group_of_four(product, compiled):
    """Two fused multiply-adds, and what it takes to find their operands: a step has four groups a row and lane."""
    code = compiled[str(product)]
    groups = 4 * product.config["rows"]
    assert code.count_in_loop("FFMA") + code.count_in_loop("FFMA2") == 2 * groups  # FFMA2 does two at once
    assert code.loop.total() <= 16 * groups


@pytest.mark.processes
@pytest.mark.parametrize("product", QUANTISED, ids=str)
def test_quantised_values_are_read_wide_and_spill_nothing(product, compiled):
    code = compiled[str(product)]
    assert spilled(code) == (0, 0)
    if product.kernel == "dot":
        assert code.count_in_loop("HMMA", "HGMMA") > 0
        return
    # 64 or 32 bits of values a lane, row and step.
    wide = "LDG.E.EF.64" if product.values == "int8" else "LDG.E.EF"
    assert code.count_in_loop(wide) == code.count("LDG.E.EF") == product.config["rows"]
    assert code.count_in_loop("LDS", "STS", "BAR", "SHFL") == 0


@pytest.mark.processes
@pytest.mark.parametrize("product", WIDTHS, ids=str)
def test_gemv_reads_wide_at_any_width(product, compiled):
    code = compiled[str(product)]
    assert spilled(code) == (0, 0)
    assert code.count_in_loop("LDG.E.EF.128") == code.count("LDG.E.EF") == product.config["rows"]


@pytest.mark.processes
@pytest.mark.parametrize("product", [*DOT, *FIRST], ids=str)
def test_dot_runs_on_tensor_cores_and_fits_the_shared_memory(product, compiled):
    code = compiled[str(product)]
    assert code.count_in_loop("HMMA", "HGMMA", "UTCHMMA") > 0
    assert code.count_in_loop("LDGSTS") > 0  # tiles of memory on their way while others are multiplied
    assert 0 < code.shared <= SHARED_MEMORY[product.capability]


@pytest.mark.processes
@pytest.mark.parametrize("product", DOT, ids=str)
def test_dot_spills_nothing(product, compiled):
    code = compiled[str(product)]
    assert code.spilled == 0
    assert code.count("STL", "LDL") == 0


@pytest.mark.processes
@pytest.mark.parametrize("product", SWEEP, ids=str)
def test_threads_of_the_sweep_share_nothing_and_spill_nothing(product, compiled):
    code = compiled[str(product)]
    assert spilled(code) == (0, 0)
    assert code.shared == code.count("LDS", "STS", "SHFL") == 0
    # A panel of 16 (3:5: 15) columns stays in registers: off each come the errors of a column before it, in one loop,
    # and those of the panel's own.
    panel = 15 if product.pattern == "3:5" else 16
    assert code.count("FFMA") + code.count("FFMA2") >= panel * (panel + 1) // 2


@pytest.mark.processes
def test_spills_and_large_tiles_show(compiled):
    """The reader of machine code finds what the tests above look for, where it is there."""
    code = compiled[str(TOO_LARGE)]
    assert code.spilled > 0 and code.count("STL") > 0 and code.count("LDL") > 0
    assert code.shared > SHARED_MEMORY[86]


@pytest.mark.processes
def test_a_kernel_that_does_not_compile_is_an_error():
    with pytest.raises(RuntimeError, match="power of 2"):
        compile_products([Product("gemv", {"warps": 3, "rows": 1}, 1)])
