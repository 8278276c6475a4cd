"""The pretend Claude: it must be as strict as the API, or the other tests prove nothing."""

import json

import anthropic
import pytest

from tests.claude import KEY, THOUGHTS, Cited, Claude, Reply, Search, Teacher, Tool

CLOCK = {
    "name": "clock",
    "description": "The time.",
    "input_schema": {"type": "object", "properties": {}},
}
SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}
ASKED = {"role": "user", "content": "What time is it?"}
TWO_CLOCKS = Reply(
    "Let me see.",
    thinking=True,
    blocks=[
        Tool("clock", {"time_zone": "Asia/Tokyo"}),
        Tool("clock", {"time_zone": "America/Lima"}),
    ],
    then=Reply("It is nine."),
)


@pytest.fixture(scope="module")
def claude():
    with Claude() as claude:
        yield claude


@pytest.fixture(scope="module")
def ask(claude):
    """Ask this Claude, by the real SDK's stream; returns the whole message."""
    with anthropic.Anthropic(api_key=KEY, base_url=claude.url, max_retries=0) as client:

        def ask(*messages, tools=(CLOCK, SEARCH), **more):
            request = dict(
                model="claude-haiku-5-5", max_tokens=2000, messages=messages, tools=tools
            )
            with client.messages.stream(**{**request, **more}) as stream:
                return stream.get_final_message()

        yield ask


def written(message):
    """What a message holds, as it is to be sent back."""
    return {"role": "assistant", "content": [block.to_dict() for block in message.content]}


def results(message, *, but=0, **more):
    """The results of a message's tools, ``but`` the last ones, as a message of the user's."""
    names = [block.id for block in message.content if block.type == "tool_use"]
    names = names[: len(names) - but]
    blocks = [
        {"type": "tool_result", "tool_use_id": name, "content": "09:00", **more} for name in names
    ]
    return {"role": "user", "content": blocks}


