"""The log of a `nearkin-serve` process: text for people, or one JSON object per line for machines."""

from __future__ import annotations

import json
import logging
import re
import time
from typing import Any

_IDENTITY = re.compile(r"\b(run|epoch|push|generation) %[sd]|%[a-z]")
"""Our messages name what they speak of right before its value: "run %s epoch %d: push %s opened"."""


class JsonFormatter(logging.Formatter):
    """`time level logger message`, and `run epoch push generation` where the message names them."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.gmtime(record.created)
        line: dict[str, Any] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', moment)}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **identities(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def identities(record: logging.LogRecord) -> dict[str, Any]:
    """The run, epoch, push and generation that a message names."""
    if not isinstance(record.args, tuple) or not isinstance(record.msg, str):
        return {}
    named = [match[1] for match in _IDENTITY.finditer(record.msg)]
    return {name: value for name, value in zip(named, record.args, strict=False) if name}


def configure(level: str, form: str) -> None:
    """This process's log is ours: `nearkin` goes to stderr, everyone else's loggers stay as they are.

    ValueError: no such level or form.
    """
    if level.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ValueError(f"--log-level {level!r} is not debug, info, warning or error")
    if form not in ("text", "json"):
        raise ValueError(f"--log-format {form!r} is not text or json")
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if form == "json" else text)
    nearkin = logging.getLogger("nearkin")
    nearkin.addHandler(handler)
    nearkin.setLevel(level.upper())
