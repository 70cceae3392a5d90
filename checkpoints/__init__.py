"""The bases that come with the code: `eva_rl.checkpoints`, of which a wheel holds the default one."""
