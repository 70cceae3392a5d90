"""A task's expert -> a Minari dataset: `python -m eva_rl.collect task=metaworld/hammer-v3 episodes=40`."""

from eva_rl.config import CollectConfig, entry_point


@entry_point(CollectConfig, "collect")
def main(config: CollectConfig) -> None:
    from eva_rl.data import Recipe, collect, load_dataset
    from eva_rl.envs import expand_tasks
    from eva_rl.table import markdown

    settings = config.episodes, config.noise, config.seed, config.quality
    recipes = [Recipe(task, *settings) for task in expand_tasks(config.task)]
    rows = []
    for recipe, dataset_id in zip(recipes, collect(recipes, config.workers), strict=True):
        statistics = load_dataset(dataset_id, recipe.task).statistics()
        success = None if statistics.success_rate is None else f"{statistics.success_rate:.2f}"
        returns = f"{statistics.return_mean:.1f}", f"{statistics.return_max:.1f}"
        rows.append((dataset_id, statistics.episodes, success, *returns))
    print(markdown(["Minari dataset", "episodes", "success rate", "mean return", "best return"], rows))


if __name__ == "__main__":
    main()
