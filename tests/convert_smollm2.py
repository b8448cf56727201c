"""Runs in LLM Foundry's environment: SmolLM2's GGUF file as a Hugging Face folder in fp32.

    python convert_smollm2.py FILE.gguf FOLDER

transformers reads the weights right, and the tokenizer not: it would put a BOS first, and keep numbers whole.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "openlm_pipeline" / "evaluation" / "foundry"))
import cpu_torchvision  # noqa: F401  isort: skip

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
DECODER = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


def tokenizer_of(gguf: Path) -> PreTrainedTokenizerFast:
    """The file's vocabulary and merges, with the rules of SmolLM2's own tokenizer.json."""
    read = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    document = json.loads(read.backend_tokenizer.to_str())
    document |= {"normalizer": None, "post_processor": None, "pre_tokenizer": PRE_TOKENIZER, "decoder": DECODER}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(document)),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def main(gguf: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, torch_dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer_of(gguf).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
