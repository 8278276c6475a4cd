"""What Claude can do in a call: the clock, hanging up, and tools of one's own."""

import datetime
import os
import re
import signal
import zoneinfo

import pytest

from tests.claude import Reply, Thinking, Tool
from tests.stage import FASTER, SORRY, SPEED, is_part_of, tool_lines, tools_of, turn_is_logged, turns_of, wait_until


@pytest.fixture
def app(stage):
    """An app with tools of one's own. It doesn't wait long, so a caller may hear "One moment."."""
    return stage.own_tools


@pytest.fixture
def own(strict_phone):
    """A phone that calls this app."""
    return strict_phone


@pytest.fixture
def file(tmp_path):
    """A file that isn't there yet: the tool wait_for waits for it."""
    return tmp_path / "here"


def replies(app, phone):
    """The replies of a call, as they are kept."""
    return [reply.strip() for _, reply in turns_of(app, phone)]


# --- The loop -------------------------------------------------------------------------------------


def test_the_caller_hears_words_before_a_tool_while_the_tool_runs(app, own, claude, file):
    words = "Is anyone at the door?"
    claude.when(words, Reply(
        "Let me look at the door.",
        blocks=[Tool("wait_for", {"file": str(file)})],
        then=lambda request: Reply(f"I have looked: {request.results[0][0]}."),
    ))
    own.call()
    own.on_hearing = lambda text: "door" in text and file.touch()  # so the tool ends only after that
    heard = own.say(words)
    assert "Let me look at the door." in heard and heard.endswith("I have looked: somebody came.")
    ((asked, reply),) = turns_of(app, own)  # one turn, and one row
    assert (asked, reply.strip()) == (words, "Let me look at the door. I have looked: somebody came.")


def test_claude_may_use_several_tools_in_one_message(phone, claude):
    words = "How late is it here and there?"
    claude.when(words, Reply(
        "I look at two clocks.",
        blocks=[
            Tool("clock", {"time_zone": "Pacific/Kiritimati"}),
            Tool("clock", {"time_zone": "Pacific/Pago_Pago"}),
            Tool("clock"),
        ],
        then=Reply("It is late everywhere."),
    ))
    phone.call()
    assert phone.say(words) == "I look at two clocks. It is late everywhere."
    _, second = claude.asked(words)
    assert [failed for _, failed in second.results] == [False] * 3
    assert len({words for words, _ in second.results}) >= 2, "each has its own result"


def test_several_rounds_are_one_turn_and_go_back_unchanged(app, own, claude):
    # The pretend Claude refuses a turn in which a block isn't what it was.
    words = "How do I get home?"
    third = Reply("And it is a nice one.")
    second = Reply(blocks=[Tool("bus_times", {"stop": "Station", "how_many": 2})], thinking=True, then=third)
    claude.when(words, Reply(
        "Let me see.",
        thinking=True,
        blocks=[Thinking("Hm."), "Home it is.", Tool("bus_times", {"stop": "Mill *Lane*, 2 < 3"})],
        then=second,
    ))
    own.call()
    own.say(words)
    (reply,) = replies(app, own)
    assert re.sub(r"\s+", "", reply) == "Letmesee.Homeitis.Anditisaniceone."
    assert [request.results for request in claude.asked(words)] == [
        [],
        [("From Mill *Lane*, 2 < 3: in 5 minutes", False)],
        [("From Station: in 5 minutes, in 10 minutes", False)],
    ]
    assert own.say("Thanks for the bus.").endswith("You said: Thanks for the bus.")
    (request,) = claude.asked("Thanks for the bus.")
    kinds = {type(message["content"]) for message in request.body["messages"]}
    assert kinds == {str}, "an earlier turn goes back as plain text"
    assert all(is_part_of(words, reply) for role, words in request.messages if role == "assistant")


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
    assert len(tool_lines(stage.app, phone)) == 6


@pytest.mark.parametrize("tool, line", [
    (Tool("fail", {"error": "ValueError"}), "fail {} ms, ValueError"),
    (Tool("fail", {"error": "KeyError"}), "fail {} ms, KeyError"),
    (Tool("fail", {"error": "SystemExit"}), "fail {} ms, SystemExit"),
    (Tool("bus_times", {}), "bus_times"),
    (Tool("bus_times", {"stop": "Station", "how_many": "many"}), "bus_times"),
    (Tool("bus_times", {"stop": "Station", "colour": "red"}), None),
    (Tool("bus_times", json='{"stop": "Sta'), "bus_times"),
    (Tool("order_pizza", {"size": "large"}), "order_pizza"),
], ids=lambda value: f"{value.name} {value.json or value.input}" if isinstance(value, Tool) else "")
def test_a_tool_that_fails_is_talked_about(app, own, claude, tool, line):
    words, logged = f"Do what you can't: {tool}.", len(app.log())
    claude.when(words, Reply(
        "I try that.",
        blocks=[tool, Tool("bus_times", {"stop": "A"})],
        then=Reply("It didn't work."),
    ))
    own.call()
    assert own.say(words).endswith("It didn't work.")
    assert replies(app, own) == ["I try that. It didn't work."]
    failed, worked = claude.asked(words)[-1].results
    assert worked == ("From A: in 5 minutes", False)
    lines = tool_lines(app, own)
    assert len(lines) == 2 and re.fullmatch(r"turn 1: tool bus_times \d+ ms, ok", lines[1])
    if line:  # whether too much of an input is an error is pydantic's choice
        assert failed[1] and failed[0].strip()
        assert re.match("turn 1: tool " + line.replace("{}", r"\d+"), lines[0])
        assert not lines[0].endswith("ok")
    assert "a secret" not in app.log()[logged:] and "Station" not in app.log()[logged:]


