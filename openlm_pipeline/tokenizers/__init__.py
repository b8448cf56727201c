"""Tokenizers and their engines."""
