"""Documents become passages: parsing, splitting, versions. Pure: no Ray, no gRPC, no index.

Bytes become text in ``parsing``, which ``parser_pool`` runs in processes that can be ended (``worker``); ``pipeline``
makes passages of it.
"""
