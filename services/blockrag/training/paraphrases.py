"""Other wordings of the pattern questions."""

from __future__ import annotations

from random import Random

from blockrag.training.data import Question

_WORDINGS: dict[str, tuple[str, ...]] = {
    "is_a": (
        "Who or what is {title}?",
        "What kind of thing is {title}?",
        "What can be said about {title}?",
        "{title}?",
    ),
    "born_date": ("On what date was {title} born?", "What is {title}'s birthday?", "{title} was born when?"),
    "died_date": ("On what date did {title} die?", "What is the date of death of {title}?", "{title} died when?"),
    "nationality_occ": ("What country is {title} from?", "Of what nationality is {title}?", "{title}'s nationality?"),
    "population": (
        "How many people live in {title}?",
        "How many inhabitants does {title} have?",
        "What is {title}'s population?",
        "How many residents are there in {title}?",
        "How large is the population of {title}?",
    ),
    "located": (
        "Where is {title}?",
        "Where can {title} be found?",
        "In what place is {title}?",
        "Where does {title} lie?",
    ),
    "known_as": (
        "What other name does {title} have?",
        "By what other name is {title} known?",
        "What is {title} called?",
    ),
    "founded": (
        "When was {title} established?",
        "In which year was {title} founded?",
        "Since when does {title} exist?",
        "What year was {title} formed?",
    ),
    "directed": ("Who is the director of {title}?", "Which director made {title}?", "{title} was directed by whom?"),
    "released": ("When did {title} come out?", "What is the release date of {title}?", "{title} was released when?"),
    "produced": ("Who was the producer of {title}?", "Which company or person produced {title}?"),
    "written": ("Who is the author of {title}?", "Who was the writer of {title}?", "By whom was {title} written?"),
    "capital": (
        "{title} is the capital of what?",
        "What has {title} as its capital?",
        "Which region's capital is {title}?",
    ),
    "plays_for": ("What team is {title} on?", "For whom does {title} play?", "Which club does {title} play for?"),
    "album_by": ("Who made the album {title}?", "Whose album is {title}?", "Which artist released {title}?"),
    "capacity": ("How many people fit into {title}?", "How many seats does {title} have?", "How large is {title}?"),
    "plays_as": ("In what position does {title} play?", "What is {title}'s position?", "As what does {title} play?"),
}


def paraphrase(question: Question, title: str, random: Random) -> Question:
    """The same question in another wording, where its relation has one."""
    wordings = _WORDINGS.get(question.relation)
    if not wordings:
        return question
    text = random.choice(wordings).format(title=title)
    return Question(text, question.answers, question.relation, question.table)
