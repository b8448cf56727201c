"""Raw text to shards: documents -> tokens -> samples, and the job that spreads both stages over a pool."""
