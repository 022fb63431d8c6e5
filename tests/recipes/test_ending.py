"""A process ends without being taken apart, but with all that was left for its end."""

import pytest

from tests.processes import start


CODE = """
import atexit, concurrent.futures, sys, time
from momo_hf.recipes.ending import end

class Held:
    def __del__(self):
        print("taken apart")

def later():
    time.sleep(0.1)
    print("thread")

held = Held()
atexit.register(print, "at exit")
concurrent.futures.ThreadPoolExecutor().submit(later)
print("last line")
end(3)
"""


@pytest.mark.slow
def test_what_was_left_for_the_end_is_done():
    ended = start.run("-c", CODE)
    assert (ended.returncode, ended.stdout.splitlines()) == (3, ["last line", "thread", "at exit"])
