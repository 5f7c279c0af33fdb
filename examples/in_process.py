"""Answer in this process, without Ray: the planner and the decoder's engine that the services run.

python examples/in_process.py [BUNDLE]
"""

import sys

from blockrag.configured import configured_bundle
from blockrag.evaluation.drawing import Piece
from blockrag.evaluation.reader import Prompt, Reader
from blockrag.settings import BundleSettings, Settings

PASSAGES = (
    Piece("Uruguay", "Uruguay is a country in South America. Its capital and largest city is Montevideo."),
    Piece("Norway", "Norway is a country in Northern Europe. Its capital is Oslo, its highest peak Galdhopiggen."),
)
QUESTION = "What is the highest peak of Norway?"

settings = Settings(bundle=BundleSettings(path=sys.argv[1] if len(sys.argv) > 1 else ""))
bundle = configured_bundle(settings)
with Reader(bundle, settings) as reader:
    for mode in ("block", "full", "none"):
        planned = reader.plan(Prompt(PASSAGES if mode != "none" else (), QUESTION, mode))
        print(f"{mode}: {reader.answer([planned])[0]!r} from {planned.slots} slots of passages")
