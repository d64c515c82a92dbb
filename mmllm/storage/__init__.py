"""Weights and checkpoints on disk: safetensors, atomic folders, files that several processes write."""
