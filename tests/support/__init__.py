"""What tests share: helpers, made data, fixtures.

`from support.babble import Babble` finds it: tests/ is on pytest's path (`pythonpath` in pyproject.toml).
"""
