"""Compiles the Triton kernels for a GPU that is not here, and reads the machine code.

Launches are recorded instead of run: the wrappers decide the arguments, as on a GPU. The tests themselves run in
Triton's interpreter, which compiles nothing, so they call `compile_products`, which does it in a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

_TYPES = {
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}


Launch = tuple[JITFunction, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Product:
    """A product to compile the kernel "gemv" or "dot" for, on a GPU of compute capability `capability` / 10; or
    "sweep", SparseGPT's sweep over `tokens` columns of a weight."""

    kernel: str
    config: dict[str, Any]
    tokens: int
    pattern: str = "2:4"
    dtype: str = "bfloat16"
    capability: int = 90
    out_features: int = 4096
    in_features: int = 4096
    values: str | None = None  # the type of quantised ones
    group_size: int = 4096

    def __str__(self) -> str:
        config = " ".join(f"{name}={value}" for name, value in self.config.items())
        shape = f"{self.out_features}x{self.in_features} t{self.tokens}"
        values = f"{self.values}/{self.group_size} " if self.values else ""
        return f"sm_{self.capability} {self.kernel} {self.pattern} {values}{self.dtype} {shape} {config}"


@dataclass
class MachineCode:
    """What the assembler made of a kernel. `opcodes` counts instructions by full name; `loop` those of its longest
    loop, loops within it included; `spilled` bytes of stack, `shared` bytes of shared memory, `registers` of a
    thread."""

    name: str
    opcodes: Counter[str]
    loop: Counter[str]
    registers: int
    spilled: int
    shared: int
    text: str = field(default="", repr=False)

    def count(self, *prefixes: str) -> int:
        return _count(self.opcodes, *prefixes)

    def count_in_loop(self, *prefixes: str) -> int:
        return _count(self.loop, *prefixes)


def compile_products(products: Sequence[Product]) -> list[MachineCode]:
    """The machine code of the one kernel that each product launches; compiled in another process, with a cache of its
    own, so that nothing compiled before is taken for what the sources now say. Raises RuntimeError."""
    with tempfile.TemporaryDirectory() as cache:
        # Without a GPU: the recorded launches would ask it for its capability.
        environment = {**os.environ, "TRITON_CACHE_DIR": cache, "CUDA_VISIBLE_DEVICES": ""}
        environment.pop("TRITON_INTERPRET", None)
        done = subprocess.run(
            [sys.executable, "-m", f"{__package__}.machine_code"],
            input=json.dumps([asdict(product) for product in products]),
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
            env=environment,
        )
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    rows = json.loads(done.stdout)
    return [MachineCode(**{**row, **{name: Counter(row[name]) for name in ("opcodes", "loop")}}) for row in rows]


def record_launches(run: Callable[[], Any]) -> list[Launch]:
    """The Triton kernels that `run` launches, with their arguments; none is run."""
    launches: list[Launch] = []
    original = JITFunction.run

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((self, args, kwargs))

    JITFunction.run = record  # type: ignore[method-assign]
    try:
        run()
    finally:
        JITFunction.run = original  # type: ignore[method-assign]
    return launches


def _main() -> None:
    """Products from standard input, machine code to standard output."""
    products = [Product(**row) for row in json.load(sys.stdin)]
    launches = [_launch(product) for product in products]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        codes = threads.map(_compile, launches, [product.capability for product in products])
        json.dump([{**vars(code), "text": ""} for code in codes], sys.stdout)


def _launch(product: Product) -> Launch:
    from optimum_ksparse import Pattern
    from optimum_ksparse.kernels.candidates import GROUPS
    from optimum_ksparse.kernels.triton.dot import dot
    from optimum_ksparse.kernels.triton.gemv import gemv
    from optimum_ksparse.pruners.sweep_kernel import sweep

    dtype, rows, columns = getattr(torch, product.dtype), product.out_features, product.in_features
    if product.kernel == "sweep":
        block, factor = torch.empty(product.tokens, rows), torch.empty(columns, columns)[:, : product.tokens]
        mask = torch.empty(product.tokens, rows, dtype=torch.bool)
        (launch,) = record_launches(lambda: sweep(block, factor, Pattern(product.pattern), mask))
        return launch
    x, bias = torch.empty(product.tokens, columns, dtype=dtype), torch.empty(rows, dtype=dtype)
    values = torch.empty(rows, columns // 2, dtype=dtype)
    bits = torch.empty(rows, -(-columns // 8), dtype=torch.uint8)
    run = {"gemv": gemv, "dot": dot}[product.kernel]
    config = dict(product.config)
    if product.values is not None:
        packed = {"int8": (torch.int8, columns // 2), "int4": (torch.uint8, columns // 4)}[product.values]
        values = torch.empty(rows, packed[1], dtype=packed[0])
        scale = torch.empty(rows, -(-columns // product.group_size), dtype=dtype)
        config |= {"scale": scale, "group_size": product.group_size}
    (launch,) = record_launches(lambda: run(x, values, bits, bias, GROUPS[product.pattern], **config))
    return launch


def _compile(launch: Launch, capability: int) -> MachineCode:
    kernel, args, kwargs = launch
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif kernel.params[position].is_constexpr or value is None or value == 1:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        text = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
    lines = text.splitlines()
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    return MachineCode(
        kernel.__name__,
        _opcodes(lines),
        _opcodes(_longest_loop(lines)),
        int(registers),
        int(stack),
        compiled.metadata.shared,
        text,
    )


def _opcodes(lines: list[str]) -> Counter[str]:
    pattern = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P[T\d]+ )?([A-Z0-9_.]+)")
    matches = map(pattern.match, lines)
    return Counter(match[1] for match in matches if match is not None)


def _longest_loop(lines: list[str]) -> list[str]:
    """From a label to the last branch back to it."""
    labels: dict[str, int] = {}
    longest: list[str] = []
    for number, line in enumerate(lines):
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = number
        elif (branch := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)) and branch[1] in labels:
            loop = lines[labels[branch[1]] : number + 1]
            longest = max(longest, loop, key=len)
    return longest


def _count(opcodes: Counter[str], *prefixes: str) -> int:
    return sum(number for name, number in opcodes.items() if name.startswith(prefixes))


if __name__ == "__main__":
    _main()
