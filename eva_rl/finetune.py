"""A pretrained base and a few trajectories -> an adapter and its score: `python -m eva_rl.finetune task=...`."""

from eva_rl.config import FinetuneConfig, entry_point


def _splits() -> dict[str, tuple[str, ...]]:
    from eva_rl.envs import splits

    return splits()


@entry_point(FinetuneConfig, "finetune", splits=_splits)
def main(config: FinetuneConfig) -> None:
    from eva_rl.jobs.finetuning import finetune

    finetune(config)


if __name__ == "__main__":
    main()
