"""Tasks one after the other, and what is left of the first when the last is learned (Continual World, Wolczyk et al. 2021).

Nothing is imported here, so that the command answers `--help` at once.
"""
