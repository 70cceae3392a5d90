"""Policies and environments -> episodes."""

from eva_rl.rollout.actor import Actor, ForJobs, Policy
from eva_rl.rollout.film import film
from eva_rl.rollout.rollout import LONGEST, Episodes, check_spaces, rollout
from eva_rl.rollout.simulators import Job, Simulators
from eva_rl.rollout.target import TargetReturn, warn_if_far

__all__ = [
    "LONGEST",
    "Actor",
    "Episodes",
    "ForJobs",
    "Job",
    "Policy",
    "Simulators",
    "TargetReturn",
    "check_spaces",
    "film",
    "rollout",
    "warn_if_far",
]
