"""What the README tells a new user to type works as it stands."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def test_a_dataset_written_as_the_readme_says_can_be_fine_tuned_on(tmp_path):
    example = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "EpisodeBuffer" in block)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari asks for an author
        exec(example, {})
    command = re.search(r"\$ python -m (eva_rl.finetune task=minari/\S+)", README).group(1).split()
    quick = ["steps=2", "episodes=1", "training.batch_size=2", f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run([sys.executable, "-m", *command, *quick], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "result.json").is_file()


def test_every_setting_the_readme_names_in_a_command_exists():
    from eva_rl import config

    schemas = {
        "finetune": config.FinetuneConfig,
        "evaluate": config.EvaluateConfig,
        "pretrain": config.PretrainConfig,
        "merge": config.MergeConfig,
        "collect": config.CollectConfig,
        "tasks": config.TaskListConfig,
    }
    commands = re.findall(r"python -m eva_rl\.(\w+)([^`\n|]*)", README)
    assert {name for name, _ in commands} >= schemas.keys()
    for name, arguments in commands:
        for key in re.findall(r"(?:^| )'?([a-z_.]+)=", arguments):
            known = key in config.setting_names(schemas[name]) or key == "study" or key.startswith("hydra.")
            assert known, f"{name} {key}"
