"""Windows of normalised text, and where those of some texts stand in a stream of token ids.

Text is normalised to its letters and digits: compatibility forms are replaced and marks dropped (NFKD), case is folded,
and of what is left the Unicode categories L* and N* count as characters. A window is `Rule.size` of these, or so many
words; neither case nor spacing nor punctuation nor the cut into tokens changes one.

A polynomial hash over prefix sums (mod 2**64) gives each window in constant time. A stream is hashed where a token
starts, the texts at every character; around what is found there the stream is hashed at every character too, and then
compared character by character, so nothing is found that is not there. A common run of text that is longer than a
window by one token is always found, a shorter one if it begins where a token does.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from openlm_pipeline.errors import DataError
from openlm_pipeline.ordering.permutation import mix, mix_array

_BASE = mix(0x0F_C0_17_A3) | 1
_CHUNK = 1 << 15
"""Tokens hashed at a time, few enough for the processor's cache."""
_LEAD = 8
"""Tokens in front of a chunk, which tell whether its first one begins a word."""
_TOKENS_PER_CHARACTER, _TOKENS_PER_WORD = 8, 32
_COMPARED = 1 << 16
"""Windows compared at a time."""
_END = "\0"
"""The character of special tokens, which no text has."""


@dataclass(frozen=True)
class Rule:
    """What a window is."""

    name: str
    size: int
    """Characters, or words."""
    least: int
    """Texts that are shorter than a window are compared whole if they have so many."""
    words: bool = False


RULES = {rule.name: rule for rule in (Rule("50", 50, 30), Rule("13w", 13, 8, words=True))}


class _Characters(dict[int, str]):
    """A table for `str.translate`: letters and digits normalised, marks dropped, all else a space."""

    def __missing__(self, code: int) -> str:
        folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", chr(code)).casefold())
        kinds = [unicodedata.category(c)[0] for c in folded]
        kept = "".join(c for c, kind in zip(folded, kinds) if kind in "LN")
        self[code] = kept if kept or set(kinds) == {"M"} else " "
        return self[code]


_CHARACTERS = _Characters()


def words_of(text: str) -> list[str]:
    """The words of a text, normalised."""
    return text.translate(_CHARACTERS).split()


def joined(words: Sequence[str], rule: Rule) -> str:
    """The characters of words; between these, and around them all, a space where the rule counts words."""
    return f" {' '.join(words)} " if rule.words else "".join(words)


def normalised(text: str, rule: Rule) -> str:
    """`joined` of the words of a text."""
    return joined(words_of(text), rule)


