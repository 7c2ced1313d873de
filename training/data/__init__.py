"""What a driver feeds into the pipeline: tokenizer, corpus on disk, and its own stream of samples."""
