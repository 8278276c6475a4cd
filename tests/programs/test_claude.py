"""The pretend Claude is as strict as Anthropic's API, and its teacher shows what a request lacks."""

import json

import anthropic
import pytest

from tests.claude import KEY, THOUGHTS, Cited, Claude, Reply, Search, Teacher, Tool

CLOCK = {"name": "clock", "description": "The time.", "input_schema": {"type": "object", "properties": {}}}
SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}
ASKED = {"role": "user", "content": "What time is it?"}
WHO_WON = {"role": "user", "content": "Who won?"}
TWO_CLOCKS = Reply(
    "Let me see.", thinking=True, then=Reply("It is nine."),
    blocks=[Tool("clock", {"time_zone": "Asia/Tokyo"}), Tool("clock", {"time_zone": "America/Lima"})],
)


@pytest.fixture(scope="module")
def claude():
    """A Claude of its own, which the SDK asks without the app."""
    with Claude() as claude:
        yield claude


@pytest.fixture(scope="module")
def ask(claude):
    """Ask this Claude, by the real SDK's stream; returns the whole message."""
    with anthropic.Anthropic(api_key=KEY, base_url=claude.url, max_retries=0) as client:

        def ask(*messages, tools=(CLOCK, SEARCH), **more):
            request = {"model": "claude-haiku-5-5", "max_tokens": 2000, "messages": messages, "tools": tools, **more}
            with client.messages.stream(**request) as stream:
                return stream.get_final_message()

        yield ask


def written(message):
    """A message of Claude's as it is to be sent back."""
    return {"role": "assistant", "content": [block.to_dict() for block in message.content]}


def results(message, *, but=0, **more):
    """The results of a message's tools, ``but`` the last ones, as a message of the user's."""
    names = [block.id for block in message.content if block.type == "tool_use"]
    names = names[: len(names) - but]
    blocks = [{"type": "tool_result", "tool_use_id": name, "content": "09:00", **more} for name in names]
    return {"role": "user", "content": blocks}


# --- Tools ----------------------------------------------------------------------------------------


