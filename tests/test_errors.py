"""What messages of errors look like, whatever a file says."""

import pytest

from dsr_tool.errors import FormatError, unknown_name


@pytest.mark.parametrize("cited", ["x" * 10**6, "two\nlines", "\u2028", "\x1b[2J", "\ud800", "\u202e"])
def test_a_format_error_is_one_printable_line(cited):
    message = str(FormatError(f"'net.dsr' is damaged: {cited}; fetch a whole copy."))
    assert message.startswith("'net.dsr' is damaged: ")
    assert message.endswith("; fetch a whole copy.")
    assert len(message) < 500
    assert message.isprintable()


def test_an_unknown_name_may_be_long():
    assert len(str(unknown_name("mode", "x" * 10**7, ("linear", "nearest")))) < 200
