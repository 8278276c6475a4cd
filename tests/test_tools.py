"""What Claude can do in a call: tools, one's own among them, the clock, and a look into the web."""

import concurrent.futures
import contextlib
import datetime
import os
import pathlib
import re
import signal
import sqlite3
import tempfile
import zoneinfo

import pytest

from conversation import STALLED
from tests.claude import Cited, Reply, Search, Thinking, Tool
from tests.conftest import is_part_of, meanwhile, wait_until

SORRY = "Sorry, something went wrong at my end. Could you say that again?"


def tools_of(request):
    """The tools that Claude was offered, by name."""
    return {tool["name"]: tool for tool in request.body.get("tools", [])}


def lines_of(app, phone):
    """What the log says of this call's tools, like "turn 1: tool clock 3 ms, ok"."""
    return re.findall(rf"call {phone.call_sid} (turn \d+: tool .*)", app.log())


def rows(app, phone):
    """The turns of a call, as they are kept: (words, reply) pairs."""
    with contextlib.closing(sqlite3.connect(app.database)) as database:
        return database.execute(
            "SELECT words, reply FROM turns WHERE call_sid = ? ORDER BY turn", [phone.call_sid]
        ).fetchall()


def is_over(app, phone, turn=1):
    """Wait until the log says that this turn has been written to its end."""
    wait_until(lambda: re.search(rf"call {phone.call_sid} turn {turn}: first sentence", app.log()))


@pytest.fixture
def file(tmp_path):
    """A file that isn't there yet: the tool wait_for waits for it."""
    return tmp_path / "here"


# --- The loop -------------------------------------------------------------------------------------


def test_what_is_said_before_a_tool_is_heard_while_the_tool_runs(able, able_phone, claude, file):
    claude.when("Is anyone at the door?", Reply(
        "Let me look at the door.",
        blocks=[Tool("wait_for", {"file": str(file)})],
        then=lambda request: Reply(f"I have looked: {request.results[0][0]}."),
    ))
    able_phone.call()
    able_phone.on_hearing = lambda text: file.touch()  # so the tool ends only after that
    heard = able_phone.say("Is anyone at the door?")
    assert heard == "Let me look at the door. I have looked: somebody came."
    ((words, reply),) = rows(able, able_phone)
    assert (words, reply.strip()) == ("Is anyone at the door?", heard), "one turn, and one row"


def test_several_tools_in_one_message(phone, claude):
    claude.when("How late is it here and there?", Reply(
        "I look at two clocks.",
        blocks=[
            Tool("clock", {"time_zone": "Pacific/Kiritimati"}),
            Tool("clock", {"time_zone": "Pacific/Pago_Pago"}),
            Tool("clock"),
        ],
        then=Reply("It is late everywhere."),
    ))
    phone.call()
    heard = phone.say("How late is it here and there?")
    assert heard == "I look at two clocks. It is late everywhere."
    _, second = claude.asked("How late is it here and there?")
    assert [failed for _, failed in second.results] == [False] * 3
    assert len({words for words, _ in second.results}) >= 2, "each has its own result"


def test_several_rounds_are_one_turn_and_go_back_unchanged(able, able_phone, claude):
    # The pretend Claude refuses a turn in which a block isn't what it was.
    third = Reply("And it is a nice one.")
    second = Reply(
        blocks=[Tool("bus_times", {"stop": "Station", "how_many": 2})], thinking=True, then=third
    )
    claude.when("How do I get home?", Reply(
        "Let me see.",
        thinking=True,
        blocks=[Thinking("Hm."), "Home it is.", Tool("bus_times", {"stop": "Mill *Lane*, 2 < 3"})],
        then=second,
    ))
    able_phone.call()
    heard = able_phone.say("How do I get home?")
    assert re.sub(r"\s+", "", heard) == "Letmesee.Homeitis.Anditisaniceone."
    results = [request.results for request in claude.asked("How do I get home?")]
    assert results == [
        [],
        [("From Mill *Lane*, 2 < 3: in 5 minutes", False)],
        [("From Station: in 5 minutes, in 10 minutes", False)],
    ]
    assert able_phone.say("Thanks for the bus.") == "You said: Thanks for the bus."
    (request,) = claude.asked("Thanks for the bus.")
    kinds = {type(message["content"]) for message in request.body["messages"]}
    assert kinds == {str}, "an earlier turn goes back as plain text"
    assert all(is_part_of(words, heard) for role, words in request.messages if role == "assistant")


