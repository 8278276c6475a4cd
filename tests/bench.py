"""How long callers wait, and what a turn costs: beside the ideal, and beside the same line without streaming.

    python -m tests.bench                         one table, in four minutes
    python -m tests.bench --quick                 a smaller one, in half a minute
    python -m tests.bench --callers 20,150        with so many callers
    python -m tests.bench --beside ../old         beside another version of the app, in that folder
    python -m tests.bench --callers-limit 2000    also looks for the most callers that are carried, up to that many
    python -m tests.bench --chart docs/first-word.svg   also draws a chart of the time to the first word
    python -m tests.bench --think-ahead           what THINK_AHEAD gains and costs, in four minutes
    python -m tests.bench --profile               four quick listeners: the CPU of a turn, before and after a change
    python -m tests.bench --database postgres://user:password@host/name     with that beside SQLite: leaves its tables there

The app is started as the Procfile does. Its Claude is the pretend one, in a process of its own, and so are the callers,
who listen and think as long as people do. All of it shares one machine, so what is printed says when the callers or the
pretend Claude were late themselves. It asserts nothing: a busy machine makes worse figures, not a failure.

Settings are in seconds, what was measured is in milliseconds.
"""

import argparse
import contextlib
import glob
import http.client
import json
import math
import multiprocessing
import os
import pathlib
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import NamedTuple
from urllib.parse import urlsplit

from tests.claude import KEY, tokens
from tests.phone import ROOT, SPEAKING_RATE, App, Phone

FIRST_SENTENCE = "That is a very good question to ask."
REPLY = FIRST_SENTENCE + (
    " Bees find their way home by the sun, and they remember every tree on the way."
    " When it is cloudy they go by the light of the sky instead."
    " Shall I tell you how they tell each other?"
)
FIRST_TOKEN = 0.5  # seconds, about what a small model takes
PACE = 60  # tokens a second, about what it writes

# The first word from a line that costs nothing. That a sentence is whole is seen by the space behind its full stop, and
# the token with that space comes so many tokens after the first one.
IDEAL = FIRST_TOKEN + (len(tokens(FIRST_SENTENCE + " ")) - 1) / PACE
IDEAL_AWAITED = FIRST_TOKEN + len(tokens(REPLY)) / PACE

THINKING = (2.0, 4.0)  # seconds in which a caller thinks and speaks
CYCLE = IDEAL + len(REPLY.split()) / SPEAKING_RATE + sum(THINKING) / 2  # seconds from one turn to the next
CLOSE = 100  # ms more than on an idle line: nobody notices that on the phone
LATE = 20  # ms: callers who are later than this measure themselves, not the app
MOST_TO_A_PROCESS = 100  # callers: each is a thread, and more of them would be late

# The original's way: one route, and the caller hears nothing until the whole reply is there.
AWAITED = """\
import contextlib, os, sqlite3
import anthropic
from flask import Flask, request
from twilio.twiml.voice_response import VoiceResponse

app, claude = Flask(__name__), anthropic.Anthropic(max_retries=0)

def database():
    return contextlib.closing(sqlite3.connect(os.environ["DATABASE_URL"].removeprefix("sqlite:///")))

with database() as calls:
    calls.execute("PRAGMA journal_mode = WAL")
    calls.execute("CREATE TABLE IF NOT EXISTS said (call_sid, role, content)")
    calls.execute("CREATE INDEX IF NOT EXISTS by_call ON said (call_sid)")

@app.route("/", methods=["GET", "POST"])
def talk():
    call_sid, words, reply = request.values.get("CallSid"), request.values.get("SpeechResult"), "Hello!"
    if words:
        with database() as calls:
            said = calls.execute("SELECT role, content FROM said WHERE call_sid = ? ORDER BY rowid", [call_sid])
            messages = [{"role": role, "content": content} for role, content in [*said, ("user", words)]]
        answer = claude.messages.create(model="claude-haiku-5-5", max_tokens=2000, messages=messages)
        reply = "".join(block.text for block in answer.content if block.type == "text")
        rows = (call_sid, "user", words), (call_sid, "assistant", reply)
        with database() as calls, calls:
            calls.executemany("INSERT INTO said VALUES (?, ?, ?)", rows)
    response = VoiceResponse()
    response.gather(input="speech", action="/", speech_timeout="auto").say(reply)
    return str(response), {"Content-Type": "text/xml"}
"""


