"""A fingerprint changes with the code, also with that of what is imported, and with nothing else."""

import pytest

from momo_hf.recipes.yardstick import source
from momo_hf.recipes.yardstick.source import fingerprint


HELPER = '''"""Words."""

def add(a, b):
    """More words."""
    return a + b
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "house_of_cards"
    (folder / "rooms").mkdir(parents=True)
    for path in (folder / "__init__.py", folder / "rooms" / "__init__.py"):
        path.touch()
    (folder / "rooms" / "helper.py").write_text(HELPER)
    (folder / "other.py").write_text("X = 1\n")
    (folder / "middle.py").write_text("def f():\n    from house_of_cards.rooms import helper\n    return helper.add\n")
    (tmp_path / "task.py").write_text("import os\nfrom house_of_cards.middle import f\n")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def changed(package, file, old, new):
    def now():
        for function in (source._tree, source._code, source._file_of):
            function.cache_clear()
        return fingerprint([package.parent / "task.py"], "house_of_cards")

    before = now()
    path = package / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    after = now()
    path.write_text(text)
    assert now() == before
    return before != after


def test_code_counts_and_words_do_not(package):
    assert changed(package, "../task.py", "import os", "import sys")
    assert changed(package, "middle.py", "helper.add", "helper.add, 1")
    assert changed(package, "rooms/helper.py", "a + b", "b + a")  # by way of an import in a function
    assert not changed(package, "rooms/helper.py", "More words.", "Other words.")
    assert not changed(package, "rooms/helper.py", "return a + b", "return (a +\n            b)  # so")
    assert not changed(package, "other.py", "X = 1", "X = 2")  # nobody imports it
