"""`preflight`: the first step of every job that makes something, a look at what it would set aside, repeat or spend."""

from collections.abc import Sequence

import dagster as dg

from assets.common import (
    PREFLIGHT_KEY,
    allowed,
    checkpoint_key,
    owned_by,
    planned,
    shards_key,
    tokenizer_key,
    user_errors,
)
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.pipeline.plan import look
from openlm_pipeline.pipeline.preflight import whole
from openlm_pipeline.result import CONSENTS, refuse
from openlm_pipeline.storage.home import Home


def preflight_asset(experiments: Sequence[Experiment]) -> dg.AssetsDefinition:
    """A step before all others of a run; it takes no pool slot, and its version never changes."""

    @dg.asset(
        key=PREFLIGHT_KEY,
        group_name="preflight",
        kinds={"python"},
        owners=owned_by(),
        code_version="1",
        description="Refuses what a run would set aside, repeat or spend, unless its tag openlm/allow names it. "
        f"What can be allowed: {'; '.join(f'{name} ({meaning})' for name, meaning in CONSENTS.items())}.",
    )
    def preflight(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        to_be_made = {"/".join(key.path) for key in planned(context)}
        allow = allowed(context)
        found = []
        with user_errors():
            for experiment in experiments:
                if not to_be_made & _names(experiment):
                    continue
                to_make, findings = look(experiment, Home.from_env(), to_be_made)
                found += findings
                for artefact in to_make:
                    context.log.info("\n".join(artefact.lines()))
                if context.job_name not in (experiment.name, f"{experiment.name}_checkpoints"):
                    found += whole(experiment, to_be_made)
            for finding in dict.fromkeys(found):
                context.log.info(finding.line())
            refuse(dict.fromkeys(found), allow)
        return dg.MaterializeResult(metadata={"allowed": sorted(allow)}, data_version=dg.DataVersion("1"))

    return preflight


def _names(experiment: Experiment) -> set[str]:
    """Names of the assets of a recipe that setting aside may concern."""
    keys = [tokenizer_key(experiment.tokenizer.name), *map(shards_key, experiment.datasets())]
    keys += [checkpoint_key(experiment.name, label) for label, _ in experiment.labelled_milestones()]
    return {"/".join(key.path) for key in keys}
