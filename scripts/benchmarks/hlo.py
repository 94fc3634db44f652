"""Reads the text of a compiled XLA module: its computations, what an instruction moves, and which of them are kernels.

Text only, no jax: `compiled.as_text()` in, plain values out. What a kernel costs and its class: `kernel_costs.py`.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# Bits of an element; types that are not here (token, opaque) take no memory.
_BITS = {"pred": 8, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_COMMENT = re.compile(r"/\*.*?\*/")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")

# What launches nothing on the device. Of an asynchronous pair the start counts.
NOT_KERNELS = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "add-dependency",
    "get-dimension-size",
}
CONTAINERS = {"while", "call", "conditional"}


class Array(NamedTuple):
    """An element type and the dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype) or (int(digits[0]) if digits else 0)
        return -(-self.size * bits // 8)


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
      arrays: its outputs, the leaves of the tuple in order.
      operands: names of instructions of the same computation.
      attributes: what follows the operands: window, metadata, backend_config.
      root: whether it is what its computation returns.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    @property
    def called(self) -> dict[str, str]:
        """Computations that it calls, by attribute: {"body": ..., "condition": ...}."""
        return dict(_CALLED.findall(self.attributes))

    @property
    def op_name(self) -> str:
        """JAX's name stack: "jit(chunk)/while/body/transpose(jvp())/mul"; "" if there is none."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


class Computation(NamedTuple):
    """A computation: its instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.root)

    @property
    def parameters(self) -> list[Instruction]:
        """In the order of the caller's operands."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(re.match(r"\((\d+)\)", i.attributes)[1]))  # type: ignore[index]


class Module(NamedTuple):
    """The computations by name, and the name of the one that is run."""

    computations: dict[str, Computation]
    entry: str


class Launch(NamedTuple):
    """A kernel, its computation, and how often it runs for one run of the requested computation."""

    instruction: Instruction
    computation: Computation
    times: int


def parse(text: str) -> Module:
    """The computations of `compiled.as_text()`.

    Raises:
      ValueError: if there is no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in text.splitlines():
        if line.startswith((" ", "\t")):
            if current is not None and (instruction := _parse_instruction(line)):
                current.instructions[instruction.name] = instruction
        elif head := _HEAD.match(line):
            current = computations[head[2]] = Computation(head[2], {})
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
    if entry is None:
        raise ValueError("the text has no ENTRY computation; give what `as_text()` of a compiled program returns")
    return Module(computations, entry)


def _parse_instruction(line: str) -> Instruction | None:
    head = _INSTRUCTION.match(line)
    if head is None:
        return None
    rest = _COMMENT.sub("", line[head.end() :])
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode = _OPCODE.match(rest, end)
    if opcode is None:
        return None
    close = _closing(rest, opcode.end() - 1)
    inside, attributes = rest[opcode.end() : close], rest[close + 1 :]
    if opcode[1] == "parameter":
        attributes = f"({inside}){attributes}"
    operands = () if opcode[1] == "constant" else tuple(_OPERAND.findall(inside))
    return Instruction(head[2], opcode[1], arrays(rest[:end]), operands, attributes, bool(head[1]))


def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape such as "(f32[2,3]{1,0}, u32[])"."""
    return tuple(
        Array(dtype, tuple(int(n) for n in dims.split(",")) if dims else ()) for dtype, dims in _ARRAY.findall(shape)
    )


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


def is_kernel(instruction: Instruction) -> bool:
    """Whether an instruction launches something on the device itself."""
    done = instruction.opcode.endswith(("-done", "-update")) and instruction.opcode != "dynamic-update-slice"
    return not done and instruction.opcode not in NOT_KERNELS | CONTAINERS


def launches(module: Module, name: str, times: int = 1) -> Iterator[Launch]:
    """All kernels of a computation, those of inner loops as often as they run; of branches those of the longest."""
    computation = module.computations[name]
    for instruction in computation.instructions.values():
        if is_kernel(instruction):
            yield Launch(instruction, computation, times)
        elif instruction.opcode == "while":
            yield from launches(module, instruction.called["body"], times * trip_count(instruction))
        elif instruction.opcode == "call":
            yield from launches(module, instruction.called["to_apply"], times)
        elif instruction.opcode == "conditional":
            branches = [list(launches(module, branch, times)) for branch in _branches(instruction)]
            yield from max(branches, key=len)


def _branches(instruction: Instruction) -> list[str]:
    found = _BRANCHES.search(instruction.attributes)
    if found:
        return [name.strip().lstrip("%") for name in found[1].split(",")]
    return [instruction.called["true_computation"], instruction.called["false_computation"]]


def trip_count(loop: Instruction) -> int:
    """How often a loop runs, as XLA found; 1 where it did not."""
    found = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    return int(found[1]) if found else 1


def step_of(module: Module) -> tuple[str, int]:
    """The computation that does one train step, and how often the program runs it.

    It is the body of the outermost loop with the most kernels. A program without a loop is one step itself.
    """
    loops = [i for c in _reached(module, module.entry) for i in c.instructions.values() if i.opcode == "while"]
    if not loops:
        return module.entry, 1

    def kernels(loop):
        return sum(1 for _ in launches(module, loop.called["body"]))

    largest = max(loops, key=kernels)
    return largest.called["body"], trip_count(largest)


def _reached(module: Module, name: str) -> Iterator[Computation]:
    """A computation and those that it calls outside loops."""
    computation = module.computations[name]
    yield computation
    for instruction in computation.instructions.values():
        if instruction.opcode == "call":
            yield from _reached(module, instruction.called["to_apply"])
