"""Text that a model writes, token by token: for `openlm generate`, and for the end of the demo."""

from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor

from openlm_pipeline.checkpoints.folders import Checkpoint
from openlm_pipeline.errors import ConfigError, MissingInputError
from openlm_pipeline.evaluation.subject import default_device, milestone_subject, open_subject
from openlm_pipeline.evaluation.tasks import prefix_ids
from openlm_pipeline.experiments import load_experiment, recipe_names
from openlm_pipeline.pipeline.items import milestone_named
from openlm_pipeline.pipeline.overview import find_run
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.storage.home import Home
from openlm_pipeline.tokenizers.engine import load_reference
from openlm_pipeline.tokenizers.tokenizer import read_tokenizer_info, tokenizer_file

MAX_TOKENS = 64


class Writer:
    """A model that continues texts, by what a user calls it.

    Args:
        named: RUN, RUN@MILESTONE or RUN/VERSION@MILESTONE, or else whatever `open_subject` takes. Without a milestone
            it is the run's last; `@latest` is its newest checkpoint.
        tokenizer: for `open_subject`.

    Raises:
        ConfigError: the run has no such milestone.
        MissingInputError: there is no such model.
    """

    def __init__(self, named: str, home: Home, tokenizer: str | None = None, device: str | None = None) -> None:
        device = device or default_device()
        checkpoint = _checkpoint(named, home)
        if checkpoint is None:
            self.subject = open_subject(named, tokenizer=tokenizer, device=device)
            self.end_ids = self.subject.model.end_ids or prefix_ids(self.subject.tokenizer)
            return
        run = RunFolder(checkpoint.path.parents[1])
        folder = home.tokenizer(run.experiment().tokenizer.name)
        home.pull(folder)
        info = read_tokenizer_info(folder)
        tokenizer_of_run = load_reference(tokenizer_file(folder))
        self.subject = milestone_subject(named, checkpoint, tokenizer_of_run, device=device)
        self.end_ids = (info.eot_id,)

    def write(
        self,
        prompt: str,
        *,
        max_tokens: int | None = None,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """Continue a prompt, up to the end of the text; an empty one begins a document.

        Args:
            max_tokens: by default `MAX_TOKENS`, or fewer where the model's sequence is full before.
            temperature, top_k, top_p: see `choose`.

        Yields:
            The prompt, then pieces of text of whole characters, as they come.

        Raises:
            ConfigError: the prompt, or all that was asked for, is longer than the model's sequence.
        """
        tokenizer, seq_len = self.subject.tokenizer, self.subject.max_seq_len
        ids = tokenizer.encode(prompt).ids or list(prefix_ids(tokenizer) or self.end_ids)
        room = seq_len - len(ids)
        if room < (max_tokens or 1):
            raise ConfigError(
                f"the prompt has {len(ids)} tokens, and {self.subject.name} was made for {seq_len}: {max_tokens or 1} "
                "more do not fit; shorten the prompt, or set a smaller --max-tokens"
            )
        yield prompt
        max_tokens = max_tokens or min(MAX_TOKENS, room)
        decoding = self.subject.model.decoding(1, len(ids) + max_tokens)
        generator, pieces = torch.Generator().manual_seed(seed), DecodeStream(ids=ids, skip_special_tokens=True)
        new = ids
        for _ in range(max_tokens):
            logits_V = decoding.step(torch.tensor([new], device=self.subject.model.device))[0]
            new = [choose(logits_V.cpu(), temperature, top_k, top_p, generator)]
            if new[0] in self.end_ids:
                return
            if piece := pieces.step(tokenizer, new[0]):
                yield piece


def choose(logits_V: Tensor, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator) -> int:
    """Draw a token from softmax(logits / temperature).

    Args:
        temperature: 0 takes the most probable token.
        top_k: draw from so many of the most probable only.
        top_p: draw from the fewest of the most probable whose probability is at least that (nucleus sampling,
            https://arxiv.org/abs/1904.09751), after `top_k`.
    """
    if temperature == 0:
        return int(logits_V.argmax())
    ordered, ids = logits_V.sort(descending=True, stable=True)
    probabilities = (ordered[:top_k].double() / temperature).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities[before >= top_p] = 0
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def _checkpoint(named: str, home: Home) -> Checkpoint | None:
    """The checkpoint that RUN/VERSION@MILESTONE names; None where it may be a model that no run here made."""
    run_name, _, wanted = named.partition("@")
    name, _, version = run_name.partition("/")
    if Path(named).exists() or not name.replace("_", "").isalnum() or "/" in version:
        return None
    known = name in recipe_names()
    run = RunFolder(home.run(name, version or (load_experiment(name).version if known else "v1")))
    home.pull(run.path)
    saved = run.saved()
    if not saved and "/" in named and not known:
        return None
    if wanted not in ("", "latest") and saved:
        label = milestone_named(run.experiment(), wanted)
        saved = [c for c in saved if c.milestone == label]
    if not saved:
        if not known:
            find_run(home, name, version)
        raise MissingInputError(f"there is no checkpoint {named} in {run.path}; `openlm train {name}` makes it")
    return saved[-1] if wanted else ([c for c in saved if c.milestone] or saved)[-1]
