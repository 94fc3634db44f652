"""What each kernel of a compiled train step costs: bytes moved, FLOPs, and its class.

Bytes are operands read and outputs written. A fusion reads of an operand what its outputs need: the slice where it is
only sliced or gathered, through elementwise operations too; an update in place reads and writes the update; scratch
memory of a library's call does not count, nor does an array that goes through unchanged. Caches are not counted, so a
value that one kernel writes and the next reads is moved twice.

FLOPs are two for each multiply-add of convolutions and products, inside fusions too; taps in the padding count, as in
`models.flops`; holes of a dilated input do not. Elementwise operations, reductions and random bits count none; nor does
cuDNN's fused attention, whose call does not name its products.

Classes are recognised from what a kernel has inside (convolution, product, reduce, or only moves and casts) and from
JAX's name stack in the metadata: random numbers by the functions of `jax.random`, where most of a kernel's instructions
are theirs (dropout with the normalisation before it is such a kernel); attention as a batched product, and by `vmap`,
which nothing in the UNet but `jax.nn.dot_product_attention` uses; the optimizer (clipping, Adam, EMA) as what is not
differentiated, that is has no "jvp" in its path, though sums for logging and the preparation of a batch, which are
small, go there too. A normalisation's sums are reductions, also where the same kernel does elementwise operations.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from hlo import Array, Computation, Instruction, Launch, Module, launches, step_of

CONVOLUTION = "convolution"
PRODUCT = "matrix product"
ATTENTION = "attention"
ELEMENTWISE = "normalisation and elementwise"
REDUCTION = "reduction"
OPTIMIZER = "optimizer"
RANDOM = "random numbers"
COPY = "copy and layout"
CLASSES = (CONVOLUTION, PRODUCT, ATTENTION, ELEMENTWISE, REDUCTION, OPTIMIZER, RANDOM, COPY)

_SLICES = {"slice", "dynamic-slice", "gather"}
_MOVES = {
    *_SLICES,
    "bitcast",
    "bitcast-convert",
    "broadcast",
    "concatenate",
    "constant",
    "convert",
    "copy",
    "copy-start",
    "dynamic-update-slice",
    "get-tuple-element",
    "iota",
    "pad",
    "parameter",
    "reshape",
    "reverse",
    "transpose",
    "tuple",
}
# What reads every element of its operands, whichever of its own are needed.
_READS_ALL = {"reduce", "reduce-window", "convolution", "dot", "sort", "scatter", "custom-call", "fusion", "pad"}
_PASSES = {"bitcast", "copy", "reshape", "convert", "transpose", "get-tuple-element"}
_RANDOM = re.compile(r"threefry|_uniform|_bernoulli|_randint|_normal|erf_inv|random_bits|rng")


class Kernel(NamedTuple):
    """Costs of one kernel; bytes and FLOPs of a single run, `times` the runs in a step."""

    name: str
    kind: str
    bytes: int
    flops: int
    times: int


def step_kernels(module: Module) -> list[Kernel]:
    """The kernels of one train step."""
    return [kernel_cost(module, launch) for launch in launches(module, step_of(module)[0])]


def program_kernels(module: Module) -> dict[str, Kernel]:
    """All kernels of a program by name, also what runs once before and after the loop over the steps."""
    return {kernel.name: kernel for kernel in (kernel_cost(module, each) for each in launches(module, module.entry))}


def kernel_cost(module: Module, launch: Launch) -> Kernel:
    """Bytes, FLOPs and class of one kernel."""
    instruction, computation, times = launch
    flops = instruction_flops(module, computation, instruction)
    kind = _kind(module, instruction)
    return Kernel(instruction.name, kind, _moved(module, computation, instruction), flops, times)


def _fused(module: Module, instruction: Instruction) -> Computation | None:
    """The computation of a fusion, or of what runs asynchronously."""
    name = instruction.called.get("calls")
    return module.computations.get(name) if name else None


def _moved(module: Module, computation: Computation, instruction: Instruction) -> int:
    fused = _fused(module, instruction)
    if fused is not None:
        return _fusion_bytes(computation, instruction, fused)
    inputs = [computation.instructions[name] for name in dict.fromkeys(instruction.operands)]
    outputs = list(instruction.arrays)
    if instruction.opcode == "custom-call" and len(outputs) > 1:
        # The libraries' scratch memory comes last.
        while len(outputs) > 1 and outputs[-1].dtype in ("s8", "u8"):
            outputs.pop()
    elif instruction.opcode.endswith("-start"):
        # Its outputs name the operands and a context beside the result.
        return 2 * sum(i.bytes for i in inputs)
    elif instruction.opcode in _SLICES:
        return 2 * instruction.bytes + sum(i.bytes for i in inputs[1:])
    elif instruction.opcode == "dynamic-update-slice":
        return 2 * inputs[1].bytes
    return sum(i.bytes for i in inputs) + sum(array.bytes for array in outputs)


def _fusion_bytes(computation: Computation, instruction: Instruction, fused: Computation) -> int:
    used, written = _used_elements(fused)
    reads: Counter[str] = Counter()
    for operand, parameter in zip(instruction.operands, fused.parameters, strict=True):
        share = used[parameter.name] / max(1, sum(a.size for a in parameter.arrays))
        reads[operand] += round(share * parameter.bytes)
    return sum(min(read, computation.instructions[name].bytes) for name, read in reads.items()) + written


def _used_elements(fused: Computation) -> tuple[Counter[str], int]:
    """How many elements of each instruction the outputs of a fusion need, and the bytes that it writes."""
    used: Counter[str] = Counter()
    in_place, written = set(), 0
    root = fused.root
    for name in root.operands if root.opcode == "tuple" else (root.name,):
        output = source = fused.instructions[name]
        while source.opcode in _PASSES and source.operands:
            source = fused.instructions[source.operands[0]]
        if source.opcode == "dynamic-update-slice":
            in_place.add(source.name)
            update = fused.instructions[source.operands[1]]
            written += update.arrays[0].size * output.bytes // max(1, output.arrays[0].size)
        elif source.opcode != "parameter" or output.opcode in ("convert", "copy", "transpose"):
            written += output.bytes
        used[output.name] = max(used[output.name], sum(a.size for a in output.arrays))
    if root.opcode == "tuple":
        used[root.name] = 0
    for instruction in reversed(fused.instructions.values()):
        for operand, elements in _needs(fused, instruction, used[instruction.name], instruction.name in in_place):
            size = sum(a.size for a in fused.instructions[operand].arrays)
            used[operand] = min(size, used[operand] + elements)
    return used, written


def _needs(fused: Computation, instruction: Instruction, used: int, in_place: bool) -> Iterable[tuple[str, int]]:
    """How many elements of each operand `used` elements of an instruction need."""
    operands = [fused.instructions[name] for name in instruction.operands]
    sizes = [sum(a.size for a in operand.arrays) for operand in operands]
    size = max(1, sum(a.size for a in instruction.arrays))
    if not used or not operands:
        needs = [0] * len(sizes)
    elif instruction.opcode in _SLICES:
        needs = [used, *sizes[1:]]
    elif instruction.opcode == "dynamic-update-slice":
        rest = 0 if in_place else max(0, used - sizes[1])
        needs = [rest, *sizes[1:]]
    elif instruction.opcode in _READS_ALL and used == size:
        needs = sizes
    else:
        # Elementwise, concatenation, a part of a reduction: the same share of each operand, but one element at least.
        needs = [max(1, round(n * used / size)) if n else 0 for n in sizes]
        if instruction.opcode == "broadcast":
            needs = [min(sizes[0], used)]
    return zip(instruction.operands, needs, strict=True)


def instruction_flops(module: Module, computation: Computation, instruction: Instruction) -> int:
    """FLOPs of convolutions and products, those inside a fusion included."""
    fused = _fused(module, instruction)
    if fused is not None:
        return sum(instruction_flops(module, fused, inner) for inner in fused.instructions.values())
    operands = [computation.instructions[name].arrays for name in instruction.operands]
    target = custom_call_target(instruction)
    if instruction.opcode == "convolution" or target.startswith("__cudnn$conv"):
        return _convolution_flops(instruction, [a[0] for a in operands], target)
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        axes = [int(n) for n in contracted[1].split(",") if n] if contracted else []
    elif target.startswith("__cublas$") and "gemm_backend_config" in instruction.attributes:
        config = json.loads(_after(instruction.attributes, "dot_dimension_numbers"))
        axes = [int(n) for n in config["lhs_contracting_dimensions"]]
    else:
        return 0
    return 2 * instruction.arrays[0].size * math.prod(operands[0][0].dims[axis] for axis in axes)


def _is_batched(instruction: Instruction) -> bool:
    """Whether this is a product of two activations, image by image."""
    return re.search(r'lhs_batch_dim(?:s=\{|ensions":\[")\d', instruction.attributes) is not None


def _after(text: str, key: str) -> str:
    """The innermost JSON object that follows a key."""
    found = re.search(rf'"{key}":(\{{[^{{}}]*\}})', text)
    return found[1] if found else "{}"


def _convolution_flops(instruction: Instruction, operands: list[Array], target: str) -> int:
    result = instruction.arrays[0]
    labels = re.search(r"dim_labels=\w+_(\w+)->\w+", instruction.attributes)
    if labels is None:
        return 0
    # cuDNN's calls have the forward pass's labels: which arrays are its output and its kernel?
    output, kernel = result, operands[1]
    if target == "__cudnn$convBackwardInput":
        output = operands[0]
    elif target == "__cudnn$convBackwardFilter":
        output, kernel = operands[1], result
    flops = 2 * output.size * kernel.size // kernel.dims[labels[1].index("o")]
    dilation = re.search(r"lhs_dilate=([\dx]+)", instruction.attributes)
    return flops // math.prod(int(n) for n in dilation[1].split("x")) if dilation else flops


def custom_call_target(instruction: Instruction) -> str:
    """The library function of a custom call, or ""."""
    found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return found[1] if found else ""


def _kind(module: Module, instruction: Instruction) -> str:
    fused = _fused(module, instruction)
    inside = list(fused.instructions.values()) if fused is not None else [instruction]
    names = [i.op_name for i in inside if i.op_name and i.opcode not in ("parameter", "constant", "broadcast")]
    path = instruction.op_name or (names[-1] if names else "")
    opcodes, target = {i.opcode for i in inside}, custom_call_target(instruction)
    if "convolution" in opcodes or target.startswith("__cudnn$conv"):
        return CONVOLUTION
    if "vmap(" in path or "fmha" in target or any(_is_batched(i) for i in inside):
        return ATTENTION
    if "dot" in opcodes or target.startswith("__cublas"):
        return PRODUCT
    if (names and 2 * sum(bool(_RANDOM.search(name)) for name in names) > len(names)) or _RANDOM.search(path):
        return RANDOM
    if opcodes <= _MOVES:
        return COPY
    if "jvp" not in path and path:
        return OPTIMIZER
    return REDUCTION if opcodes & {"reduce", "reduce-window"} else ELEMENTWISE
