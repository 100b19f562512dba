"""Sums that the ranks of a training step add up."""

# Fields of the sums that ranks add up at each step.
LOSS, TOKENS, CORRECT, CTC, KL, UTTERANCES, SAMPLES = range(7)
LOAD_SECONDS, ENCODE_SECONDS, ENCODED, REJECTED, STOP = range(7, 12)
SUMS = STOP + 1  # behind them (tasks, 3): cross-entropy, tokens, correct ones of each task