def test_after_six_rounds_the_reply_ends_in_words(phone, stage, claude):
    def again(request):
        return Reply("Let me look once more.", blocks=[Tool("clock")], then=again)

    claude.when("Watch the clock.", again(None))
    phone.call()
    heard = phone.say("Watch the clock.")
    requests = claude.asked("Watch the clock.")
    choices = [request.body.get("tool_choice", {}).get("type") for request in requests]
    assert len(requests) == 7 and choices[-1] == "none" and "none" not in choices[:-1]
    assert heard == " ".join(["Let me look once more."] * 7)
    assert phone.listens_to("speech")
    assert len(lines_of(stage.app, phone)) == 6


@pytest.mark.parametrize("tool, line", [
    (Tool("fail", {"error": "ValueError"}), "fail {} ms, ValueError"),
    (Tool("fail", {"error": "KeyError"}), "fail {} ms, KeyError"),
    (Tool("fail", {"error": "SystemExit"}), "fail {} ms, SystemExit"),
    (Tool("bus_times", {}), "bus_times"),
    (Tool("bus_times", {"stop": "Station", "how_many": "many"}), "bus_times"),
    (Tool("bus_times", {"stop": "Station", "colour": "red"}), None),
    (Tool("bus_times", json='{"stop": "Sta'), "bus_times"),
    (Tool("order_pizza", {"size": "large"}), "order_pizza"),
])
def test_a_tool_that_fails_is_talked_about(able, able_phone, claude, tool, line):
    claude.when("Do what you can't.", Reply(
        "I try that.",
        blocks=[tool, Tool("bus_times", {"stop": "A"})],
        then=Reply("It didn't work."),
    ))
    able_phone.call()
    assert able_phone.say("Do what you can't.") == "I try that. It didn't work."
    failed, worked = claude.asked("Do what you can't.")[-1].results
    assert worked == ("From A: in 5 minutes", False)
    lines = lines_of(able, able_phone)
    assert len(lines) == 2 and re.fullmatch(r"turn 1: tool bus_times \d+ ms, ok", lines[1])
    if line:  # whether too much of an input is an error is pydantic's choice
        assert failed[1] and failed[0].strip()
        assert re.match("turn 1: tool " + line.replace("{}", r"\d+"), lines[0])
        assert not lines[0].endswith("ok")
    assert "a secret" not in able.log() and "Station" not in able.log()


def test_what_claude_says_and_a_tool_that_ends_the_call(phone, claude):
    claude.when("Bye, and how late is it?", Reply(
        "It is late. Goodbye then!",
        blocks=[Tool("clock"), Tool("hang_up")],
        then=Reply("Too late."),
    ))
    phone.call()
    assert phone.say("Bye, and how late is it?") == "It is late. Goodbye then!"
    assert phone.ended == "hangup"
    assert len(claude.asked("Bye, and how late is it?")) == 1


def test_a_goodbye_may_come_in_a_later_round(phone, claude):
    claude.when("One look at the clock, and bye.", Reply(
        "One look.", blocks=[Tool("clock")], then=Reply("It is late. Goodbye!", hang_up=True)
    ))
    phone.call()
    assert phone.say("One look at the clock, and bye.") == "One look. It is late. Goodbye!"
    assert phone.ended == "hangup"


def test_after_a_tool_claude_may_have_nothing_to_say(phone, claude):
    claude.when("Just look at it.", Reply("", blocks=[Tool("clock")], then=Reply("")))
    phone.call()
    assert phone.say("Just look at it.").startswith("I don't know what to say to that.")


def test_a_second_delivery_runs_no_tool_twice(able, able_phone, claude, file):
    claude.when("Who is at the gate?", Reply(
        "I look at the gate.",
        blocks=[Tool("wait_for", {"file": str(file)})],
        then=Reply("It is you."),
    ))
    able_phone.call()
    words = {**able_phone.params, "SpeechResult": "Who is at the gate?"}
    for _ in range(2):  # both come back with the first sentence, while the tool runs
        answer = able_phone.request("POST", able_phone.gather["action"], words, token="the same")
        assert b"I look at the gate." in answer.body
    file.touch()
    heard = able_phone.say("Who is at the gate?", token="the same")
    assert heard == "I look at the gate. It is you."
    assert len(lines_of(able, able_phone)) == 1 and len(rows(able, able_phone)) == 1
    assert len(claude.asked("Who is at the gate?")) == 2


