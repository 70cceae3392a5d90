"""Measurements that are committed with the command that made them, none of which runs in the tests."""
