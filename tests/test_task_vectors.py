"""A base may learn a vector for each of its tasks; fine-tuning begins with the nearest one."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import eva_rl
from eva_rl.batch import Batch
from eva_rl.data import WindowSampler, load_dataset
from eva_rl.model import load_base, policy_in, policy_of, save_base
from eva_rl.policy.load import find_trained


@pytest.fixture
def told(run, dummy_domain, tmp_path) -> Path:
    """A tiny checkpoint with a vector for each task of the dummy domain."""
    arguments = ["model=tiny", "task=dummy/all", "demonstrations=4", "steps=4", "training.batch_size=4"]
    status, _, err = run("pretrain", *arguments, "task_vectors=true", f"run_dir={tmp_path / 'told'}")
    assert status == 0, err
    return tmp_path / "told" / "model"


def one_interface(model):
    [name] = model.interfaces
    return name, model.interfaces[name], model.embedders[name]


def random_batch(name: str, spec) -> Batch:
    """Three windows of two steps."""
    return Batch(
        observations=torch.rand(3, 2, spec.observation_size),
        actions=torch.rand(3, 2, spec.action_size),
        returns_to_go=torch.ones(3, 2),
        rewards=torch.zeros(3, 2),
        mask=torch.ones(3, 2, dtype=torch.bool),
        interface=name,
    )


def test_a_base_has_a_vector_for_each_task_and_batches_name_their_windows_tasks(told):
    _, spec, embedder = one_interface(load_base(str(told)).model)
    assert spec.tasks == ("dummy/Steps-v0", "dummy/Broken-v0")
    assert embedder.tasks.weight.shape == (2, 32)
    assert embedder.task.weight.any()  # windows that name no task trained it


def test_named_windows_are_of_the_task_they_name_but_for_a_tenth(datasets_root, make_dataset):
    sets = []
    for seed in range(2):
        make_dataset(f"dummy/number{seed}-v0", seed=seed)
        sets.append(load_dataset(f"dummy/number{seed}-v0", "dummy"))
    sampler = WindowSampler(sets, "dummy", 3, 512, 0, named=True)
    batch, plain = sampler.batch(0), WindowSampler(sets, "dummy", 3, 512, 0).batch(0)
    assert plain.tasks is None
    torch.testing.assert_close(batch.observations, plain.observations)
    assert 0.05 < (batch.tasks == -1).float().mean() < 0.15
    first = [{tuple(row.tolist()) for row in own.observations} for own in sets]
    for task, window in zip(batch.tasks.tolist(), batch.observations[:, 0], strict=True):
        assert task == -1 or tuple(window.tolist()) in first[task]


def test_each_window_gets_its_own_tasks_vector(told):
    model = load_base(str(told)).model
    name, spec, embedder = one_interface(model)
    batch = random_batch(name, spec)
    with torch.no_grad():
        embedder.tasks.weight.mul_(50)
        mixed = model(replace(batch, tasks=torch.tensor([0, 1, -1])))
        for row, number in enumerate([0, 1]):
            embedder.begin_task(number)
            torch.testing.assert_close(model(batch)[row], mixed[row])
        assert not torch.allclose(model(batch)[0], mixed[0])


def test_episodes_of_several_tasks_act_together_as_each_does_alone(told):
    model = load_base(str(told)).model
    name, spec, embedder = one_interface(model)
    with torch.no_grad():
        embedder.tasks.weight.mul_(50)
    names = [*spec.tasks, spec.tasks[0]]
    together = policy_in(model, name, names)
    seen = torch.rand(8, 3, spec.observation_size)
    acts = []
    for step, rows in enumerate(seen):
        if step == 5:  # the second episode has ended
            together.keep(torch.tensor([0, 2]))
        rows = rows if step < 5 else rows[[0, 2]]
        acts.append(together.act(rows, torch.ones(len(rows))))
        together.record(acts[-1], torch.zeros(len(rows)))
    embedder.begin_task(0)
    alone = policy_of(model, name)(1)
    for rows, found in zip(seen, acts, strict=True):
        wanted = alone.act(rows[:1], torch.ones(1))
        alone.record(wanted, torch.zeros(1))
        torch.testing.assert_close(found[:1], wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("adapter", ["eva", "full", "head"])
def test_fine_tuning_begins_with_the_nearest_tasks_vector_trains_it_and_keeps_it(adapter, told, run, tmp_path):
    base = load_base(str(told)).model
    name, spec, embedder = one_interface(base)
    words = ["task=dummy/Steps-v0", f"base={told}", f"adapter={adapter}", "demonstrations=2", "episodes=2", "workers=0"]
    still = ["training.learning_rate=0", "fresh_learning_rate=0", "training.weight_decay=0"]
    status, out, err = run("finetune", *words, "steps=1", *still, f"run_dir={tmp_path / 'still'}")
    assert status == 0, err
    nearest = [task for task in spec.tasks if f"tasks, {task} predicts" in out]
    wanted = embedder.tasks.weight[spec.number_of(nearest[0])] if nearest else embedder.task.weight
    first = find_trained(tmp_path / "still").model.embedders[name].task.weight
    torch.testing.assert_close(first, wanted)

    status, _, err = run("finetune", *words, "steps=3", f"run_dir={tmp_path / 'run'}")
    assert status == 0, err
    trained = find_trained(tmp_path / "run").model.embedders[name]
    assert not torch.equal(trained.task.weight, first)
    if adapter == "eva":
        torch.testing.assert_close(trained.tasks.weight, embedder.tasks.weight, atol=0, rtol=0)
    assert eva_rl.load_policy(tmp_path / "run").act(np.zeros(spec.observation_size, np.float32)).shape == (2,)


def test_the_vector_that_a_base_comes_with_stays_where_no_tasks_vector_is_nearer(told, run, tmp_path):
    base = load_base(str(told))
    name, _, embedder = one_interface(base.model)
    with torch.no_grad():
        embedder.tasks.weight.fill_(1e4)  # as far from any task as can be
    save_base(tmp_path / "far", base.model, base.tasks)
    words = ["task=dummy/Steps-v0", f"base={tmp_path / 'far'}", "adapter=full", "demonstrations=2", "episodes=0"]
    still = ["training.learning_rate=0", "fresh_learning_rate=0", "training.weight_decay=0"]
    status, out, err = run("finetune", *words, "steps=1", *still, f"run_dir={tmp_path / 'run'}")
    assert status == 0, err
    assert "no task of the base predicts the demonstrations better" in out
    torch.testing.assert_close(find_trained(tmp_path / "run").model.embedders[name].task.weight, embedder.task.weight)


def test_a_fine_tuned_tasks_own_vector_is_evaluated_and_a_bases_from_its_table(told, run, tmp_path):
    words = ["task=dummy/Steps-v0", f"base={told}", "adapter=eva", "demonstrations=2", "episodes=2", "workers=0"]
    status, _, err = run("finetune", *words, "steps=3", f"run_dir={tmp_path / 'run'}", "device=cpu")
    assert status == 0, err
    words = ["task=dummy/Steps-v0", "episodes=2", "workers=0"]
    status, _, err = run("evaluate", *words, f"adapter={tmp_path / 'run'}", f"run_dir={tmp_path / 'again'}")
    assert status == 0, err
    [tuned, again] = [json.loads((tmp_path / own / "result.json").read_text()) for own in ("run", "again")]
    assert again["tasks"]["dummy/Steps-v0"]["episode_return"]["mean"] == tuned["episode_return"]["mean"]
    status, _, err = run("evaluate", "task=dummy/all", *words[1:], f"checkpoint={told}", f"run_dir={tmp_path / 'both'}")
    assert status == 0, err


def test_a_base_without_task_vectors_has_the_weights_it_had(base):
    _, spec, embedder = one_interface(load_base(str(base)).model)
    assert spec.tasks == ()
    assert not hasattr(embedder, "tasks")
    assert not hasattr(embedder, "task")
