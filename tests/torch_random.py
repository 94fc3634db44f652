"""PyTorch's CPU generator and default initialisation in NumPy: a golden network is a seed and its shapes.

The generator is the Mersenne Twister, seeded as NumPy's frozen `RandomState` is; how draws are made of its
words follows ATen's `DistributionsHelper.h` and `DistributionTemplates.h` (torch 2).
"""

import numpy as np


class TorchGenerator:
    """The draws that follow `torch.manual_seed(seed)` on CPU."""

    def __init__(self, seed: int):
        self._twister = np.random.RandomState(seed)
        self._next_normal = None

    def _words(self, count):
        return self._twister.randint(0, 2**32, size=count, dtype=np.uint32)

    def _unit(self, count):
        return (self._words(count) & 0xFFFFFF) * 2.0**-24

    def _unit_double(self):
        high, low = map(int, self._words(2))
        return ((high << 32 | low) & (1 << 53) - 1) * 2.0**-53

    def uniform(self, bound: float, shape: tuple[int, ...]) -> np.ndarray:
        """`torch.empty(shape).uniform_(-bound, bound)`, float32, bit for bit."""
        low, width = float(np.float32(-bound)), float(np.float32(bound) - np.float32(-bound))
        return (self._unit(np.prod(shape)) * width + low).astype(np.float32).reshape(shape)

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        """`torch.randn(shape)`, float64; PyTorch's own float32 logarithms and cosines round differently."""
        count = int(np.prod(shape))
        if count < 16:
            return np.array([self._one_normal() for _ in range(count)]).reshape(shape)
        out = np.empty(count)
        units, blocks = self._unit(count), count // 16 * 16
        out[:blocks] = _box_muller(units[:blocks])
        if count > blocks:
            # The last 16 are drawn again together.
            out[-16:] = _box_muller(self._unit(16))
        return out.reshape(shape)

    def _one_normal(self):
        if self._next_normal is not None:
            value, self._next_normal = self._next_normal, None
            return value
        angle, radius = 2 * np.pi * self._unit_double(), np.sqrt(-2 * np.log1p(-self._unit_double()))
        self._next_normal = radius * np.sin(angle)
        return radius * np.cos(angle)


def _box_muller(units):
    """Normals from uniforms, eight pairs at a time: [16n] -> [16n]."""
    first, second = np.moveaxis(units.reshape(-1, 2, 8), 1, 0)
    radius, angle = np.sqrt(-2 * np.log(1 - first)), 2 * np.pi * second
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)


def initial_weights(seed: int, shapes: dict, constructed: list, perturbation: float = 0.0) -> dict:
    """A network's state_dict just after `torch.manual_seed(seed)` and its construction.

    Args:
      seed: of the generator.
      shapes: tensor name -> shape, in the order of `named_parameters()`.
      constructed: the names in the order in which their modules are constructed, weight before bias.
      perturbation: factor of the normal draws that are then added to each tensor, in the order of `shapes`.

    Returns:
      Name -> float32 array, in the order of `shapes`; equal bit for bit, perturbed ones to 2 ulp.
    """
    generator, tensors = TorchGenerator(seed), {}
    for name in constructed:
        module, leaf = name.rsplit(".", 1)
        if "norm" in module:
            tensors[name] = np.full(shapes[name], leaf == "weight", np.float32)
        else:
            # `nn.Linear` and `nn.Conv2d`: uniform in ±1/√fan_in, weights and biases.
            fan_in = np.prod(shapes[f"{module}.weight"][1:])
            tensors[name] = generator.uniform(fan_in**-0.5, shapes[name])
    if perturbation:
        for name, shape in shapes.items():
            tensors[name] = (tensors[name] + perturbation * generator.normal(shape)).astype(np.float32)
    return {name: tensors[name] for name in shapes}


def sketch(tensors: dict, size: int = 8192) -> np.ndarray:
    """A random projection of all tensors together: [size], float64 (CountSketch, Charikar et al. 2002).

    Each entry, with a random sign, is added to one of `size` sums. A sketch is linear in the tensors, and its
    norm is that of all entries to within about 1/√(2·size), 1 %.
    """
    entries = np.concatenate([np.ravel(tensors[name]) for name in sorted(tensors)]).astype(np.float64)
    rng = np.random.RandomState(0)
    places, signs = rng.randint(size, size=len(entries)), rng.choice([-1.0, 1.0], len(entries))
    return np.bincount(places, signs * entries, size)
