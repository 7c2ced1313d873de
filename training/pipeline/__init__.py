"""Micro-batches through the stages: hops, the driver, commits, and the policy that routes them."""
