"""The command line: parse, call one function, print. A command's module imports what it needs when it runs.

Exit codes: 0 done, 1 the work failed (a full disk, say), 2 bad input or usage, 130 interrupted. Data goes to
stdout; errors and progress go to stderr, an error as one line.
"""

from fewbits.cli import numbers, explore, plan, conversion, compare, preflight, train, talk, doctor  # isort: skip  # in the order of --help
from fewbits.cli.app import app, main

__all__ = ["app", "compare", "conversion", "doctor", "explore", "main", "numbers", "plan", "preflight", "talk", "train"]
