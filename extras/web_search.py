"""WEB_SEARCHES: Claude may search the web so many times in one request. Anthropic does the search,
in the middle of the answer (https://docs.claude.com/en/docs/agents-and-tools/tool-use/web-search-tool).
"""

import logging
import os
from dataclasses import dataclass

import anthropic

from app import read_settings, setting, who_calls
from conversation import TOOLS

log = logging.getLogger("voice-claude")


@dataclass(frozen=True)
class Settings:
    web_searches: int = setting(0, r"\d{1,9}", "a whole number", make=int)


def activate(line) -> None:
    searches, pause_after = read_settings(Settings, os.environ).web_searches, line.pause_after

    def web_search() -> dict:
        """The tool, which knows where the caller is."""
        names = {"city": "City", "region": "State", "country": "Country"}
        place = {name: who_calls(field) for name, field in names.items() if who_calls(field)}
        where = {"user_location": {"type": "approximate", **place}} if place else {}
        return {"type": "web_search_20250305", "name": "web_search", **where, "max_uses": searches}

    def ask_without(writer, error, attempt):
        """A key that can't search gets a 400 that names the tool: ask again without it."""
        if isinstance(error, anthropic.BadRequestError) and "web_search" in str(error) and (
                writer.tools.pop("web_search", None)):
            log.info("%s: the key can't search the web", writer.name)
            return 0.0
        return pause_after(writer, error, attempt)

    TOOLS.append(web_search)
    line.pause_after = ask_without
