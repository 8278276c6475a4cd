"""Each extra can be removed, and the line answers. A feature that is switched on and missing stops the start."""

import re
import shutil

import pytest

from extras import EXTRAS
from tests.claude import Reply
from tests.stage import HELLO, ROOT, copy_code, start_fails

# What a setting may be, if "yes" won't do.
VALUES = {
    "DATABASE_URL": "postgres://claude:secret@127.0.0.1/calls",
    "PIN": "135790",
    "KEEP_DAYS": "3",
    "LANGUAGES": "en-US,de-DE",
    "VOICES": "Polly.Joanna,Polly.Vicki",
    "HAND_OVER_TO": "+15557770000",
    "WEB_SEARCHES": "2",
    "THINK_AHEAD": "yes",
}
SHIPPED = [name for name in EXTRAS if set(EXTRAS[name]) <= set(VALUES)]  # an owner may have added others
SWITCHED = [name for name in EXTRAS if EXTRAS[name]]  # those that a setting switches on


def settings_of(names):
    """The settings that switch these extras on."""
    return {setting: VALUES.get(setting, "yes") for name in names for setting in EXTRAS[name]}


def slow_but_one(values):
    """Parameters: one value for the quick group, and the others for the slow one."""
    return [pytest.param(value, marks=[pytest.mark.slow] if number else []) for number, value in enumerate(values)]


@pytest.fixture
def copy(tmp_path):
    """A copy of the app, without its tests."""
    return copy_code(tmp_path)


def remove(extra, copy):
    """Delete the file of an extra, and its line in the list."""
    (copy / "extras" / f"{extra}.py").unlink(missing_ok=True)
    listing = copy / "extras/__init__.py"
    text, lines = re.subn(rf'(?m)^    "{extra}": .*\n', "", listing.read_text())
    assert lines == (extra in EXTRAS)
    listing.write_text(text)


def make_a_call(stage, app):
    """A call that needs most of what the core does."""
    words = f"Who is there at {app.port}?"
    stage.claude.when(words, Reply("It is me. You are welcome here.", pace=100))
    phone = stage.phone(app)
    assert phone.call() == HELLO
    assert phone.say(words) == "It is me. You are welcome here."
    assert phone.stay_silent() == "Are you still there?"
    assert phone.say("And now?") == "You said: And now?"
    phone.hang_up()
    assert phone.warnings == [] and "Traceback" not in app.log()


def active_extras(app):
    """What the start says of extras."""
    return re.search("(?m)^.*extras: (.*)$", app.log())[1]


# --- Removed --------------------------------------------------------------------------------------


def test_without_the_folder_the_line_answers(stage, copy):
    shutil.rmtree(copy / "extras")
    with stage.other_app(folder=copy) as app:
        make_a_call(stage, app)
        assert active_extras(app) == "none"


@pytest.mark.parametrize("extra", slow_but_one(EXTRAS))
def test_without_one_extra_the_line_answers(stage, copy, extra):
    remove(extra, copy)
    with stage.other_app(folder=copy) as app:
        make_a_call(stage, app)


# Postgres needs a server, the line greets nobody before the PIN, and web_search turns think_ahead off.
TOGETHER = [name for name in SHIPPED if name not in ("postgres", "pin", "web_search")]


@pytest.mark.parametrize("extra", slow_but_one(TOGETHER))
def test_all_others_work_together_without_one(stage, copy, extra):
    remove(extra, copy)
    others = [name for name in TOGETHER if name != extra]
    with stage.other_app(folder=copy, **settings_of(others)) as app:
        make_a_call(stage, app)


@pytest.mark.slow
def test_all_extras_work_together(stage):
    with stage.other_app(**settings_of(TOGETHER)) as app:
        make_a_call(stage, app)


# --- Switched on and missing ----------------------------------------------------------------------


@pytest.mark.parametrize("extra", slow_but_one(SWITCHED))
def test_a_feature_that_is_switched_on_and_missing_stops_the_start(stage, copy, extra):
    (copy / "extras" / f"{extra}.py").unlink()
    setting = EXTRAS[extra][0]
    why = start_fails(stage.other_app(folder=copy, **settings_of([extra])))
    assert why == f"{setting} needs extras/{extra}.py, which is missing."


@pytest.mark.parametrize("folder", ["one extra less", "no folder"])
@pytest.mark.parametrize("extra, setting", [("pin", "PIN"), ("postgres", "DATABASE_URL")])
def test_a_pin_and_a_database_that_nothing_knows_any_more_stop_the_start(stage, copy, extra, setting, folder):
    if folder == "no folder":
        shutil.rmtree(copy / "extras")
    else:
        remove(extra, copy)
    app = stage.other_app(folder=copy, **{setting: VALUES[setting]})
    with pytest.raises(RuntimeError) as did_not_start, app:
        pass
    printed = str(did_not_start.value)
    assert re.search(f"(?m)^Voice Claude can't start: {setting} .*$", printed)
    assert "Traceback" not in printed and "secret" not in printed and VALUES["PIN"] not in printed


# --- Switched on and off --------------------------------------------------------------------------


def test_the_start_names_the_active_extras_in_their_order(stage):
    names = [name for name in SHIPPED if EXTRAS[name] and name != "postgres"]
    with stage.other_app(**settings_of(names)) as app:
        found = re.findall(r"(?:^|, )(\w+)(?: \([^)]*\))?", active_extras(app))
        assert found == names


@pytest.mark.parametrize("off", slow_but_one(["no", "0", "", " "]))
def test_a_feature_that_is_off_is_not_imported(stage, copy, off):
    (copy / "telling.py").write_text(
        "import sys\nfrom app import app\n"
        "print('imported:', *sorted(name for name in sys.modules if name.startswith('extras.')), '.', flush=True)\n"
    )
    settings = {setting: off for name in EXTRAS for setting in EXTRAS[name] if setting != "DATABASE_URL"}
    with stage.other_app(folder=copy, module="telling:app", **settings) as app:
        assert active_extras(app) == "none"
        (imported,) = re.findall(r"(?m)^imported: (.*) ?\.$", app.log())
        assert imported.split() == sorted(f"extras.{name}" for name in EXTRAS if not EXTRAS[name])


def test_each_extra_is_one_file_that_the_core_does_not_know():
    files = {path.stem for path in (ROOT / "extras").glob("*.py")} - {"__init__"}
    assert files == set(EXTRAS)
    for name in "conversation.py", "store.py":
        assert not re.search(r"(?m)^\s*(from|import) (extras|app)\b", (ROOT / name).read_text())
    before, _, start = (ROOT / "app.py").read_text().partition("# --- The start ---")
    assert start and not re.search(r"(?m)^\s*(from|import) extras\b", before)
