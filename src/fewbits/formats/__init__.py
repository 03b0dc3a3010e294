"""What a number format is: its row of fields, the catalog of named formats, exact arithmetic. Standard library only."""

from fewbits.formats.catalog import names
from fewbits.formats.format import Block, Format, Kind, Specials
from fewbits.formats.rounding import Overflow, Rounding, ScaleRule

__all__ = ["Block", "Format", "Kind", "Overflow", "Rounding", "ScaleRule", "Specials", "names"]
