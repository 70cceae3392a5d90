"""Files of strangers: what a dataset, a run, an adapter or a checkpoint names is never called for being named."""

import contextlib
import json
import sys
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer

from eva_rl.adapter.safe import check_adapter_config
from eva_rl.config import instantiate
from eva_rl.data import load_dataset
from eva_rl.data.environments import approved, environment_of
from eva_rl.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*env_spec is None", "ignore:`eval_env` is set to None")


def rewrite(datasets_root: Path, dataset_id: str = "dummy/random-v0", **changes: object) -> None:
    """Change the specification in a dataset's metadata."""
    path = datasets_root / dataset_id / "data/metadata.json"
    metadata = json.loads(path.read_text())
    spec = json.dumps(json.loads(metadata["env_spec"]) | changes)
    path.write_text(json.dumps(metadata | {"env_spec": spec, "eval_env_spec": spec}))


@pytest.fixture
def command(tmp_path) -> dict:
    """A specification that would make a folder, and the folder."""
    return {"entry_point": "os:mkdir", "kwargs": {"path": str(tmp_path / "ran")}}


@pytest.mark.parametrize("id", ["Stranger-v0", "ContinuousDummy-v0", "CartPole-v1", "conftest:Stranger-v0"])
def test_a_dataset_can_not_have_a_command_run(make_dataset, datasets_root, tmp_path, command, id):
    make_dataset()
    rewrite(datasets_root, id=id, **command)
    with pytest.raises(UserError, match=r"would run 'os:mkdir': set trust_environment=true .*or episodes=0"):
        environment_of("dummy/random-v0")
    assert not (tmp_path / "ran").exists()


def test_a_trusted_dataset_makes_what_it_names(make_dataset, datasets_root):
    make_dataset()
    rewrite(datasets_root, id="Unregistered-v0")
    with pytest.raises(UserError, match="is not registered in gymnasium"):
        environment_of("dummy/random-v0")
    assert environment_of("dummy/random-v0", trust=True).spec.id == "Unregistered-v0"


@pytest.mark.parametrize("spaces", [("observation_space",), ("action_space",), ("observation_space", "action_space")])
def test_a_dataset_without_spaces_does_not_have_its_environment_made(
    make_dataset, datasets_root, tmp_path, command, spaces
):
    make_dataset()
    rewrite(datasets_root, **command)
    path = datasets_root / "dummy/random-v0/data/metadata.json"
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in metadata.items() if name not in spaces}))
    for use in (lambda: load_dataset("dummy/random-v0", "mine"), lambda: environment_of("dummy/random-v0")):
        with pytest.raises(UserError, match=f"does not state '{spaces[0]}'"):
            use()
    assert not (tmp_path / "ran").exists()


