"""`shoal simulate`: a run's swarm in virtual time, with the real protocol or with its policies alone."""
