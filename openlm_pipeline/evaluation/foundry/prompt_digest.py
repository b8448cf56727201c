"""What an item asks of a model, as one hash. Imported in both environments: standard library only."""

import hashlib
import json


def prompt_digest(asked: list) -> str:
    """sha256 of JSON: [context ids, continuation ids] of each option, or [context ids, n] to write up to n tokens."""
    return hashlib.sha256(json.dumps(asked, separators=(",", ":")).encode()).hexdigest()
