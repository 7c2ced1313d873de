"""Answering from the model: stages with a cache of keys and values, sessions that survive their servers."""
