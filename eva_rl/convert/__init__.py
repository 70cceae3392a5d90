"""A user's files -> a Minari dataset, with one module for each format.

Nothing is imported here, so that the command answers `--help` at once. The function is imported with
`from eva_rl.convert.conversion import convert`.
"""
