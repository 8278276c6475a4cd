"""What the owner of the line reads: at the start, in the log, and where a setting can't be right."""

import contextlib
import re
import sqlite3
import subprocess
import sys
import time

import pytest

from tests.claude import KEY
from tests.conftest import meanwhile, read, wait_until
from tests.phone import ROOT


def test_the_start_logs_one_line_on_what_runs(stage):
    (line,) = re.findall(r"INFO Voice Claude: (.*)", stage.app.log())
    assert line == (
        f"model claude-haiku-5-5, effort low, database sqlite:///{stage.app.database}, "
        "calls from everyone, 500 turns a call, 1000 a day, extras: none"
    )
    assert KEY not in stage.app.log()


@meanwhile
def test_an_open_line_is_warned_of(stage):
    with stage.other_app() as app:
        assert "WARNING ALLOWED_CALLERS is not set: whoever dials the number talks at your expense" in app.log()


@meanwhile
def test_a_closed_line_has_no_warning_and_says_how_many_may_call(stage):
    settings = dict(ALLOWED_CALLERS="+15551230001, +44 (0)20 7946 0958", LANGUAGE="en_GB:en", CLAUDE_EFFORT="none")
    with stage.other_app(**settings) as app:
        assert "effort none" in app.log() and "calls from 2 numbers" in app.log()
        assert "WARNING" not in app.log()
        friend = stage.phone(app, number="+442079460958")
        assert friend.call() == "Hello, this is Claude speaking!"
        assert b"language" not in friend.documents[-1], "a desktop's LANGUAGE is not the line's"
        stranger = stage.phone(app, number="+15559990002")
        stranger.call()
        stranger.hang_up()
        rejections = [line for line in app.log().splitlines() if stranger.call_sid in line and "rejected" in line]
        assert [line.split(": ")[1] for line in rejections] == ["...002 is not in ALLOWED_CALLERS"]
        assert "555999" not in app.log()


def test_a_call_has_a_line_for_its_beginning_and_its_end(stage, logged):
    phone = stage.phone(number="+15557654321")
    phone.call()
    phone.say("One.")
    phone.say("Two.")
    wait_until(lambda: f"call {phone.call_sid} turn 2: " in logged())
    phone.hang_up()
    assert f"INFO call {phone.call_sid} begins, with ...321" in logged()
    (tokens_in, tokens_out) = re.search(
        rf"INFO call {phone.call_sid} is over: 1 s, turns 2, tokens (\d+) in (\d+) out", logged()
    ).groups()
    turns = re.findall(rf"call {phone.call_sid} turn \d: .* tokens (\d+) in (\d+) out", logged())
    assert int(tokens_in) == sum(int(count) for count, _ in turns) > 0
    assert int(tokens_out) == sum(int(count) for _, count in turns) > 0
    assert "5557654321" not in logged()


@pytest.mark.parametrize("number", ["anonymous", "+266696687", "unknown", ""])
def test_a_withheld_number_is_called_that(stage, logged, number):
    phone = stage.phone(number=number)
    phone.call()
    assert f"call {phone.call_sid} begins, with a withheld number" in logged()


PASTED = [
    ("ANTHROPIC_API_KEY", '"sk-ant-x1234567"'), ("ANTHROPIC_API_KEY", "sk-ant-..."),
    ("ANTHROPIC_API_KEY", "ANTHROPIC_API_KEY=sk-ant-x1234567"), ("TWILIO_AUTH_TOKEN", "..."),
    ("TWILIO_AUTH_TOKEN", "'1234'"), ("TWILIO_AUTH_TOKEN", "TWILIO_AUTH_TOKEN=1234"),
    ("GREETING", '"Hello!"'), ("SYSTEM_PROMPT", "'Be brief.'"), ("ALLOWED_CALLERS", '"+15551234567"'),
    ("ALLOWED_CALLERS", "+5"), ("ALLOWED_CALLERS", "+155512345678901234"), ("ALLOWED_CALLERS", ", ,"),
    ("ALLOWED_CALLERS", "+15551234567 +15551234568"), ("ALLOWED_CALLERS", "+1555CLAUDE"),
    ("DATABASE_URL", "sqlite:///~/calls.db"), ("CLAUDE_EFFORT", '""'), ("PUBLIC_URL", "https://..."),
]


@pytest.mark.parametrize("name, value", PASTED)
def test_what_was_pasted_and_not_meant_is_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} takes ") as refused:
        read({name: value})
    assert value not in str(refused.value).replace("like +15551234567, separated by commas", "")


@pytest.mark.parametrize("written, number", [
    ("+44 (0)20 7946 0958", "+442079460958"), ("+1 (555) 123-4567", "+15551234567"),
    ("\u202a+1 555 123 0001\u202c", "+15551230001"), ("\u2068+15551234567\u2069", "+15551234567"),
    ("+1\u00a0555\u2011123\u20114567", "+15551234567"), ("+1\u2009555\u2212123\u20134567", "+15551234567"),
    ("\uff0b1 555 123 4567\ufeff", "+15551234567"), ("+1\u200b(555)\u3000123\u00ad4567", "+15551234567"),
    ("+49/30/123456", "+4930123456"), ("+33.1.23.45.67.89", "+33123456789"),
])
def test_numbers_are_understood_as_people_write_them(written, number):
    assert read({"ALLOWED_CALLERS": f"{written}, +15550001111"}).allowed_callers == {
        number, "+15550001111"
    }




@meanwhile
def test_a_path_that_cannot_be_opened_is_named(stage):
    with stage.other_app(DATABASE_URL="sqlite:////dev/null/calls.db") as app:
        phone = stage.phone(app)
        phone.call()
        assert phone.say("Hello?").startswith("Sorry")
        assert "ERROR the database failed: unable to open database file: /dev/null/calls.db" in app.log()


@meanwhile
def test_started_as_a_program_the_app_says_how_to_start_it(stage):
    ran = subprocess.run([sys.executable, "app.py"], cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == "Start Voice Claude with: gunicorn app:app\n"


OLD_TABLES = (
    "CREATE TABLE calls (call_sid TEXT PRIMARY KEY, touched DOUBLE PRECISION);"
    "CREATE TABLE turns (call_sid TEXT NOT NULL, turn INTEGER NOT NULL, delivery TEXT, words TEXT NOT NULL,"
    " reply TEXT NOT NULL DEFAULT '', stop TEXT, touched REAL NOT NULL, PRIMARY KEY (call_sid, turn));"
    "PRAGMA user_version = 1; INSERT INTO turns VALUES ('CA1', 1, 'a', 'Hi, I am Bo.', 'Hi Bo! ', 'end_turn', {});")


@pytest.mark.parametrize("minutes", [10, 130])
def test_a_file_of_another_version_is_replaced_unless_its_words_are_kept(stage, tmp_path, minutes):
    path = tmp_path / "calls.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(OLD_TABLES.format(time.time() - 60 * minutes))
    before = path.read_bytes()
    app = stage.other_app(DATABASE_URL=f"sqlite:///{path}")
    if minutes < 120:
        with app:
            phone = stage.phone(app, CallSid="CA1")
            phone.call()
            assert phone.say("And now?") == "You said: And now?"
        return
    with pytest.raises(RuntimeError, match="Voice Claude can't start: .* holds words that another version"):
        app.start()
    assert path.read_bytes() == before
