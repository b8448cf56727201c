"""The engine of a tokenizer: the one asked for, or the fastest that can be trusted with it.

An engine that is not the reference never stands alone: documents on which it says that it may differ go to Hugging Face
`tokenizers`, and a sample of the others is encoded by both.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.registry import ENGINES
from openlm_pipeline.tokenizers.engines import Encoded, EncodingError, Engine, pieces
from openlm_pipeline.tokenizers.strings import Strings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VERIFY_EVERY = 500
"""One in so many documents is encoded by both engines, the first of each file among them."""
_PIECE_CHARACTERS = 4096
"""Of a doubtful document, that are judged and encoded for themselves."""
_REFERENCE, _FAST = "huggingface", "gigatoken"


class EngineMismatch(EncodingError):
    """The fast engine gave other ids than the reference."""


def load_reference(tokenizer_json: Path, *, special_as_text: bool = False) -> "Tokenizer":
    """Hugging Face's tokenizer of a file, which gives each document all of its ids and no others.

    `truncation` and `padding`, which `save_pretrained` leaves in a file, are switched off. A second call gives the same
    tokenizer while the file is the same, so it must not be changed.

    Args:
        special_as_text: the strings of special tokens are encoded as any other text.

    Raises:
        ConfigError: it has `dropout`.
        Exception: it is no tokenizer; the library has no narrower one.
    """
    tokenizer = load_any(tokenizer_json, special_as_text)
    refuse_dropout(tokenizer, str(tokenizer_json))
    return tokenizer


def load_any(tokenizer_json: Path, special_as_text: bool = False) -> "Tokenizer":
    """`load_reference` that takes a tokenizer of random ids too: to decode, or to look at it."""
    about = tokenizer_json.stat()
    return _load(tokenizer_json, special_as_text, about.st_mtime_ns, about.st_size, about.st_ino)


@lru_cache(maxsize=4)
def _load(tokenizer_json: Path, special_as_text: bool, *stamp: int) -> "Tokenizer":
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_json))
    except BaseException as e:
        if is_panic(e):
            raise ValueError(f"Hugging Face tokenizers fail on it ({e})") from None
        raise
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = special_as_text
    return tokenizer


def is_panic(error: BaseException) -> bool:
    """Whether `tokenizers` came to an end that its authors thought impossible."""
    return type(error).__name__ == "PanicException"  # which is no Exception, and has no public name


def refuse_dropout(tokenizer: "Tokenizer", where: str) -> None:
    """
    Raises:
        ConfigError: the tokenizer gives random ids.
    """
    if rate := getattr(tokenizer.model, "dropout", None):
        raise ConfigError(
            f"the model in {where} has dropout {rate:g}, which gives a text other ids each time: set `dropout` to null "
            "in its tokenizer.json"
        )


def largest_id(tokenizer: "Tokenizer") -> int:
    """The largest id that it may give; there may be fewer ids than that."""
    return max(tokenizer.get_vocab().values(), default=0)


def special_strings(tokenizer: "Tokenizer") -> Strings:
    """What stands for a special token where it is found in a document."""
    return Strings(token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special)


@contextmanager
def _at(places: Sequence[int]) -> Iterator[None]:
    """An error's position is that of a text chosen from others; it leaves as the place among these."""
    try:
        yield
    except EncodingError as e:
        raise EncodingError(str(e), places[e.position]) from e


