"""`python -m momo_hf SCRIPT.py` and its like run a script that knows nothing of this package, as python would."""

import json
import os

import pytest

from tests.processes import start


WHO_AM_I = """
import json, os, pickle, sys
from neighbour import value

class Thing: pass

main = sys.modules["__main__"]
print(json.dumps({
    "argv": sys.argv, "path": sys.path, "name": __name__, "file": __file__, "doc": __doc__, "package": __package__,
    "spec": __spec__ and __spec__.name, "loader": type(__loader__).__name__, "is_main": main.__dict__ is globals(),
    "pickled": type(pickle.loads(pickle.dumps(Thing()))) is Thing, "neighbour": value, "names": sorted(globals()),
}))
import atexit
atexit.register(lambda: print(sys.modules["__main__"].Thing.__name__))
os.chdir("/")
sys.exit(3)
"""

TRAIN = """
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainingArguments

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, x, labels):
        return {"loss": (self.linear(x) - labels).square().mean()}

if __name__ == "__main__":
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    data = [{"x": [float(i), 1.0], "labels": [2.0 * i]} for i in range(8)]
    trainer = Trainer(Net(), args, train_dataset=data)
    trainer.train()
    with open(f"{args.output_dir}/{trainer.accelerator.process_index}.txt", "w") as file:
        file.write(f"{trainer.accelerator.num_processes} {type(trainer.optimizer.optimizer).__name__}")
"""

SPAWN = """
import multiprocessing, sys
from transformers import TrainingArguments

# Not behind the guard below, so that a child meets the name before it is told what to do.
name = TrainingArguments("out", optim="momo_adam", use_cpu=True, report_to="none").optim.value

def work(queue, generations):
    queue.put(f"{multiprocessing.current_process().name} {name}")
    if generations:
        start(queue, generations - 1)

def start(queue, generations):
    process = multiprocessing.get_context(sys.argv[1]).Process(target=work, args=(queue, generations))
    process.start()
    process.join()

if __name__ == "__main__":
    queue = multiprocessing.get_context(sys.argv[1]).SimpleQueue()
    start(queue, 1)
    while not queue.empty():
        print(queue.get())
"""


@pytest.fixture
def folder(tmp_path):
    package = tmp_path / "sub" / "package"
    package.mkdir(parents=True)
    (tmp_path / "sub" / "who.py").write_text(WHO_AM_I)
    (tmp_path / "sub" / "neighbour.py").write_text("value = 5\n")
    (tmp_path / "neighbour.py").write_text("value = 7\n")
    (tmp_path / "link.py").symlink_to("sub/who.py")
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(WHO_AM_I)
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "spawn.py").write_text(SPAWN)
    return tmp_path


def run(folder, *command, cold=True, **variables):
    return start.run(*command, cwd=folder, cold=cold, environment={"ACCELERATE_USE_CPU": "true", **variables})


@pytest.mark.parametrize(
    "line, safe_path",
    [
        ("sub/who.py --optim momo_adam -m x", ""),
        ("sub/who.py", "1"),
        ("link.py", ""),
        ("-m sub.who --help", ""),
        ("-m sub.package one", ""),
    ],
)
def test_a_script_sees_what_python_shows_it(folder, line, safe_path):
    line = line.split()
    # With PYTHONSAFEPATH python puts no folder on the path, and the neighbours must be given by hand.
    paths = {"PYTHONPATH": f"{start.ROOT}{os.pathsep}{folder}", "PYTHONSAFEPATH": safe_path}
    expected = run(folder, *line, **paths)
    found = run(folder, "-m", "momo_hf", *line, **paths)
    assert (found.returncode, found.stdout) == (expected.returncode, expected.stdout), found.stderr
    shown, left = found.stdout.splitlines()
    assert json.loads(shown)["is_main"] and left == "Thing" and expected.returncode == 3


@pytest.mark.parametrize(
    "line, process", [("spawn.py spawn", "SpawnProcess"), ("-m spawn forkserver", "ForkServerProcess")]
)
def test_children_and_theirs_know_the_names(folder, line, process):
    # What starts a script may be a fork, which has no folder for modules on its path; what it starts is not.
    found = run(folder, "-m", "momo_hf", *line.split(), cold=line.startswith("-m"))
    expected = [f"{process}-1 momo_adam", f"{process}-1:1 momo_adam"]
    assert found.stdout.splitlines() == expected, found.stderr[-2000:]


def test_what_cannot_be_run_is_said(folder):
    missing = run(folder, "-m", "momo_hf", "missing.py", cold=False)
    assert missing.returncode == 2 and f"can't open file '{folder}/missing.py'" in missing.stderr
    for line in ((), ("--optim", "momo")):
        nothing = run(folder, "-m", "momo_hf", *line, cold=False)
        assert nothing.returncode == 2 and "python -m momo_hf SCRIPT.py" in nothing.stderr
    asked = run(folder, "-m", "momo_hf", "--help")
    assert (asked.returncode, asked.stderr) == (0, "") and "python -m momo_hf SCRIPT.py" in asked.stdout


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        ("torch.distributed.run", "--nproc_per_node", "2"),
    ],
    ids=["python", "accelerate", "torchrun"],
)
def test_a_trainer_script_gets_its_optimizer_on_every_process(folder, command):
    options = ["--output_dir", "out", "--optim", "momo_adam", "--max_steps", "2", "--report_to", "none", "--use_cpu"]
    launcher = ("-m", *command) if command else ()
    port = {"MASTER_PORT": str(start.free_port())}
    # The launcher may be a fork; what it launches is not.
    result = run(folder, *launcher, "-m", "momo_hf", "train.py", *options, cold=not command, **port)
    processes = 2 if command else 1
    written = {path.name: path.read_text() for path in (folder / "out").glob("*.txt")}
    assert written == {f"{i}.txt": f"{processes} MomoAdam" for i in range(processes)}, result.stderr[-4000:]
