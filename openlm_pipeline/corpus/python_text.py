"""Real text that is on every machine that can run this project: docs and source of Python and of its dependencies.

Which documents exist is a pure function of the Python version and of the installed versions of `DISTRIBUTIONS`;
other packages in the environment change nothing.
"""

import ast
import hashlib
import importlib.metadata
import inspect
import platform
import pydoc_data.topics
import string
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

DISTRIBUTIONS = (
    "dagster",
    "dask",
    "distributed",
    "fsspec",
    "huggingface_hub",
    "matplotlib",
    "networkx",
    "numpy",
    "pyarrow",
    "pydantic",
    "rich",
    "safetensors",
    "scipy",
    "sympy",
    "tokenizers",
    "torch",
    "typer",
    "zstandard",
)
KINDS = ("StdlibDocs", "PackageDocs", "StdlibSource", "PackageSource")
"""`pile_set_name` of documents; prose first."""
PROSE = KINDS[:2]

_MAX_FILE_BYTES = 200_000
_MIN_TEXT_CHARS = 300
_MIN_LETTERS = 0.5
_MIN_DOCSTRING_SHARE = {"StdlibDocs": 0.1, "PackageDocs": 0.3}
_LETTERS = (string.ascii_letters + " \n").encode()
_SKIPPED_FOLDERS = {
    "__pycache__",
    "_vendor",
    "_vendored",
    "data",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "site-packages",
    "test",
    "testing",
    "tests",
    "third_party",
    "tkinter",
    "turtledemo",
    "vendor",
}
_SKIPPED_STARTS = ("_sysconfigdata", "__config__", "licen", "notice", "copying", "cmakelists", "requirements", "test_")


@dataclass(frozen=True)
class Document:
    """One text and where it is from."""

    kind: str
    path: str
    """Below no folder of this machine: `stdlib/argparse.py`, `numpy/linalg/_linalg.py`."""
    text: str

    @property
    def order(self) -> str:
        """A seeded random key. A module's docs and source share it, so that they stay on one side of a split."""
        return path_key(self.path)


def path_key(path: str) -> str:
    """Hex digest that orders and splits documents at random, the same everywhere."""
    return hashlib.sha256(f"openlm-embedded:{path}".encode()).hexdigest()


def environment() -> dict[str, str]:
    """Version of Python and of each of `DISTRIBUTIONS` that is installed."""
    versions = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _wanted(parts: tuple[str, ...]) -> bool:
    name = parts[-1].lower()
    return not _SKIPPED_FOLDERS.intersection(parts[:-1]) and not name.startswith(_SKIPPED_STARTS)


def _stdlib_files() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    for module in sorted(sys.stdlib_module_names):
        top = root / module
        for file in sorted(top.rglob("*.py")) if top.is_dir() else [root / f"{module}.py"]:
            parts = file.relative_to(root).parts
            if _wanted(parts) and file.is_file():
                yield "/".join(("stdlib", *parts)), file


def _package_files() -> Iterator[tuple[str, Path]]:
    for name in DISTRIBUTIONS:
        try:
            files = importlib.metadata.distribution(name).files or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in sorted(files, key=str):
            inside = not any(part == ".." or part.endswith(".dist-info") for part in file.parts)
            if inside and file.suffix in (".py", ".md", ".rst", ".txt") and _wanted(file.parts):
                yield file.as_posix(), Path(str(file.locate()))


def docstrings(source: str, path: str) -> str:
    """A module's docstrings as one page: the module's own, then each class's and function's under its signature.

    Raises:
        SyntaxError: not Python, as templates of code are.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a compiler would say about other people's code
        tree = ast.parse(source)
    sections = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            name = f"{prefix}{child.name}"
            is_class = isinstance(child, ast.ClassDef)
            if text := ast.get_docstring(child):
                title = f"class {name}" if is_class else f"{name}({', '.join(a.arg for a in child.args.args)})"
                sections.append(f"{title}\n\n{text}")
            if is_class:
                visit(child, f"{name}.")

    visit(tree, "")
    module = path.removesuffix(".py").removesuffix("/__init__").removeprefix("stdlib/").replace("/", ".")
    return "\n\n\n".join([f"Module {module}\n\n{ast.get_docstring(tree) or ''}".rstrip(), *sections])


def _usable(text: str) -> bool:
    """Long enough, and not mostly digits and punctuation, as tables are."""
    if len(text) < _MIN_TEXT_CHARS:
        return False
    data = text.encode()
    return len(data.translate(None, _LETTERS)) <= (1 - _MIN_LETTERS) * len(data)


def _read(file: Path) -> str | None:
    """The file's text; None if it is absent, long, or not UTF-8, and so not used."""
    try:
        return None if file.stat().st_size > _MAX_FILE_BYTES else file.read_bytes().decode().replace("\r\n", "\n")
    except (FileNotFoundError, UnicodeDecodeError):
        return None


def _docstring_share(source: str) -> float:
    """About how much of a module stands between triple quotes: parsing is slow, and most modules say little."""
    return sum(map(len, source.split('"""')[1::2])) / max(len(source), 1)


def _prose(files: Iterable[tuple[str, Path]], kind: str) -> Iterator[Document]:
    for path, file in files:
        if (source := _read(file)) is None:
            continue
        if file.suffix != ".py":
            yield Document(kind, path, source)
        elif _docstring_share(source) >= _MIN_DOCSTRING_SHARE[kind]:
            try:
                yield Document(kind, path, docstrings(source, path))
            except (SyntaxError, ValueError):  # a template of code, or code for another Python
                continue


def _other_prose() -> Iterator[Document]:
    """Language topics of `help()`, and the packages' own descriptions."""
    for topic, text in sorted(pydoc_data.topics.topics.items()):
        yield Document("StdlibDocs", f"stdlib/pydoc_data/{topic}", inspect.cleandoc(text))
    for name in DISTRIBUTIONS:
        try:
            metadata = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        text = metadata.get_payload() or metadata.get("Description") or ""  # type: ignore[attr-defined]
        if len(text) <= _MAX_FILE_BYTES:
            yield Document("PackageDocs", f"{name}/METADATA", text)


def _source(files: Iterable[tuple[str, Path]], kind: str) -> Iterator[Document]:
    for path, file in files:
        if file.suffix == ".py" and (source := _read(file)) is not None:
            yield Document(kind, path, source)


def select_documents(max_bytes: dict[str, int]) -> list[Document]:
    """Documents of each kind up to its `max_bytes` of UTF-8, in random but fixed order; no text occurs twice."""
    stdlib = sorted(_stdlib_files(), key=lambda f: path_key(f[0]))
    packages = sorted(_package_files(), key=lambda f: path_key(f[0]))
    other = list(_other_prose())
    streams = {
        "StdlibDocs": [(d for d in other if d.kind == "StdlibDocs"), _prose(stdlib, "StdlibDocs")],
        "PackageDocs": [(d for d in other if d.kind == "PackageDocs"), _prose(packages, "PackageDocs")],
        "StdlibSource": [_source(stdlib, "StdlibSource")],
        "PackageSource": [_source(packages, "PackageSource")],
    }
    seen: set[str] = set()
    chosen: list[Document] = []
    for kind in KINDS:
        size = 0
        for document in (d for stream in streams[kind] for d in stream):
            if size >= max_bytes[kind]:
                break
            digest = hashlib.sha256(document.text.encode()).hexdigest()
            if digest not in seen and _usable(document.text):
                seen.add(digest)
                chosen.append(document)
                size += len(document.text.encode())
    return sorted(chosen, key=lambda d: (d.order, d.kind))
