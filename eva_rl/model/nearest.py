"""Which of a base's tasks a new one is nearest to, by the vectors that the base has of its tasks."""

from __future__ import annotations

import torch

from eva_rl.batch import Batch
from eva_rl.model.action_model import ActionModel


def task_vector(model: ActionModel, interface: str) -> tuple[str, ...]:
    """The name of the module that holds the vector in force, or none where the interface has no vectors of tasks."""
    return (f"embedders.{interface}.task",) if model.interfaces[interface].tasks else ()


@torch.no_grad()
def begin_with_nearest(model: ActionModel, batch: Batch) -> str | None:
    """Put the vector in force that predicts the batch best: one of the base's tasks', or the one already there.

    The one already there is that of a fine-tuned base's own task, or what pretraining made of windows of no named task.

    Returns:
        The task whose vector it is. None where the one already there is the best, or the interface has none.
    """
    embedder, tasks = model.embedder_of(batch.interface), model.interfaces[batch.interface].tasks
    if not tasks:
        return None
    vector, losses = embedder.task.weight, []
    candidates = [vector.detach().clone(), *embedder.tasks.weight.detach()]  # each (d,)
    for candidate in candidates:
        vector.copy_(candidate)
        losses.append(model.loss(batch).item())
    nearest = min(range(len(losses)), key=losses.__getitem__)
    vector.copy_(candidates[nearest])
    return tasks[nearest - 1] if nearest else None