def test_tools_are_used_and_gone_on_from(claude, ask):
    claude.when("What time is it?", TWO_CLOCKS)
    first = ask(ASKED)
    assert [block.type for block in first.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert first.stop_reason == "tool_use" and first.content[0].thinking == THOUGHTS
    assert [block.input for block in first.content[2:]] == [
        {"time_zone": "Asia/Tokyo"},
        {"time_zone": "America/Lima"},
    ]
    assert ask(ASKED, written(first), results(first)).content[0].text == "It is nine."
    one, other = claude.asked("What time is it?")
    assert one.results == [] and other.results == [("09:00", False)] * 2
    assert other.words == "What time is it?"


def change(content, position, **fields):
    return [
        {**block, **fields} if number == position else block for number, block in enumerate(content)
    ]


@pytest.mark.parametrize(
    "wrong, why",
    [
        (lambda first: [ASKED, written(first)], "tool_result|prefill"),
        (
            lambda first: [ASKED, written(first), {"role": "user", "content": "Go on."}],
            "without `tool_result`",
        ),
        (lambda first: [ASKED, written(first), results(first, but=1)], "without `tool_result`"),
        (lambda first: [ASKED, results(first)], "unexpected `tool_use_id`"),
        (
            lambda first: [ASKED, written(first), results(first, is_error=True, content="")],
            "is_error",
        ),
        (
            lambda first: [{**ASKED, "content": "Changed."}, written(first), results(first)],
            "not what it was",
        ),
        (
            lambda first: [
                ASKED,
                {**written(first), "content": written(first)["content"][1:]},
                results(first),
            ],
            "modified",
        ),
        (
            lambda first: [
                ASKED,
                {
                    **written(first),
                    "content": change(written(first)["content"], 0, signature="mine"),
                },
                results(first),
            ],
            "modified",
        ),
        (
            lambda first: [
                ASKED,
                {**written(first), "content": change(written(first)["content"], 1, text="Mine.")},
                results(first),
            ],
            "modified",
        ),
        (lambda first: [ASKED, {"role": "assistant", "content": "And then"}], "prefill"),
    ],
)
def test_what_the_api_refuses_is_refused(claude, ask, wrong, why):
    claude.when("What time is it?", TWO_CLOCKS)
    first = ask(ASKED)
    with pytest.raises(anthropic.BadRequestError, match=why):
        ask(*wrong(first))


def test_earlier_turns_may_come_back_as_plain_text(claude, ask):
    claude.when("What time is it?", TWO_CLOCKS)
    first, again = ask(ASKED), {"role": "user", "content": "And now?"}
    ask(ASKED, written(first), results(first))
    told = {"role": "assistant", "content": "Let me see. It is nine."}
    assert ask(ASKED, told, again).content[0].text == "You said: And now?"


@pytest.mark.parametrize(
    "tool",
    [
        {"name": "a clock", "input_schema": {"type": "object"}},
        {"name": "clock"},
        {"name": "clock", "input_schema": {}},
        {**CLOCK, "call": "me"},
        {**SEARCH, "name": "search"},
        {**SEARCH, "max_uses": 0},
        {"type": "oracle", "name": "o"},
        {**SEARCH, "user_location": {"type": "approximate", "country": "Peru"}},
        {**SEARCH, "user_location": {"type": "approximate", "city": ""}},
    ],
    ids=str,
)
def test_a_malformed_tool_is_refused(ask, tool):
    with pytest.raises(anthropic.BadRequestError, match="tools.0"):
        ask(ASKED, tools=[tool])


def test_two_tools_of_one_name_are_refused(ask):
    with pytest.raises(anthropic.BadRequestError, match="unique"):
        ask(ASKED, tools=[CLOCK, CLOCK])


def test_a_search_is_made_in_mid_stream(claude, ask):
    claude.when(
        "Who won?", Reply("I'll look.", blocks=[Search("who won"), "Blue won, ", Cited("by one.")])
    )
    asked = {"role": "user", "content": "Who won?"}
    message = ask(asked)
    kinds = ["text", "server_tool_use", "web_search_tool_result", "text", "text"]
    assert [block.type for block in message.content] == kinds and message.stop_reason == "end_turn"
    assert message.content[1].input == {"query": "who won"} and message.content[4].citations[0].url
    claude.when("Who won?", Reply("I'll look.", blocks=[Search("who won", error="unavailable")]))
    assert ask(asked).content[2].content.error_code == "unavailable"
    assert [block.type for block in ask(asked, tools=[CLOCK]).content] == ["text"], (
        "it has nothing to search with"
    )


def test_a_pause_goes_on_where_it_was(claude, ask):
    paused = Reply(
        "I'll look.",
        thinking=True,
        blocks=[Search("who won")],
        stop="pause_turn",
        then=Reply("Blue."),
    )
    claude.when("Who won?", paused)
    asked = {"role": "user", "content": "Who won?"}
    message = ask(asked)
    assert message.stop_reason == "pause_turn"
    assert ask(asked, written(message)).content[0].text == "Blue."
    assert claude.requests[-1].words == "Who won?"
    with pytest.raises(anthropic.BadRequestError, match="modified"):
        ask(asked, {**written(message), "content": written(message)["content"][1:]})


def test_after_a_pause_it_may_use_a_tool(claude, ask):
    goes_on = Reply("One more look.", blocks=[Tool("clock")], then=Reply("Blue."))
    claude.when(
        "Who won?", Reply("Hm.", blocks=[Search("who won")], stop="pause_turn", then=goes_on)
    )
    asked = {"role": "user", "content": "Who won?"}
    first = ask(asked)
    second = ask(asked, written(first))
    third = ask(asked, written(first), written(second), results(second))
    assert third.content[0].text == "Blue."
    both = {
        "role": "assistant",
        "content": [*written(first)["content"], *written(second)["content"]],
    }
    assert ask(asked, both, results(second)).content[0].text == "Blue."
    with pytest.raises(anthropic.BadRequestError, match="not what it was"):
        ask(asked, written(second), results(second))


def test_a_key_that_cannot_search_is_told_so(claude, ask):
    claude.searches = False
    with pytest.raises(anthropic.BadRequestError, match="web_search"):
        ask(ASKED)
    claude.searches = True


def test_a_translation_is_no_part_of_a_call(claude):
    phrases, asked = json.dumps({"Goodbye!": "Goodbye!"}), len(claude.requests)
    with anthropic.Anthropic(api_key=KEY, base_url=claude.url, max_retries=0) as client:
        answer = client.messages.create(
            model="claude-haiku-5-5",
            max_tokens=2000,
            system="Translate into de-DE.",
            messages=[{"role": "user", "content": phrases}],
        )
    assert json.loads(answer.content[0].text) == {"Goodbye!": "de-DE: Goodbye!"}
    assert len(claude.requests) == asked and claude.translations[-1].language == "de-DE"


def test_a_round_after_a_round(claude, ask):
    endless = Reply("Once more.", blocks=[Tool("clock")])
    endless.then = endless
    claude.when("What time is it?", endless)
    messages = [ASKED]
    for _ in range(4):
        message = ask(*messages)
        messages += [written(message), results(message)]
    assert message.stop_reason == "tool_use" and len(claude.requests[-1].messages) == 7
    assert ask(*messages, tool_choice={"type": "none"}).stop_reason == "end_turn", (
        "it can't use any"
    )


# --- The pretend Claude that teaches --------------------------------------------------------------

PHONE = "You are on the phone: no markdown."


@pytest.fixture
def told():
    """What the Claude that teaches tells of the requests."""
    return []


@pytest.fixture
def teacher(told):
    """Ask a Claude that teaches: returns the words of its answer, and the whole message."""
    with Claude(default=Teacher(told.append, first_token=0, pace=None)) as claude:
        with anthropic.Anthropic(api_key=KEY, base_url=claude.url, max_retries=0) as client:

            def ask(*messages, **more):
                request = dict(model="claude-haiku-5-5", max_tokens=2000, messages=messages, **more)
                message = client.messages.create(**request)
                texts = [block.text for block in message.content if block.type == "text"]
                return " ".join(texts), message

            yield ask


def user(words):
    return {"role": "user", "content": words}


def test_the_teacher_remembers_a_name_from_the_messages_and_from_nothing_else(teacher):
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
    clock = {**CLOCK, "input_schema": {
        "type": "object", "properties": {"time_zone": {"type": "string"}}, "required": ["time_zone"]
    }}
    words, message = teacher(asked, system=PHONE)
    assert message.stop_reason == "end_turn" and "no clock" in words
    _, message = teacher(asked, system=PHONE, tools=[clock])
    assert message.content[-1].input == {"time_zone": "Asia/Tokyo"}
    said = asked, written(message), results(message)
    assert "09:00" in teacher(*said, system=PHONE, tools=[clock])[0]


def test_the_teacher_hangs_up_where_there_is_a_tool_for_it(teacher):
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
