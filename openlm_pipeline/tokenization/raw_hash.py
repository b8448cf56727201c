"""The content hash of a raw file behind any fsspec URL."""

import hashlib

import fsspec


def sha256_url(url: str) -> str:
    """Hex digest of the bytes at `url`, read in bounded memory."""
    digest = hashlib.sha256()
    with fsspec.open(url, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
