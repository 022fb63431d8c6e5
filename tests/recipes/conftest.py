"""What is streamed to disk goes to a folder of the test."""

import pytest


@pytest.fixture(autouse=True)
def cache_of_datasets(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
