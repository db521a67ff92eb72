"""Settings and fixtures shared by the tests of several folders."""

import sys

import hypothesis
import pytest

# The time of an example depends on how busy the machine is, so it must not fail a test.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")


@pytest.fixture
def run(monkeypatch, capfd):
    """Returns a function that runs the command line in this process. It returns exit code, stdout and stderr."""

    def call(*arguments):
        from dsr_tool import cli

        monkeypatch.setattr(sys, "argv", ["dsr-tool", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capfd.readouterr()
        return ended.value.code, captured.out, captured.err

    return call
