"""Asking the swarm: a client that joins with an inference token and continues a text."""
