"""A Python program that `server.py` forks, seen from outside: the same streams, signals and exit status.

    python client.py SCRIPT.py arguments        python client.py -m MODULE arguments        python client.py -c CODE

It starts in no time, because it imports nothing; so it can stand where a launcher expects a script.
"""

import json
import os
import signal
import socket
import sys


# Nobody can see SIGKILL come, so that SIGUSR1 stands for it: then this ends when the program has.
FORWARDED = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM, signal.SIGUSR1: signal.SIGKILL}


def main():
    for number in FORWARDED:
        signal.signal(number, lambda number, _: os.kill(pid, FORWARDED[number]))
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    server = socket.socket(socket.AF_UNIX)
    server.connect(os.environ["MOMO_TEST_SERVER"])
    socket.send_fds(server, [b"\0"], [0, 1, 2])
    program = {"arguments": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}
    server.sendall(json.dumps(program).encode() + b"\n")
    answers = server.makefile("r")
    pid = int(answers.readline())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    status = int(answers.readline())
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # its number may be another's now
    if status < 0:
        if -status in FORWARDED:
            signal.signal(-status, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    main()
