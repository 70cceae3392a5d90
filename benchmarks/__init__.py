"""Measurements that are committed with the command that made them; none of them runs in the tests."""
