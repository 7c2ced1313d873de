"""One peer as people meet it: the daemon, the command line and the status they read."""
