"""The fit of a study over the runs that are there, and its page; made again whenever there are more."""

from openlm_pipeline.fingerprint import fingerprint
from openlm_pipeline.result import Say, StageResult
from openlm_pipeline.storage.files import write_json, write_text
from openlm_pipeline.storage.home import Home
from openlm_pipeline.studies.fitting import fit_study
from openlm_pipeline.studies.points import study_points
from openlm_pipeline.studies.study import load_study, target_of

FIT, PAGE = "fit.json", "report.html"


def make_fit(name: str, home: Home, report: Say) -> StageResult:
    """Fit a study over the runs that are there, and write `fit.json` and a page.

    Raises:
        ConfigError: they are too few for a fit, or for a size to hold out.
    """
    from openlm_pipeline.reports.study import study_page

    study = load_study(name)
    points = study_points(name, home, report)
    found = fit_study(points, target_of(study), study=study.name)
    folder, content = home.study(name), found.to_json()
    write_json(folder / FIT, content)
    write_text(folder / PAGE, study_page(content))
    facts: dict[str, object] = {"points": len(found.runs), "law": found.law}
    if found.hold_out:
        facts |= {
            "held_out_parameters": found.hold_out.parameters,
            "held_out_error": found.hold_out.worst.relative_error,
            "held_out_inside": all(check.inside for check in found.hold_out.checks),
        }
    if found.noise.seeds is not None:
        facts["noise_between_seeds"] = found.noise.seeds
    if (made := found.prediction) is not None:
        loss = made.loss
        facts |= {"predicted_loss": loss.value, "predicted_low": loss.low, "predicted_high": loss.high}
        if made.measured is not None:
            facts |= {
                "measured_loss": made.measured.measured,
                "relative_error": made.measured.relative_error,
                "prediction_held": made.measured.inside,
            }
    return StageResult(folder / PAGE, fingerprint({"fit": content}), False, facts)
