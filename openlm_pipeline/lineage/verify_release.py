"""Check a release of openlm_pipeline link by link: `python verify.py [FOLDER]`.

Needs Python 3.9 and nothing else. Each link is printed as ok, as what differs, or as not here; exit status 4 where one
differs. `openlm verify FOLDER` does the same and more, with the library.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

OK, DIFFERS, NOT_HERE = "ok", "differs", "not here"
MANIFEST, SEAL = "MANIFEST.json", "seal_sha256"
NOT_PROVED = (
    "Not proved: that the weights came of this run (train it again, or `openlm verify --replay`); that the scores came "
    "of the weights (`openlm verify --deep`); that the raw files held what their names say; and who made this folder: "
    "whoever writes all of it can write a chain that holds."
)
_BLOCK = 1 << 22
_MOST_LINE, _MOST_BYTES = 1 << 24, 1 << 30
"""Of a compressed file: characters of a line, and of all. More is no release of ours, and would fill the memory."""
Link = tuple[str, str, str]
"""Name, one of the three, and what was compared or differs."""
_SHARD_FIELDS = ("shard", "num_sequences", "bytes", "sha256", "tokens", "source")


def fingerprint(tree: Any) -> str:
    """sha256 of the canonical JSON."""
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def unsealed(path: Path) -> dict[str, Any]:
    """A JSON object without its seal.

    Raises:
        ValueError: it is not what was written.
    """
    value = json.loads(path.read_bytes())
    seal = value.pop(SEAL, None)
    if seal is not None and seal != hashlib.sha256(json.dumps(value).encode()).hexdigest():
        raise ValueError(f"{path.name} is damaged: it does not have its seal")
    return value


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def links(root: Path) -> Iterator[Link]:
    """All links of the release in a folder."""
    for name, check in _CHECKS:
        try:
            found = list(check(root))
        except FileNotFoundError as e:
            found = [(DIFFERS, f"{Path(e.filename).name} is missing")]
        except _DAMAGE as e:
            found = [(DIFFERS, f"{type(e).__name__}: {e}")]
        for status, what in found:
            yield name, status, what


Found = Iterator[tuple[str, str]]
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OSError, EOFError)
_DAMAGE += (struct.error, zlib.error)
"""What reading a damaged file raises."""


def _inside(root: Path, name: str) -> Path:
    """A file of the release.

    Raises:
        ValueError: the name leads out of its folder.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{name!r} leads out of the release")
    return root / name


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a compressed file.

    Raises:
        ValueError: it is damaged, or far larger than one of ours.
    """
    read = 0
    with gzip.open(path, "rt", encoding="utf-8") as f:
        while line := f.readline(_MOST_LINE):
            read += len(line)
            if len(line) == _MOST_LINE or read > _MOST_BYTES:
                raise ValueError(f"{path.name} has more text than a release has")
            yield json.loads(line)


def _compared(what: str, pairs: Iterable[tuple[str, Any, Any]]) -> Found:
    """`ok` with `what`, or each pair that differs."""
    wrong = [f"{name}: {ours}, and should be {theirs}" for name, ours, theirs in pairs if ours != theirs]
    yield from ((DIFFERS, line) for line in wrong)
    if not wrong:
        yield OK, what


def _files(root: Path) -> Found:
    manifest = unsealed(root / MANIFEST)
    recorded = manifest["files"]
    wrong = []
    for name, about in sorted(recorded.items()):
        path = _inside(root, name)
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != about["bytes"] or sha256_of(path) != about["sha256"]:
            wrong.append(f"{name} is not what {MANIFEST} says")
    there = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    wrong += [f"{name} is not in {MANIFEST}" for name in sorted(there - recorded.keys() - {MANIFEST})]
    yield from ((DIFFERS, line) for line in wrong)
    if not wrong:
        yield OK, f"{len(recorded)} files of {sum(about['bytes'] for about in recorded.values()):,} bytes"


def _tensors(root: Path) -> dict[str, tuple[Path, int, dict[str, Any]]]:
    """Name -> file, where its data begins, and what its header says, of all safetensors files."""
    found = {}
    for path in sorted(root.glob("*.safetensors")):
        with path.open("rb") as f:
            (size,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(size))
        header.pop("__metadata__", None)
        found.update({name: (path, 8 + size, about) for name, about in header.items()})
    return found


_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


def _digest(path: Path, begin: int, about: dict[str, Any]) -> str:
    """sha256 of the sha256 of each row; a tensor of fewer than two dimensions is one row."""
    first, last = about["data_offsets"]
    rows = about["shape"][0] if len(about["shape"]) > 1 else 1
    size = (last - first) // max(rows, 1)
    whole = hashlib.sha256()
    with path.open("rb") as f:
        f.seek(begin + first)
        for _ in range(rows):
            whole.update(hashlib.sha256(f.read(size)).digest())
    return whole.hexdigest()


def _weights(root: Path) -> Found:
    export, checkpoint = unsealed(root / "export.json"), _checkpoint(root)
    tensors, names = _tensors(root), json.loads((root / "openlm/parameters.json").read_bytes())
    described = []
    for name in sorted(names):
        path, begin, about = tensors[f"model.{name}"]
        described.append([name, _DTYPES[about["dtype"]], about["shape"], _digest(path, begin, about)])
    found = fingerprint({"weights": described})
    pairs = [("digest of the weights", found, export["weights_digest"])]
    if export["average"]:
        yield from _compared(f"{len(names)} tensors have the export's digest {found[:12]}", pairs)
        yield NOT_HERE, f"whether they are the average {export['average']}: a checkpoint notes no digest of that"
        return
    pairs.append(("the export's digest", export["weights_digest"], checkpoint["weights_digest"]))
    yield from _compared(f"{len(names)} tensors have the checkpoint's digest {found[:12]}", pairs)


def _checkpoint(root: Path) -> dict[str, Any]:
    info = json.loads((root / "openlm/checkpoint.json").read_bytes())
    recorded = info.pop("sha256")
    if recorded != fingerprint(info):
        raise ValueError("checkpoint.json does not have its recorded sha256")
    return info


def _run(root: Path) -> Found:
    checkpoint, run = _checkpoint(root), unsealed(root / "openlm/run.json")
    own = fingerprint(run["identity"])
    yield from _compared(
        f"the checkpoint is of run {own[:12]}",
        [
            ("identity of run.json", own, run["fingerprint"]),
            ("run of the checkpoint", checkpoint["run_fingerprint"], own),
            ("sha256 of experiment.yaml", sha256_of(root / "openlm/experiment.yaml"), run["experiment_sha256"]),
            (
                "tokens of the checkpoint",
                checkpoint["tokens"],
                checkpoint["step"] * run["identity"]["training"]["global_batch"],
            ),
        ],
    )


def _version(folder: Path) -> str:
    """The content hash of a dataset: of its shards' hashes."""
    lines = (folder / "manifest.jsonl").read_bytes()
    entries = [json.loads(line) for line in lines.splitlines()]
    if not entries[0].get("sums_sha256"):
        return hashlib.sha256(lines).hexdigest()
    digest = hashlib.sha256()
    for entry in entries:
        digest.update((json.dumps({name: entry[name] for name in _SHARD_FIELDS}) + "\n").encode())
    return digest.hexdigest()


