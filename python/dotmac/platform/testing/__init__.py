"""Real servers for tests: put `pytest_plugins = ["dotmac.platform.testing.plugin"]` in `conftest.py`."""
