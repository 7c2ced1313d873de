"""The Llama architecture, one stage at a time, with the backward pass split in two."""
