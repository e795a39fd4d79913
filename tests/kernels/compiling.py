"""Compile recorded kernel launches for a GPU that is not there, and read what ptxas says of them."""

import re
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from sla2_kernels import launch

TYPES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.float8_e4m3fn: "fp8e4nv",
}
DIVISIBLE = [["tt.divisibility", 16]]


@dataclass
class Launch:
    """One recorded launch."""

    function: JITFunction
    arguments: tuple
    options: dict

    @property
    def name(self) -> str:
        return self.function.__name__.strip("_")

    def source(self) -> ASTSource:
        """The source as the launcher would specialise it: aligned pointers, multiples of 16, ones as constants."""
        names = self.function.arg_names
        values = dict(zip(names, self.arguments, strict=False)) | {
            name: value for name, value in self.options.items() if name in names
        }
        signature, constants, attributes = {}, {}, {}
        for index, (name, parameter) in enumerate(zip(names, self.function.params, strict=True)):
            value = values[name]
            if parameter.is_constexpr or (type(value) is int and value == 1) or value is None:
                signature[name], constants[(index,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name], attributes[(index,)] = f"*{TYPES[value.dtype]}", DIVISIBLE
            elif isinstance(value, TensorDescriptor | GluonDescriptor):
                shape = ",".join(map(str, value.block_shape))
                layout = f",{value.layout!r}" if isinstance(value, GluonDescriptor) else ""
                signature[name] = f"tensordesc<{TYPES[value.base.dtype]}[{shape}]{layout}>"
            elif isinstance(value, int):
                signature[name] = "i32"
                if value % 16 == 0:
                    attributes[(index,)] = DIVISIBLE
            else:
                signature[name] = "fp32"
        source = GluonASTSource if self.function.is_gluon() else ASTSource
        return source(self.function, signature, constants, attributes)

    def compile(self, arch: int):
        options = {name: self.options[name] for name in ("num_warps", "num_stages", "maxnreg") if name in self.options}
        return triton.compile(self.source(), target=GPUTarget("cuda", arch, 32), options=options)


@contextmanager
def recorded(arch: int):
    """Record launches instead of starting them; launch tables answer for the architecture."""
    launches = []

    def record(self, *arguments, grid, warmup, **options):
        launches.append(Launch(self, arguments, options))

    with (
        patch.object(JITFunction, "run", record),
        patch.object(launch, "architecture", lambda device: arch),
    ):
        yield launches


@dataclass
class Report:
    """What a compiled kernel takes."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    ptx: str


def report(launch: Launch, arch: int) -> Report:
    """Compile one launch and assemble it with ptxas's own account of registers and spills."""
    kernel = launch.compile(arch)
    knobs = triton.knobs.nvidia
    ptxas = (knobs.ptxas_blackwell if arch >= 100 else knobs.ptxas).path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        suffix = "a" if arch >= 90 else ""
        command = [ptxas, "-v", f"--gpu-name=sm_{arch}{suffix}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    registers = re.findall(r"Used (\d+) registers", said)
    return Report(max(map(int, registers)), sum(map(int, spills)), kernel.metadata.shared, kernel.asm["ptx"])
