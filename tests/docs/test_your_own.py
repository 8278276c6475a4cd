"""A tool and an extra of your own, pasted as the documents say, work and break no test."""

import re
import subprocess
import sys

import pytest

from tests.claude import Reply, Tool
from tests.pages import Page
from tests.stage import copy_code

README, YOUR_OWN_EXTRA = Page("README.md"), Page("docs/your-own-extra.md")


def block_with(page, text):
    """The one block of a page that has this text in it."""
    (block,) = (block for block in page.blocks if text in block.text)
    return block.text


def paste_tool(folder):
    """Paste the README's tool where it says: above ``TOOLS``, and into the list."""
    path = folder / "conversation.py"
    code, list_ = path.read_text(), re.compile(r"(?m)^(TOOLS: list = \[.*)\]$")
    assert len(list_.findall(code)) == 1
    tool = block_with(README, "def opening_hours")
    path.write_text(list_.sub(lambda found: f"{tool}\n\n{found[1]}, opening_hours]", code))


def paste_extra(folder):
    """Save the example of an extra, and add it to the end of the list."""
    (folder / "extras/open_hours.py").write_text(block_with(YOUR_OWN_EXTRA, "def activate"))
    path = folder / "extras/__init__.py"
    code, line = path.read_text(), block_with(YOUR_OWN_EXTRA, '"open_hours": [')
    before, end, after = code.partition("\n}\n")
    path.write_text(f"{before}\n{line.rstrip()}{end}{after}")


def test_the_examples_work(stage, tmp_path):
    folder = copy_code(tmp_path)
    paste_tool(folder)
    paste_extra(folder)
    stage.claude.when("Open on Monday?", Reply("Let me see.", blocks=[Tool("opening_hours", {"day": "Monday"})]))
    with stage.other_app(folder=folder, OPEN_HOURS="0-24") as app:
        phone = stage.phone(app)
        phone.call()
        assert phone.say("Open on Monday?").endswith("The shop is open from nine to six.")
        assert "extras: open_hours" in app.log()
    assert len(block_with(YOUR_OWN_EXTRA, "def activate").splitlines()) <= 30


@pytest.mark.slow
def test_with_both_examples_and_their_tests_all_tests_pass(tmp_path):
    folder = copy_code(tmp_path, tests=True)
    paste_tool(folder)
    paste_extra(folder)
    (folder / "tests/test_my_tools.py").write_text(block_with(README, "def test_opening_hours"))
    (folder / "tests/extras/test_open_hours.py").write_text(block_with(YOUR_OWN_EXTRA, "def test_a_call_at_night"))
    ran = subprocess.run([sys.executable, "-m", "pytest", "-q"], cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-10_000:]
    assert re.search(r"\d+ passed", ran.stdout) and "skipped" not in ran.stdout


@pytest.mark.slow
def test_without_any_extra_the_tests_of_the_core_pass(tmp_path):
    folder = copy_code(tmp_path, tests=True)
    for name in "extras", "tests/extras":
        subprocess.run(["rm", "-r", folder / name], check=True)
    ran = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/core"], cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-10_000:]
