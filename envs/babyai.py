"""BabyAI (Chevalier-Boisvert et al. 2019, https://minigrid.farama.org): instructions in a small language, in grid worlds.

Observations: the 7 x 7 cells in front of the agent (each a triple of object, colour and state), the direction the agent
faces, and the mission as token ids. Actions: turn left, turn right, forward, pick up, drop, toggle, done (which does
nothing). Reward: 1 - 0.9 t / T when the mission is done at step t of at most T, else 0. The T that a level allows may
depend on the mission drawn. A task is a level of BabyAI without its prefix.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from types import ModuleType
from typing import Any, cast

import gymnasium as gym
import numpy as np

from eva_rl.envs.domain import Domain, Policy

STEP_LIMITS = {  # the most steps that any mission of the level allows
    "ActionObjDoor-v0": 441,
    "FindObjS5-v0": 500,
    "GoToDoor-v0": 441,
    "GoToLocal-v0": 64,
    "GoToLocalS5N2-v0": 25,
    "GoToLocalS6N3-v0": 36,
    "GoToLocalS7N4-v0": 49,
    "GoToLocalS8N7-v0": 64,
    "GoToObj-v0": 64,
    "GoToObjDoor-v0": 576,
    "GoToObjMazeS4-v0": 144,
    "GoToObjMazeS4R2-v0": 64,
    "GoToObjS4-v0": 16,
    "GoToObjS6-v1": 36,
    "GoToRedBall-v0": 64,
    "GoToRedBallGrey-v0": 64,
    "GoToRedBallNoDists-v0": 64,
    "GoToRedBlueBall-v0": 64,
    "GoToSeqS5R2-v0": 400,
    "KeyCorridorS3R1-v0": 270,
    "KeyCorridorS3R2-v0": 270,
    "MoveTwoAcrossS5N2-v0": 400,
    "OneRoomS8-v0": 64,
    "OpenDoor-v0": 576,
    "OpenDoorColor-v0": 576,
    "OpenDoorLoc-v0": 576,
    "OpenDoorsOrderN2-v0": 720,
    "OpenDoorsOrderN4-v0": 720,
    "OpenRedBlueDoors-v0": 720,
    "OpenRedDoor-v0": 50,
    "OpenTwoDoors-v0": 720,
    "PickupAbove-v0": 288,
    "PickupDist-v0": 49,
    "PickupLoc-v0": 64,
    "PutNextLocal-v0": 128,
    "PutNextLocalS5N3-v0": 50,
    "PutNextLocalS6N4-v0": 72,
    "PutNextS4N1-v0": 128,
    "PutNextS5N1-v0": 200,
    "UnlockLocal-v0": 576,
    "UnlockLocalDist-v0": 576,
    "UnlockPickup-v0": 72,
    "UnlockPickupDist-v0": 72,
}
HELDOUT = (  # each combines what the others teach apart, and says nothing in words the others lack
    "OpenTwoDoors-v0",  # any two colours in turn; elsewhere the order is that of one pair, or one sentence in three
    "PutNextLocal-v0",  # a larger room and more objects than its relatives
    "UnlockPickup-v0",  # a key, a door and an object
)

VOCABULARY = (
    "<pad>",
    "a", "the", ",", "after", "and", "then", "you",  # articles, and what joins instructions
    "go", "open", "pick", "put", "next", "to", "up",
    "ball", "box", "door", "key", "object",
    "blue", "green", "grey", "purple", "red", "yellow",
    "behind", "front", "in", "left", "of", "on", "right", "your",
)  # fmt: skip
"""The words of BabyAI's missions. A word's token id is its place here, and 0 pads a mission to `MISSION_LENGTH`."""

MISSION_LENGTH = 24  # tokens; "go to a red ball and go to ..., then go to ... and go to ..." has them all

_TOKEN_IDS = {word: number for number, word in enumerate(VOCABULARY)}


class BabyAI(Domain):
    name = "babyai"
    extra = "babyai"
    tasks = tuple(STEP_LIMITS)
    splits = {  # noqa: RUF012
        "train": tuple(name for name in STEP_LIMITS if name not in HELDOUT),
        "heldout": HELDOUT,
        "all": tuple(STEP_LIMITS),
    }

    def make(self, name: str, render_mode: str | None = None) -> gym.Env:
        self.require("minigrid")
        return self.registered("TokenisedBabyAI", name, STEP_LIMITS[name], render_mode)

    def expert(self, name: str, env: gym.Env) -> Policy:
        return _RobustBot(self.require("minigrid.utils.baby_ai_bot").BabyAIBot, cast("TokenisedBabyAI", env.unwrapped))

    def require(self, module: str) -> ModuleType:
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # minigrid imports pygame, which greets on stdout
        return super().require(module)


def tokenise(mission: str) -> np.ndarray:
    """The token ids of a mission, (MISSION_LENGTH,), padded with 0.

    Raises:
        ValueError: if a word is not in `VOCABULARY`, or if there are too many.
    """
    words = re.findall(r"[^\s,]+|,", mission.lower())
    unknown = [word for word in words if word not in _TOKEN_IDS or word == VOCABULARY[0]]
    if unknown:
        raise ValueError(f"The mission '{mission}' has '{unknown[0]}', which is not in BabyAI's vocabulary.")
    if len(words) > MISSION_LENGTH:
        raise ValueError(
            f"The mission '{mission}' has {len(words)} words where at most {MISSION_LENGTH} were expected."
        )
    tokens = np.zeros(MISSION_LENGTH, np.int64)
    tokens[: len(words)] = [_TOKEN_IDS[word] for word in words]
    return tokens


class TokenisedBabyAI(gym.Env):
    """A BabyAI level whose mission is observed as token ids, so that an observation is arrays alone."""

    metadata = {"render_modes": ["human", "rgb_array"], "render_fps": 10}  # noqa: RUF012
    observation_space = gym.spaces.Dict(
        {
            "image": gym.spaces.Box(0, 255, (7, 7, 3), np.uint8),
            "direction": gym.spaces.Discrete(4),
            "mission": gym.spaces.Box(0, len(VOCABULARY) - 1, (MISSION_LENGTH,), np.int64),
        }
    )
    action_space = gym.spaces.Discrete(7)

    def __init__(self, name: str, render_mode: str | None = None):
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
        import minigrid  # noqa: F401 (registers the levels)

        self.render_mode = render_mode
        self.level: Any = gym.make(f"BabyAI-{name}", render_mode=render_mode, disable_env_checker=True).unwrapped
        self.last_action: int | None = None
        """What was executed at the last step, which need not be what the expert had asked for."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.last_action = None
        with contextlib.redirect_stdout(io.StringIO()):  # levels report there each draw that they reject
            observation, _ = self.level.reset(seed=seed)
        self._mission = tokenise(observation["mission"])
        return self._observation(observation), {"success": 0.0}

    def step(self, action: int):
        self.last_action = int(action)
        observation, reward, terminated, truncated, _ = self.level.step(self.last_action)
        earned = float(reward)
        return (
            self._observation(observation),
            earned,
            terminated,
            truncated,
            {"success": float(terminated and earned > 0)},
        )

    def render(self):
        return self.level.render()

    def close(self):
        self.level.close()

    def _observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        return {
            "image": observation["image"],
            "direction": np.int64(observation["direction"]),
            "mission": self._mission.copy(),
        }


