"""The `nearkin` command: look into a neighbour service.

app.py        the commands and their options
human.py      answers as tables for people
machine.py    answers as JSON
names.py      class names from a file
export.py     neighbour tables to files, and how a file is refused
report.py     one page about a generation
"""

from nearkin_client.cli.app import main

__all__ = ["main"]