class Line:
    """A line, and the pretend Claude behind it. What it starts, the stack ends."""

    def __init__(self, name, folder, ideal, stack, **settings):
        self.name, self.ideal = name, 1000 * ideal
        pace = ["--first-token", str(FIRST_TOKEN), "--pace", str(PACE), "--text", REPLY]
        command = [sys.executable, "-m", "tests.claude", *pace]
        self.claude = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
        stack.callback(self.claude.wait)
        stack.callback(self.claude.kill)
        self.claude_url = self.claude.stdout.readline().strip()
        settings = {"ANTHROPIC_API_KEY": KEY, "ANTHROPIC_BASE_URL": self.claude_url, **settings}
        # All callers together have more turns than the thousand of a day, where the database was used before.
        self.app = App({"MAX_TURNS_A_DAY": "999999999", **settings}, folder=folder)
        stack.push(self.app)  # before it is started, so that it is ended even if that is interrupted
        self.app.start()

    def used(self):
        """The CPU that the app has used so far, and the megabytes of its largest worker; None without a /proc."""
        cpu = memory = None
        for path in glob.glob("/proc/[0-9]*/stat"):
            with contextlib.suppress(OSError):  # that one has just ended
                stat = pathlib.Path(path).read_text().rpartition(")")[2].split()  # proc(5), from its third field on
                parent, session, leader = stat[1], stat[3], str(self.app.process.pid)
                if session == leader:
                    ticks = sum(map(int, stat[11:15]))  # as a user and in the system, its own and its dead children's
                    cpu = (cpu or 0) + 1000 * ticks / os.sysconf("SC_CLK_TCK")
                if parent == leader:
                    memory = max(memory or 0, int(stat[21]) * os.sysconf("SC_PAGE_SIZE") / 1e6)
        return cpu, memory


# --- The callers ------------------------------------------------------------------------------------------------------


def call(url, token, number, dials_after, turns, rate):
    """One caller, from dialling to hanging up. Without a speaking rate there is no listening and no thinking.

    Returns:
        (waits for the first word of a reply, dead air inside replies, what went wrong or None)
    """
    person, phone = random.Random(number), Phone(url, token, speaking_rate=rate)
    waits, lost = [], None
    time.sleep(dials_after)
    try:
        phone.call()
        while not phone.ended and len(waits) < turns:
            time.sleep(person.uniform(*THINKING) if rate else 0)
            so_far = len(phone.said)
            heard = phone.say(f"What about {number}, and {len(waits)}?")
            if heard.split() != REPLY.split():
                lost = f"heard {heard!r}"
                break
            waits.append(1000 * phone.waits[-1])
            if rate and len(waits) < turns:  # what could be cut in on is heard to its end too
                time.sleep(sum(len(text.split()) for text, _, cut_in in phone.said[so_far:] if cut_in) / rate)
        lost = phone.ended or lost
        phone.hang_up()
    except OSError as error:
        lost = type(error).__name__
    return waits, [1000 * gap for gap in phone.gaps], lost


def let_call(tells, url, token, claude_url, numbers, apart, turns, rate):
    """Some of the callers, ``apart`` seconds apart, each in a thread of this process.

    Tells:
        (their calls, how late this process and the pretend Claude were each time it was asked for a whole reply)
    """
    calls, late = [], []
    arguments = [(url, token, number, number * apart, turns, rate) for number in numbers]
    callers = [threading.Thread(target=lambda one=one: calls.append(call(*one)), daemon=True) for one in arguments]
    for caller in callers:
        caller.start()
    while rate and any(caller.is_alive() for caller in callers):  # without a rate CPU counts, and asking takes some
        began = time.monotonic()
        ask(claude_url)
        late.append(1000 * (time.monotonic() - began - IDEAL_AWAITED))
    for caller in callers:
        caller.join()
    tells.send((calls, late))


