"""Each extra can be removed, and the phone line still answers. A feature that is switched on and missing stops the start."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from extras import EXTRAS
from tests.claude import Reply
from tests.phone import ROOT, App

SWITCHED_ON = {
    "postgres": {"DATABASE_URL": "postgres://claude:secret@127.0.0.1/calls"},
    "pin": {"PIN": "135790"},
    "memory": {"KEEP_DAYS": "3"},
    "languages": {"LANGUAGES": "en-US,de-DE"},
    "hand_over": {"HAND_OVER_TO": "+15557770000"},
    "web_search": {"WEB_SEARCHES": "2"},
    "think_ahead": {"THINK_AHEAD": "yes"},
}


@pytest.fixture
def copy(tmp_path):
    """A copy of the app, without its tests."""
    for name in ("app.py", "conversation.py", "store.py", "gunicorn.conf.py", "Procfile"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "extras", tmp_path / "extras", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def remove(extra, copy):
    """Delete the file of an extra, and its line in the list."""
    (copy / "extras" / f"{extra}.py").unlink()
    listing = copy / "extras/__init__.py"
    text, lines = re.subn(rf'(?m)^    "{extra}": .*\n', "", listing.read_text())
    assert lines == 1
    listing.write_text(text)


def make_a_call(stage, app):
    words = f"Who is there at {app.port}?"
    stage.claude.when(words, Reply("It is me. You are welcome here.", pace=60))
    phone = stage.phone(app)
    assert phone.call() == "Hello, this is Claude speaking!"
    assert phone.say(words) == "It is me. You are welcome here."
    assert phone.stay_silent() == "Are you still there?"
    assert phone.say("And now?") == "You said: And now?"
    phone.hang_up()
    assert phone.warnings == [] and "Traceback" not in app.log()


def test_without_the_folder_the_line_answers(stage, copy):
    shutil.rmtree(copy / "extras")
    with App(stage.settings(), folder=copy) as app:
        make_a_call(stage, app)
        assert "extras: none" in app.log()


@pytest.mark.parametrize("extra", EXTRAS)
def test_without_one_extra_the_line_answers(stage, copy, extra):
    remove(extra, copy)
    with App(stage.settings(), folder=copy) as app:
        make_a_call(stage, app)


def test_all_extras_work_together_without_any_one_of_them(stage, copy):
    settings = {name: value for extra in SWITCHED_ON for name, value in SWITCHED_ON[extra].items()
                if extra not in ("postgres", "pin", "web_search")}
    for extra in ("memory", "languages", "hand_over", "think_ahead"):
        shutil.copytree(ROOT / "extras", copy / "extras", dirs_exist_ok=True)
        remove(extra, copy)
        others = {name: value for name, value in settings.items() if name not in SWITCHED_ON[extra]}
        with App(stage.settings(**others), folder=copy) as app:
            make_a_call(stage, app)


def start_fails(folder, **settings):
    with pytest.raises(RuntimeError) as did_not_start:
        App(settings, folder=folder).start()
    printed = str(did_not_start.value)
    assert "Traceback" not in printed and "secret" not in printed and "135790" not in printed
    (why,) = re.findall("(?m)^Voice Claude can't start: (.*)$", printed)
    return why


@pytest.mark.parametrize("extra", SWITCHED_ON)
def test_a_feature_that_is_switched_on_and_missing_stops_the_start(copy, extra):
    (copy / "extras" / f"{extra}.py").unlink()
    (name,) = SWITCHED_ON[extra]
    assert start_fails(copy, **SWITCHED_ON[extra]) == f"{name} needs extras/{extra}.py, which is missing."


@pytest.mark.parametrize("extra", ["pin", "postgres"])
def test_a_lock_that_nobody_checks_and_a_database_that_nobody_knows_stop_the_start(copy, extra):
    remove(extra, copy)
    (name,) = SWITCHED_ON[extra]
    assert name in start_fails(copy, **SWITCHED_ON[extra])
    shutil.rmtree(copy / "extras")
    assert name in start_fails(copy, **SWITCHED_ON[extra])


@pytest.mark.parametrize("off", ["", "no", "0", " "])
def test_a_feature_that_is_off_is_not_imported(off):
    settings = dict.fromkeys(["PIN", "KEEP_DAYS", "LANGUAGES", "VOICES", "HAND_OVER_TO", "WEB_SEARCHES", "THINK_AHEAD"], off)
    program = "import app, sys; print(*sorted(name for name in sys.modules if name.startswith('extras.')))"
    environ = {"PATH": os.environ["PATH"], "DATABASE_URL": "sqlite:////tmp/none.db", **settings}
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environ, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["extras.commands"] and ran.stderr == ""


def test_the_start_names_the_active_extras_and_old_settings(stage):
    with stage.other_app(KEEP_DAYS="7", PIN="135790", LANGUAGE="en-GB", VOICE="Polly.Amy") as app:
        assert "extras: pin, memory (words kept for 7 days)" in app.log()
        assert "WARNING LANGUAGE is now called LANGUAGES" in app.log()
        assert "WARNING VOICE is now called VOICES" in app.log()
        assert "ALLOWED_CALLERS is not set" not in app.log(), "the PIN keeps strangers out"
    with stage.other_app(LANGUAGE="en_GB:en", ALLOWED_CALLERS="+15551230001") as app:
        assert "calls from 1 number, " in app.log()
        assert "LANGUAGES" not in app.log()
    with stage.other_app(LANGUAGE="de") as app:
        assert "LANGUAGES" not in app.log(), "a desktop has set this"


def test_each_extra_is_one_file_that_the_core_does_not_know():
    assert {path.stem for path in (ROOT / "extras").glob("*.py")} - {"__init__"} == set(EXTRAS)
    for name in ("conversation.py", "store.py"):
        assert not re.search(r"(?m)^\s*(from|import) (extras|app)\b", (ROOT / name).read_text())
    *_, start = (ROOT / "app.py").read_text().partition("# --- The start ---")
    assert re.findall(r"(?m)^\s*(?:from|import) extras", (ROOT / "app.py").read_text()) == re.findall(
        r"(?m)^\s*(?:from|import) extras", start)
