"""Compile launches for GPUs that are not there, with the compiler that triton brings, and read what came out.

Not under TRITON_INTERPRET, which replaces the kernels: tests start this in a process of its own.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from model.kernels import launch, linear_fwd
from model.kernels.launch import Launch
from model.kernels.tiles import ARCHITECTURES, SHARED_LIMIT, WIDTHS

TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32",
}  # fmt: skip
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Report:
    """registers of a thread; stack: bytes of it a thread (anything above 0 is spilled); shared: bytes of a block."""

    registers: int
    stack: int
    shared: int
    matrix: str


def compile_launch(launch: Launch, arch: int) -> Report:
    """The kernel of a launch as the launcher would build it: pointers aligned to 16 bytes, integers not specialised."""
    signature: dict[str, str] = {}
    constants = dict(launch.constants)
    aligned = {}
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name)
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            aligned[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype][1:]}{value.block_shape}>"
        elif value is None:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
        else:
            signature[name] = "i32"
    built = triton.compile(
        ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(number) for number in re.findall(r"(?:REG|STACK):(\d+)", usage)[:2])
    found = [kind for kind in ("wgmma", "tcgen05.mma", "mma.sync") if kind in built.asm["ptx"]]
    return Report(registers=registers, stack=stack, shared=built.metadata.shared, matrix="+".join(found) or "none")


def plans(arch: int, width: int, dtype: torch.dtype, *, norm: bool, softcap: float) -> list[Launch]:
    """Every kernel of a forward and a backward with these settings; nothing is allocated."""

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=of, device="meta")

    rows, heads = 1024, 16
    q, k, v = empty(rows, 3, heads, width).unbind(1)
    starts = empty(9, of=torch.int32)
    table = empty(rows, width, of=torch.float32)
    gain = empty(heads, width) if norm else None
    problem = launch.Problem(q, k, v, starts, starts, table, table, gain, gain, softcap, arch)
    out, lse = empty(rows, heads, width), empty(heads, rows, of=torch.float32)
    inner = torch.float32 if norm else dtype
    dq, dk, dv = empty(rows, heads, width, of=inner), empty(rows, heads, width, of=inner), empty(rows, heads, width)
    found = launch.plan_forward(problem, out, lse) + launch.plan_backward(problem, out, lse, out, dq, dk, dv)
    if gain is not None:
        shares = empty(rows // launch.NORM_BACKWARD_ROWS, heads, width, of=torch.float32)
        found.append(launch.plan_norm_backward(q, dq, gain, dv, shares))
    return list({plan.kernel: plan for plan in found}.values())


def linear_plans(arch: int, dtype: torch.dtype) -> list[Launch]:
    """The linear kernel for the published network's layers: K and C that whole tiles make up, and that they do not."""

    def plan(inner: int, columns: int, bias: bool) -> Launch:
        x, weight, shift, out = (
            torch.empty(*shape, dtype=dtype, device="meta")
            for shape in ((1024, inner), (columns, inner), (columns,), (1024, columns))
        )
        return linear_fwd.plan_linear(x, weight, shift if bias else None, out, arch)

    return [plan(1152, 3456, True), plan(4304, 1152, True), plan(48, 1152, False)]


def faults(report: Report, arch: int, dtype: torch.dtype) -> list[str]:
    """What a shipped setting may not do."""
    found = []
    if report.stack:
        found.append(f"spills {report.stack} bytes")
    if report.shared > SHARED_LIMIT[arch]:
        found.append(f"shared memory over {SHARED_LIMIT[arch]}")
    if dtype == torch.float32 and report.matrix != "none":
        found.append("float32 products on matrix units, which round to tf32")  # seen on sm_100 with 64 rows
    return found


def main() -> int:
    """Compile, print a line for each kernel, return 1 if one has a fault."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("archs", type=int, nargs="*", default=list(ARCHITECTURES))
    parser.add_argument("--all", action="store_true", help="every head width and option, not only the table's entries")
    arguments = parser.parse_args()
    # The published stacks, the widest head, and the window attention of the Gaussian decoder.
    wanted = [(72, True, 0.0), (128, True, 0.0), (64, False, 30.0)]
    if arguments.all:
        wanted = [(width, norm, 0.0) for width in WIDTHS for norm in (True, False)]
        wanted += [(width, False, 30.0) for width in WIDTHS]
    failed = False
    print(f"{'arch':>5} {'width':>5} {'type':8} {'kernel':21} {'options':12} {'regs':>4} spill {'shared':>7} matrix")

    def show(plan: Launch, arch: int, width: int, dtype: torch.dtype, options: str) -> bool:
        report = compile_launch(plan, arch)
        wrong = faults(report, arch, dtype)
        print(
            f"{arch:5} {width:5} {str(dtype).removeprefix('torch.'):8} {plan.kernel.__name__:21} {options:12} "
            f"{report.registers:4} {report.stack:5} {report.shared:7} {report.matrix} {'; '.join(wrong)}",
            flush=True,
        )
        return bool(wrong)

    for arch, dtype in itertools.product(arguments.archs, (torch.bfloat16, torch.float32)):
        for width, norm, cap in wanted:
            options = "+".join(["norm"] * norm + ["softcap"] * bool(cap)) or "-"
            for plan in plans(arch, width, dtype, norm=norm, softcap=cap):
                failed |= show(plan, arch, width, dtype, options)
        for plan in linear_plans(arch, dtype):
            options = "bias" if plan.arguments["bias"] is not None else "-"
            failed |= show(plan, arch, plan.constants["INNER"], dtype, options)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
