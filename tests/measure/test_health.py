"""What the doctor says of the kernels."""

import pytest

from dsr_tool.measure import health as doctor
from dsr_tool.runtime.kernels import library
from dsr_tool.runtime.kernels.library import VARIABLE, Kernels


@pytest.fixture
def says(monkeypatch):
    """The document and the text of the doctor, with nothing looked at but the kernels."""
    for name in ("_import", "_capture"):
        monkeypatch.setattr(doctor, name, lambda *_: None)
    monkeypatch.setattr(doctor, "_devices", list)

    def call():
        document = doctor.doctor_document()
        return document, doctor.doctor_text(document)

    return call


def test_kernels_in_use(says, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(library, "kernels", lambda: Kernels(None, "avx2", ("avx512", "avx2"), ("avx512 is damaged",)))
    document, text = says()
    assert document["kernels"]["used"] == "avx2"
    assert document["kernels"]["built"] == ["avx512", "avx2"]
    assert "avx512 is damaged" in document["problems"]
    assert "kernels: avx2 is used; built: avx512, avx2; this processor runs: " in text


def test_none_wanted_is_no_problem(says, monkeypatch):
    monkeypatch.setenv(VARIABLE, "none")
    document, text = says()
    assert document["kernels"]["used"] is None
    assert document["problems"] == []
    assert "predictions run on scipy (DSR_TOOL_KERNELS=none)" in text


def test_a_wish_that_cannot_be_met_is_a_problem(says, monkeypatch):
    monkeypatch.setenv(VARIABLE, "avx9")
    document, _ = says()
    assert "DSR_TOOL_KERNELS 'avx9' is unknown" in document["problems"][0]


def test_nothing_built_comes_with_the_remedy(says, monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(library, "kernels", lambda: library.choose("", tmp_path))
    document, text = says()
    assert "make kernels" in document["problems"][0]
    assert "built: none" in text
