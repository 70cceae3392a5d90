"""A checkpoint, with or without an adapter, in a task or a split: `python -m eva_rl.evaluate checkpoint=... task=...`."""

from eva_rl.config import EvaluateConfig, entry_point


@entry_point(EvaluateConfig, "evaluate", "eva_rl.configs.evaluate")
def main(config: EvaluateConfig) -> None:
    from eva_rl.jobs.evaluation import evaluate

    evaluate(config)


if __name__ == "__main__":
    main()
