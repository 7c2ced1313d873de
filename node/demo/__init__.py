"""`shoal demo`: a swarm of real processes on this machine, one of them killed, all of it measured."""
