"""What tests of several folders share."""

import sys

import hypothesis
import pytest

# How long an example takes says how busy the machine is, and no more.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")


@pytest.fixture
def run(monkeypatch, capfd):
    """Run the command line in this process as `dsr-tool` would: exit code, stdout, stderr."""

    def call(*arguments):
        from dsr_tool import cli

        monkeypatch.setattr(sys, "argv", ["dsr-tool", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capfd.readouterr()
        return ended.value.code, captured.out, captured.err

    return call