def test_whoever_hangs_up_while_a_tool_runs_is_not_talked_to(able, able_phone, claude, file):
    claude.when("Look for me.", Reply(
        "I look for you.", blocks=[Tool("wait_for", {"file": str(file)})], then=Reply("Found.")
    ))
    able_phone.call()
    able_phone.on_hearing = lambda text: able_phone.hang_up()
    assert able_phone.say("Look for me.") == "I look for you."
    is_over(able, able_phone)
    file.touch()
    assert len(claude.asked("Look for me.")) == 1 and rows(able, able_phone) == [("", "")]


def test_whoever_goes_on_while_a_tool_runs_is_answered(able, able_phone, claude, file):
    claude.when("Look slowly.", Reply(
        "I look slowly.", blocks=[Tool("wait_for", {"file": str(file)})], then=Reply("Found.")
    ))
    able_phone.call()
    # As after a fallback of Twilio's: the reply isn't fetched any more, and the caller speaks.
    able_phone.request(
        "POST", "/talking", {**able_phone.params, "SpeechResult": "Look slowly."}, token="a token"
    )
    assert able_phone.say("Never mind.") == "You said: Never mind."
    file.touch()
    is_over(able, able_phone)
    assert [reply.strip() for _, reply in rows(able, able_phone)] == [
        "I look slowly.", "You said: Never mind."
    ]


@meanwhile
def test_what_takes_long_is_given_up_or_waited_for(stage):
    """Three calls at once: a tool is too slow, a search takes long, and a process is killed."""
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        # With --preload the process that comes after a killed one need not import everything.
        app = stack.enter_context(stage.able_app(folder, "--preload"))
        with concurrent.futures.ThreadPoolExecutor() as together:
            for call in together.map(lambda call: call(stage, app), [a_slow_tool, a_long_search]):
                assert call is None
        kill_9_while_a_tool_runs(stage, app)


def a_slow_tool(stage, app):
    stage.claude.when("Wait for Godot.", Reply(
        "I wait for him.",
        blocks=[
            Tool("wait_for", {"file": "/godot", "seconds": 50}), Tool("bus_times", {"stop": "A"})
        ],
        then=Reply("He didn't come."),
    ))
    phone = stage.phone(app)
    phone.call()
    heard = phone.say("Wait for Godot.")
    assert heard.startswith("I wait for him. One moment.") and heard.endswith("He didn't come.")
    _, second = stage.claude.asked("Wait for Godot.")
    (words, failed), worked = second.results
    assert failed and words and worked == ("From A: in 5 minutes", False)
    assert second.at - stage.claude.asked("Wait for Godot.")[0].at < 45
    slow, quick = lines_of(app, phone)
    assert re.fullmatch(r"turn 1: tool wait_for 2\d{4} ms, too slow", slow)
    assert quick.endswith("ok")
    assert max(seconds for _, _, seconds, _ in phone.webhooks) < 10
    assert phone.say("Thank you all the same.") == "You said: Thank you all the same."


def a_long_search(stage, app):
    stage.claude.when("Who won yesterday?", Reply(
        "Let me look that up.",
        blocks=[Search("who won yesterday", seconds=9), "The blue team won, ", Cited("by one.")],
    ))
    phone = stage.phone(app)
    phone.call()
    heard = phone.say("Who won yesterday?")
    assert heard.startswith("Let me look that up. One moment.")
    assert heard.endswith("The blue team won, by one.")
    (request,) = stage.claude.asked("Who won yesterday?")
    first_heard = next(when for text, when, _ in phone.said if "look that up" in text)
    assert first_heard < wait_until(lambda: request.finished)


def kill_9_while_a_tool_runs(stage, app):
    stage.claude.when("Wait for the end.", Reply(
        "I wait for it.", blocks=[Tool("wait_for", {"file": "/the end"})], then=Reply("Never said.")
    ))
    phone = stage.phone(app)
    phone.call()
    kills = [lambda: os.kill(*app.workers(), signal.SIGKILL)]
    phone.on_hearing = lambda text: kills and kills.pop()()
    heard = phone.say("Wait for the end.")
    assert heard.startswith("I wait for it.") and heard.endswith(SORRY)
    assert phone.say("Are you back?") == "You said: Are you back?"
    assert len(stage.claude.asked("Wait for the end.")) == 1, "the tool doesn't run again"
    (request,) = stage.claude.asked("Are you back?")
    assert [words for _, words in request.messages] == [
        "Wait for the end.", "I wait for it.", "Are you back?"
    ]


