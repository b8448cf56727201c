"""The content hash of a raw file behind any fsspec URL."""

from openlm_pipeline.files import sha256_stream
from openlm_pipeline.remote import open_remote


def sha256_url(url: str) -> str:
    """Hex digest of the bytes at `url`, read in bounded memory."""
    with open_remote(url, "raw file") as f:
        return sha256_stream(f)
