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
        Literal["openlm", "huggingface", "llama"],
        typer.Option(help="epoch_N.pt and what goes with it; any model for transformers; its LlamaForCausalLM."),
    ] = "huggingface",
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json, or its folder; not for openlm.")] = None,
    eot: Annotated[str, typer.Option(help="The tokenizer's end-of-text token.")] = "<|endoftext|>",
    epoch: Annotated[int, typer.Option(min=1, help="N of epoch_N.pt; for openlm only.")] = 1,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Write optimizer_N.pt as OpenLM reads it with --fsdp; for openlm only.")
    ] = False,
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="Type of the weights; not for openlm.")] = "fp32",
    average: Annotated[
        str | None, typer.Option(help="One of the run's training.averages in place of the weights; not for openlm.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option(help="The model card's licence, such as apache-2.0; not for openlm.")
    ] = None,
) -> None:
    """Write a checkpoint in the form of another program.

    openlm: OUTPUT_DIR/checkpoints/epoch_N.pt, with optimizer_N.pt and stats_N.pt from a run's checkpoint, for OpenLM's
    --resume or --pretrained. huggingface: a folder for transformers' AutoModelForCausalLM with trust_remote_code=True,
    whatever the model's variant. llama: the same for models that are exactly a Llama (rms_norm, SwiGLU, rotary or
    llama_rotary, no qk_norm) or, with qk_norm_per_head, a Qwen3: without remote code, and so for every program that
    reads those; others are refused.

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
            raise ConfigError("--tokenizer goes with --format huggingface or llama; OpenLM's checkpoints hold none")
        if dtype != "fp32" or average or licence:
            raise ConfigError("--dtype, --average and --licence go with --format huggingface or llama")
        say(f"exported: {export_openlm(checkpoint, output_dir, epoch=epoch, fsdp=fsdp, say=say)}")
        return
    if fsdp or epoch != 1:
        raise ConfigError("--epoch and --fsdp go with --format openlm")
    settings = {"llama": format == "llama", "dtype": dtype, "average": average, "licence": licence}
    say(f"exported: {export_huggingface(checkpoint, output_dir, tokenizer, eot=eot, **settings)}")
    if tokenizer is None:
        say("without --tokenizer the folder holds no tokenizer; AutoTokenizer will not find one there")
