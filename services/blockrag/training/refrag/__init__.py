"""Learning to read compressed passages (REFRAG, arXiv 2509.01092): behind ``blockrag adapt refrag``.

From the data to the bundle::

    texts      long texts as passages of one title; questions: contexts with questions
    masks      which chunks a sample shows word for word
    samples    what a stage learns from, as contexts with compositions
    composed   block passes that keep K and V, and final passes over any composition of them, differentiable
    reader     decoder, chunk encoder and projector together: the losses of a part of a step
    run        the loop of all stages: budget, checkpoints, metrics, held-out scores
    writing    the bundle

Nothing here knows Ray.
"""
