"""Recovery: snapshots, donors, and how a joiner or a laggard reaches the log head (design section 10)."""
