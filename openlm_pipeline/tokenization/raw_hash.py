"""The content hash of a raw file behind any fsspec URL."""

import fsspec

from openlm_pipeline.files import sha256_stream


def sha256_url(url: str) -> str:
    """Hex digest of the bytes at `url`, read in bounded memory."""
    with fsspec.open(url, "rb") as f:
        return sha256_stream(f)
