"""Compile kernels for GPUs that are not there, and read off what the compilers made of them.

Triton needs no device to compile for one. Every operator is called on meta tensors with its launches recorded, and
each launch is compiled in every configuration that it may run in, for every target. The figures are kept per
Triton version in `compiled/<version>.json`, so that a change of registers or shared memory shows in a diff:

    python -m ds_stacking.kernels.offline          # compile all and write the table
"""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from ds_stacking.kernels._launch import Kernel, Launch, describe
from ds_stacking.kernels.cases import CASES, Case

TABLE = Path(__file__).parent / "compiled" / f"{triton.__version__}.json"
"""Where the figures of the installed Triton are kept, beside those of others."""


@dataclass(kw_only=True, order=True)
class Compiled:
    """What became of one kernel in one configuration on one target."""

    case: str
    """Name of the recorded case, such as attention/d64-causal."""
    kernel: str
    """Name of the jitted function."""
    target: str
    """One of TARGETS."""
    config: str
    """Meta-parameters, warps and stages."""
    registers: int
    """Registers per thread (vector registers on AMD)."""
    spills: int
    """Bytes of local memory per thread on NVIDIA, spilled registers on AMD."""
    shared: int
    """Bytes of shared memory per program."""
    programs: int
    """Programs resident on one multiprocessor at once."""
    wgmma: int
    """Warp-group matrix instructions (Hopper)."""
    vectors: int
    """Loads and stores of 128 bits from and to global memory."""
    instructions: int
    """Instructions of the hot loop on sm_90 (see `hot_loop`); 0 on other targets."""
    special: int
    """Those of them that the special function units run: exp2, reciprocals, roots."""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What identifies a row of the table."""
        return self.case, self.kernel, self.target, self.config


@dataclass(kw_only=True)
class Task:
    """One compilation."""

    case: str
    launch: Launch
    target: str
    config: triton.Config


def tasks(cases: dict[str, Case]) -> list[Task]:
    """Every launch of every case in every configuration on every target; what a case repeats, once."""
    found: dict[tuple[str, str, str, str], Task] = {}
    for name, case in cases.items():
        for launch in case.launches():
            for target in case.targets:
                for config in launch.candidates(target):
                    task = Task(case=name, launch=launch, target=target, config=config)
                    found.setdefault((name, launch.kernel.fn.__name__, target, str(config)), task)
    return list(found.values())


def compile_all(todo: list[Task], workers: int) -> list[Compiled]:
    """Compile `todo` in `workers` processes; sorted by key."""
    global _todo
    _todo = todo
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        return sorted(pool.imap_unordered(_compile_nth, range(len(todo))), key=lambda row: row.key)


_todo: list[Task] = []


def _compile_nth(index: int) -> Compiled:
    return compile_one(_todo[index])


def compile_one(task: Task) -> Compiled:
    """Compile for a target that need not be present."""
    meta = {**task.config.kwargs, **task.launch.constexprs}
    backend = (
        GPUTarget("hip", task.target, 64)
        if task.target.startswith("gfx")
        else GPUTarget("cuda", int(task.target.removeprefix("sm_")), 32)
    )
    options = {"num_warps": task.config.num_warps, "num_stages": task.config.num_stages}
    compiled = triton.compile(_source(task.launch.kernel, task.launch.args, meta), target=backend, options=options)
    read = _read_amd if backend.backend == "hip" else _read_nvidia
    figures = read(compiled, task.target)
    shared, threads = compiled.metadata.shared, task.config.num_warps * backend.warp_size
    return Compiled(
        case=task.case, kernel=task.launch.kernel.fn.__name__, target=task.target, config=describe(task.config),
        shared=shared, programs=_resident(task.target, figures["registers"], shared, threads), **figures,
    )  # fmt: skip


def _source(kernel: Kernel, args: tuple[Any, ...], meta: dict[str, Any]) -> ASTSource:
    """The source as the just-in-time compiler specializes it: aligned pointers, integers that are multiples of 16."""
    signature, constexprs, attrs = {}, dict(meta), {}
    for index, (name, value) in enumerate(zip(kernel.fn.arg_names, args, strict=False)):
        signature[name] = mangle_type(value) if not isinstance(value, torch.Tensor) else _pointer(value.dtype)
        specialized = isinstance(value, int) and name not in (kernel.fn.do_not_specialize or ())
        if isinstance(value, torch.Tensor) or (specialized and value % 16 == 0):
            attrs[(index,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(meta, "constexpr")
    assert set(signature) == set(kernel.fn.arg_names), set(signature) ^ set(kernel.fn.arg_names)
    ordered = {name: signature[name] for name in kernel.fn.arg_names}
    return ASTSource(kernel.fn, ordered, constexprs=constexprs, attrs=attrs)


def _pointer(dtype: torch.dtype) -> str:
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32"}
    names |= {torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5"}
    return "*" + {**names, torch.int64: "i64", torch.bool: "i1"}[dtype]


def _read_nvidia(compiled: Any, target: str) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [str(tool), "-res-usage", *(["-sass"] if target == "sm_90" else []), cubin.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    ptx = compiled.asm["ptx"]
    vectors = r"(?:ld|st)\.global[\w.:]*\.v4\.b32|cp\.async\.cg\.shared\.global|cp\.async\.bulk"
    return {
        "registers": usage["REG"],
        "spills": usage["STACK"] + usage["LOCAL"],
        "wgmma": ptx.count("wgmma.mma_async"),
        "vectors": len(re.findall(vectors, ptx)),
        "instructions": len(loop := hot_loop(text)),
        "special": sum(operation.startswith("MUFU") for operation in loop),
    }


def hot_loop(sass: str) -> list[str]:
    """Operations of the loop that a program spends its time in, from the disassembly; of all where there is none.

    It is the first innermost loop with matrix products, which is the one of whole tiles: those that a sequence's end
    or the diagonal cuts have one of their own behind it. Without products it is the longest innermost loop.
    """
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*?)\s*;", sass)
    code = [(int(at, 16), operation) for at, operation in lines if not operation.startswith("NOP")]
    jumps = [(int(to[1], 16), at) for at, operation in code if (to := re.search(r"^BRA\b.*(0x[0-9a-f]+)", operation))]
    loops = [(begin, end) for begin, end in jumps if begin < end]
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = [[operation for at, operation in code if begin <= at <= end] for begin, end in sorted(inner)]
    products = [body for body in bodies if any(re.match(r"HGMMA|HMMA|IGMMA|QGMMA", operation) for operation in body)]
    if products:
        return products[0]
    return max(bodies, key=len, default=[operation for _, operation in code])


def _read_amd(compiled: Any, target: str) -> dict[str, int]:
    text = compiled.asm["amdgcn"]

    def figure(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # type: ignore[index]

    return {
        "registers": figure("vgpr_count"),
        "spills": figure("vgpr_spill_count"),  # scalar registers spill into vector registers, not into memory
        "wgmma": 0,
        "vectors": len(re.findall(r"(?:global|buffer)_(?:load|store)_dwordx4", text)),
        "instructions": 0,
        "special": 0,
    }


def _resident(target: str, registers: int, shared: int, threads: int) -> int:
    """Programs per multiprocessor, by registers (allocated in units of 8), shared memory and threads."""
    if target.startswith("gfx"):
        waves = min(8, 512 // (-(-max(registers, 1) // 8) * 8)) * 4 * 64 // threads
        return min(waves, 64 * 1024 // shared if shared else waves)
    by_registers = 65536 // (-(-registers // 8) * 8 * threads)
    total = (164 if target == "sm_80" else 228) * 1024
    return min(by_registers, total // (shared + 1024), 2048 // threads, 32)


def read_table(path: Path = TABLE) -> list[Compiled]:
    """The committed figures, by default of the installed Triton; empty where there are none."""
    return [Compiled(**row) for row in json.loads(path.read_text())] if path.exists() else []


def write_table(rows: list[Compiled]) -> None:
    """Write TABLE, one line per row."""
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("[\n" + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]\n")


def format_rows(rows: list[Compiled]) -> str:
    """`rows` as lines for a reader."""
    return "\n".join(
        f"{row.case:28} {row.kernel:22} {row.target:7} {row.config:44} regs {row.registers:3} spills {row.spills:4} "
        f"shared {row.shared:6} programs {row.programs:2} wgmma {row.wgmma:3} vectors {row.vectors:2} "
        f"instructions {row.instructions:4} special {row.special}"
        for row in rows
    )


if __name__ == "__main__":
    table = compile_all(tasks(CASES), workers=2)
    write_table(table)
    print(format_rows(table))