def _data(root: Path) -> Found:
    identity = unsealed(root / "openlm/run.json")["identity"]
    told = {data["name"]: data for data in json.loads((root / "openlm/data.json").read_bytes())}
    for data in identity["data"]:
        about = told[data["name"]]
        if not about["segments"]:
            yield NOT_HERE, f"{data['name']}: shards made elsewhere, known by {data['manifest_sha256'][:12]} alone"
            continue
        version = None
        for segment in about["segments"]:
            folder = _inside(root, f"openlm/data/{segment}")
            own = _version(folder)
            version = hashlib.sha256(f"{version} {own}".encode()).hexdigest() if version else own
            yield from _dataset(folder, segment, own)
        if about["samples"] is not None:
            version = hashlib.sha256(f"{version} {about['samples']}".encode()).hexdigest()
        pairs = [(f"content of {data['name']}", version, data["manifest_sha256"])]
        yield from _compared(f"{data['name']}: the run was trained on content {version[:12]}", pairs)


def _dataset(folder: Path, name: str, version: str) -> Found:
    info, raw = (json.loads((folder / f"{part}.json").read_bytes()) for part in ("dataset", "raw_files"))
    entries = [json.loads(line) for line in (folder / "manifest.jsonl").read_bytes().splitlines()]
    totals = info["totals"]
    beside = (entries[0].get("beside") or {}).get("dataset.json")
    pairs = [
        (f"{name}: sha256 of dataset.json", sha256_of(folder / "dataset.json") if beside else None, beside),
        (f"{name}: content that dataset.json names", info.get("version_sha256", version), version),
        (f"{name}: samples in shards", sum(e["num_sequences"] for e in entries), totals["samples"]),
        (f"{name}: shards", len(entries), totals["shards"]),
        (
            f"{name}: tokens in shards, and left over",
            sum(e["tokens"] for e in entries) + totals["tail_tokens"],
            totals["tokens"] + totals["padding_tokens"],
        ),
    ]
    hashes = {file: made["raw_sha256"] for file, made in info["inputs"].items()}
    pairs += [(f"{name}: sha256 of {file}", raw.get(file, {}).get("sha256"), sha) for file, sha in hashes.items()]
    told = f"{len(entries)} shards of {totals['tokens']:,} tokens, from {len(hashes)} raw files that are listed"
    yield from _compared(f"{name}: {told}", pairs)


