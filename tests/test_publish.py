"""What is published is read back as it was; a local folder stands in for the Hub."""

import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects

import eva_rl
from eva_rl.files import read_json


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder `owner/name` for each repository."""
    root = tmp_path / "hub"

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        (root / repo_id).mkdir(parents=True, exist_ok=True)

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)

    def snapshot_download(repo_id, *, allow_patterns):
        if not (root / repo_id).is_dir():
            raise FileNotFoundError(repo_id)
        target = tmp_path / "cache" / repo_id
        target.mkdir(parents=True, exist_ok=True)
        files = [str(path.relative_to(root / repo_id)) for path in (root / repo_id).iterdir()]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            shutil.copy(root / repo_id / name, target / name)
        return str(target)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return root


def acts(policy: eva_rl.load_policy) -> np.ndarray:
    return np.stack([policy.act(np.full(3, step, np.float32)) for step in range(8)])


def test_a_base_and_its_adapter_go_to_the_hub_and_come_back(run, base, hub, tmp_path, monkeypatch):
    words = ["task=dummy/Steps-v0", "adapter=lora", "steps=3", "training.learning_rate=0.1", "demonstrations=4"]
    status, _, err = run("finetune", *words, f"base={base}", "episodes=2", "workers=0", f"run_dir={tmp_path / 'mine'}")
    assert status == 0, err
    expected = acts(eva_rl.load_policy(tmp_path / "mine"))

    status, _, err = run("publish", f"run={tmp_path / 'mine'}", "repo=me/adapter")
    assert status == 1
    assert "belongs to the base" in err
    assert "base=owner/name" in err
    assert not hub.exists()  # nothing was pushed

    assert run("publish", f"run={base}", "repo=me/base")[:2] == (0, "https://huggingface.co/me/base\n")
    status, out, err = run("publish", f"run={tmp_path / 'mine'}", "repo=me/adapter", "base=me/base")
    assert status == 0, err
    assert out == "https://huggingface.co/me/adapter\n"
    names = {path.name for path in (hub / "me/adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "eva_rl.json", "README.md"}
    assert {path.name for path in (hub / "me/base").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert read_json(hub / "me/adapter/adapter_config.json")["base_model_name_or_path"] == "me/base"
    card = huggingface_hub.ModelCard.load(hub / "me/adapter/README.md")
    assert card.data.base_model == "me/base"
    assert "dummy/Steps-v0" in card.text
    assert "| success rate" in card.text
    assert "demonstrations 4" in card.text

    shutil.rmtree(base)  # as on another's machine
    shutil.rmtree(tmp_path / "mine")
    np.testing.assert_allclose(acts(eva_rl.load_policy("me/adapter")), expected, atol=1e-6)
    status, _, err = run("evaluate", "adapter=me/adapter", "task=dummy/Steps-v0", "episodes=1", "workers=0")
    assert status == 0, err
    status, _, err = run("merge", "run=me/adapter", f"output={tmp_path / 'merged'}")
    assert status == 0, err
    np.testing.assert_allclose(acts(eva_rl.load_policy(tmp_path / "merged")), expected, atol=1e-5)
    status, _, err = run("finetune", *words, "base=me/base", "episodes=0", f"run_dir={tmp_path / 'again'}")
    assert status == 0, err


def test_what_cannot_be_published_is_said_in_one_sentence(run, base, hub, monkeypatch):
    for repo in ("mine", "a/b/c", "me/"):
        status, _, err = run("publish", f"run={base}", f"repo={repo}")
        assert status == 1
        assert f"repo must be owner/name, got {repo}." in err

    def refused(*_, **__):
        raise ConnectionError("401 not\nlogged in")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refused)
    status, _, err = run("publish", f"run={base}", "repo=me/base")
    assert status == 1
    assert "'me/base' can't be published (ConnectionError: 401 not logged in)" in err
    (base / "model.safetensors").write_bytes(b"half")
    status, _, err = run("publish", f"run={base}", "repo=me/base")
    assert status == 1
    assert "'model.safetensors' can't hold" in err