def codes(text: str) -> np.ndarray:
    """Its characters as uint32."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


class Hasher:
    """Hashes of runs of characters."""

    def __init__(self) -> None:
        self.powers = self.inverse = np.ones(1, np.uint64)

    def grow(self, length: int) -> None:
        """Have powers for so many characters."""
        if len(self.powers) < length:
            length = 1 << length.bit_length()
            self.powers, self.inverse = (_powers(base, length) for base in (_BASE, pow(_BASE, -1, 1 << 64)))

    def sums(self, mixed: np.ndarray) -> np.ndarray:
        """Prefix sums of `mixed` characters, uint64[n + 1]."""
        self.grow(len(mixed) + 1)
        found = np.empty(len(mixed) + 1, np.uint64)
        found[0] = 0
        np.multiply(mixed, self.powers[: len(mixed)], out=found[1:])
        np.cumsum(found, out=found)
        return found

    def hashes(self, sums: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """uint64 of the characters starts..ends each."""
        found = sums.take(ends)
        found -= sums.take(starts)
        found *= self.inverse.take(starts)
        return found


def _powers(base: int, length: int) -> np.ndarray:
    found = np.full(length, base, np.uint64)
    found[0] = 1
    return np.multiply.accumulate(found)


def mixed(characters: np.ndarray) -> np.ndarray:
    """A random odd 64-bit number for each character."""
    return mix_array(characters.astype(np.uint64)) | np.uint64(1)


def window_ends(characters: np.ndarray, starts: np.ndarray, size: int, rule: Rule) -> np.ndarray:
    """Where the windows end that begin at `starts`, as far as there are any: for the first so many of them.

    Args:
        starts: increasing; of a rule of words, all of their beginnings.
    """
    if rule.words:
        return starts[size:] - 1
    return starts[: np.searchsorted(starts, len(characters) - size, side="right")] + size


class TokenCharacters:
    """The normalised characters of each id of a tokenizer.

    Characters that are cut into several tokens are put together again, as if they stood in the first of these.
    """

    def __init__(self, texts: Sequence[bytes | None], rule: Rule) -> None:
        """
        Args:
            texts: as `texts_of_ids` gives them.
        """
        self.rule, self.num_ids, self._raw = rule, len(texts), texts
        self._partial, self._continues = np.zeros(len(texts), bool), np.zeros(len(texts), bool)
        self._joined: dict[tuple[int, ...], int] = {}
        pieces: list[str] = []
        for i, text in enumerate(texts):
            try:
                pieces.append(self._piece(None if text is None else text.decode()))
            except UnicodeDecodeError:
                self._partial[i], self._continues[i] = True, 0x80 <= text[0] < 0xC0
                pieces.append("")
        self._num_pieces = self._num_characters = 0
        self.lengths = self.starts = np.zeros(0, np.int64)
        self.characters, self.mixed = np.zeros(0, np.uint32), np.zeros(0, np.uint64)
        self._empty = len(pieces)
        self._add([*pieces, ""])
        self.longest = int(self.lengths.max())

    def _piece(self, text: str | None) -> str:
        if text is None:
            return f" {_END} " if self.rule.words else _END
        characters = text.translate(_CHARACTERS)
        if not self.rule.words:
            return characters.replace(" ", "")
        inner = " ".join(characters.split())
        return f"{' ' * characters[:1].isspace()}{inner}{' ' * (bool(inner) and characters[-1:].isspace())}"

    def _add(self, pieces: Sequence[str]) -> None:
        """Give pieces the next ids. The arrays have room to spare, so that few are copied."""
        lengths, characters = np.array([len(piece) for piece in pieces]), codes("".join(pieces))
        first, begin = self._num_pieces, self._num_characters
        self._num_pieces, self._num_characters = first + len(pieces), begin + len(characters)
        for names, size in ((("lengths", "starts"), self._num_pieces), (("characters", "mixed"), self._num_characters)):
            for name in names:
                if len(old := getattr(self, name)) < size:
                    setattr(self, name, np.concatenate([old, np.zeros(size, old.dtype)]))
        self.lengths[first : self._num_pieces] = lengths
        self.starts[first : self._num_pieces] = begin + np.cumsum(lengths) - lengths
        self.characters[begin : self._num_characters] = characters
        self.mixed[begin : self._num_characters] = mixed(characters)

    def joined(self, ids: np.ndarray) -> np.ndarray:
        """The ids, in which tokens that are parts of a character are replaced by one that has all of it, and empty
        ones.

        Raises:
            DataError: an id is none of the tokenizer's.
        """
        if len(ids) and ids.max() >= self.num_ids:
            raise DataError(f"a shard has the token id {ids.max()}, and its tokenizer no more than {self.num_ids} ids")
        at = np.flatnonzero(self._partial.take(ids))
        if not len(at):
            return ids
        parts = ids[at].astype(np.int64)
        heads = np.flatnonzero(~(self._continues[parts] & (np.diff(at, prepend=-2) == 1)))
        sizes = np.diff(heads, append=len(at))
        within = np.arange(len(at)) - np.repeat(heads, sizes)
        keys = np.add.reduceat(mixed(parts << 8 | within), heads)  # the same for the same parts
        _, first, which = np.unique(keys, return_index=True, return_inverse=True)
        groups = [tuple(parts[h : h + n].tolist()) for h, n in zip(heads[first].tolist(), sizes[first].tolist())]
        if new := [group for group in groups if group not in self._joined]:
            known = self._num_pieces
            self._joined |= {group: known + n for n, group in enumerate(new)}
            self._add([self._piece(b"".join(self._raw[i] for i in g).decode(errors="ignore")) for g in new])
        ids = ids.astype(np.int64)
        ids[at] = self._empty
        ids[at[heads]] = np.array([self._joined[group] for group in groups])[which]
        return ids


@dataclass
class Stream:
    """The characters of some tokens."""

    sums: np.ndarray
    """Prefix sums of their hashes."""
    index: np.ndarray
    """Of each character, in the table of `TokenCharacters`."""
    starts: np.ndarray
    """Where tokens begin, or with a rule of words these."""
    token: np.ndarray | None
    """The token that each character is in; None where `starts` has one place a token."""


class Windows:
    """Windows to look for, all of texts that are known."""

    def __init__(
        self,
        rule: Rule,
        text: np.ndarray,
        hashes: np.ndarray,
        begin: np.ndarray,
        length: np.ndarray,
        least: np.ndarray,
    ) -> None:
        """
        Args:
            text: characters of all texts one after the other.
            hashes: uint64[n] of the windows, sorted and each once.
            begin: where each stands in `text`.
            length: of each, in characters or words: the rule's size, or that of a whole text.
            least: hashes of all windows of the least size of these whole texts, sorted.
        """
        self.rule, self.text, self.hashes, self.begin, self.length = rule, text, hashes, begin, length
        self.hasher = Hasher()
        self._sizes, self._any = np.unique(length).tolist(), _Filter(hashes)
        long = hashes[length == rule.size]
        self._filters = [(size, _Filter(h)) for size, h in ((rule.size, long), (rule.least, least)) if len(h)]

    @property
    def num_bytes(self) -> int:
        """Of memory."""
        arrays = (self.text, self.hashes, self.begin, self.length)
        return sum(a.nbytes for a in arrays) + sum(f.num_bytes for f in (self._any, *(f for _, f in self._filters)))

    def find(self, ids: np.ndarray, table: TokenCharacters) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The windows that stand in a stream of ids: numbers of windows, and the tokens in which each begins and ends,
        int64[n] each."""
        parts = [np.zeros((3, 0), np.int64)]
        found = np.unique(np.concatenate([np.zeros(0, np.int64), *self._candidates(ids, table)]))
        # Around each candidate all is hashed, once: regions that touch are one.
        before, after = table.longest + _LEAD, self.reach(table)
        begin, end = np.maximum(found - before, 0), np.minimum(found + after, len(ids))
        firsts = np.flatnonzero(begin > np.concatenate([[-1], np.maximum.accumulate(end)[:-1]]))
        for first, last in zip(firsts.tolist(), [*firsts[1:].tolist(), len(found)]):
            parts += map(np.stack, self._all(ids, int(begin[first]), int(end[last - 1]), table))
        numbers, begins, ends = np.concatenate(parts, axis=1)
        return numbers, begins, ends

    def reach(self, table: TokenCharacters) -> int:
        """Tokens in which a window, and what goes on from it, ends: one that is spread over more is not found."""
        return table.longest + self.rule.size * (_TOKENS_PER_WORD if self.rule.words else _TOKENS_PER_CHARACTER)

    def _stream(self, ids: np.ndarray, table: TokenCharacters) -> Stream:
        ids = table.joined(ids)
        lengths = table.lengths.take(ids)
        ends = np.cumsum(lengths)
        starts = ends - lengths
        index = np.repeat(table.starts.take(ids) - starts, lengths)
        index += np.arange(len(index))
        if not self.rule.words:
            return Stream(self.hasher.sums(table.mixed.take(index)), index, starts, None)
        space = table.characters.take(index) == ord(" ")
        kept = ~(space & np.concatenate([[False], space[:-1]]))
        space, index = space[kept], index[kept]
        starts = np.flatnonzero(np.concatenate([[True], space[:-1]]) & ~space)
        token = np.repeat(np.arange(len(ids)), lengths)[kept]
        return Stream(self.hasher.sums(table.mixed.take(index)), index, starts, token)

    def _candidates(self, ids: np.ndarray, table: TokenCharacters) -> Iterator[np.ndarray]:
        """Tokens in which a window may begin that is looked for."""
        for at in range(0, len(ids), _CHUNK):
            begin = max(0, at - _LEAD) if self.rule.words else at
            stream = self._stream(ids[begin : at + _CHUNK + self.reach(table)], table)
            token = None if stream.token is None else begin + stream.token[stream.starts]
            own = _CHUNK if token is None else int(np.searchsorted(token, at + _CHUNK))
            for size, wanted in self._filters:
                ends = window_ends(stream.index, stream.starts, size, self.rule)[:own]
                hit = wanted.holds(self.hasher.hashes(stream.sums, stream.starts[: len(ends)], ends))
                yield at + hit if token is None else token[hit]

    def _all(
        self, ids: np.ndarray, first: int, past: int, table: TokenCharacters
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """All windows that stand in the tokens first..past."""
        stream = self._stream(ids[first:past], table)
        characters, token = table.characters.take(stream.index), stream.token
        starts = stream.starts
        if token is None:
            token = np.repeat(np.arange(past - first), np.diff(starts, append=len(characters)))
            starts = np.arange(len(characters))
        for size in self._sizes:
            ends = window_ends(characters, starts, size, self.rule)
            hashes = self.hasher.hashes(stream.sums, starts[: len(ends)], ends)
            hit = self._any.holds(hashes)
            number = np.searchsorted(self.hashes, hashes[hit])
            of_size = self.length[number] == size
            hit, number = hit[of_size], number[of_size]
            for at in range(0, len(hit), _COMPARED):
                some, numbers = hit[at : at + _COMPARED], number[at : at + _COMPARED]
                same = self._same(numbers, characters, starts[some], ends[some])
                some = some[same]
                last = ends[some] - (not self.rule.words)  # a word has ended only where something follows
                yield numbers[same], first + token[starts[some]], first + token[last]

    def _same(self, number: np.ndarray, characters: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Whether windows of the texts and of a stream have the same characters."""
        lengths = ends - begins
        offsets = np.cumsum(lengths) - lengths
        within = np.arange(int(lengths.sum())) - np.repeat(offsets, lengths)
        theirs = np.minimum(np.repeat(self.begin[number], lengths) + within, len(self.text) - 1)
        equal = self.text[theirs] == characters[np.repeat(begins, lengths) + within]
        return np.logical_and.reduceat(equal, offsets)


class _Filter:
    """Whether hashes are among `keys`: a bit by some bits of each, one by others of those that are left, a search."""

    def __init__(self, keys: np.ndarray) -> None:
        """
        Args:
            keys: uint64, sorted.
        """
        self.keys, self._bits = keys, []
        place = np.uint64(0)
        for per_key in (8, 32):  # the first one is small, for the processor's cache
            width = min(30, max(10, (len(keys) * per_key).bit_length()))
            bits = np.zeros(1 << (width - 3), np.uint8)
            places = keys << place >> np.uint64(64 - width)
            np.bitwise_or.at(bits, places >> np.uint64(3), (1 << (places & np.uint64(7))).astype(np.uint8))
            self._bits.append((bits, place, np.uint64(64 - width)))
            place += np.uint64(width)

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + sum(len(bits) for bits, _, _ in self._bits)

    def holds(self, hashes: np.ndarray) -> np.ndarray:
        """The places in `hashes` of those that are keys."""
        found, left = None, hashes
        for bits, place, shift in self._bits:
            places = left << place >> shift
            maybe = bits.take((places >> np.uint64(3)).view(np.int64))
            maybe >>= (places & np.uint64(7)).astype(np.uint8)
            maybe &= 1
            some = np.flatnonzero(maybe.view(bool))
            found = some if found is None else found[some]
            left = left[some]
        same = self.keys[np.minimum(np.searchsorted(self.keys, left), len(self.keys) - 1)] == left
        return found[same]