class CheckedEngine:
    """An engine with the reference beside it."""

    def __init__(self, engine: Engine, reference: Engine, verify_every: int = VERIFY_EVERY) -> None:
        """
        Args:
            verify_every: one in so many documents is checked; 1 checks all.
        """
        self._engine, self._reference, self._verify_every = engine, reference, verify_every
        self._documents = 0

    def encode_batch(self, texts: list[str]) -> Encoded:
        """Token ids of the texts, without special tokens added.

        Raises:
            EngineMismatch: a sampled document came out different from the reference.
        """
        doubtful = [i for i, text in enumerate(texts) if self._engine.is_doubtful(text)]
        encoded = self._encode_apart(texts, doubtful) if doubtful else self._engine.encode_batch(texts)
        sampled = set(range(-self._documents % self._verify_every, len(texts), self._verify_every)) - set(doubtful)
        if sampled:
            found = encoded.split()
            with _at(sorted(sampled)):
                expected = self._reference.encode_batch([texts[i] for i in sorted(sampled)]).split()
            for i, ids in zip(sorted(sampled), expected):
                if not np.array_equal(found[i], ids):
                    raise EngineMismatch(
                        "the fast tokenizer engine and Hugging Face tokenizers give different ids. Set "
                        "execution.tokenizer_engine=huggingface to use the slower one alone",
                        i,
                    )
        self._documents += len(texts)
        return encoded

    def _encode_apart(self, texts: list[str], doubtful: list[int]) -> Encoded:
        """Encode all, of those in `doubtful` by the reference what is."""
        parts: list[list[str]] = [[text] for text in texts]
        if self._reference.can_cut:
            for i in doubtful:
                parts[i] = list(pieces(texts[i], _PIECE_CHARACTERS))
        places = [(i, j) for i, text in enumerate(parts) for j in range(len(text))]
        apart = {(i, j) for i in doubtful for j, part in enumerate(parts[i]) if self._engine.is_doubtful(part)}
        ids: dict[tuple[int, int], np.ndarray] = {}
        for engine, chosen in (
            (self._reference, sorted(apart)),
            (self._engine, [p for p in places if p not in apart]),
        ):
            with _at([i for i, _ in chosen]):
                ids |= zip(chosen, engine.encode_batch([parts[i][j] for i, j in chosen]).split())
        made = Encoded.of([ids[place] for place in places])
        firsts = np.cumsum([0, *map(len, parts)])[:-1]
        return Encoded(made.ids, np.add.reduceat(made.lengths, firsts))


def make_engine(
    tokenizer_json: Path, choice: str = "auto", verify_every: int = VERIFY_EVERY, *, special_as_text: bool = False
) -> tuple[Engine | CheckedEngine, str]:
    """An engine for a tokenizer, and a line that says which and why.

    Args:
        choice: a name in `ENGINES`; `auto`: gigatoken where it can be trusted with the tokenizer, else the reference.
        verify_every: one in so many documents of another engine is checked against the reference.
        special_as_text: the strings of special tokens are encoded as any other text.

    Raises:
        ConfigError: there is no such engine, the one asked for does not take this tokenizer, or none can: its ids are
            random.
    """
    options = {"special_as_text": True} if special_as_text else {}  # an engine without the option is not tried
    reference = ENGINES[_REFERENCE](tokenizer_json, **options)
    if choice == _REFERENCE:
        return reference, f"{reference.title}, because it was asked for"
    wanted = ENGINES[_FAST if choice == "auto" else choice]
    engine, reason = _load_engine(wanted, tokenizer_json, options)
    if engine is None:
        if choice != "auto":
            raise ConfigError(
                f"execution.tokenizer_engine={choice} does not work for {tokenizer_json}: {reason}. Leave it out, and "
                "the engine is chosen by what works"
            )
        return reference, f"{reference.title}, because {reason}"
    line = f"{wanted.title}, 1 in {verify_every} documents checked against {reference.title}"
    return CheckedEngine(engine, reference, verify_every), line


def _load_engine(wanted: type[Engine], tokenizer_json: Path, options: dict[str, bool]) -> tuple[Engine | None, str]:
    """The engine, or None and why not."""
    if reason := wanted.unfit(tokenizer_json):
        return None, reason
    try:
        return wanted(tokenizer_json, **options), ""
    except ImportError as e:
        return None, f"{e.name or wanted.title} is not installed"
    except Exception as e:  # noqa: BLE001 - whatever a beta library raises, the reference still works
        return None, f"{wanted.title} cannot load it: {str(e).partition(chr(10))[0]}"
