"""What touches hivemind's classes: guards around its P2P and DHTNode. To import it is to import hivemind.

That takes 2 s, so `hivemind_loading` does it late. hivemind's import sets torch's sharing strategy, renames
the log level WARNING, and installs a log handler of its own; nothing of that stays.
"""

from __future__ import annotations

import logging
import os
import warnings


def _import_contained() -> None:
    os.environ.setdefault("HIVEMIND_LOGLEVEL", "ERROR")  # also what p2pd writes
    import torch.multiprocessing

    strategy = torch.multiprocessing.get_sharing_strategy()  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside hivemind
        from hivemind.utils.logging import use_hivemind_log_handler
    torch.multiprocessing.set_sharing_strategy(strategy)  # type: ignore[no-untyped-call]
    use_hivemind_log_handler("nowhere")
    logging.addLevelName(logging.WARNING, "WARNING")
    hivemind_logger = logging.getLogger("hivemind")
    hivemind_logger.setLevel(logging.WARNING)
    hivemind_logger.addHandler(logging.NullHandler())  # else warnings reach the terminal unasked


_import_contained()
