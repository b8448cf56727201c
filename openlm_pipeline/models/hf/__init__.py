"""The classes that exported Hugging Face folders carry along: two files that need torch and transformers only."""
