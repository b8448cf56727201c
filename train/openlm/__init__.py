"""OpenLM's own training command line: its flags, and the run they stand for."""
