"""A run or a checkpoint -> a policy that acts in a user's own loop."""

from eva_rl.policy.acting import ActingPolicy
from eva_rl.policy.export import SUFFIXES, export_policy
from eva_rl.policy.load import Trained, find_folder, find_trained, load_policy
from eva_rl.policy.publish import publish

__all__ = [
    "SUFFIXES",
    "ActingPolicy",
    "Trained",
    "export_policy",
    "find_folder",
    "find_trained",
    "load_policy",
    "publish",
]
