"""`README.md` of an exported folder: the model card that the Hugging Face hub shows."""

import json
from typing import Any

from openlm_pipeline.models import count_parameters
from openlm_pipeline.models.config import ModelConfig

NOT_STATED = "not stated"


def model_card(
    name: str,
    config: ModelConfig,
    export: dict[str, Any],
    data: list[str],
    *,
    licence: str | None,
    with_remote_code: bool,
    with_tokenizer: bool,
) -> str:
    """The card's text.

    Args:
        export: what `export.json` says.
        data: names of the sources it was trained on; none where that is not known.
        with_remote_code: loading takes `trust_remote_code=True`.
    """
    origin = export["checkpoint"]
    size = f"{config.n_layers} layers, hidden size {config.hidden_dim}, {config.n_heads} heads"
    rows = {
        "parameters": f"{count_parameters(config):,} ({size})",
        "context": f"{config.seq_len:,} tokens",
        "vocabulary": f"{config.vocab_size:,}",
        "variant": f"{config.norm}, {config.positional_embedding}, {config.ffn}"
        + (", qk_norm" if config.qk_norm else "")
        + (", tied embeddings" if config.weight_tying else ""),
        "trained on": ", ".join(data) or NOT_STATED,
        "training tokens": f"{origin['tokens']:,}" if "tokens" in origin else NOT_STATED,
        "run": origin.get("run") or NOT_STATED,
        "step": f"{origin['step']:,}" if "step" in origin else NOT_STATED,
        "checkpoint's weights_digest": origin["weights_digest"],
        "average of weights": export["average"] or "none",
        "weights here": f"{export['dtype']}, weights_digest {export['weights_digest']}",
        "licence": licence or NOT_STATED,
    }
    head = ["library_name: transformers", "pipeline_tag: text-generation"]
    if licence:
        head.append(f"license: {json.dumps(licence)}")
    folder = '"THIS_FOLDER", trust_remote_code=True' if with_remote_code else '"THIS_FOLDER"'
    generate = [
        f"tokenizer = AutoTokenizer.from_pretrained({folder})",
        'made = model.generate(**tokenizer("A text begins", return_tensors="pt"), max_new_tokens=20)',
        "print(tokenizer.decode(made[0]))",
    ]
    lines = [
        *("---", *head, "---", f"# {name}", "", "| | |", "|---|---|"),
        *(f"| {key} | {value} |" for key, value in rows.items()),
        *("", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""),
        f"model = AutoModelForCausalLM.from_pretrained({folder})",
        *(generate if with_tokenizer else []),
        "```",
    ]
    return "\n".join(lines) + "\n"
