"""Model and environments -> episodes."""

from eva_rl.rollout.rollout import Actor, Episodes, check_spaces, rollout

__all__ = ["Actor", "Episodes", "check_spaces", "rollout"]
