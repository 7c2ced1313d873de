"""Several devices in one peer: its stage sharded over them with FSDP2, a process for each."""