def ask(claude_url):
    """Ask the pretend Claude for a whole reply."""
    body = {"model": "claude-haiku-5-5", "max_tokens": 2000, "messages": [{"role": "user", "content": "Hello?"}]}
    headers = {"Authorization": f"Bearer {KEY}", "anthropic-version": "2023-06-01"}
    with contextlib.closing(http.client.HTTPConnection(urlsplit(claude_url).netloc, timeout=30)) as connection:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("POST", "/v1/messages", json.dumps(body), headers)
            connection.getresponse().read()


class Measured(NamedTuple):
    """What all callers of a line went through."""

    waits: list  # for the first word of a reply, of all turns that went well
    gap: float | None  # the longest inside a reply; None if nobody listened
    lost: list  # what went wrong, for each call that was lost
    late: float  # how late the callers or the pretend Claude were themselves, 95th percentile
    cpu: float | None  # the app's for a turn, with its share of greeting, goodbye and idling


def measure(lines, callers, turns, rate):
    """Let so many people call each of these lines at once, not in step. Returns a Measured for each line."""
    parts = min(os.cpu_count() or 1, math.ceil(callers / MOST_TO_A_PROCESS))
    apart = CYCLE / max(20, callers)  # seconds between two who dial; a few needn't be spread so far
    jobs = [
        (
            line.app.url, line.app.token, line.claude_url,
            range(part, callers, parts), apart, turns, rate,
        )
        for part in range(parts)
        for line in lines
    ]
    before, measured = [line.used()[0] for line in lines], []
    results = in_processes(jobs, CYCLE + 60 * (turns + 1))  # seconds: a turn takes 20, so by then something is stuck
    for nth, line in enumerate(lines):
        calls = [call for calls, _ in results[nth :: len(lines)] for call in calls]
        late = [ms for _, late in results[nth :: len(lines)] for ms in late]
        waits = [wait for waits, _, _ in calls for wait in waits]
        gap = max((gap for _, gaps, _ in calls for gap in gaps), default=0) if rate else None
        lost = [lost for *_, lost in calls if lost] + ["did not come to an end"] * (callers - len(calls))
        cpu = before[nth] and (line.used()[0] - before[nth]) / max(1, len(waits))
        measured.append(Measured(waits, gap, lost, percentile(late, 95) or 0.0, cpu))
    return measured


def in_processes(jobs, patience, let_call=let_call):
    """What ``let_call``, or another function like it, tells for each of these arguments, or nothing if it hasn't after so many seconds."""
    spawn, until, started, results = multiprocessing.get_context("spawn"), time.monotonic() + patience, [], []
    leave = signal.signal(signal.SIGINT, signal.SIG_IGN)  # they inherit it: Ctrl-C is for this one, which ends them
    for job in jobs:
        hears, tells = spawn.Pipe(duplex=False)
        process = spawn.Process(target=let_call, args=[tells, *job], daemon=True)  # a daemon is ended with this one
        process.start()
        tells.close()
        started.append((process, hears))
    signal.signal(signal.SIGINT, leave)
    for process, hears in started:
        try:
            results.append(hears.recv() if hears.poll(max(0.0, until - time.monotonic())) else ([], []))
        except EOFError:  # it was ended
            results.append(([], []))
        process.kill()
        process.join()
    return results


def percentile(values, share):
    """The value that so many percent of them don't exceed; None if there are none."""
    return sorted(values)[math.ceil(len(values) * share / 100) - 1] if values else None


# --- Thinking ahead ---------------------------------------------------------------------------------------------------

# Seconds: a partial result each, give or take the second number; and from the last one to Twilio's request.
A_WORD, JITTER, SILENCE = 0.3, 0.0, 1.0
WRONG = 10  # of so many turns one ends otherwise than its last partial result says


