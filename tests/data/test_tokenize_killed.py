"""`kill -9` at any moment, then a second run: the same shards, and what was finished is not done again."""

import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from small_dataset import SmallDataset, documents, message_of
from tiny_pipeline import environment

from openlm_pipeline.errors import BusyError
from openlm_pipeline.pools import PoolFactory

Small = Callable[..., SmallDataset]
PROGRAM = Path(__file__).with_name("pipeline_program.py")


def program(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(OMP_NUM_THREADS="1"),
    )


def finished_files(made: SmallDataset) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in made.tokenized.glob("*.jsonl.json")}


def test_killed_before_any_change_of_the_file_system(small: Small, inline: PoolFactory) -> None:
    texts = {"a.jsonl": documents(5), "b.jsonl": documents(14, 100)}
    whole = small("whole")
    whole.write(texts)
    whole.run(inline)
    leftovers = {p.relative_to(whole.root) for p in whole.root.rglob("*")}

    untouched = small("untouched")
    untouched.write(texts)
    attempts = whole.root.with_name("killed")
    killing = program("kill", untouched.root, attempts)
    output, _ = killing.communicate(timeout=600)
    *changes, last = output.splitlines()
    assert (killing.returncode, last) == (0, "done")
    kinds = Counter(change.split()[0] for change in changes)
    assert kinds["os.rename"] > 20 and kinds.keys() == {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}

    for number, change in enumerate(changes):
        made = SmallDataset(attempts / str(number))
        before = finished_files(made)
        made.run(inline)
        after = finished_files(made)
        assert made.manifest() == whole.manifest(), f"killed before {change}"
        assert {name: after[name] for name in before} == before, f"killed before {change}"
        assert {p.relative_to(made.root) for p in made.root.rglob("*") if ".building" not in p.parts} == leftovers


def test_killed_while_worker_processes_tokenize(small: Small, inline: PoolFactory) -> None:
    texts = {f"{n}.jsonl": documents(1500, 2000 * n) for n in range(8)}
    whole = small("whole", {"samples_per_shard": 8192})
    whole.write(texts)
    whole.run(inline)
    made = small("killed", {"samples_per_shard": 8192})
    made.write(texts)
    running = program("run", made.root)
    while not finished_files(made):
        with pytest.raises(subprocess.TimeoutExpired):  # it must not end by itself
            running.wait(timeout=0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    before = finished_files(made)
    assert 0 < len(before) < len(texts)
    made.run(inline)
    assert made.manifest() == whole.manifest()
    after = finished_files(made)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize(("stage", "doing"), [("tokenize", "tokenizing"), ("pack", "packing")])
def test_a_second_process_is_refused_while_the_first_works(
    stage: str, doing: str, three_files: SmallDataset, inline: PoolFactory, no_client: PoolFactory
) -> None:
    first = program("hold", three_files.root, stage)
    assert first.stdout.readline() == "held\n"
    with pytest.raises(BusyError) as caught:
        three_files.run(inline)
    message_of(caught.value, f"another process is already {doing} in", str(three_files.root), "Wait for it to end")
    first.communicate("go\n", timeout=300)
    assert first.returncode == 0
    assert three_files.run(no_client).reused


def test_the_lock_of_a_killed_process_is_free(three_files: SmallDataset, inline: PoolFactory) -> None:
    first = program("hold", three_files.root, "tokenize")
    assert first.stdout.readline() == "held\n"
    first.kill()
    first.communicate()
    assert not three_files.run(inline).reused