def test_a_tool_that_ends_the_call_ends_the_reply(phone, claude):
    words = "Bye, and how late is it?"
    claude.when(words, Reply(
        "It is late. Goodbye then!",
        blocks=[Tool("clock"), Tool("hang_up")],
        then=Reply("Too late."),
    ))
    phone.call()
    assert phone.say(words) == "It is late. Goodbye then!"
    assert phone.ended == "hangup"
    assert len(claude.asked(words)) == 1


def test_a_goodbye_may_come_in_a_later_round(phone, claude):
    words = "One look at the clock, and bye."
    claude.when(words, Reply("One look.", blocks=[Tool("clock")], then=Reply("It is late. Goodbye!", hang_up=True)))
    phone.call()
    assert phone.say(words) == "One look. It is late. Goodbye!"
    assert phone.ended == "hangup"


def test_after_a_tool_claude_may_have_nothing_to_say(phone, claude):
    claude.when("Just look at it.", Reply("", blocks=[Tool("clock")], then=Reply("")))
    phone.call()
    assert phone.say("Just look at it.").startswith("I don't know what to say to that.")


# --- What happens while a tool runs ---------------------------------------------------------------


def test_a_second_delivery_runs_no_tool_twice(app, own, claude, file):
    words = "Who is at the gate?"
    claude.when(words, Reply(
        "I look at the gate.",
        blocks=[Tool("wait_for", {"file": str(file)})],
        then=Reply("It is you."),
    ))
    own.call()
    params = {**own.params, "SpeechResult": words}

    def is_answered():
        answer = own.request("POST", own.gather["action"], params, token="the same")
        return b"I look at the gate." in answer.body

    for _ in range(2):  # both come back with the first sentence, while the tool runs
        wait_until(is_answered)
    assert len(claude.asked(words)) == 1
    file.touch()
    assert own.say(words, token="the same").endswith("It is you.")
    assert replies(app, own) == ["I look at the gate. It is you."]
    assert len(tool_lines(app, own)) == 1
    assert len(claude.asked(words)) == 2


def test_claude_is_not_asked_again_if_the_caller_hangs_up_while_a_tool_runs(app, own, claude, file):
    words = "Look for me."
    claude.when(words, Reply("I look for you.", blocks=[Tool("wait_for", {"file": str(file)})], then=Reply("Found.")))
    own.call()
    own.on_hearing = lambda text: "look" in text and own.hang_up()
    assert own.say(words).endswith("I look for you.")
    turn_is_logged(app, own)
    file.touch()
    assert len(claude.asked(words)) == 1 and turns_of(app, own) == [("", "")]


def test_a_caller_who_goes_on_while_a_tool_runs_is_answered(app, own, claude, file):
    words = "Look slowly."
    claude.when(words, Reply("I look slowly.", blocks=[Tool("wait_for", {"file": str(file)})], then=Reply("Found.")))
    own.call()
    # As after a fallback of Twilio's: the reply isn't fetched any more, and the caller speaks.
    own.request("POST", "/talking", {**own.params, "SpeechResult": words}, token="a token")
    wait_until(lambda: replies(app, own) == ["I look slowly."])
    assert own.say("Never mind the slow look.").endswith("You said: Never mind the slow look.")
    turn_is_logged(app, own)
    file.touch()
    assert len(claude.asked(words)) == 1
    assert replies(app, own) == ["I look slowly.", "You said: Never mind the slow look."]


@pytest.mark.slow
def test_a_tool_that_takes_too_long_is_given_up(app, own, claude):
    words = "Wait for Godot."
    claude.when(words, Reply(
        "I wait for him.",
        blocks=[Tool("wait_for", {"file": "/godot", "seconds": 50}), Tool("bus_times", {"stop": "A"})],
        then=Reply("He didn't come."),
    ))
    own.call()
    heard = own.say(words)
    assert "I wait for him. One moment." in heard and heard.endswith("He didn't come.")
    _, second = claude.asked(words)
    (result, failed), worked = second.results
    assert failed and result and worked == ("From A: in 5 minutes", False)
    slow, quick = tool_lines(app, own)
    milliseconds = int(re.fullmatch(r"turn 1: tool wait_for (\d+) ms, too slow", slow)[1])
    assert milliseconds >= 20_000 / SPEED
    assert quick.endswith("ok")
    assert own.say("Thank you for waiting for him.").endswith("You said: Thank you for waiting for him.")


