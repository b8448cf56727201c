"""Tokenized samples on disk: shards, their manifest, and where each token came from."""
