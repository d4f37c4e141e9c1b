"""Diffusers folders as plain stages of torch modules: what is exported, and what the runtime runs in torch."""
