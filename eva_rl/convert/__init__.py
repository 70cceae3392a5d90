"""A user's files -> a Minari dataset; one file a format."""

from eva_rl.convert.conversion import Found, convert
from eva_rl.convert.episodes import Columns

__all__ = ["Columns", "Found", "convert"]