# --- What is offered, and the clock ---------------------------------------------------------------


def test_what_is_offered_is_what_the_owner_has_switched_on(phone, able_phone, claude):
    phone.call()
    phone.say("What can you do?")
    able_phone.call()
    able_phone.say("What can you do?")
    little, much = claude.asked("What can you do?")[-2:]
    assert set(tools_of(little)) == {"clock", "hang_up"}
    own = {"bus_times", "buses_in_town", "fail", "wait_for"}
    everything = {"clock", "hang_up", "switch_language", "hand_over", "web_search"}
    assert set(tools_of(much)) == everything | own
    for tool in tools_of(little).values():
        assert tool["description"].strip()
    assert "system" in little.body and "tool_choice" not in little.body


def test_a_tool_of_ones_own_needs_only_a_docstring_and_annotations(able_phone, claude):
    claude.when("When is my bus?", Reply(
        "I ask the station.",
        blocks=[Tool("bus_times", {"stop": "Station", "how_many": 3}), Tool("buses_in_town")],
    ))
    able_phone.call()
    assert able_phone.say("When is my bus?") == (
        "I ask the station. The tools say: "
        "From Station: in 5 minutes, in 10 minutes, in 15 minutes 40"
    )
    tool = tools_of(claude.asked("When is my bus?")[0])["bus_times"]
    assert "When the next buses leave." in tool["description"]
    schema = tool["input_schema"]
    assert schema["required"] == ["stop"]
    assert schema["properties"]["stop"]["description"] == "the name of the stop."
    assert schema["properties"]["how_many"]["type"] == "integer"


@pytest.mark.parametrize("time_zone", ["Pacific/Kiritimati", "Pacific/Pago_Pago", ""])
def test_the_clock_tells_weekday_date_and_time(phone, claude, time_zone):
    question = f"What day is it today in {time_zone or 'this place'}?"
    given = {"time_zone": time_zone} if time_zone else {}
    claude.when(question, Reply("Let me see.", blocks=[Tool("clock", given)]))
    zone = zoneinfo.ZoneInfo(time_zone) if time_zone else None
    phone.call()
    # From the first zone to the second one it is 25 hours, so no hour and no day is the same.
    possible = [datetime.datetime.now(zone)]
    phone.say(question)
    possible.append(datetime.datetime.now(zone))
    ((words, failed),) = claude.asked(question)[-1].results
    assert not failed
    assert any(now.strftime("%A") in words and str(now.year) in words for now in possible)
    assert any(re.search(rf"\b0?{now.day}\b", words) for now in possible)
    assert any(
        re.search(rf"\b0?({now.hour}|{now.hour % 12 or 12}):{now.minute:02}\b", words)
        for now in possible
    )


@pytest.mark.parametrize("time_zone", ["Mars/Olympus", "../../etc/passwd", "America", "x" * 5000])
def test_an_unknown_time_zone_is_an_error_that_claude_hears_of(phone, stage, claude, time_zone):
    claude.when("And over there?", Reply(
        "Let me see.",
        blocks=[Tool("clock", {"time_zone": time_zone})],
        then=Reply("Where is that?"),
    ))
    phone.call()
    assert phone.say("And over there?") == "Let me see. Where is that?"
    ((words, failed),) = claude.asked("And over there?")[-1].results
    assert failed and words.strip()
    (line,) = lines_of(stage.app, phone)
    assert line.startswith("turn 1: tool clock") and not line.endswith("ok")
    assert time_zone not in line


# --- The web --------------------------------------------------------------------------------------


HERE = {"FromCity": "PORTLAND", "FromState": "OR", "FromCountry": "US", "FromZip": "97201"}
THERE = {"ToCity": "LONDON", "ToState": "", "ToCountry": "GB"}
OUTBOUND = {"Direction": "outbound-api", "From": "+15550009999", "To": "+15551230001"}


