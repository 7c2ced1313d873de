"""Sinks: the figures of the owner's view, written where other tools read them (TensorBoard, wandb)."""
