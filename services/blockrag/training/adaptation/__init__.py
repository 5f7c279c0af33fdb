"""Adapting a checkpoint to block attention: behind ``blockrag adapt block``.

From the data to the bundle::

    samples     question rows, checked line by line; a row becomes a prompt with 1 to 20 passages
    contexts    instead, many questions behind one context
    batch       contexts become rows of a tensor; visibility: what each of their tokens may see
    block       the run; one optimiser step: every sample under both masks, loss on answers
    source      what it starts from, and the bundle that it ends with

``training.loop`` runs it, on one worker or many (``training.workers``), in a folder (``training.run``). Nothing here
knows Ray.
"""
