"""`.json`: one top-level array, or JSON lines."""

import re
from collections.abc import Iterator

from openlm_pipeline.corpus import blocks as limits
from openlm_pipeline.corpus.formats import WHOLE, Part, Reading
from openlm_pipeline.corpus.formats.json_lines import JsonLines
from openlm_pipeline.corpus.line_content import LineContent, Raw
from openlm_pipeline.errors import DataError
from openlm_pipeline.registry import RAW_FORMATS

# A whole string, a string that the buffer cuts, or a character that nests or separates.
_JSON_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{},]', re.DOTALL)


@RAW_FORMATS.register("json")
class JsonArray(JsonLines):
    """A JSON array of objects; a file that does not begin with `[` is JSON lines. Not read in parts."""

    suffixes = (".json",)

    def cut(self, size_bytes: int, count: int) -> list[Part]:
        return [WHOLE]

    def _pieces(self, content: LineContent, reading: Reading) -> Iterator[Raw]:
        if content.head.lstrip()[:1] == b"[":
            return _elements(content.blocks, reading.url)
        return super()._pieces(content, reading)


def _elements(blocks: Iterator[bytes], url: str) -> Iterator[Raw]:
    """Elements of a top-level JSON array, found by its brackets and strings; each is parsed on its own later."""
    buffer, base, line = b"", 0, 1  # `base` is the offset of the buffer's first byte, `line` its line
    scan = start = depth = 0
    closed = False

    def element(end: int) -> Raw | None:
        data = buffer[start:end]
        begin = start + len(data) - len(data.lstrip())
        stripped = data.strip()
        if len(stripped) > limits.MAX_RECORD_BYTES:
            raise DataError(
                f"raw file {url} has an element of over {limits.MAX_RECORD_BYTES >> 20} MiB at byte {base + begin}"
            )
        return Raw(line + buffer.count(b"\n", 0, begin), base + begin, stripped, len(stripped)) if stripped else None

    while block := next(blocks, b""):
        # Grow a buffer that ends inside a long string by as much as it holds, so that rescanning stays linear.
        grown = [block]
        wanted = len(buffer)
        while wanted > sum(map(len, grown)) and (block := next(blocks, b"")):
            grown.append(block)
        buffer = b"".join([buffer, *grown])
        while match := _JSON_TOKEN.search(buffer, scan):
            token = match[0]
            if token == b'"':
                break
            scan = match.end()
            if closed:
                raise DataError(f"raw file {url} continues after its top-level array, at byte {base + match.start()}")
            if token in (b"[", b"{"):
                depth += 1
                if depth == 1:
                    start = scan
            elif token in (b"]", b"}") or (token == b"," and depth == 1):
                depth -= token != b","
                if depth == 0 or token == b",":
                    if found := element(match.start()):
                        yield found
                    start = scan
                    closed = depth == 0
        else:
            scan = len(buffer)
        line, base = line + buffer.count(b"\n", 0, start), base + start
        buffer, scan, start = buffer[start:], scan - start, 0
        if len(buffer) > limits.MAX_RECORD_BYTES:
            raise DataError(f"raw file {url} has an element of over {limits.MAX_RECORD_BYTES >> 20} MiB at byte {base}")
    if not closed:
        raise DataError(
            f"raw file {url} is truncated: its top-level array does not end; the last whole element ends at "
            f"decompressed byte {base}. Fetch it again."
        )
    if buffer.strip():
        raise DataError(f"raw file {url} continues after its top-level array, at byte {base}")
