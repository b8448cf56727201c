"""Where an exact text stands in the shards: their tokens are made bytes again and searched, in bounded memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.tokenizers.engine import load_any
from openlm_pipeline.tokenizers.token_bytes import texts_of_ids

_BLOCK_TOKENS = 1 << 20
_END = b"\xff"
"""Stands for the end-of-text: no byte of UTF-8, so nothing is found across documents."""


@dataclass(frozen=True)
class Found:
    """A place where the text stands."""

    begin: int
    """Token of the dataset, of its samples one after the other, that has its first byte."""
    end: int
    """That after its last."""


def find_text(
    dataset: ShardedDataset, tokenizer: Path, text: str, told: Callable[[int], None] = lambda shard: None
) -> Iterator[Found]:
    """All places of a text in the documents of a dataset, in order; it may reach from one shard into the next.

    The documents are compared as the tokenizer keeps them: of a byte-level one that normalises, the text is normalised
    too. Some 7M tokens a second; a block of them and the longest text are in memory.

    Args:
        tokenizer: `tokenizer.json` of the dataset.
        told: called with the number of each shard before it is searched.

    Raises:
        DataError: a shard is damaged, or tokens of this kind of tokenizer don't tell their bytes.
    """
    pieces = [text or b"" for text in texts_of_ids(tokenizer, named=True)]
    normalizer = load_any(tokenizer).normalizer
    if normalizer is not None and "ByteLevel" in str(load_any(tokenizer).decoder):
        text = normalizer.normalize_str(text)
    needle = text.encode()
    pieces += [b""] * (1 + int(dataset.info["tokenizer"].get("largest_id", 0)) - len(pieces))
    pieces[dataset.info["eot_id"]] = _END
    sizes = np.array([len(piece) for piece in pieces])
    kept, begin = np.zeros(0, np.int64), 0
    """Tokens that a text may begin in which goes on in the next block, and the first one's number."""
    for k in range(len(dataset.entries)):
        told(k)
        ids = dataset.shard_samples(k).reshape(-1)
        for at in range(0, len(ids), _BLOCK_TOKENS):
            block = np.concatenate([kept, ids[at : at + _BLOCK_TOKENS]])
            searched = b"".join(map(pieces.__getitem__, block.tolist()))
            known, ends = int(sizes[kept].sum()), None
            place = searched.find(needle)
            while place >= 0:
                if place + len(needle) > known:  # else it was found before
                    ends = np.cumsum(sizes[block]) if ends is None else ends
                    first, last = np.searchsorted(ends, [place, place + len(needle) - 1], side="right")
                    yield Found(begin + int(first), begin + int(last) + 1)
                place = searched.find(needle, place + 1)
            keep = min(len(block), len(needle) - 1)
            kept, begin = block[len(block) - keep :], begin + len(block) - keep
