"""A run or a checkpoint -> a Hugging Face repository with a model card: `python -m eva_rl.publish run=... repo=owner/name`."""

from eva_rl.config import PublishConfig, entry_point


@entry_point(PublishConfig, "publish")
def main(config: PublishConfig) -> None:
    from eva_rl.policy import publish

    print(publish(config.run, config.repo, config.base, config.private))


if __name__ == "__main__":
    main()
