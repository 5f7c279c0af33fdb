"""The almanac: the sample corpus, written from a fact book's figures by templates of this package.

``facts (archive) -> profile -> sections -> article -> questions``: `profile` reads the source, `values` and `lists`
parse its messy values, the section modules turn them into sentences, `articles` puts them together and `questions`
draws the question set from the same statements. `blockrag.corpus.sample` loads what ships with the package;
`blockrag.corpus.generate` writes it again.
"""