class _RobustBot:
    """BabyAI's own planner, which also goes on where it gives up.

    The planner follows what was executed, and plans to undo what it had not asked for. It fails an assertion, replans
    for ever or believes the mission done where that leads too far astray. It is then replaced by one that starts from
    the present state, with empty hands as at the beginning of an episode. Where that one fails too, the agent wanders.
    """

    def __init__(self, planner: type, env: TokenisedBabyAI):
        self._planner, self._env = planner, env
        self._rng = np.random.default_rng(0)
        self._bot: Any = None
        self._seen = None  # the cells seen so far, which outlive a planner

    def __call__(self, observation: dict[str, Any]) -> np.int64:
        actions = self._env.level.actions
        action = None
        if self._bot is not None:
            action = self._replan(self._env.last_action)
        if action is None and self._env.last_action is not None and self._env.level.carrying:
            return np.int64(self._empty_hands())
        if action is None:
            self._bot = self._planner(self._env.level)
            self._bot.stack = _Plan(self._bot.stack)
            if self._seen is not None:
                self._bot.vis_mask = self._seen
            action = self._replan(None)
        if action is None:  # never toggles, which would destroy a box
            action = self._rng.choice([actions.left, actions.right, actions.forward, actions.forward])
        return np.int64(action)

    def _replan(self, action_taken: int | None) -> int | None:
        """The planner's action, or None where it has none to offer and is discarded."""
        self._bot.stack.looks = 0
        try:
            action = self._bot.replan(action_taken)
        except Exception:  # noqa: BLE001 (it fails assertions, and in the ways of any code in a state it does not expect)
            action = None
        if action is None or action == self._env.level.actions.done:
            self._seen, self._bot = self._bot.vis_mask, None
            return None
        return action

    def _empty_hands(self) -> int:
        actions = self._env.level.actions
        in_front = self._env.level.grid.get(*self._env.level.front_pos)
        return actions.drop if in_front is None else self._rng.choice([actions.left, actions.right])


class _Plan(list):
    """A planner's stack of subgoals. It looks at the last one before each attempt, and not for ever."""

    LIMIT = 1000
    looks = 0

    def __getitem__(self, index):
        self.looks += 1
        if self.looks > self.LIMIT:
            raise RecursionError("The planner goes round in circles.")
        return super().__getitem__(index)


DOMAIN = BabyAI()
