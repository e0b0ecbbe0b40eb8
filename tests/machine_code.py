"""Compiles the Triton kernels for a GPU that is not here, and reads the machine code.

Launches are recorded instead of run: the wrappers decide the arguments, as on a GPU.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
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
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}


@dataclass
class MachineCode:
    """What the assembler made of a kernel. `opcodes` counts instructions by full name; `loop` those of its longest
    loop; `spilled` bytes of stack, `shared` bytes of shared memory, `registers` of a thread, `seconds` to compile."""

    name: str
    opcodes: Counter[str]
    text: str
    registers: int
    spilled: int
    shared: int

    def count(self, prefix: str) -> int:
        return sum(number for name, number in self.opcodes.items() if name.startswith(prefix))


def compile_launches(run: Callable[[], Any], capability: int) -> list[MachineCode]:
    """The machine code, for `sm_<capability>`, of each Triton kernel that `run` launches."""
    launches: list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]] = []
    original = JITFunction.run

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((self, args, kwargs))

    JITFunction.run = record  # type: ignore[method-assign]
    try:
        run()
    finally:
        JITFunction.run = original  # type: ignore[method-assign]
    return [_compile(*launch, capability) for launch in launches]


def _compile(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any], capability: int) -> MachineCode:
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
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)", text, re.M)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    return MachineCode(kernel.__name__, Counter(opcodes), text, int(registers), int(stack), compiled.metadata.shared)