def _close(a: Any, b: Any) -> bool:
    return a == b if a is None or b is None else math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)


def _values(row: dict[str, Any]) -> tuple[float | None, ...]:
    """Of an item: whether it is right, nats and bytes of the right answer; None for what is not known."""
    size = row["choice_bytes"][row["gold"]] if row["choice_bytes"] else None
    return tuple(None if v is None else float(v) for v in (row["correct"], row["nll"], size or None))


def _measured(items: list[tuple[float | None, ...]]) -> dict[str, float | None]:
    """The numbers of a task without categories, from the values of its items."""
    correct, nll, sizes = zip(*items)
    known = [value for value in correct if value is not None]
    bits = None if None in nll + sizes else math.fsum(nll) / (math.fsum(sizes) * math.log(2))
    return {"accuracy": math.fsum(known) / len(known) if known else None, "bits_per_byte": bits}


def recomputed(card: dict[str, Any], rows: Iterable[dict[str, Any]], averages: dict[str, Any]) -> tuple[int, list[str]]:
    """How many numbers of a scorecard were computed again from its items, and those that are others.

    Args:
        averages: `NAME/KIND` -> `weights` and `chances`, by task.
    """
    by_task: dict[tuple[str, int], dict[str | None, list[tuple[float | None, ...]]]] = {}
    for row in rows:
        task = by_task.setdefault((row["task"], row["num_fewshot"]), {})
        task.setdefault(row["category"], []).append(_values(row))
    wrong, numbers, accuracy, bits = [], 0, {}, {}
    for task in card["tasks"]:
        if task["status"] != "scored":
            continue
        name, parts = f"{task['task']}/{task['num_fewshot']}-shot", by_task[task["task"], task["num_fewshot"]]
        measured = [_measured(part) for part in parts.values()]
        items = sum(map(len, parts.values()))
        wrong += [f"{name}: {task['num_items']} items, and there are {items}"] if items != task["num_items"] else []
        for key in ("accuracy", "bits_per_byte"):
            own = [m[key] for m in measured]
            value = None if None in own else math.fsum(own) / len(own)
            numbers += 1
            if not _close(value, task[key]):
                wrong.append(f"{name}: {key} {task[key]}, and the items give {value}")
        accuracy[name], bits[name] = task["accuracy"], task["bits_per_byte"]
    for average in card["averages"]:
        if average["status"] != "scored":
            continue
        how = averages[f"{average['name']}/{average['kind']}"]
        weights, chances = how["weights"], how["chances"]
        if average["kind"] == "bits_per_byte":
            value = math.fsum(w * bits[name] for name, w in weights.items())
        elif average["kind"] == "accuracy":
            value = math.fsum(w * accuracy[name] for name, w in weights.items())
        else:
            terms = ((w, accuracy[name], chances[name]) for name, w in weights.items())
            value = math.fsum(w * (a - chance) / (1 - chance) for w, a, chance in terms)
        numbers += 1
        if not _close(value, average["value"]):
            wrong.append(f"{average['name']}: {average['value']}, and its tasks give {value}")
    return numbers, wrong


def _scores(root: Path) -> Found:
    card, release = unsealed(root / "openlm/scorecard.json"), json.loads((root / "openlm/release.json").read_bytes())
    checkpoint = _checkpoint(root)
    wanted, precision, average = checkpoint["weights_digest"], card["precision"], card["average_of_weights"]
    if average:  # filed under the files
        names = {"files": "files", "run": "run_fingerprint", "step": "step"}
        wanted = fingerprint({name: checkpoint[of] for name, of in names.items()})
    if average or precision != "fp32":
        wanted = fingerprint({"weights": wanted, "precision": precision, "average": average})
    pairs = [
        ("checkpoint that was scored", card["checkpoint_digest"], wanted),
        ("sha256 of items.parquet", sha256_of(root / "openlm/items.parquet"), card["items_sha256"]),
        ("milestone", card["milestone"], checkpoint["milestone"]),
        ("tokens", card["tokens"], checkpoint["tokens"]),
        ("held-out loss", card["validation_loss"], checkpoint["metrics"].get("validation_loss")),
    ]
    yield from _compared("the scorecard is of this checkpoint, and of these items", pairs)
    numbers, wrong = recomputed(card, json_lines(root / "openlm/items.jsonl.gz"), release["averages"])
    yield from ((DIFFERS, line) for line in wrong)
    if not wrong:
        items = sum(task["num_items"] for task in card["tasks"])
        yield OK, f"{numbers} numbers of the scorecard are what {items:,} items give"


