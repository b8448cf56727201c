"""A seeded permutation of 0..n-1 that needs no memory: a Feistel network with cycle walking.

Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002). The round function is SplitMix64's mixer.
"""

import numpy as np

_MASK = (1 << 64) - 1
_ROUNDS = 6


def mix(value: int) -> int:
    """SplitMix64's finaliser: 64 well-mixed bits of a 64-bit integer."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def permute(index: int, size: int, seed: int) -> int:
    """The place of `index` in a permutation of range(size) chosen by `seed`.

    Raises:
        IndexError: index is not in range(size).
    """
    if not 0 <= index < size:
        raise IndexError(f"{index} is not in range({size})")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    keys = [mix(mix(seed & _MASK) ^ r) for r in range(_ROUNDS)]
    while True:  # the domain is less than 4 * size, so this ends after a few walks
        left, right = index >> half, index & low
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) & low)
        index = (left << half) | right
        if index < size:
            return index


def _mix_array(value: np.ndarray) -> np.ndarray:
    """`mix` of each element of a uint64 array."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def permute_array(indices: np.ndarray, size: int, seed: int) -> np.ndarray:
    """`permute` of each element of an integer array, as int64 of the same shape.

    Raises:
        IndexError: an index is not in range(size).
    """
    if indices.size and not (0 <= indices.min() and indices.max() < size):
        raise IndexError(f"an index is not in range({size})")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    shift, low = np.uint64(half), np.uint64((1 << half) - 1)
    keys = [np.uint64(mix(mix(seed & _MASK) ^ r)) for r in range(_ROUNDS)]
    out = indices.astype(np.uint64).ravel()
    walking = np.arange(out.size)
    while walking.size:
        value = out[walking]
        left, right = value >> shift, value & low
        for key in keys:
            left, right = right, left ^ (_mix_array(right ^ key) & low)
        value = (left << shift) | right
        out[walking] = value
        walking = walking[value >= size]
    return out.astype(np.int64).reshape(indices.shape)
