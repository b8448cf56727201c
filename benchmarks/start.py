"""How long a rank of a large run takes to begin: its share of drawing the weights, and of verifying a checkpoint.

    python benchmarks/start.py [--model open_lm_7b] [--ranks 8] [--threads 2] [--folder FOLDER]

The share that one rank really has. `one rank for all` is a trainer that draws all weights on every rank, in one thread,
and has rank 0 verify all files: a rank's share is timed and multiplied. The checkpoint is random bytes, read from the
page cache where they fit.
"""

import sys
from pathlib import Path

sys.path.pop(0)  # beside this file is one with the name of the standard module `tokenize`
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from benchmarks.measure import machine, table
from openlm_pipeline.models import create_model
from openlm_pipeline.models.config import model_config
from openlm_pipeline.models.init import initial_values, shares
from openlm_pipeline.storage.files import sha256_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="open_lm_7b")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", help="for files of a rank's share of a checkpoint; by default the temporary one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = model_config(arguments.model)
    named = list(create_model(config, device="meta").named_parameters())
    sizes = [p.numel() for _, p in named]
    takers = shares(sizes, arguments.ranks)
    busiest = max(range(arguments.ranks), key=lambda r: sum(s for s, t in zip(sizes, takers) if t == r))
    mine = [(name, p.shape) for (name, p), taker in zip(named, takers) if taker == busiest]
    values, total = sum(shape.numel() for _, shape in mine), sum(sizes)

    def draw(tensor: tuple[str, torch.Size]) -> None:
        initial_values(*tensor, config, 0)

    def timed(work, items: list, threads: int) -> tuple[float, float]:
        """CPU-seconds and seconds."""
        began, cpu = time.perf_counter(), time.process_time()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, items))
        return time.process_time() - cpu, time.perf_counter() - began

    rows = []

    def row(what: str, work, items: list, parts: float) -> None:
        (cpu, _), (_, seconds) = (timed(work, items, threads) for threads in (1, arguments.threads))
        rows.append([what, f"{cpu * parts:.0f}", f"{cpu:.1f}", f"{seconds:.1f}"])

    row(f"draw {total:,} weights", draw, mine, total / values)
    checkpoint = 12 * total // arguments.ranks
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        files = [Path(folder) / str(n) for n in range(4)]  # a rank writes its part with several threads
        for path in files:
            with path.open("wb") as f:
                for _ in range(checkpoint // len(files) // 2**24):
                    f.write(os.urandom(2**24))
        row(f"hash a checkpoint of {12 * total / 1e9:.0f} GB", sha256_file, files, arguments.ranks)
    share = f"a rank of {arguments.ranks}"
    head = ["to", "CPU-seconds of one rank for all", f"CPU-seconds of {share}"]
    print(machine())
    print(table([*head, f"seconds of {share} with {arguments.threads} threads"], rows))


if __name__ == "__main__":
    main()
