"""A seeded permutation of 0..n-1 that needs no memory: a Feistel network with cycle walking.

Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002). The round function is SplitMix64's mixer.
"""

from collections.abc import Callable

import numpy as np

_MASK = (1 << 64) - 1
_ROUNDS = 6


def mix(value: int) -> int:
    """SplitMix64's finaliser: 64 well-mixed bits of a 64-bit integer."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def mix_array(value: np.ndarray) -> np.ndarray:
    """`mix` of each element of a uint64 array."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value ^= value >> np.uint64(30)
    value *= np.uint64(0xBF58476D1CE4E5B9)
    value ^= value >> np.uint64(27)
    value *= np.uint64(0x94D049BB133111EB)
    value ^= value >> np.uint64(31)
    return value


def permute_array(indices: np.ndarray, size: int | np.ndarray, seed: int | np.ndarray) -> np.ndarray:
    """The place of each index in a permutation of range(size) chosen by `seed`, as int64 of the same shape.

    Args:
        size: of all permutations, up to 2**53, or of each element's.
        seed: of all permutations, or of each element's, uint64.

    Raises:
        IndexError: an index is not in range(size).
    """
    return _walk(indices, size, seed, _forward)


def unpermute_array(places: np.ndarray, size: int | np.ndarray, seed: int | np.ndarray) -> np.ndarray:
    """The inverse of `permute_array`: the index that has each place."""
    return _walk(places, size, seed, _backward)


def _walk(
    indices: np.ndarray,
    size: int | np.ndarray,
    seed: int | np.ndarray,
    rounds: Callable[..., tuple[np.ndarray, np.ndarray]],
) -> np.ndarray:
    """Apply the network, in one direction, until each value is in its range."""
    if ((indices < 0) | (indices >= size)).any():
        raise IndexError("an index is not in range(size)")
    sizes, seeds = _each(size), _each(seed & _MASK if isinstance(seed, int) else seed)
    half = np.maximum(1, (np.frexp(sizes - np.uint64(1))[1] + 1) // 2).astype(np.uint64)
    low = (np.uint64(1) << half) - np.uint64(1)
    keys = [mix_array(mix_array(seeds) ^ np.uint64(r)) for r in range(_ROUNDS)]
    out = indices.astype(np.uint64).ravel()
    walking = np.arange(out.size)
    while walking.size:
        value, shift, mask = out[walking], _of(walking, half), _of(walking, low)
        left, right = rounds(value >> shift, value & mask, mask, [_of(walking, key) for key in keys])
        value = (left << shift) | right
        out[walking] = value
        walking = walking[value >= _of(walking, sizes)]
    return out.astype(np.int64).reshape(indices.shape)


def _forward(left: np.ndarray, right: np.ndarray, mask: np.ndarray, keys: list) -> tuple[np.ndarray, np.ndarray]:
    for key in keys:
        mixed = mix_array(right ^ key)
        mixed &= mask
        mixed ^= left
        left, right = right, mixed
    return left, right


def _backward(left: np.ndarray, right: np.ndarray, mask: np.ndarray, keys: list) -> tuple[np.ndarray, np.ndarray]:
    return _forward(right, left, mask, keys[::-1])[::-1]


def _each(values: int | np.ndarray) -> np.ndarray:
    """uint64[n], or uint64[1] where all are the same, which is several times faster."""
    values = np.atleast_1d(np.asarray(values, np.uint64)).ravel()
    return values[:1] if (values == values[:1]).all() else values


def _of(walking: np.ndarray, values: np.ndarray) -> np.ndarray:
    return values if len(values) <= 1 else values[walking]
