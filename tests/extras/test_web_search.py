"""With WEB_SEARCHES Claude can search the web in the middle of a reply."""

import re

import pytest

from tests.claude import Cited, Claude, Reply, Search, Tool
from tests.stage import (
    FASTER,
    SPEED,
    Stage,
    let_time_pass,
    read_all_settings,
    tools_of,
    turn_is_logged,
    turns_of,
    wait_until,
)


@pytest.fixture(scope="module")
def app(stage):
    with stage.other_app(WEB_SEARCHES="2") as app:
        yield app
        assert "Traceback" not in app.log()


@pytest.fixture(scope="module")
def faster(stage):
    with stage.other_app(module=FASTER, WEB_SEARCHES="2") as app:
        yield app
        assert "Traceback" not in app.log()


@pytest.fixture(scope="module")
def cannot_search():
    """A stage and an app whose key may not search the web."""
    with Claude() as claude:
        claude.searches = False
        stage = Stage(claude)
        with stage.other_app(WEB_SEARCHES="2") as app:
            yield stage, app
            assert "Traceback" not in app.log()


@pytest.fixture
def phone(strict_phone):
    return strict_phone


HERE = {"FromCity": "PORTLAND", "FromState": "OR", "FromCountry": "US", "FromZip": "97201"}
THERE = {"ToCity": "LONDON", "ToState": "", "ToCountry": "GB"}
OUTBOUND = {"Direction": "outbound-api", "From": "+15550009999", "To": "+15551230001"}


@pytest.mark.parametrize("params, where", [
    ({**HERE, **THERE}, {"city": "PORTLAND", "region": "OR", "country": "US"}),
    ({**HERE, **THERE, **OUTBOUND}, {"city": "LONDON", "country": "GB"}),
    ({"FromCity": "", "FromState": "", "FromCountry": "US"}, {"country": "US"}),
    ({"FromCity": "", "FromState": "", "FromCountry": ""}, None),
    ({}, None),
], ids=["a caller", "a person who is called", "only a country", "an empty place", "no place"])
def test_a_search_knows_where_the_caller_is(app, stage, claude, params, where):
    phone, refused = stage.phone(app, **params), len(claude.refused)
    phone.call()
    phone.say("Will it rain?")
    tool = tools_of(claude.asked("Will it rain?")[-1])["web_search"]
    location = tool.pop("user_location", None)
    assert tool == {"type": "web_search_20250305", "name": "web_search", "max_uses": 2}
    assert location == (where and {"type": "approximate", **where})
    assert len(claude.refused) == refused
    phone.hang_up()


def test_claude_can_search_only_if_the_owner_wants_it(phone, stage, claude):
    without = stage.phone()
    for each in without, phone:
        each.call()
        each.say("Can you search the web?")
    little, much = claude.asked("Can you search the web?")
    assert "web_search" not in tools_of(little)
    assert set(tools_of(much)) >= {"web_search", "clock", "hang_up"}


def test_the_reply_goes_on_after_a_search_that_paused(app, phone, claude):
    claude.when("What is the news?", Reply(
        "Let me look that up.",
        blocks=[Search("news")],
        stop="pause_turn",
        then=Reply("", blocks=[Search("news of today"), "It is good news, ", Cited("as I read.")]),
    ))
    phone.call()
    heard = phone.say("What is the news?")
    assert heard == "Let me look that up. It is good news, as I read."
    let_time_pass(app, 60, phone.call_sid)  # so that the caller has heard all of that
    assert phone.say("Thanks for the news.") == "You said: Thanks for the news."
    (request,) = claude.asked("Thanks for the news.")
    assert request.messages[1] == ("assistant", heard)


def test_a_search_that_pauses_for_ever_ends(phone, claude):
    def pause(request):
        return Reply("I look once more.", blocks=[Search("x")], stop="pause_turn", then=pause)

    claude.when("Search for ever.", pause(None))
    phone.call()
    assert phone.say("Search for ever.").startswith("I look once more.")
    assert phone.listens_to("speech")
    assert len(claude.asked("Search for ever.")) <= 8