def speak(url, token, number, dials_after, turns, rate, partials=(A_WORD, JITTER)):
    """One caller whose words Twilio reports while they are spoken.

    Returns:
        For each turn: (whether it ended as its last partial result says, ms from Twilio's request to the first word, ms
        from the caller's last word to the first word); and what went wrong, or None.
    """
    person, phone, found = random.Random(number), Phone(url, token, speaking_rate=rate), []
    time.sleep(dials_after)
    try:
        phone.call()
        for turn in range(turns):
            time.sleep(person.uniform(*THINKING) / 2)
            as_guessed, so_far = (number * turns + turn) % WRONG != WRONG // 2, len(phone.said)
            words = f"what about {number} and {turn}"
            phone.speak(words, partials[0], 0, partials[1])
            silent_since = time.monotonic()
            time.sleep(SILENCE)
            heard = phone.say(words if as_guessed else f"{words} of them")
            if heard.split() != REPLY.split():
                return found, f"heard {heard!r}"
            found.append((as_guessed, 1000 * phone.waits[-1], 1000 * (phone.said[so_far][1] - silent_since)))
            time.sleep(sum(len(text.split()) for text, _, cut_in in phone.said[so_far:] if cut_in) / rate)
        phone.hang_up()
    except OSError as error:
        return found, type(error).__name__
    return found, None


def let_speak(tells, url, token, claude_url, numbers, apart, turns, rate, partials):
    """Like ``let_call``, for such callers. Tells what each of them went through."""
    calls = []
    arguments = [(url, token, number, number * apart, turns, rate, partials) for number in numbers]
    callers = [threading.Thread(target=lambda one=one: calls.append(speak(*one)), daemon=True) for one in arguments]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    tells.send(calls)


def measure_ahead(lines, callers, turns, partials):
    """Let so many people call each of these lines at once. Returns a row of figures for each line, by their names."""
    parts, apart = min(os.cpu_count() or 1, math.ceil(callers / MOST_TO_A_PROCESS)), CYCLE / max(20, callers)
    jobs = [(line.app.url, line.app.token, line.claude_url, range(part, callers, parts), apart, turns, SPEAKING_RATE, partials)
            for part in range(parts) for line in lines]
    before = [(line.used()[0], len(line.app.log())) for line in lines]
    results, measured = in_processes(jobs, CYCLE + 60 * (turns + 1), let_speak), []
    time.sleep(2)  # seconds: the last wrong guess is over by then
    for nth, (line, (cpu, logged)) in enumerate(zip(lines, before)):
        calls = [call for calls in results[nth :: len(lines)] for call in calls]
        found = [turn for turns, _ in calls for turn in turns]
        right, wrong = ([ms for as_guessed, ms, _ in found if as_guessed is which] for which in (True, False))
        log, count = line.app.log()[logged:], max(1, len(found))
        asked = [list(map(int, pair)) for pair in re.findall(r": first sentence .* tokens (\d+) in (\d+) out", log)]
        measured.append({
            "first word, words as guessed, median": percentile(right, 50),
            "first word, words as guessed, 95th percentile": percentile(right, 95),
            "first word, other words, median": percentile(wrong, 50),
            "first word, other words, 95th percentile": percentile(wrong, 95),
            "from the caller's last word, median": percentile([ms for *_, ms in found], 50),
            "from the caller's last word, 95th percentile": percentile([ms for *_, ms in found], 95),
            "requests a turn": round(len(asked) / count, 2),
            "tokens in a turn": sum(read for read, _ in asked) / count,
            "tokens out a turn (of whole answers)": sum(written for _, written in asked) / count,
            "CPU a turn": cpu and (line.used()[0] - cpu) / count,
            "calls lost": sum(lost is not None for _, lost in calls) + callers - len(calls)})
    return measured


def table_ahead(lines, rounds, partials):
    """Measure with THINK_AHEAD and without, and print it as it comes."""
    row("", [line.name for line in lines], ["", ""])
    for callers, turns in rounds:
        row(f"callers: {callers}, turns: {callers * turns}; milliseconds")
        groups = [lines] if callers <= 20 else [[line] for line in lines]
        measured = [one for group in groups for one in measure_ahead(group, callers, turns, partials)]
        for name in measured[0]:
            row(f"  {name}", [one[name] for one in measured])


# --- The table --------------------------------------------------------------------------------------------------------


def row(name, cells=(), ideals=("", "")):
    """Print a row: for each line what was measured, "-" if it couldn't be, and the ideal if there is one."""
    pairs = [cell for pair in zip(cells, ideals) for cell in pair]
    texts = ["-" if cell is None else f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in pairs]
    print((f"{name:44}" + "".join(f"{text:>15}" for text in texts)).rstrip(), flush=True)