@pytest.mark.slow
def test_a_tool_whose_process_was_killed_does_not_run_again(stage, claude):
    words = "Wait for the end."
    claude.when(words, Reply("I wait for it.", blocks=[Tool("wait_for", {"file": "/end"})], then=Reply("Never said.")))
    # With --preload the process that comes after a killed one need not import everything.
    with stage.other_app("--preload", module="tests.own_tools:app") as app:
        phone = stage.phone(app)
        phone.call()
        kills = [lambda: os.kill(*app.workers(), signal.SIGKILL)]
        phone.on_hearing = lambda text: "wait for it" in text and kills and kills.pop()()
        heard = phone.say(words)
        assert "I wait for it." in heard and heard.endswith(SORRY)
        assert phone.say("Are you back from the end?").endswith("You said: Are you back from the end?")
        assert len(claude.asked(words)) == 1
        (request,) = claude.asked("Are you back from the end?")
        assert [words for _, words in request.messages] == [words, "I wait for it.", "Are you back from the end?"]


def test_a_reply_shows_life_while_claude_thinks_after_a_tool(app, own, claude):
    """So other processes can tell that somebody still writes it."""
    words = "How late will it be?"
    claude.when(words, Reply("Let me see.", blocks=[Tool("clock")], then=Reply("Late.", first_token=5)))
    own.call()
    own.request("POST", "/talking", {**own.params, "SpeechResult": words})
    wait_until(lambda: len(claude.asked(words)) == 2)
    for _ in range(2):
        (before,) = turns_of(app, own, "touched")
        wait_until(lambda before=before: turns_of(app, own, "touched") > [before])
    assert turns_of(app, own, "reply, stop") == [("Let me see. ", None)]


@pytest.mark.slow
def test_another_process_waits_while_claude_thinks_after_a_tool(stage, claude):
    """It doesn't take the silence for the end of the process that writes the reply."""
    stalled = 10 / SPEED  # seconds without a sign of life, after which it would
    words, late = "What time will it be?", Reply("It will be noon.", first_token=stalled + 0.5)
    claude.when(words, Reply("Let me see.", blocks=[Tool("clock")], then=late))
    app = stage.faster
    with stage.other_app(module=FASTER, DATABASE_URL=f"sqlite:///{app.database}") as other:
        phone = stage.phone(app)
        phone.call()
        phone.on_hearing = lambda text: setattr(phone, "url", other.url)
        heard = phone.say(words)
        assert heard.endswith("It will be noon.") and "One moment." in heard
        assert replies(app, phone) == ["Let me see. It will be noon."]


# --- What is offered, and the clock ---------------------------------------------------------------


def test_tools_are_offered_with_a_description(phone, claude):
    phone.call()
    phone.say("What can you do?")
    request = claude.asked("What can you do?")[-1]
    tools = tools_of(request)
    assert tools.keys() >= {"clock", "hang_up"}
    assert all(tools[name]["description"].strip() for name in ("clock", "hang_up"))
    assert "tool_choice" not in request.body


def test_tools_of_ones_own_are_offered_too(own, claude):
    own.call()
    own.say("What more can you do?")
    (request,) = claude.asked("What more can you do?")
    assert tools_of(request).keys() >= {"clock", "hang_up", "bus_times", "buses_in_town", "fail", "wait_for"}


def test_a_tool_of_ones_own_needs_only_a_docstring_and_annotations(own, claude):
    words = "When is my bus?"
    claude.when(words, Reply(
        "I ask the station.",
        blocks=[Tool("bus_times", {"stop": "Station", "how_many": 3}), Tool("buses_in_town")],
    ))
    own.call()
    heard = own.say(words)
    assert heard.endswith("The tools say: From Station: in 5 minutes, in 10 minutes, in 15 minutes 40")
    tool = tools_of(claude.asked(words)[0])["bus_times"]
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
    assert any(re.search(rf"\b0?({now.hour}|{now.hour % 12 or 12}):{now.minute:02}\b", words) for now in possible)


NO_TIME_ZONES = ["Mars/Olympus", "../../etc/passwd", "America", "x" * 5000]


@pytest.mark.parametrize("time_zone", NO_TIME_ZONES, ids=lambda zone: zone[:20])
def test_claude_hears_of_an_unknown_time_zone(phone, stage, claude, time_zone):
    question = f"And over there, in {time_zone[:20]}?"
    claude.when(question, Reply(
        "Let me see.",
        blocks=[Tool("clock", {"time_zone": time_zone})],
        then=Reply("Where is that?"),
    ))
    phone.call()
    assert phone.say(question) == "Let me see. Where is that?"
    ((words, failed),) = claude.asked(question)[-1].results
    assert failed and words.strip()
    (line,) = tool_lines(stage.app, phone)
    assert line.startswith("turn 1: tool clock") and not line.endswith("ok")
    assert time_zone not in line
