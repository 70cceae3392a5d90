"""An exported policy in a loop of your own, without this project: `python examples/act_onnx.py policy.onnx ENVIRONMENT`."""

import sys

import gymnasium as gym
import numpy as np
import onnxruntime

session, env = onnxruntime.InferenceSession(sys.argv[1]), gym.make(sys.argv[2])
notes = session.get_modelmeta().custom_metadata_map
context, keep = int(notes["context"]), int(notes["keep"])
types = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(uint8)": "uint8", "tensor(int64)": "int64"}
window = {i.name: np.zeros(i.shape, types[i.type]) for i in session.get_inputs()}  # `context` steps of each, and `step`
(observation, _), step, over, wanted = env.reset(seed=0), -1, False, float(notes["return_to_go"] or 0)
while not over:
    if step == context - 1:  # full: it starts anew with its later half
        for rows in (rows for name, rows in window.items() if name != "step"):
            rows[:keep] = rows[context - keep :].copy()
        step = keep - 1
    step += 1
    now = {"observations": observation, "returns_to_go": wanted}
    if isinstance(observation, dict):  # each of its arrays is an input
        now = {"returns_to_go": wanted} | {f"observations.{key}": value for key, value in observation.items()}
    window["step"][()] = step
    for name in window.keys() & now.keys():
        window[name][step] = now[name]
    action = np.asarray(session.run(["action"], window)[0])
    observation, reward, terminated, truncated, _ = env.step(action if action.ndim else int(action))
    for name, value in (("actions", action), ("rewards", reward)):
        if name in window:
            window[name][step] = value
    wanted, over = wanted - float(reward), terminated or truncated
    print(action, reward)
