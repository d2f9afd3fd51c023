"""Ranks: how they form a group, share the shards and add up what each has."""
