"""Any causal model that transformers knows, as the scorer wants it.

The model's own forward is used, its head included, so that what it does to logits (caps, scales) holds. No code of the
model's folder runs, and weights are read from safetensors only.
"""

import contextlib
import inspect
import sys
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from openlm_pipeline.checkpoints.hf import register
from openlm_pipeline.errors import ConfigError, DataError, MissingInputError
from openlm_pipeline.evaluation.model import Decoding, Precision, ScoringModel, branch_mask, computing

_PROBE_TOLERANCE = 1e-4
"""As a share of the largest logit: above fp32's rounding, below what a wrong mask or position does."""


def _load(name_or_path: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    register()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name_or_path,
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except OSError as e:
        raise MissingInputError(
            f"{name_or_path} has no model that can be read from safetensors: {str(e).strip().splitlines()[0]}"
        ) from e
    except (ValueError, KeyError) as e:  # unknown architectures, and those that come with code of their own
        reason = str(e).strip().splitlines()[0]
        raise ConfigError(f"{name_or_path} is not a causal model of this transformers: {reason}") from e
    if info["missing_keys"] or info["mismatched_keys"]:  # transformers would continue with random weights
        first = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))[0]
        raise DataError(f"{name_or_path} has no weight {first} of the shape that its config says")
    return model


class _HuggingFaceDecoding:
    def __init__(self, owner: "HuggingFaceModel") -> None:
        self.owner, self.cache, self.name = owner, None, owner.cache_name

    @torch.no_grad()
    def step(self, ids_BS: Tensor) -> Tensor:
        owner = self.owner
        kept: dict[str, Any] = {} if self.cache is None else {self.name: self.cache}
        with computing(owner.device, owner.precision), owner.head_at(slice(None), -1) as done:
            output = owner.model(input_ids=ids_BS, use_cache=True, **kept)
        self.cache = getattr(output, self.name, None)
        if not hasattr(self.cache, "batch_select_indices"):
            raise ConfigError(f"{owner.name} keeps no keys and values, so that it cannot write; leave such tasks out")
        return (output.logits[0] if done else output.logits[:, -1]).float()

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)


class HuggingFaceModel(ScoringModel):
    """A causal model of a Hugging Face folder or hub name."""

    def __init__(self, name: str, *, device: str = "cpu", precision: Precision = "fp32") -> None:
        """What it raises on first use:
        MissingInputError: there is no such model, or not as safetensors.
        ConfigError: this transformers has no such architecture.
        DataError: weights are missing or of another shape.
        """
        super().__init__(lambda: _load(name), device, precision)
        self.name = name

    @property
    def vocab_size(self) -> int:
        return self.model.config.get_text_config().vocab_size

    @cached_property
    def cache_name(self) -> str:
        """transformers 5 renames `past_key_values`, and warns at the old name."""
        from transformers.modeling_outputs import CausalLMOutputWithPast

        return "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"

    @property
    def end_ids(self) -> tuple[int, ...]:
        config = self.model.config.get_text_config()
        found = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        found = config.eos_token_id if found is None else found
        return () if found is None else tuple(found) if isinstance(found, (list, tuple)) else (found,)

    @cached_property
    def max_branched_len(self) -> int:
        """A mask of ours replaces a sliding window, so it is right for rows that fit into one only."""
        config = self.model.config.get_text_config()
        if "position_ids" not in inspect.signature(self.model.forward).parameters or not self._follows_branches():
            return 0
        windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size"))
        return min(filter(None, windows), default=sys.maxsize)

    def _follows_branches(self) -> bool:
        """Whether two branches give what their texts give alone: tried, as no property of a model says it."""

        def tensor(values: list[int]) -> Tensor:
            return torch.tensor([values], device=self.device)

        vocab_size = self.model.config.get_text_config().vocab_size
        shared, first, second = ([i % vocab_size for i in part] for part in ([7, 3, 11], [5, 2, 13], [12, 1, 4, 9]))
        ids = tensor(shared + first + second)
        segments, positions = tensor([0] * 3 + [1] * 3 + [2] * 4), tensor([0, 1, 2, 3, 4, 5, 3, 4, 5, 6])
        with torch.no_grad(), computing(self.device, "fp32"):
            try:
                branched = self._forward(ids, segments, positions).logits[0]
            except (ValueError, RuntimeError, TypeError, IndexError):  # it takes no such mask
                return False
            alone = [self._forward(tensor(shared + part)).logits[0, 3:] for part in (first, second)]
        expected = torch.cat(alone)
        return bool((branched[3:] - expected).abs().max() <= _PROBE_TOLERANCE * expected.abs().max())

    @contextlib.contextmanager
    def head_at(self, rows: Tensor | slice, columns: Tensor | int) -> Iterator[list[bool]]:
        """Give the head only hidden states [rows, columns]; true is put into the list when it has got them.

        What a model does to logits after its head is elementwise.
        """
        head, done = self.model.get_output_embeddings(), []

        def pick(module: nn.Module, arguments: tuple) -> tuple:
            done.append(True)
            hidden_BSD, *others = arguments
            return (hidden_BSD[rows, columns][None], *others)

        if head is None:
            yield done
            return
        with head.register_forward_pre_hook(pick):
            yield done

    def _forward(self, ids_BS: Tensor, segments_BS: Tensor | None = None, positions_BS: Tensor | None = None) -> Any:
        arguments: dict[str, Any] = {}
        if segments_BS is not None:
            mask = branch_mask(segments_BS)
            if self.model.config._attn_implementation != "sdpa":
                mask = torch.zeros(mask.shape, device=self.device).masked_fill(~mask, torch.finfo(torch.float32).min)
            arguments = {"attention_mask": mask, "position_ids": positions_BS}
        return self.model(input_ids=ids_BS, use_cache=False, **arguments)

    @torch.no_grad()
    def logits(self, ids_BS, rows_P, columns_P, *, segments_BS=None, positions_BS=None) -> Tensor:
        with computing(self.device, self.precision), self.head_at(rows_P, columns_P) as done:
            logits = self._forward(ids_BS, segments_BS, positions_BS).logits
        return (logits[0] if done else logits[rows_P, columns_P]).float()

    def decoding(self, batch_size: int, max_len: int) -> Decoding:
        return _HuggingFaceDecoding(self)
