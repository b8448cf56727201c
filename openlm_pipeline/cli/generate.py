"""`openlm generate`: text from a model."""

import sys
from typing import Annotated

import typer

from openlm_pipeline.errors import ConfigError, printable


def generate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN[@MILESTONE]",
            help="demo, demo@400K, demo/v2@400K, demo@latest; or an OpenLM .pt, a folder step-*, a Hugging Face folder "
            "or hub name.",
        ),
    ],
    prompt: Annotated[
        str | None, typer.Option(help="Text to continue; default: what comes from a pipe, else nothing.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to write; default: 64, or what the model's sequence has room for.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.01, help="Below 1 sharpens the distribution.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the K most probable tokens only.")] = None,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Draw from the most probable tokens that make up this share only.")
    ] = 1.0,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the most probable token.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first sample; the next has the next.")] = 0,
    num_samples: Annotated[int, typer.Option(min=1, help="Samples to write, one after the other.")] = 1,
    tokenizer: Annotated[
        str | None, typer.Option(help="tokenizer.json, its folder, or a hub name, where the model has none with it.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 or mps; default: the first GPU, else the CPU.")
    ] = None,
) -> None:
    """Continue a prompt with a model; the text appears as it is written, and ends where the model ends its document.

    Example: openlm generate demo@400K --prompt "The function" --num-samples 2
    """
    from openlm_pipeline.cli.evaluate import check_device
    from openlm_pipeline.pipeline.generate import Writer
    from openlm_pipeline.storage.home import Home

    if greedy and num_samples > 1:
        raise ConfigError("--greedy writes the same text each time; leave --num-samples out")
    if device is not None:
        check_device(device)
    if prompt is None:
        prompt = "" if sys.stdin.isatty() else sys.stdin.read()
    writer = Writer(model, Home.from_env(), tokenizer, device)
    for n in range(num_samples):
        how = {"temperature": 0 if greedy else temperature, "top_k": top_k, "top_p": top_p, "seed": seed + n}
        for piece in writer.write(prompt, max_tokens=max_tokens, **how):
            typer.echo(printable(piece) if sys.stdout.isatty() else piece, nl=False)
        typer.echo("\n" if n < num_samples - 1 else "")
