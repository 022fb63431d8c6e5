"""Checkpoints of the loop on accelerate: what they hold, what they refuse, and that nothing in them is run."""

import json
import os
import pickle
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader

from momo_hf.recipes.errors import InputError
from momo_hf.recipes.loop import STATE, Loop, make_accelerator, make_optimizer, make_scheduler, number_of_steps
from momo_hf.recipes.outputs import RunArguments, prepare_output
from tests.toys import Net, Points


pytestmark = pytest.mark.usefixtures("fresh_state")


def run_loop(folder, ema=True, **options):
    """Six steps with a checkpoint after every second one; returns the loop and its model."""
    defaults = {"optim": "momo_adam", "learning_rate": 0.1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    defaults |= {"save_steps": 2, "logging_steps": 1, "max_steps": 6}
    args = RunArguments(str(folder), **{**defaults, **options})
    prepare_output(args)
    accelerator = make_accelerator(args)
    model = Net()
    optimizer = make_optimizer(args, model, [{"params": list(model.parameters())}])
    scheduler = make_scheduler(args, optimizer, args.max_steps, accelerator)
    loader = DataLoader(Points(), 8, shuffle=True)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    loop = Loop(args, accelerator, optimizer, loader, args.max_steps, EMAModel(model.parameters()) if ema else None)
    for batch in loop.batches():
        loss = model(**batch)["loss"]
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if loop.after_backward(loss) and loop.is_due("save"):
            loop.save()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return loop, model


def test_a_killed_loop_goes_on_as_if_nothing_had_been(tmp_path):
    once, model = run_loop(tmp_path, save_total_limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    shutil.rmtree(tmp_path / "checkpoint-6")
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "unfinished" / "checkpoint-6")
    twice, resumed = run_loop(tmp_path, save_total_limit=2, resume_from_checkpoint="True")
    assert twice.history == once.history and [e["step"] for e in twice.history] == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(once.ema.shadow_params, twice.ema.shadow_params))
    assert twice.ema.optimization_step == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"]


def test_a_loop_shows_its_search_and_averages_no_steps_of_it(tmp_path):
    searching = {"optim_args": "lr=auto", "save_strategy": "no"}
    loop, model = run_loop(tmp_path / "middle", max_steps=10, **searching)
    assert all(map(torch.equal, loop.ema.shadow_params, Net().parameters()))
    assert not all(map(torch.equal, model.parameters(), Net().parameters()))
    assert json.loads((tmp_path / "middle" / "search.json").read_text())["cap"] is None
    loop, model = run_loop(tmp_path / "whole", max_steps=70, lr_scheduler_type="constant", **searching)
    search = loop.optimizer.search
    assert json.loads((tmp_path / "whole" / "search.json").read_text()) == search._asdict()
    assert (tmp_path / "whole" / "search.png").exists()
    assert loop.ema.optimization_step == 70 - search.steps + 1  # its last step ends where training begins
    last = loop.history[-1]
    assert (
        last["learning_rate"]
        == last["momo/cap"]
        == pytest.approx(search.cap * min(1, (70 - search.steps) / search.steps))
    )


def test_a_loop_keeps_no_ema_where_the_optimizer_averages(tmp_path):
    loop, model = run_loop(tmp_path, optim_args="averaging=true", lr_scheduler_type="constant")
    assert loop.ema is None
    y = [p.detach().clone() for p in model.parameters()]
    z = [p.detach() + loop.optimizer.state[p]["ahead"] for p in model.parameters()]
    with loop.evaluation():
        for p, ours, theirs in zip(model.parameters(), y, z):
            torch.testing.assert_close(p, (ours - 0.3 * theirs) / 0.7)
    torch.testing.assert_close([p.detach() for p in model.parameters()], y)
    saved = torch.load(tmp_path / "checkpoint-6" / "optimizer.bin", weights_only=True)
    assert saved["param_groups"][0]["train_mode"]


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_no_file_of_a_checkpoint_is_run(tmp_path):
    run_loop(tmp_path / "out", max_steps=2)
    good, marker = tmp_path / "out" / "checkpoint-2", tmp_path / "ran"
    names = [path.name for path in good.iterdir()]
    assert {"optimizer.bin", "random_states_0.pkl", "ema_0.safetensors", STATE} <= set(names)
    # Also names that an earlier version or accelerate itself would read.
    for name in [*names, "ema_0.pt", "custom_checkpoint_0.pkl", "pytorch_model.bin", "sampler.bin"]:
        for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
            bad = tmp_path / "checkpoint-2"
            shutil.rmtree(bad, ignore_errors=True)
            shutil.copytree(good, bad)
            if name == "pytorch_model.bin":
                (bad / "model.safetensors").unlink()
            write(Evil(marker), bad / name)
            try:
                run_loop(tmp_path / "other", max_steps=2, resume_from_checkpoint=str(bad), save_strategy="no")
            except Exception:
                AcceleratorState._reset_state(True)
            assert not marker.exists(), name
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"processes": 2}, "made by 2 processes, and this run has 1: .* Start 2 to go on"),
        ({"ema": None}, "made without averaged weights; go on with --ema_decay 0"),
        (None, f"is no checkpoint of this script: no {STATE} in it"),
    ],
)
def test_what_cannot_go_on_says_why(tmp_path, change, message):
    run_loop(tmp_path, max_steps=2)
    path = tmp_path / "checkpoint-2" / STATE
    state = json.loads(path.read_text()) | (change or {})
    path.write_text(json.dumps({key: value for key, value in state.items() if value is not None}))
    if change is None:
        path.unlink()
    with pytest.raises(InputError, match=message):
        run_loop(tmp_path, resume_from_checkpoint="True")


def test_a_batch_larger_than_the_data_is_named(tmp_path):
    args = RunArguments(str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=25)
    loader = DataLoader(Points(rows=24), 25, drop_last=True)
    with pytest.raises(InputError, match="per_device_train_batch_size=25 leaves no whole batch"):
        number_of_steps(args, loader, make_accelerator(args))


def test_a_loop_overwrites_when_it_starts(tmp_path):
    run_loop(tmp_path, max_steps=6)
    run_loop(tmp_path, max_steps=4, overwrite_output_dir=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    run_loop(tmp_path, max_steps=6, resume_from_checkpoint="True", overwrite_output_dir=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