def test_a_module_is_not_imported_because_a_dataset_names_it(make_dataset, datasets_root, tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text("import gymnasium\ngymnasium.register('S-v0', entry_point='stranger:E')")
    monkeypatch.syspath_prepend(tmp_path)
    make_dataset()
    for changes in ({"id": "S-v0"}, {"id": "stranger:S-v0"}):
        rewrite(datasets_root, entry_point="stranger:E", **changes)
        with pytest.raises(UserError, match="is not registered in gymnasium"):
            environment_of("dummy/random-v0")
    assert "stranger" not in sys.modules


def test_an_environment_of_a_script_is_refused_in_a_sentence(make_dataset, datasets_root, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # as in a script
    make_dataset()
    rewrite(datasets_root, id="Mine-v0", entry_point="__main__:MyEnv")
    with pytest.raises(UserError, match="is not registered in gymnasium"):
        environment_of("dummy/random-v0")


class Own(gym.Env):
    observation_space = action_space = gym.spaces.Box(-1, 1, (2,))


class OwnWrapper(gym.Wrapper):
    pass


def test_an_environment_registered_as_a_class_keeps_the_wrappers_of_its_package(
    make_dataset, datasets_root, monkeypatch
):
    monkeypatch.setitem(gym.registry, "Own-v0", gym.envs.registration.EnvSpec("Own-v0", Own))
    make_dataset()
    for module, kept in ((__name__, True), ("conftest", False)):
        monkeypatch.setattr(sys.modules["conftest"], "OwnWrapper", OwnWrapper, raising=False)
        wrapper = {"name": "OwnWrapper", "entry_point": f"{module}:OwnWrapper", "kwargs": {}}
        spec = gym.envs.registration.EnvSpec("Own-v0")
        spec.additional_wrappers = (gym.envs.registration.WrapperSpec(**wrapper),)
        with contextlib.nullcontext() if kept else pytest.warns(UserWarning, match="is made without OwnWrapper"):
            assert bool(approved(spec, "dummy/random-v0").additional_wrappers) == kept


def test_an_installed_package_of_environments_registers_its_own(make_dataset, datasets_root, monkeypatch):
    pytest.importorskip("minigrid")
    make_dataset()
    id, entry_point = "MiniGrid-Empty-5x5-v0", "minigrid.envs:EmptyEnv"
    rewrite(datasets_root, id=id, entry_point=entry_point, kwargs={"size": 5})
    assert environment_of("dummy/random-v0").spec.id == id
    rewrite(datasets_root, id=id, entry_point="minigrid.core.grid:Grid.decode", kwargs={})
    with pytest.raises(UserError, match="is registered in gymnasium otherwise"):
        environment_of("dummy/random-v0")


def test_an_environment_whose_keywords_name_another_is_refused(make_dataset, datasets_root):
    make_dataset()
    rewrite(datasets_root, id="GymV21Environment-v0", entry_point=None, kwargs={"env_id": "stranger:S-v0"})
    with pytest.raises(UserError, match="set trust_environment=true"):
        environment_of("dummy/random-v0")


def test_a_dataset_of_this_projects_domains_makes_its_task_and_nothing_else(make_dataset, datasets_root):
    make_dataset()
    rewrite(
        datasets_root, id="gym/CartPole-v1", entry_point="eva_rl.envs.gym:GymnasiumTask", kwargs={"name": "CartPole-v1"}
    )
    assert environment_of("dummy/random-v0").spec.id == "gym/CartPole-v1"
    for changes in (
        {"kwargs": {"name": "stranger:S-v0"}},
        {"entry_point": "eva_rl.envs.gym:gym.make", "kwargs": {"name": "CartPole-v1"}},
        {"entry_point": "eva_rl.files:make_folder", "kwargs": {"name": "CartPole-v1"}},
    ):
        rewrite(datasets_root, **{"entry_point": "eva_rl.envs.gym:GymnasiumTask"} | changes)
        with pytest.raises(UserError, match="set trust_environment=true"):
            environment_of("dummy/random-v0")


WRAPPER = {"name": "W", "entry_point": "", "kwargs": {}}


@pytest.mark.parametrize(
    ("entry_point", "kwargs"),
    [
        ("os:mkdir", {"path": "ran"}),
        ("gymnasium.wrappers.rendering:RecordVideo", {"video_folder": "ran"}),
        ("gymnasium.wrappers:common.gym.make", {}),
        ("gymnasium.wrappers.common:TimeLimit", None),
    ],
)
def test_foreign_wrappers_are_left_out_and_named(
    make_dataset, datasets_root, tmp_path, monkeypatch, entry_point, kwargs
):
    monkeypatch.chdir(tmp_path)
    make_dataset()
    wrapper = WRAPPER | {"entry_point": entry_point, "kwargs": kwargs}
    rewrite(datasets_root, additional_wrappers=[wrapper])
    with pytest.warns(UserWarning, match="is made without W .*scores may differ"):
        env = environment_of("dummy/random-v0")
    assert env.spec.additional_wrappers == ()
    assert not (tmp_path / "ran").exists()


def test_gymnasiums_wrappers_of_what_is_seen_and_done_are_kept(make_dataset, datasets_root):
    wrapper = {
        "name": "RescaleObservation",
        "entry_point": "gymnasium.wrappers.transform_observation:RescaleObservation",
    }
    make_dataset()
    rewrite(datasets_root, additional_wrappers=[wrapper | {"kwargs": {"min_obs": 0.0, "max_obs": 1.0}}])
    assert environment_of("dummy/random-v0").observation_space.high.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "target", ["os.mkdir", "peft.PeftModel.from_pretrained", "peft.AutoPeftModel", "builtins.eval", 3]
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_runs_settings_make_nothing_but_configs_of_peft(tmp_path, target, nested):
    own = {"_target_": target, "path": str(tmp_path / "ran")}
    with pytest.raises(UserError, match="must be a config class of peft"):
        instantiate({"_target_": "peft.LoraConfig", "r": 2, "eva_config": own} if nested else own)
    assert not (tmp_path / "ran").exists()


CALL = {"_target_": "os.mkdir", "path": "ran"}
MADE = "${oc.create:{_target_: os.mkdir, path: ran}}"
"""A text that becomes a call when it is resolved."""


@pytest.mark.parametrize("target", ["torch.optim.AdamW", "peft.LoraConfig"])
@pytest.mark.parametrize("nested", [lambda text: text, lambda text: [{"a": text}]])
def test_a_runs_settings_make_nothing_by_interpolation(tmp_path, monkeypatch, target, nested):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="must be plain values"):
        instantiate({"_target_": target, "_partial_": True, "betas": nested(MADE), "r": nested(MADE)})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"hydra": {"callbacks": {"c": CALL}}}, "torch.optim.AdamW, got os.mkdir"),
        ({"hydra": {"launcher": {"_target_": "hydra.utils.get_method", "path": "os"}}}, "got hydra.utils"),
        ({"hydra": {"callbacks": MADE}}, "${oc.create:"),
        ({"hydra": {"callbacks": "${x}"}}, "must hold plain values"),
        (
            {"hydra": {"callbacks": "${${x}:{_target_: os.mkdir, path: ran}}"}, "x": "oc.create"},
            "must hold plain values",
        ),
        (
            {
                "hydra": {
                    "callbacks": {
                        "c": {"_target_": "hydra_plugins.hydra_joblib_launcher._core.logging.os.mkdir", "path": "ran"}
                    }
                }
            },
            "got hydra_plugins",
        ),
        ({"optimizer": {"config": {"betas": f"\\{MADE}"}}}, "${oc.create:"),
        ({"adapter": {"config": {"r": f"${{share:1,{MADE}}}"}}}, "${share:1"),
        ({"adapter": {"start": "eva_rl.adapter.starts.${x}"}}, "for start"),
        ({"hydra": {"sweeper": {"params": {"adapter.start": "os.system"}}}}, "got os.system"),
        ({"hydra": {"searchpath": ["file://elsewhere"]}}, "hydra.searchpath"),
        ({"adapter": {"config": CALL}}, "torch.optim.AdamW, got os.mkdir"),
        ({"adapter": {"start": "os.system"}}, "got os.system"),
    ],
)
@pytest.mark.parametrize("flag", [["--config-dir", "run"], ["--config-dir=run"], ["-cd", "run"]])
def test_a_folder_of_settings_has_nothing_called(run, tmp_path, settings, sentence, flag):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(json.dumps({"defaults": ["entry", "_self_"], **settings}))
    status, _, err = run("finetune", *flag, "--config-name", "config")
    assert status == 1
    assert sentence in err
    assert "Traceback" not in err
    assert not (tmp_path / "ran").exists()


