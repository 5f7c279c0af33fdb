"""``blockrag bench peers``: blockrag, stock transformers and llama.cpp on the same weights and prompts, interleaved.

Each is a process of its own that reads one JSON object a line and answers one (``ours.py`` says what), so that
their memory can be told apart and none slows another's interpreter down. They never compute at the same time.
"""
