"""Set-up of all tests: hypothesis without deadlines (machines are slow at times), failures repeatable."""

from hypothesis import settings

settings.register_profile("shoal", deadline=None, print_blob=True)
settings.load_profile("shoal")