def table(lines, rounds, rate, limit):
    """Measure everything, and print it as it comes.

    Args:
        rounds: (callers, turns of each) pairs.
        rate: at which the callers listen; None lets them neither listen nor think.
        limit: look for the most callers, up to this many; None doesn't look.

    Returns:
        The medians of the time to the first word, in ms: a list with one for each line, by the number of callers.
    """
    ideals = [line.ideal for line in lines]
    row("", [line.name for line in lines], ["ideal", "ideal"])
    row("very first turn: first word, ms", [percentile(one.waits, 50) for one in measure(lines, 1, 1, None)], ideals)
    spoilt, idle, medians = [], None, {}
    for callers, turns in rounds:
        # Few callers leave the machine idle enough for both lines at once, which saves half the time.
        groups = [lines] if callers <= 20 else [[line] for line in lines]
        measured = [one for group in groups for one in measure(group, callers, turns, rate)]
        row(f"callers: {callers}, turns: {callers * turns}")
        row("  first word, median, ms", [percentile(one.waits, 50) for one in measured], ideals)
        medians[callers] = [percentile(one.waits, 50) for one in measured]
        row("  first word, 95th percentile, ms", [percentile(one.waits, 95) for one in measured], ideals)
        row("  longest gap inside a reply, ms", [one.gap for one in measured], [0, 0])
        row("  CPU a turn, ms", [one.cpu for one in measured])
        row("  calls lost", [len(one.lost) for one in measured], [0, 0])
        idle = idle or [percentile(one.waits, 50) or line.ideal for one, line in zip(measured, lines)]
        spoilt += [what_spoils(one, callers, line) for one, line in zip(measured, lines)]
    row("memory of a worker, MB", [line.used()[1] for line in lines])
    most = [most_callers(line, quick, limit) if limit else "not measured" for line, quick in zip(lines, idle)]
    row("most callers within 0.1 s of an idle line", most)
    print("".join(spoilt), end="")
    return medians


def what_spoils(measured, callers, line):
    """What else than the app made figures worse, and why calls were lost: a line for each, or nothing."""
    notes = [f"{measured.lost.count(why)} lost: {why}" for why in sorted(set(measured.lost))[:3]]
    if measured.late > LATE:
        notes.append(f"they, or the pretend Claude, were late themselves, by {measured.late:.0f} ms")
    return "".join(f"! {callers} calling {line.name}: {note}\n" for note in notes)


def most_callers(line, idle, limit):
    """The most people who can call a line while 95 of 100 first words come within CLOSE of ``idle``."""
    carried, too_many, callers = 0, None, min(200, limit)  # a number to begin with
    while True:
        for _ in range(2):  # a second chance: the machine may have been busy with something else
            (measured,) = measure([line], callers, 2, SPEAKING_RATE)
            slow = percentile(measured.waits, 95) or math.inf
            print(f"{line.name}, {callers} callers: {slow:.0f} ms", file=sys.stderr)
            print(what_spoils(measured, callers, line), end="", file=sys.stderr)
            if well := not measured.lost and slow <= idle + CLOSE:
                break
        if well:
            carried = callers
        else:
            too_many, or_more = callers, " or more" * (measured.late > LATE)  # as it may not be the app that was slow
        if too_many is None and carried == limit:
            return f"{limit} or more"
        if too_many and too_many - carried <= max(1, too_many / 8):  # no such number is more exact than that
            return f"{carried}{or_more}"
        callers = (carried + too_many) // 2 if too_many else min(2 * carried, limit)


# --- The chart ----------------------------------------------------------------------------------------------------------


