"""What earlier releases recorded of samplings, suites and launchers is what is made and read now."""

import pytest

from openlm_pipeline.evaluation.suite import load_suite
from openlm_pipeline.experiments import load_experiment
from openlm_pipeline.experiments.spec import Launcher
from openlm_pipeline.fingerprint import fingerprint
from openlm_pipeline.runs.identity import settings_identity

SAMPLINGS = {
    "permutation": "2caad99620c6d2a998db55045d70994360d5b5f818869887253bd9e4164c502e",
    "windowed": "b657c537f0317edbb7d0713e2dd079f902c8e20695083ec9490f34615b123abc",
    "resampled": "5ed014455465c9ea01d888b859dcb2bd793651b9eb80de47d98c639b20bd20e4",
    "manifest": "e6cc6b28844d6325635a238b98fd239a8f2e9a915a608d6df10d1fb048ed1086",
}
SUITES = {
    "demo": "e7a0c20c1d24ac9047e34998105440e75f33a30eab16eee81377532a55363eff",
    "gauntlet": "1f568171998a8fcdbc180fc84e7481f9d635ddc8051a3005e4824c14f1dd25e2",
    "openlm": "4a2ca26b3dfa61120113144cc188dd00c17afe8501dc8b5f3a395826d02d0601",
    "openlm-newline": "cc9c4baa40fca81b1da46b9d0ba8be12757e6df1de0d4b5413c50518f158db67",
}
OLD_SLURM = {
    **dict.fromkeys(("account", "qos", "constraint", "time_limit", "gpus_per_node", "cpus_per_task", "memory")),
    **{"partition": "gpu", "options": {}, "setup": [], "environment": [], "max_requeues": 100},
}


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_identity_of_each_sampling(sampling: str):
    experiment = load_experiment("demo", [f"training.sampling={sampling}"])
    assert fingerprint(settings_identity(experiment)) == SAMPLINGS[sampling]


@pytest.mark.parametrize("suite", SUITES)
def test_the_digest_of_each_shipped_suite(suite: str):
    assert load_suite(suite).digest == SUITES[suite]


@pytest.mark.parametrize("kind", ["local", "slurm"])
def test_the_launcher_that_old_run_folders_hold(kind: str):
    dumped = {"kind": kind, "nodes": 1, "processes": 2, "max_restarts": 0, "grace_seconds": 300}
    launcher = Launcher(**dumped, slurm=OLD_SLURM, kubernetes=None)
    assert launcher.world_size == 2
    assert launcher.model_dump(mode="json") == {**dumped, "slurm": OLD_SLURM}
    assert Launcher(**launcher.model_dump(mode="json")) == launcher
