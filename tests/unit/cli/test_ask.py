from blockrag.cli.ask import compression_note, reading_lines
from blockrag.results import Citation, CitedChunk, Completion, Usage


def completion(*citations: Citation) -> Completion:
    usage = Usage(20, 20, 20, 0, 0, 4, 1, context_tokens=40, compressed_chunks=3)
    return Completion("r", "a", citations, usage, {}, "end", 1.0, 0, "f", "block", "t")


def citation(index: int, *chunks: CitedChunk, in_prompt: bool = True) -> Citation:
    return Citation(index, "p", "d", "title", 12, in_prompt, "", chunks)


def test_words_are_shown_as_they_were_read() -> None:
    lines = list(
        reading_lines(
            completion(
                citation(
                    0,
                    CitedChunk(0, 4, "compressed", " Peru is a country"),
                    CitedChunk(4, 8, "compressed", " in the west of South America."),
                    CitedChunk(8, 12, "expanded", " Its capital is [bold]Lima"),
                    CitedChunk(12, 13, "compressed", "."),
                ),
                citation(1, CitedChunk(0, 4, "dropped", " Oslo"), in_prompt=False),
                citation(2, CitedChunk(0, 4, "expanded", " all of it")),
            )
        )
    )
    assert [line.plain for line in lines] == [
        "  [1]  ‹Peru is a country … of South America.› Its capital is [bold]Lima‹.›",
        "  [3]  all of it",
    ]
    dimmed = [lines[0].plain[span.start : span.end] for span in lines[0].spans if span.style == "dim"]
    assert dimmed == [" ‹Peru is a country … of South America.›", "‹.›"]


def test_answers_without_compression_show_nothing_more() -> None:
    plain = completion(citation(0, CitedChunk(0, 4, "expanded")))
    assert list(reading_lines(plain)) == []
    assert compression_note(Usage(20, 0, 0, 0, 0, 4, 1, context_tokens=12)) == ""
    assert compression_note(plain.usage) == "40 passage tokens, 3 chunks of them compressed"
