"""What the demo reads: real documentation that every CPython carries, with one fact put deep inside.

The fact is not in the documentation, so no model knows it by heart: a right answer proves that the tokens that hold it
were read. Nothing else in the text is touched, and the page and the terminal say which sentence was put in and where.
"""

from __future__ import annotations

from dataclasses import dataclass

TOPIC = "execmodel"
LIMIT_CHARS = 12_000  # about 2,600 tokens: as long as the 135M speculator judges well
DEPTH = 0.6


@dataclass(frozen=True)
class Fact:
    sentence: str
    question: str
    answer: str


@dataclass(frozen=True)
class Story:
    """A document, a question, and what is known about the answer."""

    title: str
    document: str
    question: str
    expected: str | None = None
    inserted: str | None = None

    def is_right(self, answer: str) -> bool | None:
        """Whether the expected words are in the answer; None when nobody said what to expect."""
        return None if self.expected is None else self.expected.casefold() in answer.casefold()

    @property
    def prompt(self) -> str:
        return (
            "Read the document and answer the question that follows it.\n\n"
            f"{self.document.strip()}\n\n"
            f"Question: {self.question.strip()}\nAnswer in one short sentence."
        )

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.prompt}]


FACT = Fact(
    sentence="The spare key to the observatory is kept in a green tin box behind the third bookshelf.",
    question="Where is the spare key to the observatory kept?",
    answer="green tin box",
)


def default_story(topic: str = TOPIC, fact: Fact = FACT, depth: float = DEPTH, limit: int = LIMIT_CHARS) -> Story:
    """Raises RuntimeError where the Python at hand came without its documentation topics."""
    text = documentation(topic, limit)
    document = insert_paragraph(text, fact.sentence, depth)
    return Story(
        title=f"The Python documentation, topic “{topic}”",
        document=document,
        question=fact.question,
        expected=fact.answer,
        inserted=fact.sentence,
    )


def documentation(topic: str, limit: int) -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise RuntimeError(
            "this Python came without pydoc_data, whose text the demo reads; pass --document FILE --question TEXT"
        ) from error
    return cut(topics[topic], limit)


def cut(text: str, limit: int) -> str:
    """At most `limit` characters, ending with a paragraph."""
    if len(text) <= limit:
        return text.strip()
    end = text.rfind("\n\n", 0, limit)
    return text[: end if end > 0 else limit].strip()


def insert_paragraph(text: str, sentence: str, depth: float) -> str:
    """`sentence` as a paragraph of its own at the paragraph break nearest to `depth` (0 the start, 1 the end)."""
    breaks = [0, len(text)]
    at = text.find("\n\n")
    while at != -1:
        breaks.append(at)
        at = text.find("\n\n", at + 2)
    place = min(breaks, key=lambda position: abs(position - depth * len(text)))
    before, after = text[:place].rstrip("\n"), text[place:].lstrip("\n")
    return "\n\n".join(part for part in (before, sentence, after) if part)
