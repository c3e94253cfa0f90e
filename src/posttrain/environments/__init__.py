"""Environments: episodes of several turns, with tools or another party, whose tokens a policy can learn from."""
