"""The end of a script."""

import atexit
import os
import sys
import threading
from typing import NoReturn


def end(status: int) -> NoReturn:
    """End the process when its threads and what was registered for its end are done, and leave its memory to the system.

    Python would take apart every object of torch and transformers first, which takes seconds after the last line is out.
    These are the steps with which `multiprocessing` ends the processes that it forks.

    Args:
        status: for the one who started the process; 0 is success.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
