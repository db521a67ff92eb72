"""What tests of several folders share."""

import sys

import pytest


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
