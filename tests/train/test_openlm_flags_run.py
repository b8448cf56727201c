"""OpenLM's README line under real torchrun: trained, validated, resumed, and begun from other weights."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import openlm
from gloo_workers import run_program
from small_run import REPOSITORY, write_dataset
from torch.distributed.run import parse_args

from openlm_pipeline.checkpoints.folders import list_checkpoints, read_checkpoint
from openlm_pipeline.checkpoints.reading import load_model
from openlm_pipeline.errors import ConfigError, ConsentError, IdentityError
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.storage.home import Home

TORCHRUN = Path(sys.executable).with_name("torchrun")
README = """
 --model {model}
 --train-data {tar}
 --train-num-samples 1024
 --workers 8
 --dataset-resampled
 --precision amp_bfloat16
 --batch-size 4
 --grad-checkpointing
 --log-every-n-steps 2
 --grad-clip-norm 1
 --data-key json.gz
 --lr 3e-4
 --fsdp --fsdp-amp
 --warmup 2
 --wd 0.1
 --beta2 0.95
 --epochs 2
 --report-to wandb
 --wandb-project-name open_lm_example
 --name open_lm_ex_123
 --resume latest
 --logs {logs}
 --val-data {tar} --val-data-key json.gz
"""


class Flags:
    """A folder with exported shards, and OpenLM's line on them."""

    def __init__(self, root: Path) -> None:
        self.root, self.home = root, Home(root / "home")
        write_dataset(self.home, "text", 64, seed=0)
        shards = str(self.home.shards("text", "v1"))
        assert openlm("shards", "export", shards, "-o", root / "exported", variables={}).returncode == 0
        (root / "tiny.json").write_text(
            '{"hidden_dim": 32, "n_layers": 2, "n_heads": 2, "seq_len": 32, "vocab_size": 260}'
        )
        # What installing this project registers, where it is not installed.
        info = root / "site" / "openlm_line-0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: openlm-line\nVersion: 0\n")
        hook = "openlm = openlm_pipeline.runs.torchrun_line:protect_script_flags"
        (info / "entry_points.txt").write_text(f"[torch.backends]\n{hook}\n")

    @property
    def variables(self) -> dict[str, str]:
        usual = {"OMP_NUM_THREADS": "1", "OPENLM_HOME": str(self.home.root), "WANDB_MODE": "offline"}
        return {**os.environ, **usual, "PYTHONPATH": f"{self.root / 'site'}:{REPOSITORY}"}

    def forked(self, processes: int, *line: str) -> tuple[list[int], str]:
        """Exit codes and output of `python -m train LINE` as several ranks without torchrun."""
        log = self.root / "forked.log"
        log.write_bytes(b"")
        return run_program("train", line, self.variables, log, processes), log.read_text()

    def line(self) -> list[str]:
        tars = self.root / "exported" / "{00000000..00000001}.tar"
        return README.format(model=self.root / "tiny.json", tar=tars, logs=self.root / "logs").split()

    def torchrun(self, *more: str) -> subprocess.CompletedProcess:
        command = [str(TORCHRUN), "--standalone", "--nproc-per-node", "2", "-m", "train", *self.line(), *more]
        return subprocess.run(command, env=self.variables, text=True, capture_output=True, cwd=self.root, timeout=300)

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.root / "logs" / "open_lm_ex_123")

    def checkpoints(self) -> dict[int, Path]:
        found = list_checkpoints(self.folder.checkpoints, self.folder.fingerprint, warn=pytest.fail)
        return {c.step: c.path for c in found}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Flags:
    flags = Flags(tmp_path_factory.mktemp("openlm"))
    done = flags.torchrun()
    assert done.returncode == 0, done.stdout + done.stderr
    return flags


def test_the_readme_line_trains_and_validates(trained: Flags):
    assert list(trained.checkpoints()) == [4, 8]  # two epochs of 1,024 tokens, 2 x 4 x 32 a step
    assert trained.folder.read_outcome().items() >= {"status": "completed", "step": 8, "tokens": 2048}.items()
    records = trained.folder.read_metrics()
    assert [r["step"] for r in records if "validation_loss" in r] == [4, 8]
    assert [r["step"] for r in records if "loss" in r] == [2, 4, 6, 8]
    params = (trained.folder.path / "params.txt").read_text().splitlines()
    assert "lr: 0.0003" in params
    log = (trained.folder.path / "out.log").read_text()
    assert "step       8" in log
    assert list(trained.folder.path.glob("**/offline-run-*"))  # wandb's


