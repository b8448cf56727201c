"""Loading a checkpoint's model: safe with folders of strangers, exact with our own."""

import enum
import hashlib
import io
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from small_run import SmallRun
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from openlm_pipeline.checkpoints.folders import Checkpoint, read_checkpoint
from openlm_pipeline.checkpoints.reading import load_model
from openlm_pipeline.errors import DataError


class Reaches:
    """Pickles to an attribute of a class that descriptions may name."""

    def __reduce__(self):
        return getattr, (BytesStorageMetadata, "__init__")


class OlderPickler(pickle.Pickler):
    """Writes the members of enums as Python 3.11.0 to 3.11.3 do."""

    def reducer_override(self, value: object):
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


class Runs:
    """Pickles to a call of `os.system`."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    small = SmallRun(tmp_path_factory.mktemp("weights"), (2,))
    small.train()
    return small


@pytest.fixture
def foreign(trained: SmallRun, tmp_path: Path) -> Path:
    """A checkpoint that a test may forge."""
    return Path(shutil.copytree(trained.run.checkpoints / "step-00000002", tmp_path / "step-00000002"))


def forge(folder: Path, name: str, data: bytes) -> Checkpoint:
    """Replace a file and its recorded hash, as someone who means harm would."""
    (folder / name).write_bytes(data)
    files = dict(read_checkpoint(folder).files)
    files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    checkpoint = read_checkpoint(folder)
    return Checkpoint(**{**vars(checkpoint), "files": files})


def test_the_model_is_the_one_that_was_trained(trained: SmallRun):
    checkpoint = read_checkpoint(trained.run.checkpoints / "step-00000002")
    model = load_model(checkpoint)
    assert not model.training
    ids = torch.arange(64).reshape(2, 32)
    with torch.no_grad():
        logits = model(ids)
    assert logits.shape == (2, 32, 260) and torch.isfinite(logits).all()


def test_a_description_that_an_older_python_wrote_is_read(foreign: Path):
    metadata = pickle.loads((foreign / ".metadata").read_bytes())  # noqa: S301 - our own
    older = io.BytesIO()
    OlderPickler(older).dump(metadata)
    assert b"getattr" in older.getvalue()
    expected = load_model(read_checkpoint(foreign)).state_dict()
    found = load_model(forge(foreign, ".metadata", older.getvalue())).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_description_that_reaches_into_a_class_is_refused(foreign: Path):
    with pytest.raises(DataError, match=r"BytesStorageMetadata'>\.__init__, which no checkpoint of ours does"):
        load_model(forge(foreign, ".metadata", pickle.dumps(Reaches())))


def test_a_description_that_would_run_a_command_is_refused(foreign: Path, tmp_path: Path):
    proof = tmp_path / "was_run"
    checkpoint = forge(foreign, ".metadata", pickle.dumps(Runs(f"touch {proof}")))
    with pytest.raises(DataError, match=r"\.metadata names (posix|os)\.system"):
        load_model(checkpoint)
    assert not proof.exists()


def test_a_value_that_would_run_a_command_is_refused(foreign: Path, tmp_path: Path):
    """The description is harmless, but says that a weight is a pickle, which stands in the data file."""
    proof = tmp_path / "was_run"
    metadata = pickle.loads((foreign / ".metadata").read_bytes())  # noqa: S301 - our own
    name = "model.norm.weight"
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    index = next(i for i in metadata.storage_data if i.fqn == name)
    info = metadata.storage_data.pop(index)
    bad = io.BytesIO()
    torch.save(Runs(f"touch {proof}"), bad)
    part = bytearray((foreign / info.relative_path).read_bytes())
    metadata.storage_data[type(index)(fqn=name)] = type(info)(info.relative_path, len(part), len(bad.getvalue()))
    forge(foreign, ".metadata", pickle.dumps(metadata))
    checkpoint = forge(foreign, info.relative_path, bytes(part) + bad.getvalue())
    description = foreign / ".metadata"
    files = {**checkpoint.files, ".metadata": _entry(description)}
    with pytest.raises(DataError, match="has no tensor norm.weight"):
        load_model(Checkpoint(**{**vars(checkpoint), "files": files}))
    assert not proof.exists()


def _entry(path: Path) -> dict[str, object]:
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


@pytest.mark.parametrize("data", [b"", b"not a pickle", pickle.dumps({"state_dict_metadata": {}})])
def test_a_description_that_is_none_is_refused(foreign: Path, data: bytes):
    with pytest.raises(DataError, match=r"\.metadata is not the description of a checkpoint"):
        load_model(forge(foreign, ".metadata", data))


@pytest.mark.parametrize("pattern", ["*.distcp", ".metadata", "model_config.json"])
def test_a_damaged_file_is_named(foreign: Path, pattern: str):
    checkpoint = read_checkpoint(foreign)
    (damaged,) = list(foreign.glob(pattern))
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(DataError, match=damaged.name.replace(".", r"\.")):
        load_model(checkpoint)
    damaged.unlink()
    with pytest.raises(DataError, match="missing"):
        load_model(checkpoint)