def test_linked_folders_of_settings_are_looked_through(tmp_path):
    from eva_rl.config.foreign import check_config_folders

    for name in ("run", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "run/adapter").symlink_to("../other")
    (tmp_path / "other/back").symlink_to("../run")  # a circle
    (tmp_path / "other/mine.yaml").write_text(json.dumps({"config": CALL}))
    with pytest.raises(UserError, match=r"torch.optim.AdamW, got os.mkdir"):
        check_config_folders(["--config-dir", str(tmp_path / "run")])


def test_a_folder_of_settings_may_refer_to_other_settings(tmp_path):
    from eva_rl.config.foreign import check_config_folders

    settings = {
        "run_dir": "mine/${adapter.name}-${seed}",
        "steps": "${share:0.5,${adapter.steps}}",
        "episodes": "${.steps}",
    }
    launcher = {"_target_": "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"}
    (tmp_path / "mine.yaml").write_text(json.dumps(settings | {"hydra": {"launcher": launcher}}))
    check_config_folders(["--config-dir", str(tmp_path)])


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "os.system"},
        {"peft_type": ["LORA"]},
        {"peft_type": {"x": 1}},
        {"peft_type": "XLORA", "adapters": {"a": "elsewhere"}},
        {"peft_type": "PROMPT_TUNING", "tokenizer_name_or_path": "stranger/tokenizer"},
        {"peft_type": "LORA", "megatron_config": {"a": 1}, "megatron_core": "stranger"},
        {"peft_type": "LORA", "eva_config": {"_target_": "os.system"}},
        [],
    ],
)
def test_an_adapter_of_another_kind_is_refused_before_peft_reads_it(tmp_path, settings):
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"adapter_config.json"):
        check_adapter_config(tmp_path)


def test_a_checkpoint_names_nothing_to_be_called(base, tmp_path):
    from eva_rl.model import load_base

    config = json.loads((base / "config.json").read_text())
    for changed in (
        config | {"architecture": config["architecture"] | CALL},
        config | {"interfaces": [config["interfaces"][0] | CALL]},
    ):
        (base / "config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match="incomplete or of another version"):
            load_base(str(base))
    assert not (tmp_path / "ran").exists()


def test_fine_tuning_runs_nothing_that_a_dataset_names(run, base, datasets_root, tmp_path, command):
    box = gym.spaces.Box
    episode = EpisodeBuffer(
        observations=np.zeros((6, 3), np.float32),
        actions=np.zeros((5, 2), np.float32),
        rewards=np.ones(5),
        terminations=np.arange(5) == 4,
        truncations=np.zeros(5, bool),
    )
    minari.create_dataset_from_buffers(
        "mine/logs-v0", [episode], observation_space=box(-1, 1, (3,)), action_space=box(-1, 1, (2,)),
        algorithm_name="a", author="a", author_email="a", code_permalink="a", description="a",
    )  # fmt: skip
    path = datasets_root / "mine/logs-v0/data/metadata.json"
    spec = json.loads(gym.spec("CartPole-v1").to_json()) | command
    path.write_text(json.dumps(json.loads(path.read_text()) | {"env_spec": json.dumps(spec)}))
    arguments = [f"base={base}", "task=minari/mine/logs-v0", "steps=1", "adapter=lora", "workers=0"]
    status, _, err = run("finetune", *arguments, "episodes=1", f"run_dir={tmp_path / 'a'}")
    assert status == 1
    assert "trust_environment=true" in err
    assert not (tmp_path / "a").exists()
    status, _, err = run("finetune", *arguments, "episodes=0", f"run_dir={tmp_path / 'b'}")
    assert status == 0, err
    assert not (tmp_path / "ran").exists()
