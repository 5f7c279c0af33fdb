"""What a cluster would do: questions, tiers of blocks and decoders as a discrete-event simulation."""
