"""Learning to read compressed passages (REFRAG, arXiv 2509.01092): behind ``blockrag adapt refrag``.

From the data to the bundle::

    texts      long texts as passages that follow each other
    masks      which chunks a prompt shows word for word
    samples    what a stage learns from: contexts, each in several compositions
    stages     the samples and the held-out samples of each stage
    composed   block passes that keep K and V, and final passes over any composition of them, differentiable
    reader     decoder, chunk encoder and projector together: the losses of samples
    trainer    one step: parts of its samples, gradients, the update
    scores     held-out scores, by composition
    opening    what a stage starts from
    adapt      a stage, as the loop of every training (``training.loop``) runs it
    writing    the bundle that a stage ends with
    policy…    the stage that learns what to expand, with everything else frozen

One worker or many run the same loop. Nothing here knows Ray.
"""
