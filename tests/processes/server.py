"""Forks Python programs from a process that has imported what they import: 0.1 s of a core for a start instead of 5 s.

    python -m tests.processes.server SOCKET

Every connection is one program, see `client.py`: its arguments, environment, folder and standard streams come in; the
number of its process and how it ended go out. Who hangs up has it killed. All end with the server's standard input.
"""

import contextlib
import gc
import json
import os
import selectors
import signal
import socket
import sys
import types
from pathlib import Path

import accelerate  # noqa: F401
import datasets
import deepspeed  # noqa: F401, which accelerate imports whenever a Trainer trains
import diffusers
import evaluate  # noqa: F401
import sacrebleu  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.utils.tensorboard  # noqa: F401
import transformers

import momo_hf
import momo_hf.__main__
from momo_hf.recipes.ending import end


# What is imported when it is asked for.
LAZY = (
    transformers.AutoModelForImageClassification,
    transformers.BartForConditionalGeneration,
    transformers.CLIPTextModel,
    diffusers.DDPMPipeline,
    diffusers.StableDiffusionPipeline,
    diffusers.training_utils.EMAModel,
    momo_hf.MomoSeq2SeqTrainer,
)


def serve(path):
    """Fork a process for every connection; returns in each of them, with the program that it is to run."""
    listener, (ended, signalled) = socket.socket(socket.AF_UNIX), socket.socketpair()
    listener.bind(path)
    listener.listen()
    signalled.setblocking(False)
    signal.set_wakeup_fd(signalled.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for those who asked
    watched = selectors.DefaultSelector()
    for source in (sys.stdin, listener, ended):
        watched.register(source, selectors.EVENT_READ)
    clients = {}
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        for key, _ in watched.select():
            if key.fileobj is sys.stdin:
                for pid in clients:
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            elif key.fileobj is listener:
                client = listener.accept()[0]
                program = receive(client)
                pid = os.fork()
                if pid == 0:
                    watched.close()
                    for other in (listener, ended, signalled, client, *clients.values()):
                        other.close()
                    return program
                for stream in program["streams"]:
                    os.close(stream)
                clients[pid] = client
                watched.register(client, selectors.EVENT_READ, pid)
                tell(client, pid)
            elif key.fileobj is ended:
                ended.recv(4096)
                reap(clients, watched)
            elif key.data in clients:  # hung up
                os.kill(key.data, signal.SIGKILL)
                watched.unregister(key.fileobj)
                clients.pop(key.data).close()


def receive(client):
    first, streams, _, _ = socket.recv_fds(client, 1, 3)
    with client.makefile("r") as lines:
        return {**json.loads(lines.readline()), "streams": streams}


def tell(client, number):
    with contextlib.suppress(BrokenPipeError):  # it will be seen to have hung up
        client.sendall(f"{number}\n".encode())


def reap(clients, watched):
    """Tell how those ended that have."""
    with contextlib.suppress(ChildProcessError):  # none is left
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            client = clients.pop(found[0], None)
            if client is not None:
                watched.unregister(client)
                tell(client, os.waitstatus_to_exitcode(found[1]))
                client.close()


def become(arguments, environment, folder, streams):
    """Make this process what a fresh one would be, and run the program as python would."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if "HF_DATASETS_CACHE" in environment:  # which datasets reads when it is imported
        datasets.config.HF_DATASETS_CACHE = Path(environment["HF_DATASETS_CACHE"])
    sys.argv = ["momo_hf", *arguments]
    if arguments[0] == "-c":
        sys.argv, main = ["-c", *arguments[2:]], types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(arguments[1], "<string>", "exec"), main.__dict__)
    else:
        momo_hf.__main__.main()


def end_after(error):
    """End as python does after an exception or none."""
    status = error.code if isinstance(error, SystemExit) else int(error is not None)
    if error is not None and not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
    elif not isinstance(status, (int, type(None))):
        status, _ = 1, sys.stderr.write(f"{status}\n")
    end(status or 0)


if __name__ == "__main__":
    gc.collect()
    gc.freeze()  # pages that nobody writes stay shared
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, "a process with several threads cannot be forked safely"
    program = serve(sys.argv[1])
    try:
        become(**program)
    except BaseException as error:
        end_after(error)
    end_after(None)
