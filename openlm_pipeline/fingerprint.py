"""Fingerprints are trees of fields, so that a difference can be named.

A tree holds only what changes results. Paths, devices, worker counts and dates never go in. Values are str, int,
float, bool, None, lists and dicts with str keys; anything else is refused rather than turned into a string.
"""

import hashlib
import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

Tree = dict[str, Any]


@dataclass(frozen=True)
class Neutral:
    """Annotates a field with the value at which it leaves a fingerprint as it was: `Annotated[int, Neutral(1)] = 1`.

    It never changes, though the field's default may. Without it the default counts.
    """

    value: Any


FIRST_FIELDS = {
    "ModelConfig": (
        "hidden_dim n_layers n_heads seq_len vocab_size post_embed_norm weight_tying norm qk_norm "
        "positional_embedding ffn rope_freq_dtype"
    ),
    "Training": (
        "global_batch lr lr_min schedule warmup decay decay_power lr_floor horizon beta1 beta2 eps "
        "weight_decay no_decay optimizer state_precision grad_clip z_loss precision float8 document_mask "
        "mask_left squash_mask_left mask_token averages max_skipped_steps spike_factor sampling window_shards "
        "source_batch"
    ),
    "Parent": "run version milestone optimizer schedule",
    "TokenizerSpec": "name source train eot",
    "TrainedTokenizer": "vocab_size",
    "Source": "name version files shards origin weight text_key max_bad_fraction",
    "Dataset": (
        "source tokenizer seq_len samples_per_shard shuffle_seed pad_id vocab_size shards_url "
        "keep_local_shards shard_cache_bytes engine verify_every"
    ),
    "Evaluation": "suite backend precision average baselines quoted batch_tokens processes",
    "Baseline": "name model revision tokenizer",
    "IclTask": (
        "label dataset_uri num_fewshot icl_task_type continuation_delimiter example_delimiter prompt_string "
        "question_prelimiter metric_names has_categories category_names sha256 cot_delimiter "
        "early_stopping_criteria do_normalization generation_kwargs fewshot_random_seed strip_dataset "
        "max_seq_len batch_size"
    ),
    "GenerationSettings": ("max_new_tokens do_sample num_beams num_return_sequences use_cache temperature top_k top_p"),
    "Scorecard": (
        "run run_version milestone tokens step checkpoint_digest data_fingerprint tokenizer validation_loss "
        "suite suite_version suite_digest random_baselines harness_version tasks categories averages status "
        "missing changes against"
    ),
    "TaskScore": (
        "task num_fewshot category metric rule num_items num_categories accuracy ci_low ci_high "
        "standard_error chance centred mde accuracy_micro accuracy_sum accuracy_norm status problem "
        "task_file_sha256"
    ),
    "Average": ("name kind tasks random_baselines value ci_low ci_high standard_error chance mde status missing"),
    "Difference": "measure against delta ci_low ci_high p_value p_holm significant mde note",
}
"""Fields that are in a fingerprint whatever their value: those of the first release. A later one only where it is not
neutral, so that what was made before it existed stays what it is."""


def settings_tree(settings: BaseModel, exclude: Collection[str] = ()) -> Tree:
    """The fields of typed settings as a fingerprint holds them: later ones only where they are not neutral.

    Args:
        exclude: fields that do not change results.
    """
    return _without_neutral(settings, settings.model_dump(mode="json", exclude=set(exclude)))


def _without_neutral(settings: Any, dumped: Any) -> Any:
    if isinstance(settings, (tuple, list)):
        return [_without_neutral(item, tree) for item, tree in zip(settings, dumped)]
    if isinstance(settings, dict):
        return {key: _without_neutral(item, tree) for (key, tree), item in zip(dumped.items(), settings.values())}
    if not isinstance(settings, BaseModel):
        return dumped
    kind = type(settings)
    tree = {}
    for name, value in dumped.items():
        own = getattr(settings, name)
        if not is_later(kind, name) or own != neutral_value(kind, name):
            tree[name] = _without_neutral(own, value)
    return tree


def is_later(kind: type[BaseModel], name: str) -> bool:
    """Whether a field came after the first release of its class."""
    first = FIRST_FIELDS.get(kind.__name__)
    return _stated(kind, name) is not None if first is None else name not in first.split()


def _stated(kind: type[BaseModel], name: str) -> Neutral | None:
    return next((m for m in kind.model_fields[name].metadata if isinstance(m, Neutral)), None)


def neutral_value(kind: type[BaseModel], name: str) -> Any:
    """The value of a later field at which it is in no fingerprint."""
    stated = _stated(kind, name)
    return stated.value if stated else kind.model_fields[name].get_default(call_default_factory=True)


def _check(value: Any, path: str) -> None:
    if value is None or isinstance(value, (str, bool, int)):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"fingerprint field {path} is {value}, which is not a stable value")
        return
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"fingerprint field {path} has the key {key!r}; keys must be str")
            _check(item, f"{path}.{key}" if path else key)
        return
    if isinstance(value, list):
        for i, item in enumerate(value):
            _check(item, f"{path}[{i}]")
        return
    raise TypeError(f"fingerprint field {path} is a {type(value).__name__}, which has no stable form")


def fingerprint(tree: Tree) -> str:
    """sha256 hex digest of the canonical JSON of `tree`.

    Raises:
        TypeError: a value has no stable form.
    """
    _check(tree, "")
    canonical = json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def short(digest: str) -> str:
    """The first 12 characters of a digest, for people to read."""
    return digest[:12]


def _leaves(value: Any, path: str) -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for key in value for k, v in _leaves(value[key], f"{path}.{key}" if path else key).items()}
    if isinstance(value, list) and value:
        return {k: v for i, item in enumerate(value) for k, v in _leaves(item, f"{path}[{i}]").items()}
    return {path: value}


def differences(old: Tree, new: Tree) -> list[str]:
    """Each changed field as one line: `train.lr 0.0003 -> 0.0002`; an absent side reads `(absent)`."""
    a, b = _leaves(old, ""), _leaves(new, "")
    lines = []
    for path in [*a, *(p for p in b if p not in a)]:
        # As JSON, because Python holds 1, 1.0 and True for equal and a fingerprint does not.
        before, after = (json.dumps(x[path], ensure_ascii=False) if path in x else "(absent)" for x in (a, b))
        if before != after:
            plain = before.strip('"'), after.strip('"')
            lines.append(f"{path} {' -> '.join(plain if plain[0] != plain[1] else (before, after))}")
    return lines
