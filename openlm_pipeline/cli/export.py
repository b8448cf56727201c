"""`openlm export`: a checkpoint in OpenLM's own files, or as a Hugging Face folder."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console


def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="A folder step-* of a run, an OpenLM .pt file, or a Hugging Face folder.")
    ],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder to write; made if need be.")],
    format: Annotated[
        Literal["openlm", "huggingface"], typer.Option(help="epoch_N.pt and what goes with it, or safetensors.")
    ] = "huggingface",
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json, or its folder; for huggingface only.")] = None,
    eot: Annotated[str, typer.Option(help="The tokenizer's end-of-text token.")] = "<|endoftext|>",
    epoch: Annotated[int, typer.Option(min=1, help="N of epoch_N.pt; for openlm only.")] = 1,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Write optimizer_N.pt as OpenLM reads it with --fsdp; for openlm only.")
    ] = False,
) -> None:
    """Write a checkpoint in the form of another program.

    openlm: OUTPUT_DIR/checkpoints/epoch_N.pt, with optimizer_N.pt and stats_N.pt from a run's checkpoint, for OpenLM's
    --resume or --pretrained. huggingface: a folder for transformers' AutoModelForCausalLM with trust_remote_code=True.

    Example: openlm export openlm_home/runs/demo/v1/checkpoints/step-00000196 --format huggingface -o demo-hf
    --tokenizer openlm_home/tokenizers/demo_bpe
    """
    from openlm_pipeline.checkpoints.model_export import export_huggingface, export_openlm
    from openlm_pipeline.errors import ConfigError

    console = Console(highlight=False, soft_wrap=True)

    def say(line: str) -> None:
        console.print(line, markup=False)

    if format == "openlm":
        if tokenizer is not None:
            raise ConfigError("--tokenizer goes with --format huggingface; OpenLM's checkpoints hold none")
        say(f"exported: {export_openlm(checkpoint, output_dir, epoch=epoch, fsdp=fsdp, say=say)}")
        return
    if fsdp or epoch != 1:
        raise ConfigError("--epoch and --fsdp go with --format openlm")
    say(f"exported: {export_huggingface(checkpoint, output_dir, tokenizer, eot=eot)}")
    if tokenizer is None:
        say("without --tokenizer the folder holds no tokenizer; AutoTokenizer will not find one there")
