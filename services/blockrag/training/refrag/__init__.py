"""Learning to read compressed passages (REFRAG, arXiv 2509.01092): behind ``blockrag adapt refrag``.

From the data to the bundle::

    texts          long texts as passages that follow each other
    chunk_masks    which chunks a prompt shows word for word
    stage_samples  what a stage learns from: contexts, each in several compositions
    composed       block passes that keep K and V, and final passes over any composition of them, differentiable
    reader         decoder, chunk encoder and projector together: the losses of samples
    trainer        one step: parts of its samples, gradients, the update
    stage_bundles  what a stage starts from, and the bundle that it ends with
    stages         a stage, as the loop of every training (``training.loop``) runs it, and what it is measured on
    policy…        the stage that learns what to expand, with everything else frozen

One worker or many run the same loop. Nothing here knows Ray.
"""