def test_claude_talks_about_a_failed_search_and_may_use_a_tool_then(phone, claude):
    claude.when("What is on tonight?", Reply(
        "Let me look that up.",
        blocks=[Search("tonight", error="unavailable"), "I can't search.", Tool("clock")],
        then=Reply("It is late anyway."),
    ))
    phone.call()
    heard = phone.say("What is on tonight?")
    assert re.sub(r"\s", "", heard) == "Letmelookthatup.Ican'tsearch.Itislateanyway."


def test_what_was_found_goes_back_unchanged_when_a_tool_follows(phone, claude):
    # The pretend Claude refuses blocks that aren't what they were.
    claude.when("Is it open now?", Reply(
        "Let me look that up.",
        thinking=True,
        blocks=[Search("opening hours"), "It is open ", Cited("from nine to five."), Tool("clock")],
        then=Reply("So it is open."),
    ))
    phone.call()
    assert phone.say("Is it open now?").endswith("It is open from nine to five. So it is open.")


def a_long_search(app, stage, seconds):
    """The caller is told at once that Claude searches, and waits for what is found."""
    words = f"Who won yesterday? Search for {seconds} seconds."
    found = ["The blue team won, ", Cited("by one.")]
    stage.claude.when(words, Reply("Let me look that up.", blocks=[Search("who won", seconds), *found]))
    phone = stage.phone(app)
    phone.call()
    heard = phone.say(words)
    _, told, then = heard.partition("Let me look that up. ")
    assert told and then.startswith("One moment.") and then.endswith("The blue team won, by one.")
    (request,) = stage.claude.asked(words)
    first_heard = next(when for text, when, _ in phone.said if "look that up" in text)
    assert first_heard < wait_until(lambda: request.finished)
    phone.hang_up()
    assert phone.warnings == []


@pytest.mark.slow
def test_the_caller_hears_one_moment_during_a_long_search(faster, stage):
    a_long_search(faster, stage, seconds=12 / SPEED)


@pytest.mark.slow
def test_the_caller_hears_one_moment_during_a_search_of_nine_seconds(app, stage):
    a_long_search(app, stage, seconds=9)


# --- A key that can't search ----------------------------------------------------------------------


def test_a_key_that_cannot_search_is_used_again_without_the_search(cannot_search):
    stage, app = cannot_search
    phone, refused = stage.phone(app), len(stage.claude.refused)
    phone.call()
    assert phone.say("Who won?") == "You said: Who won?"
    assert len(stage.claude.refused) == refused + 1, "once"
    (request,) = stage.claude.asked("Who won?")
    assert "web_search" not in tools_of(request) and set(tools_of(request)) >= {"clock", "hang_up"}
    turn_is_logged(app, phone)
    lines = [line for line in app.log().splitlines() if phone.call_sid in line]
    assert len([line for line in lines if "search" in line]) == 1
    assert [reply.strip() for _, reply in turns_of(app, phone)] == ["You said: Who won?"]
    phone.hang_up()


def test_a_key_that_cannot_search_can_still_use_tools(cannot_search):
    stage, app = cannot_search
    stage.claude.when("How late is it?", Reply("Let me see.", blocks=[Tool("clock")], then=Reply("It is late.")))
    phone = stage.phone(app)
    phone.call()
    assert phone.say("How late is it?") == "Let me see. It is late."
    phone.hang_up()


# --- Settings -------------------------------------------------------------------------------------


def test_the_start_names_the_feature(app):
    assert "extras: web_search" in app.log()


@pytest.mark.parametrize("searches", ["many", "-1", "1.5"])
def test_a_number_of_searches_that_cannot_be_used_is_refused(searches):
    with pytest.raises(ValueError, match="^WEB_SEARCHES takes a whole number$"):
        read_all_settings({"WEB_SEARCHES": searches})


def test_no_searches_may_be_written_as_0():
    assert read_all_settings({"WEB_SEARCHES": "0"}).web_searches == 0
