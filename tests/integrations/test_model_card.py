"""How a generated model card names the optimizer."""

import pytest
from transformers import PretrainedConfig, Trainer

from tests.integrations.test_transformers import arguments
from tests.toys import Net, Points


def card_line(trainer, tmp_path, key):
    trainer.model.config = PretrainedConfig()
    trainer.create_model_card(model_name="toy")
    (line,) = [line for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith(f"- {key}: ")]
    return line.removeprefix(f"- {key}: ")


@pytest.mark.parametrize(
    "optim, options, expected, lr",
    [
        (
            "momo_adam",
            {"learning_rate": 0.01, "adam_beta2": 0.99, "optim_args": "lb=0.5"},
            "MoMo-Adam (momo_hf) with step sizes up to 0.01, betas=(0.9, 0.99), eps=1e-08, weight_decay=0.0, lb=0.5",
            "0.01",
        ),
        (
            "momo",
            {"learning_rate": 0.1},
            "MoMo (momo_hf) with step sizes up to 0.1, weight_decay=0.0, beta=0.9",
            "0.1",
        ),
    ],
)
def test_the_model_card_names_the_optimizer(optim, options, expected, lr, tmp_path):
    args = arguments(tmp_path, optim=optim, lr_scheduler_type="linear", **options)
    trainer = Trainer(Net(), args, train_dataset=Points())
    trainer.train()
    line = card_line(trainer, tmp_path, "optimizer")
    assert line.startswith(expected) and "OptimizerNames" not in line and "params" not in line
    assert card_line(trainer, tmp_path, "learning_rate") == lr


@pytest.mark.parametrize("steps", [70, 10])
def test_the_model_card_says_that_the_cap_was_searched_for(steps, tmp_path):
    args = arguments(tmp_path, optim="momo_adam_auto", max_steps=steps)
    args.learning_rate = type(args).learning_rate
    trainer = Trainer(Net(), args, train_dataset=Points())
    trainer.train()
    search, line = trainer.optimizer.search, card_line(trainer, tmp_path, "optimizer")
    if steps == 70:
        found = f"step sizes up to {search.cap:g}, found by a search in the first {search.steps} steps, betas="
        assert card_line(trainer, tmp_path, "learning_rate") == str(search.cap)
    else:
        found = "step sizes that grow, in search of their bound, betas="
        assert card_line(trainer, tmp_path, "learning_rate") == "auto"
    assert line.startswith(f"MoMo-Adam (momo_hf) with {found}") and "averaging=0.7" in line


def test_the_model_card_of_another_optimizer_is_as_it_was(tmp_path):
    trainer = Trainer(Net(), arguments(tmp_path, optim="adamw_torch", learning_rate=1e-3), train_dataset=Points())
    trainer.train()
    assert "momo" not in card_line(trainer, tmp_path, "optimizer").lower()
