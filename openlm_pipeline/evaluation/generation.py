"""Greedy generation in batches, each key and value computed once.

Prompts of one batch may differ in length, without any padding: all are read up to the end of the shortest, and the
others take their own next tokens for some steps while the shortest already writes. So positions are those of each text
alone, in every architecture. Finished texts leave the batch.
"""

from collections.abc import Iterator, Sequence

import torch
from tokenizers import Tokenizer

from openlm_pipeline.evaluation.model import ScoringModel
from openlm_pipeline.evaluation.results import Generated
from openlm_pipeline.evaluation.tasks import GenerationRequest

_MAX_SPREAD = 16
"""Tokens by which prompts of one batch may differ: each costs a step, and a step costs about one token of a text."""


def generation_batches(requests: Sequence[GenerationRequest], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of requests that go together, longest first.

    Args:
        batch_tokens: prompts and what may be written, over one batch; a longer request is a batch of its own.
    """
    batch: list[int] = []
    longest = 0
    for i in sorted(range(len(requests)), key=lambda i: (-len(requests[i].context_ids), i)):
        request = requests[i]
        length = len(request.context_ids) + request.max_new_tokens
        full = (len(batch) + 1) * max(longest, length) > batch_tokens
        if batch and (full or len(requests[batch[0]].context_ids) - len(request.context_ids) > _MAX_SPREAD):
            yield batch
            batch, longest = [], 0
        batch.append(i)
        longest = max(longest, length)
    if batch:
        yield batch


class _Text:
    """One text under way."""

    def __init__(self, request: GenerationRequest, tokenizer: Tokenizer, end_ids: frozenset[int]) -> None:
        self.request, self.tokenizer, self.end_ids = request, tokenizer, end_ids
        self.ids: list[int] = []
        self.done = False

    def take(self, position: int, proposed: int) -> int:
        """The token at this place: the prompt's own, or the one proposed, which is then written."""
        if position < len(self.request.context_ids):
            return self.request.context_ids[position]
        if proposed in self.end_ids:
            self.done = True
        else:
            self.ids.append(proposed)
            self.done = len(self.ids) == self.request.max_new_tokens or any(s in self.text for s in self.request.stop)
        return proposed

    @property
    def text(self) -> str:
        return self.tokenizer.decode(self.ids, skip_special_tokens=True)

    def result(self) -> Generated:
        text = self.text
        ends = [at for stop in self.request.stop if (at := text.find(stop)) >= 0]
        return Generated(text[: min(ends, default=len(text))], len(self.ids))


@torch.no_grad()
def generate(
    model: ScoringModel, requests: Sequence[GenerationRequest], tokenizer: Tokenizer, end_ids: Sequence[int]
) -> list[Generated]:
    """What the model writes after each prompt, all in one batch.

    A text ends before an end token, before the first of its `stop` texts, or after `max_new_tokens`.
    """
    texts = [_Text(request, tokenizer, frozenset(end_ids)) for request in requests]
    start = min(len(r.context_ids) for r in requests)
    decoding = model.decoding(len(texts), max(len(r.context_ids) + r.max_new_tokens for r in requests))
    ids = torch.tensor([r.context_ids[:start] for r in requests], device=model.device)
    active, position = texts, start
    while True:
        proposed = decoding.step(ids).argmax(dim=-1).tolist()
        tokens = [text.take(position, token) for text, token in zip(active, proposed)]
        going = [i for i, text in enumerate(active) if not text.done]
        if not going:
            return [text.result() for text in texts]
        if len(going) < len(active):
            decoding.keep(torch.tensor(going, device=model.device))
        active, position = [active[i] for i in going], position + 1
        ids = torch.tensor([[tokens[i]] for i in going], device=model.device)