def chart(medians, names):
    """The time to the first word as an SVG: a group of bars for each number of callers.

    Args:
        medians: as ``table`` returns them.
        names: of the lines.
    """
    colours, left, pixels, height = ("#b5431f", "#9a958c"), 130, 0.22, 26
    widest = max(ms for row in medians.values() for ms in row if ms)
    parts, y = [], 70
    for callers, row in medians.items():
        label = f"{callers} caller{'s' * (callers > 1)}"
        parts.append(f'<text x="{left - 12}" y="{y + height + 4}" text-anchor="end">{label}</text>')
        for ms, colour in zip(row, colours):
            width = round((ms or 0) * pixels)
            parts.append(f'<rect x="{left}" y="{y}" width="{width}" height="{height - 4}" fill="{colour}"/>')
            parts.append(f'<text x="{left + width + 8}" y="{y + 16}">{(ms or 0) / 1000:.2f} s</text>')
            y += height
        y += 18
    for nth, (name, colour) in enumerate(zip(names, colours)):
        parts.append(f'<rect x="{left + 190 * nth}" y="38" width="14" height="14" fill="{colour}"/>')
        parts.append(f'<text x="{left + 190 * nth + 20}" y="50">{name}</text>')
    size = f'width="{round(left + widest * pixels + 80)}" height="{y}"'
    title = '<text x="12" y="22" font-weight="bold">Time from the caller\'s last word to the first word of the reply</text>'
    style = 'font-family="sans-serif" font-size="14" fill="#222"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>',
                      '<rect width="100%" height="100%" fill="#fff"/>', title, *parts, "</svg>\n"])


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="10 callers, one turn each")
    parser.add_argument("--callers-limit", type=int, metavar="N", help="look for the most callers, up to N: takes long")
    parser.add_argument("--callers", metavar="N,N", help="how many callers (default: 1,20,150)")
    parser.add_argument("--beside", metavar="FOLDER", help="compare the app in this folder, instead of not streaming")
    parser.add_argument("--chart", metavar="FILE", help="draw a chart of the time to the first word, as SVG")
    parser.add_argument("--profile", action="store_true", help="24 turns in a minute, to compare the CPU of a turn")
    parser.add_argument("--database", metavar="URL", help="compare this Postgres with SQLite, instead of not streaming")
    parser.add_argument("--think-ahead", action="store_true", help="what THINK_AHEAD gains and costs")
    parser.add_argument("--partials", type=float, default=A_WORD, help="seconds between two partial results")
    parser.add_argument("--jitter", type=float, default=JITTER, help="seconds that they come earlier or later")
    options = parser.parse_args()
    leaving = signal.SIGINT, signal.SIGTERM, signal.SIGHUP

    def leave(number, _):
        for each in leaving:
            signal.signal(each, signal.SIG_IGN)  # once is enough: what was started is being ended
        sys.exit(128 + number)

    for number in leaving:
        signal.signal(number, leave)
    os.environ["no_proxy"] = "*"  # everything is on this machine
    rounds, rate = [(1, 4), (20, 2), (150, 2)], SPEAKING_RATE  # as many turns as there can be in four minutes
    if options.callers:
        rounds = [(int(number), 4 if int(number) < 20 else 2) for number in options.callers.split(",")]
    if options.quick:
        rounds = [(10, 1)]
    if options.profile:
        rounds, rate = [(4, 6)], 3 * SPEAKING_RATE  # they don't listen as long, but they do listen
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores for app, callers and Claude", flush=True)
    with contextlib.ExitStack() as stack:
        if options.think_ahead:
            lines = [Line(f"THINK_AHEAD={how}", ROOT, IDEAL, stack, THINK_AHEAD=how) for how in ("no", "yes")]
            if options.beside:
                lines = [lines[1], Line("the other", options.beside, IDEAL, stack, THINK_AHEAD="yes")]
            rounds = rounds if options.quick or options.callers else [(1, 6), (20, 2), (150, 2)]
            return table_ahead(lines, rounds, (options.partials, options.jitter))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="voice-claude-"))
        pathlib.Path(folder, "app.py").write_text(AWAITED)
        lines = [Line("this app", ROOT, IDEAL, stack)]
        if options.beside:
            lines.append(Line("the other one", options.beside, IDEAL, stack))
        elif options.database:
            lines.append(Line("with Postgres", ROOT, IDEAL, stack, DATABASE_URL=options.database))
        else:
            lines.append(Line("whole reply", folder, IDEAL_AWAITED, stack))
        medians = table(lines, rounds, rate, options.callers_limit)
        if options.chart:
            pathlib.Path(options.chart).write_text(chart(medians, [line.name for line in lines]))


if __name__ == "__main__":
    main()
