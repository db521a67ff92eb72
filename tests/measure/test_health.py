"""The doctor on kernels: used, not wanted, not there."""

import pytest

from dsr_tool.measure import health as doctor
from dsr_tool.runtime.kernels import library
from dsr_tool.runtime.kernels.library import VARIABLE, Kernels


@pytest.fixture
def says(monkeypatch):
    """Returns document and text of the doctor, which looks at nothing but the kernels."""
    for name in ("_check_import", "_check_tracing"):
        monkeypatch.setattr(doctor, name, lambda *_: None)
    monkeypatch.setattr(doctor, "_devices", list)

    def call():
        document = doctor.doctor_document()
        return document, doctor.doctor_text(document)

    return call


def test_the_kernels_in_use_are_named_with_their_problems(says, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(library, "kernels", lambda: Kernels(None, "avx2", ("avx512", "avx2"), ("avx512 is damaged",)))
    document, text = says()
    assert document["kernels"]["used"] == "avx2"
    assert document["kernels"]["built"] == ["avx512", "avx2"]
    assert "avx512 is damaged" in document["problems"]
    assert "kernels: avx2 is used; built: avx512, avx2; this processor runs: " in text


def test_switching_kernels_off_is_no_problem(says, monkeypatch):
    monkeypatch.setenv(VARIABLE, "none")
    document, text = says()
    assert document["kernels"]["used"] is None
    assert document["problems"] == []
    assert "predictions run on scipy (DSR_TOOL_KERNELS=none)" in text


def test_an_unknown_instruction_set_is_a_problem(says, monkeypatch):
    monkeypatch.setenv(VARIABLE, "avx9")
    document, _ = says()
    assert "DSR_TOOL_KERNELS 'avx9' is unknown" in document["problems"][0]


def test_nothing_built_comes_with_the_remedy(says, monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(library, "kernels", lambda: library.choose("", tmp_path))
    document, text = says()
    assert "make kernels" in document["problems"][0]
    assert "built: none" in text
