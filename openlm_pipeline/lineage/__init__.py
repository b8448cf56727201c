"""Where things came from and what became of them: between raw records, samples, steps, checkpoints and scores."""

SCAN_VERSION = 1
"""Raised when the same task files would have other windows, or the same shards other occurrences of them."""
