"""`openlm release`: a milestone as a folder that proves its own numbers."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def release(
    run: Annotated[str, typer.Argument(metavar="RUN[@MILESTONE]", help="Such as demo@800K; default: the last scored.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder to write: new, or a release.")],
    licence: Annotated[str | None, typer.Option(help="Of the weights, such as apache-2.0.")] = None,
) -> None:
    """Write a milestone with all that its numbers rest on: weights for transformers, a model card, the recipe, run,
    checkpoint, metrics, scorecard, every scored item, the suite, the shards' manifests, a list of raw files with their
    hashes, what it was trained with, and one list of hashes over all.

    `openlm verify FOLDER`, or `python verify.py` inside it, follows every link. On the hub a milestone is a revision:
    hf upload ORG/NAME FOLDER . --revision MILESTONE

    Example: openlm release demo@800K -o demo-release --licence apache-2.0
    """
    from openlm_pipeline.pipeline.release import release
    from openlm_pipeline.storage.home import Home

    console = Console(highlight=False, soft_wrap=True)
    name, _, milestone = run.partition("@")
    made = release(
        name, milestone, output_dir, Home.from_env(), lambda line: console.print(line, markup=False), licence=licence
    )
    console.print(f"released: {made}; check it by `openlm verify {made}`", markup=False)
