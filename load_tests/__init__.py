"""Load tests over gRPC: Locust users that ask the sample corpus, and a gate on what they saw."""
