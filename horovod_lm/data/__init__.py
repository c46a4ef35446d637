"""From corpora to batches: text, tokenizer, memory-mapped token shards, sampler, batches."""
