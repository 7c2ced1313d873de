"""The version of the installed package: what status, records and the command line tell.

Read once: looking it up opens files, and records are made and statuses answered on the event loop.
"""

from importlib.metadata import version

VERSION = version("shoal")
