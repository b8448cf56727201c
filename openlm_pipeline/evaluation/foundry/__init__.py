"""LLM Foundry itself as a scoring backend, in an environment of its own.

`backend` and `environment` run here. `runner`, `recording` and `cpu_torchvision` run there, as a script; both sides
import `prompt_digest`. That environment is `requirements.txt`, and on top, without what they ask for,
`requirements-no-deps.txt`.
"""
