"""Lines of the log above the progress bars, and not at the end of one."""

import logging

from tqdm import tqdm


def _clear_bars(record: logging.LogRecord) -> bool:
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.clear()
    return True


def log_above_bars() -> None:
    """From now on the loggers of this package clear the open bars of tqdm before a line; a bar comes back as it moves on.

    A filter lets everything pass and needs no handler, so that it does not matter where the lines go.
    """
    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0] == __package__.split(".")[0]:
            logging.getLogger(name).addFilter(_clear_bars)
