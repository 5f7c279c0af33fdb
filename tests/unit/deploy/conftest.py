"""Ray warns while it is imported, and warnings are errors here: import it where that does not count."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray.autoscaler._private.util
    import ray.serve.schema  # noqa: F401
