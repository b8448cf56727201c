"""Finding raw files in a store: seconds, requests and memory for many objects, on an S3 server of this machine.

    python benchmarks/discover.py [--objects 30000] [--markdown OUT.md]

Needs `moto` and `s3fs`. The server is another process; requests are those that it logs.
"""

import sys
from pathlib import Path

# Beside this file is one with the name of the standard module `tokenize`, so this folder must not be searched.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import os
import socket
import subprocess
import tempfile
import time
from collections import Counter

from benchmarks.measure import machine, run, show, table

KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
FIND = """
import sys, time
from pathlib import Path
from openlm_pipeline.corpus.discovery import discover
from openlm_pipeline.experiments import load_experiment
from openlm_pipeline.storage.home import Home
dataset = load_experiment(sys.argv[1]).datasets()[0]
began = time.monotonic()
print(len(discover(dataset, Home(Path(sys.argv[1]).parent))), time.monotonic() - began)
"""
RECIPE = """
name: many
tokenizer: {{name: bpe, train: {{vocab_size: 300}}}}
seq_len: 32
sources: [{{name: text, files: [{files}]}}]
model: {{hidden_dim: 16, n_layers: 1, n_heads: 2}}
training: {{global_batch: 32, lr: 1.0e-3}}
milestones: [32]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=30_000)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    import s3fs

    with tempfile.TemporaryDirectory() as scratch, socket.create_server(("127.0.0.1", 0)) as probe:
        port, log = probe.getsockname()[1], Path(scratch, "log")
        probe.close()
        variables = {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
        os.environ |= variables
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as server:
            try:
                _measure(arguments, Path(scratch), log, s3fs)
            finally:
                server.kill()


def _measure(arguments: argparse.Namespace, scratch: Path, log: Path, s3fs: object) -> None:
    for _ in range(100):
        try:
            fs = s3fs.S3FileSystem(skip_instance_cache=True)
            fs.mkdir("raw")
            break
        except Exception:  # noqa: BLE001 - it is not up yet
            time.sleep(0.3)
    for first in range(0, arguments.objects, 1000):
        some = range(first, min(first + 1000, arguments.objects))
        fs.pipe({f"raw/{n % 100:02d}/{n:06d}.jsonl": b"{}\n" for n in some}, batch_size=32)
    rows = []
    for name, files in {
        "a folder": "s3://raw/",
        "a pattern": "s3://raw/**/*.jsonl",
        "a folder of 300": "s3://raw/07/",
    }.items():
        recipe = scratch / "many.yaml"
        recipe.write_text(RECIPE.format(files=f'"{files}"'))
        before = log.stat().st_size
        used = run([sys.executable, "-c", FIND, str(recipe)])
        with log.open() as file:
            file.seek(before)
            requests = Counter(line.split('"')[1].split()[0].split("m")[-1] for line in file if "HTTP/1.1" in line)
        found, seconds = used.output.split()[-2:]
        said = ", ".join(f"{count:,} {method}" for method, count in sorted(requests.items()))
        rows.append(
            [name, f"{int(found):,}", f"{float(seconds):.1f}", said, f"{used.cpu_seconds:.1f}", f"{used.peak_mib:.0f}"]
        )
    header = ["what", "raw files", "seconds", "requests", "CPU-seconds of the client, imports too", "peak MiB"]
    show(f"{machine('s3fs', 'moto')}\n\n{table(header, rows)}", arguments.markdown)


if __name__ == "__main__":
    main()
