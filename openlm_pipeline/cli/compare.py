"""`openlm compare`: one run, milestone or model against another, item by item."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="RECIPE, RECIPE@MILESTONE, a scored model, or its folder.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The same, to compare with.")],
    format: Annotated[Literal["text", "markdown", "csv"], typer.Option(help="How to print the table.")] = "text",
    html: Annotated[Path | None, typer.Option(help="Also write a page with the curves of both to this file.")] = None,
) -> None:
    """Compare two models on the same items: accuracy and bits per byte of each task and average.

    Two recipes are compared at the last milestone of equal tokens that both have, and by their headline at the others.
    Differences are A minus B, with paired intervals; p is corrected over all that is shown; ▲ ▼ mark where A is better
    or worse beyond noise. Models scored with another suite, task file, precision or harness are refused.

    Examples:

    openlm compare demo@400K demo@800K

    openlm compare pretrain_1b modern_1b --html compare.html

    openlm compare pretrain_1b@1.6T pythia_1b --format markdown
    """
    from openlm_pipeline.pipeline.compare import compare_sides, comparison_page, side
    from openlm_pipeline.reports.compare import HEADER
    from openlm_pipeline.storage.files import write_text
    from openlm_pipeline.storage.home import Home

    home = Home.from_env()
    left, right = side(a, home), side(b, home)
    found = compare_sides(left, right)
    if format == "text":
        console = Console(highlight=False, width=max(160, Console().width))  # a line too long wraps, whole
        console.print(f"A: {found.a}\nB: {found.b}\n{found.headline}", markup=False, soft_wrap=True)
        table = Table(box=None, pad_edge=False)
        for i, name in enumerate(HEADER):
            table.add_column(name, justify="right" if i else "left", no_wrap=True)
        for row in found.rows:
            table.add_row(*row)
        console.print(table, soft_wrap=True)
        console.print(f"rules: {found.rules}", markup=False, soft_wrap=True)
    else:
        typer.echo(found.to_markdown() if format == "markdown" else found.to_csv(), nl=format == "markdown")
    if html is not None:
        write_text(html, comparison_page(left, right, found))
        typer.echo(f"page: {html}", err=format == "csv")
