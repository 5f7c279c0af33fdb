"""Pages, forms and damage of pdf files."""

from __future__ import annotations

import io

import pytest
from pypdf import PdfReader, PdfWriter
from pypdf.generic import ArrayObject, DictionaryObject, NameObject, NumberObject, StreamObject, TextStringObject

from blockrag.errors import InvalidRequestError
from blockrag.ingest.media import MediaType
from blockrag.ingest.pdf import join_hyphenated
from tests.unit.ingest.reading import case, parsed, prepare
from tests.unit.ingest.test_parsing import make_pdf


def test_a_damaged_page_is_named() -> None:
    """Row A5."""
    with pytest.raises(InvalidRequestError, match=r"page 2: ") as caught:
        case("one-broken-page.pdf")
    assert caught.value.field == "content"
    assert case("control.pdf")[0][1] == ["Refunds take five days.\nThey are paid in euro."]


@pytest.mark.parametrize("damage", ["cut", "garbage", "no object", "in a form", "no page"])
def test_damage_of_any_kind_is_named(damage: str) -> None:
    """Row A5: the kind."""
    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(make_pdf(*(f"Page {n}. " + "words " * 200 for n in range(3))))))
    page = writer.pages[1]
    stream = page["/Contents"].get_object().flate_encode()  # type: ignore[union-attr]
    if damage == "cut":
        stream._data = stream._data[: len(stream._data) // 2]
    elif damage == "garbage":
        stream._data = b"\x00\xff" * 40
    page[NameObject("/Contents")] = writer._add_object(stream)
    if damage == "no object":
        page[NameObject("/Contents")] = NumberObject(7)
    elif damage == "in a form":
        form = StreamObject()
        form.update({NameObject("/Subtype"): NameObject("/Form"), NameObject("/Filter"): NameObject("/FlateDecode")})
        form._data = b"no deflate"
        forms = DictionaryObject({NameObject("/F"): writer._add_object(form)})
        page[NameObject("/Resources")][NameObject("/XObject")] = forms  # type: ignore[index]
    elif damage == "no page":
        writer.root_object["/Pages"]["/Kids"][1] = NumberObject(0)  # type: ignore[index]
    buffer = io.BytesIO()
    writer.write(buffer)

    with pytest.raises(InvalidRequestError, match="page 2: "):
        prepare(buffer.getvalue(), "a.pdf")


def test_what_was_filled_into_a_form_is_read() -> None:
    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(make_pdf("Application for leave."))))
    page = writer.pages[0]
    fields = [("name", "/Tx", "Ines Calder"), ("reason", "/Ch", "wedding"), ("empty", "/Tx", "")]
    annotations = ArrayObject()
    for name, kind, value in fields:
        annotations.append(
            writer._add_object(
                DictionaryObject(
                    {
                        NameObject("/Subtype"): NameObject("/Widget"),
                        NameObject("/FT"): NameObject(kind),
                        NameObject("/T"): TextStringObject(name),
                        NameObject("/V"): TextStringObject(value),
                    }
                )
            )
        )
    page[NameObject("/Annots")] = annotations
    buffer = io.BytesIO()
    writer.write(buffer)

    assert parsed(buffer.getvalue(), MediaType.PDF)[1] == (
        "Application for leave.\n\nname: Ines Calder\nreason: wedding\n\n"
    )


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("pojiš-\ntění", "pojištění"),
        ("ubezpie-\nczenie", "ubezpieczenie"),
        ("bizto-\nsítás", "biztosítás"),
        ("страхо-\nвание", "страхование"),
        ("ασφά-\nλεια", "ασφάλεια"),
        ("ապահո\u058a\nվագրում", "ապահովագրում"),
        ("insur\u2010\nance", "insurance"),
        ("insur- \n  ance", "insurance"),
        ("Nord-\nSüd", "Nord-\nSüd"),
        ("vitamin A-\nrich", "vitamin A-\nrich"),
        ("1990-\n2000", "1990-\n2000"),
    ],
)
def test_hyphens_at_lines_ends(text: str, right: str) -> None:
    """Row C5."""
    assert join_hyphenated(text) == right


@pytest.mark.parametrize("title", ["Microsoft Word - Document1", "untitled"])
def test_a_pdfs_title_that_is_none_is_passed_over(title: str) -> None:
    """Row C6."""
    assert parsed(make_pdf("Text.", title=title), MediaType.PDF, "leave_policy.pdf")[0] == "leave policy"
