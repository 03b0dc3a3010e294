"""The one error that fewbits raises for bad input.

A message names the thing, its value, the limit and the remedy, on one line: the command line prints it as it is.
"""


class FewbitsError(ValueError):
    """Bad input: a path, a file, a name or a tensor that fewbits cannot use. The message says what to do."""


class OverflowWarning(UserWarning):
    """Values of a model are beyond the format that it was cast to; the message names the tensors."""


class PrecisionWarning(UserWarning):
    """Training is set up in a way that is known to lose what it computes; the message says why, and what to do."""