@pytest.mark.parametrize("params, where", [
    ({**HERE, **THERE}, {"city": "PORTLAND", "region": "OR", "country": "US"}),
    ({**HERE, **THERE, **OUTBOUND}, {"city": "LONDON", "country": "GB"}),
    ({"FromCity": "", "FromState": "", "FromCountry": "US"}, {"country": "US"}),
    ({"FromCity": "", "FromState": "", "FromCountry": ""}, None),
    ({}, None),
])
def test_a_search_knows_where_the_caller_is(able, stage, claude, params, where):
    phone, refused = stage.phone(able, **params), len(claude.refused)
    phone.call()
    phone.say("Will it rain?")
    tool = tools_of(claude.asked("Will it rain?")[-1])["web_search"]
    location = tool.pop("user_location", None)
    assert tool == {"type": "web_search_20250305", "name": "web_search", "max_uses": 2}
    assert location == (where and {"type": "approximate", **where})
    assert len(claude.refused) == refused


def test_a_search_that_pauses_goes_on(able_phone, claude):
    claude.when("What is the news?", Reply(
        "Let me look that up.",
        blocks=[Search("news")],
        stop="pause_turn",
        then=Reply("", blocks=[Search("news of today"), "It is good news, ", Cited("as I read.")]),
    ))
    able_phone.call()
    heard = able_phone.say("What is the news?")
    assert heard == "Let me look that up. It is good news, as I read."
    assert able_phone.say("Thanks for the news.") == "You said: Thanks for the news."
    (request,) = claude.asked("Thanks for the news.")
    assert all(is_part_of(words, heard) for role, words in request.messages if role == "assistant")


def test_a_search_that_pauses_for_ever_ends(able_phone, claude):
    def pause(request):
        return Reply("I look once more.", blocks=[Search("x")], stop="pause_turn", then=pause)

    claude.when("Search for ever.", pause(None))
    able_phone.call()
    assert able_phone.say("Search for ever.").startswith("I look once more.")
    assert able_phone.listens_to("speech")
    assert len(claude.asked("Search for ever.")) <= 8


def test_a_failed_search_is_talked_about_and_a_tool_may_follow(able_phone, claude):
    claude.when("What is on tonight?", Reply(
        "Let me look that up.",
        blocks=[Search("tonight", error="unavailable"), "I can't search.", Tool("clock")],
        then=Reply("It is late anyway."),
    ))
    able_phone.call()
    heard = able_phone.say("What is on tonight?")
    assert re.sub(r"\s", "", heard) == "Letmelookthatup.Ican'tsearch.Itislateanyway."


def test_what_was_found_goes_back_unchanged_when_a_tool_follows(able_phone, claude):
    claude.when("Is it open now?", Reply(
        "Let me look that up.",
        thinking=True,
        blocks=[Search("opening hours"), "It is open ", Cited("from nine to five."), Tool("clock")],
        then=Reply("So it is open."),
    ))
    able_phone.call()
    heard = able_phone.say("Is it open now?")
    assert heard.endswith("It is open from nine to five. So it is open.")


def test_a_key_that_cannot_search_is_asked_again_without_once(unlucky):
    phone, claude = unlucky.phone(), unlucky.claude
    refused, requests = len(claude.refused), len(claude.requests)
    phone.call()
    assert phone.say("Who won?") == "You said: Who won?"
    assert len(claude.refused) == refused + 1
    (request,) = claude.requests[requests:]
    assert set(tools_of(request)) == {"clock", "hang_up", "switch_language", "hand_over"}
    lines = [line for line in unlucky.app.log().splitlines() if phone.call_sid in line]
    assert len([line for line in lines if "search" in line]) == 1
    assert [reply.strip() for _, reply in rows(unlucky.app, phone)] == ["You said: Who won?"]


def test_a_key_that_cannot_search_can_still_use_tools(unlucky):
    unlucky.claude.when("How late is it?", Reply(
        "Let me see.", blocks=[Tool("clock")], then=Reply("It is late.")
    ))
    phone = unlucky.phone()
    phone.call()
    assert phone.say("How late is it?") == "Let me see. It is late."


@meanwhile
def test_no_other_process_takes_a_silence_after_a_tool_for_the_end(stage):
    words, late = "What time will it be?", Reply("It will be noon.", first_token=STALLED + 3)
    stage.claude.when(words, Reply("Let me see.", blocks=[Tool("clock")], then=late))
    with stage.other_app() as app:
        with stage.other_app(DATABASE_URL=f"sqlite:///{app.database}") as other:
            phone = stage.phone(app)
            phone.call()
            phone.on_hearing = lambda text: setattr(phone, "url", other.url)
            heard = phone.say(words)
            assert heard.startswith("Let me see.") and heard.endswith("It will be noon.")
            assert "One moment." in heard