def test_claude_uses_tools_and_goes_on_with_their_results(claude, ask):
    claude.when("What time is it?", TWO_CLOCKS)
    first = ask(ASKED)
    assert [block.type for block in first.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert first.stop_reason == "tool_use" and first.content[0].thinking == THOUGHTS
    assert [block.input for block in first.content[2:]] == [{"time_zone": "Asia/Tokyo"}, {"time_zone": "America/Lima"}]
    assert ask(ASKED, written(first), results(first)).content[0].text == "It is nine."
    one, other = claude.asked("What time is it?")[-2:]
    assert one.results == [] and other.results == [("09:00", False)] * 2
    assert other.words == "What time is it?"


def changed(message, position, **fields):
    """A message of Claude's, sent back with a change in one block."""
    content = written(message)["content"]
    content[position] = {**content[position], **fields}
    return {"role": "assistant", "content": content}


def without_thinking(message):
    return {"role": "assistant", "content": written(message)["content"][1:]}


WRONG = {  # the messages that are sent, made of Claude's first message; and why they are refused
    "no results": (lambda first: [ASKED, written(first)], "tool_result|prefill"),
    "words instead of results": (
        lambda first: [ASKED, written(first), {"role": "user", "content": "Go on."}], "without `tool_result`"),
    "one result too few": (lambda first: [ASKED, written(first), results(first, but=1)], "without `tool_result`"),
    "results of nothing": (lambda first: [ASKED, results(first)], "unexpected `tool_use_id`"),
    "an empty error": (lambda first: [ASKED, written(first), results(first, is_error=True, content="")], "is_error"),
    "another question": (
        lambda first: [{**ASKED, "content": "Changed."}, written(first), results(first)], "not what it was"),
    "no thinking": (lambda first: [ASKED, without_thinking(first), results(first)], "modified"),
    "another signature": (lambda first: [ASKED, changed(first, 0, signature="mine"), results(first)], "modified"),
    "another text": (lambda first: [ASKED, changed(first, 1, text="Mine."), results(first)], "modified"),
    "a prefill": (lambda first: [ASKED, {"role": "assistant", "content": "And then"}], "prefill"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_messages_that_the_api_refuses_are_refused(claude, ask, wrong):
    messages, why = WRONG[wrong]
    claude.when("What time is it?", TWO_CLOCKS)
    first = ask(ASKED)
    with pytest.raises(anthropic.BadRequestError, match=why):
        ask(*messages(first))


def test_earlier_turns_may_come_back_as_plain_text(claude, ask):
    claude.when("What time is it?", TWO_CLOCKS)
    first, again = ask(ASKED), {"role": "user", "content": "And now?"}
    ask(ASKED, written(first), results(first))
    told = {"role": "assistant", "content": "Let me see. It is nine."}
    assert ask(ASKED, told, again).content[0].text == "You said: And now?"


def test_claude_may_use_tools_again_and_again(claude, ask):
    endless = Reply("Once more.", blocks=[Tool("clock")])
    endless.then = endless
    claude.when("What time is it?", endless)
    messages = [ASKED]
    for _ in range(4):
        message = ask(*messages)
        messages += [written(message), results(message)]
    assert message.stop_reason == "tool_use" and len(claude.requests[-1].messages) == 7
    assert ask(*messages, tool_choice={"type": "none"}).stop_reason == "end_turn"


@pytest.mark.parametrize("tool", [
    {"name": "a clock", "input_schema": {"type": "object"}},
    {"name": "clock"},
    {"name": "clock", "input_schema": {}},
    {**CLOCK, "call": "me"},
    {**SEARCH, "name": "search"},
    {**SEARCH, "max_uses": 0},
    {"type": "oracle", "name": "o"},
    {**SEARCH, "user_location": {"type": "approximate", "country": "Peru"}},
    {**SEARCH, "user_location": {"type": "approximate", "city": ""}},
], ids=str)
def test_a_malformed_tool_is_refused(ask, tool):
    with pytest.raises(anthropic.BadRequestError, match="tools.0"):
        ask(ASKED, tools=[tool])


def test_two_tools_of_one_name_are_refused(ask):
    with pytest.raises(anthropic.BadRequestError, match="unique"):
        ask(ASKED, tools=[CLOCK, CLOCK])


# --- Searches, pauses and translations ------------------------------------------------------------


def test_a_search_is_made_in_mid_stream(claude, ask):
    claude.when("Who won?", Reply("I'll look.", blocks=[Search("who won"), "Blue won, ", Cited("by one.")]))
    message = ask(WHO_WON)
    kinds = ["text", "server_tool_use", "web_search_tool_result", "text", "text"]
    assert [block.type for block in message.content] == kinds and message.stop_reason == "end_turn"
    assert message.content[1].input == {"query": "who won"} and message.content[4].citations[0].url


def test_a_search_may_fail(claude, ask):
    claude.when("Who won?", Reply("I'll look.", blocks=[Search("who won", error="unavailable")]))
    assert ask(WHO_WON).content[2].content.error_code == "unavailable"


def test_without_the_tool_nothing_is_searched_for(claude, ask):
    claude.when("Who won?", Reply("I'll look.", blocks=[Search("who won")]))
    assert [block.type for block in ask(WHO_WON, tools=[CLOCK]).content] == ["text"]


def test_a_key_that_may_not_search_is_refused(claude, ask):
    claude.searches = False
    try:
        with pytest.raises(anthropic.BadRequestError, match="web_search"):
            ask(ASKED)
    finally:
        claude.searches = True


def test_claude_goes_on_after_a_pause(claude, ask):
    paused = Reply("I'll look.", thinking=True, blocks=[Search("who won")], stop="pause_turn", then=Reply("Blue."))
    claude.when("Who won?", paused)
    message = ask(WHO_WON)
    assert message.stop_reason == "pause_turn"
    assert ask(WHO_WON, written(message)).content[0].text == "Blue."
    assert claude.requests[-1].words == "Who won?"
    with pytest.raises(anthropic.BadRequestError, match="modified"):
        ask(WHO_WON, without_thinking(message))


def test_after_a_pause_claude_may_use_a_tool(claude, ask):
    goes_on = Reply("One more look.", blocks=[Tool("clock")], then=Reply("Blue."))
    claude.when("Who won?", Reply("Hm.", blocks=[Search("who won")], stop="pause_turn", then=goes_on))
    first = ask(WHO_WON)
    second = ask(WHO_WON, written(first))
    assert ask(WHO_WON, written(first), written(second), results(second)).content[0].text == "Blue."
    both = {"role": "assistant", "content": written(first)["content"] + written(second)["content"]}
    assert ask(WHO_WON, both, results(second)).content[0].text == "Blue."
    with pytest.raises(anthropic.BadRequestError, match="not what it was"):
        ask(WHO_WON, written(second), results(second))


def test_a_translation_is_no_part_of_a_call(claude):
    phrases, asked = json.dumps({"Goodbye!": "Goodbye!"}), len(claude.requests)
    with anthropic.Anthropic(api_key=KEY, base_url=claude.url, max_retries=0) as client:
        answer = client.messages.create(
            model="claude-haiku-5-5", max_tokens=2000, system="Translate into de-DE.",
            messages=[{"role": "user", "content": phrases}],
        )
    assert json.loads(answer.content[0].text) == {"Goodbye!": "de-DE: Goodbye!"}
    assert len(claude.requests) == asked and claude.translations[-1].language == "de-DE"


# --- The pretend Claude that teaches --------------------------------------------------------------


PHONE = "You are on the phone: no markdown."


@pytest.fixture
def told():
    """The lines that the teacher has told about the requests."""
    return []


@pytest.fixture
def teacher(told):
    """Ask a Claude that teaches; returns the words of its answer, and the whole message."""
    with Claude(default=Teacher(told.append, first_token=0, pace=None)) as claude:
        with anthropic.Anthropic(api_key=KEY, base_url=claude.url, max_retries=0) as client:

            def ask(*messages, **more):
                request = {"model": "claude-haiku-5-5", "max_tokens": 2000, "messages": messages, **more}
                message = client.messages.create(**request)
                texts = [block.text for block in message.content if block.type == "text"]
                return " ".join(texts), message

            yield ask


def user(words):
    return {"role": "user", "content": words}


def test_the_teacher_remembers_a_name_from_the_messages_only(teacher):
    told, asked = user("My name is Ada."), user("What's my name?")
    hello, _ = teacher(told, system=PHONE)
    assert hello.startswith("Hello Ada!")
    said = told, {"role": "assistant", "content": hello}, asked
    assert "Ada" in teacher(*said, system=PHONE)[0]
    assert "Ada" not in teacher(asked, system=PHONE)[0]


def test_the_teacher_writes_markdown_until_the_prompt_forbids_it(teacher):
    asked = user("How do I boil an egg?")
    assert "**" in teacher(asked)[0] and "\n1. " in teacher(asked)[0]
    on_the_phone = teacher(asked, system=PHONE)[0]
    assert "*" not in on_the_phone and "How do I boil an egg?" in on_the_phone


def test_the_teacher_uses_the_tools_that_there_are(teacher):
    asked = user("What time is it in Tokyo?")
    schema = {"type": "object", "properties": {"time_zone": {"type": "string"}}, "required": ["time_zone"]}
    clock = {**CLOCK, "input_schema": schema}
    words, message = teacher(asked, system=PHONE)
    assert message.stop_reason == "end_turn" and "no clock" in words
    _, message = teacher(asked, system=PHONE, tools=[clock])
    assert message.content[-1].input == {"time_zone": "Asia/Tokyo"}
    said = asked, written(message), results(message)
    assert "09:00" in teacher(*said, system=PHONE, tools=[clock])[0]


def test_the_teacher_hangs_up_if_there_is_a_tool_for_it(teacher):
    words, message = teacher(user("Goodbye!"), system=PHONE, tools=[{**CLOCK, "name": "hang_up"}])
    assert words == "Goodbye!" and message.content[-1].name == "hang_up"
    assert teacher(user("Goodbye!"), system=PHONE)[1].stop_reason == "end_turn"


def test_the_teacher_tells_what_a_request_held_and_why_it_was_refused(teacher, told):
    teacher(user("Hello."))
    teacher(user("Hello."), system="A prompt.", tools=[CLOCK, SEARCH])
    with pytest.raises(anthropic.BadRequestError):
        teacher(user(" "))
    assert told == [
        "(Claude is sent 1 message.)",
        '(Claude is sent the prompt "A prompt." and 1 message; tools: clock, web_search.)',
        "(Claude refuses this: messages: text content blocks must contain non-whitespace text.)",
    ]
