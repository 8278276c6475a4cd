"""The settings: their values and defaults, and what the start refuses."""

import contextlib
import time

import pytest

from tests.forked import Forked
from tests.stage import ROOT, names_of_settings, read_all_settings, start_fails

# --- Values and defaults --------------------------------------------------------------------------


def test_model_effort_prompt_and_greeting_are_settings(stage, claude):
    settings = {
        "CLAUDE_MODEL": "claude-haiku-4-5", "CLAUDE_EFFORT": "none",
        "SYSTEM_PROMPT": "Be a pirate.", "GREETING": "Ahoy!",
    }
    with stage.other_app(**settings) as app:
        phone = stage.phone(app)
        assert phone.call() == "Ahoy!"
        assert phone.say("Which model are you?") == "You said: Which model are you?"
        body = claude.asked("Which model are you?")[0].body
        assert (body["model"], body["system"]) == ("claude-haiku-4-5", "Be a pirate.")
        assert "output_config" not in body


@pytest.mark.parametrize("empty", ["", " "], ids=["empty", "blank"])
def test_an_empty_value_is_the_default(empty):
    defaults = read_all_settings({})
    assert vars(read_all_settings(dict.fromkeys(names_of_settings(), empty))) == vars(defaults)
    assert (defaults.claude_effort, defaults.max_turns) == ("low", 100)


def test_a_value_may_have_white_space_around_it():
    settings = read_all_settings({"ANTHROPIC_API_KEY": "sk-ant-pretend\n", "GREETING": " Ahoy! ", "MAX_TURNS": "7 "})
    assert (settings.anthropic_api_key, settings.greeting, settings.max_turns) == ("sk-ant-pretend", "Ahoy!", 7)


@pytest.mark.parametrize("written, number", [
    ("+44 (0)20 7946 0958", "+442079460958"), ("+1 (555) 123-4567", "+15551234567"),
    ("\u202a+1 555 123 0001\u202c", "+15551230001"), ("\u2068+15551234567\u2069", "+15551234567"),
    ("+1\u00a0555\u2011123\u20114567", "+15551234567"), ("+1\u2009555\u2212123\u20134567", "+15551234567"),
    ("\uff0b1 555 123 4567\ufeff", "+15551234567"), ("+1\u200b(555)\u3000123\u00ad4567", "+15551234567"),
    ("+49/30/123456", "+4930123456"), ("+33.1.23.45.67.89", "+33123456789"),
], ids=ascii)
def test_numbers_are_understood_as_people_write_them(written, number):
    settings = read_all_settings({"ALLOWED_CALLERS": f"{written}, +15550001111"})
    assert settings.allowed_callers == {number, "+15550001111"}


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting, value, takes", [
    ("MAX_TURNS", "lots", "a whole number"), ("MAX_TURNS", "0", "a whole number"),
    ("MAX_TURNS", "-1", "a whole number"),
    ("DATABASE_URL", "sqlite://", "sqlite:///"), ("DATABASE_URL", "sqlite:///:memory:", "a file"),
    ("DATABASE_URL", "sqlite:///calls.db?mode=ro", "a file"), ("PUBLIC_URL", "my-line.example.com", "https://"),
    ("PUBLIC_URL", "https://[", "https://"), ("PUBLIC_URL", "https://me:secret@host", "https://"),
    ("ALLOWED_CALLERS", "+ ,", "+15551234567"), ("ALLOWED_CALLERS", "alice", "+15551234567"),
    ("ALLOWED_CALLERS", "15551234567", "+15551234567"), ("GREETING", "\U0001f44b", "words"),
    ("CLAUDE_EFFORT", "maximum", "low, medium"), ("CLAUDE_MODEL", "two words", "model"),
    ("ANTHROPIC_API_KEY", "sk ant secret", "key"),
])
def test_an_unusable_value_is_refused_with_what_the_setting_takes(setting, value, takes):
    with pytest.raises(ValueError, match=f"^{setting} takes ") as refused:
        read_all_settings({setting: value})
    assert takes in str(refused.value) and "secret" not in str(refused.value)


@pytest.mark.parametrize("setting, value", [
    ("ANTHROPIC_API_KEY", '"sk-ant-x1234567"'), ("ANTHROPIC_API_KEY", "sk-ant-..."),
    ("ANTHROPIC_API_KEY", "ANTHROPIC_API_KEY=sk-ant-x1234567"), ("TWILIO_AUTH_TOKEN", "..."),
    ("TWILIO_AUTH_TOKEN", "'1234'"), ("TWILIO_AUTH_TOKEN", "TWILIO_AUTH_TOKEN=1234"),
    ("GREETING", '"Hello!"'), ("SYSTEM_PROMPT", "'Be brief.'"), ("ALLOWED_CALLERS", '"+15551234567"'),
    ("ALLOWED_CALLERS", "+5"), ("ALLOWED_CALLERS", "+155512345678901234"), ("ALLOWED_CALLERS", ", ,"),
    ("ALLOWED_CALLERS", "+15551234567 +15551234568"), ("ALLOWED_CALLERS", "+1555CLAUDE"),
    ("DATABASE_URL", "sqlite:///~/calls.db"), ("CLAUDE_EFFORT", '""'), ("PUBLIC_URL", "https://..."),
])
def test_a_value_pasted_by_mistake_is_refused_and_not_repeated(setting, value):
    with pytest.raises(ValueError, match=f"^{setting} takes ") as refused:
        read_all_settings({setting: value})
    assert value not in str(refused.value).replace("like +15551234567, separated by commas", "")


NUMBERS = ",".join(f"+1 (555) 123-{number:04}" for number in range(24)) + ",x"


@pytest.mark.parametrize("setting", names_of_settings())
@pytest.mark.parametrize(
    "value", [NUMBERS, "a" * 60000 + "!", "1" * 60000 + "!", "en-" * 20000, "(0)" * 20000 + "!"],
    ids=["numbers", "letters", "digits", "languages", "zeros"],
)
def test_no_value_takes_long_to_refuse(setting, value):
    # Processor time, which other programs don't use up; a pattern that backtracks takes many seconds.
    began = time.thread_time()
    with contextlib.suppress(ValueError):
        read_all_settings({setting: value})
    assert time.thread_time() - began < 0.5


def test_an_unusable_value_stops_the_start_with_one_line(stage):
    assert start_fails(stage.other_app(MAX_TURNS="lots")) == "MAX_TURNS takes a whole number, 1 or more."


def test_the_line_that_stops_the_start_holds_no_secret(stage):
    why = start_fails(stage.other_app(DATABASE_URL="sqlite://u:secret@h/d"))
    assert why.startswith("DATABASE_URL takes sqlite:///") and "secret" not in why


def test_started_as_a_program_the_app_says_how_to_start_it(tmp_path):
    process = Forked(["app"], cwd=ROOT, env={}, log=tmp_path / "printed")
    assert process.wait(60) == 1
    assert (tmp_path / "printed").read_text() == "Start Voice Claude with: gunicorn app:app\n"
