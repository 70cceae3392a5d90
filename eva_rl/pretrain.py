"""Datasets of many tasks -> a pretrained Decision Transformer: `python -m eva_rl.pretrain task=metaworld/mt40`."""

from eva_rl.config import PretrainConfig, entry_point


@entry_point(PretrainConfig, "pretrain")
def main(config: PretrainConfig) -> None:
    from eva_rl.jobs.pretraining import pretrain

    pretrain(config)


if __name__ == "__main__":
    main()
