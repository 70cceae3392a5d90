"""A fine-tuned policy in a loop of your own: `python examples/control_loop.py RUN ENVIRONMENT [EPISODES]`.

RUN is a run's folder or a merged checkpoint, ENVIRONMENT the id of the environment it was fine-tuned for. With a robot,
your driver takes the place of `env.step`: an observation comes in, an action goes out. Where nothing is earned, leave
out `observe`.
"""

import sys

import gymnasium as gym

import eva_rl


def run_episode(policy, env, seed: int) -> float:
    """The undiscounted return of one episode."""
    observation, _ = env.reset(seed=seed)
    policy.reset()  # or policy.reset(target_return=200.0)
    total, over = 0.0, False
    while not over:
        action = policy.act(observation)
        observation, reward, terminated, truncated, _ = env.step(action)
        policy.observe(reward)
        total, over = total + float(reward), terminated or truncated
    return total


if __name__ == "__main__":
    _, path, environment, *episodes = sys.argv
    policy = eva_rl.load_policy(path)
    env = gym.make(environment)
    for seed in range(int(episodes[0]) if episodes else 3):
        print(f"episode {seed}: return {run_episode(policy, env, seed):.2f}")
    env.close()
