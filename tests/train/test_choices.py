"""A schedule and an optimizer of a stranger: one new file each, found by name, trained with, settings checked."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_run import SmallRun

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.experiments import optimizers, schedules
from openlm_pipeline.experiments.choices import unread_settings
from openlm_pipeline.experiments.spec import Training
from openlm_pipeline.models import ModelConfig, create_model
from openlm_pipeline.registry import OPTIMIZERS, SCHEDULES, Registry
from openlm_pipeline.runs.dry_run import describe
from openlm_pipeline.runs.estimates import estimate_memory
from openlm_pipeline.runs.identity import settings_identity
from train.optimizers import make_optimizer

STAIRS = '''
from pydantic import Field
from openlm_pipeline.experiments.schedules import Schedule
from openlm_pipeline.registry import SCHEDULES
from openlm_pipeline.strict import Strict

@SCHEDULES.register("stairs")
class Stairs(Schedule):
    """Halves every so many steps."""
    has_horizon = False
    class Settings(Strict):
        tread: int = Field(default=1, ge=1)
    def after_warmup(self, step: int) -> float:
        return self.training.lr * 0.5 ** ((step - self.warmup_steps) // self.own.tread)
'''
MOMENTUM = '''
from openlm_pipeline.experiments.optimizers import OptimizerChoice
from openlm_pipeline.registry import OPTIMIZERS
from openlm_pipeline.strict import Strict

@OPTIMIZERS.register("momentum")
class Momentum(OptimizerChoice):
    """Plain descent with momentum."""
    settings = ("lr", "weight_decay", "no_decay")
    class Settings(Strict):
        momentum: float = 0.9
    def build(self, named_parameters):
        from torch.optim import SGD
        return [SGD(self.decay_groups(named_parameters), lr=self.training.lr, momentum=self.own.momentum)]
    def state_values(self):
        return (1, 1)
'''


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """Put a module into a registry's package, as one new file there would."""
    known = {id(r): (r, dict(r._entries), set(r._seen)) for r in (SCHEDULES, OPTIMIZERS) if r.names}

    def put(package, name: str, text: str) -> None:
        folder = tmp_path / package.__name__
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(text)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])

    yield put
    for registry, entries, seen in known.values():
        registry._entries, registry._seen = entries, seen


def test_a_schedule_and_an_optimizer_are_one_new_file_each(add, small: SmallRun):
    add(schedules, "stairs_of_a_test", STAIRS)
    add(optimizers, "momentum_of_a_test", MOMENTUM)
    choices = ["training.schedule=stairs", "training.optimizer=momentum", "training.warmup=0"]
    own = ["training.schedule_settings={tread: 2}", "training.optimizer_settings={momentum: 0.5}"]
    small.train(*choices, *own, "milestones=[1024]")
    rates = [r["lr"] for r in small.run.read_metrics() if "loss" in r]
    assert rates == [0.01, 0.01, 0.005, 0.005]
    assert small.losses()[4] < small.losses()[1]
    recorded = small.run.identity["training"]
    assert recorded["schedule_settings"] == {"tread": 2} and recorded["optimizer_settings"] == {"momentum": 0.5}
    assert recorded["horizon"] is None
    memory = [estimate_memory(small.experiment(*o), 1).optimizer for o in (choices, [])]
    assert 2 * memory[0] == memory[1]
    with pytest.raises(ConfigError, match=r"schedule_settings of schedule 'stairs'.*did you mean 'tread'"):
        small.experiment(*choices, "training.schedule_settings={thread: 2}")
    with pytest.raises(ConfigError, match=r"small.yaml.*optimizer_settings"):
        small.experiment(*choices, "training.optimizer_settings={momentum: much}")


def test_a_name_that_is_not_there_names_the_nearest(small: SmallRun):
    for override, hint in (("schedule=cosin", "'cosine'"), ("optimizer=adam", "'adamw'")):
        with pytest.raises(
            ConfigError, match=f"training.{override.partition('=')[0]}: there is no .*did you mean {hint}"
        ):
            small.experiment(f"training.{override}")


@pytest.mark.parametrize(
    ("registry", "package", "text", "name"),
    [(SCHEDULES, schedules, STAIRS, "stairs"), (OPTIMIZERS, optimizers, MOMENTUM, "momentum")],
)
def test_a_class_that_no_name_is_registered_for_is_said(add, registry: Registry, package, text: str, name: str):
    add(package, f"{name}_without_name", "\n".join(line for line in text.splitlines() if line[:1] != "@"))
    with pytest.raises(ConfigError, match=rf"no name is registered for .*: put `@{registry.kind.upper()}S.register"):
        registry[name]


def test_settings_of_a_choice_without_settings_are_refused(small: SmallRun):
    with pytest.raises(ConfigError, match=r"schedule_settings of schedule 'constant'.*unknown key 'cycles'"):
        small.experiment("training.schedule_settings={cycles: 2}")


def test_empty_settings_leave_the_identity_as_it_was(small: SmallRun):
    assert not {"schedule_settings", "optimizer_settings"} & settings_identity(small.experiment())["training"].keys()


def test_what_is_set_without_effect_is_said(small: SmallRun):
    plan = describe(small.experiment("training.decay=512"), 1, home=small.home)
    assert plan.unread == ("training.decay has no effect: the schedule 'constant' does not read it, wsd would",)
    assert f"note: {plan.unread[0]}" in plan.lines()
    assert list(unread_settings(Training(global_batch=8, lr=1, schedule="wsd", decay=8, lr_min=0.1))) == []


def test_an_optimizer_that_forgets_a_parameter_is_refused(add):
    add(optimizers, "forgetful", MOMENTUM.replace("(named_parameters), lr", "(named_parameters[1:]), lr"))
    model = create_model(ModelConfig(hidden_dim=32, n_layers=1, n_heads=2, vocab_size=64))
    with pytest.raises(ConfigError, match="takes tok_embeddings.weight 0 times"):
        make_optimizer(Training(global_batch=8, lr=1, optimizer="momentum"), model)


def test_muon_costs_the_products_of_its_iteration(small: SmallRun):
    """Width 32, heads of 32 in all, FFN 256: five iterations of two products with X and one square, per matrix."""
    experiment = small.experiment("training.optimizer=muon")
    config = experiment.model_config_resolved()
    shapes = [(32, 96), (32, 32), (32, 2 * config.ffn_dim), (32, config.ffn_dim)]
    expected = config.n_layers * sum(5 * (2 * m * m * n + 2 * m**3 + 2 * m * m * n) for m, n in shapes)
    plan = describe(experiment, 1, "H100", home=small.home)
    assert plan.optimizer_flops == expected
    plain = describe(small.experiment(), 1, "H100", home=small.home)
    assert plain.optimizer_flops == 0
    assert plan.seconds / plain.seconds == pytest.approx(1 + 8 * expected / (2048 * plan.flops_per_token))


def test_recipes_are_checked_without_torch():
    program = "import sys; from openlm_pipeline.experiments import load_experiment; load_experiment('pretrain_1b')"
    subprocess.run([sys.executable, "-c", f"{program}; assert 'torch' not in sys.modules"], check=True)
