"""The owner's page: a process of its own that shows Snapshots and passes orders on. See `__main__`.

It holds no key of the run and imports no torch: all it knows comes over the daemon's control socket, so that
neither its load nor an attack on it touches training. `child` and `logins` are the daemon's side of it.
"""
