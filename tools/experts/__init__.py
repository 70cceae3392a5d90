"""Policies trained once, which ship with the domains as their experts."""
