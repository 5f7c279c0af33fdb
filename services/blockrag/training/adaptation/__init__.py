"""Adapting a checkpoint to block attention: ``adapt.adapt_block``, behind ``blockrag adapt block``.

From the data to the bundle::

    rows      question rows, checked line by line
    samples   a row becomes a prompt: 1 to 20 passages, the gold ones at any place or absent
    batch     samples become rows of a tensor; masks: what each of their tokens may see
    trainer   one optimiser step: every sample under both masks, loss on answers
    run       the folder of a run: checkpoints, metrics, who is writing
    writing   the bundle

One worker or many run the same loop (``workers``). Nothing here knows Ray.
"""