def _card(root: Path) -> Found:
    card, text = unsealed(root / "openlm/scorecard.json"), (root / "README.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:2] == "| "]
    shown = {row[0].rstrip("*").replace("\\", ""): row for row in rows if len(row) > 8}
    pairs = []
    scored = [task for task in card["tasks"] if task["status"] == "scored" and task["accuracy"] is not None]
    for task in scored:
        name = f"{task['task']} {task['num_fewshot']}-shot"
        row = shown.get(name) or ["", "absent"] + 7 * [""]
        pairs += [(f"README.md, {name}", row[1], f"{task['accuracy']:.3f}")]
        pairs += [(f"README.md, items of {name}", row[8], f"{task['num_items']:,}")]
    values = re.findall(r"name: (.+) \((\d+)-shot\)[\s\S]*?value: ([\d.e-]+)", text.split("\n---\n")[0])
    indexed = {f"{task} {shots}-shot": float(value) for task, shots, value in values}
    for task in scored:
        name = f"{task['task']} {task['num_fewshot']}-shot"
        pairs += [(f"README.md, model-index, {name}", indexed.get(name), round(task["accuracy"], 4))]
    headline = card["averages"][0]["value"]
    if headline is not None:
        row = shown.get("average") or next((r for n, r in shown.items() if "average" in n), ["", "absent"])
        pairs += [("README.md, average", row[1], f"{headline:.3f}".replace("-", "\u2212"))]
    yield from _compared(f"{len(pairs)} numbers of README.md are the scorecard's", pairs)


def _contamination(root: Path) -> Found:
    path = root / "openlm/contamination.json"
    if not path.exists():
        yield NOT_HERE, "which items were seen in training; the data was not scanned for them"
        return
    facts, tokens = json.loads(path.read_bytes()), _checkpoint(root)["tokens"]
    every = [row["first_seen_tokens"] for row in json_lines(root / "openlm/contamination.jsonl.gz")]
    first = [tokens for tokens in every if tokens is not None]
    text = (root / "README.md").read_text(encoding="utf-8")
    told = f"{len(first):,} of {len(every):,} items were seen in training"
    pairs = [
        ("tokens up to which it was looked", facts["tokens"], tokens),
        ("items", len(every), facts["items"]),
        ("items that were seen", len(first), facts["seen"]),
        ("items seen after the milestone", sum(at > tokens for at in first), 0),
        ("README.md says", told if told in text else "otherwise", told),
    ]
    yield from _compared(told, pairs)


def _environment(root: Path) -> Found:
    path = root / "openlm/environments.jsonl"
    if not path.exists():
        yield NOT_HERE, "what the run was trained with; it is of an earlier release"
        return
    known = {}
    for line in path.read_bytes().splitlines():
        record = json.loads(line)
        known[record.pop("sha256")] = record
    pairs = [("sha256 of an environment", fingerprint(record), digest) for digest, record in known.items()]
    for event in map(json.loads, (root / "openlm/ledger.jsonl").read_bytes().splitlines()):
        if digest := event.get("environment"):
            pairs.append(("environment that the ledger names", digest if digest in known else "absent", digest))
    for record in known.values():
        if (diff := record.get("diff")) is not None:
            own = hashlib.sha256(diff.encode()).hexdigest()
            pairs.append(("sha256 of the diff", own, record["diff_sha256"]))
    last = list(known.values())[-1]
    told = f"{len(known)} environments; the last python {last['python']}, torch {last['torch']}, {last['code']}"
    yield from _compared(told, pairs)


_CHECKS: tuple[tuple[str, Callable[[Path], Found]], ...] = (
    ("files", _files),
    ("weights -> checkpoint", _weights),
    ("checkpoint -> run", _run),
    ("run -> data -> raw files", _data),
    ("scores -> items -> checkpoint", _scores),
    ("card -> scores", _card),
    ("contamination", _contamination),
    ("environment", _environment),
)


def main() -> int:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent)
    worst = 0
    for name, status, what in links(root):
        print(f"{status:8}  {name:30}  {what}")
        worst = 4 if status == DIFFERS else worst
    print(NOT_PROVED)
    return worst


if __name__ == "__main__":
    sys.exit(main())
