"""The tasks that `task=` takes: `python -m eva_rl.tasks [domain=metaworld]`."""

from eva_rl.config import TaskListConfig, entry_point


@entry_point(TaskListConfig, "tasks")
def main(config: TaskListConfig) -> None:
    from eva_rl.envs import domains
    from eva_rl.errors import UserError, did_you_mean
    from eva_rl.table import counted

    if config.domain is not None and config.domain not in domains():
        raise UserError(f"There is no domain '{config.domain}'. {did_you_mean(config.domain, domains())}")
    for name, domain in domains().items():
        if config.domain not in (None, name):
            continue
        extra = f"pip install 'eva_rl[{domain.extra}]'"
        print(f"{name}: {counted(len(domain.tasks), 'task')} ({extra})")
        for split, members in domain.splits.items():
            print(f"  {name}/{split} ({counted(len(members), 'task')})")
        for task in domain.tasks:
            member_of = [split for split, members in domain.splits.items() if task in members]
            print(f"  {name}/{task:<32}{', '.join(member_of)}".rstrip())
    if config.domain is None:
        print("minari/<dataset id>: any Minari dataset (`minari list local`, `minari list remote`)")


if __name__ == "__main__":
    main()
