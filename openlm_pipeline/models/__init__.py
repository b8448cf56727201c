"""OpenLM's models: configs by name, the Transformer, and the way in for users of the library."""
