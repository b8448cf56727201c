"""Raw text to shards: tokenizers, the two stages, and the Dask cluster that runs them."""
