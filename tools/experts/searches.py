"""What each expert was searched with."""

from tools.experts.ars import Search

SEARCHES = {
    "mujoco/HalfCheetah-v5": Search(16, 8, 0.02, 0.03, horizon=250, growth=2),
    "mujoco/Hopper-v5": Search(8, 4, 0.015, 0.025, alive_bonus=1.0),
    "mujoco/InvertedDoublePendulum-v5": Search(8, 4, 0.02, 0.03),
    "mujoco/Pusher-v5": Search(16, 8, 0.02, 0.03),
    "mujoco/Walker2d-v5": Search(30, 15, 0.03, 0.025, alive_bonus=1.0, horizon=300, growth=2),
    "gym/BipedalWalker-v3": Search(16, 8, 0.03, 0.04, horizon=400, growth=3),
    "dmc/ball_in_cup-catch": Search(16, 8, 0.1, 0.3),
    "dmc/cheetah-run": Search(16, 8, 0.03, 0.05, horizon=100, growth=1),
    "dmc/finger-spin": Search(16, 8, 0.1, 0.3, horizon=150, growth=2),
    "dmc/hopper-stand": Search(16, 8, 0.1, 0.3, horizon=100, growth=1),
    "dmc/walker-walk": Search(16, 8, 0.05, 0.1, horizon=150, growth=2),
}
