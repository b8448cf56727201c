"""Runs in LLM Foundry's environment, as a script: scores tasks by LLM Foundry and writes what it found for every item.

    python runner.py JOB.json

The job has `model` (a Hugging Face folder), `trust_remote_code`, `max_seq_len`, `batch_size` and `tasks`; each task has
`name`, `icl_task` (LLM Foundry's YAML as a mapping, with one number of few-shot rows) and `output`, a JSON-lines file
with one item a line: category by category in sorted order, then in file order.

Standard output carries one JSON document a line: progress, and each task that is done with the metrics as LLM Foundry
would print them. The script ends when its standard input does, that is with its parent.
"""

import json
import os
import sys
import threading
import traceback
from pathlib import Path


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


def main() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    documents = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to the log
    import cpu_torchvision  # noqa: F401  isort: skip
    from recording import score_tasks

    job = json.loads(Path(sys.argv[1]).read_text())
    score_tasks(job, lambda document: documents.write(json.dumps(document) + "\n"))


if __name__ == "__main__":
    try:
        main()
    except Exception:  # noqa: BLE001 - llm-foundry's own hook for uncaught exceptions shows nothing
        traceback.print_exc()
        sys.exit(1)
