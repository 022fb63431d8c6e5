"""What is streamed to disk goes to a folder of the test, and bars show, whatever a test before has turned off."""

import pytest
from datasets import enable_progress_bars


@pytest.fixture(autouse=True)
def as_in_a_new_process(tmp_path_factory, monkeypatch):
    enable_progress_bars()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
