"""Options and arguments that several commands share."""

from typing import Annotated

import typer

from openlm_pipeline.result import CONSENTS

Recipe = Annotated[str, typer.Argument(help="Name of a recipe (`openlm recipes`) or path of a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, such as training.lr=1e-3.")
]
Gpu = Annotated[str | None, typer.Option(help="A GPU such as H100, for the time; default: what the run measured.")]
Mfu = Annotated[float, typer.Option(help="With --gpu: the share of its peak that is reached.", min=0.01, max=1)]
Bandwidth = Annotated[
    float, typer.Option(help="GB/s that a GPU sends to other machines, for the share of a step this takes.", min=0.1)
]
Price = Annotated[
    float | None, typer.Option(envvar="OPENLM_PRICE", help="Price of a GPU-hour, in any currency.", min=0)
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[,NAME]",
        help="What is otherwise refused: "
        + "; ".join(f"{name}: {meaning}" for name, meaning in CONSENTS.items())
        + ".",
    ),
]
