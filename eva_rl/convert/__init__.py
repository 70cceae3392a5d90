"""A user's files -> a Minari dataset; one file a format.

Nothing is imported here, so that the command answers `--help` at once: `from eva_rl.convert.conversion import convert`.
"""