def test_the_same_line_goes_on_from_the_newest_checkpoint(trained: Flags):
    losses = {r["step"]: r["loss"] for r in trained.folder.read_metrics() if "loss" in r}
    shutil.rmtree(trained.checkpoints()[8])
    codes, printed = trained.forked(2, *trained.line(), "--workers", "1", "--accum-freq", "2")  # how may change
    assert codes == [0, 0], printed
    assert "resumed from step-00000004" in printed
    assert "resumed from step-00000004" in (trained.folder.path / "out.log").read_text()
    assert list(trained.checkpoints()) == [4, 8]
    again = {r["step"]: r["loss"] for r in trained.folder.read_metrics() if "loss" in r}
    assert again == pytest.approx(losses, rel=1e-3)  # half the batch at a time, in bfloat16


def test_another_run_is_refused_and_leaves_the_folder_as_it_was(trained: Flags):
    before = {p: p.stat().st_mtime_ns for p in trained.folder.path.rglob("*") if p.is_file()}
    codes, printed = trained.forked(1, *trained.line(), "--lr", "0.5", "--batch-size", "8")
    assert codes == [IdentityError.exit_code]
    assert "training.lr" in printed
    assert {p: p.stat().st_mtime_ns for p in trained.folder.path.rglob("*") if p.is_file()} == before


def test_a_refused_flag_ends_before_anything_is_made(trained: Flags):
    codes, printed = trained.forked(1, *trained.line(), "--name", "other", "--moe-freq", "2")
    assert codes == [ConfigError.exit_code]
    assert "mixture-of-experts" in printed
    assert not (trained.root / "logs" / "other").exists()


def test_days_on_a_cpu_are_refused_and_the_consent_is_no_flag_of_openlm(trained: Flags):
    years = [*trained.line(), "--name", "other", "--train-num-samples", str(10**14)]
    codes, printed = trained.forked(1, *years)
    assert codes == [ConsentError.exit_code]
    assert "--allow cpu" in printed
    codes, printed = trained.forked(1, *years, "--allow", "cpuu")
    assert codes == [ConfigError.exit_code]
    assert "did you mean 'cpu'?" in printed


def test_pretrained_weights_are_summed_and_part_of_the_run(trained: Flags):
    first, last = trained.checkpoints().values()
    line = [*trained.line(), "--batch-size", "8", "--epochs", "1", "--lr", "1e-30", "--warmup", "0", "--wd", "0"]
    line = [word for word in line if word not in ("--report-to", "wandb")] + ["--name", "averaged"]
    average = ("--average", str(first), str(last), "--average-coefficients", "0.75", "0.25")
    codes, printed = trained.forked(1, "--", *line, *average)
    assert codes == [0], printed
    run = RunFolder(trained.root / "logs" / "averaged")
    assert [w["coefficient"] for w in run.identity["initial_weights"]] == [0.75, 0.25]
    (made,) = list_checkpoints(run.checkpoints, run.fingerprint, warn=pytest.fail)
    of = (read_checkpoint(first), read_checkpoint(last), made)
    states = [dict(load_model(checkpoint).named_parameters()) for checkpoint in of]
    for name, value in states[2].items():
        torch.testing.assert_close(value, 0.75 * states[0][name] + 0.25 * states[1][name], rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(states[0][n], states[1][n]) for n in states[0])


def test_torchrun_refuses_its_own_ambiguities_without_the_hook(trained: Flags, capsys: pytest.CaptureFixture[str]):
    """Why the hook is there, without which the README line does not start; `--` before the flags does without it."""
    line = ["--standalone", "-m", "train"]
    flags = ["--logs", "x", "--log-local"]
    with pytest.raises(SystemExit):
        parse_args([*line, *flags])
    assert "ambiguous option: --logs" in capsys.readouterr().err
    given = parse_args([*line, "--", *flags]).training_script_args
    codes, printed = trained.forked(1, *given)
    assert codes == [ConfigError.exit_code]
    assert "--log-local: the first process alone" in printed


def test_more_epochs_go_on_where_the_run_ended(trained: Flags):
    """OpenLM's cosine over four epochs, from the ninth step on."""
    before = {r["step"]: r["lr"] for r in trained.folder.read_metrics() if "loss" in r}
    codes, printed = trained.forked(2, *trained.line(), "--epochs", "4")
    assert codes == [0, 0], printed
    assert "resumed from step-00000008" in printed
    after = {r["step"]: r["lr"] for r in trained.folder.read_metrics() if "loss" in r}
    assert list(trained.checkpoints()) == [4, 8, 12, 16]
    assert {step: after[step] for step in before} == before
    assert before[8] < after[10] > after[12] > after[16]
    codes, printed = trained.forked(2, *trained.line(), "--epochs", "4")
    assert codes == [0, 0], printed  # nothing is left to do
