"""Checkpoints: a model on disk, one file a parameter, whole or refused by name, free of stages."""
